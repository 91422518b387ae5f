"""What every scheduler of this library shares: the network it is bound to, the grid, the position in the loop, the config.

How to add a scheduler
----------------------
One file, named after the solver, with two things in it: a *pure update function* with the paper's equation, and a thin class.

1. The function takes the network's two estimates (x_0, eps), shape (B, *event), and the ends of the step as `Level`s (floats alpha, sigma;
   `.lambda_`, `.ratio`), draws no random numbers (noise comes in as a tensor) and knows nothing of time steps. So it is right on every
   path.
2. The class is `class NameScheduler(GaussianScheduler, SchedulerMixin)` (the second name must be in the file: diffusers looks for it when
   it loads) and sets what differs from the base:

   * `solver_defaults`: its own constructor arguments and their defaults. They are checked, stored in the config and read from `self.config`
     when they are needed (not in `__init__`: pipelines rewrite configs). A name that diffusers has means what it means there.
   * `grid_defaults`: values of `GridOptions` that differ on discrete VP paths (`{"timestep_spacing": "linspace"}`); on other paths the
     usual grid of the path is taken. `flow_grid = True` takes the flow grid there; `round_timesteps = True` rounds `linspace` to whole
     indices.
   * `network_defaults`: diffusers' keys of the network that the class assumes when nothing is known (`VP_NETWORK` or `FLOW_NETWORK`).
   * `order`: network evaluations per grid node, as diffusers counts them for image-to-image.
   * `plan(grid) -> list[Stage]`: one `Stage` per network evaluation. The base gives one per node. A solver with several stages (Heun, a
     corrector) returns them all in the order of evaluation, with `first=False` on those that do not begin a step, and puts what the stage
     needs in `data`; a solver that raises levels by noise (churn) sets `t`, `here` to the raised level and `raised` to the level after the
     noise that ends the stage. Whatever depends on the grid alone (solver coefficients in lambda, multistep weights) is computed here,
     once, as Python floats.
   * `reset()`: forget the history of a multistep solver. Called by `set_timesteps` and when the loop starts again or jumps.
   * `step(self, model_output, timestep, sample, ..., generator=None, return_dict=True)`, which reads

         i = self._begin(timestep)                                   # the position; checks the call, no synchronisation
         stage = self._stages[i]
         x_0, eps = self._predict(model_output, sample, i)           # float32 or better, clipped as the network's config says
         noise = self._noise(x_0, generator) if ... else None        # one generator, or one per sample
         return self._end(update(x_0, eps, stage.here, stage.there, noise), x_0, sample, i, return_dict)

     Where x moves to c_0 x_0 + c_eps eps (and noise), `prev, x_0 = self._move(model_output, sample, i)` does it instead of `_predict` and
     the update: the same result with the conversion and the move folded into one linear map, and x_0 left until somebody reads it. The
     coefficients are the stage's `weights`, by default those of `there`.
3. Register it: `_EXPORTS` of `gen_pipelines/__init__.py` and `SCHEDULERS` of `schedulers/__init__.py`. The tests loop over the registry.

The state is always in the coordinates of the network's own path, x = alpha x_0 + sigma eps.
"""

import copy
import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..hub.push import PushMixin
from ..processes.config import NETWORK_KEYS, OUR_KEYS, check_config_keys
from ..processes.discrete_vp import DiscreteVPPath
from ..processes.edm import EDMPath
from ..processes.grids import Grid, GridOptions, make_grid, sigma_of_level
from ..processes.level import Level
from ..processes.linear import LinearPath
from ..processes.parameterization import FIELD_NAMES, Affine, Parameterization

__all__ = ["FLOW_NETWORK", "VP_NETWORK", "GaussianScheduler", "SchedulerMixin", "SchedulerOutput", "Stage", "combine", "owned"]

# what diffusers' classes assume of a network when the constructor is not told
VP_NETWORK: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "prediction_type": "epsilon",
    "clip_sample": False,
}
FLOW_NETWORK: dict[str, Any] = {"num_train_timesteps": 1000, "prediction_type": "flow_prediction", "use_flow_sigmas": True}

_NOT_KEYS = (
    "round_timesteps",
    "interpolation_type",
)  # options of the class, not of the config (`EulerScheduler` has the second as its own)
_GRID_KEYS = tuple(f.name for f in fields(GridOptions) if f.name not in _NOT_KEYS)
# read by diffusers' pipelines to work out mu; they belong with the grid and change nothing here
_SHIFT_KEYS = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
_NETWORK_ARGUMENTS = (*VP_NETWORK, "clip_sample_range", "thresholding", "dynamic_thresholding_ratio", "sample_max_value", "variance_type")
_NETWORK_ARGUMENTS += ("use_flow_sigmas", "sigma_data", "clip_denoised", "invert_sigmas", "timestep_type", "parameterization")


class SchedulerOutput:
    """What `step` returns; by attribute, by name or position in brackets, or `to_tuple()`.

    Args:
        prev_sample: the sample after the step, shape (B, *event), the dtype of the sample that came in.
        pred_original_sample: the network's estimate of x_0 (clipped if its config says so), shape (B, *event), float32 or better; or a
            function that gives it. Loops seldom read it, so it is computed when they do.

    Raises:
        RuntimeError: `pred_original_sample` is read for the first time after the sample or the network's output were changed in place.
    """

    __slots__ = ("_x_0", "prev_sample")

    def __init__(self, prev_sample: Tensor, pred_original_sample: Tensor | Callable[[], Tensor] | None = None) -> None:
        self.prev_sample = prev_sample
        self._x_0 = pred_original_sample

    @property
    def pred_original_sample(self) -> Tensor | None:
        """The estimate of x_0, shape (B, *event)."""
        if callable(self._x_0):
            self._x_0 = self._x_0()
        return self._x_0

    def to_tuple(self) -> tuple[Tensor, Tensor | None]:
        """(prev_sample, pred_original_sample)."""
        return self.prev_sample, self.pred_original_sample

    def __getitem__(self, key: int | str | slice) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]

    def __repr__(self) -> str:
        return f"SchedulerOutput(prev_sample={self.prev_sample}, pred_original_sample={self.pred_original_sample})"


@dataclass
class Stage:
    """One network evaluation.

    Args:
        t: native time of the path.
        network_time: what the network is given.
        here: the level of the sample that the network sees.
        there: the level at which this stage lands.
        raised: the level after noise is added at the end of the stage; None adds none.
        first: whether the stage begins a step (a predictor); loops may start there.
        node: the number of the grid node.
        weights: what x_0 and eps are multiplied by in `_move`; None is (alpha, sigma) of `there`.
        data: whatever else the solver computed for this stage.
    """

    t: float
    network_time: float
    here: Level
    there: Level
    raised: Level | None = None
    first: bool = True
    node: int = 0
    weights: tuple[float, float] | None = None
    data: Any = None


def combine(a: float, x: Tensor, b: float, y: Tensor) -> Tensor:
    """a x + b y with no needless operation; a new tensor unless it is x or y itself."""
    if a == 0.0:
        return y if abs(b - 1.0) < 1e-12 else y * b
    if abs(a - 1.0) < 1e-12:
        return x if b == 0.0 else x.add(y, alpha=b)
    return x * a if b == 0.0 else (x * a).add_(y, alpha=b)


def owned(estimate: Tensor, model_output: Tensor) -> Tensor:
    """An estimate that is kept: a copy if it lies in the network's own output, which a compiled network may overwrite."""
    return estimate.clone() if estimate.data_ptr() == model_output.data_ptr() else estimate


def _same_time(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-6 * max(1.0, abs(a))  # times may have been through float32


_WIDE = (torch.float32, torch.float64)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in _WIDE else tensor.float()


def _when_read(x_0: Affine, x: Tensor, output: Tensor) -> Tensor | Callable[[], Tensor]:
    """x_0 from the state and the network's output, left until it is read; at once in inference mode, where no change would be noticed."""
    try:
        versions = x._version, output._version
    except RuntimeError:  # tensors of inference mode do not count how often they were written to
        return combine(x_0.x_0_from_x, x, x_0.x_0_from_output, output)

    def estimate() -> Tensor:
        if versions != (x._version, output._version):
            raise RuntimeError(
                "SchedulerOutput.pred_original_sample is computed when it is first read, and the sample or the network's output that it is "
                "computed from has been changed in place since; read it earlier, or call step with return_dict=False: that computes it at "
                "once."
            )
        return combine(x_0.x_0_from_x, x, x_0.x_0_from_output, output)

    return estimate


class GaussianScheduler(PushMixin, SchedulerMixin, ConfigMixin):
    """Base class of the schedulers; see the module's docstring for how to write one.

    Constructor arguments, all by keyword (only `num_train_timesteps` may come by position): the solver's own (`solver_defaults`), the
    grid's (diffusers' keys, `GridOptions`) and the network's (diffusers' keys, or `parameterization=`). A scheduler that is told nothing
    about a network assumes diffusers' default for its class until it is bound to one. `from_config`, `from_pretrained` and `bind` give a
    bound scheduler.
    """

    config_name = "scheduler_config.json"
    order: int = 1
    solver_defaults: ClassVar[dict[str, Any]] = {}
    grid_defaults: ClassVar[dict[str, Any]] = {}
    network_defaults: ClassVar[dict[str, Any]] = VP_NETWORK
    flow_grid: ClassVar[bool] = False
    round_timesteps: ClassVar[bool] = False
    jumps: ClassVar[bool] = False  # whether the rule is for networks that jump to data in one evaluation
    _compatibles: ClassVar[list[str]] = []

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:  # the bridge, whose arguments are another scheduler's
            return
        OUR_KEYS.update(cls.solver_defaults)
        grid = {f.name: f.default for f in fields(GridOptions) if f.name in _GRID_KEYS} | _SHIFT_KEYS | cls.grid_defaults
        network = {k: cls.network_defaults.get(k) for k in _NETWORK_ARGUMENTS}
        arguments = {**network, **grid, **cls.solver_defaults}
        kind = inspect.Parameter
        parameters = [kind("self", kind.POSITIONAL_ONLY)] + [
            kind(k, kind.POSITIONAL_OR_KEYWORD if k == "num_train_timesteps" else kind.KEYWORD_ONLY, default=v)
            for k, v in arguments.items()
        ]
        signature = inspect.Signature(parameters)

        def __init__(self: "GaussianScheduler", *args: Any, **kwargs: Any) -> None:
            try:
                given = dict(signature.bind(self, *args, **kwargs).arguments)
            except TypeError as error:
                raise TypeError(f"{cls.__name__}: {error}; it takes {', '.join(sorted(arguments))}.") from None
            given.pop("self")
            GaussianScheduler._setup(self, given)

        __init__.__signature__ = signature  # diffusers and help() read the arguments from here
        __init__.__qualname__ = f"{cls.__qualname__}.__init__"
        cls.__init__ = __init__

    # ------------------------------------------------------------------ construction and config

    def _setup(self, given: dict[str, Any]) -> None:
        self.__module__ = (
            "gen_pipelines"  # what pipelines record as the library: it imports lazily, the file's own module may never be imported
        )
        self._bound = self._corrects_network = False
        if isinstance(given.get("parameterization"), Parameterization):
            given |= {"parameterization": None, **given["parameterization"].to_config()}
        self._explicit = {k: v for k, v in given.items() if v is not None or k in self.solver_defaults}
        self._write_config(self._network_of(self._explicit), {})
        self._clear()

    def _network_of(self, given: dict[str, Any]) -> Parameterization:
        """What the constructor's arguments say of the network, completed by the class's defaults."""
        network = {k: v for k, v in given.items() if k in _NETWORK_ARGUMENTS or k in ("sigma_schedule", "sigma_min", "sigma_max")}
        if network.get("prediction_type") == "flow_prediction" or network.get("use_flow_sigmas") or network.get("parameterization"):
            return Parameterization.from_config(network)
        if "sigma_data" in network:
            return Parameterization.from_config(network if "clip_denoised" in network else {"sigma_schedule": "karras", **network})
        betas = any(k in network for k in ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"))
        defaults = VP_NETWORK if betas and "beta_start" not in self.network_defaults else self.network_defaults
        return Parameterization.from_config({**defaults, **network})

    def _write_config(self, p: Parameterization, others: dict[str, Any]) -> None:
        """The config: what the network is, the grid's and the solver's arguments, and the keys of other schedulers that came along."""
        network = p.to_config()
        kept = {k: v for k, v in others.items() if k not in NETWORK_KEYS and not k.startswith("_")}
        config = {**kept, **{k: v for k, v in self.solver_defaults.items() if k not in kept}}
        if isinstance(p.path, DiscreteVPPath):
            config = {**self.grid_defaults, **config}
            config.setdefault("steps_offset", 0)
        elif isinstance(p.path, LinearPath):
            config = {"shift": config.get("flow_shift") or 1.0, "use_dynamic_shifting": False, "time_shift_type": "exponential", **config}
            config = {**_SHIFT_KEYS, **config, "flow_shift": config["shift"]}  # diffusers' DPM-Solver and UniPC know it by the other name
        explicit = {k: v for k, v in self._explicit.items() if k not in NETWORK_KEYS}
        config |= explicit
        if "shift" in explicit and "flow_shift" in config:
            config["flow_shift"] = config["shift"]
        elif explicit.get("flow_shift") is not None and "shift" in config:
            config["shift"] = config["flow_shift"]
        if isinstance(p.path, EDMPath):  # there they are the network's own range
            config = {k: v for k, v in config.items() if k not in ("sigma_min", "sigma_max")}
            if "sigma_schedule" in (*others, *explicit):
                network["sigma_schedule"] = explicit.get("sigma_schedule") or others["sigma_schedule"]
        self._internal_dict = FrozenDict({**config, **network, "_class_name": type(self).__name__})

    @classmethod
    def from_config(cls, config: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A scheduler of this class for the network (and, where it applies, on the grid) of another scheduler's config.

        Args:
            config: a scheduler's `.config`, of this library or of diffusers, or the content of a `scheduler_config.json`. All of it counts,
                values left at their default as well.
            kwargs: arguments of the constructor, and fields of `Parameterization`; they win.

        Raises:
            ValueError: a key unknown to this library and to diffusers; a config that does not say what the network is.
        """
        if not isinstance(config, dict):
            raise TypeError(
                f"{cls.__name__}.from_config: config is a {type(config).__name__}; give a dict, or use from_pretrained for a folder."
            )
        check_config_keys({**config, **{k: v for k, v in kwargs.items() if k not in FIELD_NAMES}}, f"{cls.__name__}.from_config")
        # sigma_min and sigma_max may be the grid's alone; where they are the network's they are in its config as well
        overrides = {k: v for k, v in kwargs.items() if k in NETWORK_KEYS or k in FIELD_NAMES or k in ("sigma_min", "sigma_max")}
        network = Parameterization.from_config(config, **{k: v for k, v in overrides.items() if k != "parameterization"})
        if isinstance(kwargs.get("parameterization"), Parameterization):
            network = kwargs["parameterization"]
        scheduler = cls()
        scheduler._explicit = {k: v for k, v in kwargs.items() if k not in FIELD_NAMES and k not in NETWORK_KEYS}
        scheduler._write_config(network, {k: v for k, v in config.items() if k not in NETWORK_KEYS or k == "sigma_schedule"})
        scheduler._bound, scheduler._corrects_network = True, bool(set(overrides) - {"sigma_min", "sigma_max"})
        return (scheduler, {}) if return_unused_kwargs else scheduler

    @property
    def parameterization(self) -> Parameterization:
        """What the network was trained to do, as the config says now."""
        cached = self.__dict__.get("_network_cache")
        if cached is None or cached[0] is not self._internal_dict:
            config = {k: v for k, v in self._internal_dict.items() if k != "_use_default_values"}
            cached = (self._internal_dict, Parameterization.from_config(config))
            self._network_cache = cached
        return cached[1]

    @property
    def is_bound(self) -> bool:
        """Whether the network comes from a config or from `bind`, rather than being the class's default or a constructor's argument."""
        return self._bound

    @property
    def corrects_network(self) -> bool:
        """Whether `from_config` was told something about the network by keyword: a pipeline takes that over instead of binding it away."""
        return self._corrects_network

    def bind(self, parameterization: Parameterization, grid: dict[str, Any] | None = None) -> Any:
        """A copy of this scheduler for a network; this one is not changed.

        Args:
            parameterization: what the network was trained to do.
            grid: another scheduler's config, whose grid (shift, spacing) is taken over where this scheduler was told none.

        Raises:
            ValueError: an argument of this scheduler's constructor contradicts the network.
        """
        if not isinstance(parameterization, Parameterization):
            raise TypeError(f"{type(self).__name__}.bind: got a {type(parameterization).__name__}; give a Parameterization.")
        said = {k: v for k, v in self._explicit.items() if k in NETWORK_KEYS and k not in ("sigma_schedule", "parameterization")}
        fixed = str(said.get("variance_type")).startswith("fixed") and not parameterization.learned_variance
        if fixed:  # how much noise the sampler adds is its own choice, where the network did not learn it
            parameterization = parameterization.with_(variance=said.pop("variance_type"))
        theirs = {**VP_NETWORK, **parameterization.to_config()} if said else {}
        for key, value in said.items():
            fits = theirs.get(key) == (list(value) if isinstance(value, tuple) else value) or not (value or theirs.get(key))
            if key.startswith("beta") and not isinstance(parameterization.path, DiscreteVPPath):
                fits = False
            if not fits:
                raise ValueError(
                    f"{type(self).__name__}: {key}={value!r} was given, but the network has {theirs.get(key)!r} "
                    f"({parameterization.path.name} path, {parameterization.prediction}); leave the argument out, or correct the network "
                    f"with from_config(config, {key}={value!r})."
                )
        new = copy.copy(self)
        taken = {k: v for k, v in (grid or {}).items() if k in _GRID_KEYS or k in _SHIFT_KEYS}
        old = {k: v for k, v in self._internal_dict.items() if k in _GRID_KEYS or k in self.solver_defaults} if self._bound else {}
        new._write_config(parameterization, {**taken, **old})
        new._bound, new._corrects_network = True, False
        new._clear()
        return new

    # ------------------------------------------------------------------ the grid

    def _clear(self) -> None:
        self._stages: list[Stage] | None = None
        self._timesteps: Tensor | None = None
        self._moved_grid: bool | None = None
        self._sigmas: Tensor | None = None
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self.num_inference_steps: int | None = None
        self.reset()

    def reset(self) -> None:
        """Forget what earlier steps left behind; multistep solvers override it."""

    def grid_options(self) -> GridOptions:
        """The grid that the config asks for."""
        p = self.parameterization
        defaults = dict(self.grid_defaults) if isinstance(p.path, DiscreteVPPath) else {}
        if self.flow_grid and not isinstance(p.path, DiscreteVPPath):
            defaults["timestep_spacing"] = "flow"
        defaults["round_timesteps"] = self.round_timesteps
        if "interpolation_type" in self.solver_defaults:
            defaults["interpolation_type"] = self.config["interpolation_type"]
        return GridOptions.from_config({k: v for k, v in self.config.items() if k in _GRID_KEYS}, **defaults)

    def plan(self, grid: Grid) -> list[Stage]:
        """One stage per network evaluation; see the module's docstring."""
        nodes = zip(grid.times, grid.network_times, grid.levels[:-1], grid.levels[1:], strict=True)
        return [Stage(t, network_time, here, there, node=i) for i, (t, network_time, here, there) in enumerate(nodes)]

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
        mu: float | None = None,
    ) -> None:
        """Lay the grid and compute every coefficient of the steps on it.

        Args:
            num_inference_steps: how many grid nodes; `len(self.timesteps)` is the number of network evaluations.
            device: where `timesteps` is put.
            timesteps: instead, exactly what the network is to see, noise first; never shifted.
            sigmas: instead, noise levels, ending in 0: sigma / alpha, or t on the linear path, where they are shifted as in diffusers.
            mu: the shift for `use_dynamic_shifting`.

        Raises:
            ValueError: contradicting or unusable arguments.
        """
        as_list = lambda v: v.tolist() if hasattr(v, "tolist") else v
        p = self.parameterization
        self._warn_of_jumps(p)
        grid = make_grid(p, num_inference_steps, self.grid_options(), as_list(timesteps), as_list(sigmas), mu)
        self._clear()
        self.num_inference_steps = len(grid)
        self._grid = grid
        self._network = p
        self._stages = self.plan(grid)
        self._affine: list[Affine] = [p.affine(s.t, s.here) for s in self._stages]
        self._input_scales = [p.input_scale(s.here) for s in self._stages]
        self._moves = [a.weighted(*(s.weights or s.there)) for s, a in zip(self._stages, self._affine, strict=True)]
        times = [s.network_time for s in self._stages]
        whole = p.time_input == "index" and all(float(t).is_integer() for t in times)
        self._timesteps = torch.tensor(times, dtype=torch.float64).to(torch.int64 if whole else torch.float32)
        self._values: list[float] = self._timesteps.tolist()
        self._timesteps = self._timesteps.to(device) if device is not None else self._timesteps
        self._stride = self._timesteps.element_size()
        ends = [*(s.here for s in self._stages), self._stages[-1].there]
        self._sigmas = torch.tensor([sigma_of_level(p, level) for level in ends], dtype=torch.float32)

    def _warn_of_jumps(self, p: Parameterization) -> None:
        """Says once what an ODE solver or a diffusion sampler makes of a consistency network."""
        if not p.has_path and not self.jumps and not self.__dict__.get("_warned_of_jumps"):
            self._warned_of_jumps = True
            warnings.warn(
                f"{type(self).__name__} on a consistency network: its x_0 is the end of the curve through x, not the mean of the data that "
                "fit x, so steps along it give samples of another distribution. Take ConsistencyScheduler.",
                stacklevel=3,
            )

    def _need_timesteps(self, what: str) -> list[Stage]:
        if self._stages is None:
            raise ValueError(f"{type(self).__name__}.{what}: there is no schedule yet; call set_timesteps(...) first.")
        return self._stages

    @property
    def timesteps(self) -> Tensor:
        """What the network is given, one per evaluation: int64 for whole indices, else float32; on the device of `set_timesteps`."""
        self._need_timesteps("timesteps")
        return self._timesteps

    @property
    def sigmas(self) -> Tensor:
        """sigma / alpha (t on the linear path) at each network evaluation and at the end, float32 on the CPU."""
        self._need_timesteps("sigmas")
        return self._sigmas

    @property
    def levels(self) -> list[Level]:
        """(alpha, sigma) of the state at each network evaluation and at the end, in the coordinates of the network's path."""
        stages = self._need_timesteps("levels")
        return [*(stage.here for stage in stages), stages[-1].there]

    @property
    def starts(self) -> list[int]:
        """The positions of `timesteps` where a loop may begin (image-to-image), one per step, noise first."""
        return [i for i, stage in enumerate(self._need_timesteps("starts")) if stage.first]

    def at(self, timestep: float | Tensor) -> tuple[Level, Affine]:
        """The level of the state at an element of `timesteps`, and x_0 and eps there as linear maps of the state and the network's output
        (without the limits of x_0); it reads no tensor."""
        i = self._position(timestep, "at")
        return self._stages[i].here, self._affine[i]

    @property
    def init_noise_sigma(self) -> float:
        """What unit noise is multiplied by to start: 1 on variance-preserving and linear paths, the first sigma on the others."""
        path = self.parameterization.path
        if path.name not in ("ve", "edm"):
            return 1.0
        return self._stages[0].here.sigma if self._stages is not None else path.level(self.parameterization.trained_t_range[1]).sigma

    # ------------------------------------------------------------------ the position in the loop

    @property
    def step_index(self) -> int | None:
        """The position in `timesteps` of the next `step`; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Where the loop begins, if a pipeline said so."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start the loop at this position of `timesteps` (image-to-image)."""
        self._begin_index = begin_index

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """The position of a timestep, by value (it reads a tensor on an accelerator); if it is there twice, the one that begins a step."""
        self._need_timesteps("index_for_timestep")
        values = self._values if schedule_timesteps is None else schedule_timesteps.tolist()
        value = float(timestep.reshape(-1)[0]) if isinstance(timestep, Tensor) else float(timestep)
        return self._find(value, values, "index_for_timestep")

    def _find(self, value: float, values: list[float], what: str) -> int:
        found = [i for i, v in enumerate(values) if _same_time(v, value)]
        if not found:
            raise ValueError(
                f"{type(self).__name__}.{what}: timestep {value:g} is not in the current schedule ({len(values)} steps from "
                f"{values[0]:g} to {values[-1]:g}); call set_timesteps(...) first, or pass an element of scheduler.timesteps."
            )
        return next((i for i in found if i < len(self._stages) and self._stages[i].first), found[0])

    def _position(self, timestep: float | Tensor, what: str) -> int:
        """The position of `timestep`: elements of `timesteps` by their address, CPU tensors and numbers by value, never with a
        synchronisation in the middle of a loop."""
        self._need_timesteps(what)
        expected = self._begin_index if self._step_index is None else self._step_index
        if isinstance(timestep, Tensor):
            offset = timestep.data_ptr() - self._timesteps.data_ptr()  # addresses are unique across devices
            if 0 <= offset < len(self._values) * self._stride and timestep.dtype is self._timesteps.dtype:
                return offset // self._stride
            if timestep.device.type != "cpu" and expected is not None:
                return expected  # a copy on an accelerator: reading it would stop the queue, so the counter is trusted
            timestep = timestep.reshape(-1)[0].item()
        if expected is not None and expected < len(self._values):
            if _same_time(self._values[expected], timestep):
                return expected
        return self._find(float(timestep), self._values, what)

    def _begin(self, timestep: float | Tensor) -> int:
        """The position for this `step`. A loop that starts again or jumps is followed, and forgets the history."""
        i = self._step_index
        if i and i < len(self._values) and isinstance(timestep, Tensor):
            if timestep.data_ptr() == self._timesteps.data_ptr() + i * self._stride:
                return i  # as in nearly every step: the next element of `timesteps`
        i = self._position(timestep, "step")
        if i != self._step_index:
            if self._step_index is not None or i != 0:
                self.reset()
            self._step_index = i
        return i

    # ------------------------------------------------------------------ parts of a step

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The network's input for the state: c_in * sample for preconditioned networks, else the sample itself; (B, *event), dtype kept."""
        if self.parameterization.sigma_data is None:
            return sample
        if timestep is None:
            raise ValueError(f"{type(self).__name__}.scale_model_input: this network's input depends on the timestep; pass it.")
        return sample * self._input_scales[self._position(timestep, "scale_model_input")]

    def _split(self, model_output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(output, sample, learned variance or None), float32 or better."""
        variance = None
        if model_output.shape != sample.shape:
            model_output, variance = self._network.split_variance(model_output, sample)
        return _wide(model_output), _wide(sample), variance

    def _x_0(self, model_output: Tensor, sample: Tensor, i: int) -> Tensor:
        """x_0 of stage `i` from what `_split` returned, limited as the network's config says."""
        a = self._affine[i]
        x_0 = combine(a.x_0_from_x, sample, a.x_0_from_output, model_output)
        return self._network.limit_x_0(x_0) if self._network.limits_x_0 else x_0

    def _predict(self, model_output: Tensor, sample: Tensor, i: int, consistent: bool = True) -> tuple[Tensor, Tensor]:
        """(x_0, eps) of stage `i`, each (B, *event), float32 or better.

        Where the network's config limits x_0, eps goes with the limited x_0 (`consistent`), or stays the network's own.
        """
        model_output, sample, _ = self._split(model_output, sample)
        a = self._affine[i]
        x_0 = self._x_0(model_output, sample, i)
        if consistent and self._network.limits_x_0:
            here = self._stages[i].here
            return x_0, combine(1 / here.sigma, sample, -here.alpha / here.sigma, x_0)
        return x_0, combine(a.eps_from_x, sample, a.eps_from_output, model_output)

    def _move(self, model_output: Tensor, sample: Tensor, i: int) -> tuple[Tensor, Tensor | Callable[[], Tensor]]:
        """(c_0 x_0 + c_eps eps, x_0) with the `weights` of stage `i`, a new tensor and what `_end` takes; float32 or better.

        With the weights of `there` it is the first-order move of every deterministic solver (DDIM, Euler in sigma, in flow time: Salimans
        & Ho 2022, https://arxiv.org/abs/2202.00512, eq. 8).
        """
        stage = self._stages[i]
        if self._network.limits_x_0:
            x_0, eps = self._predict(model_output, sample, i)
            c_0, c_eps = stage.weights or stage.there
            return combine(c_0, x_0, c_eps, eps), x_0
        model_output, sample, _ = self._split(model_output, sample)
        from_x, from_output = self._moves[i]
        x_0 = _when_read(self._affine[i], sample, model_output)
        return owned(combine(from_x, sample, from_output, model_output), model_output), x_0

    def _weigh(self, model_output: Tensor, sample: Tensor, i: int, c_0: float, c_eps: float) -> Tensor:
        """c_0 x_0 + c_eps eps with the estimates of stage `i`, float32 or better; it may be the network's own tensor."""
        if self._network.limits_x_0:
            x_0, eps = self._predict(model_output, sample, i)
            return combine(c_0, x_0, c_eps, eps)
        model_output, sample, _ = self._split(model_output, sample)
        from_x, from_output = self._affine[i].weighted(c_0, c_eps)
        return combine(from_x, sample, from_output, model_output)

    def _noise(self, like: Tensor, generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
        """Standard normal noise of the shape, dtype and device of `like`, drawn in diffusers' order; one generator, or one per sample."""
        if isinstance(generator, (list, tuple)):
            generator = list(generator)
            if len(generator) not in (1, len(like)) or (len(generator) == 1 and len(like) > 1):
                raise ValueError(
                    f"{type(self).__name__}.step: {len(generator)} generators for a batch of {len(like)}; give one, or a list with one "
                    "per sample."
                )
        return randn_tensor(like.shape, generator=generator, device=like.device, dtype=like.dtype)

    def _end(
        self, prev: Tensor, x_0: Tensor | Callable[[], Tensor], sample: Tensor, i: int, return_dict: bool
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """Advance the counter and hand over the result in the sample's dtype."""
        self._step_index = i + 1
        if prev.dtype is not sample.dtype:
            prev = prev.to(sample.dtype)
        if return_dict:
            return SchedulerOutput(prev, x_0)
        return prev, x_0() if callable(x_0) else x_0

    # ------------------------------------------------------------------ noising

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x_0 + sigma eps in the coordinates of the network's path.

        Args:
            original_samples, noise: shape (B, *event).
            timesteps: what the network would be given, shape (B,) or a single one; elements of `self.timesteps` have exactly their stage's
                level. After `set_begin_index` the level is that of the loop's position, as in diffusers.
        Returns: shape (B, *event), dtype of the samples.
        """
        x_0, eps = _wide(original_samples), _wide(noise)
        level = self._level_for(timesteps)
        if level is not None:
            noisy = (x_0 * level.alpha).add_(eps, alpha=level.sigma)
        else:
            timesteps = torch.as_tensor(timesteps, device=x_0.device).reshape((-1,) + (1,) * (x_0.ndim - 1))
            alpha, sigma = self._levels_at(timesteps, x_0.dtype)
            if self._stages is not None and self._moved:
                alpha, sigma = self._levels_of_stages(timesteps, alpha, sigma)
            noisy = torch.addcmul(alpha * x_0, sigma, eps)
        return noisy.to(original_samples.dtype)

    def _levels_at(self, timesteps: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at what the network would be given, each of the shape of `timesteps`; whole indices are looked up."""
        p = self.parameterization
        if timesteps.dtype in (torch.int64, torch.int32) and p.time_input == "index":
            key = (p, timesteps.device, dtype)
            if self.__dict__.get("_table_key") != key:
                bars = p.path.alphas_cumprod
                self._table = torch.stack([bars.sqrt(), (1 - bars).sqrt()]).to(timesteps.device, dtype)
                self._table_key = key
            try:
                return self._table.index_select(1, timesteps.reshape(-1)).view(2, *timesteps.shape).unbind()
            except (IndexError, RuntimeError) as error:
                if timesteps.device.type != "cpu" or (0 <= timesteps.min() and timesteps.max() < len(self)):
                    raise
                raise ValueError(
                    f"{type(self).__name__}: timesteps are whole numbers from 0 to {len(self) - 1}, got {timesteps.flatten().tolist()[:8]}."
                ) from error
        if isinstance(p.path, LinearPath):  # nothing there that needs float64
            t = p.path_time(timesteps.to(dtype))
            return 1 - t, t
        t = p.path_time(timesteps if timesteps.device.type == "mps" else timesteps.double())
        return p.path.alpha(t).to(dtype), p.path.sigma(t).to(dtype)

    @property
    def _moved(self) -> bool:
        """Whether a stage's level is not the one that the network's path has at what the network is given (rounded, respaced grids)."""
        if self._moved_grid is None:
            alpha, sigma = self._levels_at(self._timesteps.cpu(), torch.float64)
            here = torch.tensor([(stage.here.alpha, stage.here.sigma) for stage in self._stages], dtype=torch.float64)
            self._moved_grid = not torch.allclose(torch.stack([alpha, sigma], 1), here, rtol=1e-4, atol=1e-6)
        return self._moved_grid

    def _levels_of_stages(self, timesteps: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The levels with those of the stages in place of the path's, for elements of `self.timesteps`; it waits for no device."""
        same = timesteps.reshape(-1, 1) == self._timesteps.to(timesteps.device)                        # (B, S)
        found, which = same.any(1).view(timesteps.shape), same.to(torch.uint8).argmax(1)
        ends = torch.tensor([(stage.here.alpha, stage.here.sigma) for stage in self._stages], dtype=alpha.dtype).to(alpha.device)
        ours = ends[which].unbind(1)
        return tuple(torch.where(found, own.view(timesteps.shape), old) for own, old in zip(ours, (alpha, sigma), strict=True))

    def _level_for(self, timesteps: Tensor) -> Level | None:
        """The level where it is known without reading the tensor."""
        if self._stages is None:
            return None
        if self._begin_index is not None:
            i = self._begin_index if self._step_index is None else self._step_index
            return self._stages[i].here if i < len(self._stages) else self._stages[-1].there
        if isinstance(timesteps, Tensor) and timesteps.numel() == 1 and timesteps.device == self._timesteps.device:
            offset = timesteps.data_ptr() - self._timesteps.data_ptr()
            if 0 <= offset < len(self._values) * self._stride:
                return self._stages[offset // self._stride].here
        return None

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha eps - sigma x_0, what a network of `v_prediction` is trained on; arguments and shapes as in `add_noise`.

        References: Salimans and Ho 2022, appendix D, https://arxiv.org/abs/2202.00512
        """
        x_0, eps = _wide(sample), _wide(noise)
        timesteps = torch.as_tensor(timesteps, device=x_0.device).reshape((-1,) + (1,) * (x_0.ndim - 1))
        alpha, sigma = self._levels_at(timesteps, x_0.dtype)
        return (alpha * eps - sigma * x_0).to(sample.dtype)

    @property
    def alphas_cumprod(self) -> Tensor:
        """alpha^2 of the network's training steps, float32, as diffusers' training scripts read it; only discrete paths have it."""
        return self._table_of("alphas_cumprod")

    @property
    def betas(self) -> Tensor:
        """The variances of the training's forward steps, float32; only discrete paths have them."""
        return self._table_of("betas")

    def _table_of(self, name: str) -> Tensor:
        path = self.parameterization.path
        if not isinstance(path, DiscreteVPPath):
            raise AttributeError(f"{type(self).__name__} has no {name} on this network: its path ({path.name}) is no table of steps.")
        return getattr(path, name).float()

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` under the name and argument order of diffusers' flow-matching schedulers."""
        return self.add_noise(sample, noise, timestep)

    def __len__(self) -> int:
        path = self.parameterization.path
        return path.num_train_timesteps if isinstance(path, DiscreteVPPath) else int(self.config.get("num_train_timesteps") or 1000)
