"""The trigonometric (cosine) path."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .path import Path

__all__ = ["CosinePath"]


@dataclass(frozen=True)
class CosinePath(Path):
    """alpha(t) = cos(pi t / 2), sigma(t) = sin(pi t / 2), t in [0, 1]; variance preserving.

    References: Nichol & Dhariwal 2021, eq. 17 with s = 0, https://arxiv.org/abs/2102.09672; the trigonometric interpolant of Albergo &
    Vanden-Eijnden 2022, https://arxiv.org/abs/2209.15571, with the time reversed.
    """

    name: ClassVar[str] = "cosine"
    t_min: ClassVar[float] = 0.0
    t_max: ClassVar[float] = 1.0

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.sin(0.5 * math.pi * (1 - t))  # cos(pi / 2) is 6e-17 in floats, sin(0) is 0: lambda(1) must be -inf

    def _sigma(self, t: Tensor) -> Tensor:
        return torch.sin(0.5 * math.pi * t)

    def _alpha_dot(self, t: Tensor) -> Tensor:
        return -0.5 * math.pi * torch.sin(0.5 * math.pi * t)

    def _sigma_dot(self, t: Tensor) -> Tensor:
        return 0.5 * math.pi * torch.sin(0.5 * math.pi * (1 - t))

    def _t_from_lambda(self, lambda_: Tensor) -> Tensor:
        return 2 / math.pi * torch.atan(torch.exp(-lambda_))
