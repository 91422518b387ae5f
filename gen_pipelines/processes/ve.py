"""The variance-exploding path of score matching with Langevin dynamics."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .path import Path

__all__ = ["VEPath"]


@dataclass(frozen=True)
class VEPath(Path):
    """x = x_0 + sigma eps; the native time is sigma itself, from `sigma_min` to `sigma_max`.

    References: Song et al. 2021, eq. 9 and appendix C, https://arxiv.org/abs/2011.13456 (its geometric sigma(t) is a grid, not a path).
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    name: ClassVar[str] = "ve"

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"{type(self).__name__}: sigma_min = {self.sigma_min} and sigma_max = {self.sigma_max}; give 0 < sigma_min < sigma_max."
            )

    @property
    def t_min(self) -> float:
        """The smallest trained sigma."""
        return self.sigma_min

    @property
    def t_max(self) -> float:
        """The largest trained sigma."""
        return self.sigma_max

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _sigma(self, t: Tensor) -> Tensor:
        return t * 1.0

    def _alpha_dot(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def _sigma_dot(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _t_from_lambda(self, lambda_: Tensor) -> Tensor:
        return torch.exp(-lambda_)
