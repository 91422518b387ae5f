"""Tiny random pipelines of diffusers, one per class that loads as ours: a new entry of `TINY` is tested by everything in test_mapped.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import conftest
import torch

WIDTH = conftest.TEXT_WIDTH


def make_clip(seed: int, projected: bool = True, layers: int = 3):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=514, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4, projection_dim=WIDTH,
        max_position_embeddings=conftest.MAX_TOKENS, bos_token_id=512, eos_token_id=513, pad_token_id=513,
    )  # fmt: skip
    return conftest._seeded(lambda: (CLIPTextModelWithProjection if projected else CLIPTextModel)(config), seed)


def make_t5(seed: int = 11, width: int = WIDTH):
    from transformers import T5Config, T5EncoderModel

    return conftest._seeded(
        lambda: T5EncoderModel(T5Config(vocab_size=40, d_model=width, d_ff=32, d_kv=8, num_layers=1, num_heads=4)), seed
    )


def make_t5_tokenizer():
    from transformers import T5Tokenizer

    letters = [(c, -2.0) for c in "abcdefghijklmnopqrstuvwxyz"]
    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *letters], extra_ids=0)


def make_unet(seed: int = 2, **changes: Any):
    from diffusers import UNet2DConditionModel

    config = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 4, "cross_attention_dim": WIDTH,
    }  # fmt: skip
    return conftest._seeded(lambda: UNet2DConditionModel(**{**config, **changes}), seed)


def make_vae(seed: int = 1, **changes: Any):
    from diffusers import AutoencoderKL

    config = {
        "block_out_channels": (16, 32), "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1, "norm_num_groups": 8, "latent_channels": 4, "sample_size": 16,
    }  # fmt: skip
    return conftest._seeded(lambda: AutoencoderKL(**{**config, **changes}), seed)


def make_deep_vae():
    """With 8 pixels to a latent one."""
    return make_vae(
        block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
    )  # fmt: skip


def stable_diffusion():
    import diffusers

    scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return diffusers.StableDiffusionPipeline(
        make_vae(), make_clip(3, projected=False), conftest.make_tokenizer(), make_unet(), scheduler, None, None,
        requires_safety_checker=False,
    )  # fmt: skip


def stable_diffusion_xl(zeros: bool = True, **unet: Any):
    import diffusers

    unet = make_unet(
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        cross_attention_dim=2 * WIDTH, **unet,
    )  # fmt: skip
    vae = make_vae(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.9, 1.1, 1.0, 0.8])
    scheduler = diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1)
    tokenizers = conftest.make_tokenizer(), conftest.make_tokenizer()
    return diffusers.StableDiffusionXLPipeline(
        vae, make_clip(3, projected=False), make_clip(4), *tokenizers, unet, scheduler, force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    )  # fmt: skip


def stable_diffusion_3(with_t5: bool = True, dynamic: bool = False):
    import diffusers

    transformer = conftest._seeded(
        lambda: diffusers.SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
            caption_projection_dim=32, joint_attention_dim=80, pooled_projection_dim=2 * WIDTH, out_channels=4, pos_embed_max_size=24,
        ), 5,
    )  # fmt: skip
    shift = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 4, "max_image_seq_len": 64}
    return diffusers.StableDiffusion3Pipeline(
        transformer, diffusers.FlowMatchEulerDiscreteScheduler(**(shift if dynamic else {"shift": 3.0})),
        make_vae(shift_factor=0.06, scaling_factor=1.5), make_clip(3), conftest.make_tokenizer(), make_clip(4), conftest.make_tokenizer(),
        make_t5(width=80) if with_t5 else None, make_t5_tokenizer() if with_t5 else None,
    )  # fmt: skip


def flux(guided: bool = True, dynamic: bool = True):
    import diffusers

    transformer = conftest._seeded(
        lambda: diffusers.FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH, guidance_embeds=guided, axes_dims_rope=(4, 4, 8),
        ), 6,
    )  # fmt: skip
    shift = {"use_dynamic_shifting": dynamic, "shift": 1.0, "base_image_seq_len": 4, "max_image_seq_len": 64}
    return diffusers.FluxPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(**shift), make_vae(shift_factor=0.11, scaling_factor=0.4),
        make_clip(3, projected=False), conftest.make_tokenizer(), make_t5(), make_t5_tokenizer(), transformer,
    )  # fmt: skip


def latent_consistency():
    import diffusers

    scheduler = diffusers.LCMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    return diffusers.LatentConsistencyModelPipeline(
        make_vae(), make_clip(3, projected=False), conftest.make_tokenizer(), make_unet(time_cond_proj_dim=32), scheduler, None, None,
        requires_safety_checker=False,
    )  # fmt: skip


def latent_diffusion():
    import diffusers
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    bert = LDMBertConfig(
        vocab_size=514, max_position_embeddings=77, encoder_layers=1, encoder_ffn_dim=32, encoder_attention_heads=2, head_dim=8,
        d_model=WIDTH, pad_token_id=513,
    )  # fmt: skip
    bert = conftest._seeded(lambda: LDMBertModel(bert), 7)
    vae = make_deep_vae()
    scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False)
    return diffusers.LDMTextToImagePipeline(vae, bert, conftest.make_tokenizer(77), make_unet(sample_size=4), scheduler)


def pixart_alpha():
    import diffusers

    # the network is told sizes where its own is 128 latent pixels
    transformer = conftest.make_transformer(
        out_channels=8, sample_size=128, use_additional_conditions=True, num_attention_heads=3, cross_attention_dim=24
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(algorithm_type="dpmsolver++")
    return diffusers.PixArtAlphaPipeline(make_t5_tokenizer(), make_t5(), make_vae(), transformer, scheduler)


def pixart_sigma():
    import diffusers

    scheduler = diffusers.DPMSolverMultistepScheduler(algorithm_type="dpmsolver++")
    transformer = conftest.make_transformer(out_channels=8)
    return diffusers.PixArtSigmaPipeline(make_t5_tokenizer(), make_t5(), make_vae(), transformer, scheduler)


@dataclass(frozen=True)
class Tiny:
    """A tiny pipeline of diffusers.

    Args:
        build: makes it.
        calls: name -> arguments that both pipelines are called with.
        theirs: further arguments for diffusers' alone; those that it does not know are in `not_theirs`.
        embeds: the names of what `encode_prompt` gives, in its order; None where it has none.
    """

    build: Callable[[], Any]
    calls: dict[str, dict[str, Any]] = field(default_factory=dict)
    theirs: dict[str, Any] = field(default_factory=dict)
    embeds: tuple[str, ...] | None = None


GUIDED: dict[str, dict[str, Any]] = {
    "plain": {"prompt": "a red apple"},
    "without guidance": {"prompt": "a red apple", "guidance_scale": 1.0},
    "guidance 0": {"prompt": "a red apple", "guidance_scale": 0.0},
    "negative prompt": {"prompt": "a red apple", "negative_prompt": "blue", "guidance_scale": 3.0},
    "an empty negative prompt": {"prompt": "a red apple", "negative_prompt": "", "guidance_scale": 3.0},
    "several": {"prompt": ["apple", "pear"], "negative_prompt": ["blue", "green"], "num_images_per_prompt": 2},
    "size": {"prompt": "apple", "height": 24, "width": 16},
}
SKIPS = {"clip_skip": {"prompt": "a red apple", "clip_skip": 1}}
SECOND = {
    "prompt_2": {"prompt": "apple", "prompt_2": "pear"},
    "negative_prompt_2": {"prompt": "apple", "prompt_2": "pear", "negative_prompt": "blue", "negative_prompt_2": "green"},
}
THIRD = {
    "prompt_3": {"prompt": "apple", "prompt_3": "plum", "negative_prompt": "blue", "negative_prompt_3": "grey"},
    "max_sequence_length": {"prompt": "a long red apple", "max_sequence_length": 7},
}
XL_SIZES = {
    "sizes": {"prompt": "apple", "original_size": (64, 32), "target_size": (48, 24), "crops_coords_top_left": (3, 5)},
    "negative sizes": {
        "prompt": "apple",
        "negative_prompt": "blue",
        "original_size": (64, 32),
        "negative_original_size": (20, 30),
        "negative_crops_coords_top_left": (1, 2),
        "negative_target_size": (40, 50),
    },
}
SMALL = {"height": 16, "width": 16}
FLUX = {
    "plain": {"prompt": "a red apple"},
    "other scale": {"prompt": "a red apple", "guidance_scale": 1.5},
    "several": {"prompt": ["apple", "pear"], "num_images_per_prompt": 2},
    "true guidance": {"prompt": "apple", "negative_prompt": "blue", "true_cfg_scale": 3.0},
    "true guidance, second prompts": {
        "prompt": "apple", "prompt_2": "pear", "negative_prompt": "blue", "negative_prompt_2": "green", "true_cfg_scale": 3.0,
    },
    "true guidance without a negative prompt": {"prompt": "apple", "true_cfg_scale": 3.0},
    "max_sequence_length": {"prompt": "a long red apple", "max_sequence_length": 7},
    "wide": {"prompt": "apple", "height": 16, "width": 32},
}  # fmt: skip
FLUX = {name: {**SMALL, **call} for name, call in FLUX.items()}
PIXART = {
    **GUIDED,
    "capitals": {"prompt": " A Red APPLE "},
    "max_sequence_length": {"prompt": "a long red apple", "max_sequence_length": 7},
}
PIXART = {name: {**SMALL, "use_resolution_binning": False, **call} for name, call in PIXART.items()}
PLAIN_CAPTIONS = {"clean_caption": False}
PAIR = ("prompt_embeds", "negative_prompt_embeds")
POOLED = (*PAIR, "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
MASKED = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")

TINY: dict[str, Tiny] = {
    "StableDiffusionPipeline": Tiny(stable_diffusion, {**GUIDED, **SKIPS}, embeds=PAIR),
    "StableDiffusionXLPipeline": Tiny(stable_diffusion_xl, {**GUIDED, **SKIPS, **SECOND, **XL_SIZES}, embeds=POOLED),
    "StableDiffusionXLPipeline, no zeros": Tiny(lambda: stable_diffusion_xl(zeros=False), {"plain": GUIDED["plain"]}),
    "StableDiffusionXLPipeline, told its scale": Tiny(
        lambda: stable_diffusion_xl(time_cond_proj_dim=16), {name: GUIDED[name] for name in ("plain", "several")}
    ),
    "StableDiffusion3Pipeline": Tiny(stable_diffusion_3, {**GUIDED, **SKIPS, **SECOND, **THIRD}, embeds=POOLED),
    "StableDiffusion3Pipeline, without T5": Tiny(
        lambda: stable_diffusion_3(with_t5=False), {name: GUIDED[name] for name in ("plain", "several")}, embeds=POOLED
    ),
    "StableDiffusion3Pipeline, shifted by size": Tiny(
        lambda: stable_diffusion_3(dynamic=True), {name: GUIDED[name] for name in ("plain", "size")}
    ),
    "FluxPipeline": Tiny(flux, FLUX, embeds=("prompt_embeds", "pooled_prompt_embeds", "")),
    "FluxPipeline, not told its scale": Tiny(lambda: flux(guided=False, dynamic=False), {name: FLUX[name] for name in ("plain", "wide")}),
    "LatentConsistencyModelPipeline": Tiny(
        latent_consistency,
        {
            **{name: GUIDED[name] for name in ("plain", "without guidance", "size")},
            **SKIPS,
            "several": {"prompt": ["apple", "pear"], "num_images_per_prompt": 2},
        },
        embeds=PAIR[:1],
    ),
    "LDMTextToImagePipeline": Tiny(
        latent_diffusion,
        {
            "plain": {"prompt": "a red apple"},
            "guided": {"prompt": ["apple", "pear"], "guidance_scale": 3.0},
            "between 0 and 1": {"prompt": "apple", "guidance_scale": 0.5},
            "size": {"prompt": "apple", "height": 48, "width": 32},
        },
    ),
    "PixArtAlphaPipeline": Tiny(pixart_alpha, PIXART, PLAIN_CAPTIONS, embeds=MASKED),
    "PixArtSigmaPipeline": Tiny(pixart_sigma, PIXART, PLAIN_CAPTIONS, embeds=MASKED),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
