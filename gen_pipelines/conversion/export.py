"""The way back: our networks as state dicts that the tools of other projects load.

A state dict is all that is written: tensors in safetensors. NVIDIA's tools want a pickle of their own classes, which only their code can
make; theirs take such a state dict by `G.load_state_dict(...)`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.gans.stylegan2 import StyleGAN2Discriminator, StyleGAN2Generator
from ..models.gans.stylegan3 import StyleGAN3Generator
from ..models.layers.upfirdn import fir_filter
from .base import write_safetensors

__all__ = ["EXPORTS", "export_state_dict"]


def nvidia_stylegan2(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A StyleGAN2 generator or discriminator with the keys of stylegan2-ada-pytorch and stylegan3, filters included."""
    config = model.config
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if any(buffer == "resample_filter" for buffer, _ in module.named_buffers(recurse=False)):
            state[f"{name}.resample_filter"] = module.resample_filter
    classes = config.num_classes or 0
    if isinstance(model, StyleGAN2Generator):
        synthesis = {"channel_base": config.channel_base, "channel_max": config.channel_max, "conv_clamp": config.conv_clamp,
                     "architecture": config.architecture, "resample_filter": list(config.resample_taps)}  # fmt: skip
        arguments = {
            "z_dim": config.z_dim, "c_dim": classes, "w_dim": config.w_dim, "img_resolution": config.sample_size,
            "img_channels": config.out_channels, "synthesis_kwargs": synthesis,
            "mapping_kwargs": {"num_layers": config.num_mapping_layers, "w_avg_beta": config.w_avg_beta},
        }  # fmt: skip
    else:
        arguments = {
            "c_dim": classes, "img_resolution": config.sample_size, "img_channels": config.in_channels, "architecture": config.architecture,
            "channel_base": config.channel_base, "channel_max": config.channel_max, "conv_clamp": config.conv_clamp,
            "cmap_dim": config.cmap_dim, "block_kwargs": {"resample_filter": list(config.resample_taps)},
            "mapping_kwargs": {"num_layers": config.num_mapping_layers},
            "epilogue_kwargs": {"mbstd_group_size": config.mbstd_group_size, "mbstd_num_channels": config.mbstd_num_channels},
        }  # fmt: skip
    return state, arguments


_SHARED = ("num_layers", "num_critical", "first_cutoff", "first_stopband", "last_stopband_rel", "margin_size", "output_scale",
           "filter_size", "lrelu_upsampling", "conv_clamp")  # fmt: skip


def nvidia_stylegan3(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A StyleGAN3 generator with the keys of stylegan3."""
    config = model.config
    radial = config.variant == "r"
    arguments = {
        "z_dim": config.z_dim, "c_dim": config.num_classes or 0, "w_dim": config.w_dim, "img_resolution": config.sample_size,
        "img_channels": config.out_channels, "mapping_kwargs": {"num_layers": config.num_mapping_layers, "w_avg_beta": config.w_avg_beta},
        "channel_base": config.channel_base * (1 + radial), "channel_max": config.channel_max * (1 + radial),
        "conv_kernel": 1 if radial else 3, "use_radial_filters": radial,
        **{name: config[name] for name in _SHARED},
    }  # fmt: skip
    return dict(model.state_dict()), arguments


def rosinality_stylegan2(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A StyleGAN2 generator with the keys of rosinality's stylegan2-pytorch; `latent_avg` lies beside it in their files."""
    config = model.config
    if config.architecture != "skip" or config.num_classes is not None or config.out_channels != 3 or config.z_dim != config.w_dim:
        raise ValueError("rosinality's StyleGAN2 has architecture 'skip', no classes, three colours and z_dim = w_dim; this one has not.")
    if config.conv_clamp is not None:
        raise ValueError(f"rosinality's StyleGAN2 does not clamp; this one does, to {config.conv_clamp}.")
    ours, state = model.state_dict(), {}
    kernel = 4 * fir_filter(tuple(config.resample_taps))
    for i in range(config.num_mapping_layers):
        state |= {f"style.{i + 1}.{leaf}": ours[f"mapping.fc{i}.{leaf}"] for leaf in ("weight", "bias")}
    state["input.input"] = ours["synthesis.b4.const"][None]
    for i, size in enumerate(model.synthesis.sizes):
        here, number = f"synthesis.b{size}", int(math.log2(size)) * 2 - 5
        layers = {"conv1": "conv1"} if i == 0 else {"conv0": f"convs.{2 * i - 2}", "conv1": f"convs.{2 * i - 1}"}
        for name, theirs in layers.items():
            layer = f"{here}.{name}"
            state[f"{theirs}.conv.weight"] = ours[f"{layer}.weight"][None]
            state[f"{theirs}.noise.weight"] = ours[f"{layer}.noise_strength"].reshape(1)
            state[f"{theirs}.activate.bias"] = ours[f"{layer}.bias"]
            state[f"noises.noise_{number + (name == 'conv1')}"] = ours[f"{layer}.noise_const"][None, None]
            state |= {f"{theirs}.conv.modulation.{leaf}": ours[f"{layer}.affine.{leaf}"] for leaf in ("weight", "bias")}
            if name == "conv0":
                state[f"{theirs}.conv.blur.kernel"] = kernel
        theirs = "to_rgb1" if i == 0 else f"to_rgbs.{i - 1}"
        state[f"{theirs}.conv.weight"] = ours[f"{here}.torgb.weight"][None]
        state[f"{theirs}.bias"] = ours[f"{here}.torgb.bias"].view(1, -1, 1, 1)
        state |= {f"{theirs}.conv.modulation.{leaf}": ours[f"{here}.torgb.affine.{leaf}"] for leaf in ("weight", "bias")}
        if i:
            state[f"{theirs}.upsample.kernel"] = kernel
    return state, {"size": config.sample_size, "style_dim": config.w_dim, "n_mlp": config.num_mapping_layers}


# format -> (classes of ours, function)
EXPORTS: Mapping[str, tuple[tuple[type, ...], Any]] = {
    "stylegan2_ada": ((StyleGAN2Generator, StyleGAN2Discriminator), nvidia_stylegan2),
    "stylegan3": ((StyleGAN3Generator, StyleGAN2Discriminator), None),
    "rosinality_stylegan2": ((StyleGAN2Generator,), rosinality_stylegan2),
}


@torch.no_grad()
def export_state_dict(model: nn.Module, format: str, file: str | Path | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A network of ours with another project's key names.

    Args:
        model: a network, such as `pipe.generator`.
        format: one of `EXPORTS`.
        file: where to write the tensors, as safetensors; None to write nothing.
    Returns: the state dict, on the CPU, and the arguments of the foreign constructor that it fits.
    Raises:
        ValueError: no such format, or one that has no such network.
    """
    if format not in EXPORTS:
        raise ValueError(f"format {format!r} is none of {', '.join(EXPORTS)}.")
    classes, function = EXPORTS[format]
    if not isinstance(model, classes):
        raise ValueError(f"{format} has no {type(model).__name__}; it has {', '.join(cls.__name__ for cls in classes)}.")
    function = function or (nvidia_stylegan3 if isinstance(model, StyleGAN3Generator) else nvidia_stylegan2)
    state, arguments = function(model)
    state = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
    if file is not None:
        write_safetensors(Path(file), state)
    return state, arguments
