"""An unconditional latent diffusion with a quantised autoencoder, as Lightning writes it, with the average of its weights."""

import math
from pathlib import Path

import torch
from openai_layout import random_state

OPTIONS = {"image_size": 8, "num_head_channels": 32, "scale_factor": 1.0}


def autoencoder_state(channels=3, widths=(32, 64), layers=1, attention=(False, True), codes=16, seed=5):
    """An autoencoder with random weights: quantised with `codes`, else with moments."""
    generator = torch.Generator().manual_seed(seed)
    state = {}

    def layer(name, *shape):
        state[f"{name}.weight"] = torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))
        state[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=generator)

    def norm(name, width):
        state[f"{name}.weight"] = 1 + 0.2 * torch.randn(width, generator=generator)
        state[f"{name}.bias"] = 0.2 * torch.randn(width, generator=generator)

    def residual(name, width, out):
        norm(f"{name}.norm1", width)
        layer(f"{name}.conv1", out, width, 3, 3)
        norm(f"{name}.norm2", out)
        layer(f"{name}.conv2", out, out, 3, 3)
        if width != out:
            layer(f"{name}.nin_shortcut", out, width, 1, 1)

    def attend(name, width):
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            layer(f"{name}.{part}", width, width, 1, 1)

    moments = channels if codes else 2 * channels
    for half in ("encoder", "decoder"):
        levels = list(range(len(widths)))
        width = widths[0] if half == "encoder" else widths[-1]
        layer(f"{half}.conv_in", width, 3 if half == "encoder" else channels, 3, 3)
        for level in levels if half == "encoder" else reversed(levels):
            name = f"encoder.down.{level}" if half == "encoder" else f"decoder.up.{level}"
            for i in range(layers + (half == "decoder")):
                residual(f"{name}.block.{i}", width, widths[level])
                width = widths[level]
                if attention[level]:
                    attend(f"{name}.attn.{i}", width)
            if level != (levels[-1] if half == "encoder" else 0):
                layer(f"{name}.{'down' if half == 'encoder' else 'up'}sample.conv", width, width, 3, 3)
        residual(f"{half}.mid.block_1", widths[-1], widths[-1])
        attend(f"{half}.mid.attn_1", widths[-1])
        residual(f"{half}.mid.block_2", widths[-1], widths[-1])
        norm(f"{half}.norm_out", width)
        layer(f"{half}.conv_out", moments if half == "encoder" else 3, width, 3, 3)
    layer("quant_conv", moments, moments, 1, 1)
    layer("post_quant_conv", channels, channels, 1, 1)
    if codes:
        state["quantize.embedding.weight"] = torch.randn(codes, channels, generator=generator)
    return state


def container(unet, first, average=None, ends=(0.0015, 0.0195), **more):
    """Lightning's dictionary of an LDM."""
    betas = torch.linspace(ends[0] ** 0.5, ends[1] ** 0.5, 1000, dtype=torch.float64).square().float()
    state = {"betas": betas, "alphas_cumprod": torch.cumprod(1 - betas, 0), "logvar": torch.zeros(1000)}
    state |= {f"model.diffusion_model.{key}": value for key, value in unet.items()}
    if average is not None:
        state |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(5)}
        state |= {"model_ema.diffusion_model" + key.replace(".", ""): value for key, value in average.items()}
    state |= {f"first_stage_model.{key}": value for key, value in first.items()}
    return {"state_dict": {**state, **more}, "epoch": 3, "global_step": 7, "pytorch-lightning_version": "1.4.2",
            "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2)}}}]}  # fmt: skip


UNET = {"widths": (32, 64), "attention": (False, True), "scale_shift": False}


def write(folder: Path) -> Path:
    tree = container(random_state(**UNET), {**autoencoder_state(), "loss.discriminator.main.0.weight": torch.zeros(2)},
                     random_state(**UNET, seed=1))  # fmt: skip
    torch.save(tree, folder / "model.ckpt")
    return folder / "model.ckpt"
