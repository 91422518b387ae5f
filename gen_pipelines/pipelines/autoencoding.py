"""What the pipelines of autoencoders share: pictures in and out, paths between latents, and the checks of their arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from ..likelihood.dequantization import Pictures, to_levels
from ..likelihood.observation import observe

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def levels_of(model: Any, images: Pictures) -> Tensor:
    """Pictures as the integers that a model of `num_bits` bits speaks of, on its device: (B, C, H, W)."""
    config = model.config
    return to_levels(images, config.in_channels, (model.height, model.width), config.num_bits).to(model.device)


def pictures_of(model: Any, images: Pictures, generator: Any = None) -> Tensor:
    """Pictures as the model takes them, (B, C, H, W) in [-1, 1]; grey ones of a binary model are binarised with `generator`."""
    return observe(levels_of(model, images), model.config.likelihood, model.config.num_bits, generator).x


def finish(x: Tensor, output_type: str) -> Any:
    """Pictures (B, C, H, W) in [-1, 1] as PIL pictures, an array (B, H, W, C) in [0, 1] or a tensor (B, C, H, W) in [0, 1]."""
    return VaeImageProcessor(do_resize=False).postprocess(x.detach().float(), output_type)


def picture_grid(x: Tensor, columns: int) -> Image.Image:
    """Pictures (B, C, H, W) in [-1, 1] as one, row by row."""
    rows = -(-len(x) // columns)
    canvas = x.new_ones(rows * columns, *x.shape[1:])
    canvas[: len(x)] = x
    whole = canvas.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    return finish(whole[None], "pil")[0]


def between(first: Tensor, second: Tensor, num: int, mode: str) -> Tensor:
    """`num` points from `first` to `second`, both included.

    Args:
        first, second: (B, d).
        mode: "slerp" turns from one direction to the other at a rate that is constant, and scales the length along with it: a path on which
            Gaussian latents keep their usual length. "lerp" is the straight line.
    Returns: (B, num, d).
    Raises:
        ValueError: another mode, or fewer than 2 points.
    """
    if mode not in ("slerp", "lerp"):
        raise ValueError(f"interpolate: mode {mode!r} is none of slerp, lerp.")
    if num < 2:
        raise ValueError(f"interpolate: {num} points are no path; give 2 or more.")
    t = torch.linspace(0, 1, num, device=first.device, dtype=first.dtype).view(1, num, 1)
    first, second = first[:, None], second[:, None]
    straight = first + t * (second - first)
    if mode == "lerp":
        return straight
    lengths = first.norm(dim=-1, keepdim=True), second.norm(dim=-1, keepdim=True)
    unit = [v / n.clamp_min(1e-12) for v, n in zip((first, second), lengths)]
    theta = torch.acos((unit[0] * unit[1]).sum(-1, keepdim=True).clamp(-1, 1))
    sine = torch.sin(theta)
    # nearly the same or opposite direction: there is no one circle, the straight line is as good
    turned = (torch.sin((1 - t) * theta) * unit[0] + torch.sin(t * theta) * unit[1]) / sine.clamp_min(1e-12)
    length = lengths[0] + t * (lengths[1] - lengths[0])
    return torch.where(sine > 1e-4, length * turned, straight)


def check_call(name: str, count: int, generator: Any, temperature: float, output_type: str) -> None:
    """Checks what every call has, before any compute.

    Raises:
        ValueError: fewer than one picture, generators that are not one or one per picture, a negative or infinite temperature, an unknown
            output type.
    """
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"{name}: {count!r} pictures cannot be drawn; give 1 or more.")
    if isinstance(generator, Sequence) and len(generator) != count:
        raise ValueError(f"{name}: {len(generator)} generators for {count} pictures; give one, or one per picture.")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"{name}: temperature {temperature} is not allowed; give a number from 0 (the most likely) on, 1 for the model's.")
    check_output_type(name, output_type)


def check_output_type(name: str, output_type: str, allowed: Sequence[str] = OUTPUT_TYPES) -> None:
    """One of `allowed`."""
    if output_type not in allowed:
        raise ValueError(f"{name}: output_type {output_type!r} is none of {', '.join(allowed)}.")
