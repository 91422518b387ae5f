"""The sizes that PixArt was trained on: other ones are drawn at the nearest of these, scaled and cut.

References: Chen et al. 2023 (PixArt-alpha), section 2.4 (multi-scale training), https://arxiv.org/abs/2310.00426
"""

from __future__ import annotations

import importlib

from torch import Tensor

# side of the network's latents -> where diffusers keeps the heights and widths of that training, by their ratio
_TABLES = {
    32: ("pixart_alpha", "ASPECT_RATIO_256_BIN"),
    64: ("pixart_alpha", "ASPECT_RATIO_512_BIN"),
    128: ("pixart_alpha", "ASPECT_RATIO_1024_BIN"),
    256: ("pixart_sigma", "ASPECT_RATIO_2048_BIN"),
}


def has_bins(sample_size: int | None) -> bool:
    """Whether there is a table for networks of this size of latents."""
    return sample_size in _TABLES


def nearest_bin(sample_size: int, height: int, width: int) -> tuple[int, int]:
    """Height and width in pixels of the trained size whose ratio is nearest.

    Raises:
        ValueError: there is no table for this network.
    """
    if not has_bins(sample_size):
        raise ValueError(
            f"use_resolution_binning: there are trained sizes for networks of {', '.join(map(str, _TABLES))} latent pixels, and this one "
            f"has {sample_size}; leave it out."
        )
    module, name = _TABLES[sample_size]
    table = getattr(importlib.import_module(f"diffusers.pipelines.pixart_alpha.pipeline_{module}"), name)
    nearest = min(table, key=lambda ratio: abs(float(ratio) - height / width))
    return int(table[nearest][0]), int(table[nearest][1])


def cut_to(images: Tensor, height: int, width: int) -> Tensor:
    """Pictures scaled to cover a size and cut at its middle, (B, C, H, W) -> (B, C, height, width)."""
    from diffusers.image_processor import PixArtImageProcessor

    return PixArtImageProcessor.resize_and_crop_tensor(images, width, height)
