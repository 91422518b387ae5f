"""k-diffusion's `image_v1` and `image_transformer_v2`: training checkpoints (`.pth`) and the slim safetensors made of them.

Keys and shapes give the network; its configuration (JSON), which lies in the checkpoint or in the header of the safetensors, gives
sigma_data, the range of the noise, the size of the pictures, and how many channels are theirs.

References: https://github.com/crowsonkb/k-diffusion; Karras et al. 2022, https://arxiv.org/abs/2206.00364; Crowson et al. 2024,
https://arxiv.org/abs/2401.11605
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.denoisers.hdit import HDiTModel
from ..models.denoisers.k_diffusion_unet import TAPS, KDiffusionUNetModel
from ..models.layers.upfirdn import fir_filter
from ..pipelines.diffusion_image import DiffusionImagePipeline
from ..processes.edm import EDMPath
from ..processes.parameterization import Parameterization
from ..schedulers.dpm_solver_multistep import DPMSolverMultistepScheduler
from .base import Component, Format, Plan
from .k_diffusion_config import configuration
from .k_diffusion_hdit import NEEDED, hdit_config, hdit_recipe, hdit_settings
from .keys import below, get, numbered
from .reader import Checkpoint, tensors
from .unet_layout import Recipe

__all__ = ["KDiffusion", "network_config", "recipe_of"]

_AUGMENTATIONS = 9  # numbers that say how a training picture was augmented
_WRAPPER = "inner_model."
_NEEDED = ("timestep_embed.weight", "mapping.0.weight", "proj_in.weight", "proj_out.weight", "u_net.d_blocks.0.1.main.0.mapper.weight")
# of the transformer of one level, version 1, which is not converted
_FIRST_TRANSFORMER = ("in_proj.weight", "time_emb.weight", "aug_emb.weight", "mapping.in_norm.scale")
_BLOCK = {"main.0.mapper": "norm_1.linear", "main.2": "conv_1", "main.4.mapper": "norm_2.linear", "main.6": "conv_2", "skip": "shortcut"}
_ATTENTION = {"norm_in.mapper": "norm.linear", "qkv_proj": "qkv", "out_proj": "out"}
_OTHERS = {"model": "the weights of the last step", "model_ema": "the averaged weights"}
_STEPS = 50  # of the pictures that are drawn while it trains


@dataclass(frozen=True)
class _Settings:
    """What the configuration says, checked."""

    size: int
    channels: int
    given_channels: int  # of a second picture beside the noisy one
    patch: int
    sigma_data: float
    sigma_min: float
    sigma_max: float
    skipped: int  # levels that are not used
    augmented: bool
    condition: int  # further numbers of the vector
    variance: bool
    dropout: float


class KDiffusion(Format):
    """The network becomes the `unet` of a `DiffusionImagePipeline` with DPM-Solver++ 2M, or stands alone where it is given a picture."""

    name = "k_diffusion"
    title = "k-diffusion"
    paper = "https://arxiv.org/abs/2206.00364"
    licence = "k-diffusion's code: MIT; weights as their author says"
    extensions = (".pth", ".safetensors")
    options: Mapping[str, str] = {
        "config": "the JSON file of the training, where the checkpoint does not hold it",
        "weights": "ema (default, where the file has it) or model",
        "condition": "of a network that takes a vector besides the time: classes (a label as zeros and a one) or vector (a network alone)",
    }

    def matches(self, checkpoint: Checkpoint) -> float:
        for place in _places(checkpoint):
            state = _network(checkpoint, place)
            if any(all(key in state for key in keys) for keys in (_NEEDED, NEEDED)):
                return 1.0
            if all(key in state for key in _FIRST_TRANSFORMER):
                return 0.9
        return 0.0

    def plan(self, checkpoint: Checkpoint, options: Mapping[str, Any]) -> Plan:
        place = _chosen(checkpoint, options.get("weights"))
        state, prefix = _network(checkpoint, place), _prefix(checkpoint, place)
        if all(key in state for key in _FIRST_TRANSFORMER):
            raise ValueError(f"{checkpoint.path.name} is k-diffusion's image_transformer_v1, which is not converted; its U-Net image_v1 "
                             "and its hourglass transformer image_transformer_v2 are.")  # fmt: skip
        hourglass = all(key in state for key in NEEDED)
        if hourglass:
            settings = hdit_settings(*configuration(checkpoint, options.get("config"), "image_transformer_v2"), state)
        else:
            settings = self._unet_settings(checkpoint, options, state, prefix)
        kind = options.get("condition")
        if settings.condition and kind not in ("classes", "vector"):
            raise ValueError(
                f"the network takes {settings.condition} numbers besides the time (mapping_cond_dim), and the file does not say what they "
                "mean: give --set condition=classes where they are a label as zeros and a one, or condition=vector for the network alone."
            )
        if kind is not None and not settings.condition:
            raise ValueError(f"condition = {kind!r}, but the network takes no vector besides the time (mapping_cond_dim).")
        classes = kind == "classes"
        if hourglass and classes and settings.classes is not None:
            raise ValueError("condition = 'classes', but the network has classes (class_emb) besides the vector; give condition=vector.")
        alone = kind == "vector" or (not hourglass and bool(settings.given_channels))
        plan, unused = Plan(self.name, None if alone else DiffusionImagePipeline, {}), {}
        if hourglass:
            network, config, recipe = HDiTModel, hdit_config(state, settings, classes), hdit_recipe(state, settings, classes)
        else:
            network, config = KDiffusionUNetModel, network_config(state, settings, classes)
            recipe, unused = recipe_of(state, settings, classes)
        plan.components["unet"] = Component(network, config, lambda: recipe.state(state))
        plan.used = recipe.used("unet", {key: prefix + key for key in state})
        plan.dropped = {prefix + key: why for key, why in unused.items()}
        for name, value in checkpoint.tree.items() if place else ():
            if name != place:
                plan.dropped[str(name) if isinstance(value, Tensor) else f"{name}.*"] = _OTHERS.get(name, "for training only")
        preconditioned = Parameterization(EDMPath(settings.sigma_min, settings.sigma_max), "edm", sigma_data=settings.sigma_data)
        plan.notes.append(f"EDM's preconditioning with sigma_data {settings.sigma_data:g}, sigma from {settings.sigma_min:g} to "
                          f"{settings.sigma_max:g}")  # fmt: skip
        if not hourglass and settings.variance:
            plan.notes.append("the last row of proj_out, which estimates the variance of the error while it trains, was left out")
        if alone:
            plan.notes.append("a network alone: what it is given besides the noisy picture has no place in a pipeline")
            return plan
        plan.objects["scheduler"] = DPMSolverMultistepScheduler(
            solver_order=2, solver_type="heun", use_karras_sigmas=True, lower_order_final=False
        ).bind(preconditioned)  # fmt: skip
        plan.init["default_num_inference_steps"] = _STEPS
        if hourglass and settings.null:
            plan.init["null_class"] = settings.classes - 1
        return plan

    @staticmethod
    def _unet_settings(checkpoint: Checkpoint, options: Mapping[str, Any], state: Mapping[str, Tensor], prefix: str) -> _Settings:
        if missing := [key for key in _NEEDED if key not in state]:
            raise ValueError(f"{checkpoint.path.name} is no U-Net of k-diffusion: it has no {missing[0]}.")
        if cross := [key for key in state if ".kv_proj." in key]:
            raise ValueError(f"{checkpoint.path.name}: its U-Net attends to a second sequence ({cross[0]}), which is not converted.")
        return _settings(checkpoint, options, state, prefix.endswith(_WRAPPER))


# ------------------------------------------------------------------------------------------------------------------ where the network lies


def _places(checkpoint: Checkpoint) -> list[str]:
    """Keys of the file that may hold the network; "" for the file itself."""
    if checkpoint.container == "folder" or not isinstance(checkpoint.tree, dict):
        return []
    return [name for name in ("model_ema", "model") if isinstance(checkpoint.tree.get(name), dict)] or [""]


def _chosen(checkpoint: Checkpoint, weights: Any) -> str:
    places = _places(checkpoint)
    wanted = {None: None, "ema": "model_ema", "model": "model"}
    if weights not in wanted:
        raise ValueError(f"weights = {weights!r} is none of ema, model.")
    if weights is None and places:
        return places[0]
    if wanted[weights] not in places:
        raise ValueError(f"{checkpoint.path.name} has no {wanted[weights] or 'network'}.")
    return wanted[weights]


def _prefix(checkpoint: Checkpoint, place: str) -> str:
    found = checkpoint.tree[place] if place else checkpoint.tree
    inner = _WRAPPER if any(str(key).startswith(_WRAPPER) for key in found) else ""
    return (f"{place}." if place else "") + inner


def _network(checkpoint: Checkpoint, place: str) -> dict[str, Tensor]:
    return below(tensors(checkpoint.tree), _prefix(checkpoint, place))


# ---------------------------------------------------------------------------------------------------------------------- its configuration


def _settings(checkpoint: Checkpoint, options: Mapping[str, Any], state: Mapping[str, Tensor], wrapped: bool) -> _Settings:
    """What the configuration says, where the shapes do not contradict it.

    Raises:
        ValueError: they do, or something is missing; the message names it.
    """
    said, _ = configuration(checkpoint, options.get("config"), "image_v1")
    augmented = said.flag("augment_wrapper", True)
    if augmented != wrapped:
        raise ValueError(f"config: model.augment_wrapper is {str(augmented).lower()}, but the keys are those of a network with"
                         f"{'' if wrapped else 'out'} it.")  # fmt: skip
    settings = _Settings(
        said.size(), int(said.number("input_channels", least=1)), int(said.number("unet_cond_dim", 0)),
        int(said.number("patch_size", 1, least=1)), float(said.number("sigma_data", 1.0)), float(said.number("sigma_min")),
        float(said.number("sigma_max")), int(said.number("skip_stages", 0)), augmented,
        int(said.number("mapping_cond_dim", 0)), said.flag("has_variance", False), float(said.number("dropout_rate", 0.0)),
    )  # fmt: skip
    if said.number("cross_cond_dim", 0):
        raise ValueError("config: model.cross_cond_dim is not 0, but the weights attend to no second sequence.")
    levels = len(numbered(state, r"u_net\.d_blocks\.(\d+)\."))
    seen = {
        "channels": [_width(state, i) for i in range(levels)],
        "depths": [len(_blocks(state, "d", i)) for i in range(levels)],
        "self_attn_depths": [_attends(state, i) for i in range(levels)],
        "mapping_out": get(state, "mapping.0.weight").shape[0],
        "mapping_cond_dim": (state["mapping_cond.weight"].shape[1] if "mapping_cond.weight" in state else 0)
        - (_AUGMENTATIONS if augmented else 0),
    }
    for key, value in seen.items():
        told = said.get(key, 0 if key == "mapping_cond_dim" else value)
        told = [bool(one) for one in told] if key == "self_attn_depths" and isinstance(told, (list, tuple)) else told
        if (list(told) if isinstance(told, tuple) else told) != value:
            raise ValueError(f"config: model.{key} is {told!r}, but the weights are those of {value!r}.")
    if settings.skipped >= levels:
        raise ValueError(f"config: model.skip_stages = {settings.skipped} skips all of the {levels} levels.")
    area = settings.patch**2
    shapes = {
        "proj_in": (get(state, "proj_in.weight").shape[1], (settings.channels + settings.given_channels) * area),
        "proj_out": (get(state, "proj_out.weight").shape[0], settings.channels * area + settings.variance),
    }
    for key, (there, wanted) in shapes.items():
        if there != wanted:
            raise ValueError(
                f"config: input_channels {settings.channels}, unet_cond_dim {settings.given_channels}, patch_size {settings.patch} and "
                f"has_variance {settings.variance} make {wanted} channels of {key}, and the weights have {there}."
            )
    return settings


# ----------------------------------------------------------------------------------------------------------------------- what becomes of it


def _blocks(state: Mapping[str, Tensor], way: str, level: int) -> list[int]:
    """The places of the residual blocks of a level."""
    return numbered(state, rf"u_net\.{way}_blocks\.{level}\.(\d+)\.main\.")


def _attends(state: Mapping[str, Tensor], level: int) -> bool:
    return any(re.match(rf"u_net\.d_blocks\.{level}\.\d+\.qkv_proj\.", key) for key in state)


def _width(state: Mapping[str, Tensor], level: int) -> int:
    return get(state, f"u_net.d_blocks.{level}.{_blocks(state, 'd', level)[0]}.main.2.weight").shape[0]


def network_config(state: Mapping[str, Tensor], settings: _Settings, classes: bool) -> dict[str, Any]:
    """Constructor arguments of `KDiffusionUNetModel`.

    Args:
        state: of the network, without what stands before its keys.
        settings: of its configuration.
        classes: whether the vector that it is given is a class.
    """
    levels = range(settings.skipped, len(numbered(state, r"u_net\.d_blocks\.(\d+)\.")))
    vector = settings.condition if not classes else 0
    return {
        "sample_size": settings.size,
        "in_channels": settings.channels + settings.given_channels,
        "out_channels": settings.channels,
        "patch_size": settings.patch,
        "embedding_channels": get(state, "mapping.0.weight").shape[0],
        "block_out_channels": [_width(state, i) for i in levels],
        "layers_per_block": [len(_blocks(state, "d", i)) for i in levels],
        "attention_levels": [_attends(state, i) for i in levels],
        "base_channels": get(state, "proj_in.weight").shape[0],
        "num_class_embeds": settings.condition if classes else None,
        "condition_channels": vector + (_AUGMENTATIONS if settings.augmented else 0),
        "dropout": settings.dropout,
    }


def recipe_of(state: Mapping[str, Tensor], settings: _Settings, classes: bool) -> tuple[Recipe, dict[str, str]]:
    """(how the weights of `KDiffusionUNetModel` are made, key -> why it is dropped); arguments as in `network_config`.

    Raises:
        ValueError: a filter is another than the network has.
    """
    recipe, dropped = Recipe(), {}
    levels = len(numbered(state, r"u_net\.d_blocks\.(\d+)\."))
    recipe.add("frequencies", "timestep_embed.weight", torch.Tensor.flatten)
    recipe.add_layer("mapping_0", "mapping.0", state)
    recipe.add_layer("mapping_1", "mapping.2", state)
    recipe.add_layer("proj_in", "proj_in", state)
    kept = settings.channels * settings.patch**2
    for part in ("weight", "bias"):
        recipe.add(f"proj_out.{part}", f"proj_out.{part}", (lambda t: t[:kept]) if settings.variance else None)
    if "mapping_cond.weight" in state:
        vector = state["mapping_cond.weight"].shape[1] - (settings.condition if classes else 0)
        if vector:
            recipe.add("condition.weight", "mapping_cond.weight", (lambda t: t[:, :vector]) if classes else None)
        if classes:
            recipe.add("class_embedding.weight", "mapping_cond.weight", lambda t: t[:, vector:].T)
    for way, ours in (("d", "down"), ("u", "up")):
        for level in range(levels):
            place = level if way == "d" else levels - 1 - level
            source = f"u_net.{way}_blocks.{place}"
            if level < settings.skipped:
                dropped |= {key: "of a level that skip_stages leaves out" for key in state if key.startswith(f"{source}.")}
                continue
            target = f"{ours}.{level - settings.skipped if way == 'd' else place}"
            for n, j in enumerate(_blocks(state, way, place)):
                _layers(recipe, state, f"{target}.blocks.{n}", f"{source}.{j}", _BLOCK)
                _layers(recipe, state, f"{target}.attentions.{n}", f"{source}.{j + 1}", _ATTENTION)
    for key in state:
        if re.fullmatch(r"u_net\.[du]_blocks\.\d+\.\d+\.kernel", key):
            gain = 4 if ".u_blocks." in key else 1
            if state[key].shape != (4, 4) or not torch.allclose(state[key].float(), fir_filter(TAPS) * gain, atol=1e-3):
                raise ValueError(f"{key} is another filter than (1, 3, 3, 1), which is not known.")
            dropped.setdefault(key, "the filter (1, 3, 3, 1)")
    return recipe, dropped


def _layers(recipe: Recipe, state: Mapping[str, Tensor], target: str, source: str, names: Mapping[str, str]) -> None:
    for theirs, ours in names.items():
        if f"{source}.{theirs}.weight" in state:
            recipe.add_layer(f"{target}.{ours}", f"{source}.{theirs}", state)
