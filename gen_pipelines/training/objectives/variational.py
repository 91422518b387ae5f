"""The variational bound of discrete diffusion as a loss, with a fixed or a learned variance, beside the simple loss if asked."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...processes import Parameterization
from ..random import Generators, normal, uniform
from .base import ObjectiveOutput

_SMALL = 1e-20


@dataclass(frozen=True)
class VariationalObjective:
    """simple |network(x_i, i) - target|^2 + bound N L_i, i uniform; N L_i in nats per dimension is unbiased for DDPM's bound.

    L_i = KL(q(x_(i-1) | x_i, x_0), p(x_(i-1) | x_i)) for i > 0, and L_0 = -log P(x_0 | x_1), a Gaussian over the bins of 8-bit pictures.
    What the bound has without parameters, the divergence at the last level, is left out.

    | method | variance | simple | bound |
    |---|---|---|---|
    | DDPM's L_simple (Ho et al. 2020, eq. 14) | fixed | 1 | 0 |
    | DDPM's L (Ho et al. 2020, eq. 5) | fixed | 0 | 1 |
    | L_hybrid (Nichol & Dhariwal 2021, eq. 16) | learned_range | 1 | 0.001 |
    | L_vlb (Nichol & Dhariwal 2021, section 3.3, without importance sampling) | learned_range | 0 | 1 |

    Attributes:
        parameterization: a network on the discrete path. With `variance` learned_range (or learned) its output has twice the channels.
        simple: weight of the squared error of what the network predicts.
        bound: weight of the bound. Beside the simple loss it trains a learned variance alone: the mean is detached (section 3.1 there).
        num_bits: of the pictures, for L_0.

    References: Ho et al. 2020, https://arxiv.org/abs/2006.11239; Nichol & Dhariwal 2021, https://arxiv.org/abs/2102.09672
    """

    parameterization: Parameterization
    simple: float = 1.0
    bound: float = 1e-3
    num_bits: int = 8

    def __post_init__(self) -> None:
        p = self.parameterization
        if p.path.name != "discrete_vp" or p.prediction in ("edm", "consistency"):
            raise ValueError(
                f"VariationalObjective: the bound of DDPM is over the steps of a discrete path; got {p.prediction!r} on {p.path.name!r}. "
                "On continuous paths take weighting 'likelihood'."
            )
        if self.simple < 0 or self.bound < 0 or self.simple + self.bound == 0:
            raise ValueError(f"VariationalObjective: simple {self.simple} and bound {self.bound}; give weights from 0 on, not both 0.")
        if p.learned_variance and self.bound == 0:
            raise ValueError("VariationalObjective: bound 0 trains no variance, and this network learns one; give 0.001.")

    def __call__(
        self,
        model: Callable[[Tensor, Tensor, Any], Tensor],
        x_0: Tensor,
        *,
        condition: Any = None,
        generator: Generators = None,
    ) -> ObjectiveOutput:
        """Losses (B,).

        Args:
            model: (network's input, network's time (B,), condition) -> raw output, (B, C, *), or (B, 2 C, *) with a learned variance.
            x_0: clean pictures (B, C, *) that were integers, in [-1, 1].
            condition: passed through to `model`.
            generator: one, or one per sample; a sample draws its index first, then its noise.
        Returns: the metrics are `simple`, and `bound` in nats per dimension.
        """
        p, count = self.parameterization, self.parameterization.path.num_train_timesteps
        u = uniform((len(x_0), 1), generator, x_0.device)[:, 0]                                       # (B,)
        eps = normal(x_0.shape, generator, x_0.device)                                                # (B, C, *)
        t = (u.double() * count).floor().clamp(max=count - 1)
        alpha, sigma = (_expand(value, x_0).to(x_0.dtype) for value in (p.path.alpha(t), p.path.sigma(t)))
        x_t = alpha * x_0 + sigma * eps
        output = model(x_t, p.network_time(t).to(x_0.dtype), condition)
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        mean_part, learned = p.split_variance(output, x_t)
        error = (mean_part - p.target(x_0, eps, t)).square().flatten(1).mean(1)                       # (B,)
        loss, metrics = self.simple * error, {"simple": error.detach()}
        if self.bound:
            fixed_mean = mean_part.detach() if self.simple and learned is not None else mean_part
            bound = count * self.step_bound(x_0, x_t, t, fixed_mean, learned)
            loss, metrics = loss + self.bound * bound, {**metrics, "bound": bound.detach()}
        return ObjectiveOutput(loss, metrics)

    def step_bound(self, x_0: Tensor, x_t: Tensor, t: Tensor, output: Tensor, learned: Tensor | None = None) -> Tensor:
        """L_i at indices `t` (B,) in nats per dimension, (B,), for a network's `output` and, with a learned variance, its other half."""
        p = self.parameterization.with_(clip_sample=False, thresholding=False, variance=None)
        x_0_hat, _ = p.denoise(output, x_t, t)
        mean, c_x, small, large = self._transition(t, x_0)
        model_mean = mean * x_0_hat + c_x * x_t
        log_std = self._log_std(small, large, learned, x_0)
        difference = mean * (x_0 - x_0_hat)  # of the two means: x_t has the same share in both
        log_ratio = log_std - small.log()
        divergence = log_ratio + 0.5 * (torch.exp(-2 * log_ratio) + (difference * torch.exp(-log_std)).square()) - 0.5
        first = _expand(t == 0, x_0)
        nll = -bin_log_prob(x_0, model_mean, log_std, self.num_bits)
        return torch.where(first, nll, divergence).flatten(1).mean(1)

    def _transition(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of q(x_(i-1) | x_i, x_0): the shares of x_0 and x_i in its mean, its deviation, and that of q(x_i | x_(i-1)).

        At index 0, which leads to data, the deviation is that of index 1: the posterior's own is 0 (Nichol & Dhariwal 2021, section 3.1).
        """
        path = self.parameterization.path

        def shares(at: Tensor) -> tuple[Tensor, ...]:
            alpha, sigma = path.alpha(at), path.sigma(at)
            before = (at - 1).clamp_min(0)
            alpha_s = torch.where(at > 0, path.alpha(before), torch.ones_like(at))
            sigma_s = torch.where(at > 0, path.sigma(before), torch.zeros_like(at))
            variance = (sigma**2 - (alpha / alpha_s * sigma_s) ** 2).clamp_min(_SMALL)
            std = variance.sqrt()
            return alpha_s * variance / sigma**2, alpha / alpha_s * (sigma_s / sigma) ** 2, sigma_s / sigma * std, std

        c_0, c_x, small, large = shares(t)
        _, _, floor, _ = shares(torch.ones_like(t))
        small = torch.where(t > 0, small, floor)
        return tuple(_expand(value, like).to(torch.promote_types(like.dtype, torch.float32)) for value in (c_0, c_x, small, large))

    def _log_std(self, small: Tensor, large: Tensor, learned: Tensor | None, like: Tensor) -> Tensor:
        """log of the deviation of p(x_(i-1) | x_i), (B, C, *) or broadcast: Nichol & Dhariwal 2021, eq. 15, where it is a range."""
        kind = self.parameterization.variance or "fixed_small"
        if learned is None:
            return (large if kind.startswith("fixed_large") else small).log().expand_as(like)
        if kind == "learned":
            return 0.5 * learned.clamp_min(_SMALL).log()
        share = (learned + 1) / 2
        return share * large.log() + (1 - share) * small.log()


def bin_log_prob(x: Tensor, mean: Tensor, log_std: Tensor, num_bits: int = 8) -> Tensor:
    """log of the mass of N(mean, std^2) in the bin of each value of x, which has 2^num_bits levels in [-1, 1]; the outer bins are open.

    References: Ho et al. 2020, eq. 13, https://arxiv.org/abs/2006.11239
    """
    half = 1 / (2**num_bits - 1)
    scale = torch.exp(-log_std)
    upper, lower = (x + half - mean) * scale, (x - half - mean) * scale
    # on the side where both are far below 0: differences of the distribution function near 1 would be lost to rounding
    flip = lower > 0
    upper, lower = torch.where(flip, -lower, upper), torch.where(flip, -upper, lower)
    first, last = x <= -1 + half, x >= 1 - half
    high = torch.where(torch.where(flip, first, last), torch.full_like(upper, math.inf), upper)
    low = torch.where(torch.where(flip, last, first), torch.full_like(lower, -math.inf), lower)
    return _log_difference(high, low)


def _log_difference(high: Tensor, low: Tensor) -> Tensor:
    """log(Phi(high) - Phi(low)), high > low, with gradients that stay finite at infinite ends."""
    finite_high, finite_low = high.clamp_max(30.0), low.clamp_min(-1e4)
    log_high = torch.where(high == math.inf, torch.zeros_like(high), torch.special.log_ndtr(finite_high))
    log_low = torch.special.log_ndtr(finite_low)
    gap = (log_low - log_high).clamp_max(-1e-12)
    return log_high + torch.where(low == -math.inf, torch.zeros_like(gap), torch.log(-torch.expm1(gap)))


def _expand(value: Tensor, like: Tensor) -> Tensor:
    return value.reshape(len(value), *[1] * (like.ndim - 1)).to(like.device)
