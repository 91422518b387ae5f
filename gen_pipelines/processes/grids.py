"""Where a sampler stops: time grids, float64, in the native time of a network's path.

The keys are diffusers' own. A grid is laid in three moves: base nodes (`timestep_spacing`), a change of them (shift, or Karras, exponential
or beta spacing of sigma between the first and the last), and the end (`final_sigmas_type`). Here "sigma" is sigma / alpha on
variance-preserving, VE and EDM paths and t on the linear path, as in diffusers.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from .discrete_vp import DiscreteVPPath
from .level import DATA, Level
from .linear import LinearPath
from .parameterization import Parameterization
from .ve import VEPath

__all__ = ["SPACINGS", "Grid", "GridOptions", "make_grid", "shift_time", "sigma_of_level", "time_of_sigma"]

_LARGEST_SIGMA = 4096.0  # stands for pure noise where a formula needs a finite sigma; diffusers' 2**-24 for alpha^2 is the same number


@dataclass(frozen=True)
class GridOptions:
    """diffusers' keys for a grid; None is the usual one for the path.

    Args:
        timestep_spacing: an entry of `SPACINGS`. None: `leading` on discrete paths, `flow` on the linear one, `karras` on EDM,
            `exponential` on VE, `uniform` on the other continuous ones.
        steps_offset: added to every index of `leading`.
        round_timesteps: `linspace` on discrete paths is rounded to indices (diffusers' DDPM and DDIM do, its Euler does not).
        interpolation_type: sigma between two indices of a discrete path: `log_linear` everywhere in this library; `linear` replays
            diffusers' EulerDiscrete on its own `linspace` grid.
        use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas, use_lu_lambdas: respace sigma; at most one (`use_lu_lambdas`: uniform in
            lambda over the trained range; `use_exponential_sigmas`: uniform in log sigma between the first and the last base node).
        sigma_schedule: `karras` or `exponential`, the name EDM's schedulers have for it.
        sigma_min, sigma_max: ends of the respaced sigma; None: those of the base nodes.
        rho: Karras et al. 2022, eq. 5.
        final_sigmas_type: `zero`, or `sigma_min` to stop at the least noise the network was trained on.
        shift: sigma~ -> shift sigma~ (lambda - log shift), `flow` and every spacing on the linear path; applied once. `flow_shift` is its
            other name.
        use_dynamic_shifting, time_shift_type: shift = exp(mu) (`exponential`) or mu (`linear`), mu given to `set_timesteps`.
        shift_terminal: stretch the shifted times so that the last is this.
    """

    timestep_spacing: str | None = None
    steps_offset: int = 0
    round_timesteps: bool = False
    interpolation_type: str = "log_linear"
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    use_lu_lambdas: bool = False
    sigma_schedule: str | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    rho: float = 7.0
    final_sigmas_type: str = "zero"
    shift: float | None = None
    flow_shift: float | None = None
    use_dynamic_shifting: bool = False
    time_shift_type: str = "exponential"
    shift_terminal: float | None = None

    def __post_init__(self) -> None:
        for name in ("rho", "shift", "flow_shift"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"set_timesteps: {name} = {value}; give a number above 0.")

    @classmethod
    def from_config(cls, config: dict[str, Any], **defaults: Any) -> "GridOptions":
        """Read the keys of a scheduler config; a key that is absent or null has its value in `defaults`, else the class's."""
        return cls(**{**defaults, **{f.name: config[f.name] for f in fields(cls) if config.get(f.name) is not None}})


@dataclass(frozen=True)
class Grid:
    """Nodes from noise to data.

    Args:
        network_times: what the network is given at each node, n floats.
        times: the path's native time at each node, n floats.
        levels: (alpha, sigma) at each node and at the end, n + 1.
    """

    network_times: tuple[float, ...]
    times: tuple[float, ...]
    levels: tuple[Level, ...]

    def __len__(self) -> int:
        return len(self.times)


def sigma_of_level(p: Parameterization, level: Level) -> float:
    """sigma in diffusers' sense: t on the linear path, sigma / alpha elsewhere (inf for pure noise)."""
    return level.sigma / (level.alpha + level.sigma) if isinstance(p.path, LinearPath) else level.ratio


def time_of_sigma(p: Parameterization, sigma: float) -> float:
    """The native time at which `sigma_of_level` is sigma > 0; inf gives the noise end."""
    if isinstance(p.path, (LinearPath, VEPath)):
        return float(sigma)
    if math.isinf(sigma):
        return p.path.t_max
    return float(p.path.t_from_lambda(torch.tensor(-math.log(sigma), dtype=torch.float64)))


def shift_time(t: np.ndarray, shift: float) -> np.ndarray:
    """t -> shift t / (1 + (shift - 1) t) on the linear path: sigma / alpha is multiplied by shift.

    Esser et al. 2024, eq. 23, https://arxiv.org/abs/2403.03206
    """
    return shift * t / (1 + (shift - 1) * t)


# ---------------------------------------------------------------------- base nodes


def _index_nodes(index: np.ndarray, p: Parameterization, count: int) -> np.ndarray:
    """Native times of the training positions 0 ... count - 1."""
    if isinstance(p.path, DiscreteVPPath):
        return index
    if isinstance(p.path, VEPath):
        return p.path.t_min * (p.path.t_max / p.path.t_min) ** (index / (count - 1))
    return (index + 1) / count * p.path.t_max  # as flow matching counts: 1 / N ... 1


def _count(p: Parameterization) -> int:
    if isinstance(p.path, DiscreteVPPath):
        return p.path.num_train_timesteps
    words = p.time_input.split()
    return int(words[0]) if len(words) == 2 and words[0].isdigit() and int(words[0]) != 999 else 1000


def _check_count(n: int, count: int, what: str) -> None:
    if n > count:
        raise ValueError(f"set_timesteps: {n} steps with {what}, but the network has {count} training steps; take at most {count}.")


def _leading(p: Parameterization, n: int, o: GridOptions) -> np.ndarray:
    count = _count(p)
    _check_count(n, count, "timestep_spacing='leading'")
    index = np.arange(n, dtype=np.float64)[::-1] * (count // n) + o.steps_offset
    return _index_nodes(index if n > 1 else np.array([count - 1.0]), p, count)  # one step begins in noise, not in data


def _trailing(p: Parameterization, n: int, o: GridOptions) -> np.ndarray:
    count = _count(p)
    index = count - np.arange(n, dtype=np.float64) * count / n
    if isinstance(p.path, DiscreteVPPath):
        _check_count(n, count, "timestep_spacing='trailing'")
        index = np.round(index)
    return _index_nodes(index - 1, p, count)


def _linspace(p: Parameterization, n: int, o: GridOptions) -> np.ndarray:
    count = _count(p)
    index = np.linspace(0, count - 1, n, dtype=np.float64)[::-1] if n > 1 else np.array([count - 1.0])  # one step begins in noise
    if o.round_timesteps and isinstance(p.path, DiscreteVPPath):
        _check_count(n, count, "rounded timesteps")
        index = np.round(index)
    return _index_nodes(index, p, count)


def _flow(p: Parameterization, n: int, o: GridOptions) -> np.ndarray:
    """Uniform in the time of the linear path with the same lambda, from the noise end to 1 / N or the data end."""
    count = _count(p)
    low, high = p.trained_lambda_range
    first, last = 1 / (1 + math.exp(low)), max(1 / (1 + math.exp(min(high, 700.0))), 1 / count)
    return np.linspace(first, last, n, dtype=np.float64)  # linear-path times: `make_grid` converts after the shift


def _uniform(p: Parameterization, n: int, o: GridOptions) -> np.ndarray:
    low, high = p.trained_t_range
    return np.linspace(high, max(low, (high - low) / _count(p)), n, dtype=np.float64)


def _lambda(p: Parameterization, n: int, o: GridOptions) -> np.ndarray:
    high, low = _sigma_ends(p, o, *_finite_range(p))
    return np.array([time_of_sigma(p, s) for s in np.exp(np.linspace(math.log(high), math.log(low), n))])


def _karras_nodes(p: Parameterization, n: int, o: GridOptions) -> np.ndarray:
    return np.array([time_of_sigma(p, s) for s in _karras(*_sigma_ends(p, o, *_finite_range(p)), n, o.rho)])


SPACINGS: dict[str, Callable[[Parameterization, int, GridOptions], np.ndarray]] = {
    "leading": _leading,
    "trailing": _trailing,
    "linspace": _linspace,
    "flow": _flow,
    "uniform": _uniform,
    "lambda": _lambda,
    "exponential": _lambda,
    "karras": _karras_nodes,
}


def _usual_spacing(p: Parameterization) -> str:
    if isinstance(p.path, DiscreteVPPath):
        return "leading"
    if isinstance(p.path, LinearPath):
        return "flow"
    return {"edm": "karras", "ve": "exponential"}.get(p.path.name, "uniform")


# ---------------------------------------------------------------------- respacing of sigma


def _finite(sigma: float) -> float:
    return _LARGEST_SIGMA if math.isinf(sigma) else sigma


def _finite_range(p: Parameterization) -> tuple[float, float]:
    """(largest, smallest) trained sigma, both finite and above zero."""
    low, high = p.trained_t_range
    low = max(low, (high - low) / _count(p)) if p.trained_lambda_range[1] == math.inf else low
    return _finite(sigma_of_level(p, p.path.level(high))), sigma_of_level(p, p.path.level(low))


def _sigma_ends(p: Parameterization, o: GridOptions, largest: float, smallest: float) -> tuple[float, float]:
    if isinstance(p.path, VEPath):  # there sigma_min and sigma_max are the network's
        return largest, smallest
    largest = largest if o.sigma_max is None else o.sigma_max
    smallest = smallest if o.sigma_min is None else o.sigma_min
    if not 0 < smallest <= largest:
        raise ValueError(f"set_timesteps: sigma_min = {smallest} and sigma_max = {largest}; give 0 < sigma_min <= sigma_max.")
    return _finite(largest), smallest


def _karras(largest: float, smallest: float, n: int, rho: float) -> np.ndarray:
    """Karras et al. 2022, eq. 5, https://arxiv.org/abs/2206.00364"""
    ramp = np.linspace(0, 1, n, dtype=np.float64)
    return (largest ** (1 / rho) + ramp * (smallest ** (1 / rho) - largest ** (1 / rho))) ** rho


def _beta(largest: float, smallest: float, n: int) -> np.ndarray:
    """Quantiles of Beta(0.6, 0.6). Lee et al. 2024, https://arxiv.org/abs/2407.12173"""
    try:
        from scipy.stats import beta
    except ImportError as error:
        raise ImportError("set_timesteps: use_beta_sigmas needs scipy (pip install scipy).") from error
    return smallest + beta.ppf(1 - np.linspace(0, 1, n), 0.6, 0.6) * (largest - smallest)


def _respacing(o: GridOptions) -> str | None:
    chosen = [k for k in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas") if getattr(o, k)]
    if len(chosen) > 1:
        raise ValueError(f"set_timesteps: {' and '.join(chosen)} are set; choose one.")
    return chosen[0] if chosen else None


def _respaced(p: Parameterization, n: int, o: GridOptions, times: np.ndarray, respacing: str) -> np.ndarray:
    if respacing == "use_lu_lambdas":
        return _lambda(p, n, o)
    low, high = p.trained_t_range
    first, last = (sigma_of_level(p, p.path.level(float(np.clip(t, low, high)))) for t in (times[0], times[-1]))
    largest, smallest = _sigma_ends(p, o, _finite(first), _finite(last))
    if respacing == "use_karras_sigmas":
        sigmas = _karras(largest, smallest, n, o.rho)
    elif respacing == "use_exponential_sigmas":
        sigmas = np.exp(np.linspace(math.log(largest), math.log(smallest), n))
    else:
        sigmas = _beta(largest, smallest, n)
    return np.array([time_of_sigma(p, s) for s in sigmas])


def _shifted(times: np.ndarray, o: GridOptions, mu: float | None) -> np.ndarray:
    """Linear-path times after the shift, static or dynamic, and the stretch."""
    if o.use_dynamic_shifting:
        if mu is None:
            raise ValueError(
                "set_timesteps: the grid has use_dynamic_shifting, so it needs mu=... (log of the shift for the resolution, or the shift "
                "itself with time_shift_type='linear'); pass it, or set use_dynamic_shifting=False and shift=..."
            )
        if o.time_shift_type not in ("exponential", "linear"):
            raise ValueError(f"set_timesteps: time_shift_type {o.time_shift_type!r} is not known; use 'exponential' or 'linear'.")
        times = shift_time(times, math.exp(mu) if o.time_shift_type == "exponential" else mu)
    else:
        shift = o.shift if o.shift is not None else o.flow_shift
        times = times if shift in (None, 1.0) else shift_time(times, shift)
    if o.shift_terminal:
        times = 1 - (1 - times) * (1 - o.shift_terminal) / (1 - times[-1])
    return times


# ---------------------------------------------------------------------- the grid


def _into_range(p: Parameterization, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Times moved into the trained range, and which of them to keep (those moved to one end are merged into one)."""
    low, high = p.trained_t_range
    slack = 1e-5  # explicit times have been through float32, and through an exponential where the network is given log sigma
    outside = (times > high * (1 + slack)) | (times < low * (1 - slack) - 1e-9 * (high - low))
    moved = np.clip(times, low, high)
    keep = np.ones(len(times), dtype=bool)
    if outside.any():
        keep[1:] = moved[1:] != moved[:-1]
        warnings.warn(
            f"{int(outside.sum())} of {len(times)} grid nodes are outside the range the network was trained on (native time {low:g} to "
            f"{high:g}); they are moved to its end and merged, which leaves {int(keep.sum())} steps.",
            stacklevel=4,
        )
    return moved, keep


def _explicit_sigmas(p: Parameterization, sigmas: Sequence[float], o: GridOptions, mu: float | None) -> np.ndarray:
    values = np.array([float(s) for s in sigmas], dtype=np.float64)
    flow = isinstance(p.path, LinearPath)
    if len(values) and values[-1] == 0.0:
        values = values[:-1]
    elif not flow:
        raise ValueError(
            f"set_timesteps: sigmas end in {values[-1] if len(values) else 'nothing'}; the last must be 0, after one per step."
        )
    if not len(values) or (values <= 0).any():
        raise ValueError("set_timesteps: sigmas must fall from noise to data and be above 0 before the last.")
    if flow:
        if values[0] > 1:
            raise ValueError(f"set_timesteps: sigmas begin at {values[0]}, but on the linear path sigma is the time t, at most 1.")
        values = _shifted(values, o, mu)
    return np.array([time_of_sigma(p, s) for s in values])


MAX_STEPS = 100_000  # a hundred times what networks were trained with; the coefficients of 10^8 steps are gigabytes


def check_steps(num_inference_steps: int | None) -> None:
    """Raises ValueError for a number of steps that no grid is laid for; before anything of its length is made."""
    if num_inference_steps is None:
        return
    if num_inference_steps < 1:
        raise ValueError(f"set_timesteps: num_inference_steps = {num_inference_steps}; give at least 1.")
    if num_inference_steps > MAX_STEPS:
        raise ValueError(f"set_timesteps: num_inference_steps = {num_inference_steps}; give at most {MAX_STEPS:,}.")


def make_grid(
    p: Parameterization,
    num_inference_steps: int | None = None,
    options: GridOptions | None = None,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    mu: float | None = None,
) -> Grid:
    """Lay a grid on a network's path.

    Args:
        p: the network.
        num_inference_steps: how many nodes (after merging there may be fewer).
        options: how to lay them.
        timesteps: instead, exactly what the network is to see, noise first; never shifted.
        sigmas: instead, sigma at each node, noise first, then 0 (may be left out on the linear path); shifted on the linear path as
            diffusers does. With `timesteps` as well, the network sees those at these levels.
        mu: the dynamic shift, with `use_dynamic_shifting`; ignored without it, as in diffusers.

    Raises:
        ValueError: none, or contradicting arguments; nodes that do not fall from noise to data; a missing mu; an unknown name.
    """
    o = options or GridOptions()
    given = [len(v) for v in (timesteps, sigmas) if v is not None]
    if num_inference_steps is None and not given:
        raise ValueError("set_timesteps: give num_inference_steps, timesteps or sigmas.")
    check_steps(num_inference_steps)
    ends_in_zero = sigmas is not None and len(sigmas) > 0 and float(sigmas[-1]) == 0.0
    counts = {len(timesteps)} if timesteps is not None else set()
    counts |= {len(sigmas) - ends_in_zero} if sigmas is not None else set()
    counts |= {num_inference_steps} if num_inference_steps is not None else set()
    if len(counts) > 1:
        raise ValueError(
            f"set_timesteps: num_inference_steps, timesteps and sigmas (without the last 0) disagree on the count: {sorted(counts)}."
        )

    linear_interpolation = False
    network_times = None
    if sigmas is not None:
        times = _explicit_sigmas(p, sigmas, o, mu)
        if timesteps is not None:
            network_times = np.array([float(t) for t in timesteps], dtype=np.float64)
    elif timesteps is not None:
        times = np.array([p.path_time(float(t)) for t in timesteps], dtype=np.float64)
    else:
        n, spacing = int(num_inference_steps), o.timestep_spacing or _usual_spacing(p)
        if spacing not in SPACINGS:
            raise ValueError(f"set_timesteps: timestep_spacing {spacing!r} is not known; use one of {', '.join(SPACINGS)}.")
        if o.sigma_schedule not in (None, "karras", "exponential"):
            raise ValueError(f"set_timesteps: sigma_schedule {o.sigma_schedule!r} is not known; use 'karras' or 'exponential'.")
        if isinstance(p.path, VEPath) and o.timestep_spacing is None and o.sigma_schedule is not None:
            spacing = o.sigma_schedule
        times = SPACINGS[spacing](p, n, o)
        if spacing == "flow" or isinstance(p.path, LinearPath):
            times = _shifted(times, o, mu)
        if spacing == "flow" and not isinstance(p.path, LinearPath):
            times = np.array([time_of_sigma(p, t / (1 - t) if t < 1 else math.inf) for t in times])
        respacing = _respacing(o)
        if respacing is not None:
            times = _respaced(p, n, o, times, respacing)
        linear_interpolation = respacing is None and spacing == "linspace" and o.interpolation_type == "linear"
    if (np.diff(times) >= 0).any() or not np.isfinite(times).all():
        raise ValueError(
            f"set_timesteps: the nodes must fall strictly from noise to data; they are, in the path's own time, "
            f"{', '.join(f'{t:.6g}' for t in times[:6])}{', ...' if len(times) > 6 else ''}."
        )
    times, keep = _into_range(p, times)
    times = times[keep]
    if network_times is None:
        network_times = np.array([p.network_time(float(t)) for t in times])
    else:
        network_times = network_times[keep]
    levels = [p.path.level(float(t)) for t in times]
    if linear_interpolation and isinstance(p.path, DiscreteVPPath):
        levels = _linearly_interpolated(p.path, times, levels)
    return Grid(tuple(map(float, network_times)), tuple(map(float, times)), (*levels, _end(p, o)))


def _linearly_interpolated(path: DiscreteVPPath, times: np.ndarray, levels: list[Level]) -> list[Level]:
    """Levels whose sigma / alpha is interpolated linearly between indices, as diffusers' EulerDiscrete does; the rest is unchanged."""
    out = []
    for t, level in zip(times, levels, strict=True):
        if float(t).is_integer():
            out.append(level)
            continue
        a, b = path.level(math.floor(t)).ratio, path.level(math.ceil(t)).ratio
        ratio = a + (t - math.floor(t)) * (_finite(b) - a)
        out.append(Level(1 / math.hypot(1, ratio), ratio / math.hypot(1, ratio)))
    return out


def _end(p: Parameterization, o: GridOptions) -> Level:
    if o.final_sigmas_type == "zero":
        return DATA
    if o.final_sigmas_type == "sigma_min":
        return p.path.level(p.trained_t_range[0])
    raise ValueError(f"set_timesteps: final_sigmas_type {o.final_sigmas_type!r} is not known; use 'zero' or 'sigma_min'.")
