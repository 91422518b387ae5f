"""What a network was trained to do: its path, what its output means, and the time it is given."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import conversions as C
from .level import Level
from .linear import LinearPath
from .path import Path
from .paths import PATHS, path_from_config

__all__ = ["PREDICTIONS", "TIME_INPUTS", "VARIANCES", "Affine", "Parameterization"]

PREDICTIONS = ("epsilon", "sample", "v_prediction", "score", "flow_prediction", "edm", "consistency")
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")


class TimeInput(NamedTuple):
    """How the network is told the time: `forward` from the path's native time, `inverse` back; `kind` says which paths have it."""

    kind: str  # "index" (discrete paths), "unit" (t in [0, 1]), "sigma" (any path)
    forward: Callable[[Any, Path], Any]
    inverse: Callable[[Any, Path], Any]


def _log(value: Any) -> Any:
    return value.log() if isinstance(value, Tensor) else math.log(value)


def _exp(value: Any) -> Any:
    return value.exp() if isinstance(value, Tensor) else math.exp(value)


def _sigma_of_t(t: Any, path: Path) -> Any:
    """sigma / alpha, and t itself on the linear path (its own name for the noise level)."""
    if isinstance(path, LinearPath) or path.name in ("ve", "edm"):
        return t
    return path.level(t).ratio if not isinstance(t, Tensor) else torch.exp(-path.lambda_(t))


def _t_of_sigma(sigma: Any, path: Path) -> Any:
    if isinstance(path, LinearPath) or path.name in ("ve", "edm"):
        return sigma
    return path.t_from_lambda(-sigma.log()) if isinstance(sigma, Tensor) else float(path.t_from_lambda(-math.log(sigma)))


TIME_INPUTS: dict[str, TimeInput] = {
    "index": TimeInput("index", lambda t, p: t, lambda c, p: c),
    "index_scaled": TimeInput("index", lambda t, p: t * (1000 / p.num_train_timesteps), lambda c, p: c * (p.num_train_timesteps / 1000)),
    "t": TimeInput("unit", lambda t, p: t, lambda c, p: c),
    "1 - t": TimeInput("unit", lambda t, p: 1 - t, lambda c, p: 1 - c),
    "1000 t": TimeInput("unit", lambda t, p: 1000 * t, lambda c, p: c / 1000),
    "999 t": TimeInput("unit", lambda t, p: 999 * t, lambda c, p: c / 999),
    "1000 (1 - t)": TimeInput("unit", lambda t, p: 1000 * (1 - t), lambda c, p: 1 - c / 1000),
    "999 (1 - t)": TimeInput("unit", lambda t, p: 999 * (1 - t), lambda c, p: 1 - c / 999),
    "sigma": TimeInput("sigma", _sigma_of_t, _t_of_sigma),
    "log(sigma)/4": TimeInput("sigma", lambda t, p: _log(_sigma_of_t(t, p)) / 4, lambda c, p: _t_of_sigma(_exp(c * 4), p)),
    "log(sigma/2)": TimeInput("sigma", lambda t, p: _log(_sigma_of_t(t, p) / 2), lambda c, p: _t_of_sigma(2 * _exp(c), p)),
    "250 log(sigma)": TimeInput("sigma", lambda t, p: 250 * _log(_sigma_of_t(t, p)), lambda c, p: _t_of_sigma(_exp(c / 250), p)),
}


def _squeeze(name: str) -> str:
    return re.sub(r"[\s_*]", "", name.lower())


def _canonical_time_input(name: str) -> str:
    """The registered spelling: spaces, underscores and `*` do not matter."""
    for known in TIME_INPUTS:
        if _squeeze(known) == _squeeze(name):
            return known
    if match := re.fullmatch(r"(\d+)t", _squeeze(name)):
        return f"{int(match[1])} t"
    raise ValueError(
        f"Parameterization: time_input {name!r} is not known; use one of {', '.join(map(repr, TIME_INPUTS))}, or a whole number times t."
    )


def _time_input(name: str) -> TimeInput:
    if name in TIME_INPUTS:
        return TIME_INPUTS[name]
    scale = int(name.split()[0])  # a network trained on another count of steps, "640 t"
    return TimeInput("unit", lambda t, p: scale * t, lambda c, p: c / scale)


class Affine(NamedTuple):
    """x_0 = x_0_from_x * x + x_0_from_output * output, and the same for eps: one time's conversion, Python floats."""

    x_0_from_x: float
    x_0_from_output: float
    eps_from_x: float
    eps_from_output: float

    def weighted(self, c_0: float, c_eps: float) -> tuple[float, float]:
        """(from_x, from_output) of c_0 x_0 + c_eps eps."""
        return c_0 * self.x_0_from_x + c_eps * self.eps_from_x, c_0 * self.x_0_from_output + c_eps * self.eps_from_output


def _expand(value: Tensor, like: Tensor) -> Tensor:
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim)) if value.ndim else value


@dataclass(frozen=True)
class Parameterization:
    """What a network was trained to do; frozen, hashable, and serialisable by `to_config` and `from_config`.

    Args:
        path: the Gaussian path x_t = alpha x_0 + sigma eps of the training, an entry of `PATHS`.
        prediction: what the output is: `epsilon`, `sample` (x_0), `v_prediction`, `score`, `flow_prediction` (alpha' x_0 + sigma' eps,
            which is eps - x_0 on the linear path), `edm` (the raw F of a preconditioned network) or `consistency` (its boundary form).
        time_input: what the network is given, an entry of `TIME_INPUTS`; None is the usual one of the path (`index`; `1000 t`;
            `log(sigma)/4` for `edm`; `250 log(sigma)` for `consistency`; `sigma` for others on VE; `999 t` on the VP and sub-VP SDEs).
        sign: 1 or -1; the output is multiplied by it first (some velocities point at the data).
        sigma_data: standard deviation of the data in EDM's preconditioning; `edm` and `consistency` only.
        lambda_range: (lowest, highest) half log-SNR of the training; None is the path's own ends.
        variance: diffusers' `variance_type`; with `learned` and `learned_range` the output has twice the channels and `denoise` drops the
            second half.
        clip_sample, clip_sample_range: clamp x_0 to [-range, range].
        thresholding, dynamic_thresholding_ratio, sample_max_value: dynamic thresholding of x_0 (Saharia et al. 2022,
            https://arxiv.org/abs/2205.11487, section 2.3); comes instead of clipping.
        jumps: distilled to jump, though it predicts what its teacher does (LCM, TCD): its x_0 is where the trajectory through x ends, and
            not the mean of the data that fit x. A `consistency` network does so without being marked.

    Raises:
        ValueError: an unknown name; a time the path does not have; epsilon, score or consistency where alpha = 0 (x_0 is undefined there).
    """

    path: Path
    prediction: str = "epsilon"
    time_input: str | None = None
    sign: int = 1
    sigma_data: float | None = None
    lambda_range: tuple[float, float] | None = None
    variance: str | None = None
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    jumps: bool = False

    def __post_init__(self) -> None:
        def set_(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        if not isinstance(self.path, Path):
            raise TypeError(f"Parameterization: path is a {type(self.path).__name__}; give a Path ({', '.join(PATHS)}).")
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"Parameterization: prediction {self.prediction!r} is not known; use one of {', '.join(PREDICTIONS)}.")
        if self.sign not in (1, -1):
            raise ValueError(f"Parameterization: sign is {self.sign!r}; use 1 or -1.")
        if self.variance is not None and self.variance not in VARIANCES:
            raise ValueError(f"Parameterization: variance {self.variance!r} is not known; use None or one of {', '.join(VARIANCES)}.")
        set_("time_input", _canonical_time_input(self.time_input or self._usual_time_input()))
        kind, unit = _time_input(self.time_input).kind, self.path.name not in ("discrete_vp", "ve", "edm")
        if (kind == "index" and self.path.name != "discrete_vp") or (kind == "unit" and not unit):
            fit = [k for k, v in TIME_INPUTS.items() if v.kind == "sigma" or v.kind == ("unit" if unit else "index")]
            raise ValueError(
                f"Parameterization: the {self.path.name} path has no time {self.time_input!r}; use one of "
                f"{', '.join(repr(k) for k in fit if not (self.path.name in ('ve', 'edm') and TIME_INPUTS[k].kind == 'index'))}."
            )
        preconditioned = self.prediction in ("edm", "consistency")
        if preconditioned and self.sigma_data is None:
            set_("sigma_data", 0.5)
        if not preconditioned and self.sigma_data is not None:
            raise ValueError(f"Parameterization: sigma_data is for edm and consistency networks; leave it out for {self.prediction!r}.")
        if self.lambda_range is not None:
            low, high = (float(v) for v in self.lambda_range)
            if not low < high:
                raise ValueError(f"Parameterization: lambda_range = {self.lambda_range}; give (lowest, highest).")
            set_("lambda_range", (low, high))
        if self.prediction in ("epsilon", "score", "consistency") and self.trained_lambda_range[0] == -math.inf:
            raise ValueError(
                f"Parameterization: {self.prediction!r} says nothing about x_0 at zero SNR, where the {self.path.name} path starts; use "
                "v_prediction, sample or flow_prediction, or give lambda_range=(lowest, highest) with the lambdas of the training."
            )

    def _usual_time_input(self) -> str:
        if self.prediction == "edm" and self.path.name in ("ve", "edm"):
            return "log(sigma)/4"
        if self.prediction == "consistency":
            return "250 log(sigma)"
        return {"discrete_vp": "index", "ve": "sigma", "edm": "sigma", "vp_sde": "999 t", "sub_vp": "999 t"}.get(self.path.name, "1000 t")

    # ------------------------------------------------------------------ ranges and times

    @property
    def trained_lambda_range(self) -> tuple[float, float]:
        """(lowest, highest) half log-SNR that the network was trained on, noise end first."""
        if self.lambda_range is not None:
            return self.lambda_range
        return self.path.level(self.path.t_max).lambda_, self.path.level(self.path.t_min).lambda_

    @property
    def trained_t_range(self) -> tuple[float, float]:
        """(t at the data end, t at the noise end) of the trained range, in the path's native time."""
        if self.lambda_range is None:
            return self.path.t_min, self.path.t_max
        low, high = (float(self.path.t_from_lambda(torch.tensor(v, dtype=torch.float64))) for v in self.lambda_range)
        return max(high, self.path.t_min), min(low, self.path.t_max)

    @property
    def has_path(self) -> bool:
        """Whether steps along its output follow a path between data and noise: not so for a network that jumps to the path's end."""
        return self.prediction != "consistency" and not self.jumps

    @property
    def learned_variance(self) -> bool:
        """Whether the second half of the output's channels is a variance."""
        return self.variance in ("learned", "learned_range")

    def network_time(self, t: float | Tensor) -> float | Tensor:
        """What the network is given at the path's native time `t`; a float or a tensor of any shape."""
        return _time_input(self.time_input).forward(t, self.path)

    def path_time(self, network_time: float | Tensor) -> float | Tensor:
        """The inverse of `network_time`."""
        return _time_input(self.time_input).inverse(network_time, self.path)

    # ------------------------------------------------------------------ conversions

    def _at(self, t: float | Tensor, like: Tensor) -> tuple[Any, Any, Any, Any]:
        """alpha, sigma and, where the prediction needs them, their derivatives; floats for a float time, else broadcast over `like`."""
        dots = self.prediction == "flow_prediction"
        if not isinstance(t, Tensor):
            alpha, sigma = self.path.level(t)
            return alpha, sigma, float(self.path.alpha_dot(t)) if dots else None, float(self.path.sigma_dot(t)) if dots else None
        dtype = torch.promote_types(like.dtype, torch.float32)
        t = t.to(like.device)
        names = ("alpha", "sigma", "alpha_dot", "sigma_dot") if dots else ("alpha", "sigma")
        wide = t if t.device.type == "mps" else t.double()
        values = [_expand(getattr(self.path, name)(wide).to(dtype), like) for name in names]
        return (*values, None, None) if not dots else tuple(values)

    def split_variance(self, model_output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(prediction, learned variance or None): splits the channels, dim 1, of an output that carries both.

        Raises:
            ValueError: the output's channels are not the sample's (twice the sample's with a learned variance).
        """
        if model_output.shape == x.shape:
            return model_output, None
        if x.ndim > 1 and self.learned_variance and model_output.shape[1] == 2 * x.shape[1]:
            return tuple(model_output.chunk(2, dim=1))
        raise ValueError(
            f"Parameterization: the network's output has shape {tuple(model_output.shape)} for a sample of shape {tuple(x.shape)}; they "
            "must agree, or the output has twice the channels and variance='learned_range' (or 'learned') says so."
        )

    def _x_0_eps(self, out: Tensor, x: Tensor, alpha: Any, sigma: Any, alpha_dot: Any, sigma_dot: Any) -> tuple[Tensor, Tensor]:
        if self.sign == -1:
            out = -out
        if self.prediction == "epsilon":
            return C.eps_to_x_0(out, x, alpha, sigma), C._wide(out, x)[0]
        if self.prediction == "v_prediction":
            return C.v_to_x_0(out, x, alpha, sigma), C.v_to_eps(out, x, alpha, sigma)
        if self.prediction == "flow_prediction":
            return C.flow_to_x_0(out, x, alpha, sigma, alpha_dot, sigma_dot), C.flow_to_eps(out, x, alpha, sigma, alpha_dot, sigma_dot)
        if self.prediction == "score":
            return C.score_to_x_0(out, x, alpha, sigma), C._wide(C.score_to_eps(out, sigma), x)[0]
        if self.prediction == "edm":
            x_0 = C.edm_to_x_0(out, x, alpha, sigma, self.sigma_data)
        elif self.prediction == "consistency":
            x_0 = C.consistency_to_x_0(out, x, alpha, sigma, self.sigma_data, self.boundary_sigma)
        else:
            x_0 = C._wide(out, x)[0]
        return x_0, C.x_0_to_eps(x_0, x, alpha, sigma)

    @property
    def boundary_sigma(self) -> float:
        """sigma / alpha at the data end, where a consistency network is the identity."""
        return math.exp(-self.trained_lambda_range[1])

    def limit_x_0(self, x_0: Tensor) -> Tensor:
        """x_0 clipped or dynamically thresholded as the network's config says; itself where it says neither."""
        if self.thresholding:
            flat = x_0.abs().flatten(1)
            bound = torch.quantile(flat, self.dynamic_thresholding_ratio, dim=1).clamp(1.0, self.sample_max_value)
            bound = _expand(bound, x_0)
            return x_0.clamp(-bound, bound) / bound
        return x_0.clamp(-self.clip_sample_range, self.clip_sample_range) if self.clip_sample else x_0

    @property
    def limits_x_0(self) -> bool:
        """Whether `limit_x_0` does anything."""
        return self.clip_sample or self.thresholding

    def denoise(self, model_output: Tensor, x: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """The network's estimates of the data and of the noise in x = alpha x_0 + sigma eps.

        Args:
            model_output: shape (B, C, *), or (B, 2 C, *) with a learned variance, whose channels are dropped.
            x: the noisy sample in the path's coordinates (not scaled by `scale_model_input`), shape (B, C, *).
            t: native time of the path, a float or shape (B,).
        Returns: (x_0, eps), each (B, C, *), float32 or better. With clipping or thresholding x_0 is limited and eps goes with it, so that
            x = alpha x_0 + sigma eps always holds.
        """
        model_output, _ = self.split_variance(model_output, x)
        alpha, sigma, alpha_dot, sigma_dot = self._at(t, x)
        x_0, eps = self._x_0_eps(model_output, x, alpha, sigma, alpha_dot, sigma_dot)
        if self.limits_x_0:
            x_0 = self.limit_x_0(x_0)
            eps = C.x_0_to_eps(x_0, x, alpha, sigma)
        return x_0, eps

    def affine(self, t: float, level: Level | None = None) -> Affine:
        """`denoise` without its limits at one time, as the four numbers of a linear map (every prediction is one).

        Args:
            t: native time of the path.
            level: (alpha, sigma) there, if it is not the path's own (a scheduler that replays another's interpolation).
        """
        one, zero = 1.0, 0.0  # plain numbers: this runs once per grid node, and 0-d tensors take fifteen times as long
        at = self._at(float(t), one)
        at = at if level is None else (*level, *at[2:])
        (x_x, e_x), (x_o, e_o) = self._x_0_eps(zero, one, *at), self._x_0_eps(one, zero, *at)
        return Affine(float(x_x), float(x_o), float(e_x), float(e_o))

    def target(self, x_0: Tensor, eps: Tensor, t: float | Tensor) -> Tensor:
        """What the network should output at x = alpha x_0 + sigma eps: the training target.

        Args:
            x_0, eps: data and noise, shape (B, *event).
            t: native time of the path, a float or shape (B,).
        Returns: shape (B, *event), float32 or better. `denoise(target(x_0, eps, t), x, t)` is (x_0, eps).
        """
        alpha, sigma, alpha_dot, sigma_dot = self._at(t, x_0)
        x_0, eps = C._wide(x_0, eps)
        if self.prediction == "epsilon":
            out = eps
        elif self.prediction == "sample":
            out = x_0
        elif self.prediction == "v_prediction":
            out = C.x_0_eps_to_v(x_0, eps, alpha, sigma)
        elif self.prediction == "score":
            out = C.eps_to_score(eps, sigma)
        elif self.prediction == "flow_prediction":
            out = C.x_0_eps_to_flow(x_0, eps, alpha_dot, sigma_dot)
        else:
            x = C.noise_data(x_0, eps, alpha, sigma)
            if self.prediction == "edm":
                out = C.x_0_to_edm(x_0, x, alpha, sigma, self.sigma_data)
            else:
                out = C.x_0_to_consistency(x_0, x, alpha, sigma, self.sigma_data, self.boundary_sigma)
        return -out if self.sign == -1 else out

    def input_scale(self, level: Level) -> float:
        """c_in at one level: what `scale_model_input` multiplies by (1 for networks without preconditioning)."""
        return C.edm_input_scale(level.alpha, level.sigma, self.sigma_data) if self.sigma_data is not None else 1.0

    def scale_model_input(self, x: Tensor, t: float | Tensor) -> Tensor:
        """The network's input for the state `x` (B, *event) at native time `t` (a float or (B,)): c_in x, in x's dtype."""
        if self.sigma_data is None:
            return x
        if not isinstance(t, Tensor):
            return x * self.input_scale(self.path.level(t))
        alpha, sigma, _, _ = self._at(t, x)
        return (x * C.edm_input_scale(alpha, sigma, self.sigma_data)).to(x.dtype)

    # ------------------------------------------------------------------ configs

    def to_config(self) -> dict[str, Any]:
        """diffusers' scheduler keys for this network, plus `parameterization` with what they cannot say (absent if nothing)."""
        from .config import parameterization_to_config

        return parameterization_to_config(self)

    @classmethod
    def named(cls, name: str, **changes: Any) -> "Parameterization":
        """The convention of a codebase, an entry of `CONVENTIONS`: `Parameterization.named("sit")`.

        Args:
            name: `sd`, `ddpm`, `dit`, `sd3`, `flux`, `lumina`, `edm`, `torchcfm`, `score_sde_vp`, ...; capitals and hyphens do not matter.
            changes: fields that differ from its best-known network.

        Raises:
            ValueError: an unknown name; changes that do not fit together.
        """
        from .conventions import convention_named

        p = convention_named(name).parameterization
        return p.with_(**changes) if changes else p

    @classmethod
    def from_config(cls, config: dict[str, Any], model: Any = None, **overrides: Any) -> "Parameterization":
        """Read a scheduler config of diffusers or of this library.

        Args:
            config: the whole config, defaults included: a dict, a scheduler's `.config`, or the content of `scheduler_config.json`. It is
                read by `_class_name` where there is one, else by its keys; a `parameterization` key completes it.
            model: the network of the same repository, its class, the name of that, or its config: says what no scheduler config does, the
                time that a flow's network is given, which way its velocity points, and whether it learned its variance. None takes what
                the scheduler hands over (`1000 t` and eps - x_0 for flows).
            overrides: diffusers' keys (`prediction_type="v_prediction"`) or fields of this class; they win.

        Raises:
            ValueError: the config is ambiguous, lacks what is needed, or has a key that neither this library nor diffusers knows; the
                model's class is not known, or contradicts the config.
        """
        from .config import parameterization_from_config

        return parameterization_from_config(config, overrides, model)

    def with_(self, **changes: Any) -> "Parameterization":
        """A copy with some fields changed; a time input that was the usual one follows the new path and prediction."""
        usual = _canonical_time_input(self._usual_time_input()) == self.time_input
        if usual and "time_input" not in changes:
            changes["time_input"] = None
        if "prediction" in changes and "sigma_data" not in changes and changes["prediction"] not in ("edm", "consistency"):
            changes["sigma_data"] = None
        return replace(self, **changes)


FIELD_NAMES = tuple(f.name for f in fields(Parameterization))
__all__ += ["FIELD_NAMES", "path_from_config"]
