"""Euler's method for the probability-flow ODE, with EDM's churn."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..processes.grids import Grid, sigma_of_level, time_of_sigma
from ..processes.level import Level
from ..processes.linear import LinearPath
from ..processes.parameterization import Parameterization
from .base import VP_NETWORK, GaussianScheduler, SchedulerMixin, SchedulerOutput, Stage
from .updates import raise_level

__all__ = ["CHURN_DEFAULTS", "EulerScheduler", "churned"]

CHURN_DEFAULTS: dict[str, Any] = {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": None, "s_noise": 1.0}


def churned(p: Parameterization, grid: Grid, config: dict[str, Any]) -> list[tuple[float, float, Level]]:
    """(time, network time, level) that the network sees at each node after churn: sigma (1 + gamma), gamma = min(s_churn / N, sqrt(2) - 1)
    for sigma between s_tmin and s_tmax, never above the trained range.

    References: Karras et al. 2022, algorithm 2, lines 4 to 6, https://arxiv.org/abs/2206.00364
    """
    if config["s_churn"] < 0:
        raise ValueError(f"set_timesteps: s_churn = {config['s_churn']}; give a number of 0 (no churn) or more.")
    gamma = min(config["s_churn"] / len(grid), math.sqrt(2) - 1)
    top = math.inf if config["s_tmax"] is None else config["s_tmax"]
    highest = p.path.level(p.trained_t_range[1])
    nodes = []
    for t, network_time, level in zip(grid.times, grid.network_times, grid.levels[:-1], strict=True):
        inside = config["s_tmin"] <= sigma_of_level(p, level) <= top
        raised = min(level.ratio * (1 + gamma), highest.ratio)
        if gamma > 0 and inside and raised > level.ratio:
            sigma = raised / (1 + raised) if isinstance(p.path, LinearPath) else raised
            t = min(time_of_sigma(p, sigma), p.trained_t_range[1])
            network_time, level = p.network_time(t), p.path.level(t)
        nodes.append((float(t), float(network_time), level))
    return nodes


class EulerScheduler(GaussianScheduler, SchedulerMixin):
    """Euler steps of the probability-flow ODE; the same numbers in sigma, in flow time and in DDIM's form.

    Churn adds noise at the end of the step before, so that the network sees the raised level, as in EDM (diffusers' EulerDiscrete calls the
    network first and adds the noise afterwards). `timesteps` hold the raised levels, the first included.

    Args:
        s_churn, s_tmin, s_tmax, s_noise: EDM's amount of churn, the range of sigma (t on the linear path) it acts in, and the scale of its
            noise.
        interpolation_type: `linear` replays diffusers' interpolation of sigma on `linspace` grids of discrete paths; `log_linear` is this
            library's.

    References: Karras et al. 2022, algorithm 2 without its second-order correction, https://arxiv.org/abs/2206.00364
    """

    solver_defaults: ClassVar[dict[str, Any]] = {**CHURN_DEFAULTS, "interpolation_type": "linear"}
    grid_defaults: ClassVar[dict[str, Any]] = {"timestep_spacing": "linspace"}
    network_defaults: ClassVar[dict[str, Any]] = VP_NETWORK

    def plan(self, grid: Grid) -> list[Stage]:
        """One stage per node, from the raised level to the next node, then up to its raised level."""
        stages = super().plan(grid)
        for stage, (t, network_time, level) in zip(stages, churned(self.parameterization, grid, self.config), strict=True):
            stage.t, stage.network_time, stage.here = t, network_time, level
        for stage, after in zip(stages, stages[1:], strict=False):
            stage.raised = None if after.here == stage.there else after.here
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
            generator: one, or one per sample; used with churn.
            return_dict: False gives the tuple (prev_sample, pred_original_sample).
        """
        i = self._begin(timestep)
        prev, x_0 = self._move(model_output, sample, i)
        stage = self._stages[i]
        if stage.raised is not None:
            prev = raise_level(prev, stage.there, stage.raised, self._noise(prev, generator), self.config["s_noise"])
        return self._end(prev, x_0, sample, i, return_dict)
