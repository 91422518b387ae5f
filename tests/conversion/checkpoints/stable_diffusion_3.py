"""A small Stable Diffusion 3 in one file: two blocks, an autoencoder without convolutions around its latents, three text encoders."""

from __future__ import annotations

from pathlib import Path

import torch
from conversion.checkpoints.ldm import autoencoder_state
from conversion.checkpoints.stable_diffusion_xl import clip_state, tokenizer_folder
from safetensors.torch import save_file

WIDTH, JOINT, CHANNELS, GRID, FIRST, SECOND = 128, 96, 4, 6, 32, 32  # of tokens, of text, latents, positions, of the CLIPs


def transformer_state(blocks=2, norms=True, dual=(0,), seed=0):
    """An MMDiT with random weights: its last block only reads the text."""
    generator, state = torch.Generator().manual_seed(seed), {}

    def layer(name, out, *into):
        fan_in = torch.Size(into).numel()
        state[f"{name}.weight"] = torch.randn(out, *into, generator=generator) / fan_in**0.5
        state[f"{name}.bias"] = 0.1 * torch.randn(out, generator=generator)

    layer("x_embedder.proj", WIDTH, CHANNELS, 2, 2)
    state["pos_embed"] = torch.randn(1, GRID**2, WIDTH, generator=generator)
    widths = {"t_embedder.mlp.0": 256, "t_embedder.mlp.2": WIDTH, "y_embedder.mlp.0": FIRST + SECOND, "y_embedder.mlp.2": WIDTH,
              "context_embedder": JOINT}  # fmt: skip
    for name, into in widths.items():
        layer(name, WIDTH, into)
    for i in range(blocks):
        for half in ("x_block", "context_block"):
            block, reads = f"joint_blocks.{i}.{half}", half == "context_block" and i == blocks - 1
            double = half == "x_block" and i in dual
            layer(f"{block}.adaLN_modulation.1", (2 if reads else 9 if double else 6) * WIDTH, WIDTH)
            for attention in ("attn", "attn2") if double else ("attn",):
                layer(f"{block}.{attention}.qkv", 3 * WIDTH, WIDTH)
                if not reads:
                    layer(f"{block}.{attention}.proj", WIDTH, WIDTH)
                for norm in ("ln_q", "ln_k") if norms else ():
                    state[f"{block}.{attention}.{norm}.weight"] = 1 + 0.2 * torch.randn(64, generator=generator)
            if not reads:
                layer(f"{block}.mlp.fc1", 4 * WIDTH, WIDTH)
                layer(f"{block}.mlp.fc2", WIDTH, 4 * WIDTH)
    layer("final_layer.linear", 4 * CHANNELS, WIDTH)
    layer("final_layer.adaLN_modulation.1", 2 * WIDTH, WIDTH)
    return state


def encoders():
    from tiny_diffusers import make_t5

    state = {}
    for name, seed in (("clip_l", 1), ("clip_g", 2)):
        tower = clip_state(seed)[1]
        state |= {f"text_encoders.{name}.transformer.{key}": value for key, value in tower.items()}
    projection = torch.randn(SECOND, SECOND, generator=torch.Generator().manual_seed(3))
    state["text_encoders.clip_g.transformer.text_projection.weight"] = projection
    t5 = make_t5(width=JOINT).state_dict()
    return state | {f"text_encoders.t5xxl.transformer.{key}": value for key, value in t5.items()}


def parts(with_text=True, **changes):
    whole = autoencoder_state(channels=CHANNELS, codes=0, attention=(False, False))
    first = {key: value for key, value in whole.items() if "quant" not in key}
    state = {f"model.diffusion_model.{key}": value for key, value in transformer_state(**changes).items()}
    state |= {f"first_stage_model.{key}": value for key, value in first.items()}
    return state | (encoders() if with_text else {})


OPTIONS = {"image_size": 8}  # the folders are made with the file


def write(folder: Path, state=None) -> Path:
    from tiny_diffusers import make_t5_tokenizer

    make_t5_tokenizer().save_pretrained(folder / "t5")
    OPTIONS.update(tokenizer=str(tokenizer_folder(folder / "tokenizer")), tokenizer_3=str(folder / "t5"))
    save_file({key: value.clone().contiguous() for key, value in (state or parts()).items()}, folder / "model.safetensors")
    return folder / "model.safetensors"
