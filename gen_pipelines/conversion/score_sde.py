"""score_sde_pytorch's and RectifiedFlow's `.pth`: NCSN++, DDPM++ and DDPM, trained on VE, VP, sub-VP or straight paths.

The weights' moving average is a list without names, in the order of the parameters that are trained. What the network was trained to do
is not in the file: it comes from a preset, a configuration, or options.

References: Song et al. 2021, https://arxiv.org/abs/2011.13456; Liu et al. 2022, https://arxiv.org/abs/2209.03003
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..models.denoisers.score_unet import ScoreUNetModel
from ..pipelines.diffusion_image import DiffusionImagePipeline
from ..processes.discrete_vp import DiscreteVPPath
from ..processes.parameterization import Parameterization
from ..processes.sub_vp import SubVPPath
from ..processes.ve import VEPath
from ..processes.vp_sde import VPSDEPath
from ..schedulers.ddpm import DDPMScheduler
from ..schedulers.rectified_flow import RectifiedFlowScheduler
from ..schedulers.score_sde import ScoreSDEScheduler
from . import score_unet_keys as keys
from .base import Component, Format, Made, Plan
from .reader import Checkpoint, plain

SDES = ("vesde", "vpsde", "subvpsde", "rectified_flow")
WRAPPED = "module."  # of DataParallel
_FLOW_START = 1e-3  # the time at which training and sampling of a rectified flow begin, with 1 for data

# the configurations that were published: what the shapes do not say
PRESETS: dict[str, dict[str, Any]] = {
    **{
        f"ve/cifar10_{name}": {"sde": "vesde", "image_size": 32, "snr": 0.16}
        for name in ("ddpm", "ncsnpp", "ncsnpp_continuous", "ncsnpp_deep_continuous")
    },
    "ve/celeba_ncsnpp": {"sde": "vesde", "image_size": 64, "snr": 0.17},
    **{f"ve/{name}_ncsnpp_continuous": {"sde": "vesde", "image_size": 256, "snr": 0.075} for name in ("bedroom", "church")},
    **{f"ve/{name}_256_ncsnpp_continuous": {"sde": "vesde", "image_size": 256, "snr": 0.075} for name in ("celebahq", "ffhq")},
    **{f"ve/{name}_ncsnpp_continuous": {"sde": "vesde", "image_size": 1024, "snr": 0.15} for name in ("celebahq", "ffhq")},
    **{
        f"vp/cifar10_{name}": {"sde": "vpsde", "image_size": 32, "continuous": name.endswith("continuous")}
        for name in ("ddpmpp", "ddpmpp_continuous", "ddpmpp_deep_continuous", "ncsnpp", "ncsnpp_continuous", "ncsnpp_deep_continuous")
    },
    "vp/ddpm/cifar10": {"sde": "vpsde", "image_size": 32, "continuous": False},
    "vp/ddpm/cifar10_continuous": {"sde": "vpsde", "image_size": 32, "continuous": True},
    **{f"vp/ddpm/{name}": {"sde": "vpsde", "image_size": 256, "continuous": False} for name in ("bedroom", "celebahq", "church")},
    **{
        f"subvp/cifar10_{name}_continuous": {"sde": "subvpsde", "image_size": 32}
        for name in ("ddpm", "ddpmpp", "ddpmpp_deep", "ncsnpp", "ncsnpp_deep")
    },
    **{
        f"rectified_flow/{name}": {"sde": "rectified_flow", "image_size": size, "centered": centered}
        for name, size, centered in (
            ("cifar10_rf_gaussian_ddpmpp", 32, True), ("cifar10_rf_gaussian_reflow_train", 32, True),
            ("cifar10_rf_gaussian_reflow_distill_k=1", 32, True), ("celeba_hq_pytorch_rf_gaussian", 256, True),
            ("afhq_cat_pytorch_rf_gaussian", 256, True), ("bedroom_rf_gaussian", 256, False), ("church_rf_gaussian", 256, False),
        )
    },
}  # fmt: skip

OPTIONS = {
    "preset": "the configuration by its name in the source's configs/, such as vp/cifar10_ddpmpp_continuous",
    "config": "the same as a file, JSON or YAML: sde, continuous, image_size, ... flat or in the source's sections",
    "sde": "vesde, vpsde, subvpsde or rectified_flow",
    "continuous": "true or false: whether a VP network was trained on continuous times",
    "image_size": "height and width of the pictures",
    "centered": "true where pictures were scaled to [-1, 1], false for [0, 1]",
    "fir": "true where resampling has a filter",
    "skip_rescale": "true where sums are divided by the square root of 2",
    "scale_by_sigma": "true where the output is divided by the time",
    "beta_min": "of VP and sub-VP (0.1)",
    "beta_max": "of VP and sub-VP (20)",
    "snr": "of the corrector (0.16)",
    "weights": "ema (default) or model: the moving average, or the weights as they were last",
}
_SECTIONS = ("model", "training", "sampling", "data")


class ScoreSDE(Format):
    """The network becomes the `unet` of a `DiffusionImagePipeline`, with the source's own sampler as its scheduler."""

    name = "score_sde"
    title = "score_sde_pytorch or RectifiedFlow"
    paper = "https://arxiv.org/abs/2011.13456"
    licence = "score_sde_pytorch: Apache 2.0 (its code and networks); RectifiedFlow: no licence is given"
    extensions = (".pth",)
    options = OPTIONS

    def matches(self, checkpoint: Checkpoint) -> float:
        state = network_of(checkpoint)
        try:
            return 1.0 if state and {"linear", "conv", "block"} <= {part.kind for part in keys.parts_of(state)} else 0.0
        except ValueError:
            return 0.3 if state else 0.0

    def plan(self, checkpoint: Checkpoint, options: Mapping[str, Any]) -> Plan:
        state = network_of(checkpoint)
        if not state:
            raise ValueError(f"{checkpoint.path} has no keys model.module.all_modules.…")
        sigmas = state.pop("sigmas", None)
        config = keys.config_from(state)
        plan = Plan(self.name, DiffusionImagePipeline, {})
        settings = settings_of(options, config, plan.notes)
        weights, sources, used_list = chosen_weights(checkpoint, state, settings["weights"])

        # the network
        levels = config.pop("attention_levels")
        config.pop("filtered")
        target = {**config, "attention_levels": levels}
        size = settings["image_size"]
        config |= {
            "sample_size": size,
            "attention_resolutions": tuple(size >> level for level in levels),
            "resample_taps": (1, 3, 3, 1) if settings["fir"] else None,
            "skip_rescale": settings["skip_rescale"],
            "smallest_group": 1 if settings["plain_groups"] else 4,
        }
        parameterization, time = parameterization_of(settings, config["time_embedding"], sigmas)
        config |= time
        table = keys.key_map(state, target)
        plan.components["unet"] = Component(ScoreUNetModel, config, lambda: _state(table, weights))

        # where every key went
        for source, goal in table.items():
            plan.used[sources[source]] = f"unet.{goal}"
        if sigmas is not None:
            plan.dropped[_model_key("sigmas", checkpoint)] = "the noise levels, which the configuration has as their range"
        plan.dropped["optimizer.*"] = "for training only"
        if used_list:
            plan.dropped |= {f"model.{WRAPPED if _wrapped(checkpoint) else ''}{key}": "the moving average is taken"
                             for key in state if not sources[key].startswith("model.")}  # fmt: skip
        else:
            plan.dropped["ema.*"] = "weights=model takes the weights themselves"

        plan.objects["scheduler"], plan.init["default_num_inference_steps"] = sampler(settings, parameterization, sigmas)
        return plan


def _wrapped(checkpoint: Checkpoint) -> bool:
    return any(key.startswith(WRAPPED) for key in checkpoint.tree["model"])


def _model_key(key: str, checkpoint: Checkpoint) -> str:
    return f"model.{WRAPPED if _wrapped(checkpoint) else ''}{key}"


def network_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The network's state dict, without what DataParallel puts in front; empty where there is none."""
    tree = checkpoint.tree
    model = tree.get("model") if isinstance(tree, dict) else None
    if not isinstance(model, dict):
        return {}
    state = {str(key).removeprefix(WRAPPED): value for key, value in model.items() if isinstance(value, Tensor)}
    return state if any(key.startswith(keys.PREFIX) for key in state) else {}


def chosen_weights(checkpoint: Checkpoint, state: Mapping[str, Tensor], which: str) -> tuple[dict[str, Tensor], dict[str, str], bool]:
    """(weights by the network's keys, where each lies in the checkpoint, whether they are the average's).

    The average holds what is trained: everything but the random frequencies, in the order of the parameters.

    Raises:
        ValueError: there is no average, or it does not fit the network.
    """
    plain_keys = {key: _model_key(key, checkpoint) for key in state}
    if which == "model":
        return dict(state), plain_keys, False
    average = checkpoint.tree.get("ema")
    shadow = average.get("shadow_params") if isinstance(average, dict) else None
    if not isinstance(shadow, (list, tuple)):
        raise ValueError(f"{checkpoint.path} has no moving average (ema.shadow_params); set weights=model to take the weights themselves.")
    trained = [key for key in state if not _is_frequency(key, state)]
    if len(shadow) == len(state):  # some forks keep the frequencies in it
        trained = list(state)
    if len(shadow) != len(trained):
        raise ValueError(
            f"{checkpoint.path}: the moving average has {len(shadow)} tensors, and the network {len(trained)} that are trained."
        )
    for number, (key, value) in enumerate(zip(trained, shadow, strict=True)):
        if not isinstance(value, Tensor) or value.shape != state[key].shape:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{checkpoint.path}: ema.shadow_params.{number} is {shape}, where {key} is {tuple(state[key].shape)}.")
    where = {key: f"ema.shadow_params.{number}" for number, key in enumerate(trained)}
    return {**state, **dict(zip(trained, shadow, strict=True))}, {**plain_keys, **where}, True


def _is_frequency(key: str, state: Mapping[str, Tensor]) -> bool:
    return key == f"{keys.PREFIX}0.W" and state[key].ndim == 1


def settings_of(options: Mapping[str, Any], config: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """What the shapes do not say, from options, a configuration, a preset, or what all published networks of these shapes have.

    Args:
        options: of the format.
        config: what the shapes say.
        notes: told what was taken for granted.
    Raises:
        ValueError: something is missing, not known, or contradicts the shapes; the message names the option.
    """
    given: dict[str, Any] = {}
    if (name := options.get("preset")) is not None:
        if name not in PRESETS:
            raise ValueError(f"preset={name!r} is not known; known are {', '.join(PRESETS)}.")
        given |= PRESETS[name]
    given |= _from_config(options.get("config"), config)
    given |= {key: value for key, value in options.items() if key not in ("preset", "config")}

    def flag(key: str, usual: bool | None, why: str) -> bool:
        value = given.get(key, usual)
        if value is None:
            raise ValueError(f"the file does not say {key}: {why}; give --set {key}=true or false, or --set preset=….")
        if not isinstance(value, bool):
            raise ValueError(f"option {key} = {value!r}; give true or false.")
        return value

    sde = given.get("sde")
    if sde not in SDES:
        what = "the file does not say what the network was trained to do" if sde is None else f"sde={sde!r} is not known"
        raise ValueError(f"{what}: give --set preset=… (such as vp/cifar10_ddpmpp_continuous), or --set sde= one of {', '.join(SDES)}.")
    fourier, plain_blocks = config["time_embedding"] == "fourier", config["block_type"] == "ddpm"
    filtered = config["filtered"]
    fir = flag("fir", filtered if filtered is not None else config["input_pyramid"] != "none", "whether resampling has a filter")
    if filtered is not None and fir != filtered:
        raise ValueError(f"fir={str(fir).lower()}, but the keys are those of a network {'with' if filtered else 'without'} filters.")
    if filtered is None and "fir" not in given:
        notes.append(f"fir={str(fir).lower()} was taken for granted, as in every published network with these keys.")
    size = given.get("image_size")
    if size is None:
        if not config["attention_levels"]:
            raise ValueError("the file does not say how large the pictures are: give --set image_size=….")
        size = 16 << config["attention_levels"][0]
        notes.append(f"image_size={size} was taken for granted: attention at 16 x 16, as in every published network.")
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"option image_size = {size!r}; give a whole number.")
    scaled = flag("scale_by_sigma", sde == "vesde" or (sde == "rectified_flow" and fourier), "whether the output is divided by the time")
    settings = {
        "sde": sde,
        "image_size": size,
        "fir": fir,
        "skip_rescale": flag("skip_rescale", not plain_blocks, "whether sums are rescaled"),
        "scale_by_sigma": scaled,
        "centered": flag("centered", sde != "vesde", "whether pictures were in [-1, 1]"),
        "continuous": flag(
            "continuous", {"vesde": fourier, "subvpsde": True, "rectified_flow": False}.get(sde), "a VP network may be trained on either"
        ),
        # DDPM's own blocks have 32 groups whatever the channels
        "plain_groups": plain_blocks and not given.get("skip_rescale", False),
        "weights": given.get("weights", "ema"),
        **{key: _number(given, key, usual) for key, usual in (("beta_min", 0.1), ("beta_max", 20.0), ("snr", 0.16))},
    }
    if settings["weights"] not in ("ema", "model"):
        raise ValueError(f"option weights = {settings['weights']!r} is none of ema, model.")
    return settings


def _number(given: Mapping[str, Any], key: str, usual: float) -> float:
    value = given.get(key, usual)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"option {key} = {value!r}; give a number.")
    return float(value)


def _from_config(content: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a configuration, flat or in the source's sections; what the shapes say too must agree."""
    if content is None:
        return {}
    content = plain(content)
    if not isinstance(content, Mapping):
        raise ValueError("config must be a table of settings.")
    flat = {key: value for key, value in content.items() if key not in _SECTIONS}
    for section in _SECTIONS:
        flat |= content[section] if isinstance(content.get(section), Mapping) else {}
    for key, said in (("nf", config["base_channels"]), ("num_res_blocks", config["layers_per_block"]),
                      ("embedding_type", config["time_embedding"]), ("progressive", config["output_pyramid"]),
                      ("progressive_input", config["input_pyramid"]), ("num_channels", config["in_channels"])):  # fmt: skip
        if key in flat and flat[key] != said:
            raise ValueError(f"config has {key}={flat[key]!r}, but the weights are those of {key}={said!r}.")
    return {key: flat[key] for key in OPTIONS if key in flat and key not in ("preset", "config", "weights")}


def parameterization_of(
    settings: Mapping[str, Any], time_embedding: str, sigmas: Tensor | None
) -> tuple[Parameterization, dict[str, Any]]:
    """What the network predicts for pictures in [-1, 1], and how it is told the time (arguments of `ScoreUNetModel`).

    A VE network of pictures in [0, 1] takes 2 x - 1 of the noisy picture, which is the noisy picture in [-1, 1] of twice the sigma: it is
    told half of ours. Divided by sigma its output is the score, so undivided it is -eps.

    Raises:
        ValueError: settings that no published network has, and that cannot be expressed.
    """
    sde, fourier = settings["sde"], time_embedding == "fourier"
    if sde == "vesde":
        if not settings["scale_by_sigma"]:
            raise ValueError("a VE network without scale_by_sigma is not covered: its output would be a score in other units.")
        if settings["continuous"] != fourier:
            raise ValueError("a VE network is continuous with Fourier features of the time and discrete without; check --set continuous=….")
        if sigmas is None:
            raise ValueError("the checkpoint lacks model.module.sigmas, the noise levels of a VE network.")
        unit = 1.0 if settings["centered"] else 2.0
        high, low = float(sigmas[0]), float(sigmas[-1])
        time: dict[str, Any] = {"time_scale": 1 / unit, "time_transform": "log"}
        if not fourier:
            time |= {"time_transform": "geometric", "sigma_range": (low, high), "num_scales": len(sigmas)}
        return Parameterization(VEPath(unit * low, unit * high), "epsilon", "sigma", sign=-1), time
    if not settings["centered"]:
        raise ValueError(
            f"a network of {sde} whose pictures are in [0, 1] (centered=false) is not covered: its noise does not shrink to pictures in "
            "[-1, 1] by one scale."
        )
    time = {"time_transform": "log"} if fourier else {}
    if settings["scale_by_sigma"]:
        if not fourier:
            raise ValueError("scale_by_sigma is covered for VE networks, and with Fourier features of the time; check the configuration.")
        time["divide_by_time"] = True
    if sde == "rectified_flow":
        return Parameterization.named("rectified_flow"), {**time, "smallest_time": 999 * _FLOW_START}
    if sde == "subvpsde":
        return Parameterization(SubVPPath(settings["beta_min"], settings["beta_max"]), "epsilon", "999 t"), time
    if settings["continuous"]:
        return Parameterization(VPSDEPath(settings["beta_min"], settings["beta_max"]), "epsilon", "999 t"), time
    count = 1000 if sigmas is None else len(sigmas)
    return Parameterization(DiscreteVPPath(count, settings["beta_min"] / count, settings["beta_max"] / count), "epsilon", "index"), time


def sampler(settings: Mapping[str, Any], parameterization: Parameterization, sigmas: Tensor | None) -> tuple[Any, int]:
    """The sampler that the source's own configurations name, and its steps."""
    steps = 1000 if sigmas is None else len(sigmas)
    if settings["sde"] == "rectified_flow":
        return RectifiedFlowScheduler(timestep_spacing="trailing").bind(parameterization), 100
    if settings["sde"] == "vesde":
        return ScoreSDEScheduler(correct_steps=1, snr=settings["snr"]).bind(parameterization), steps
    ancestral = settings["sde"] == "vpsde" and not settings["continuous"]
    return (DDPMScheduler() if ancestral else ScoreSDEScheduler()).bind(parameterization), steps


def _state(table: Mapping[str, str], weights: Mapping[str, Tensor]) -> dict[str, Tensor | Made]:
    made: dict[str, Tensor | Made] = {}
    for source, target in table.items():
        value = weights[source]
        if target == "frequencies":
            made[target] = Made(lambda s=source, t=target, v=value: keys.converted(s, t, v), tuple(value.shape), value.dtype)
        else:
            made[target] = keys.converted(source, target, value)
    return made


__all__ = ["PRESETS", "ScoreSDE", "parameterization_of", "settings_of"]
