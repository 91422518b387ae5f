"""A small Stable Diffusion XL in one file: three levels, a vector of pooled text and sizes, CLIP in two layouts."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from conversion.checkpoints.ldm import autoencoder_state
from openai_layout import random_state
from safetensors.torch import save_file

WIDTH, LENGTH, VOCABULARY, SIZES = 64, 77, 514, 8  # of the second encoder's text; numbers that each of the six sizes becomes
FIRST_WIDTH = 32


def tokenizer_folder(folder: Path, length=LENGTH) -> Path:
    """A folder with vocab.json, which versions of transformers do not all write."""
    from conftest import make_tokenizer

    make_tokenizer(length).save_pretrained(folder)
    if not (folder / "vocab.json").is_file():
        words = json.loads((folder / "tokenizer.json").read_text())["model"]
        (folder / "vocab.json").write_text(json.dumps(words["vocab"]))
        (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


def open_clip_state(width=WIDTH, length=LENGTH, vocabulary=VOCABULARY, layers=3, seed=4):
    """The text tower of an open_clip model."""
    generator = torch.Generator().manual_seed(seed)
    text = {"positional_embedding": (length, width), "text_projection": (width, width), "token_embedding.weight": (vocabulary, width)}
    for i in range(layers):
        block = f"transformer.resblocks.{i}"
        text |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
        for name, out, into in (("attn.out_proj", width, width), ("mlp.c_fc", 4 * width, width), ("mlp.c_proj", width, 4 * width)):
            text |= {f"{block}.{name}.weight": (out, into), f"{block}.{name}.bias": (out,)}
        text |= {f"{block}.{norm}.{part}": (width,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")}
    text |= {"ln_final.weight": (width,), "ln_final.bias": (width,), "logit_scale": ()}
    return {key: torch.randn(shape, generator=generator) / (shape[-1] ** 0.5 if shape else 1) for key, shape in text.items()}


def clip_state(seed=0, width=FIRST_WIDTH, layers=3):
    """The text half of a CLIP of transformers, as files had it before the wrapper went: all keys under text_model."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=64, num_hidden_layers=layers, max_position_embeddings=LENGTH,
        num_attention_heads=max(1, width // 64), bos_token_id=VOCABULARY - 2, eos_token_id=VOCABULARY - 1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPTextModel(config).eval()
    return model, {f"text_model.{key.removeprefix('text_model.')}": value for key, value in model.state_dict().items()}


def unet_state(seed=2):
    state = random_state(widths=(64, 64, 128), attention=(False, True, True), scale_shift=False, context=FIRST_WIDTH + WIDTH,
                         in_channels=4, out_channels=4, depth=(0, 1, 2), seed=seed)  # fmt: skip
    for key in [key for key in state if key.endswith(("proj_in.weight", "proj_out.weight"))]:
        state[key] = state[key].flatten(1)  # its transformers have linear layers there
    generator = torch.Generator().manual_seed(9)
    told, time = WIDTH + 6 * SIZES, 256
    for name, into in (("label_emb.0.0", told), ("label_emb.0.2", time)):
        state[f"{name}.weight"] = torch.randn(time, into, generator=generator) / into**0.5
        state[f"{name}.bias"] = 0.1 * torch.randn(time, generator=generator)
    return state


def parts():
    """The file's tensors by their keys."""
    tree = {f"model.diffusion_model.{key}": value for key, value in unet_state().items()}
    tree |= {f"first_stage_model.{key}": value for key, value in autoencoder_state(channels=4, codes=0, attention=(False, False)).items()}
    tree |= {f"conditioner.embedders.0.transformer.{key}": value for key, value in clip_state()[1].items()}
    tree |= {f"conditioner.embedders.1.model.{key}": value for key, value in open_clip_state().items()}
    return {**tree, "denoiser.sigmas": torch.ones(1000)}


OPTIONS = {"tokenizer": "", "image_size": 8}  # the folder is made with the file


def write(folder: Path, name="model.safetensors", **more) -> Path:
    OPTIONS["tokenizer"] = str(tokenizer_folder(folder / "tokenizer"))
    save_file({key: value.contiguous() for key, value in {**parts(), **more}.items()}, folder / name)
    return folder / name
