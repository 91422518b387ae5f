"""Heun's second-order method for the probability-flow ODE, with EDM's churn."""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..processes.grids import Grid
from ..processes.level import Level
from .base import VP_NETWORK, GaussianScheduler, SchedulerMixin, SchedulerOutput, Stage, owned
from .euler import CHURN_DEFAULTS, churned
from .updates import raise_level

__all__ = ["HeunScheduler", "slope_width"]


def slope_width(here: Level, there: Level, flow_time: bool = False) -> float:
    """What a slope is multiplied by in a step, in the path's own coordinates.

    In sigma~ = sigma / alpha the curve is x / alpha, its slope eps, and the width alpha' (sigma~' - sigma~). In flow time
    t = sigma / (alpha + sigma) the curve is x / (alpha + sigma), its slope eps - x_0, and the width (alpha' + sigma') (t' - t).
    """
    if not flow_time:
        return there.alpha * (there.ratio - here.ratio)
    start, end = here.alpha + here.sigma, there.alpha + there.sigma
    return end * (there.sigma / end - here.sigma / start)


class HeunScheduler(GaussianScheduler, SchedulerMixin):
    """Second-order steps in sigma / alpha: an Euler step, a network evaluation where it lands, a step with the mean of both slopes.

    A step takes two evaluations, laid out in `timesteps` (2 N - 1 of them: the step that ends the grid is Euler's). A step that starts in
    pure noise, where sigma / alpha is infinite, is taken in flow time. The second stage, which begins where Euler's step landed, adds half
    the step's width times the difference of the slopes at both ends (lines 9 to 11). Churn adds noise at the end of the step before, so
    that the network sees the raised level, as in EDM (diffusers' Heun has no churn).

    Args:
        s_churn, s_tmin, s_tmax, s_noise, interpolation_type: as in `EulerScheduler`.

    References: Karras et al. 2022, algorithm 2, https://arxiv.org/abs/2206.00364
    """

    order = 2
    solver_defaults: ClassVar[dict[str, Any]] = {**CHURN_DEFAULTS, "interpolation_type": "linear"}
    grid_defaults: ClassVar[dict[str, Any]] = {"timestep_spacing": "linspace"}
    network_defaults: ClassVar[dict[str, Any]] = {**VP_NETWORK, "beta_start": 0.00085, "beta_end": 0.012}
    in_flow_time: ClassVar[bool] = False

    def plan(self, grid: Grid) -> list[Stage]:
        """Euler's stage at every node, and between two nodes the correction x + width / 2 (slope there - slope).

        `data` holds what x_0 and eps are multiplied by in the slope, and half the width; a correction's `weights` leave out the old slope.
        """
        nodes = churned(self.parameterization, grid, self.config)
        stages = []
        for i, (t, network_time, here) in enumerate(nodes):
            there = grid.levels[i + 1]
            flow_time = self.in_flow_time or here.alpha == 0.0
            slope = (-1.0 if flow_time else 0.0, 1.0)
            half = 0.5 * slope_width(here, there, flow_time)
            stages.append(Stage(t, network_time, here, there, node=i, data=(slope, half)))
            if i + 1 < len(nodes):
                after = replace(stages[-1], t=grid.times[i + 1], network_time=grid.network_times[i + 1], here=there, first=False)
                after.weights = (there.alpha + half * slope[0], there.sigma + half * slope[1])
                after.raised = None if nodes[i + 1][2] == there else nodes[i + 1][2]
                stages.append(after)
        return stages

    def reset(self) -> None:
        """Forget the slope at the start of the step."""
        self._slope: Tensor | None = None

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """One stage of a step.

        Args:
            model_output: the network's output, shape (B, C, *), or (B, 2 C, *) with a learned variance.
            timestep: the element of `timesteps` that the network was given.
            sample: the state, shape (B, C, *). A correction of a loop that began there has nothing to correct, and leaves it as it is.
            generator: one, or one per sample; used with churn.
            return_dict: False gives the tuple (prev_sample, pred_original_sample).
        """
        i = self._begin(timestep)
        stage = self._stages[i]
        prev, x_0 = self._move(model_output, sample, i)
        if stage.first:
            self._slope = owned(self._weigh(model_output, sample, i, *stage.data[0]), model_output)
        else:
            prev = sample.to(prev.dtype) if self._slope is None else prev.add(self._slope, alpha=-stage.data[1])
            self._slope = None
        if stage.raised is not None:
            prev = raise_level(prev, stage.there, stage.raised, self._noise(prev, generator), self.config["s_noise"])
        return self._end(prev, x_0, sample, i, return_dict)
