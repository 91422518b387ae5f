"""Euler steps on the flow-matching grid."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..processes.grids import Grid
from .base import FLOW_NETWORK, GaussianScheduler, SchedulerMixin, SchedulerOutput, Stage, owned
from .updates import first_order_update

__all__ = ["FlowMatchEulerScheduler"]


class FlowMatchEulerScheduler(GaussianScheduler, SchedulerMixin):
    """Euler steps dx = u dt of a flow, on a grid that is shifted once, statically (`shift`) or by resolution (`use_dynamic_shifting`, with
    mu).

    On the linear path a step is x + (t' - t) u; on other paths it is the same move in x_0 and eps.

    Args:
        stochastic_sampling: draw new noise at every level, x = alpha x_0 + sigma z, instead of following the flow.

    References: Lipman et al. 2022, https://arxiv.org/abs/2210.02747; Esser et al. 2024, section 5.3.2, https://arxiv.org/abs/2403.03206
    (the shift)
    """

    solver_defaults: ClassVar[dict[str, Any]] = {"stochastic_sampling": False}
    network_defaults: ClassVar[dict[str, Any]] = FLOW_NETWORK
    flow_grid = True

    def plan(self, grid: Grid) -> list[Stage]:
        """One stage per node."""
        self._draws = bool(self.config["stochastic_sampling"])
        return super().plan(grid)

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
            generator: one, or one per sample; used by the stochastic form.
            return_dict: False gives the tuple (prev_sample, pred_original_sample).
        """
        i = self._begin(timestep)
        if not self._draws:
            prev, x_0 = self._move(model_output, sample, i)
            return self._end(prev, x_0, sample, i, return_dict)
        there = self._stages[i].there
        x_0, _ = self._predict(model_output, sample, i)
        prev = first_order_update(x_0, self._noise(x_0, generator), there) if there.sigma > 0.0 else owned(x_0, model_output)
        return self._end(prev, x_0, sample, i, return_dict)
