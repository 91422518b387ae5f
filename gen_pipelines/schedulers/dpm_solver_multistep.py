"""DPM-Solver and DPM-Solver++, multistep, of first to third order, for the ODE and the SDE."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..processes.grids import Grid
from ..processes.level import Level
from .base import SchedulerMixin, SchedulerOutput, Stage, owned
from .multistep import NO_MOVE, SHORTEST, MultistepScheduler, Weights, kernel_moments, multistep_update, propagation

__all__ = ["ALGORITHMS", "DPMSolverMultistepScheduler", "dpm_solver_weights"]

ALGORITHMS = ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver")


def _is_limit(here: Level, there: Level) -> bool:
    """Whether the step begins in pure noise or ends in data: it is infinitely long in lambda."""
    return here.alpha == 0.0 or there.sigma == 0.0


def dpm_solver_weights(
    here: Level,
    there: Level,
    earlier: Sequence[Level] = (),
    algorithm: str = "dpmsolver++",
    midpoint: bool = True,
) -> Weights:
    """Coefficients of a step in which the estimate (x_0 in the ++ forms, else eps) is the polynomial in lambda through its last values.

    Args:
        here, there: the ends of the step.
        earlier: levels of earlier estimates, newest first; their number plus one is the order, 1 to 3.
        algorithm: an entry of `ALGORITHMS`; the `sde-` forms solve the reverse SDE.
        midpoint: at order 2, weigh the slope by half the first moment of the kernel's mass (DPM-Solver++'s 2M) instead of integrating it.
    Returns: weights for the current estimate and one per earlier one. A step from pure noise or to data (infinite h) is of first order
        and in terms of x_0, whatever was asked.
    References: Lu et al. 2022, https://arxiv.org/abs/2211.01095, section 4 and algorithm 2 (2M), section 6 (SDE);
        https://arxiv.org/abs/2206.00927, appendix B, for the third order. In diffusers the second derivative has half the weight that its
        Taylor term needs, which makes 3M a second-order method; here it is integrated exactly.
    """
    stochastic, data_form = algorithm.startswith("sde"), algorithm.endswith("++")
    if _is_limit(here, there):
        return Weights(0.0, (there.alpha,), there.sigma) if stochastic else Weights(there.sigma / here.sigma, (there.alpha,))
    h = there.lambda_ - here.lambda_
    if h < SHORTEST:
        return NO_MOVE
    from_x, scale = propagation(here, there, data_form)
    rate, noise = (1.0 if data_form else -1.0), 0.0
    if stochastic:
        scale = 2 * scale
        if data_form:
            rate, from_x = 2.0, from_x * math.exp(-h)
        noise = there.sigma * math.sqrt(-math.expm1(-2 * h) if data_form else math.expm1(2 * h))
    j = kernel_moments(h, rate, 3)
    if not earlier:
        return Weights(from_x, (scale * j[0],), noise)
    if len(earlier) == 1:  # m(s) = m_0 + (s / h) (m_0 - m_1) / r_0
        r_0 = (here.lambda_ - earlier[0].lambda_) / h
        slope = scale * (0.5 * j[0] if midpoint else j[1]) / r_0
        return Weights(from_x, (scale * j[0] + slope, -slope), noise)
    # Newton's form with u = s / h and nodes 0, -r_0, -(r_0 + r_1): m_0 + u d_0 + u (u + r_0) (d_0 - d_1) / (r_0 + r_1)
    r_0, r_1 = (here.lambda_ - earlier[0].lambda_) / h, (earlier[0].lambda_ - earlier[1].lambda_) / h
    second = (j[2] + r_0 * j[1]) / (r_0 + r_1)
    d_0, d_1 = scale * (j[1] + second) / r_0, -scale * second / r_1
    return Weights(from_x, (scale * j[0] + d_0, d_1 - d_0, -d_1), noise)


class DPMSolverMultistepScheduler(MultistepScheduler, SchedulerMixin):
    """Exponential multistep steps in lambda, right on every path: DPM-Solver++ 2M (the default), 3M, and their forms for the reverse SDE.

    Args:
        solver_order: 1 to 3; the first steps and those towards the end of a short loop take what history there is.
        algorithm_type: `dpmsolver++` or `sde-dpmsolver++` (polynomials of x_0), `dpmsolver` or `sde-dpmsolver` (of eps).
        solver_type: `midpoint` or `heun`, the second-order rule.
        lower_order_final: in loops of fewer than 15 steps, end with order 2 and 1. A step that ends in data is always of order 1.
        euler_at_final: end with order 1 in any loop.
        lambda_min_clipped: on discrete paths, leave out training steps with a lower lambda; None keeps all.

    References: Lu et al. 2022, https://arxiv.org/abs/2211.01095 and https://arxiv.org/abs/2206.00927
    """

    solver_defaults: ClassVar[dict[str, Any]] = {
        "solver_order": 2,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "lower_order_final": True,
        "euler_at_final": False,
        "lambda_min_clipped": None,
    }

    rounds_cosine = False

    def _options(self) -> tuple[int, str, bool]:
        """(order, algorithm, midpoint), checked."""
        order, algorithm, kind = (self.config[k] for k in ("solver_order", "algorithm_type", "solver_type"))
        algorithm = "dpmsolver++" if algorithm == "deis" else algorithm  # configs of other multistep solvers: as diffusers reads them
        kind = "midpoint" if kind in ("logrho", "bh1", "bh2") else kind
        if order not in (1, 2, 3):
            raise ValueError(f"{type(self).__name__}: solver_order = {order!r}; use 1, 2 or 3.")
        if algorithm not in ALGORITHMS:
            raise ValueError(f"{type(self).__name__}: algorithm_type {algorithm!r} is not known; use one of {', '.join(ALGORITHMS)}.")
        if kind not in ("midpoint", "heun"):
            raise ValueError(f"{type(self).__name__}: solver_type {kind!r} is not known; use 'midpoint' or 'heun'.")
        return order, algorithm, kind == "midpoint"

    def plan(self, grid: Grid) -> list[Stage]:
        """One stage per node; `data` holds the weights for every length of history, shortest first."""
        stages = super().plan(grid)
        order, algorithm, midpoint = self._options()
        n = len(stages)
        short = self.config["lower_order_final"] and n < 15
        for i, stage in enumerate(stages):
            most = order
            if (i == n - 1 and (short or self.config["euler_at_final"])) or _is_limit(stage.here, stage.there):
                most = 1
            elif i == n - 2 and short:
                most = min(order, 2)
            earlier = [s.here for s in stages[max(0, i - most + 1) : i][::-1] if s.here.alpha > 0.0]
            stage.data = [
                dpm_solver_weights(stage.here, stage.there, earlier[:k], algorithm, midpoint) for k in range(min(most, len(earlier) + 1))
            ]
        self._order, self._keeps_x_0, self._draws = order, algorithm.endswith("++"), algorithm.startswith("sde")
        return stages

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """One step.

        Args:
            model_output: the network's output, shape (B, C, *), or (B, 2 C, *) with a learned variance.
            timestep: the element of `timesteps` that the network was given.
            sample: the state, shape (B, C, *).
            generator: one, or one per sample; used by the `sde-` forms.
            variance_noise: the noise itself, instead of `generator`.
            return_dict: False gives the tuple (prev_sample, pred_original_sample).
        """
        i = self._begin(timestep)
        stage = self._stages[i]
        if self._keeps_x_0:
            out, x, _ = self._split(model_output, sample)
            newest = x_0 = self._x_0(out, x, i)
        else:
            x_0, newest = self._predict(model_output, sample, i)
            x = sample.to(x_0.dtype)
        outputs = [newest, *self._history]
        self._history = [owned(newest, model_output), *self._history][: self._order - 1]
        weights = stage.data[min(len(outputs), len(stage.data)) - 1]
        if _is_limit(stage.here, stage.there):
            outputs = [x_0]
        noise = None
        if weights.noise > 0.0:
            noise = self._noise(x_0, generator) if variance_noise is None else variance_noise.to(x_0)
        return self._end(multistep_update(x, outputs, weights, noise), x_0, sample, i, return_dict)
