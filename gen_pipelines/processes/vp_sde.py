"""The continuous variance-preserving path of score-based models."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .path import Path

__all__ = ["VPSDEPath"]


@dataclass(frozen=True)
class VPSDEPath(Path):
    """log alpha(t) = -t^2 (beta_max - beta_min) / 4 - t beta_min / 2, sigma^2 = 1 - alpha^2, t in [t_min, 1].

    References: Song et al. 2021, eqs. 11, 32 and 33, https://arxiv.org/abs/2011.13456 (t_min is its epsilon, appendix C).
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-5

    name: ClassVar[str] = "vp_sde"
    t_max: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.beta_min < self.beta_max:
            raise ValueError(
                f"{type(self).__name__}: beta_min = {self.beta_min}, beta_max = {self.beta_max}; give 0 <= beta_min < beta_max."
            )

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def _log_alpha_dot(self, t: Tensor) -> Tensor:
        return -0.5 * (self.beta_min + t * (self.beta_max - self.beta_min))

    def _t_from_log_alpha(self, log_alpha: Tensor) -> Tensor:
        a, b = 0.25 * (self.beta_max - self.beta_min), 0.5 * self.beta_min
        return -2 * log_alpha / (b + torch.sqrt(b**2 - 4 * a * log_alpha))  # the root that does not cancel near t = 0

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.exp(self._log_alpha(t))

    def _sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(2 * self._log_alpha(t)))

    def _alpha_dot(self, t: Tensor) -> Tensor:
        return self._alpha(t) * self._log_alpha_dot(t)

    def _sigma_dot(self, t: Tensor) -> Tensor:
        return -(self._alpha(t) ** 2) * self._log_alpha_dot(t) / self._sigma(t)

    def _t_from_lambda(self, lambda_: Tensor) -> Tensor:
        return self._t_from_log_alpha(-0.5 * torch.nn.functional.softplus(-2 * lambda_, threshold=1e3))
