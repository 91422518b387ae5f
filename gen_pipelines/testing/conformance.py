"""Is a scheduler right on every kind of network? One call answers.

    report = check_scheduler(MyScheduler)
    print(report)
    report.raise_for_failures()

Each check is a comparison with something that is known: the data's moments, the ODE's solution, a closed form.
"""

import inspect
import math
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..processes.cosine import CosinePath
from ..processes.level import DATA
from ..processes.linear import LinearPath
from ..processes.parameterization import Parameterization
from .linear import LinearLoop, NotLinearError, PlannedNoise, propagate
from .networks import CONSISTENCY_NETWORKS, GRIDS, NETWORKS, OTHER_NETWORKS, SEVEN, Network, diffusers_scheduler, grids_for
from .oracle import GaussianOracle, MixtureOracle, Oracle, native_time
from .report import Report, Row

__all__ = ["CHECKS", "GAUSSIAN", "MIXTURE", "PROMISES", "Promise", "check_scheduler", "check_schedulers", "moment_errors"]

CHECKS = ("moments", "mixture", "grids", "marginals", "order", "points", "round trip", "grid", "save and load", "refusals")

# two dimensions that depend on each other, and three clusters of different sizes
GAUSSIAN = GaussianOracle(mean=(0.5, -0.3), covariance=((0.09, 0.05), (0.05, 0.16)))
MIXTURE = MixtureOracle(
    (0.5, 0.3, 0.2),
    (
        GaussianOracle((0.6, 0.4), (0.15, 0.2)),
        GaussianOracle((-0.5, 0.5), covariance=((0.04, 0.015), (0.015, 0.03))),
        GaussianOracle((0.1, -0.6), 0.12 * torch.ones(2)),
    ),
)
_LINE = GaussianOracle(mean=0.5, std=0.3)  # for what is exact in one dimension

# networks whose time is a binary fraction on the grid of `_smooth_times`, so that float32 timesteps cost nothing
_ORDER_NETWORKS = {
    "flow": Parameterization(LinearPath(), "flow_prediction", time_input="t"),
    "cosine": Parameterization(CosinePath(), "v_prediction", time_input="t"),
}


@dataclass(frozen=True)
class Promise:
    """What a scheduler promises, and is held to. A class may carry one as its attribute `promise`.

    Args:
        kind: `sampler`; `consistency`, a rule for networks that jump to data, judged on those alone; `inverse`, from data to noise.
        steps: how many steps it wants for the accuracy below.
        order: of convergence: to the ODE's solution, or of mean and variance (weak) where it draws noise. None: at least 1.
        order_options: arguments of the constructor to show it (no lower order at the end).
        order_counts: the two numbers of steps between which it is measured.
        exact_for_points: whether the step is exact where the network's x_0 is constant, as it is for data that is one point.
        mean, spread: how far the samples' mean, and the square root of their covariance, may be from the truth.
    """

    kind: Literal["sampler", "consistency", "inverse"] = "sampler"
    steps: int = 100
    order: float | None = None
    order_options: dict[str, Any] = field(default_factory=dict)
    order_counts: tuple[int, int] = (64, 128)
    exact_for_points: bool = False
    mean: float = 0.02
    spread: float = 0.035


_FULL_ORDER = {"lower_order_final": False}
PROMISES: dict[str, Promise] = {
    "DDPMScheduler": Promise(order=1, exact_for_points=True),
    "DDIMScheduler": Promise(order=1, exact_for_points=True),
    "EulerScheduler": Promise(order=1, exact_for_points=True),
    "EulerAncestralScheduler": Promise(order=1, exact_for_points=True),
    "HeunScheduler": Promise(order=2, exact_for_points=True),
    "DPMSolverMultistepScheduler": Promise(order=2, order_options=_FULL_ORDER, exact_for_points=True),
    "UniPCScheduler": Promise(
        order=3, order_options={**_FULL_ORDER, "disable_corrector": [0]}, order_counts=(256, 512), exact_for_points=True
    ),  # of order 2 with a corrector, which adds one
    "FlowMatchEulerScheduler": Promise(order=1, exact_for_points=True),
    "FlowMatchHeunScheduler": Promise(order=2, exact_for_points=True),
    "RectifiedFlowScheduler": Promise(order=1, exact_for_points=True),
    "ScoreSDEScheduler": Promise(order=1, steps=400),
    "ConsistencyScheduler": Promise(kind="consistency", mean=0.03),
    "DDIMInverseScheduler": Promise(kind="inverse"),
}
_HOSTED_PROMISE = Promise(mean=0.04, spread=0.05)


# ---------------------------------------------------------------------------------------------------------------------------- the subject


@dataclass(frozen=True)
class _Subject:
    """A scheduler class under test, and how it is put on a network."""

    make: Callable[..., Any]
    name: str
    promise: Promise
    native: bool  # a class of diffusers as it is: it gets the network's scheduler config, which is all that a swap there has
    samples: int

    def on(self, name: str, network: Network, grid: dict[str, Any] | None = None, **options: Any) -> Any:
        if self.native:
            return self.make.from_config(diffusers_scheduler(name).config, **(grid or {}), **options)
        scheduler = self.make(**options)
        own = {k: v for k, v in network.grid.items() if k == "rule"}
        if own and "rule" in getattr(scheduler, "config", {}):
            scheduler = self.make(**own, **options)
        return scheduler.bind(network.parameterization, {**{k: v for k, v in network.grid.items() if k != "rule"}, **(grid or {})})

    def takes(self, grid: dict[str, Any]) -> bool:
        """Whether a class of diffusers knows the keys of a grid."""
        return not self.native or set(grid) <= set(inspect.signature(self.make.__init__).parameters)


def _is_ours(scheduler: Any) -> bool:
    return hasattr(scheduler, "bind") and hasattr(scheduler, "parameterization")


def _subject(scheduler: Any, name: str | None, promise: Promise | None, hosted: bool, samples: int) -> _Subject:
    if not callable(scheduler):
        raise TypeError(
            f"check_scheduler: got a {type(scheduler).__name__} object; give its class, or a function that returns a new one for the "
            "keyword arguments of its constructor."
        )
    if hosted:
        from ..schedulers.bridge import BridgedScheduler

        cls = scheduler
        name = name or f"{cls.__name__}, hosted"
        promise = promise or _HOSTED_PROMISE

        def scheduler(**options: Any) -> Any:  # told a network, or it would need one in its own config
            return BridgedScheduler(cls(**options), NETWORKS["ddpm_eps"].parameterization)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = scheduler()
    native = not _is_ours(made)
    if native and not (isinstance(scheduler, type) and hasattr(scheduler, "from_config")):
        raise TypeError(
            f"check_scheduler: {name or getattr(scheduler, '__name__', scheduler)} is neither a scheduler of this library's interface "
            "(with bind and parameterization: see GaussianScheduler) nor a scheduler class of diffusers."
        )
    kind = type(made).__name__
    promise = promise or getattr(type(made), "promise", None) or (Promise() if native else PROMISES.get(kind, Promise()))
    return _Subject(scheduler, name or getattr(scheduler, "__name__", kind), promise, native, samples)


def _states(scheduler: Any, network: Callable[..., Tensor], x: Tensor, generator: torch.Generator | None = None) -> list[Tensor]:
    """The state before each network evaluation and the last one. Classes of diffusers get all the scaling that they offer."""
    takes = inspect.signature(scheduler.step).parameters
    options = {"generator": generator} if "generator" in takes and generator is not None else {}
    scale = getattr(scheduler, "scale_model_input", None)
    states = [x]
    for t in scheduler.timesteps:
        out = network(x if scale is None else scale(x, t), t)
        x = scheduler.step(out, t, x, return_dict=False, **options)[0]
        states.append(x)
    return states


def _start(scheduler: Any) -> float:
    return float(getattr(scheduler, "init_noise_sigma", 1.0))


def moment_errors(x: Tensor, oracle: Oracle) -> dict[str, float]:
    """How far samples are from an oracle's moments.

    Args:
        x: (N, ..., D), or (N,) for an oracle without an event dimension.
        oracle: the truth.
    Returns: `mean`, the largest difference of a coordinate; `spread`, the largest singular value of the difference of the square roots of
        the covariances (in one dimension, of the standard deviations).
    """
    mean, covariance = oracle.moments()
    flat = x.double().reshape(-1, len(mean))
    if not bool(torch.isfinite(flat).all()):
        return {"mean": math.nan, "spread": math.nan}
    found = torch.cov(flat.T, correction=0).reshape(len(mean), len(mean))
    return {
        "mean": float((flat.mean(0) - mean).abs().max()),
        "spread": float(torch.linalg.matrix_norm(_root(found) - _root(covariance), 2)),
    }


def _root(covariance: Tensor) -> Tensor:
    values, axes = torch.linalg.eigh(covariance)
    return axes @ torch.diag(values.clamp_min(0).sqrt()) @ axes.mT


# --------------------------------------------------------------------------------------------------------------------------- the checks
# each: (subject, name of the network, network, what to ask of the grid) -> (measured, allowed); it raises for a failure without a number

Measured = tuple[dict[str, float], dict[str, float]]


class _SkipError(Exception):
    """Not judged: the message says why."""


class _WrongError(Exception):
    """A failure that has no number."""


def _within(promise: Promise) -> dict[str, float]:
    return {"mean": promise.mean, "spread": promise.spread}


def _drawn(subject: _Subject, scheduler: Any, network: Callable[..., Tensor]) -> tuple[Tensor, bool]:
    """(samples, whether noise was drawn on the way)."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(max(2, subject.samples // 2), 2, generator=generator, dtype=torch.float64)
    z = torch.cat([z, -z])
    z = z @ torch.linalg.inv(_root(z.T @ z / len(z)))  # mean 0 and covariance 1 as they stand: what is left is the scheduler's own
    with PlannedNoise() as noise:
        return _states(scheduler, network, z[:, None, None, :] * _start(scheduler), generator)[-1], noise.count > 0


def _begins_early(scheduler: Any, p: Parameterization) -> bool:
    """Whether the grid leaves out the noisiest tenth of a discrete path, as the leading ones of diffusers' DPM-Solver and UniPC do: unit
    noise is not the marginal there."""
    path, first = p.path, native_time(p, scheduler.timesteps[0])
    return path.name == "discrete_vp" and 0.85 * path.t_max < first < 0.97 * path.t_max


def _arrival(oracle: GaussianOracle, scheduler: Any, p: Parameterization) -> GaussianOracle:
    """The distribution at which the exact ODE arrives from the scheduler's first noise."""
    here, axes = p.path.level(native_time(p, scheduler.timesteps[0])), torch.eye(2, dtype=torch.float64)
    ends = oracle.ode(torch.cat([0 * axes[:1], axes]) * _start(scheduler), here, DATA)
    linear = ends[1:] - ends[0]
    return GaussianOracle(ends[0].tolist(), covariance=linear.mT @ linear)


def _moments(subject: _Subject, name: str, network: Network, grid: dict[str, Any], steps: int | None = None) -> Measured:
    """Samples have the data's mean and covariance."""
    p = network.parameterization
    scheduler = subject.on(name, network, grid)
    scheduler.set_timesteps(steps or subject.promise.steps)
    consistent = subject.promise.kind == "consistency"
    x, noisy = _drawn(subject, scheduler, GAUSSIAN.consistency_network(p) if consistent else GAUSSIAN.network(p))
    early = not subject.native and not noisy and _begins_early(scheduler, p)
    return moment_errors(x, _arrival(GAUSSIAN, scheduler, p) if early else GAUSSIAN), _within(subject.promise)


def _mixture(subject: _Subject, name: str, network: Network, grid: dict[str, Any]) -> Measured:
    """The same for a mixture, whose ideal network is not linear; and each component has its share of the samples."""
    p = network.parameterization
    scheduler = subject.on(name, network, {**grid, **({"timestep_spacing": "trailing"} if p.path.name == "discrete_vp" else {})})
    scheduler.set_timesteps(subject.promise.steps)
    x, noisy = _drawn(subject, scheduler, MIXTURE.network(p))
    errors = moment_errors(x, MIXTURE)
    share = MIXTURE.responsibilities(x.reshape(-1, 2)).mean(1)
    errors["shares"] = float((share - MIXTURE.weights).abs().max())
    allowed = {**_within(subject.promise), "shares": 0.02}
    if noisy:  # which component a sample ends in is then a draw: four standard errors of the count, and of the mean that it moves
        counting = 4 * (MIXTURE.weights * (1 - MIXTURE.weights) / len(x)).sqrt()
        covariance = MIXTURE.moments()[1]
        allowed["shares"] += float(counting.max())
        allowed["mean"] += 4 * float((torch.diagonal(covariance).max() / len(x)).sqrt())
    return errors, allowed


def _linear(scheduler: Any, network: Callable[..., Tensor]) -> LinearLoop:
    try:
        return propagate(lambda x: _states(scheduler, network, x), expect=len(scheduler.timesteps))
    except NotLinearError as error:
        raise _SkipError(f"not an affine map: {error}") from error


def _grids(subject: _Subject, name: str, network: Network, grid: dict[str, Any]) -> Measured:
    """Exact mean and standard deviation at the end of the loop, on other grids than the usual one."""
    scheduler, p = subject.on(name, network, grid), network.parameterization
    respaced = any(key.startswith("use_") for key in grid)  # between the ends of sigma, 4096 for pure noise: they want more
    scheduler.set_timesteps(subject.promise.steps * (2 if respaced else 1))
    loop = _linear(scheduler, _LINE.network(p))
    mean, std = (float(v[-1]) for v in loop.moments(0.0, _start(scheduler) ** 2))
    m, s = _LINE.mean, _LINE.std
    if not subject.native and loop.draws == 0 and _begins_early(scheduler, p):
        here = p.path.level(native_time(p, scheduler.timesteps[0]))
        zero, one = (float(_LINE.ode(torch.tensor(v, dtype=torch.float64), here, DATA)) for v in (0.0, 1.0))
        m, s = zero, one - zero
    return {"mean": abs(mean - m), "spread": abs(std - s)}, _within(subject.promise)


def _marginals(subject: _Subject, name: str, network: Network, grid: dict[str, Any]) -> Measured:
    """Exact mean and standard deviation of every state on the way, from the marginal at the first, against the path's own."""
    scheduler, p = subject.on(name, network, grid), network.parameterization
    scheduler.set_timesteps(subject.promise.steps)
    loop = _linear(scheduler, _LINE.network(p))
    levels = [p.path.level(native_time(p, t)) for t in scheduler.timesteps] + [DATA]
    means = torch.tensor([level.alpha * _LINE.mean for level in levels], dtype=torch.float64)
    stds = torch.tensor([math.hypot(level.alpha * _LINE.std, level.sigma) for level in levels], dtype=torch.float64)
    mean, std = loop.moments(float(means[0]), float(stds[0]) ** 2)
    unit = stds.clamp_min(1.0)
    errors = {"mean": float(((mean - means) / unit).abs().max()), "spread": float(((std - stds) / unit).abs().max())}
    return errors, _within(subject.promise)


def _smooth_times(p: Parameterization, n: int) -> list[float]:
    """n + 1 times from 1/2 to 1/4, uneven and smooth, all binary fractions for n a power of two."""
    return [float(p.network_time(0.25 + (u + u * u) / 8)) for u in (1 - i / n for i in range(n + 1))]


def _order(subject: _Subject, name: str, network: Network, grid: dict[str, Any]) -> Measured:
    """The slope of log error against log steps between two levels inside the path: of the distance from the ODE's solution where no noise
    is drawn, of mean and standard deviation where it is."""
    p, promise = network.parameterization, subject.promise
    exact, errors = _LINE.network(p), []
    warm = math.ceil(promise.order or 1)
    x = torch.randn(50, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for n in promise.order_counts:
        scheduler = subject.on(name, network, grid, **promise.order_options)
        scheduler.set_timesteps(timesteps=_smooth_times(p, n))
        per_node = int(getattr(scheduler, "order", 1))
        level = lambda i: p.path.level(native_time(p, scheduler.timesteps[i]))  # noqa: B023
        last, begin = n * per_node, level(0)

        def run(start: Tensor, corrected: bool) -> list[Tensor]:
            states, state = [start], start
            for i, t in enumerate(scheduler.timesteps[:last]):  # noqa: B023
                if corrected and i % per_node == 0 and i // per_node < warm:  # noqa: B023
                    state = _LINE.ode(start, begin, level(i))  # noqa: B023
                t_in = scheduler.scale_model_input(state, t)  # noqa: B023
                state = scheduler.step(exact(t_in, t), t, state).prev_sample  # noqa: B023
                states.append(state)
            return states

        with PlannedNoise() as noise:
            end = run(begin.sigma * x, True)[-1]
        if noise.count == 0:
            errors.append(float((end - _LINE.ode(begin.sigma * x, begin, level(last))).abs().max()))
            continue
        try:
            loop = propagate(lambda start: run(start, False), expect=noise.count)
        except NotLinearError as error:
            raise _SkipError(f"not an affine map: {error}") from error
        here, there = begin, level(last)
        marginal = lambda at: (at.alpha * _LINE.mean, math.hypot(at.alpha * _LINE.std, at.sigma))
        mean, std = (float(v[-1]) for v in loop.moments(marginal(here)[0], marginal(here)[1] ** 2))
        errors.append(math.hypot(mean - marginal(there)[0], std - marginal(there)[1]))
    if max(errors) < 1e-11:
        return {"error": max(errors)}, {"error": 1e-11}
    found = math.log2(errors[0] / errors[1]) if min(errors) > 0 else math.inf
    off = max(0.0, 1 - found) if promise.order is None else abs(found - promise.order)
    return {"order": found, "off": off, "error": errors[-1]}, {"off": 0.15}


def _points(subject: _Subject, name: str, network: Network, grid: dict[str, Any]) -> Measured:
    """For data that is one point x_0 the ideal network says x_0 whatever it sees; every state is then alpha x_0 + sigma z exactly."""
    if not subject.promise.exact_for_points:
        raise _SkipError("not promised")
    scheduler, p = subject.on(name, network, grid), network.parameterization
    scheduler.set_timesteps(7)
    loop = _linear(scheduler, GaussianOracle(_LINE.mean, 0.0).network(p))
    per_node = int(getattr(scheduler, "order", 1))
    levels = [p.path.level(native_time(p, t)) for t in scheduler.timesteps[::per_node]] + [DATA]
    mean, std = loop.moments(levels[0].alpha * _LINE.mean, levels[0].sigma ** 2)
    mean, std = (torch.cat([v[:-1][::per_node], v[-1:]]) for v in (mean, std))
    errors = [
        max(abs(m - level.alpha * _LINE.mean), abs(s - level.sigma)) / max(1.0, level.sigma)
        for m, s, level in zip(mean.tolist(), std.tolist(), levels, strict=True)
    ]
    replayed = getattr(scheduler, "config", {}).get("timestep_spacing") == "linspace"  # whose levels are interpolated as diffusers does
    return {"error": max(errors)}, {"error": 2e-3 if replayed else 1e-4}  # times are float32


def _round_trip(subject: _Subject, name: str, network: Network, grid: dict[str, Any]) -> Measured:
    """Data taken to the first level by the exact ODE comes back; for a scheduler that goes to noise: DDIM brings back what it encoded, with
    an error that shrinks with the step."""
    p, oracle = network.parameterization, GAUSSIAN
    x_0 = oracle.draw(200, torch.Generator().manual_seed(0))
    if subject.promise.kind == "inverse":
        from ..schedulers.ddim import DDIMScheduler

        errors = []
        grid = {**grid, **({"timestep_spacing": "trailing"} if p.path.name == "discrete_vp" else {})}
        for n in (100, 200):
            inverse, forward = subject.on(name, network, grid), DDIMScheduler().bind(p, {**network.grid, **grid})
            inverse.set_timesteps(n)
            forward.set_timesteps(n)
            noise = _states(inverse, oracle.network(p), x_0)[-1]
            errors.append(float((_states(forward, oracle.network(p), noise)[-1] - x_0).square().mean().sqrt()))
        limit = 0.1 if p.path.name in ("ve", "edm") else 0.05  # a step is 8 % of sigma there
        return {"error": errors[1], "shrinks by": errors[1] / errors[0]}, {"error": limit, "shrinks by": 0.65}
    scheduler = subject.on(name, network, grid)
    scheduler.set_timesteps(subject.promise.steps)
    first = p.path.level(native_time(p, scheduler.timesteps[0]))
    with PlannedNoise() as noise:
        back = _states(scheduler, oracle.network(p), oracle.ode(x_0, DATA, first))[-1]
    if noise.count:
        raise _SkipError("it draws noise: the way back is not to the same point")
    limit = math.hypot(subject.promise.mean, subject.promise.spread)
    return {"error": float((back - x_0).square().sum(1).mean().sqrt())}, {"error": limit}


def _grid(subject: _Subject, name: str, network: Network, grid: dict[str, Any]) -> Measured:
    """sigmas fall to 0 with one per evaluation and the end; each is the level of the time that the network is given (a time cast to a whole
    number is not); a flow's grid is shifted once."""
    p, off = network.parameterization, 0.0
    ratio = lambda sigma: sigma / (1 - sigma) if p.path.name == "linear" and sigma < 1 else math.inf if p.path.name == "linear" else sigma
    if subject.promise.kind == "inverse":
        scheduler = subject.on(name, network, grid)
        scheduler.set_timesteps(7)
        sigmas = scheduler.sigmas.tolist()
        if sigmas[0] != 0.0 or any(b <= a for a, b in zip(sigmas, sigmas[1:], strict=False)):
            raise _WrongError(f"sigmas do not rise from 0: {sigmas}")
        return {}, {}
    for n in (1, 7, 50):
        scheduler = subject.on(name, network, grid)
        scheduler.set_timesteps(n)
        if not hasattr(scheduler, "sigmas"):
            raise _SkipError("it has no sigmas")
        times, sigmas = scheduler.timesteps.tolist(), [float(s) for s in scheduler.sigmas]
        per_node = int(getattr(scheduler, "order", 1))
        if len(sigmas) != len(times) + 1:
            raise _WrongError(f"{len(sigmas)} sigmas for {len(times)} timesteps")
        if sigmas[-1] != 0.0:
            raise _WrongError(f"the last sigma is {sigmas[-1]:g}, not 0")
        nodes = sigmas[:-1][::per_node] + sigmas[-1:]
        if not all(math.isfinite(s) or i == 0 for i, s in enumerate(sigmas)) or any(
            b >= a for a, b in zip(nodes, nodes[1:], strict=False)
        ):
            raise _WrongError(f"sigmas do not fall: {nodes[:4]} ... {nodes[-3:]}")
        for t, s in zip(times, sigmas, strict=False):
            seen, held = p.path.level(native_time(p, t)).ratio, ratio(s)
            if math.isfinite(seen) and math.isfinite(held) and held > 1e-9 and seen > 1e-9:
                off = max(off, abs(math.log(seen / held)))
            elif math.isfinite(seen) != math.isfinite(held) and min(seen, held) < 100:
                raise _WrongError(f"the network is told sigma / alpha = {seen:g} at {held:g}")
    measured = {"time off by": off}
    key = "shift" if not subject.native or subject.takes({"shift": 1.0}) else "flow_shift"
    if p.path.name == "linear" and p.lambda_range is None and subject.takes({key: 1.0}):
        levels = []
        for shift in (1.0, 3.0):
            scheduler = subject.on(name, network, {**grid, key: shift})
            scheduler.set_timesteps(10)
            levels.append([ratio(float(s)) for s in scheduler.sigmas[:-1]])
        pairs = [(a, b) for a, b in zip(*levels, strict=True) if b < 1e4]  # as good as pure noise stays where it is
        measured["shift off by"] = max((abs(math.log(b / a / 3.0)) for a, b in pairs), default=0.0)
    return measured, {"time off by": 3e-3, "shift off by": 1e-3}


def _save_and_load(subject: _Subject, name: str, network: Network, grid: dict[str, Any]) -> Measured:
    """The folder of a scheduler gives one that lays the same grid and takes the same step, for the same network."""
    scheduler = subject.on(name, network, grid)
    with tempfile.TemporaryDirectory() as folder:
        scheduler.save_pretrained(folder)
        loaded = type(scheduler).from_pretrained(folder)
    if not subject.native and loaded.parameterization != scheduler.parameterization:
        raise _WrongError(f"loaded for {loaded.parameterization}, saved for {scheduler.parameterization}")
    results = []
    for each in (scheduler, loaded):
        each.set_timesteps(5)
        x = torch.randn(4, 1, 1, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * _start(each)
        results.append(_states(each, _LINE.network(network.parameterization), x, torch.Generator().manual_seed(1))[-1])
    if not torch.equal(results[0], results[1]):
        raise _WrongError("the loaded one steps differently")
    return {}, {}


def _refusals(subject: _Subject, name: str, network: Network, grid: dict[str, Any]) -> Measured:
    """Bad calls get a ValueError that says what is wrong, before any compute."""
    scheduler, x = subject.on(name, network, grid), torch.zeros(2, 3)
    t = float(network.parameterization.network_time(network.parameterization.trained_t_range[1]))
    calls: dict[str, Callable[[], Any]] = {"step before set_timesteps": lambda: scheduler.step(x, t, x)}
    missed = [what for what, call in calls.items() if not _refused(call)]
    scheduler.set_timesteps(5)
    first = scheduler.timesteps[0]
    between = float(scheduler.timesteps[0] + scheduler.timesteps[1]) / 2 + 1e-3
    calls = {
        "a timestep that is not in the grid": lambda: scheduler.step(x, between, x),
        "an output of another shape": lambda: scheduler.step(torch.zeros(2, 4), first, x),
        "no steps": lambda: scheduler.set_timesteps(0),
        "nothing to lay a grid from": lambda: scheduler.set_timesteps(),
        "an unknown key": lambda: type(scheduler).from_config({**scheduler.config, "beta_strat": 1.0}),
    }
    missed += [what for what, call in calls.items() if not _refused(call)]
    if missed:
        raise _WrongError(f"not refused with a ValueError: {', '.join(missed)}")
    return {}, {}


def _refused(call: Callable[[], Any]) -> bool:
    try:
        call()
    except ValueError as error:
        return bool(str(error))
    except Exception:
        return False
    return False


# ------------------------------------------------------------------------------------------------------------------------------- the run

Check = Callable[[_Subject, str, Network, dict[str, Any]], Measured]
_CHECKS: dict[str, Check] = {
    "mixture": _mixture,
    "grids": _grids,
    "marginals": _marginals,
    "order": _order,
    "points": _points,
    "round trip": _round_trip,
    "grid": _grid,
    "save and load": _save_and_load,
    "refusals": _refusals,
}


def _plan(subject: _Subject, checks: Sequence[str], networks: dict[str, Network]) -> Iterator[tuple[str, str, str, Callable[[], Measured]]]:
    """(check, network, grid, the measurement) of everything to be done."""
    kind = subject.promise.kind
    for name, network in networks.items():
        for check in CHECKS:
            if check not in checks:
                continue
            if kind == "consistency" and check not in ("moments", "grid", "save and load", "refusals"):
                continue
            if kind == "inverse" and check not in ("round trip", "grid", "save and load", "refusals"):
                continue
            if subject.native and check not in ("moments", "mixture", "grids", "grid", "save and load"):
                continue  # a class of diffusers keeps its state in coordinates of its own, and takes no explicit grid
            if check == "moments":
                for n in (1, 2, 4) if kind == "consistency" else (subject.promise.steps,):
                    where = "" if kind != "consistency" else f"{n} step{'s' * (n > 1)}"
                    yield check, name, where, lambda name=name, network=network, n=n: _moments(subject, name, network, {}, n)
            elif check == "grids":
                for grid in grids_for(network):
                    if subject.takes(GRIDS[grid]):
                        yield check, name, grid, lambda name=name, network=network, grid=grid: _grids(subject, name, network, GRIDS[grid])
            elif check != "order":
                yield check, name, "", lambda check=check, name=name, network=network: _CHECKS[check](subject, name, network, {})
    if "order" in checks and kind == "sampler" and not subject.native:
        for name, p in _ORDER_NETWORKS.items():
            network = Network(p, {})
            yield "order", name, "", lambda name=name, network=network: _order(subject, name, network, {})


def _row(subject: _Subject, check: str, network: str, grid: str, measure: Callable[[], Measured]) -> Row:
    where = {"scheduler": subject.name, "check": check, "network": network, "grid": grid}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            measured, allowed = measure()
    except _SkipError as reason:
        return Row(**where, passed=None, note=str(reason))
    except _WrongError as reason:
        return Row(**where, passed=False, note=str(reason))
    except Exception as error:  # whatever a foreign class raises is a finding
        text = f"{type(error).__name__}: {error}"
        return Row(**where, passed=None if isinstance(error, ValueError) and not subject.native else False, note=text)
    passed = all(measured[k] <= limit for k, limit in allowed.items() if k in measured)  # a NaN fails
    note = "not finite" if any(math.isnan(v) for v in measured.values()) else ""
    return Row(**where, passed=passed, measured=measured, allowed=allowed, note=note)


def _counted(p: Parameterization) -> Parameterization:
    return p.with_(time_input="1000 t") if p.path.name == "linear" else p


def check_scheduler(
    scheduler: Any,
    *,
    checks: Iterable[str] | None = None,
    networks: Iterable[str] | None = None,
    promise: Promise | None = None,
    name: str | None = None,
    hosted: bool = False,
    samples: int = 4_000,
    progress: bool = False,
) -> Report:
    """Try a scheduler on every kind of network and report.

    Args:
        scheduler: a class with the interface of this library's schedulers (`GaussianScheduler`), or a function that makes one from keyword
            arguments of its constructor; or a class of diffusers, which is then put on each network by `from_config` of the config that a
            repository of diffusers has for it, in a loop that scales noise and input wherever the class offers to.
        checks: entries of `CHECKS`; None is all that apply. `moments`, `mixture`: samples have the data's mean and covariance, and each
            cluster its share. `grids`: on other grids. `marginals`: at every node on the way. `order`: of convergence, weak where noise is
            drawn. `points`: exact where it must be. `round trip`: from data to noise and back. `grid`: its nodes are sound. `save and
            load`. `refusals`: bad calls are refused.
        networks: entries of `NETWORKS`, `OTHER_NETWORKS` or, for consistency rules, `CONSISTENCY_NETWORKS`; None is all of them (for
            a class of diffusers, those that it has a config for).
        promise: what the scheduler is held to; None is its class's attribute `promise`, or the usual.
        name: in the report; None is the class's.
        hosted: put a class of diffusers into a `BridgedScheduler` first.
        samples: how many to draw. They start from noise of exactly unit covariance, so that for a scheduler that draws none on the way the
            number hardly matters; with 4,000 the standard errors of one that does are about 0.005 (mean) and 0.004 (spread).
        progress: show a bar on stderr.

    Raises:
        TypeError: not a scheduler class, nor a function that makes one.
        ValueError: an unknown check or network.
    """
    subject = _subject(scheduler, name, promise, hosted, samples)
    if subject.promise.kind == "consistency":
        known: dict[str, Network] = CONSISTENCY_NETWORKS
    else:
        known = {**NETWORKS, **OTHER_NETWORKS}
    if subject.native or hosted:
        known = {k: v for k, v in known.items() if k in (*SEVEN, "consistency")}
    if subject.native:  # their flow schedulers count to 1000, and the pipelines of networks that are given t divide
        known = {k: v._replace(parameterization=_counted(v.parameterization)) for k, v in known.items()}
    wanted = list(CHECKS if checks is None else checks)
    chosen = list(known if networks is None else networks)
    for what, given, allowed in (("check", wanted, CHECKS), ("network", chosen, known)):
        if unknown := [v for v in given if v not in allowed]:
            raise ValueError(f"check_scheduler: unknown {what} {', '.join(map(repr, unknown))}; use {', '.join(allowed)}.")
    todo: Any = list(_plan(subject, wanted, {k: known[k] for k in chosen}))
    if progress:
        from tqdm.auto import tqdm

        todo = tqdm(todo, desc=subject.name, unit="check")
    return Report(tuple(_row(subject, *item) for item in todo))


def check_schedulers(schedulers: Iterable[Any], **options: Any) -> Report:
    """`check_scheduler` of several, in one report; `options` as there."""
    report = Report(())
    for scheduler in schedulers:
        report += check_scheduler(scheduler, **options)
    return report
