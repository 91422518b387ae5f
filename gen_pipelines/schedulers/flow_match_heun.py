"""Heun's method in the time of a flow, on the flow-matching grid."""

from typing import Any, ClassVar

from .base import FLOW_NETWORK, SchedulerMixin
from .heun import HeunScheduler

__all__ = ["FlowMatchHeunScheduler"]


class FlowMatchHeunScheduler(HeunScheduler, SchedulerMixin):
    """Heun's method for dx = u dt of a flow, on the grid of `FlowMatchEulerScheduler` (shifted once).

    It differs from `HeunScheduler` in the coordinate: slopes are averaged in the flow's time, where the slope is the velocity eps - x_0. On
    other paths than the linear one the curve is x / (alpha + sigma).

    Args:
        s_churn, s_tmin, s_tmax, s_noise: as in `EulerScheduler` (diffusers has them as arguments of `step`).

    References: Lipman et al. 2022, https://arxiv.org/abs/2210.02747; Karras et al. 2022, algorithm 2, https://arxiv.org/abs/2206.00364
    """

    network_defaults: ClassVar[dict[str, Any]] = FLOW_NETWORK
    grid_defaults: ClassVar[dict[str, Any]] = {}
    flow_grid = True
    in_flow_time = True
