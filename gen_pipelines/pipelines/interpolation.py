"""The way between two draws of noise."""

from __future__ import annotations

import torch
from torch import Tensor


def spherical(start: Tensor, end: Tensor, weight: float) -> Tensor:
    """sin((1 - w) theta) / sin(theta) start + sin(w theta) / sin(theta) end, theta the angle between the two, sample by sample.

    Noise of many dimensions lies near a sphere; a straight line between two draws leaves it, and networks have not been trained there.

    Args:
        start, end: noise, shape (B, *event).
        weight: 0 at `start`, 1 at `end`.
    Returns: shape (B, *event). Draws that point the same way are interpolated linearly.
    References: Shoemake 1985, https://doi.org/10.1145/325334.325242
    """
    a, b = start.flatten(1).double(), end.flatten(1).double()
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp_min(1e-12)
    theta = torch.acos(cosine.clamp(-1, 1))[:, None]  # (B, 1)
    straight = theta.sin() < 1e-6
    sine = torch.where(straight, torch.ones_like(theta), theta.sin())
    first = torch.where(straight, torch.full_like(theta, 1 - weight), ((1 - weight) * theta).sin() / sine)
    second = torch.where(straight, torch.full_like(theta, weight), (weight * theta).sin() / sine)
    return (first * a + second * b).to(start.dtype).reshape(start.shape)
