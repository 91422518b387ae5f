"""Consistency models: a network that jumps from any point of a probability-flow trajectory to its beginning.

In coordinates y = x / alpha = x_0 + sigma z, a trajectory is dy / dsigma = eps(y, sigma); f(y, sigma) is its point at sigma_min. The
objectives hold f at two neighbouring levels of one trajectory together; f at the lowest level is the identity by its parameterization.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...processes import Parameterization
from ..random import Generators, normal, uniform
from .base import ObjectiveOutput

Network = Callable[[Tensor, Tensor, Any], Tensor]

DENSITIES = ("log_normal", "uniform")
PAIR_WEIGHTINGS = ("inverse_step", "uniform")


def karras_levels(count: int, low: float, high: float, rho: float = 7.0) -> Tensor:
    """`count` noise levels sigma from `low` to `high`, ascending, float64 (Karras et al. 2022, eq. 5)."""
    share = torch.linspace(0, 1, count, dtype=torch.float64)
    return (low ** (1 / rho) + share * (high ** (1 / rho) - low ** (1 / rho))) ** rho


def discretization(progress: float, start: int = 10, end: int = 1280) -> int:
    """How many intervals there are at a fraction of the training: doubled at equal times from `start` to `end`.

    References: Song & Dhariwal 2023, section 3.4, https://arxiv.org/abs/2310.14189
    """
    doublings = math.floor(math.log2(end / start)) + 1
    return min(start * 2 ** math.floor(min(max(progress, 0.0), 1.0 - 1e-9) * doublings), end)


def pseudo_huber(difference: Tensor, c: float | None = None) -> Tensor:
    """sqrt(|d|^2 + c^2) - c over the event, (B,); c = 0.00054 sqrt(D) by default (Song & Dhariwal 2023, eq. 8 and section 3.3)."""
    flat = difference.flatten(1)
    c = 0.00054 * math.sqrt(flat.shape[1]) if c is None else c
    return (flat.square().sum(1) + c**2).sqrt() - c


def predict_at(network: Network, p: Parameterization, y: Tensor, sigma: Tensor, condition: Any) -> tuple[Tensor, Tensor]:
    """(x_0, eps) of any network at y = x_0 + sigma z (B, *event), levels sigma (B,) float64. For a consistency network x_0 is f."""
    t = p.path.t_from_lambda(-sigma.log())
    alpha = p.path.alpha(t)
    x = y * _expand(alpha.to(y.dtype), y)
    output = network(p.scale_model_input(x, t), p.network_time(t).to(y.dtype), condition)
    return p.denoise(output.to(torch.promote_types(output.dtype, torch.float32)), x, t)


def same_dropout(device: torch.device) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """A context in which networks draw the dropout that they draw from now on: for two passes that must have the same."""
    devices = [device] if device.type == "cuda" else []
    states = torch.get_rng_state(), [torch.cuda.get_rng_state(one) for one in devices]

    @contextlib.contextmanager
    def replay() -> Iterator[None]:
        with torch.random.fork_rng(devices=devices):
            torch.set_rng_state(states[0])
            for one, state in zip(devices, states[1], strict=True):
                torch.cuda.set_rng_state(state, one)
            yield

    return replay


@dataclass(frozen=True)
class _Pairs:
    """Pairs of neighbouring levels, and the distance between what f says at them.

    Attributes:
        parameterization: of the network that learns: prediction "consistency".
        start, end: intervals at the beginning and at the end of the training.
        density: which pairs: "log_normal", log sigma about N(p_mean, p_std^2) (Song & Dhariwal 2023, eq. 10), or "uniform" over the
            intervals (Song et al. 2023, algorithms 2 and 3).
        p_mean, p_std: of the log-normal density.
        weighting: of a pair: "inverse_step", 1 / (sigma - sigma') (Song & Dhariwal 2023, section 3.5), or "uniform", 1 (Song et al. 2023).
        huber: c of the pseudo-Huber distance; 0.00054 sqrt(D) by default.
    """

    parameterization: Parameterization
    start: int = 10
    end: int = 1280
    p_mean: float = -1.1
    p_std: float = 2.0
    huber: float | None = None
    density: str = "log_normal"
    weighting: str = "inverse_step"

    def __post_init__(self) -> None:
        if self.parameterization.prediction != "consistency":
            raise ValueError(
                f"{type(self).__name__}: the network that learns has prediction 'consistency', not {self.parameterization.prediction!r}."
            )
        if not 1 < self.start <= self.end:
            raise ValueError(f"{type(self).__name__}: start {self.start} and end {self.end}; give 1 < start <= end intervals.")
        for name, known in (("density", DENSITIES), ("weighting", PAIR_WEIGHTINGS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{type(self).__name__}: {name} {getattr(self, name)!r} is none of {', '.join(known)}.")

    def levels(self, progress: float) -> Tensor:
        """The noise levels at a fraction of the training, ascending, float64."""
        low, high = self.parameterization.trained_lambda_range
        return karras_levels(discretization(progress, self.start, self.end) + 1, math.exp(-high), math.exp(-low))

    def weights(self, levels: Tensor) -> Tensor:
        """The probability of each interval, (number of intervals,)."""
        if self.density == "uniform":
            return torch.full_like(levels[1:], 1 / (len(levels) - 1))
        place = torch.erf((levels.log() - self.p_mean) / (math.sqrt(2) * self.p_std))
        return place.diff() / (place[-1] - place[0])

    def pairs(self, batch: int, progress: float, generator: Generators, device: Any) -> tuple[Tensor, Tensor]:
        """(lower, upper) levels of each sample, (B,) float64."""
        levels = self.levels(progress).to(device)
        draws = uniform((batch, 1), generator, device)[:, 0].double()
        index = torch.searchsorted(self.weights(levels).cumsum(0), draws).clamp(max=len(levels) - 2)
        return levels[index], levels[index + 1]

    def compare(
        self, network: Network, target: Network, upper: tuple[Tensor, Tensor], lower: tuple[Tensor, Tensor], condition: Any
    ) -> ObjectiveOutput:
        """w d(f(y, sigma), f'(y', sigma')), (B,); no gradient flows through the lower point, whose dropout is the upper one's."""
        p = self.parameterization.with_(clip_sample=False, thresholding=False)  # a clipped value has no gradient
        replay = same_dropout(upper[0].device)
        f, _ = predict_at(network, p, *upper, condition)
        with torch.no_grad(), replay():
            aim, _ = predict_at(target, p, *lower, condition)
        distance = pseudo_huber(f - aim, self.huber)
        step = (upper[1] - lower[1]).to(distance.dtype)
        return ObjectiveOutput(distance / step if self.weighting == "inverse_step" else distance, {"distance": distance.detach()})


@dataclass(frozen=True)
class ConsistencyTraining(_Pairs):
    """Improved consistency training: both points of a pair are one picture with one noise, so that no teacher is needed.

    References: Song & Dhariwal 2023, https://arxiv.org/abs/2310.14189 (section 3 and table 1); Song et al. 2023, algorithm 3
    """

    def __call__(
        self, model: Network, x_0: Tensor, *, progress: float, condition: Any = None, generator: Generators = None
    ) -> ObjectiveOutput:
        """Losses (B,).

        Args:
            model: (network's input, network's time (B,), condition) -> raw output.
            x_0: clean data (B, *event).
            progress: the fraction of the training that is done, which sets the number of levels.
        """
        lower, upper = self.pairs(len(x_0), progress, generator, x_0.device)
        noise = normal(x_0.shape, generator, x_0.device)
        points = [(x_0 + _expand(sigma.to(x_0.dtype), x_0) * noise, sigma) for sigma in (upper, lower)]
        return self.compare(model, model, *points, condition)


@dataclass(frozen=True)
class ConsistencyDistillation(_Pairs):
    """The lower point is where a teacher's probability flow leads from the upper one.

    Attributes:
        teacher_parameterization: what the teacher predicts: any prediction, on any path that covers the levels.
        solver: of the teacher's step: "heun" or "euler".

    References: Song et al. 2023, algorithm 2, https://arxiv.org/abs/2303.01469
    """

    teacher_parameterization: Parameterization | None = None
    solver: str = "heun"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher_parameterization is None or not self.teacher_parameterization.has_path:
            raise ValueError("ConsistencyDistillation: give teacher_parameterization, of a network that denoises.")
        if self.solver not in ("heun", "euler"):
            raise ValueError(f"ConsistencyDistillation: solver {self.solver!r} is none of heun, euler.")

    def __call__(
        self,
        model: Network,
        x_0: Tensor,
        *,
        teacher: Network,
        progress: float = 1.0,
        target: Network | None = None,
        condition: Any = None,
        generator: Generators = None,
    ) -> ObjectiveOutput:
        """Losses (B,).

        Args:
            model, x_0, progress: as in `ConsistencyTraining`.
            teacher: the network that is distilled, called like `model`; guidance is inside it.
            target: a moving average of `model`, for the lower point; `model` itself by default.
        """
        lower, upper = self.pairs(len(x_0), progress, generator, x_0.device)
        y = x_0 + _expand(upper.to(x_0.dtype), x_0) * normal(x_0.shape, generator, x_0.device)
        before = self.step(teacher, y, upper, lower, condition)
        return self.compare(model, target or model, (y, upper), (before, lower), condition)

    @torch.no_grad()
    def step(self, teacher: Network, y: Tensor, upper: Tensor, lower: Tensor, condition: Any = None) -> Tensor:
        """The teacher's flow from levels `upper` to `lower`, (B, *event)."""
        width = _expand((lower - upper).to(y.dtype), y)
        _, first = predict_at(teacher, self.teacher_parameterization, y, upper, condition)
        there = y + width * first
        if self.solver == "euler":
            return there
        _, second = predict_at(teacher, self.teacher_parameterization, there, lower, condition)
        return y + width * (first + second) / 2


def _expand(value: Tensor, like: Tensor) -> Tensor:
    return value.reshape(len(value), *[1] * (like.ndim - 1)).to(like.device)
