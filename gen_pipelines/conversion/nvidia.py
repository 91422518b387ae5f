"""What NVIDIA's pickles of StyleGAN2-ADA and StyleGAN3 have in common: networks as persistence records, and the discriminator.

The key names are those of the state dicts. The constructor's arguments lie beside them, and source code, which is not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..models.gans.stylegan2 import StyleGAN2Discriminator
from ..pipelines.stylegan import StyleGANPipeline
from .base import Component, Format, Plan
from .pickles import Record
from .reader import Checkpoint, tensors

LICENCE = "NVIDIA Source Code License: non-commercial use only, see the source's repository"
OPTIONS = {
    "network": "G_ema (default) or G: which generator to take",
    "discriminator": "true to take D along, so that a training can go on",
}


class NvidiaFormat(Format):
    """G_ema (or G) becomes the generator of a `StyleGANPipeline`; D comes along when it is asked for."""

    licence = LICENCE
    licence_id = "other"
    extensions = (".pkl",)
    options = OPTIONS
    generator_class: type

    def generator_config(self, record: Record, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """The configuration of `generator_class`, from the arguments that theirs was built with.

        Raises:
            ValueError: an argument that our network has no counterpart for.
        """
        raise NotImplementedError

    def plan(self, checkpoint: Checkpoint, options: Mapping[str, Any]) -> Plan:
        found = records(checkpoint)
        source = choose(checkpoint, found, options)
        plan = Plan(self.name, StyleGANPipeline, {})
        state = tensors(found[source])
        config = self.generator_config(found[source], state)
        kept = move(state, source, "generator", plan)
        plan.components["generator"] = Component(self.generator_class, config, lambda: kept)
        if with_d := flag(options, "discriminator"):
            if "D" not in found:
                raise ValueError(f"{checkpoint.path} has no network D; leave discriminator=true out.")
            plan.components["discriminator"] = discriminator(found["D"], "D", plan)
        others(plan, checkpoint, {source, "D"} if with_d else {source})
        return plan


def generator_arguments(record: Record) -> tuple[Arguments, dict[str, Any]]:
    """(G's arguments that are still to be taken, the part of our configuration that all their generators share)."""
    given = Arguments("G", arguments(record, ("z_dim", "c_dim", "w_dim", "img_resolution", "img_channels")))
    config = {
        "z_dim": given.take("z_dim", 512),
        "num_classes": given.take("c_dim", 0) or None,
        "w_dim": given.take("w_dim", 512),
        "sample_size": given.take("img_resolution", None),
        "out_channels": given.take("img_channels", 3),
    }
    return given, config


def records(checkpoint: Checkpoint) -> dict[str, Record]:
    """The networks at the top of a pickle: G, D, G_ema."""
    tree = checkpoint.tree if isinstance(checkpoint.tree, dict) else {}
    return {name: value for name, value in tree.items() if isinstance(value, Record) and value.module == "torch_utils.persistence"}


def arguments(record: Record, names: tuple[str, ...] = ()) -> dict[str, Any]:
    """The constructor's arguments; `names` are those of the positional ones."""
    given = record.get("_init_args") or ()
    return {**dict(zip(names, given, strict=False)), **dict(record.get("_init_kwargs") or {})}


def attribute(record: Record, path: str, name: str, default: Any) -> Any:
    """An attribute of a layer, by the layer's path: what a constructor's default was is then no question of the version."""
    layer: Any = record
    for part in path.split("."):
        layer = (layer.get("_modules") or {}).get(part) if isinstance(layer, Record) else None
    return layer.get(name, default) if isinstance(layer, Record) else default


class Arguments:
    """Takes a constructor's arguments one by one, so that what nobody took is known."""

    def __init__(self, where: str, given: Mapping[str, Any]) -> None:
        self.where, self.left = where, dict(given)

    def take(self, name: str, default: Any) -> Any:
        return self.left.pop(name, default)

    def inner(self, name: str) -> Arguments:
        given = self.left.pop(name, None) or {}
        if not isinstance(given, Mapping):
            raise ValueError(f"{self.where}: {name} is a {type(given).__name__} where a table is expected.")
        return Arguments(f"{self.where}.{name}", given)

    def merge(self, other: Arguments) -> None:
        """Arguments that an outer constructor hands through."""
        self.left = {**other.left, **self.left}

    def only(self, name: str, *allowed: Any) -> None:
        """An argument that our network has no other value for."""
        value = self.left.pop(name, allowed[0])
        if value not in allowed:
            raise ValueError(
                f"{self.where}: {name} = {value!r} is not covered; only {' or '.join(map(repr, allowed))} is. Convert another network."
            )

    def drop(self, *names: str) -> None:
        """Arguments without effect on what is computed."""
        for name in names:
            self.left.pop(name, None)

    def done(self) -> None:
        if self.left:
            raise ValueError(f"{self.where}: arguments {', '.join(sorted(map(str, self.left)))} are not known; this is another network.")


def taps_of(
    state: Mapping[str, Tensor], layers: tuple[str, ...], default: tuple[float, ...] = (1, 3, 3, 1)
) -> tuple[float, ...]:
    """The taps of the resampling filter that is stored with the layers, (K, K) of sum one, scaled to the least of them.

    Args:
        layers: names of the layers that resample; the others store one too, and do not use it.

    Raises:
        ValueError: two layers have different filters, or one that is no outer product.
    """
    filters = [
        tensor.double() for key, tensor in state.items()
        if key.endswith(".resample_filter") and tensor.ndim == 2 and (key.split(".")[-2] in layers or key.split(".")[-2][1:].isdigit())
    ]  # fmt: skip
    if not filters:
        return default
    first = filters[0]
    taps = first.sum(0) / first.sum()
    if any(f.shape != first.shape or not torch.allclose(f, first, atol=1e-7) for f in filters):
        raise ValueError("its layers have different resampling filters; this network is not covered.")
    if not torch.allclose(torch.outer(taps, taps), first / first.sum(), atol=1e-6):
        raise ValueError("its resampling filter is not separable; this network is not covered.")
    scaled = (taps / taps[taps.abs() > 1e-9].abs().min()).tolist()
    return tuple(float(round(t)) if abs(t - round(t)) < 1e-4 else t for t in scaled)


def move(state: Mapping[str, Tensor], source: str, component: str, plan: Plan) -> dict[str, Tensor]:
    """Keys that keep their names; filters are computed by our layers from the configuration."""
    kept = {}
    for key, tensor in state.items():
        if key.rpartition(".")[2] == "resample_filter":
            plan.dropped[f"{source}.{key}"] = "made from the configuration"
        else:
            kept[key] = tensor
            plan.used[f"{source}.{key}"] = f"{component}.{key}"
    return kept


def flag(options: Mapping[str, Any], name: str) -> bool:
    value = options.get(name, False)
    if not isinstance(value, bool):
        raise ValueError(f"option {name} = {value!r}; give true or false.")
    return value


def choose(checkpoint: Checkpoint, found: Mapping[str, Record], options: Mapping[str, Any]) -> str:
    """Which of the generators is asked for."""
    name = options.get("network", "G_ema" if "G_ema" in found else "G")
    if name not in ("G", "G_ema"):
        raise ValueError(f"option network = {name!r} is none of G_ema, G.")
    if name not in found:
        raise ValueError(f"{checkpoint.path} has no network {name} (it has {', '.join(found) or 'none'}); choose another by network=.")
    return name


def others(plan: Plan, checkpoint: Checkpoint, taken: set[str]) -> None:
    """What the pickle holds besides, by name."""
    reasons = {"G": "the moving average G_ema is taken", "G_ema": "G is asked for", "D": "for training; option discriminator=true takes it"}
    for name in checkpoint.tree:
        if name not in taken:
            plan.dropped[f"{name}.*"] = reasons.get(name, "for training only")


def discriminator(record: Record, source: str, plan: Plan) -> Component:
    """Adds D to a plan: it is the same in StyleGAN2-ADA and StyleGAN3."""
    state = tensors(record)
    config = discriminator_config(record, state)
    kept = move(state, source, "discriminator", plan)
    return Component(StyleGAN2Discriminator, config, lambda: kept)


def discriminator_config(record: Record, state: Mapping[str, Tensor]) -> dict[str, Any]:
    given = Arguments("D", arguments(record, ("c_dim", "img_resolution", "img_channels")))
    classes = given.take("c_dim", 0)
    config = {
        "sample_size": given.take("img_resolution", None),
        "in_channels": given.take("img_channels", 3),
        "num_classes": classes or None,
        "architecture": given.take("architecture", "resnet"),
        "channel_base": given.take("channel_base", 32768),
        "channel_max": given.take("channel_max", 512),
        "conv_clamp": attribute(record, "b4.conv", "conv_clamp", None),
        "cmap_dim": given.take("cmap_dim", None),
        "resample_taps": taps_of(state, ("conv1", "skip")),
    }
    given.drop("num_fp16_res", "conv_clamp")
    block, mapping, epilogue = given.inner("block_kwargs"), given.inner("mapping_kwargs"), given.inner("epilogue_kwargs")
    block.drop("fp16_channels_last", "freeze_layers", "resample_filter")
    block.only("activation", "lrelu")
    epilogue.only("activation", "lrelu")
    config["mbstd_group_size"] = epilogue.take("mbstd_group_size", 4)
    config["mbstd_num_channels"] = epilogue.take("mbstd_num_channels", 1)
    config["num_mapping_layers"] = mapping.take("num_layers", 8)
    only_usual_mapping(mapping)
    for part in (given, block, mapping, epilogue):
        part.done()
    return config


def only_usual_mapping(mapping: Arguments) -> None:
    mapping.only("embed_features", None)
    mapping.only("layer_features", None)
    mapping.only("activation", "lrelu")
    mapping.only("lr_multiplier", 0.01)
