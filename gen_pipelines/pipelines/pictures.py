"""Pictures as they come from a user, as tensors; and the frame between a picture and the size that a network wants."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

BLACK = -1.0


def as_pictures(images: Any, channels: int, name: str = "image") -> Tensor:
    """Pictures as a tensor of shape (B, C, H, W), float32 in [-1, 1].

    Args:
        images: a PIL picture or a list of them; a tensor, uint8 or float in [-1, 1], of shape (B, C, H, W) or (C, H, W); a uint8 array of
            shape (B, H, W, C), (H, W, C) or (H, W).
        channels: 1 or 3: PIL pictures are converted.
        name: of the argument, for messages.
    Raises:
        TypeError: something else.
        ValueError: pictures of different sizes, another number of channels, or floats outside [-1, 1].
    """
    if isinstance(images, Image.Image):
        images = [images]
    if isinstance(images, (list, tuple)) and images and all(isinstance(picture, Image.Image) for picture in images):
        if len(sizes := sorted({picture.size for picture in images})) > 1:
            raise ValueError(f"{name}: the pictures have different sizes, {', '.join(f'{h} x {w}' for w, h in sizes)}; resize them first.")
        arrays = [np.asarray(picture.convert("L" if channels == 1 else "RGB")) for picture in images]
        images = np.stack([array if array.ndim == 3 else array[..., None] for array in arrays])
    if isinstance(images, (list, tuple)) and images and all(isinstance(picture, Tensor) for picture in images):
        images = torch.stack([picture if picture.ndim == 3 else picture.squeeze(0) for picture in images])
    if isinstance(images, np.ndarray):
        if images.dtype != np.uint8:
            raise TypeError(f"{name}: an array must be uint8, got {images.dtype}; floats come as a tensor in [-1, 1], (B, C, H, W).")
        images = images[..., None] if images.ndim == 2 else images
        images = torch.from_numpy(np.ascontiguousarray(images.reshape(-1, *images.shape[-3:]).transpose(0, 3, 1, 2)))
    if not isinstance(images, Tensor):
        raise TypeError(f"{name} must be PIL pictures, or a tensor of shape (B, C, H, W); got a {type(images).__name__}.")
    x = images[None] if images.ndim == 3 else images
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"{name} must have shape (B, {channels}, H, W), got {tuple(images.shape)}.")
    if x.dtype == torch.uint8:
        return x.float().div_(127.5).sub_(1.0)
    if not x.is_floating_point():
        raise TypeError(f"{name} must be uint8, or float in [-1, 1]; got {x.dtype}.")
    if len(x) and not (x.abs() <= 1.0 + 1e-4).all():  # the comparison is False for NaN too
        raise ValueError(f"{name}: float pictures are in [-1, 1], got values from {x.min().item():.4g} to {x.max().item():.4g}.")
    return x.float()


def as_mask(mask: Any, size: tuple[int, int], name: str = "mask_image") -> Tensor:
    """A mask as a tensor of shape (B, 1, H, W), bool: True (white) is what is drawn anew.

    Args:
        mask: a PIL picture or a list of them, or a tensor, bool or numbers from 0 to 1, of shape (H, W), (B, H, W) or (B, 1, H, W).
        size: height and width that it must have.
        name: of the argument, for messages.
    Raises:
        TypeError, ValueError: something else, or another size.
    """
    if isinstance(mask, Image.Image) or (isinstance(mask, (list, tuple)) and mask and isinstance(mask[0], Image.Image)):
        values = (as_pictures(mask, 1, name) + 1) / 2
    elif isinstance(mask, Tensor) and mask.ndim in (2, 3, 4):
        values = mask.float() / (255.0 if mask.dtype == torch.uint8 else 1.0)
        values = values.reshape(-1, 1, *mask.shape[-2:])
    else:
        raise TypeError(f"{name} must be a PIL picture or a tensor of shape (B, 1, H, W); got {type(mask).__name__}.")
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
