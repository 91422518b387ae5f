"""Tiny random components of a latent text-to-image pipeline, built in memory: no network, no downloads, a few milliseconds each.

Every `make_*` function gives a new object with the same weights for the same seed and leaves torch's global random state alone;
the fixtures of the same name without `make_` share one object per session (do not change them: use the functions for that).
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

TEXT_WIDTH = 32
LATENT_CHANNELS = 4
LATENT_SIZE = 8  # pictures are 16 x 16: the autoencoder halves once
MAX_TOKENS = 16


def _seeded(build, seed: int):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().eval()


def make_tokenizer(max_length: int = MAX_TOKENS):
    """A CLIP tokenizer with bytes for tokens and no merges: 514 entries."""
    from transformers import CLIPTokenizer

    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = [chr(b) for b in keep] + [chr(256 + i) for i in range(256 - len(keep))]
    words = alphabet + [a + "</w>" for a in alphabet] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=max_length)


def make_text_encoder(seed: int = 0, max_length: int = MAX_TOKENS):
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=514,
        hidden_size=TEXT_WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=max_length,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    return _seeded(lambda: CLIPTextModel(config), seed)


def make_vae(seed: int = 1):
    from diffusers import AutoencoderKL

    return _seeded(
        lambda: AutoencoderKL(
            block_out_channels=(16, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            norm_num_groups=8,
            latent_channels=LATENT_CHANNELS,
            sample_size=2 * LATENT_SIZE,
        ),
        seed,
    )


def make_unet(seed: int = 2):
    from diffusers import UNet2DConditionModel

    return _seeded(
        lambda: UNet2DConditionModel(
            sample_size=LATENT_SIZE,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=4,
            cross_attention_dim=TEXT_WIDTH,
        ),
        seed,
    )


def make_transformer(seed: int = 3, **changes):
    from diffusers import PixArtTransformer2DModel

    config = {
        "sample_size": LATENT_SIZE,
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "num_layers": 2,
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "cross_attention_dim": 32,
        "caption_channels": TEXT_WIDTH,
        "patch_size": 2,
        "use_additional_conditions": False,
    }
    return _seeded(lambda: PixArtTransformer2DModel(**{**config, **changes}), seed)


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def text_encoder():
    return make_text_encoder()


@pytest.fixture(scope="session")
def vae():
    return make_vae()


@pytest.fixture(scope="session")
def unet():
    return make_unet()


@pytest.fixture(scope="session")
def transformer():
    return make_transformer()


def make_sd_folder(path, scheduler=None) -> str:
    """Saves a Stable Diffusion 1.x folder as diffusers itself writes it and returns its path."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    scheduler = scheduler or DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    pipe = StableDiffusionPipeline(
        vae=make_vae(),
        text_encoder=make_text_encoder(),
        tokenizer=make_tokenizer(),
        unet=make_unet(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(str(path))
    return str(path)


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory) -> str:
    return make_sd_folder(tmp_path_factory.mktemp("sd"))
