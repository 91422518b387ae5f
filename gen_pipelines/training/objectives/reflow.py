"""Reflow: flow matching between noise and the data that a flow made of it, so that the new flow's paths are straight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...processes import Parameterization
from ..random import Generators, uniform
from .base import ObjectiveOutput
from .consistency import pseudo_huber
from .time_densities import Uniform


@dataclass(frozen=True)
class ReflowObjective:
    """E_t |u(x_t, t) - (eps - x_0)|^2, x_t = (1 - t) x_0 + t eps, over pairs (eps, x_0) of a flow; with `one_step` at t = 1 alone.

    The velocity that minimises it keeps the distributions at both ends, and no pair's transport is dearer than before (section 3 there).
    With `one_step` the network's first step is the whole way: eps - u(eps, 1) is the picture (the paper's distillation, section 3.3).

    Attributes:
        parameterization: velocities on the linear path.
        time_density: maps u in [0, 1) to a time (`time_densities.py`).
        one_step: train the first step alone.
        huber: c of a pseudo-Huber distance in place of the mean squared error; None for the latter (Lee et al. 2024, section 4.2,
            https://arxiv.org/abs/2405.20320).

    References: Liu et al. 2022, eq. 1 and algorithm 1, https://arxiv.org/abs/2209.03003 (there time runs the other way).
    """

    parameterization: Parameterization
    time_density: Callable[[Tensor, Parameterization], Tensor] = field(default_factory=Uniform)
    one_step: bool = False
    huber: float | None = None

    def __post_init__(self) -> None:
        p = self.parameterization
        if p.prediction != "flow_prediction" or p.path.name != "linear":
            raise ValueError(f"ReflowObjective: straight paths are velocities on the linear path; got {p.prediction!r} on {p.path.name!r}.")

    def __call__(
        self,
        model: Callable[[Tensor, Tensor, Any], Tensor],
        x_0: Tensor,
        eps: Tensor,
        *,
        condition: Any = None,
        generator: Generators = None,
    ) -> ObjectiveOutput:
        """Losses (B,).

        Args:
            model: (network's input, network's time (B,), condition) -> raw output.
            x_0, eps: the pairs, each (B, *event).
            condition: passed through to `model`.
            generator: one, or one per sample, for the times.
        Returns: the metric `distance` is the mean squared distance of the velocity from the pair's own, per value.
        """
        p = self.parameterization
        u = uniform((len(x_0), 1), generator, x_0.device)[:, 0]                                       # (B,)
        t = torch.full_like(u, p.trained_t_range[1], dtype=torch.float64) if self.one_step else self.time_density(u, p)
        at = t.to(x_0.dtype).reshape(len(x_0), *[1] * (x_0.ndim - 1))
        output = model((1 - at) * x_0 + at * eps, p.network_time(t).to(x_0.dtype), condition)
        difference = output.float() * p.sign - (eps - x_0).float()
        squared = difference.square().flatten(1).mean(1)                                              # (B,)
        loss = squared if self.huber is None else pseudo_huber(difference, self.huber)
        return ObjectiveOutput(loss, {"distance": squared.detach()})
