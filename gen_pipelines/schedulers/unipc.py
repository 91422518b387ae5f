"""UniPC: a multistep predictor and a corrector that needs no evaluation of its own."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..processes.grids import Grid
from ..processes.level import Level
from .base import SchedulerMixin, SchedulerOutput, Stage, owned
from .multistep import NO_MOVE, SHORTEST, MultistepScheduler, Weights, kernel_moments, multistep_update, propagation
from .updates import first_order_update

__all__ = ["UniPCScheduler", "unipc_weights"]


def unipc_weights(
    here: Level, there: Level, earlier: Sequence[Level] = (), corrector: bool = False, bh: str = "bh2", data_form: bool = True
) -> Weights:
    """Coefficients of UniP (predictor) or UniC (corrector) over a step of finite length in lambda.

    With D_i = (m_i - m_0) / r_i at the points r_i (in units of the step, from `here`) the move adds scale * sum_i c_i D_i to the
    first-order one, where sum_i c_i r_i^(k-1) = J_k, the kernel's moments. B(h) enters where one unknown is left: there c = B(h) / 2.

    Args:
        here, there: the ends of the step.
        earlier: levels of earlier estimates, newest first; their number plus one is the order p.
        corrector: UniC, which has the estimate at `there` as well (r = 1); its weight comes first.
        bh: `bh1`, B(h) = h, or `bh2`, B(h) = e^h - 1 (both with the sign that the form has).
        data_form: estimates are x_0 (else eps).
    References: Zhao et al. 2023, https://arxiv.org/abs/2302.04867, theorem 3.1, eqs. 5 to 8, and appendix A.1
    """
    h = there.lambda_ - here.lambda_
    if h < SHORTEST:
        return NO_MOVE
    from_x, scale = propagation(here, there, data_form)
    points = [(level.lambda_ - here.lambda_) / h for level in earlier] + ([1.0] if corrector else [])
    j = kernel_moments(h, 1.0 if data_form else -1.0, len(points) + 1)
    if len(points) == 1:
        c = [0.5 * (h if bh == "bh1" else j[0])]
    elif points:
        c = np.linalg.solve(np.array([[r**k for r in points] for k in range(len(points))]), np.array(j[1:])).tolist()
    else:
        c = []
    weights = [scale * c_i / r for c_i, r in zip(c, points, strict=True)]
    newest = scale * j[0] - sum(weights)
    if corrector:
        return Weights(from_x, (weights[-1], newest, *weights[:-1]))
    return Weights(from_x, (newest, *weights))


class UniPCScheduler(MultistepScheduler, SchedulerMixin):
    """UniPC of order 1 to 3: each evaluation first corrects the step that led to it, then predicts the next.

    The corrector raises the order by one. A step from pure noise or to data, infinitely long in lambda, is of first order and uncorrected.

    Args:
        solver_order: the predictor's order p, 1 to 3; the first steps take what history there is.
        solver_type: `bh1` or `bh2`, the function B(h).
        predict_x0: polynomials of x_0; False takes eps.
        lower_order_final: the last steps are of order ..., 2, 1.
        disable_corrector: positions of steps that are not corrected.
        solver_p: diffusers' other predictor; only None is taken.

    References: Zhao et al. 2023, https://arxiv.org/abs/2302.04867
    """

    solver_defaults: ClassVar[dict[str, Any]] = {
        "solver_order": 2,
        "solver_type": "bh2",
        "predict_x0": True,
        "lower_order_final": True,
        "disable_corrector": [],
        "solver_p": None,
    }

    def _options(self) -> tuple[int, str, bool]:
        """(order, B(h), whether estimates are x_0), checked."""
        order, bh = self.config["solver_order"], self.config["solver_type"]
        bh = "bh2" if bh in ("midpoint", "heun", "logrho") else bh  # configs of other multistep solvers: as diffusers reads them
        if order not in (1, 2, 3):
            raise ValueError(f"{type(self).__name__}: solver_order = {order!r}; use 1, 2 or 3.")
        if bh not in ("bh1", "bh2"):
            raise ValueError(f"{type(self).__name__}: solver_type {bh!r} is not known; use 'bh1' or 'bh2'.")
        if self.config["solver_p"] is not None:
            raise ValueError(f"{type(self).__name__}: solver_p is not supported; leave it None, and the predictor is UniP.")
        return order, bh, bool(self.config["predict_x0"])

    def plan(self, grid: Grid) -> list[Stage]:
        """One stage per node; `data` holds (predictors, correctors of the step that led here), each by order, lowest first."""
        stages = super().plan(grid)
        order, bh, data_form = self._options()
        n, correctors = len(stages), []
        for i, stage in enumerate(stages):
            here, there = stage.here, stage.there
            if here.alpha == 0.0 or there.sigma == 0.0:
                stage.data, correctors = ([], correctors), []
                continue
            most = min(order, n - i) if self.config["lower_order_final"] else order
            earlier = [s.here for s in stages[max(0, i - most + 1) : i][::-1] if s.here.alpha > 0.0]
            orders = range(min(most, len(earlier) + 1))
            stage.data = ([unipc_weights(here, there, earlier[:k], False, bh, data_form) for k in orders], correctors)
            wanted = i not in (self.config["disable_corrector"] or ())
            correctors = [unipc_weights(here, there, earlier[:k], True, bh, data_form) for k in orders] if wanted else []
        self._order, self._keeps_x_0 = order, data_form
        return stages

    def reset(self) -> None:
        """Forget the estimates and the state of earlier steps."""
        super().reset()
        self._before: tuple[Tensor, int] | None = None  # the state that the last step began with, and its order

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
        stage = self._stages[i]
        predictors, correctors = stage.data
        if self._keeps_x_0:
            out, x, _ = self._split(model_output, sample)
            newest = x_0 = self._x_0(out, x, i)
        else:
            x_0, newest = self._predict(model_output, sample, i)
            x = sample.to(x_0.dtype)
        newest = owned(newest, model_output)
        if self._before is not None and correctors:
            before, order = self._before
            x = multistep_update(before, [newest, *self._history], correctors[order - 1])
        outputs = [newest, *self._history]
        if not predictors:
            prev = owned(x_0, model_output) if stage.there.sigma == 0.0 else first_order_update(x_0, self._eps(x, x_0, stage), stage.there)
            self._before = None
        else:
            order = min(len(outputs), len(predictors))
            prev = multistep_update(x, outputs, predictors[order - 1])
            self._before = (owned(x, sample), order)
        self._history = outputs[: self._order]
        return self._end(prev, x_0, sample, i, return_dict)

    @staticmethod
    def _eps(x: Tensor, x_0: Tensor, stage: Stage) -> Tensor:
        return (x - stage.here.alpha * x_0) / stage.here.sigma
