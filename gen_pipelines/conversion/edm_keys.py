"""The key layouts of EDM's and EDM2's networks: blocks are named after their resolution and their place in it."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .base import Made, Plan

__all__ = ["account", "adm_config", "adm_state", "edm2_config", "edm2_state", "lazily", "score_unet_config", "score_unet_state"]

# what the constructors assume where the recorded arguments do not say
_SCORE_DEFAULTS: dict[str, Any] = {
    "label_dim": 0, "augment_dim": 0, "model_channels": 128, "channel_mult": (1, 2, 2, 2), "channel_mult_emb": 4, "num_blocks": 4,
    "attn_resolutions": (16,), "dropout": 0.1, "label_dropout": 0, "embedding_type": "positional", "channel_mult_noise": 1,
    "encoder_type": "standard", "decoder_type": "standard", "resample_filter": (1, 1),
}  # fmt: skip
_ADM_DEFAULTS: dict[str, Any] = {
    "label_dim": 0, "augment_dim": 0, "model_channels": 192, "channel_mult": (1, 2, 3, 4), "channel_mult_emb": 4, "num_blocks": 3,
    "attn_resolutions": (32, 16, 8), "dropout": 0.1, "label_dropout": 0,
}  # fmt: skip
_EDM2_DEFAULTS: dict[str, Any] = {
    "label_dim": 0, "model_channels": 192, "channel_mult": (1, 2, 3, 4), "channel_mult_noise": None, "channel_mult_emb": None,
    "num_blocks": 3, "attn_resolutions": (16, 8), "label_balance": 0.5, "concat_balance": 0.5, "resample_filter": (1, 1),
    "channels_per_head": 64, "dropout": 0, "res_balance": 0.3, "attn_balance": 0.3, "clip_act": 256, "logvar_channels": 128,
}  # fmt: skip

Take = Callable[[Tensor], Tensor]
# source key -> [(target key, how), ...], or a sentence that says why it is left out
Map = dict[str, list[tuple[str, Take]] | str]

FILTER = "a filter without learned weights, which the configuration gives"
AUGMENT = "conditioning on augmentations, which sampling sets to zero"


def _arguments(given: Mapping[str, Any], defaults: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The recorded arguments with the defaults of the rest.

    Raises:
        ValueError: an argument that is not known.
    """
    needed = {"img_resolution", "in_channels", "out_channels"}
    if unknown := sorted(set(given) - set(defaults) - needed):
        raise ValueError(f"{what}: the argument {', '.join(map(repr, unknown))} of the recorded network is not known to this converter.")
    if lacking := sorted(needed - set(given)):
        raise ValueError(f"{what}: the recorded network does not say {', '.join(lacking)}.")
    return {**defaults, **given}


def same(value: Tensor) -> Tensor:
    """The tensor as it is."""
    return value


def _third(which: int, heads: int, flat: bool = True) -> Take:
    """Queries (0), keys (1) or values (2) of a fused layer that has them in turn, channel by channel, within each head."""

    def take(value: Tensor) -> Tensor:
        value = value.reshape(heads, -1, 3, *value.shape[1:])[:, :, which].flatten(0, 1)
        return value.flatten(1).contiguous() if flat and value.ndim == 4 else value.contiguous()

    return take


def _flat(value: Tensor) -> Tensor:
    """A pointwise convolution as a linear layer."""
    return value.flatten(1) if value.ndim == 4 else value


def _table(bias: Tensor | None, null: bool, scale: float) -> Take:
    """A linear layer of one-hot labels as a table, a row for each class; with a last row for none of them if the network knows that."""

    def take(weight: Tensor) -> Tensor:
        rows = weight.t() * scale
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])]) if null else rows
        return (rows if bias is None else rows + bias.to(rows.device)).contiguous()

    return take


def _places(mults: tuple[int, ...], size: int) -> dict[int, int]:
    return {size >> i: i for i in range(len(mults))}


# ------------------------------------------------------------------------------------------------------------- DDPM++ and NCSN++


def score_unet_config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A `ScoreUNetModel`'s config from the recorded arguments of EDM's network for DDPM++ and NCSN++."""
    a = _arguments(arguments, _SCORE_DEFAULTS, "SongUNet")
    return {
        "sample_size": a["img_resolution"],
        "in_channels": a["in_channels"],
        "out_channels": a["out_channels"],
        "num_class_embeds": a["label_dim"] + bool(a["label_dropout"]) if a["label_dim"] else None,
        "base_channels": a["model_channels"],
        "block_out_channels": tuple(a["model_channels"] * mult for mult in a["channel_mult"]),
        "layers_per_block": a["num_blocks"],
        "attention_resolutions": tuple(a["attn_resolutions"]),
        "dropout": float(a["dropout"]),
        "resample_taps": tuple(a["resample_filter"]),
        "input_pyramid": {"standard": "none", "skip": "input_skip", "residual": "residual"}[a["encoder_type"]],
        "output_pyramid": {"standard": "none", "skip": "output_skip"}[a["decoder_type"]],
        "time_embedding": a["embedding_type"],
        "time_channels": a["model_channels"] * a["channel_mult_noise"],
        "embedding_mult": a["channel_mult_emb"],
    }


_SCORE_BLOCK = {"norm0": "norm_0", "conv0": "conv_0", "affine": "time", "norm1": "norm_1", "conv1": "conv_1", "skip": "shortcut"}


def score_unet_map(arguments: Mapping[str, Any], state: Mapping[str, Tensor]) -> Map:
    """Where each tensor of EDM's network for DDPM++ and NCSN++ goes in a `ScoreUNetModel`."""
    a = _arguments(arguments, _SCORE_DEFAULTS, "SongUNet")
    levels, last = _places(a["channel_mult"], a["img_resolution"]), len(a["channel_mult"]) - 1
    found: Map = {}
    for key in state:
        head, _, rest = key.partition(".")
        if key.endswith("resample_filter"):
            found[key] = FILTER
        elif head == "map_augment":
            found[key] = AUGMENT
        elif head == "map_noise":
            found[key] = [("frequencies", lambda v: v.double().mul(2 * math.pi).to(v.dtype))]
        elif head in ("map_layer0", "map_layer1"):
            found[key] = [(f"time_{head[-1]}.{rest}", same)]
        elif key == "map_label.weight":
            table = _table(state["map_label.bias"], bool(a["label_dropout"]), math.sqrt(a["label_dim"]))
            found[key] = [("class_embedding.weight", table)]
        elif key == "map_label.bias":
            found[key] = "added to every row of the table of classes"
        elif match := re.fullmatch(r"(enc|dec)\.(\d+)x\d+_([a-z_]+?)(\d*)\.(.+)", key):
            side, size, place, number, name = match.groups()
            if int(size) not in levels:
                continue
            i = levels[int(size)]
            found[key] = _score_targets(side, i, last, place, number, name, a)
    return found


def _score_targets(side: str, i: int, last: int, place: str, number: str, name: str, a: Mapping[str, Any]) -> list[tuple[str, Take]]:
    """One tensor of a block of EDM's network: `place` is block, conv, down, up, in or aux_..., at level i."""
    j = last - i  # of the decoder
    attention = None
    if side == "enc":
        if place == "conv":
            return [(f"conv_in.{name}", same)]
        if place.startswith("aux_"):
            return [(f"encoder.{i - 1}.{'pyramid' if place == 'aux_skip' else 'pyramid_down.conv'}.{name}", same)]
        block = f"encoder.{i - 1}.down" if place == "down" else f"encoder.{i}.blocks.{number}"
        attention = f"encoder.{i}.attentions.{number}"
    elif place == "in":
        block, attention = f"middle_{number}", "middle_attention"
    elif place.startswith("aux_"):
        what = place.removeprefix("aux_")
        return [(f"decoder.{j}.{what}.{name}" if a["decoder_type"] == "skip" else f"{what}_out.{name}", same)]
    else:
        block = f"decoder.{j - 1}.up" if place == "up" else f"decoder.{j}.blocks.{number}"
        attention = f"decoder.{j}.attention"
    layer, _, leaf = name.partition(".")
    if layer == "norm2":
        return [(f"{attention}.norm.{leaf}", same)]
    if layer == "qkv":
        return [(f"{attention}.to_{which}.{leaf}", _third(n, 1)) for n, which in enumerate("qkv")]
    if layer == "proj":
        return [(f"{attention}.to_out.{leaf}", _flat)]
    return [(f"{block}.{_SCORE_BLOCK.get(layer, layer)}.{leaf}", same)]


# ----------------------------------------------------------------------------------------------------------------------------- ADM


def adm_config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A `UNet2DModel`'s config from the recorded arguments of EDM's network for ADM.

    Raises:
        ValueError: a network that diffusers' class cannot be: its group normalisation has one number of groups throughout, and its
            embedding of the time is as wide as the first resolution.
    """
    a = _arguments(arguments, _ADM_DEFAULTS, "DhariwalUNet")
    widths = [a["model_channels"] * mult for mult in a["channel_mult"]]
    if a["channel_mult"][0] != 1 or a["channel_mult_emb"] != 4:
        raise ValueError(
            f"DhariwalUNet: channel_mult[0] = {a['channel_mult'][0]}, channel_mult_emb = {a['channel_mult_emb']}; UNet2DModel has 1 and 4."
        )
    if min(widths) < 128:
        raise ValueError(
            f"DhariwalUNet: {min(widths)} channels are normalised in {min(widths) // 4} groups and wider layers in more; UNet2DModel has "
            "32 throughout, which is so where every resolution has at least 128 channels."
        )
    attention = [a["img_resolution"] >> i in a["attn_resolutions"] for i in range(len(widths))]
    return {
        "sample_size": a["img_resolution"],
        "in_channels": a["in_channels"],
        "out_channels": a["out_channels"],
        "freq_shift": 0,
        "flip_sin_to_cos": True,
        "down_block_types": tuple("AttnDownBlock2D" if here else "ResnetDownsampleBlock2D" for here in attention),
        "up_block_types": tuple("AttnUpBlock2D" if here else "ResnetUpsampleBlock2D" for here in reversed(attention)),
        "block_out_channels": tuple(widths),
        "layers_per_block": a["num_blocks"],
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "dropout": float(a["dropout"]),
        "attention_head_dim": 64,
        "norm_num_groups": 32,
        "attn_norm_num_groups": 32,
        "norm_eps": 1e-5,
        "resnet_time_scale_shift": "scale_shift",
        "num_class_embeds": a["label_dim"] + bool(a["label_dropout"]) if a["label_dim"] else None,
    }


_ADM_BLOCK = {
    "norm0": "norm1", "conv0": "conv1", "affine": "time_emb_proj", "norm1": "norm2", "conv1": "conv2", "skip": "conv_shortcut",
}  # fmt: skip


def adm_map(arguments: Mapping[str, Any], state: Mapping[str, Tensor]) -> Map:
    """Where each tensor of EDM's network for ADM goes in a `UNet2DModel`."""
    a = _arguments(arguments, _ADM_DEFAULTS, "DhariwalUNet")
    levels, last = _places(a["channel_mult"], a["img_resolution"]), len(a["channel_mult"]) - 1
    found: Map = {}
    for key in state:
        head, _, rest = key.partition(".")
        if key.endswith("resample_filter"):
            found[key] = FILTER
        elif head == "map_augment":
            found[key] = AUGMENT
        elif head in ("map_layer0", "map_layer1"):
            found[key] = [(f"time_embedding.linear_{int(head[-1]) + 1}.{rest}", same)]
        elif key == "map_label.weight":
            found[key] = [("class_embedding.weight", _table(None, bool(a["label_dropout"]), 1.0))]
        elif head in ("out_norm", "out_conv"):
            found[key] = [(f"conv_norm_out.{rest}" if head == "out_norm" else f"conv_out.{rest}", same)]
        elif match := re.fullmatch(r"(enc|dec)\.(\d+)x\d+_([a-z]+?)(\d*)\.(.+)", key):
            side, size, place, number, name = match.groups()
            if int(size) not in levels:
                continue
            i = levels[int(size)]
            j, heads = last - i, a["model_channels"] * a["channel_mult"][i] // 64
            if place == "conv":
                found[key] = [(f"conv_in.{name}", same)]
                continue
            if place == "in":
                where, number = "mid_block", int(number)
                attention = "mid_block.attentions.0"
            else:
                at = {"down": i - 1, "up": j - 1}.get(place, i if side == "enc" else j)
                where = f"{'down' if side == 'enc' else 'up'}_blocks.{at}"
                attention = f"{where}.attentions.{number}"
            block = f"{where}.{place}samplers.0" if place in ("down", "up") else f"{where}.resnets.{number}"
            layer, _, leaf = name.partition(".")
            if layer == "norm2":
                found[key] = [(f"{attention}.group_norm.{leaf}", same)]
            elif layer == "qkv":
                found[key] = [(f"{attention}.to_{which}.{leaf}", _third(n, heads)) for n, which in enumerate("qkv")]
            elif layer == "proj":
                found[key] = [(f"{attention}.to_out.0.{leaf}", _flat)]
            else:
                found[key] = [(f"{block}.{_ADM_BLOCK.get(layer, layer)}.{leaf}", same)]
    return found


# ---------------------------------------------------------------------------------------------------------------------------- EDM2


def edm2_config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """An `EDM2UNetModel`'s config from the recorded arguments of EDM2's network; `in_channels` and `out_channels` are img_channels."""
    a = _arguments(arguments, _EDM2_DEFAULTS, "EDM2's network")
    base = a["model_channels"]
    return {
        "sample_size": a["img_resolution"],
        "in_channels": a["in_channels"],
        "num_class_embeds": a["label_dim"] or None,
        "base_channels": base,
        "channel_mults": tuple(a["channel_mult"]),
        "layers_per_block": a["num_blocks"],
        "attention_resolutions": tuple(a["attn_resolutions"]),
        "channels_per_head": a["channels_per_head"],
        "dropout": float(a["dropout"]),
        "label_balance": a["label_balance"],
        "concat_balance": a["concat_balance"],
        "residual_balance": a["res_balance"],
        "attention_balance": a["attn_balance"],
        "clip": None if a["clip_act"] is None else float(a["clip_act"]),
        "resample_taps": tuple(a["resample_filter"]),
        "time_channels": None if a["channel_mult_noise"] is None else base * a["channel_mult_noise"],
        "embedding_channels": None if a["channel_mult_emb"] is None else base * a["channel_mult_emb"],
        "logvar_channels": a["logvar_channels"],
    }


_EDM2_BLOCK = {
    "emb_gain": "time_gain", "conv_res0": "conv_0", "emb_linear": "time", "conv_res1": "conv_1", "conv_skip": "shortcut",
    "attn_proj": "project",
}  # fmt: skip
_FOURIER = {"freqs": "frequencies", "phases": "phases"}


def edm2_map(arguments: Mapping[str, Any], state: Mapping[str, Tensor]) -> Map:
    """Where each tensor of EDM2's network (keys `unet.…` and `logvar_…`) goes in an `EDM2UNetModel`."""
    a = _arguments(arguments, _EDM2_DEFAULTS, "EDM2's network")
    levels, last = _places(a["channel_mult"], a["img_resolution"]), len(a["channel_mult"]) - 1
    top = {
        "unet.emb_noise": "embed_time", "unet.emb_label": "embed_class", "unet.out_conv": "conv_out", "logvar_linear": "logvar",
    }  # fmt: skip
    found: Map = {}
    for key in state:
        parent, _, leaf = key.rpartition(".")
        if key == "unet.out_gain":
            found[key] = [("gain_out", same)]
        elif parent in top:
            found[key] = [(f"{top[parent]}.{leaf}", same)]
        elif parent in ("unet.emb_fourier", "logvar_fourier") and leaf in _FOURIER:
            found[key] = [(f"{'time' if parent.startswith('unet') else 'logvar_time'}.{_FOURIER[leaf]}", same)]
        elif match := re.fullmatch(r"unet\.(enc|dec)\.(\d+)x\d+_([a-z]+?)(\d*)\.(.+)", key):
            side, size, place, number, name = match.groups()
            if int(size) not in levels:
                continue
            i = levels[int(size)]
            j = last - i
            level = f"encoder.{i}" if side == "enc" else f"decoder.{j}"
            block = f"middle_{number}" if place == "in" else f"{level}.blocks.{number}" if place == "block" else f"{level}.first"
            layer, _, leaf = name.partition(".")
            if layer == "attn_qkv":
                heads = a["model_channels"] * a["channel_mult"][i] // a["channels_per_head"]
                found[key] = [(f"{block}.qkv.{leaf}", _regrouped(heads))]
            else:
                found[key] = [(".".join(filter(None, (block, _EDM2_BLOCK.get(layer, layer), leaf))), same)]
    return found


def _regrouped(heads: int) -> Take:
    """A fused layer whose outputs are (head, channel, of three) in the order (of three, head, channel)."""
    parts = [_third(n, heads, flat=False) for n in range(3)]
    return lambda value: torch.cat([part(value) for part in parts])


# ----------------------------------------------------------------------------------------------------------------------- all three


def lazily(found: Map, state: Mapping[str, Tensor]) -> dict[str, Tensor | Made]:
    """The target's state dict: tensors that keep their numbers as views, the others to be made when they are written."""
    made: dict[str, Tensor | Made] = {}
    for key, targets in found.items():
        for target, take in targets if not isinstance(targets, str) else ():
            if take is same:
                made[target] = state[key]
                continue
            promised = take(torch.empty_like(state[key], device="meta"))
            made[target] = Made(functools.partial(take, state[key]), tuple(promised.shape), promised.dtype)
    return made


def account(plan: Plan, found: Map, source: str, component: str) -> None:
    """Enters in a plan where every key went.

    Args:
        source: what the keys begin with in the checkpoint.
    """
    for key, targets in found.items():
        if isinstance(targets, str):
            plan.dropped[f"{source}{key}"] = targets
        elif targets:
            plan.used[f"{source}{key}"] = ", ".join(f"{component}.{target}" for target, _ in targets)


def applied(found: Map, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The target's state dict, at once."""
    return {name: value.make() if isinstance(value, Made) else value for name, value in lazily(found, state).items()}


def score_unet_state(arguments: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a `ScoreUNetModel` from that of EDM's network for DDPM++ and NCSN++."""
    return applied(score_unet_map(arguments, state), state)


def adm_state(arguments: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a `UNet2DModel` from that of EDM's network for ADM."""
    return applied(adm_map(arguments, state), state)


def edm2_state(arguments: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of an `EDM2UNetModel` from that of EDM2's network."""
    return applied(edm2_map(arguments, state), state)
