"""DDIM, on any Gaussian path."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..processes.grids import Grid
from .base import VP_NETWORK, GaussianScheduler, SchedulerMixin, SchedulerOutput, Stage
from .updates import ancestral_update

__all__ = ["DDIMScheduler"]


class DDIMScheduler(GaussianScheduler, SchedulerMixin):
    """Denoising diffusion implicit models: x_0 and eps are held over a step, with a share `eta` of the ancestral noise.

    Args:
        set_alpha_to_one: whether the last step on a discrete path ends in clean data; False ends at index 0, as Stable Diffusion's configs
            have it.

    References: Song et al. 2021, eqs. 12 and 16, https://arxiv.org/abs/2010.02502
    """

    solver_defaults: ClassVar[dict[str, Any]] = {"set_alpha_to_one": True}
    grid_defaults: ClassVar[dict[str, Any]] = {"timestep_spacing": "leading"}
    network_defaults: ClassVar[dict[str, Any]] = {**VP_NETWORK, "clip_sample": True}
    round_timesteps = True

    def plan(self, grid: Grid) -> list[Stage]:
        """One stage per node; the last lands at index 0 with `set_alpha_to_one=False` on a discrete path."""
        stages = super().plan(grid)
        path = self.parameterization.path
        if not self.config["set_alpha_to_one"] and path.name == "discrete_vp":
            stages[-1].there = path.level(0.0)
        return stages

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """One step.

        Args:
            model_output: the network's output, shape (B, C, *), or (B, 2 C, *) with a learned variance.
            timestep: the element of `timesteps` that the network was given.
            sample: the state, shape (B, C, *).
            eta: 0 is deterministic, 1 is ancestral.
            use_clipped_model_output: where x_0 is clipped, let eps follow it (diffusers' default is not to).
            generator: one, or one per sample.
            variance_noise: the noise itself, instead of `generator`.
            return_dict: False gives the tuple (prev_sample, pred_original_sample).
        """
        i = self._begin(timestep)
        if eta == 0.0 and not self._network.limits_x_0:
            prev, x_0 = self._move(model_output, sample, i)
            return self._end(prev, x_0, sample, i, return_dict)
        if variance_noise is not None and generator is not None:
            raise ValueError("DDIMScheduler.step: variance_noise and generator are both given; the noise comes from one of them.")
        stage = self._stages[i]
        x_0, eps = self._predict(model_output, sample, i, consistent=use_clipped_model_output)
        noise = variance_noise
        if eta > 0.0 and noise is None and stage.there.sigma > 0.0:
            noise = self._noise(x_0, generator)
        return self._end(ancestral_update(x_0, eps, stage.here, stage.there, eta, noise), x_0, sample, i, return_dict)
