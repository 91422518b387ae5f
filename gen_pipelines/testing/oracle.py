"""Data whose ideal network is known in closed form, whatever the network predicts: what a sampler should draw is then known too.

An oracle gives E[x_0 | x] at any level of a Gaussian path. The rest follows: the ideal network of every `Parameterization`, the data's mean
and covariance, and for Gaussian data the probability-flow ODE's solution point by point.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..processes.level import DATA, Level
from ..processes.parameterization import Parameterization

__all__ = ["GaussianOracle", "MixtureOracle", "Oracle", "native_time", "sample"]

Network = Callable[[Tensor, Tensor | float], Tensor]


def native_time(p: Parameterization, network_time: Tensor | float) -> float:
    """The path's native time of what a network is given, moved into the path's range: a network can be called with any number."""
    try:
        t = float(p.path_time(float(network_time)))
    except (OverflowError, ValueError):  # log(sigma)/4 = 999: a scheduler that takes this network for one with an index
        t = p.path.t_max
    t = p.path.t_max if math.isnan(t) else t
    return min(max(t, p.path.t_min), p.path.t_max)


class _Node(NamedTuple):
    """A network's conversions at one time: its level, c_in, and the output as a x_0 + b eps."""

    level: Level
    input_scale: float
    from_x_0: float
    from_eps: float


@lru_cache(maxsize=1 << 16)
def _node(p: Parameterization, network_time: float) -> _Node:
    t = native_time(p, network_time)
    level = p.path.level(t)
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    level = Level(level.alpha, max(level.sigma, 1e-12))
    if p.prediction == "consistency" and level.ratio <= p.boundary_sigma * (1 + 1e-9):
        return _Node(level, p.input_scale(level), 1.0, 0.0)  # the identity there, whatever the output
    return _Node(level, p.input_scale(level), float(p.target(one, zero, t)), float(p.target(zero, one, t)))


def _answer(p: Parameterization, estimate: Callable[[Tensor, Level], Tensor]) -> Network:
    """The network of a parameterization that predicts `estimate(x, level)` for x_0."""

    def predict(scaled: Tensor, network_time: Tensor | float) -> Tensor:
        level, input_scale, from_x_0, from_eps = _node(p, float(network_time))
        x = scaled if scaled.dtype in (torch.float32, torch.float64) else scaled.float()
        x = x if input_scale == 1.0 else x / input_scale
        x_0 = estimate(x, level)
        eps = (x - level.alpha * x_0) / level.sigma
        return torch.add(from_x_0 * x_0, eps, alpha=from_eps)

    return predict


class Oracle:
    """What the two oracles share: networks made of the posterior mean."""

    def draw(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """`count` points of the data, float64."""
        raise NotImplementedError

    def moments(self) -> tuple[Tensor, Tensor]:
        """(mean (D,), covariance (D, D)) of the data, float64; D is 1 for data without an event dimension."""
        raise NotImplementedError

    def x_0(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """E[x_0 | x] at x = alpha x_0 + sigma eps, the shape of x."""
        raise NotImplementedError

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one point: () or (D,)."""
        raise NotImplementedError

    def network(self, p: Parameterization) -> Network:
        """The ideal network of a parameterization: (scaled input, network time) -> output, any dtype in, float32 or better out."""
        return _answer(p, lambda x, level: self.x_0(x, *level))


class GaussianOracle(Oracle):
    """x_0 ~ N(mean, covariance).

    Args:
        mean: a number, or D numbers.
        std: a standard deviation, or D of them; not with `covariance`.
        covariance: (D, D), symmetric and positive.

    With a number for both, every coordinate of any event shape is an independent copy; with D numbers the last dimension is the event. The
    posterior mean and the flow of the ODE are linear: in the covariance's own axes

        E[x_0 | x] = m + alpha s^2 (x - alpha m) / (alpha^2 s^2 + sigma^2),

    and the ODE keeps (x - alpha m) / sqrt(alpha^2 s^2 + sigma^2) (Karras et al. 2022, appendix B.3, https://arxiv.org/abs/2206.00364, at
    alpha = 1).
    """

    def __init__(
        self,
        mean: float | Sequence[float] = 0.5,
        std: float | Sequence[float] | None = None,
        covariance: Sequence[Sequence[float]] | Tensor | None = None,
    ) -> None:
        if std is not None and covariance is not None:
            raise ValueError("GaussianOracle: std and covariance are both given; give one.")
        wide = lambda v: torch.as_tensor(v, dtype=torch.float64)
        m = wide(mean)
        self._axes: Tensor | None = None
        if covariance is not None:
            c = wide(covariance)
            if c.ndim != 2 or c.shape[0] != c.shape[1] or not torch.allclose(c, c.mT):
                raise ValueError(f"GaussianOracle: covariance has shape {tuple(c.shape)}; give a symmetric (D, D).")
            values, self._axes = torch.linalg.eigh(c)
            if float(values[0]) < 0:
                raise ValueError(f"GaussianOracle: covariance has the eigenvalue {float(values[0]):g}; all must be 0 or more.")
            s = values.clamp_min(0).sqrt()
        else:
            s = wide(0.3 if std is None else std)
        if m.ndim != s.ndim and s.ndim:
            m = m.expand(s.shape)
        if m.ndim > 1 or (s.ndim and s.shape != m.shape) or bool((s < 0).any()):
            raise ValueError(
                f"GaussianOracle: mean has shape {tuple(m.shape)} and the spread {tuple(s.shape)}; give D numbers or one of each, "
                "and no spread below 0."
            )
        s = s.expand(m.shape)
        self.mean, self.std = (float(v) if v.ndim == 0 else v for v in (m, s))
        self._m = m if self._axes is None else m @ self._axes  # in the covariance's own axes
        self._s = s

    @property
    def event_shape(self) -> tuple[int, ...]:
        """() for a number, else (D,)."""
        return tuple(self._m.shape)

    def _into(self, x: Tensor) -> Tensor:
        return x if self._axes is None else x @ self._axes.to(x)

    def _out(self, y: Tensor) -> Tensor:
        return y if self._axes is None else y @ self._axes.mT.to(y)

    def draw(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """`count` points of the data, (count, *event_shape), float64."""
        noise = torch.randn((count, *self.event_shape), generator=generator, dtype=torch.float64)
        return self._out(self._m + self._s * noise)

    def moments(self) -> tuple[Tensor, Tensor]:
        """(mean (D,), covariance (D, D)), float64."""
        m, s = self._m.reshape(-1), self._s.reshape(-1)
        axes = torch.eye(len(m), dtype=torch.float64) if self._axes is None else self._axes
        return axes @ m, axes @ torch.diag(s**2) @ axes.mT

    def x_0(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """E[x_0 | x] at x = alpha x_0 + sigma eps, the shape of x."""
        if not self.event_shape:
            gain = alpha * self.std**2 / max((alpha * self.std) ** 2 + sigma**2, 1e-300)
            return self.mean + gain * (x - alpha * self.mean)
        y, m, s = self._into(x), self._m.to(x), self._s.to(x)
        variance = (alpha * s) ** 2 + sigma**2
        return self._out(m + alpha * s**2 / variance.clamp_min(1e-300 if x.dtype == torch.float64 else 1e-30) * (y - alpha * m))

    def log_density(self, x: Tensor, alpha: float = 1.0, sigma: float = 0.0) -> Tensor:
        """log p(x) at a level, in nats: x's shape without the event dimension."""
        y, m = self._into(x), self._m.to(x)
        std = ((alpha * self._s.to(x)) ** 2 + sigma**2).sqrt()
        each = -0.5 * ((y - alpha * m) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)
        return each.sum(-1) if self.event_shape else each

    def ode(self, x: Tensor, here: Level, there: Level) -> Tensor:
        """The probability-flow ODE's solution at `there` from `x` at `here`: quantiles are kept."""
        if not self.event_shape:
            before, after = (math.hypot(level.alpha * self.std, level.sigma) for level in (here, there))
            return there.alpha * self.mean + (x - here.alpha * self.mean) * (after / before)
        y, m, s = self._into(x), self._m.to(x), self._s.to(x)
        before, after = (((level.alpha * s) ** 2 + level.sigma**2).sqrt() for level in (here, there))
        return self._out(there.alpha * m + (y - here.alpha * m) * (after / before))

    def consistency_network(self, p: Parameterization) -> Network:
        """The ideal consistency network: x_0 is where the ODE's curve through x ends, at the boundary level of a `consistency` prediction
        and in data for any other (a network that was distilled to jump there)."""
        end = p.path.level(p.path.t_min) if p.prediction == "consistency" else DATA
        return _answer(p, lambda x, here: self.ode(x, here, end))


class MixtureOracle(Oracle):
    """x_0 is drawn from component k with probability weights[k].

    Args:
        weights: positive; they are divided by their sum.
        components: one `GaussianOracle` each, all of one event shape.

    E[x_0 | x] = sum_k r_k E_k[x_0 | x], with the responsibilities r_k of the components at x's level.
    """

    def __init__(self, weights: Sequence[float], components: Sequence[GaussianOracle]) -> None:
        if not components or len(weights) != len(components) or min(weights) <= 0:
            raise ValueError(f"MixtureOracle: {len(weights)} weights for {len(components)} components; give one above 0 for each.")
        if len({c.event_shape for c in components}) > 1:
            raise ValueError(f"MixtureOracle: the components have the shapes {sorted({c.event_shape for c in components})}; use one.")
        w = torch.tensor([float(v) for v in weights], dtype=torch.float64)
        self.weights, self.components = w / w.sum(), tuple(components)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """() or (D,)."""
        return self.components[0].event_shape

    def draw(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """`count` points of the data, (count, *event_shape), float64."""
        which = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        each = torch.stack([c.draw(count, generator) for c in self.components])
        return each[which, torch.arange(count)]

    def moments(self) -> tuple[Tensor, Tensor]:
        """(mean (D,), covariance (D, D)), float64."""
        means, covariances = (torch.stack(v) for v in zip(*(c.moments() for c in self.components), strict=True))
        mean = self.weights @ means
        away = means - mean
        return mean, torch.einsum("k,kij->ij", self.weights, covariances + away[:, :, None] * away[:, None, :])

    def responsibilities(self, x: Tensor, alpha: float = 1.0, sigma: float = 0.0) -> Tensor:
        """The probability of each component given x at a level: (K, *x's shape without the event dimension)."""
        logs = [c.log_density(x, alpha, sigma) + math.log(w) for c, w in zip(self.components, self.weights.tolist(), strict=True)]
        return torch.softmax(torch.stack(logs), 0)

    def x_0(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """E[x_0 | x] at x = alpha x_0 + sigma eps, the shape of x."""
        r = self.responsibilities(x, alpha, sigma)
        r = r[..., None] if self.event_shape else r
        return (r * torch.stack([c.x_0(x, alpha, sigma) for c in self.components])).sum(0)


def sample(
    scheduler: Any,
    network: Network,
    shape: Sequence[int] = (4096,),
    steps: int | None = 100,
    generator: torch.Generator | None = None,
    x: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    **kwargs: Any,
) -> Tensor:
    """The one loop that serves every scheduler.

    Args:
        scheduler: of this library, or with its interface.
        network: (scaled input, timestep) -> output.
        shape: of the state, where `x` is not given.
        steps: laid with `set_timesteps`; None where that was done.
        generator: of the first noise and of the steps; None is one with seed 0.
        x: the state to start from; None is `init_noise_sigma` times unit noise.
        dtype: of the noise.
        kwargs: arguments of `step`.
    Returns: the last state, the shape of the first.
    """
    if steps is not None:
        scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    if x is None:
        x = torch.randn(tuple(shape), generator=generator, dtype=dtype) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x, generator=generator, **kwargs).prev_sample
    return x
