"""The sub-variance-preserving path of score-based models."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .vp_sde import VPSDEPath

__all__ = ["SubVPPath"]


@dataclass(frozen=True)
class SubVPPath(VPSDEPath):
    """alpha(t) as in `VPSDEPath`, sigma(t) = 1 - alpha(t)^2 (a standard deviation, not a variance), t in [t_min, 1].

    References: Song et al. 2021, eqs. 27 to 29, https://arxiv.org/abs/2011.13456
    """

    name: ClassVar[str] = "sub_vp"

    def _sigma(self, t: Tensor) -> Tensor:
        return -torch.expm1(2 * self._log_alpha(t))

    def _sigma_dot(self, t: Tensor) -> Tensor:
        return -2 * self._alpha(t) ** 2 * self._log_alpha_dot(t)

    def _t_from_lambda(self, lambda_: Tensor) -> Tensor:
        # with alpha = exp(-u): alpha / (1 - alpha^2) = 1 / (2 sinh u) = exp(lambda)
        return self._t_from_log_alpha(-torch.asinh(0.5 * torch.exp(-lambda_)))
