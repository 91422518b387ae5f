"""Rectified flow: uniform Euler steps on straight paths, and how straight they were."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..processes.grids import Grid, GridOptions
from ..processes.level import Level
from .base import FLOW_NETWORK, GaussianScheduler, SchedulerMixin, SchedulerOutput, Stage

__all__ = ["RectifiedFlowScheduler", "flow_time_of"]


def flow_time_of(level: Level) -> float:
    """The time of the linear path with the same lambda: sigma / (alpha + sigma)."""
    return level.sigma / (level.alpha + level.sigma)


class RectifiedFlowScheduler(GaussianScheduler, SchedulerMixin):
    """N equal Euler steps dx = v dt from noise to data, at t = 1, 1 - 1/N, ..., 1/N; one step included.

    On other paths than the linear one the same move is made in x_0 and eps, and v = eps - x_0 is the velocity of x / (alpha + sigma).

    `straightness` is Liu et al.'s measure of the trajectories that were drawn: the mean over steps (weighted by their lengths, equal on the
    class's own grid) of |v - (end - start)|^2, per sample, shape (B,), summed over the event; 0 for a straight one. It is None until a loop
    from the first node to the end is over.

    References: Liu et al. 2022, https://arxiv.org/abs/2209.03003, eqs. 1 and 3 (there time runs the other way).
    """

    network_defaults: ClassVar[dict[str, Any]] = FLOW_NETWORK
    grid_defaults: ClassVar[dict[str, Any]] = {"timestep_spacing": "trailing"}
    flow_grid = True
    round_timesteps = True

    def grid_options(self) -> GridOptions:
        """The grid that the config asks for; on the linear path equal steps, of which the last ends in data."""
        options = super().grid_options()
        p = self.parameterization
        whole = p.path.name == "linear" and p.lambda_range is None
        if not whole or self.config.get("timestep_spacing") is not None:
            return options
        return GridOptions(**{**options.__dict__, "timestep_spacing": "trailing"})

    def plan(self, grid: Grid) -> list[Stage]:
        """One stage per node; `data` is the length of the step in flow time."""
        stages = super().plan(grid)
        for stage in stages:
            stage.data = flow_time_of(stage.here) - flow_time_of(stage.there)
        return stages

    def reset(self) -> None:
        """Forget the velocities of an unfinished loop."""
        self._done, self._mean, self._spread = 0.0, None, None

    @property
    def straightness(self) -> Tensor | None:
        """Mean squared distance of v from (end - start), shape (B,); None before the end of a whole loop."""
        whole = self._stages is not None and self._step_index == len(self._stages) and self._mean is not None
        return self._spread / self._done if whole and self._first == 0 else None

    def _watch(self, v: Tensor, length: float, i: int) -> None:
        """Welford's update of the mean velocity, which is (end - start) over the time passed, and of the spread about it."""
        if i == 0 or self._mean is None:
            self._done, self._first, self._mean, self._spread = length, i, v.clone(), v.new_zeros(v.shape[:1])
            return
        self._done += length
        away = v - self._mean
        self._mean = self._mean.add(away, alpha=length / self._done)
        self._spread = self._spread.add((away * (v - self._mean)).reshape(len(v), -1).sum(1), alpha=length)

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
            generator: not used: the solver is deterministic.
            return_dict: False gives the tuple (prev_sample, pred_original_sample).
        """
        i = self._begin(timestep)
        prev, x_0 = self._move(model_output, sample, i)
        velocity = self._weigh(model_output, sample, i, -1.0, 1.0)  # eps - x_0
        self._watch(velocity, self._stages[i].data, i)
        return self._end(prev, x_0, sample, i, return_dict)
