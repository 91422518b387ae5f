"""rosinality's Glow: the state dict that its `train.py` saves, to our `GlowModel`.

What differs, and where it goes:

- pictures lie in [-1/2, 1/2) there and in [-1, 1) here: the factor 2 goes into the first activation normalisation, and so the density is
  one of our coordinates;
- a scale of an activation normalisation may be negative there: its sign goes into the 1 x 1 convolution after it;
- 1 x 1 convolutions of the last level, and of all with `--no_lu`, are plain matrices there: they are factored here, in float64;
- convolutions that start at zero see ones around the picture there: `edge_value`;
- the prior on top is such a convolution of zeros, so it depends on the place alone: here it is a mean and a deviation for every value.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .base import Component, Format, Plan
from .keys import get, numbered
from .reader import Checkpoint, tensors

_LU = ("w_p", "w_l", "w_u", "w_s", "s_sign")
_MASKS = ("u_mask", "l_mask", "l_eye")


class RosinalityGlow(Format):
    """`checkpoint/model_N.pt` of https://github.com/rosinality/glow-pytorch."""

    name = "rosinality_glow"
    title = "rosinality's glow-pytorch"
    paper = "https://arxiv.org/abs/1807.03039"
    extensions = (".pt",)
    options: Mapping[str, str] = {
        "sample_size": "height and width of the pictures it was trained on, which the file does not hold (--img_size there, 64 by default)",
        "num_bits": "bits of a value that it was trained with (--n_bits there; 5, its default, where nothing is given)",
    }

    def matches(self, checkpoint: Checkpoint) -> float:
        """By the names of the first flow."""
        state, _ = _state(tensors(checkpoint.tree))
        wanted = ("actnorm.loc", "actnorm.scale", "coupling.net.0.weight", "coupling.net.4.scale", "coupling.net.4.conv.weight")
        return sum(f"blocks.0.flows.0.{key}" in state for key in wanted) / len(wanted)

    def plan(self, checkpoint: Checkpoint, options: Mapping[str, Any]) -> Plan:
        """One component, `flow`, in a `GlowPipeline`."""
        from ..models.flows.glow import GlowModel
        from ..pipelines.glow import GlowPipeline

        state, prefix = _state(tensors(checkpoint.tree))
        config = config_from(state, options)
        used, dropped = _destinations(state)
        notes = [] if options.get("num_bits") else ["5 bits a value are taken, the default of its training; the file does not say"]
        return Plan(
            format=self.name,
            pipeline=GlowPipeline,
            components={"flow": Component(GlowModel, config, lambda: rename(state, config))},
            init={"default_temperature": 0.7},
            used={prefix + key: value for key, value in used.items()},
            dropped={prefix + key: value for key, value in dropped.items()},
            notes=notes,
        )


def config_from(state: Mapping[str, Tensor], options: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of `GlowModel` that computes what a state dict without its `module.` prefix computes.

    Raises:
        ValueError: it is no such state dict, or the size of the pictures was not given.
    """
    levels = len(numbered(state, r"blocks\.(\d+)\."))
    steps = [len(numbered(state, rf"blocks\.{level}\.flows\.(\d+)\.")) for level in range(levels)]
    if not levels or 0 in steps:
        raise ValueError("the state dict has no blocks.0.flows.0, so it is no Glow of rosinality's.")
    size = options.get("sample_size")
    if size is None:
        raise ValueError("the file does not say how large the pictures are: give --set sample_size=64, or what --img_size was in training.")
    if isinstance(size, bool) or not isinstance(size, int) or size < 1 or size % 2**levels:
        raise ValueError(f"sample_size: {levels} levels need a multiple of {2**levels}, got {size!r}.")
    channels = get(state, "blocks.0.flows.0.actnorm.loc").shape[1]
    last = get(state, "blocks.0.flows.0.coupling.net.4.conv.weight")
    return {
        "in_channels": channels // 4,
        "sample_size": size,
        "num_levels": levels,
        "num_steps": steps,
        "hidden_channels": [get(state, f"blocks.{level}.flows.0.coupling.net.0.weight").shape[0] for level in range(levels)],
        "coupling": "affine" if last.shape[0] == channels else "additive",
        "num_bits": options.get("num_bits", 5),
        "edge_value": 1.0,
    }


def rename(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Our weights from theirs.

    Raises:
        ValueError: a key is missing, or a layer cannot be inverted.
    """
    found: dict[str, Tensor] = {}
    levels = config["num_levels"]
    for level in range(levels):
        for step in range(config["num_steps"][level]):
            found |= _step(state, f"blocks.{level}.flows.{step}.", f"levels.{level}.steps.{step}.", first=level == step == 0)
        if level + 1 < levels:
            part = f"blocks.{level}.prior."
            found |= {
                f"priors.{level}.condition.weight": get(state, f"{part}conv.weight"),
                f"priors.{level}.condition.bias": get(state, f"{part}conv.bias"),
                f"priors.{level}.condition.gain": get(state, f"{part}scale").flatten(),
            }
    side = config["sample_size"] // 2**levels
    mean, log_std = _top(state, f"blocks.{levels - 1}.prior.", side).chunk(2, 0)
    return found | {"top.mean": mean.contiguous(), "top.log_std": log_std.contiguous()}


def _step(state: Mapping[str, Tensor], source: str, target: str, first: bool) -> dict[str, Tensor]:
    part = lambda key: get(state, source + key)
    scale, shift = part("actnorm.scale").flatten().double(), part("actnorm.loc").flatten().double()
    if not (torch.isfinite(scale).all() and (scale != 0).all()):
        raise ValueError(f"{source}actnorm.scale has zeros, so the flow cannot be inverted; it was never trained, or the file is damaged.")
    signs = scale.sign()
    permutation, lower, diagonal, upper = _factors(state, source + "invconv.")
    dtype = part("actnorm.scale").dtype
    found = {
        "actnorm.shift": (2 * shift if first else shift).to(dtype),
        "actnorm.log_scale": (scale.abs().log() - (math.log(2) if first else 0.0)).to(dtype),
        "actnorm.initialized": part("actnorm.initialized").bool().reshape(()),
        "conv.permutation": permutation.to(dtype),
        "conv.lower": lower.tril(-1).to(dtype),
        "conv.upper": (upper.triu(1) * signs).to(dtype),
        "conv.log_diagonal": diagonal.abs().log().to(dtype),
        "conv.sign": (diagonal.sign() * signs).to(dtype),
        "coupling.network.last.gain": part("coupling.net.4.scale").flatten(),
    }
    for ours, theirs in (("first", "0"), ("body.0", "2"), ("last", "4.conv")):
        for kind in ("weight", "bias"):
            found[f"coupling.network.{ours}.{kind}"] = part(f"coupling.net.{theirs}.{kind}")
    return {target + key: value for key, value in found.items()}


def _factors(state: Mapping[str, Tensor], part: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """P, L, the diagonal of U and U of a 1 x 1 convolution, in float64."""
    if f"{part}weight" in state:
        weight = state[f"{part}weight"].double()[:, :, 0, 0]
        permutation, lower, upper = torch.linalg.lu(weight)
        diagonal = upper.diagonal()
        if not (torch.isfinite(diagonal).all() and (diagonal != 0).all()):
            raise ValueError(f"{part}weight is singular, so the flow cannot be inverted; the file is damaged.")
        return permutation, lower, diagonal, upper
    permutation, lower, upper, log_diagonal, sign = (get(state, part + name).double() for name in _LU)
    return permutation, lower, sign * log_diagonal.exp(), upper


def _top(state: Mapping[str, Tensor], part: str, side: int) -> Tensor:
    """Mean and log of the deviation of the last level, (2 c, h, w): a convolution of zeros with ones around them."""
    weight, bias, scale = (get(state, part + name).double() for name in ("conv.weight", "conv.bias", "scale"))
    zeros = torch.zeros(1, weight.shape[1], side, side, dtype=torch.float64)
    out = torch.nn.functional.conv2d(torch.nn.functional.pad(zeros, (1, 1, 1, 1), value=1.0), weight, bias)
    return (out * torch.exp(3 * scale))[0].to(state[f"{part}conv.weight"].dtype)


def _destinations(state: Mapping[str, Tensor]) -> tuple[dict[str, str], dict[str, str]]:
    """Where every key goes, and why some are dropped; unknown ones are in neither."""
    levels = len(numbered(state, r"blocks\.(\d+)\."))
    inner: dict[str, str | Callable[[str], str]] = {
        "actnorm.loc": "actnorm.shift", "actnorm.scale": "actnorm.log_scale, {0}conv.sign, {0}conv.upper",
        "actnorm.initialized": "actnorm.initialized",
        "invconv.weight": "conv.permutation, {0}conv.lower, {0}conv.upper, {0}conv.log_diagonal, {0}conv.sign",
        "invconv.w_p": "conv.permutation", "invconv.w_l": "conv.lower", "invconv.w_u": "conv.upper", "invconv.w_s": "conv.log_diagonal",
        "invconv.s_sign": "conv.sign", "coupling.net.4.scale": "coupling.network.last.gain",
        **{f"coupling.net.{theirs}.{kind}": f"coupling.network.{ours}.{kind}" for kind in ("weight", "bias")
           for ours, theirs in (("first", "0"), ("body.0", "2"), ("last", "4.conv"))},
    }  # fmt: skip
    priors = {"conv.weight": "condition.weight", "conv.bias": "condition.bias", "scale": "condition.gain"}
    used, dropped = {}, {}
    for key in state:
        flow, prior = re.fullmatch(r"blocks\.(\d+)\.flows\.(\d+)\.(.+)", key), re.fullmatch(r"blocks\.(\d+)\.prior\.(.+)", key)
        if flow and flow[3] in inner:
            place = f"flow.levels.{flow[1]}.steps.{flow[2]}."
            used[key] = place + inner[flow[3]].format(place)
        elif flow and flow[3].startswith("invconv.") and flow[3].removeprefix("invconv.") in _MASKS:
            dropped[key] = "a constant: which entries of a triangular matrix count"
        elif prior and prior[2] in priors and int(prior[1]) + 1 < levels:
            used[key] = f"flow.priors.{prior[1]}.{priors[prior[2]]}"
        elif prior and prior[2] in priors:
            used[key] = "flow.top.mean, flow.top.log_std"
    return used, dropped


def _state(found: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The state dict without the prefix of `DataParallel`, and the prefix."""
    prefix = "module." if any(key.startswith("module.blocks.") for key in found) else ""
    return {key.removeprefix(prefix): value for key, value in found.items()}, prefix
