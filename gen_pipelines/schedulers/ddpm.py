"""DDPM's ancestral sampler, on any Gaussian path."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..processes.grids import Grid
from ..processes.level import Level
from .base import VP_NETWORK, GaussianScheduler, SchedulerMixin, SchedulerOutput, Stage, combine, owned
from .updates import posterior_coefficients, posterior_std, transition_variance

__all__ = ["DDPMScheduler", "posterior_update", "upper_std"]


def upper_std(here: Level, there: Level) -> float:
    """Standard deviation of q(x_there | x_here) for data of unit variance: DDPM's beta_t on variance-preserving paths ("fixed large").

    References: Ho et al. 2020, section 3.2, https://arxiv.org/abs/2006.11239, with alpha and sigma free.
    """
    ratio = (there.alpha**2 + there.sigma**2) / (here.alpha**2 + here.sigma**2)
    return math.sqrt(transition_variance(here, there) * ratio)


def posterior_update(x_0: Tensor, x: Tensor, here: Level, there: Level, std: float | Tensor, noise: Tensor | None) -> Tensor:
    """A draw from q(x_there | x_here, x_0) with the variance replaced by std^2.

    Args:
        x_0: the network's estimate of the data at `here`, shape (B, *event).
        x: the sample at `here`, same shape.
        here, there: (alpha, sigma) of both ends.
        std: a float, or one per element (learned).
        noise: standard normal, same shape; None adds none.
    Returns: x at `there`, shape (B, *event).
    References: Ho et al. 2020, eqs. 6 and 7, https://arxiv.org/abs/2006.11239, with alpha and sigma free.
    """
    mean = combine(*_interleave(posterior_coefficients(here, there), x_0, x))
    if noise is None:
        return mean
    return torch.addcmul(mean, noise, std) if isinstance(std, Tensor) else torch.add(mean, noise, alpha=std)


def _interleave(coefficients: tuple[float, float], a: Tensor, b: Tensor) -> tuple[float, Tensor, float, Tensor]:
    return coefficients[0], a, coefficients[1], b


class DDPMScheduler(GaussianScheduler, SchedulerMixin):
    """Ancestral sampling: each step draws from q(x_there | x_here, x_0) with the network's x_0.

    Args:
        variance_type: `fixed_small` (the posterior's variance), `fixed_large` (that of unit-variance data), `learned_range` (the network's
            second half of channels interpolates their logarithms: Nichol & Dhariwal 2021, eq. 15, https://arxiv.org/abs/2102.09672) or
                `learned` (it is the
            variance); the `_log` forms of the fixed ones mean the same.

    No noise is added in the step that ends in data (diffusers leaves it out only at index 0).

    References: Ho et al. 2020, algorithm 2, https://arxiv.org/abs/2006.11239
    """

    grid_defaults: ClassVar[dict[str, Any]] = {"timestep_spacing": "leading"}
    network_defaults: ClassVar[dict[str, Any]] = {**VP_NETWORK, "clip_sample": True, "variance_type": "fixed_small"}
    round_timesteps = True

    def plan(self, grid: Grid) -> list[Stage]:
        """One stage per node; `data` holds (least, largest) standard deviation of the step."""
        stages = super().plan(grid)
        for stage in stages:
            stage.data = (posterior_std(stage.here, stage.there), upper_std(stage.here, stage.there))
        return stages

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """One step.

        Args:
            model_output: the network's output, shape (B, C, *), or (B, 2 C, *) with a learned variance.
            timestep: the element of `timesteps` that the network was given.
            sample: the state, shape (B, C, *).
            generator: one, or one per sample.
            return_dict: False gives the tuple (prev_sample, pred_original_sample).
        """
        i = self._begin(timestep)
        stage = self._stages[i]
        model_output, x, learned = self._split(model_output, sample)
        x_0 = self._x_0(model_output, x, i)
        noise = self._noise(x_0, generator) if stage.there.sigma > 0.0 else None
        std = self._std(stage.data, learned) if noise is not None else 0.0
        prev = posterior_update(x_0, x, stage.here, stage.there, std, noise)
        return self._end(owned(prev, model_output), x_0, sample, i, return_dict)

    def _std(self, ends: tuple[float, float], learned: Tensor | None) -> float | Tensor:
        small, large = ends
        kind = self._network.variance or "fixed_small"
        if learned is None:
            return large if kind.startswith("fixed_large") else small
        learned = learned.to(torch.promote_types(learned.dtype, torch.float32))
        if kind == "learned":
            return learned.sqrt()
        low, high = math.log(max(small, 1e-20)), math.log(max(large, 1e-20))
        return torch.exp(0.5 * (high - low) * learned + 0.5 * (high + low))  # log std is linear in the output, from low at -1 to high at 1
