"""Euler's method with the noise of ancestral sampling."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..processes.grids import Grid
from .base import VP_NETWORK, GaussianScheduler, SchedulerMixin, SchedulerOutput, Stage
from .updates import posterior_std

__all__ = ["EulerAncestralScheduler"]


class EulerAncestralScheduler(GaussianScheduler, SchedulerMixin):
    """An Euler step down to sigma_down, then noise up to the level of the node: sigma_up^2 = sigma'^2 (sigma^2 - sigma'^2) / sigma^2 and
    sigma_down^2 = sigma'^2 - sigma_up^2, in sigma / alpha.

    It is the step of `DDIMScheduler` at eta = 1 and of `DDPMScheduler` with the small variance, on the grid of `EulerScheduler`. The step
    that ends in data adds no noise.

    Args:
        interpolation_type: as in `EulerScheduler`: `linear` replays diffusers' interpolation of sigma on `linspace` grids.

    References: Song et al. 2021, eqs. 12 and 16 with eta = 1, https://arxiv.org/abs/2010.02502, written as a step in sigma.
    """

    solver_defaults: ClassVar[dict[str, Any]] = {"interpolation_type": "linear"}
    grid_defaults: ClassVar[dict[str, Any]] = {"timestep_spacing": "linspace"}
    network_defaults: ClassVar[dict[str, Any]] = VP_NETWORK

    def plan(self, grid: Grid) -> list[Stage]:
        """One stage per node; `data` is sigma_up, and the rest of the move is down to sigma_down."""
        stages = super().plan(grid)
        for stage in stages:
            stage.data = up = posterior_std(stage.here, stage.there)
            stage.weights = (stage.there.alpha, math.sqrt(max(stage.there.sigma**2 - up**2, 0.0)))
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
        prev, x_0 = self._move(model_output, sample, i)
        up = self._stages[i].data
        if up > 0.0:
            prev = prev.add(self._noise(prev, generator), alpha=up)
        return self._end(prev, x_0, sample, i, return_dict)
