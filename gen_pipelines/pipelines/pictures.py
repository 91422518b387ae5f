"""Pictures as they come from a user, as tensors; and the frame between a picture and the size that a network wants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

BLACK = -1.0


def read_pictures(name: str, value: Any, background: str = "white") -> Tensor | list[Image.Image]:
    """Pictures of one size in one of the two forms that an image processor takes: PIL pictures, or a tensor (B, C, H, W) in [0, 1].

    Every pipeline reads its pictures here, so that each takes what `output_type` "pil", "np" or "pt" of any of them returned.

    Args:
        name: of the argument, for messages.
        value: a PIL picture, a NumPy array (H, W, C) or (B, H, W, C), a tensor (C, H, W) or (B, C, H, W), or a list of these. Arrays and
            tensors are in [0, 1], or uint8.
        background: what transparent PIL pictures are laid on.
    Raises:
        ValueError, TypeError: it is none of these, empty, of several sizes or not finite; `check_range` says what is not in [0, 1].
    """
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if not values:
        raise ValueError(f"{name} is an empty list; give at least one picture.")
    kinds = {Image.Image: [], np.ndarray: [], Tensor: []}
    for v in values:
        found = next((kind for kind in kinds if isinstance(v, kind)), None)
        if found is None:
            raise TypeError(f"{name} must be a PIL picture, an array, a tensor or a list of these, got a {type(v).__name__}.")
        kinds[found].append(v)
    if sum(bool(k) for k in kinds.values()) > 1:
        raise TypeError(f"{name} must hold pictures of one kind: PIL pictures, arrays or tensors.")

    if pictures := kinds[Image.Image]:
        if len(sizes := {p.size for p in pictures}) > 1:
            raise ValueError(f"{name} must hold pictures of one size, got {', '.join(f'{w} x {h}' for w, h in sorted(sizes))}.")
        return [_opaque(p, background) for p in pictures]

    arrays = [torch.from_numpy(np.array(v)) for v in kinds[np.ndarray]] + kinds[Tensor]
    last = bool(kinds[np.ndarray])
    arrays = [(a.unsqueeze(-1 if last else 0) if a.ndim == 2 else a) for a in arrays]
    arrays = [a.unsqueeze(0) if a.ndim == 3 else a for a in arrays]
    if any(a.ndim != 4 for a in arrays) or len({a.shape[1:] for a in arrays}) > 1:
        shapes = ", ".join(str(tuple(v.shape)) for v in values)
        raise ValueError(f"{name} must have the shape {'(B, H, W, C)' if last else '(B, C, H, W)'} and one size, got {shapes}.")
    joined = torch.cat(arrays)
    joined = joined.permute(0, 3, 1, 2) if last else joined
    joined = joined.float() / 255 if joined.dtype == torch.uint8 else joined.float()
    if not bool(torch.isfinite(joined).all()):
        raise ValueError(f"{name} has values that are not finite.")
    return joined


def _opaque(picture: Image.Image, background: str) -> Image.Image:
    """RGB (grey for a mask), the way the picture is looked at: turned as its EXIF data say, transparency laid on the background."""
    picture = ImageOps.exif_transpose(picture)
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        below = Image.new("RGBA", picture.size, background)
        picture = Image.alpha_composite(below, picture)
    return picture.convert("L" if background == "black" else "RGB")


def check_range(name: str, pictures: Tensor | list[Image.Image], channels: Sequence[int] | None = None) -> None:
    """Raises ValueError for tensors that are not in [0, 1] or do not have one of these numbers of channels."""
    if not isinstance(pictures, Tensor):
        return
    if channels is not None and pictures.shape[1] not in channels:
        raise ValueError(f"{name} must have {' or '.join(map(str, channels))} channels, got shape {tuple(pictures.shape)}.")
    if not pictures.numel():
        raise ValueError(f"{name} is empty: it has the shape {tuple(pictures.shape)}.")
    low, high = float(pictures.min()), float(pictures.max())
    if low < 0.0 or high > 1.0:
        remedy = "(x + 1) / 2 makes it of [-1, 1]" if -1.0 <= low < 0.0 and high <= 1.0 else "whole numbers from 0 to 255 must be uint8"
        raise ValueError(
            f'{name} must be in [0, 1], as output_type="pt" returns pictures; got values from {low:.3g} to {high:.3g}: {remedy}.'
        )


def as_pictures(images: Any, channels: int, name: str = "image") -> Tensor:
    """Pictures as a network of pixels takes them: a tensor of shape (B, C, H, W), float32 in [-1, 1].

    Args:
        images: as in `read_pictures`: PIL pictures, or arrays and tensors, uint8 or in [0, 1].
        channels: 1 or 3: PIL pictures are converted.
        name: of the argument, for messages.
    Raises:
        TypeError: something else.
        ValueError: pictures of different sizes, another number of channels, or floats outside [0, 1].
    """
    pictures = read_pictures(name, images)
    if not isinstance(pictures, Tensor):
        arrays = [np.array(picture.convert("L" if channels == 1 else "RGB")) for picture in pictures]
        pictures = torch.from_numpy(np.stack(arrays).reshape(len(arrays), *arrays[0].shape[:2], -1)).permute(0, 3, 1, 2).float() / 255
    if pictures.shape[1] != channels:
        raise ValueError(f"{name} must have shape (B, {channels}, H, W), got {tuple(pictures.shape)}.")
    check_range(name, pictures)
    return pictures * 2 - 1


def as_8_bit(images: Any, name: str = "images") -> Tensor | Any:
    """Pictures as models of 8-bit levels take them: arrays and tensors rounded to uint8, (B, C, H, W); PIL pictures as they came.

    Args:
        images: as in `read_pictures`.
        name: of the argument, for messages.
    """
    pictures = read_pictures(name, images)
    if not isinstance(pictures, Tensor):
        return images
    check_range(name, pictures)
    return (pictures * 255).round().to(torch.uint8)


def as_mask(mask: Any, size: tuple[int, int], name: str = "mask_image") -> Tensor:
    """A mask as a tensor of shape (B, 1, H, W), bool: True (white) is what is drawn anew.

    Args:
        mask: a PIL picture or a list of them; or a tensor, bool, uint8 or numbers from 0 to 1, of shape (H, W), (B, H, W) or (B, 1, H, W);
            or an array, (H, W), (B, H, W) or (B, H, W, 1).
        size: height and width that it must have.
        name: of the argument, for messages.
    Raises:
        TypeError, ValueError: something else, or another size.
    """
    if isinstance(mask, np.ndarray):
        mask = torch.from_numpy(np.array(mask[..., 0] if mask.ndim == 4 else mask))
    if isinstance(mask, Image.Image) or (isinstance(mask, (list, tuple)) and mask and isinstance(mask[0], Image.Image)):
        values = (as_pictures(mask, 1, name) + 1) / 2
    elif isinstance(mask, Tensor) and mask.ndim in (2, 3, 4):
        values = mask.float() / (255.0 if mask.dtype == torch.uint8 else 1.0)
        values = values.reshape(-1, 1, *mask.shape[-2:])
    else:
        raise TypeError(f"{name} must be a PIL picture, an array, or a tensor of shape (B, 1, H, W); got {type(mask).__name__}.")
    if tuple(values.shape[-2:]) != size:
        raise ValueError(f"{name} must be {size[0]} x {size[1]} as the picture is, got {values.shape[-2]} x {values.shape[-1]}.")
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"{name}: values are from 0 (kept) to 1 (drawn anew), got {values.min().item():.4g} to {values.max().item():.4g}.")
    return values >= 0.5


def pad(pictures: Tensor, size: tuple[int, int], value: float = BLACK) -> Tensor:
    """Pictures (B, C, H, W) in the middle of a frame of height and width `size`, black around them; an odd pixel goes below and right."""
    down, right = size[0] - pictures.shape[-2], size[1] - pictures.shape[-1]
    if not (down or right):
        return pictures
    return torch.nn.functional.pad(pictures, (right // 2, right - right // 2, down // 2, down - down // 2), value=value)


def crop(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle `size` of pictures (B, C, H, W): what `pad` framed."""
    top, left = (pictures.shape[-2] - size[0]) // 2, (pictures.shape[-1] - size[1]) // 2
    return pictures[..., top : top + size[0], left : left + size[1]]
