"""The straight path of flow matching and rectified flow."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .path import Path

__all__ = ["LinearPath"]


@dataclass(frozen=True)
class LinearPath(Path):
    """x_t = (1 - t) x_0 + t eps, t in [0, 1].

    References: Liu et al. 2022, https://arxiv.org/abs/2209.03003, eq. 1; Lipman et al. 2022, https://arxiv.org/abs/2210.02747, eq. 20
    with sigma_min = 0 (in both papers time runs the other way).
    """

    name: ClassVar[str] = "linear"
    t_min: ClassVar[float] = 0.0
    t_max: ClassVar[float] = 1.0

    def _alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def _sigma(self, t: Tensor) -> Tensor:
        return t * 1.0

    def _alpha_dot(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def _sigma_dot(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _t_from_lambda(self, lambda_: Tensor) -> Tensor:
        return torch.sigmoid(-lambda_)
