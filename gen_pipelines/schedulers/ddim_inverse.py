"""DDIM backwards: from data to the noise that DDIM would have made it of."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..processes.grids import Grid, sigma_of_level
from ..processes.level import DATA
from ..processes.parameterization import Affine
from .base import VP_NETWORK, GaussianScheduler, SchedulerMixin, SchedulerOutput, Stage, combine

__all__ = ["DDIMInverseScheduler"]


class DDIMInverseScheduler(GaussianScheduler, SchedulerMixin):
    """The steps of deterministic DDIM in the other direction: `timesteps` rise, the loop starts from data and ends at the noisiest node.

    DDIM's own step from a node is inverted exactly except that the network sees the state one node cleaner than the time it is told
    (the noisier state is what is being sought), so that a round trip closes with an error of first order in the step. Velocities are read
    at the state's level, other predictions at the level that the network was told.

    Args:
        set_alpha_to_one: whether the data that the loop starts from is clean; False takes it to be at index 0 of a discrete path.

    References: Song et al. 2021, section 4.3, https://arxiv.org/abs/2010.02502; Dhariwal & Nichol 2021, appendix F,
    https://arxiv.org/abs/2105.05233
    """

    solver_defaults: ClassVar[dict[str, Any]] = {"set_alpha_to_one": True}
    grid_defaults: ClassVar[dict[str, Any]] = {"timestep_spacing": "leading"}
    network_defaults: ClassVar[dict[str, Any]] = {**VP_NETWORK, "clip_sample": True}
    round_timesteps = True

    def plan(self, grid: Grid) -> list[Stage]:
        """One stage per node, cleanest first; `data` is the level of the state, one node below the network's."""
        path, n = self.parameterization.path, len(grid)
        stages = []
        lower = path.level(0.0) if path.name == "discrete_vp" and not self.config["set_alpha_to_one"] else DATA
        for i in reversed(range(n)):
            level = grid.levels[i]
            stages.append(Stage(grid.times[i], grid.network_times[i], level, level, node=n - 1 - i, data=lower))
            lower = level
        return stages

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
        mu: float | None = None,
    ) -> None:
        """Lay the grid and compute every coefficient on it; arguments and errors as in `GaussianScheduler.set_timesteps`: explicit
        `timesteps` and `sigmas` are those of the forward loop, noise first."""
        super().set_timesteps(num_inference_steps, device, timesteps, sigmas, mu)
        p = self._network
        for i, stage in enumerate(self._stages):
            lower, there = stage.data, stage.there
            velocity = p.prediction in ("v_prediction", "flow_prediction")
            a = p.affine(stage.t, lower) if velocity else self._affine[i]
            # x = alpha x_0 + sigma eps holds at the level of the state
            x_0 = [(1 - lower.sigma * a.eps_from_x) / lower.alpha, -lower.sigma * a.eps_from_output / lower.alpha]
            self._affine[i] = a = Affine(*x_0, a.eps_from_x, a.eps_from_output)
            self._moves[i] = a.weighted(*there)
            stage.here = lower
        ends = [*(s.here for s in self._stages), self._stages[-1].there]
        self._sigmas = torch.tensor([sigma_of_level(p, level) for level in ends], dtype=torch.float32)

    @property
    def init_noise_sigma(self) -> float:
        """1: the loop starts from data."""
        return 1.0

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """One step towards noise.

        Args:
            model_output: the network's output, shape (B, C, *), or (B, 2 C, *) with a learned variance.
            timestep: the element of `timesteps` that the network was given.
            sample: the state, shape (B, C, *).
            generator: not used: the solver is deterministic.
            return_dict: False gives the tuple (prev_sample, pred_original_sample); prev_sample is the noisier state, as in diffusers.
        """
        i = self._begin(timestep)
        if self._network.limits_x_0:
            there = self._stages[i].there
            x_0, eps = self._predict(model_output, sample, i, consistent=False)
            return self._end(combine(there.alpha, x_0, there.sigma, eps), x_0, sample, i, return_dict)
        prev, x_0 = self._move(model_output, sample, i)
        return self._end(prev, x_0, sample, i, return_dict)
