"""At which noise levels a denoiser is trained. Each density maps a uniform number u in [0, 1) to the native time of any path."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...processes import Parameterization

_EDGE = 1e-6  # keeps the quantile functions finite: float32 uniforms reach 0


def _wide(u: Tensor) -> Tensor:
    """float64, or float32 on MPS, which has nothing wider."""
    return u.float() if u.device.type == "mps" else u.double()


def _probit(u: Tensor) -> Tensor:
    """The quantile function of the standard normal."""
    return math.sqrt(2) * torch.erfinv(2 * _wide(u).clamp(_EDGE, 1 - _EDGE) - 1)


def _to_range(fraction: Tensor, parameterization: Parameterization) -> Tensor:
    """A fraction of the trained range as native time, data end first; whole indices on a discrete path, log-scaled sigma on VE and EDM."""
    low, high = parameterization.trained_t_range
    path = parameterization.path
    fraction = _wide(fraction)
    if path.name == "discrete_vp":
        return (low + fraction * (high - low + 1)).floor().clamp(max=high)
    if path.name in ("ve", "edm"):
        return torch.exp(math.log(low) + fraction * (math.log(high) - math.log(low)))
    return low + fraction * (high - low)


@dataclass(frozen=True)
class Uniform:
    """Uniform in time: every index of a discrete path, t on a continuous one, log sigma on VE and EDM.

    References: Ho et al. 2020, algorithm 1, https://arxiv.org/abs/2006.11239
    """

    def __call__(self, u: Tensor, parameterization: Parameterization) -> Tensor:
        return _to_range(u, parameterization)


@dataclass(frozen=True)
class LogitNormal:
    """logit of the time's fraction ~ N(mean, std^2).

    References: Esser et al. 2024, eq. 19, https://arxiv.org/abs/2403.03206
    """

    mean: float = 0.0
    std: float = 1.0

    def __call__(self, u: Tensor, parameterization: Parameterization) -> Tensor:
        return _to_range(torch.sigmoid(self.mean + self.std * _probit(u)), parameterization)


@dataclass(frozen=True)
class Mode:
    """Heavier in the middle (scale > 0) or at the ends (scale < 0), and positive everywhere.

    References: Esser et al. 2024, eq. 20, https://arxiv.org/abs/2403.03206
    """

    scale: float = 1.29

    def __call__(self, u: Tensor, parameterization: Parameterization) -> Tensor:
        u = _wide(u)
        return _to_range(1 - u - self.scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u), parameterization)


@dataclass(frozen=True)
class CosMap:
    """The density with which the linear path has the log-SNR distribution of the cosine path.

    References: Esser et al. 2024, eq. 21, https://arxiv.org/abs/2403.03206
    """

    def __call__(self, u: Tensor, parameterization: Parameterization) -> Tensor:
        return _to_range(1 - 1 / (torch.tan(math.pi / 2 * _wide(u)) + 1), parameterization)


@dataclass(frozen=True)
class LogNormalSigma:
    """log(sigma / alpha) ~ N(mean, std^2), cut at the ends of the trained range.

    References: Karras et al. 2022, table 1 (P_mean, P_std), https://arxiv.org/abs/2206.00364
    """

    mean: float = -1.2
    std: float = 1.2

    def __call__(self, u: Tensor, parameterization: Parameterization) -> Tensor:
        low, high = parameterization.trained_lambda_range
        lambda_ = -(self.mean + self.std * _probit(u))
        return parameterization.path.t_from_lambda(lambda_.clamp(low, high))


@dataclass(frozen=True)
class UniformLambda:
    """Uniform in the half log-SNR over the trained range, which must be finite.

    References: Kingma & Gao 2023, section 3, https://arxiv.org/abs/2303.00848
    """

    def __call__(self, u: Tensor, parameterization: Parameterization) -> Tensor:
        low, high = parameterization.trained_lambda_range
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"UniformLambda: the trained lambdas are ({low}, {high}); give the parameterization a finite lambda_range.")
        return parameterization.path.t_from_lambda(high - _wide(u) * (high - low))


TIME_DENSITIES = {
    "uniform": Uniform,
    "logit_normal": LogitNormal,
    "mode": Mode,
    "cosmap": CosMap,
    "log_normal_sigma": LogNormalSigma,
    "uniform_lambda": UniformLambda,
}
