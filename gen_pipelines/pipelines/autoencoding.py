"""What the pipelines of autoencoders share: pictures in and out, paths between latents, and the checks of their arguments."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from ..likelihood.dequantization import Pictures, to_levels
from ..likelihood.observation import observe
from .checks import check_count, check_generator, check_output_type
from .interpolation import spherical
from .pictures import as_8_bit

PICTURE_TYPES = ("pil", "np", "pt")


def levels_of(model: Any, images: Pictures) -> Tensor:
    """Pictures as the integers that a model of `num_bits` bits speaks of, on its device: (B, C, H, W)."""
    config = model.config
    return to_levels(images, config.in_channels, (model.height, model.width), config.num_bits).to(model.device)


def pictures_of(model: Any, images: Pictures, generator: Any = None) -> Tensor:
    """Pictures as the model takes them, (B, C, H, W) in [-1, 1]; grey ones of a binary model are binarised with `generator`."""
    return observe(levels_of(model, as_8_bit(images)), model.config.likelihood, model.config.num_bits, generator).x


def finish(x: Tensor, output_type: str) -> Any:
    """Pictures (B, C, H, W) in [-1, 1] as PIL pictures, an array (B, H, W, C) in [0, 1] or a tensor (B, C, H, W) in [0, 1]."""
    x = x.detach().float()
    x = x.nan_to_num() if output_type == "pil" else x  # whole numbers have no NaN; tensors and arrays show theirs
    return VaeImageProcessor(do_resize=False).postprocess(x, output_type)


def picture_grid(x: Tensor, columns: int) -> Image.Image:
    """Pictures (B, C, H, W) in [-1, 1] as one, row by row."""
    rows = -(-len(x) // columns)
    canvas = x.new_ones(rows * columns, *x.shape[1:])
    canvas[: len(x)] = x
    whole = canvas.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    return finish(whole[None], "pil")[0]


def between(first: Tensor, second: Tensor, num_images: int, mode: str) -> Tensor:
    """`num_images` points from `first` to `second`, both included.

    Args:
        first, second: (B, d).
        mode: "slerp" (`spherical`: on the sphere, near which Gaussian latents lie) or "lerp" (straight).
    Returns: (B, num_images, d).
    Raises:
        TypeError, ValueError: another mode, or fewer than 2 points.
    """
    if mode not in ("slerp", "lerp"):
        raise ValueError(f"interpolate: mode {mode!r} is none of slerp, lerp.")
    check_count("num_images", num_images, least=2)
    way = spherical if mode == "slerp" else torch.lerp
    return torch.stack([way(first, second, step / (num_images - 1)) for step in range(num_images)], 1)


def check_call(name: str, count: int, generator: Any, temperature: float, output_type: str) -> None:
    """Checks what every call has, before any compute.

    Raises:
        TypeError, ValueError: fewer than one picture, generators that are not one or one per picture, a negative or infinite temperature,
            an unknown output type.
    """
    check_count("batch_size", count)
    check_generator(generator, count)
    if not isinstance(temperature, Real) or not 0 <= temperature < float("inf"):
        allowed = "a number from 0 (the most likely) on, 1 for the model's"
        raise ValueError(f"{name}: temperature {temperature!r} is not allowed; give {allowed}.")
    check_output_type(output_type)
