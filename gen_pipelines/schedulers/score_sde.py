"""The reverse SDE: Euler-Maruyama, with Langevin steps between if asked (predictor-corrector)."""

import math
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..processes.grids import Grid
from ..processes.level import Level
from .base import VP_NETWORK, GaussianScheduler, SchedulerMixin, SchedulerOutput, Stage

__all__ = ["ScoreSDEScheduler", "langevin_coefficients", "reverse_sde_coefficients"]

_LARGEST = 0.5  # in units of lambda, of one step's noise; beyond 1 Euler-Maruyama is unstable
_NOISE = 1e-3  # an alpha that is as good as none


def reverse_sde_coefficients(here: Level, there: Level, flow_time: bool = False) -> tuple[float, float, float]:
    """(c_0, c_eps, std) of one Euler-Maruyama step x' = c_0 x_0 + c_eps eps + std z of dx = (u - w/2 score) dt + sqrt(w) dW towards data.

    The probability-flow part u is taken over the whole step with x_0 and eps held; the noise and its drift have w of the start:

    - w = g^2 (Song et al.'s reverse SDE, on VE, VP, sub-VP and any path), which is 2 sigma^2 per unit of lambda. A step that is longer than
      half a unit takes a smaller w, so that it stays stable (every w >= 0 has the same marginals).
    - `flow_time`: w = 2 t in the time of the linear path, t = sigma / (alpha + sigma), where the drift u + eps is finite in pure noise.

    A step that ends in data has w = 0: it gives x_0, and no noise.

    References: Song et al. 2021, eqs. 6 and 13 and appendix D, https://arxiv.org/abs/2011.13456; Ma et al. 2024, section 2.2,
    https://arxiv.org/abs/2401.08740 (w free).
    """
    if there.sigma == 0.0:
        return there.alpha, 0.0, 0.0
    if flow_time:
        scale = there.alpha + there.sigma
        t = here.sigma / (here.alpha + here.sigma)
        length = t - there.sigma / scale
        return there.alpha, there.sigma - scale * length, scale * math.sqrt(2 * t * length)
    h = min(there.lambda_ - here.lambda_, _LARGEST)
    return there.alpha, there.sigma - here.sigma * h, here.sigma * math.sqrt(2 * h)


def langevin_coefficients(here: Level, snr: float) -> tuple[float, float, float]:
    """(c_0, c_eps, std) of a Langevin step that stays at its level, with Song et al.'s step size 2 (snr sigma)^2.

    Their ratio of the norms of noise and score is taken at its expectation, sigma, so that a sample does not depend on its batch; and the
    noise is what keeps the variance at sigma^2, which differs from theirs in order snr^4.

    References: Song et al. 2021, algorithms 4 and 5, https://arxiv.org/abs/2011.13456
    """
    kept = 1 - 2 * snr**2
    return here.alpha, kept * here.sigma, here.sigma * math.sqrt(1 - kept**2)


class ScoreSDEScheduler(GaussianScheduler, SchedulerMixin):
    """Euler-Maruyama steps of the reverse SDE, on any path; with `correct_steps`, Langevin steps at every node before them.

    w is g^2, the diffusion that the data was noised with, on VE, VP and sub-VP paths; on the linear path, and on paths that begin in pure
    noise or as good as (alpha below 0.001), w = 2 t in the linear path's time. The last step adds no noise and gives x_0. Every Langevin
    step takes a network evaluation of its own, laid out in `timesteps`. The method needs several hundred steps.

    Args:
        correct_steps: Langevin steps at every node; 0 is Euler-Maruyama alone.
        snr: their signal-to-noise ratio.

    References: Song et al. 2021, https://arxiv.org/abs/2011.13456, eq. 6 and algorithms 1 to 5; Ma et al. 2024, section 2.2,
    https://arxiv.org/abs/2401.08740
    """

    solver_defaults: ClassVar[dict[str, Any]] = {"snr": 0.15, "correct_steps": 0}
    grid_defaults: ClassVar[dict[str, Any]] = {"timestep_spacing": "linspace"}
    network_defaults: ClassVar[dict[str, Any]] = VP_NETWORK

    def plan(self, grid: Grid) -> list[Stage]:
        """Per node `correct_steps` Langevin stages, then the step; `weights` are (c_0, c_eps), `data` is std."""
        p, count = self.parameterization, self.config["correct_steps"]
        if not isinstance(count, int) or count < 0:
            raise ValueError(f"ScoreSDEScheduler: correct_steps = {count!r}; give a whole number, 0 for none.")
        if not 0 < self.config["snr"] < 0.5:
            raise ValueError(f"ScoreSDEScheduler: snr = {self.config['snr']!r}; give a number between 0 and 0.5.")
        self.order = 1 + count
        # cosine betas come so near to pure noise that one step there is units of lambda: it would inflate the variance
        flow_time = p.path.name == "linear" or p.path.level(p.trained_t_range[1]).alpha < _NOISE
        stages = []
        for stage in super().plan(grid):
            corrections = [replace(stage, there=stage.here, first=k == 0) for k in range(count)]
            for correction in corrections:
                *correction.weights, correction.data = langevin_coefficients(stage.here, self.config["snr"])
            *stage.weights, stage.data = reverse_sde_coefficients(stage.here, stage.there, flow_time)
            stage.first = count == 0
            stages += [*corrections, stage]
        stages[-1].weights, stages[-1].data = stages[-1].there, 0.0
        return stages

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """One stage: a Langevin step, or a step of the SDE.

        Args:
            model_output: the network's output, shape (B, C, *), or (B, 2 C, *) with a learned variance.
            timestep: the element of `timesteps` that the network was given.
            sample: the state, shape (B, C, *).
            generator: one, or one per sample.
            return_dict: False gives the tuple (prev_sample, pred_original_sample).
        """
        i = self._begin(timestep)
        prev, x_0 = self._move(model_output, sample, i)
        std = self._stages[i].data
        if std > 0.0:
            prev = prev.add(self._noise(prev, generator), alpha=std)
        return self._end(prev, x_0, sample, i, return_dict)
