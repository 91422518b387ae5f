"""The latents of an autoencoder as a denoiser sees them, mean 0 and deviation 1, and back. The autoencoder's config has the numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def _per_channel(values: Any, like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device, dtype=like.dtype).view(1, -1, 1, 1)


def scale_latents(config: Any, latents: Tensor) -> Tensor:
    """What the encoder gives, (B, c, h, w), as the denoiser sees it: (z - shift - mean) / std * scaling factor, each where it is there."""
    z = latents - (config.get("shift_factor") or 0.0)
    mean, std = config.get("latents_mean"), config.get("latents_std")  # one number per channel
    if mean is not None and std is not None:
        z = (z - _per_channel(mean, z)) / _per_channel(std, z)
    return z * config.get("scaling_factor", 1.0)


def unscale_latents(config: Any, latents: Tensor) -> Tensor:
    """The inverse of `scale_latents`: what the decoder takes, (B, c, h, w)."""
    z = latents / config.get("scaling_factor", 1.0)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        z = z * _per_channel(std, z) + _per_channel(mean, z)
    return z + (config.get("shift_factor") or 0.0)


def encode_pictures(autoencoder: nn.Module, pictures: Tensor) -> Tensor:
    """Scaled latents (B, c, h, w) of pictures (B, C, H, W) in [-1, 1], float32: the posterior's mode, or what comes before quantisation."""
    encoded = autoencoder.encode(pictures.to(autoencoder.dtype))
    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    return scale_latents(autoencoder.config, latents.float())


def decode_latents(autoencoder: nn.Module, latents: Tensor) -> Tensor:
    """Pictures in about [-1, 1], (B, C, H, W), float32, from scaled latents (B, c, h, w)."""
    z = unscale_latents(autoencoder.config, latents)
    return autoencoder.decode(z.to(autoencoder.dtype), return_dict=False)[0].float()
