"""Euler's method with the noise of ancestral sampling."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import VP_NETWORK, GaussianScheduler, SchedulerMixin, SchedulerOutput
from .updates import ancestral_update

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
        x_0, eps = self._predict(model_output, sample, i)
        if stage.there.sigma == 0.0:
            return self._end(x_0, x_0, sample, i, return_dict)
        noise = self._noise(x_0, generator)
        return self._end(ancestral_update(x_0, eps, stage.here, stage.there, 1.0, noise), x_0, sample, i, return_dict)
