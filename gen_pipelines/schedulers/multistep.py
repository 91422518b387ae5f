"""What the exponential multistep solvers share: exact integrals over a step in lambda, and the grids of diffusers' classes."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..processes.discrete_vp import DiscreteVPPath
from ..processes.grids import check_steps, make_grid
from ..processes.level import Level
from .base import VP_NETWORK, GaussianScheduler, SchedulerMixin

__all__ = ["NO_MOVE", "SHORTEST", "MultistepScheduler", "Weights", "kernel_moments", "multistep_update", "propagation"]


class Weights(NamedTuple):
    """x' = from_x x + sum_k outputs[k] m_k + noise z, Python floats; m_0 is the newest estimate."""

    from_x: float
    outputs: tuple[float, ...]
    noise: float = 0.0


SHORTEST = 1e-9  # in lambda: a grid that stops at its last node (sigma_min) ends with a step of no length
NO_MOVE = Weights(1.0, (0.0,))


def multistep_update(x: Tensor, outputs: Sequence[Tensor], weights: Weights, noise: Tensor | None = None) -> Tensor:
    """A linear multistep move.

    Args:
        x: the state, shape (B, *event).
        outputs: the estimates (x_0, or eps) of this and earlier evaluations, newest first, same shape; those without a weight are unused.
        weights: the coefficients.
        noise: standard normal, same shape; required where `weights.noise` > 0.
    Returns: shape (B, *event).
    """
    out = x * weights.from_x if weights.from_x != 0.0 else torch.zeros_like(x)
    for weight, output in zip(weights.outputs, outputs, strict=False):
        out.add_(output, alpha=weight)
    return out if weights.noise == 0.0 else out.add_(noise, alpha=weights.noise)


def kernel_moments(h: float, rate: float, count: int) -> list[float]:
    """J_k = integral over [0, h] of exp(-rate (h - s)) (s / h)^k ds, k = 0 ... count - 1, for 0 < h < infinity.

    They are h k! phi_{k+1}(-rate h) of exponential integrators.

    References: Lu et al. 2022, appendix B, https://arxiv.org/abs/2206.00927; Hochbruck & Ostermann 2010, eq. 2.10,
    https://doi.org/10.1017/S0962492910000048
    """
    z = rate * h
    if abs(z) < 0.5:  # the recursion below loses k digits as z -> 0; its series does not
        return [h * sum((-z) ** n * math.factorial(k) / math.factorial(k + n + 1) for n in range(18)) for k in range(count)]
    moments = [-math.expm1(-z) / rate]
    for k in range(1, count):
        moments.append((1 - k * moments[-1] / h) / rate)
    return moments


def propagation(here: Level, there: Level, data_form: bool) -> tuple[float, float]:
    """(from_x, scale): x' = from_x x + scale * integral of exp(-+(h - s)) m(s) ds over the step in lambda.

    With m = x_0 (`data_form`): sigma' / sigma and alpha', kernel exp(-(h - s)). With m = eps: alpha' / alpha and -sigma', exp(h - s).

    References: Lu et al. 2022, proposition 4.1 (x_0), https://arxiv.org/abs/2211.01095, and proposition 3.1 of
    https://arxiv.org/abs/2206.00927 (eps)
    """
    return (there.sigma / here.sigma, there.alpha) if data_form else (there.alpha / here.alpha, -there.sigma)


class MultistepScheduler(GaussianScheduler, SchedulerMixin):
    """Base of solvers that keep earlier estimates: their history, and on discrete paths the grids of diffusers' DPM-Solver and UniPC.

    Those count one node more than the steps and drop the last (`linspace`, `leading`), and lay the respaced grids over the whole trained
    range; with Karras and Lu spacing the network is given whole indices there.
    """

    grid_defaults: ClassVar[dict[str, Any]] = {"timestep_spacing": "linspace"}
    network_defaults: ClassVar[dict[str, Any]] = VP_NETWORK

    rounds_cosine: ClassVar[bool] = True  # whether a cosine network's times are rounded as well

    def reset(self) -> None:
        """Forget the estimates of earlier steps."""
        self._history: list[Tensor] = []

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
        mu: float | None = None,
    ) -> None:
        """Lay the grid and compute every coefficient of the steps on it; arguments and errors as in `GaussianScheduler.set_timesteps`."""
        check_steps(num_inference_steps)
        discrete = isinstance(self.parameterization.path, DiscreteVPPath)
        if discrete and num_inference_steps is not None and timesteps is None and sigmas is None:
            timesteps, sigmas = self._discrete_nodes(int(num_inference_steps))
            num_inference_steps = num_inference_steps if timesteps is None else None
        super().set_timesteps(num_inference_steps, device, timesteps, sigmas, mu)

    def _discrete_nodes(self, n: int) -> tuple[list[float] | None, list[float] | None]:
        """(what the network sees, sigma / alpha or None), or two None where the usual grid is meant."""
        p, o = self.parameterization, self.grid_options()
        if o.use_karras_sigmas or o.use_exponential_sigmas or o.use_beta_sigmas or o.use_lu_lambdas:
            grid = make_grid(p, n, replace(o, timestep_spacing="linspace", round_timesteps=False, interpolation_type="log_linear"))
            times = list(grid.network_times)
            whole = (o.use_karras_sigmas or o.use_lu_lambdas) and p.time_input == "index"
            if whole and (self.rounds_cosine or p.path.beta_schedule != "squaredcos_cap_v2"):
                times = np.round(times).tolist()
            return times, [*(level.ratio for level in grid.levels[:-1]), 0.0]
        count = self._usable_count()
        if o.timestep_spacing not in ("linspace", "leading", "trailing") or n < 1:
            return None, None
        if n >= count and o.timestep_spacing != "trailing":
            raise ValueError(
                f"{type(self).__name__}.set_timesteps: {n} steps with timestep_spacing={o.timestep_spacing!r}, but there are {count} "
                f"training steps to choose from; take at most {count - 1}."
            )
        if o.timestep_spacing == "linspace":
            index = np.linspace(0, count - 1, n + 1).round()[:0:-1]
        elif o.timestep_spacing == "leading" and n > 1:
            index = np.arange(n, 0, -1) * (count // (n + 1)) + float(o.steps_offset)
        elif o.timestep_spacing == "leading":
            index = np.array([count - 1.0])  # one step begins in noise
        elif count == p.path.num_train_timesteps:
            return None, None
        else:
            index = np.arange(count, 0, -p.path.num_train_timesteps / n).round() - 1
        return [float(p.network_time(float(i))) for i in index], None

    def _usable_count(self) -> int:
        """How many training steps the grid may use: those with lambda at or above `lambda_min_clipped`."""
        path, least = self.parameterization.path, self.config.get("lambda_min_clipped")
        if least is None or least == -math.inf:
            return path.num_train_timesteps
        index = torch.arange(path.num_train_timesteps, dtype=torch.float64)
        return int((path.lambda_(index) >= least).sum())
