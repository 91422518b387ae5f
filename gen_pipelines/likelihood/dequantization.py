"""Pictures as integer levels, and integer levels as real numbers: what a density has to know to speak of 8-bit pictures.

Bin k of n levels is the interval [k, k + 1) / n, in the coordinates of pictures x = 2 (k + u) / n - 1. For a density p of x,

    log P(k) = log int_bin p(x) dx >= E_{u ~ q(u | k)} [log p(x) - log q(u | k)] + D log(2 / n)

with equality for the right q: uniform dequantisation takes q = 1, variational dequantisation learns q. A model whose density is in other
coordinates (a logit, padded pictures) counts their Jacobian itself, once, in its log p(x).

References: Theis et al. 2016, section 3.1, https://arxiv.org/abs/1511.01844 (uniform); Ho et al. 2019, section 3.1,
https://arxiv.org/abs/1902.00275 (variational)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..processes.random import Generators, uniform

Pictures = Image.Image | Sequence[Image.Image] | Tensor

_BELOW_ONE = 1 - 2**-16  # 255 + u rounds to 256 in float32 for larger u


class Dequantizer(Protocol):
    """A learned q(u | k) of variational dequantisation."""

    def sample(self, levels: Tensor, generator: Generators = None) -> tuple[Tensor, Tensor]:
        """levels: (B, C, H, W), integers. Returns: u in [0, 1) of that shape, and log q(u | levels), (B,)."""


def to_levels(
    images: Pictures,
    channels: int | None = None,
    size: tuple[int, int] | None = None,
    num_bits: int = 8,
    value_range: tuple[float, float] = (-1.0, 1.0),
) -> Tensor:
    """Pictures as the integers that they were stored as.

    Args:
        images: a PIL picture, a list of them, a uint8 tensor (B, C, H, W), or a float tensor that was 8-bit: level k is
            k / 127.5 - 1, or k / 255 with `value_range=(0, 1)`. One picture of shape (C, H, W) is a batch of one.
        channels: 1 (grey) or 3 (colour), if it matters; grey pictures become colour, and colour ones grey only if they are grey.
        size: the height and width that are needed, if it matters.
        num_bits: keep the first bits of 8 (Glow's 5-bit pictures): 2^num_bits levels.
        value_range: of float tensors, (-1, 1) or (0, 1); it is never guessed.
    Returns: uint8 levels from 0 to 2^num_bits - 1, (B, C, H, W).
    Raises:
        TypeError: neither pictures nor a tensor of uint8 or floats.
        ValueError: wrong shapes, floats that were not 8-bit, or a picture that would lose information.
    """
    if not isinstance(num_bits, int) or not 1 <= num_bits <= 8:
        raise ValueError(f"num_bits must be an integer from 1 to 8, got {num_bits!r}.")
    if isinstance(images, Tensor):
        levels = _tensor_levels(images, value_range)
    else:
        levels = _picture_levels(images, channels)
    if channels is not None and levels.shape[1] != channels:
        if levels.shape[1] == 1:
            levels = levels.expand(-1, channels, -1, -1)
        elif channels == 1 and (levels == levels[:, :1]).all():
            levels = levels[:, :1]
        else:
            raise ValueError(f"pictures of {channels} channels are needed, these have {levels.shape[1]}; convert them first.")
    if size is not None and tuple(levels.shape[-2:]) != tuple(size):
        raise ValueError(
            f"pictures of {size[0]} x {size[1]} pixels are needed, these have {levels.shape[-2]} x {levels.shape[-1]}; "
            "a likelihood of a resized picture is not one of the picture, so resize it yourself if that is what you mean."
        )
    return levels >> (8 - num_bits)


def from_levels(levels: Tensor, num_bits: int = 8) -> Tensor:
    """Integer levels as float pictures in [-1, 1] that were 8-bit, their ends the first and the last level. Shape kept."""
    return levels.to(torch.float32).mul_(255 / (2**num_bits - 1)).round_().div_(127.5).sub_(1)


def nearest_levels(x: Tensor, num_bits: int = 8) -> Tensor:
    """The bin of each value of dequantised pictures x in [-1, 1), values outside moved to the ends; uint8 of the same shape."""
    count = 2**num_bits
    return ((x.float() + 1) * (count / 2)).floor().clamp_(0, count - 1).to(torch.uint8)


def dequantize(
    levels: Tensor,
    num_bits: int = 8,
    generator: Generators = None,
    dequantizer: Dequantizer | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """A point in the bin of each level, and what a density at that point must be weighted with to bound the levels' probability.

    Args:
        levels: integers from 0 to 2^num_bits - 1, (B, *event).
        generator: one for the batch, or one per picture.
        dequantizer: a learned q(u | levels); uniform without one.
        dtype: of x; the noise is the same in every dtype.
    Returns: x = 2 (levels + u) / 2^num_bits - 1 in [-1, 1), and D log(2 / 2^num_bits) - log q(u | levels), (B,), so that
        log P(levels) >= E[log p(x) + weight].
    """
    count = 2**num_bits
    width = levels[0].numel() * math.log(2 / count)
    if dequantizer is None:
        u = uniform(levels.shape, generator, levels.device) * _BELOW_ONE
        weight = torch.full((len(levels),), width, device=levels.device, dtype=dtype)
    else:
        u, log_q = dequantizer.sample(levels, generator)
        u, weight = u * _BELOW_ONE, width - log_q.to(dtype)
    return (levels.to(dtype) + u.to(dtype)) * (2 / count) - 1, weight


def _tensor_levels(images: Tensor, value_range: tuple[float, float]) -> Tensor:
    if images.ndim == 3:
        images = images[None]
    if images.ndim != 4 or not images.numel():
        raise ValueError(f"a tensor of pictures has the shape (B, C, H, W) or (C, H, W), got {tuple(images.shape)}.")
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise TypeError(f"a tensor of pictures is uint8 or float, got {images.dtype}; convert integers from 0 to 255 by .to(torch.uint8).")
    if tuple(value_range) not in ((-1, 1), (0, 1)):
        raise ValueError(f"value_range must be (-1, 1) or (0, 1), got {tuple(value_range)}.")
    low, high = value_range
    scaled = (images.to(torch.promote_types(images.dtype, torch.float32)) - low) * (255 / (high - low))
    rounded = scaled.round()
    if not torch.isfinite(scaled).all():
        raise ValueError("the pictures hold values that are not finite.")
    if rounded.min() < 0 or rounded.max() > 255 or (scaled - rounded).abs().max() > 0.05:
        inside = rounded.min() >= 0 and rounded.max() <= 255
        raise ValueError(
            f"float pictures must have been 8-bit, level k at {'k / 127.5 - 1' if low else 'k / 255'}; these "
            + (
                f"have values between the levels (such as {images.flatten()[(scaled - rounded).abs().argmax()].item():.6f})"
                if inside
                else f"span {images.min().item():.4g} to {images.max().item():.4g}"
            )
            + "; give PIL pictures or uint8 tensors: (255 * x).round().to(torch.uint8) of pictures x in [0, 1]."
        )
    return rounded.to(torch.uint8)


def _picture_levels(images: Any, channels: int | None) -> Tensor:
    pictures = [images] if isinstance(images, Image.Image) else images
    if isinstance(pictures, Sequence) and not pictures:
        raise TypeError("pictures are a PIL picture, a list of them, or a tensor; got an empty list.")
    if not isinstance(pictures, Sequence) or not all(isinstance(picture, Image.Image) for picture in pictures):
        what = f"list with {type(pictures[0]).__name__}" if isinstance(pictures, Sequence) else type(images).__name__
        raise TypeError(f"pictures are a PIL picture, a list of them, or a tensor (uint8, or float in [-1, 1]); got a {what}.")
    arrays = []
    for number, picture in enumerate(pictures):
        if picture.mode not in ("1", "L", "P", "RGB") or "transparency" in picture.info:
            what = f"{picture.mode} with transparency" if "transparency" in picture.info else picture.mode
            raise ValueError(
                f"picture {number} has the mode {what}; 8-bit grey (L) or colour (RGB) is needed: convert it first, since what "
                "transparency or 16 bits become is yours to say."
            )
        grey = picture.mode in ("1", "L") and channels != 3
        array = np.asarray(picture.convert("L" if grey else "RGB"), dtype=np.uint8)
        arrays.append(torch.from_numpy(array[None].copy() if grey else array.transpose(2, 0, 1).copy()))
    if channels is None and len({array.shape[0] for array in arrays}) > 1:
        arrays = [array.expand(3, -1, -1) for array in arrays]
    if channels == 1:
        arrays = [array[:1] if (array == array[:1]).all() else array for array in arrays]
    if len({array.shape for array in arrays}) > 1:
        raise ValueError(f"the pictures differ in size or colour: {sorted({tuple(array.shape) for array in arrays})}; give them one shape.")
    return torch.stack(arrays)
