"""The discrete variance-preserving path of DDPM, Stable Diffusion and DiT."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from .level import Level
from .path import Path

__all__ = ["BETA_SCHEDULES", "DiscreteVPPath", "betas_from_alpha_bar", "rescale_zero_terminal_snr"]

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")


def _cosine_alpha_bar(u: float) -> float:
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace_alpha_bar(u: float) -> float:
    log_snr = -0.5 * math.copysign(1, 0.5 - u) * math.log(1 - 2 * abs(0.5 - u) + 1e-6)
    return math.sqrt(1 / (1 + math.exp(-log_snr)))


def betas_from_alpha_bar(alpha_bar, num_train_timesteps: int, max_beta: float = 0.999) -> Tensor:
    """beta_i = min(1 - alpha_bar((i + 1) / N) / alpha_bar(i / N), max_beta), float32.

    References: Nichol & Dhariwal 2021, section 3.2, https://arxiv.org/abs/2102.09672
    """
    n = num_train_timesteps
    return torch.tensor([min(1 - alpha_bar((i + 1) / n) / alpha_bar(i / n), max_beta) for i in range(n)], dtype=torch.float32)


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and scale sqrt(alpha_bar) so that its last value is 0 and its first is unchanged.

    References: Lin et al. 2023, algorithm 1, https://arxiv.org/abs/2305.08891
    """
    root = torch.cumprod(1 - betas, 0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    alpha_bar = ((root - last) * (first / (first - last))) ** 2
    return 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])


@dataclass(frozen=True)
class DiscreteVPPath(Path):
    """alpha_i^2 = prod_{j <= i} (1 - beta_j), sigma_i^2 = 1 - alpha_i^2 at the indices i = 0 ... N - 1, the native time.

    Time is a float: between two indices log(sigma / alpha) is interpolated linearly (in the last interval of a schedule rescaled to zero
    SNR, where that is infinite at the end, alpha is). The products are taken in float32, as diffusers takes them and as the networks saw
    them in training, and only then widened to float64.

    References: Ho et al. 2020, eq. 4, https://arxiv.org/abs/2006.11239; Karras et al. 2022, appendix C.3, for the times in between.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    rescale_betas_zero_snr: bool = False

    name: ClassVar[str] = "discrete_vp"
    t_min: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        if self.trained_betas is not None:
            betas = tuple(float(b) for b in self.trained_betas)  # lists (JSON) and arrays become hashable
            object.__setattr__(self, "trained_betas", betas)
            object.__setattr__(self, "num_train_timesteps", len(betas))
        elif self.beta_schedule not in BETA_SCHEDULES:
            raise ValueError(f"DiscreteVPPath: beta_schedule {self.beta_schedule!r} is not known; use one of {', '.join(BETA_SCHEDULES)}.")
        if self.num_train_timesteps < 2:
            raise ValueError(f"DiscreteVPPath: num_train_timesteps = {self.num_train_timesteps}; give at least 2.")

    @property
    def t_max(self) -> float:
        """The last index, N - 1."""
        return float(self.num_train_timesteps - 1)

    @cached_property
    def betas(self) -> Tensor:
        """The N betas, float32, on the CPU."""
        n, start, end = self.num_train_timesteps, self.beta_start, self.beta_end
        if self.trained_betas is not None:
            betas = torch.tensor(self.trained_betas, dtype=torch.float32)
        elif self.beta_schedule == "linear":
            betas = torch.linspace(start, end, n, dtype=torch.float32)
        elif self.beta_schedule == "scaled_linear":
            betas = torch.linspace(start**0.5, end**0.5, n, dtype=torch.float32) ** 2
        elif self.beta_schedule == "sigmoid":
            betas = torch.sigmoid(torch.linspace(-6, 6, n, dtype=torch.float32)) * (end - start) + start
        else:
            betas = betas_from_alpha_bar({"squaredcos_cap_v2": _cosine_alpha_bar, "laplace": _laplace_alpha_bar}[self.beta_schedule], n)
        return rescale_zero_terminal_snr(betas) if self.rescale_betas_zero_snr else betas

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """alpha_i^2, float64 of the float32 product, on the CPU."""
        return torch.cumprod(1 - self.betas, 0).double()

    @cached_property
    def _log_ratio(self) -> Tensor:
        return 0.5 * (torch.log1p(-self.alphas_cumprod) - self.alphas_cumprod.log())  # log(sigma / alpha), +inf at zero SNR

    @cached_property
    def _zero_snr(self) -> bool:
        return float(self.alphas_cumprod[-1]) == 0.0

    def _segment(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The interval that holds each time: its first index (as float), and log(sigma / alpha) at its start and its rise."""
        table = self._log_ratio.to(t.device, t.dtype)
        low = t.detach().floor().clamp(0, len(table) - 2)
        index = low.long()
        start, rise = table[index], table[index + 1] - table[index]
        return low, start, rise

    def _in_last(self, low: Tensor) -> Tensor | None:
        return low >= self.num_train_timesteps - 2 if self._zero_snr else None

    @cached_property
    def _last_alpha(self) -> float:
        return math.sqrt(float(self.alphas_cumprod[-2]))  # where the interval that ends in zero SNR begins

    def _log_ratio_at(self, t: Tensor) -> Tensor:
        low, start, rise = self._segment(t)
        last = self._in_last(low)
        if last is None:
            return start + (t - low) * rise
        alpha = self._last_alpha * (self.t_max - t).clamp_max(1.0)
        tail = 0.5 * torch.log1p(-(alpha**2)) - alpha.log()
        return torch.where(last, tail, start + (t - low) * torch.where(last, 0.0, rise))

    def _alpha(self, t: Tensor) -> Tensor:
        alpha = torch.exp(-0.5 * torch.nn.functional.softplus(2 * self._log_ratio_at(t), threshold=1e3))
        if not self._zero_snr:
            return alpha
        return torch.where(t > self.t_max - 1, self._last_alpha * (self.t_max - t), alpha)

    def _sigma(self, t: Tensor) -> Tensor:
        sigma = torch.exp(-0.5 * torch.nn.functional.softplus(-2 * self._log_ratio_at(t), threshold=1e3))
        if not self._zero_snr:
            return sigma
        return torch.where(t > self.t_max - 1, torch.sqrt(1 - (self._last_alpha * (self.t_max - t).clamp_max(1.0)) ** 2), sigma)

    def _lambda(self, t: Tensor) -> Tensor:
        return -self._log_ratio_at(t)

    def _log_ratio_dot(self, t: Tensor) -> tuple[Tensor, Tensor | None]:
        low, _, rise = self._segment(t)
        return rise, self._in_last(low)

    def _alpha_dot(self, t: Tensor) -> Tensor:
        rise, last = self._log_ratio_dot(t)
        slope = -self._alpha(t) * self._sigma(t) ** 2 * rise
        return slope if last is None else torch.where(last, torch.full_like(t, -self._last_alpha), slope)

    def _sigma_dot(self, t: Tensor) -> Tensor:
        rise, last = self._log_ratio_dot(t)
        alpha, sigma = self._alpha(t), self._sigma(t)
        slope = sigma * alpha**2 * rise
        return slope if last is None else torch.where(last, alpha * self._last_alpha / sigma, slope)

    def _t_from_lambda(self, lambda_: Tensor) -> Tensor:
        table = self._log_ratio.to(lambda_.device, lambda_.dtype)
        ratio = (-lambda_).contiguous()
        index = (torch.searchsorted(table, ratio, right=True) - 1).clamp(0, len(table) - 2)
        start, end = table[index], table[index + 1]
        t = index + (ratio - start) / (end - start)
        if self._zero_snr:
            alpha = torch.exp(-0.5 * torch.nn.functional.softplus(-2 * lambda_, threshold=1e3))
            t = torch.where(index >= len(table) - 2, self.t_max - alpha / self._last_alpha, t)
        return t

    def level(self, t: float) -> Level:
        """(alpha, sigma) at a time in [0, N - 1], Python floats; raises ValueError outside."""
        if not 0.0 <= t <= self.t_max:
            raise ValueError(f"DiscreteVPPath.level: index {t} is outside the trained indices 0 to {self.t_max:g}.")
        if float(t).is_integer():  # exactly the table's value, with no logarithm in between
            alpha_bar = float(self.alphas_cumprod[int(t)])
            return Level(math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar))
        return super().level(t)
