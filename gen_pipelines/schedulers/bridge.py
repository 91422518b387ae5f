"""Any scheduler of diffusers, unmodified, on any network, by a change of coordinates.

A noisy sample is the same picture in every Gaussian path's coordinates: where lambda_A = lambda_B,

    x_A = x_B alpha_A / alpha_B = x_B sigma_A / sigma_B,

and the network's two estimates x_0 and eps do not change. So a scheduler that was written for one path runs on a network of another: before
its `step` the state goes into its coordinates and the network's output becomes the prediction it wants; afterwards the state goes back.

What has to be known of a class of diffusers is in `HOSTED`: which coordinates its state is in, where its levels are kept, and which
predictions it understands. Those that cannot be hosted are in `REFUSED`, with the reason.
"""

import copy
import inspect
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor

from ..processes.config import NETWORK_KEYS, check_config_keys
from ..processes.discrete_vp import DiscreteVPPath
from ..processes.grids import GridOptions, check_steps, make_grid, sigma_of_level
from ..processes.level import Level
from ..processes.linear import LinearPath
from ..processes.parameterization import FIELD_NAMES, Affine, Parameterization
from ..processes.path import Path
from .base import _GRID_KEYS, _SHIFT_KEYS, GaussianScheduler, SchedulerMixin, SchedulerOutput, Stage, _when_read, combine

__all__ = ["HOSTED", "REFUSED", "BridgedScheduler", "Hosting", "hosting_of"]


@dataclass(frozen=True)
class Hosting:
    """What the bridge knows of one class of diffusers.

    Args:
        levels: where the class keeps its levels, and so the coordinates of its state: `table` (sqrt of `alphas_cumprod` at its integer
            timesteps), `sigma` ((1, sigma), `sigmas`), `pair` (`sigmas` through `_sigma_to_alpha_sigma_t`: variance preserving, or a
            flow's with `use_flow_sigmas`), `flow` ((1 - sigma, sigma), `sigmas`), `ipndm` ((alphas, betas)).
        predictions: the `prediction_type`s it understands, the one to use for any other network first.
        between: where the level of every second network evaluation is, for solvers with two stages: `next` (the next of `sigmas`),
            `interpol` and `interpol_before` (`sigmas_interpol`, at the position or the one before), `geometric` (between two `sigmas`).
        flow_branch: whether its `use_flow_sigmas` is right (DEIS and SA end at the least noise instead of zero).
        consistency: whether its rule is made for consistency networks and samples another distribution on others.
        strided: whether it takes the distance to the next timestep from the number of steps, instead of from the timesteps.
        from_the_start: whether it can only be run from the first timestep.
        seeded: whether it draws from a Brownian tree with a seed of its own (`noise_sampler_seed`).
    """

    levels: Literal["table", "sigma", "pair", "flow", "ipndm"]
    predictions: tuple[str, ...]
    between: Literal["next", "interpol", "interpol_before", "geometric"] | None = None
    flow_branch: bool = False
    consistency: bool = False
    strided: bool = False
    from_the_start: bool = False
    seeded: bool = False


_V = ("v_prediction", "epsilon")
_ALL = ("v_prediction", "epsilon", "sample")
_FLOW = ("flow_prediction",)

HOSTED: dict[str, Hosting] = {
    "DDPMScheduler": Hosting("table", _ALL),
    "DDPMParallelScheduler": Hosting("table", _ALL),
    "DDIMScheduler": Hosting("table", _ALL, strided=True),
    "DDIMParallelScheduler": Hosting("table", _ALL, strided=True),
    "PNDMScheduler": Hosting("table", ("epsilon", "v_prediction"), strided=True, from_the_start=True),
    "LCMScheduler": Hosting("table", _ALL, consistency=True),
    "TCDScheduler": Hosting("table", _ALL, consistency=True),
    "EulerDiscreteScheduler": Hosting("sigma", _ALL),
    "EulerAncestralDiscreteScheduler": Hosting("sigma", _V),
    "LMSDiscreteScheduler": Hosting("sigma", _V),
    "HeunDiscreteScheduler": Hosting("sigma", _V, between="next"),
    "KDPM2DiscreteScheduler": Hosting("sigma", _V, between="interpol"),
    "KDPM2AncestralDiscreteScheduler": Hosting("sigma", _V, between="interpol_before"),
    "DPMSolverSDEScheduler": Hosting("sigma", _V, between="geometric", seeded=True),
    "DPMSolverMultistepScheduler": Hosting("pair", _ALL, flow_branch=True),
    "DPMSolverSinglestepScheduler": Hosting("pair", _ALL, flow_branch=True),
    "UniPCMultistepScheduler": Hosting("pair", _ALL, flow_branch=True),
    "DEISMultistepScheduler": Hosting("pair", _ALL),
    "SASolverScheduler": Hosting("pair", _ALL),
    "IPNDMScheduler": Hosting("ipndm", ("v_prediction",)),
    "EDMEulerScheduler": Hosting("sigma", ("edm",)),
    "EDMDPMSolverMultistepScheduler": Hosting("sigma", ("edm",)),
    "CMStochasticIterativeScheduler": Hosting("sigma", ("consistency",), consistency=True),
    "FlowMatchEulerDiscreteScheduler": Hosting("flow", _FLOW),
    "FlowMatchHeunDiscreteScheduler": Hosting("flow", _FLOW, between="next"),
    "FlowMatchLCMScheduler": Hosting("flow", _FLOW, consistency=True),
    "LTXEulerAncestralRFScheduler": Hosting("flow", _FLOW),
}

_TOKENS = "it samples discrete tokens, which have no Gaussian path"
_BACKWARDS = "it goes from data to noise; hosting is for sampling"
_VIDEO = "its state is a video at several resolutions, laid out by its own pipeline"
REFUSED: dict[str, str] = {
    "AmusedScheduler": _TOKENS,
    "BlockRefinementScheduler": _TOKENS,
    "DiscreteDDIMScheduler": _TOKENS,
    "EntropyBoundScheduler": _TOKENS,
    "VQDiffusionScheduler": _TOKENS,
    "DDIMInverseScheduler": _BACKWARDS,
    "DPMSolverMultistepInverseScheduler": _BACKWARDS,
    "HeliosScheduler": _VIDEO,
    "HeliosDMDScheduler": _VIDEO,
    "CogVideoXDDIMScheduler": "its schedule is shifted in SNR for one family of video networks, and its config does not say so in full",
    "CogVideoXDPMScheduler": "its step wants the previous estimate from its own pipeline, and its schedule is that of one family of videos",
    "ConsistencyDecoderScheduler": "it belongs to one decoder: its timesteps and noise are fixed, and it has no config to read",
    "CosineDPMSolverMultistepScheduler": "it is one audio network's, and its Brownian tree recurses without end at some ends of sigma",
    "DDPMWuerstchenScheduler": "its time is its own continuous ratio per sample, and its step takes no grid",
    "FlowMapEulerDiscreteScheduler": "its network is a flow map, which is given two times",
    "KarrasVeScheduler": "it has no step for one network output: its sampling is split into add_noise_to_input, step and step_correct",
    "MiniMaxH3Scheduler": "its step belongs to the network of one pipeline",
    "PiflowScheduler": "its network outputs a policy for many steps instead of one prediction",
    "RFD4ProteinaScheduler": "it samples coordinates of atoms, centred at every step",
    "RePaintScheduler": "its step wants the original picture and the mask, and goes back in time",
    "SCMScheduler": "its trigonometric consistency step wants a network that is given the angle and a rescaled state by its own pipeline",
    "ScoreSdeVeScheduler": "it has no step: its pipeline calls step_correct and step_pred in turn",
    "ScoreSdeVpScheduler": "it has no step: it has step_pred alone",
    "UnCLIPScheduler": "its table is fixed, and its step wants the previous timestep and log-variances from its own pipeline",
}

_BETA_KEYS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
_FLOW_GRID = ("shift", "shift_terminal", "use_dynamic_shifting", "time_shift_type")
_RESPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
_LARGEST_RATIO = 4096.0  # of sigma to alpha: diffusers' 2**-24 for alpha^2, where its classes cannot have zero
_EDM_ENDS = (0.002, 80.0)  # of sigma: Karras et al. 2022, table 1
_OUTSIDE = 1e-3  # in lambda: a tenth of a percent of sigma is rounding


def hosting_of(cls: type) -> tuple[str, Hosting]:
    """(name, what is known) of a scheduler class of diffusers, or of a subclass of one.

    Raises:
        ValueError: the class cannot be hosted; the message says why.
    """
    for base in cls.__mro__:
        if base.__name__ in HOSTED:
            return base.__name__, HOSTED[base.__name__]
        if base.__name__ in REFUSED:
            raise ValueError(
                f"{base.__name__} of diffusers cannot be used here: {REFUSED[base.__name__]}. Take one of gen_pipelines, or one of "
                f"{', '.join(HOSTED)}."
            )
    raise ValueError(
        f"{cls.__name__} is no scheduler that the bridge knows; those are {', '.join(HOSTED)}. Or write it as one of ours: see "
        "gen_pipelines.schedulers.base."
    )


def _defaults(cls: type) -> dict[str, Any]:
    """The constructor's arguments and their defaults."""
    return {k: v.default for k, v in inspect.signature(cls.__init__).parameters.items() if k != "self" and v.kind is not v.VAR_KEYWORD}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value.tolist() if hasattr(value, "tolist") else value


def _full(p: Parameterization) -> dict[str, Any]:
    """Everything of a network but its limits and its variance, JSON-ready."""
    keep = ("path", "prediction", "time_input", "sign", "sigma_data", "lambda_range")
    values = {k: getattr(p, k) for k in keep if getattr(p, k) is not None}
    return {k: v.to_config() if isinstance(v, Path) else _plain(v) for k, v in values.items()}


def _same_network(a: Parameterization, b: Parameterization) -> bool:
    """Equal but for the variance where none is learned: that is a choice of the sampler."""
    return a.with_(variance=a.variance if a.learned_variance else None) == b.with_(variance=b.variance if b.learned_variance else None)


def on_path(p: Parameterization, ratio: float) -> Level:
    """(alpha, sigma) of the network's path where sigma / alpha is `ratio`; outside the trained range too where the path's form allows."""
    name = p.path.name
    if name == "linear":
        return Level(0.0, 1.0) if math.isinf(ratio) else Level(1 / (1 + ratio), ratio / (1 + ratio))
    if name in ("ve", "edm"):  # no finite sigma there is pure noise: the largest trained one stands for it
        return Level(1.0, math.exp(-p.trained_lambda_range[0]) if math.isinf(ratio) else ratio)
    if name in ("discrete_vp", "vp_sde", "cosine"):
        return Level(0.0, 1.0) if math.isinf(ratio) else Level(1 / math.hypot(1, ratio), ratio / math.hypot(1, ratio))
    return p.path.level(_time_at(p, ratio)[0])


def _time_at(p: Parameterization, ratio: float) -> tuple[float, bool]:
    """(native time of the network's path at sigma / alpha = ratio, whether that lies outside its trained range): the end, if it does."""
    low, high = p.trained_lambda_range
    lambda_ = math.inf if ratio == 0 else -math.inf if math.isinf(ratio) else -math.log(ratio)
    near, far = p.trained_t_range
    if lambda_ <= low:
        return far, lambda_ < low - _OUTSIDE
    if lambda_ >= high:
        return near, lambda_ > high + _OUTSIDE
    return min(max(float(p.path.t_from_lambda(lambda_)), near), far), False


@lru_cache(maxsize=64)
def _betas_along(p: Parameterization, count: int, shift: tuple[tuple[str, Any], ...], mu: float | None) -> tuple[float, ...]:
    """Betas of a variance-preserving table whose `count` levels lie along the usual grid of another path, its shift included.

    So the scheduler's index counts along the network's own range, and its spacings mean what they mean there.
    """
    if isinstance(p.path, DiscreteVPPath):
        ratios = [min(math.sqrt((1 - a) / a) if a > 0 else math.inf, _LARGEST_RATIO) for a in p.path.alphas_cumprod.tolist()]
    else:
        levels = make_grid(p, count, GridOptions(**dict(shift)), mu=mu).levels[:-1]
        ratios = [min(level.ratio, _LARGEST_RATIO) for level in reversed(levels)]
    bars = [1 / (1 + r * r) for r in ratios]
    return tuple(1 - bar / before for bar, before in zip(bars, [1.0, *bars[:-1]], strict=True))


def _target(prediction: str, ratio: float, sigma_data: float, boundary: float) -> tuple[float, float]:
    """(a, b): the prediction is a x_0 + b eps at sigma / alpha = ratio; `prediction` may begin with a minus."""
    if prediction.startswith("-"):
        a, b = _target(prediction[1:], ratio, sigma_data, boundary)
        return -a, -b
    if prediction in ("epsilon", "sample", "flow_prediction"):
        return {"epsilon": (0.0, 1.0), "sample": (1.0, 0.0), "flow_prediction": (-1.0, 1.0)}[prediction]
    if prediction == "v_prediction":
        return (-1.0, 0.0) if math.isinf(ratio) else (-ratio / math.hypot(1, ratio), 1 / math.hypot(1, ratio))
    # preconditioned: x_0 = c_skip x + c_out F with x = x_0 + ratio eps
    from_data = ratio - boundary if prediction == "consistency" else ratio
    c_skip = sigma_data**2 / (from_data**2 + sigma_data**2)
    c_out = from_data * sigma_data / math.hypot(ratio, sigma_data)
    if abs(c_out) < 1e-9:  # the boundary: the output does not count there
        return 0.0, 0.0
    return (1 - c_skip) / c_out, -c_skip * ratio / c_out


@dataclass(frozen=True)
class Crossing:
    """One node's change of coordinates, Python floats.

    Args:
        to_ours: x = to_ours * (the hosted scheduler's x).
        theirs: the hosted scheduler's level.
        from_x, from_output: its prediction = from_x * x + from_output * (the network's output).
        from_x_0, from_eps: the same from the two estimates.
    """

    to_ours: float
    theirs: Level
    from_x: float = 0.0
    from_output: float = 1.0
    from_x_0: float = 0.0
    from_eps: float = 0.0


def _snap(value: float, to: float) -> float:
    return to if abs(value - to) < 1e-6 else value


class BridgedScheduler(GaussianScheduler, SchedulerMixin):
    """A scheduler of diffusers, with the interface of ours, on any network.

    On a network of its own path, prediction and grid it is an identity: the same trajectory as without the bridge, up to the scale alpha of
    the state where that scheduler's state is not in the network's coordinates. Its own `clip_sample` and `thresholding` are those of the
    network. Where its schedule was left at the default and the network is not of that kind, its table lies along the network's own range.

    The config is that of the hosted scheduler, `_class_name` included, with the network's keys in it: so it is saved as diffusers saves it.

    Args:
        scheduler: one of diffusers, of a class in `HOSTED`; it is copied and never changed.
        parameterization_from: the network: a `Parameterization`, or a scheduler config that describes it. None: what the scheduler's own
            config says.

    Raises:
        ValueError: the class cannot be hosted (`REFUSED` says why); the config does not say what the network is.
    """

    def __init__(self, scheduler: Any, parameterization_from: Parameterization | dict[str, Any] | None = None) -> None:
        if isinstance(scheduler, BridgedScheduler):
            raise TypeError("BridgedScheduler: this scheduler is hosted already; use its bind(parameterization).")
        self.__module__ = "gen_pipelines"  # what pipelines record as the library
        self._class = type(scheduler)
        self._known_as, self._hosting = hosting_of(self._class)
        config = dict(scheduler.config)
        self._silent = frozenset(config.get("_use_default_values") or ())
        self._hosted_config = {k: _plain(v) for k, v in config.items() if not k.startswith("_")}
        if isinstance(getattr(self._class, "shift", None), property):
            self._hosted_config["shift"] = scheduler.shift  # `set_shift` leaves the config as it was
        check_config_keys(self._hosted_config, f"BridgedScheduler({self._class.__name__})")
        self._taken: dict[str, Any] = {}
        self._explicit: dict[str, Any] = {}
        self._bound, self._corrects_network = parameterization_from is not None, False
        self.order = getattr(scheduler, "order", 1)
        p = parameterization_from
        if p is None:
            p = Parameterization.from_config({**self._hosted_config, "_class_name": self._known_as})
        elif not isinstance(p, Parameterization):
            p = Parameterization.from_config(dict(p))
        if self._hosting.consistency and parameterization_from is not None and p.has_path:
            warnings.warn(
                f"{self._class.__name__} is a rule for consistency networks; on a network with {p.prediction!r} that was not distilled it "
                "samples another distribution than the network's.",
                stacklevel=2,
            )
        self._assemble(p)
        self._clear()

    # ------------------------------------------------------------------ the config

    @property
    def jumps(self) -> bool:
        """Whether the hosted rule is for networks that jump to data in one evaluation."""
        return self._hosting.consistency

    @property
    def hosted_class(self) -> type:
        """The class of diffusers that is hosted."""
        return self._class

    @property
    def _defaults(self) -> dict[str, Any]:
        return _defaults(self._class)

    def _keeps_betas(self, config: dict[str, Any]) -> bool:
        """Whether the hosted scheduler was given a schedule: one that differs from its class's default."""
        defaults = self._defaults
        return "beta_start" in defaults and any(
            _plain(config.get(k)) != defaults[k] for k in _BETA_KEYS[1:] if k in config and k in defaults
        )

    def _assemble(self, p: Parameterization) -> None:
        """The config: the hosted scheduler's own, the grid that was taken over, and what the network is."""
        own = {k: v for k, v in self._hosted_config.items() if k != "parameterization"}
        config = {**own, **self._taken}
        network = p.to_config()
        if "edm" not in self._hosting.predictions and "consistency" not in self._hosting.predictions:
            network = {k: v for k, v in network.items() if k not in ("sigma_min", "sigma_max", "sigma_schedule")}
        elif p.prediction not in self._hosting.predictions:
            network = {k: v for k, v in network.items() if k not in ("sigma_min", "sigma_max", "sigma_data", "sigma_schedule")}
        if not isinstance(p.path, DiscreteVPPath):
            network.pop("num_train_timesteps", None)
        elif self._keeps_betas(own) and not self._has_networks_betas(own, p):
            network = {k: v for k, v in network.items() if k not in _BETA_KEYS}
        if not isinstance(p.path, LinearPath) and "use_flow_sigmas" not in self._defaults:
            config.pop("use_flow_sigmas", None)
        if self._hosting.levels == "flow":  # diffusers' flow classes have none of these, and its Flux lays another grid for the last
            network = {k: v for k, v in network.items() if k not in (*_BETA_KEYS, "use_flow_sigmas")}
        config |= network
        config["clip_sample" if "clip_denoised" not in config else "clip_denoised"] = p.clip_sample
        for key in ("clip_sample_range", "thresholding", "dynamic_thresholding_ratio", "sample_max_value"):
            if key in config or getattr(p, key) != Parameterization.__dataclass_fields__[key].default:
                config[key] = getattr(p, key)
        if p.learned_variance:
            config["variance_type"] = p.variance
        elif config.get("variance_type") in ("learned", "learned_range"):
            config["variance_type"] = "fixed_small" if self._hosting.levels == "table" else None
        if isinstance(p.path, LinearPath):  # the shift of the grid under both of diffusers' names
            shift = next((config[k] for k in ("flow_shift", "shift") if config.get(k) not in (None, 1.0)), None)
            if shift is not None:
                config |= {k: shift for k in ("shift", "flow_shift") if k in config or k == "shift"}
        name = {"_class_name": self._known_as}
        try:
            said = Parameterization.from_config({**config, **name})
        except ValueError:  # these keys alone describe no network
            said = None
        if said is None or not _same_network(said, p):
            config["parameterization"] = _full(p)
            config["clip_sample"] = p.clip_sample
        self._internal_dict = FrozenDict({**config, "_class_name": self._class.__name__})
        self._network_cache = (self._internal_dict, p)

    def _has_networks_betas(self, config: dict[str, Any], p: Parameterization) -> bool:
        theirs = p.to_config()
        return all(_plain(config[k]) == theirs.get(k) or not (config[k] or theirs.get(k)) for k in _BETA_KEYS if k in config)

    @property
    def parameterization(self) -> Parameterization:
        """What the network was trained to do; read again if somebody rewrote the config."""
        if self._network_cache[0] is not self._internal_dict:
            config = {k: v for k, v in self._internal_dict.items() if k != "_use_default_values"}
            self._network_cache = (self._internal_dict, Parameterization.from_config({**config, "_class_name": self._known_as}))
        return self._network_cache[1]

    @classmethod
    def from_config(cls, config: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The scheduler of diffusers that the config names (`_class_name`), hosted on the network that it describes.

        Args:
            config: a `BridgedScheduler`'s `.config`, or a scheduler config of diffusers.
            kwargs: arguments of the hosted scheduler, and fields of `Parameterization`; they win.
        Raises:
            ValueError: the config names no class of diffusers that can be hosted.
        """
        import diffusers

        name = config.get("_class_name")
        hosted = getattr(diffusers, str(name), None) or getattr(diffusers.schedulers, str(name), None)
        if hosted is None:
            raise ValueError(
                f"BridgedScheduler.from_config: the config names {name!r}, which is no scheduler of diffusers; one of {', '.join(HOSTED)} "
                "can be hosted."
            )
        hosting_of(hosted)
        overrides = {k: v for k, v in kwargs.items() if k in NETWORK_KEYS or k in FIELD_NAMES}
        plain = {k: v for k, v in config.items() if k != "_use_default_values"}
        network = Parameterization.from_config(plain, **{k: v for k, v in overrides.items() if k != "parameterization"})
        if isinstance(kwargs.get("parameterization"), Parameterization):
            network = kwargs["parameterization"]
        theirs = hosted.from_config({**config, **{k: v for k, v in kwargs.items() if k not in FIELD_NAMES and k != "parameterization"}})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a config that names a consistency rule means it
            scheduler = cls(theirs, network)
        scheduler._corrects_network = bool(overrides)
        return (scheduler, {}) if return_unused_kwargs else scheduler

    def to_json_string(self) -> str:
        """The config as JSON, under the name of the hosted class, so that diffusers loads it."""
        twin = copy.copy(self)
        twin._internal_dict = FrozenDict(self._internal_dict)  # diffusers writes the bridge's own name into it
        config = json.loads(super(BridgedScheduler, twin).to_json_string())
        return json.dumps({**config, "_class_name": self._class.__name__}, indent=2, sort_keys=True) + "\n"

    @property
    def saved_as(self) -> tuple[str, str]:
        """(library, class) for a pipeline's index: the hosted class's own."""
        library = self._class.__module__.split(".")[0]
        return ("diffusers" if library == "diffusers" else self._class.__module__), self._class.__name__

    def bind(self, parameterization: Parameterization, grid: dict[str, Any] | None = None) -> "BridgedScheduler":
        """A copy of this scheduler for a network; this one is not changed.

        Args:
            parameterization: what the network was trained to do.
            grid: another scheduler's config, whose grid (shift, spacing) is taken over where the hosted scheduler was told none.
        """
        if not isinstance(parameterization, Parameterization):
            raise TypeError(f"BridgedScheduler.bind: got a {type(parameterization).__name__}; give a Parameterization.")
        new = copy.copy(self)
        before = self.parameterization
        own = self._hosted_config
        if isinstance(before.path, DiscreteVPPath) and "beta_start" in own and self._has_networks_betas(own, before):
            # the schedule was that of the network before: it goes with it
            new._hosted_config = {k: v for k, v in own.items() if k not in _BETA_KEYS}
        new._taken = {**self._taken, **self._takes(grid or {}, parameterization)}
        new._assemble(parameterization)
        new._bound, new._corrects_network = True, False
        new._clear()
        return new

    def _takes(self, grid: dict[str, Any], p: Parameterization) -> dict[str, Any]:
        """What the hosted scheduler takes over of another's grid: its own arguments that were left at their defaults."""
        defaults, taken = self._defaults, {}
        ends = ("sigma_min", "sigma_max") if p.path.name in ("edm", "ve") else ()  # there they are the network's
        for key in (*_GRID_KEYS, *_SHIFT_KEYS):
            value = grid.get(key)
            if value is None or key in ends or key in self._hosted_config and key not in self._silent:
                continue
            if key == "timestep_spacing" and value not in ("leading", "trailing", "linspace"):
                continue  # spacings of ours
            if key in defaults or (isinstance(p.path, LinearPath) and key in _FLOW_GRID):
                taken[key] = value
        said = next((v for v in (grid.get("shift"), grid.get("flow_shift")) if v not in (None, 1.0)), None)
        if said is not None and "flow_shift" in self._silent:
            taken["flow_shift"] = said
        return taken

    # ------------------------------------------------------------------ the hosted scheduler

    def _limited_by_host(self, p: Parameterization) -> bool:
        """Whether the hosted class can limit x_0 as the network's config says."""
        defaults = self._defaults
        if "clip_denoised" in defaults:
            return not p.thresholding and p.clip_sample_range == 1.0
        return ("clip_sample" in defaults or not p.clip_sample) and ("thresholding" in defaults or not p.thresholding)

    def _flows(self, config: dict[str, Any]) -> bool:
        """Whether the hosted scheduler is to use its own branch for flows."""
        return self._hosting.flow_branch and bool(config.get("use_flow_sigmas")) and not any(config.get(k) for k in _RESPACINGS)

    def _build(self, p: Parameterization, mu: float | None, unshifted: bool = False) -> Any:
        """A fresh hosted scheduler for the network, from the config as it is now."""
        config, defaults, hosting = dict(self.config), self._defaults, self._hosting
        values = {k: config[k] for k in defaults if k in config}
        values |= {k: False for k in ("clip_sample", "thresholding", "clip_denoised", "invert_sigmas") if k in defaults}
        if p.limits_x_0 and self._limited_by_host(p):
            limits = ("clip_sample", "clip_sample_range", "thresholding", "dynamic_thresholding_ratio", "sample_max_value")
            values |= {k: getattr(p, k) for k in limits if k in defaults}
            if "clip_denoised" in defaults:
                values["clip_denoised"] = p.clip_sample
        self._prediction = self._choose_prediction(p, config)
        if "prediction_type" in defaults:
            values["prediction_type"] = self._prediction if "edm" not in hosting.predictions else "epsilon"
            if self._prediction == "-edm":
                values["prediction_type"] = "v_prediction"
        if "variance_type" in defaults:
            learned = values.get("variance_type") in ("learned", "learned_range")
            if hosting.levels != "table" or (learned and not p.learned_variance) or values.get("variance_type") is None:
                values["variance_type"] = defaults["variance_type"]
        if "use_flow_sigmas" in defaults:
            values["use_flow_sigmas"] = self._flows(config)
        if "sigma_data" in defaults:
            values |= self._preconditioning(p, values)
        if unshifted:
            values |= {"shift": 1.0, "use_dynamic_shifting": False, "shift_terminal": None}
        if "beta_start" in defaults and not values.get("use_flow_sigmas"):
            values |= self._betas(p, config, mu)
        values = {k: v for k, v in values.items() if k in defaults}
        try:
            inner = self._class(**values)
        except NotImplementedError:  # a beta schedule that this class does not compute
            if not isinstance(p.path, DiscreteVPPath):
                raise
            inner = self._class(**{**values, "beta_schedule": "linear", "trained_betas": p.path.betas.tolist()})
        return inner

    def _betas(self, p: Parameterization, config: dict[str, Any], mu: float | None) -> dict[str, Any]:
        """The hosted scheduler's table: the network's own, or one along the network's range."""
        continuous = config.get("timestep_type") == "continuous" and p.prediction == "edm"
        if continuous or (self._keeps_betas(config) and not isinstance(p.path, DiscreteVPPath)):
            return {}
        if isinstance(p.path, DiscreteVPPath):
            if self._keeps_betas(config) and not self._has_networks_betas(config, p):
                return {}
            if not p.path.rescale_betas_zero_snr or "rescale_betas_zero_snr" in self._defaults:
                return {k: _plain(getattr(p.path, k)) for k in _BETA_KEYS}
            shift: dict[str, Any] = {}
        else:
            keys = (*_FLOW_GRID, "flow_shift") if isinstance(p.path, LinearPath) else ()
            shift = {k: config[k] for k in keys if config.get(k) is not None}
        count = p.path.num_train_timesteps if isinstance(p.path, DiscreteVPPath) else int(config.get("num_train_timesteps") or 1000)
        betas = list(_betas_along(p, count, tuple(sorted(shift.items())), mu))
        return {"trained_betas": betas, "num_train_timesteps": count, "rescale_betas_zero_snr": False}

    def _preconditioning(self, p: Parameterization, values: dict[str, Any]) -> dict[str, Any]:
        """sigma_data, and the ends of sigma within the network's range."""
        low, high = (math.exp(-v) for v in reversed(p.trained_lambda_range))
        if all(values[k] == self._defaults[k] for k in ("sigma_min", "sigma_max")):
            said = (low, high) if p.path.name in ("edm", "ve") else _EDM_ENDS
        else:
            said = values["sigma_min"], values["sigma_max"]
        ends = {"sigma_min": max(said[0], low), "sigma_max": min(said[1], high)}
        exact = p.path.name == "edm"  # the exponential of a logarithm is not quite the number
        if exact and ends["sigma_min"] == low:
            ends["sigma_min"] = p.path.sigma_min if p.lambda_range is None else low
        if exact and ends["sigma_max"] == high:
            ends["sigma_max"] = p.path.sigma_max if p.lambda_range is None else high
        same = p.prediction in self._hosting.predictions
        return {**ends, "sigma_data": p.sigma_data if same else values["sigma_data"]}

    def _choose_prediction(self, p: Parameterization, config: dict[str, Any]) -> str:
        known = self._hosting.predictions
        if self._flows(config):
            return "flow_prediction"
        if known == ("edm",):
            return "-edm" if p.prediction == "edm" and p.sign == -1 else "edm"
        return p.prediction if p.prediction in known else known[0]

    # ------------------------------------------------------------------ the grid

    def _clear(self) -> None:
        self._inner: Any = None
        self._inner_at: int | None = None
        self._fresh = False
        super()._clear()

    def reset(self) -> None:
        """Forget what earlier steps left behind: the next `step` starts a fresh hosted scheduler."""
        self._inner_at = None

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
        mu: float | None = None,
        original_inference_steps: int | None = None,
    ) -> None:
        """Lay the hosted scheduler's grid and cross it over to the network.

        Args:
            num_inference_steps: the number of steps, as the hosted class counts them.
            device: where `timesteps` are to be.
            timesteps, sigmas: an explicit grid, where the hosted class takes one and the network's time is its own. The timesteps of
                CMStochasticIterativeScheduler are positions in its table of sigmas, as in diffusers' pipeline.
            mu: the shift for `use_dynamic_shifting`.
            original_inference_steps: LCM's steps of distillation, of which its grid takes some; its config's by default.

        Raises:
            ValueError: steps of distillation for another class; an explicit grid that the hosted class cannot follow on this network.
        """
        p = self.parameterization
        self._warn_of_jumps(p)
        self._clear()
        self._lay = {"num_inference_steps": num_inference_steps, "device": device, "mu": mu, "timesteps": timesteps, "sigmas": sigmas}
        self._lay["original_inference_steps"] = original_inference_steps
        self._inner, self._fresh = self._start(p), True
        self._network = p
        self._limits_here = p.limits_x_0 and not self._limited_by_host(p)
        self._step_takes = frozenset(inspect.signature(self._inner.step).parameters)
        self._cross(p, device)
        self.num_inference_steps = getattr(self._inner, "num_inference_steps", None) or num_inference_steps

    def _start(self, p: Parameterization) -> Any:
        """A fresh hosted scheduler with its grid laid."""
        lay = dict(self._lay)
        explicit = {k: lay.pop(k) for k in ("timesteps", "sigmas")}
        explicit = {k: [float(x) for x in v] for k, v in explicit.items() if v is not None}
        if len(explicit) > 1 or bool(explicit) == (lay["num_inference_steps"] is not None):
            raise ValueError("BridgedScheduler.set_timesteps: give exactly one of num_inference_steps, timesteps and sigmas.")
        check_steps(lay["num_inference_steps"])
        flow = self._hosting.levels == "flow"
        inner = self._build(p, lay["mu"], unshifted=flow and "timesteps" in explicit)
        takes = inspect.signature(inner.set_timesteps).parameters
        if lay["original_inference_steps"] is not None and "original_inference_steps" not in takes:
            raise ValueError(f"BridgedScheduler.set_timesteps: {self._class.__name__} of diffusers has no original_inference_steps.")
        if explicit:
            (key, values), name = next(iter(explicit.items())), self._class.__name__
            if flow and "sigmas" in takes and isinstance(p.path, LinearPath):
                if key == "timesteps":  # exactly what the network sees: diffusers would shift the levels under them
                    key, values = "sigmas", [float(p.path_time(t)) for t in values]
                explicit = {"sigmas": values[:-1] if values[-1] == 0.0 else values}
            elif key == "timesteps" and p.prediction == "consistency" in self._hosting.predictions:
                # where its own pipeline is given them, they are positions in its table of sigmas
                explicit = {key: [int(v) for v in values]}
            elif key not in takes or not self._times_are_the_networks(p, inner) or "edm" in self._hosting.predictions:
                raise ValueError(
                    f"BridgedScheduler.set_timesteps: {name} of diffusers cannot follow explicit {key} on this network "
                    f"({p.path.name} path); give num_inference_steps, or take a scheduler of gen_pipelines."
                )
            elif self._hosting.levels == "table":
                explicit = {key: [round(v) for v in values]}
        inner.set_timesteps(**{k: v for k, v in lay.items() if k in takes and v is not None}, **explicit)
        return inner

    def _times_are_the_networks(self, p: Parameterization, inner: Any) -> bool:
        """Whether the hosted scheduler's index counts the network's own training steps."""
        if not isinstance(p.path, DiscreteVPPath) or not hasattr(inner, "alphas_cumprod") or p.path.num_train_timesteps != len(inner.betas):
            return False
        return bool(torch.allclose(inner.alphas_cumprod.double().cpu(), p.path.alphas_cumprod, rtol=1e-5, atol=1e-7))

    def _their_levels(self, inner: Any) -> list[Level]:
        """The levels of the hosted scheduler's state before each step and after the last."""
        hosting, times = self._hosting, inner.timesteps.tolist()
        if hosting.levels == "table":
            bars = [float(inner.alphas_cumprod[int(t)]) for t in times]
            bars.append(float(getattr(inner, "final_alpha_cumprod", 1.0)))
            return [Level(math.sqrt(bar), math.sqrt(1 - bar)) for bar in bars]
        if hosting.levels == "ipndm":
            return [Level(float(a), float(s)) for a, s in zip(inner.alphas.tolist(), inner.betas.tolist(), strict=True)]
        sigmas = [float(s) for s in inner.sigmas][: len(times)] + [float(inner.sigmas[-1])]
        for i in range(1, len(times), 2) if hosting.between not in (None, "next") else ():
            if hosting.between == "geometric":
                sigmas[i] = math.sqrt(float(inner.sigmas[i - 1]) * float(inner.sigmas[i]))
            else:
                sigmas[i] = float(inner.sigmas_interpol[i if hosting.between == "interpol" else i - 1])
        if hosting.levels == "flow" or getattr(inner.config, "use_flow_sigmas", False):
            return [Level(1 - s, s) for s in sigmas]
        if hosting.levels == "pair":
            return [Level(1 / math.hypot(1, s), s / math.hypot(1, s)) for s in sigmas]
        return [Level(1.0, s) for s in sigmas]

    def _own_time(self, p: Parameterization, inner: Any, time: float, t: float, native: bool) -> float | None:
        """The network's native time that the hosted scheduler itself gives to its node, if that is the node at `t` but for its rounding."""
        if native:
            return time if abs(time - t) <= 1.0 else None
        if isinstance(p.path, LinearPath) and (self._hosting.levels == "flow" or getattr(inner.config, "use_flow_sigmas", False)):
            count = inner.config.num_train_timesteps
            return time / count if abs(time / count - t) <= 1 / count else None
        if p.path.name == "edm" and (p.prediction in self._hosting.predictions or self.config.get("timestep_type") == "continuous"):
            sigma = math.exp(time / 250) if p.prediction == "consistency" else math.exp(4 * time)
            return sigma if abs(sigma - t) <= 1e-4 * t else None
        return None

    def _cross(self, p: Parameterization, device: str | torch.device | None) -> None:
        """The crossing of every node, the network's times, and the stages of the loop."""
        inner = self._inner
        theirs, their_times = self._their_levels(inner), inner.timesteps.tolist()
        native = self._times_are_the_networks(p, inner)
        data = float(getattr(inner.config, "sigma_data", 0.5) or 0.5)
        boundary = float(getattr(inner.config, "sigma_min", 0.0) or 0.0)
        self._crossings: list[Crossing] = []
        self._affine: list[Affine] = []
        self._input_scales: list[float] = []
        ours: list[Level] = []
        times: list[float] = []
        network_times: list[float] = []
        outside = 0
        for i, level in enumerate(theirs):
            ratio = level.ratio
            here = on_path(p, ratio)
            to_ours = here.sigma / level.sigma if level.sigma > level.alpha else here.alpha / level.alpha
            to_ours = _snap(to_ours, 1.0)
            ours.append(here)
            if i == len(their_times):
                self._crossings.append(Crossing(to_ours, level))
                break
            t, moved = _time_at(p, ratio)
            outside += moved
            seen = here
            if moved or (p.path.name in ("ve", "edm") and math.isinf(ratio)):
                seen = p.path.level(t)
            else:
                t_own = self._own_time(p, inner, their_times[i], t, native)
                t = t if t_own is None else min(max(t_own, p.path.t_min), p.path.t_max)
            affine = p.affine(t, seen)
            scale = 1.0
            if moved:  # the network sees the end of its range, at the size that data of unit variance has there
                scale = math.hypot(*seen) / (math.hypot(*level) * to_ours)
                x_0 = (affine.x_0_from_x * scale, affine.x_0_from_output)
                eps = ((1 / to_ours - level.alpha * x_0[0]) / level.sigma, -level.alpha * x_0[1] / level.sigma)
                affine = Affine(*x_0, *eps)
            a, b = _target(self._prediction, ratio, data, boundary)
            self._crossings.append(
                Crossing(
                    to_ours,
                    level,
                    _snap(a * affine.x_0_from_x + b * affine.eps_from_x, 0.0),
                    _snap(a * affine.x_0_from_output + b * affine.eps_from_output, 1.0),
                    a,
                    b,
                )
            )
            self._affine.append(affine)
            self._input_scales.append(_snap(scale * p.input_scale(seen), 1.0))
            times.append(t)
            network_time = float(p.network_time(t))
            same = abs(network_time - their_times[i]) <= 2e-6 * max(1.0, abs(their_times[i]))
            network_times.append(their_times[i] if same else network_time)
        first = [self._hosting.between is None or i % 2 == 0 for i in range(len(times))]
        self._stages = [
            Stage(t, nt, ours[i], ours[i + 1], first=first[i], node=i) for i, (t, nt) in enumerate(zip(times, network_times, strict=True))
        ]
        self._scales_input = any(scale != 1.0 for scale in self._input_scales)
        whole = not inner.timesteps.is_floating_point() and all(float(t).is_integer() for t in network_times)
        tensor = torch.tensor(network_times, dtype=torch.float64).to(torch.int64 if whole else torch.float32)
        self._values: list[float] = tensor.tolist()
        self._timesteps = tensor.to(device) if device is not None else tensor
        self._stride = self._timesteps.element_size()
        self._sigmas = torch.tensor([sigma_of_level(p, level) for level in ours], dtype=torch.float32)
        self._warn(p, inner, outside, [int(t) for t in their_times])

    def _warn(self, p: Parameterization, inner: Any, outside: int, their_times: list[int]) -> None:
        name = self._class.__name__
        if outside:
            low, high = p.trained_lambda_range
            warnings.warn(
                f"{outside} of {len(self._stages)} nodes of {name}'s grid are outside the range that the network was trained on (lambda "
                f"{low:.3g} to {high:.3g}); there it is given the end of the range.",
                stacklevel=4,
            )
        if self._hosting.strided:
            stride = len(inner.alphas_cumprod) // inner.num_inference_steps
            prk = getattr(inner, "prk_timesteps", None)
            prk = 0 if prk is None else len(prk)
            nodes = sorted(set(their_times[prk:]), reverse=True)
            if any(a - b != stride for a, b in zip(nodes, nodes[1:], strict=False)):
                warnings.warn(
                    f"{name} of diffusers goes {stride} training steps in every step, which this grid does not, so its result is off "
                    "(diffusers issue 12633); use timestep_spacing='leading', a number of steps that divides the training's, or "
                    "DDIMScheduler of gen_pipelines.",
                    stacklevel=4,
                )

    @property
    def starts(self) -> list[int]:
        """The positions of `timesteps` where a loop may begin: all but those in the middle of a step, or the first alone."""
        return super().starts[:1] if self._hosting.from_the_start else super().starts

    @property
    def init_noise_sigma(self) -> float:
        """What unit noise is multiplied by to start: as the hosted scheduler starts, in the network's coordinates."""
        if self._stages is None:
            return super().init_noise_sigma
        return float(getattr(self._inner, "init_noise_sigma", 1.0)) * self._crossings[0].to_ours

    # ------------------------------------------------------------------ the loop

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The network's input for the state, (B, *event), dtype kept: the state itself wherever the network takes it as it is."""
        if self._stages is None or not self._scales_input:
            return sample
        if timestep is None:
            raise ValueError("BridgedScheduler.scale_model_input: this network's input depends on the timestep; pass it.")
        scale = self._input_scales[self._position(timestep, "scale_model_input")]
        return sample if scale == 1.0 else sample * scale

    def _ready(self, i: int, generator: torch.Generator | Sequence[torch.Generator] | None) -> Any:
        """The hosted scheduler, at position `i`."""
        if self._inner_at == i:
            return self._inner
        name = self._class.__name__
        if not self._stages[i].first or (i > 0 and self._hosting.from_the_start):
            raise ValueError(
                f"BridgedScheduler.step: {name} of diffusers cannot start at position {i} of its timesteps"
                f"{'' if self._hosting.from_the_start else ', in the middle of a step'}; start "
                f"{'at the first, or take a scheduler of gen_pipelines' if self._hosting.from_the_start else 'one earlier or later'}."
            )
        if not self._fresh:
            self._inner = self._start(self._network)
        self._fresh = False
        if hasattr(self._inner, "set_begin_index"):
            self._inner.set_begin_index(i)
        if hasattr(self._inner, "is_scale_input_called"):
            self._inner.is_scale_input_called = True
        if self._hosting.seeded and self._inner.config.noise_sampler_seed is None and generator is not None:
            draw = lambda g: int(torch.randint(2**62, (), generator=g, device=g.device))  # the tree's own seed, from the caller's generator
            many = isinstance(generator, (list, tuple))
            self._inner.noise_sampler_seed = [draw(g) for g in generator] if many else draw(generator)
        return self._inner

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        eta: float | None = None,
        use_clipped_model_output: bool | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """One step of the hosted scheduler.

        Args:
            model_output: the network's output, shape (B, C, *), or (B, 2 C, *) with a learned variance.
            timestep: the element of `timesteps` that the network was given.
            sample: the state, shape (B, C, *), in the coordinates of the network's path.
            eta: for hosted schedulers that have it (DDIM, TCD).
            use_clipped_model_output: for hosted schedulers that have it (DDIM).
            generator: one, or one per sample.
            return_dict: False gives the tuple (prev_sample, pred_original_sample).
        """
        i = self._begin(timestep)
        inner = self._ready(i, generator)
        if eta and "eta" not in self._step_takes:
            raise ValueError(f"BridgedScheduler.step: eta = {eta}, but {self._class.__name__} of diffusers has none; leave it out.")
        options = {"eta": eta, "use_clipped_model_output": use_clipped_model_output, "generator": generator}
        options = {k: v for k, v in options.items() if k in self._step_takes and v is not None}
        output, x, variance = self._split(model_output, sample)
        x_0 = self._x_0(output, x, i) if self._network.limits_x_0 else _when_read(self._affine[i], x, output)
        here, after = self._crossings[i], self._crossings[i + 1]
        theirs = x if here.to_ours == 1.0 else x * (1 / here.to_ours)
        if self._limits_here:
            eps = combine(1 / here.theirs.sigma, theirs, -here.theirs.alpha / here.theirs.sigma, x_0)
            output = combine(here.from_x_0, x_0, here.from_eps, eps)
        elif here.from_x != 0.0 or here.from_output != 1.0:
            output = combine(here.from_x, x, here.from_output, output)
        if variance is not None and getattr(inner.config, "variance_type", None) in ("learned", "learned_range"):
            output = torch.cat([output, variance.to(output.dtype)], 1)
        prev = inner.step(output, inner.timesteps[i], theirs, **options, return_dict=False)[0]
        self._inner_at = i + 1
        return self._end(prev if after.to_ours == 1.0 else prev * after.to_ours, x_0, sample, i, return_dict)
