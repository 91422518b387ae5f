"""Tiny pictures, drawn on the fly, and tiny recipes."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = ["red", "green", "blue", "orange"]
SHAPES = ["circle", "square", "triangle"]


def draw(colour: str, shape: str) -> Image.Image:
    picture = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    pen = ImageDraw.Draw(picture)
    if shape == "circle":
        pen.ellipse((4, 4, 27, 27), fill=colour)
    elif shape == "square":
        pen.rectangle((6, 6, 25, 25), fill=colour)
    else:
        pen.polygon([(16, 4), (28, 27), (4, 27)], fill=colour)
    return picture


def autoencoder_recipe(folder: Path, **loop: object) -> dict:
    return {
        "task": "autoencoder",
        "data": {"name": str(folder), "text_column": "text", "resolution": 16, "horizontal_flip": 0.5, "shift": 1},
        "model": {
            "vae": {
                "class": "AutoencoderKL",
                "down_block_types": ["DownEncoderBlock2D"] * 2,
                "up_block_types": ["UpDecoderBlock2D"] * 2,
                "block_out_channels": [8, 16],
                "layers_per_block": 1,
                "latent_channels": 4,
                "norm_num_groups": 4,
                "sample_size": 16,
                "mid_block_add_attention": False,
                "shift_factor": 0.0,
            }
        },
        "optimizer": {"learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 2},
        "ema": {"decay": 0.9},
        "loop": {"steps": 8, "batch_size": 8, "checkpoint_every": 2, "log_every": 1, **loop},
    }


def text_to_image_recipe(folder: Path, vae: Path, **loop: object) -> dict:
    return {
        "task": "latent_text_to_image",
        "data": {"name": str(folder), "text_column": "text", "resolution": 16},
        "model": {
            "vae": {"from": str(vae)},
            "tokenizer": {"vocab_size": 560, "max_length": 12},
            "text_encoder": {
                "class": "CLIPTextModel",
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "attention_dropout": 0.1,  # draws from the global random state: resume must restore it
            },
            "denoiser": {
                "class": "PixArtTransformer2DModel",
                "sample_size": 8,
                "patch_size": 2,
                "in_channels": 4,
                "out_channels": 4,
                "num_layers": 2,
                "num_attention_heads": 2,
                "attention_head_dim": 8,
                "cross_attention_dim": 16,
                "caption_channels": 16,
                "use_additional_conditions": False,
            },
        },
        "objective": {"time_density": {"name": "logit_normal"}, "word_dropout": 0.2, "pseudo_word": 0.2},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
        "ema": {"decay": 0.9},
        "loop": {"steps": 8, "batch_size": 8, "checkpoint_every": 2, "log_every": 1, **loop},
    }


def flow_recipe(folder: Path, **loop: object) -> dict:
    return {
        "task": "flow",
        "data": {"name": str(folder), "resolution": 8, "holdout": 4},
        "model": {
            "flow": {
                "class": "GlowModel",
                "sample_size": 8,
                "num_levels": 2,
                "num_steps": 2,
                "hidden_channels": 8,
                "place_bias": True,
                "pre_transform": "marginal",
                "dequantization": "variational",
            },
            "init_pictures": 16,
        },
        "sample": {"pictures": 4},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
        "ema": {"decay": 0.9},
        "loop": {"steps": 8, "batch_size": 8, "checkpoint_every": 2, "log_every": 1, **loop},
    }


def realnvp_recipe(folder: Path, **loop: object) -> dict:
    recipe = flow_recipe(folder, **loop)
    recipe["model"]["flow"] = {
        "class": "RealNVPModel",
        "sample_size": 8,
        "num_levels": 1,
        "num_couplings": 2,
        "hidden_channels": 8,
        "num_blocks": 1,
    }
    return recipe
