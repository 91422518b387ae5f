"""The layout of OpenAI's U-Net state dicts, which guided diffusion, its descendants and latent diffusion share, read off keys and shapes.

    time_embed.{0,2}                                    the time's two linear layers
    label_emb                                           the class table
    input_blocks.K.{0,1}, middle_block.{0,1,2}, output_blocks.K.{0,1,2}
        in_layers.{0,2}, emb_layers.1, out_layers.{0,3}, skip_connection      a residual block
        norm, qkv, proj_out                             attention over pixels
        op, conv                                        a strided convolution, and one after nearest-neighbour upsampling
    out.{0,2}                                           the last norm and convolution
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .base import Made

__all__ = ["Layout", "Recipe", "layout_of", "looks_like_unet", "to_adm", "to_unet_2d"]

_NEEDED = ("time_embed.0.weight", "input_blocks.0.0.weight", "middle_block.0.in_layers.0.weight")
_NUMBER = re.compile(r"^(input_blocks|output_blocks)\.(\d+)\.")


@dataclass
class Recipe:
    """How a state dict is made of another: target key -> (source key, what is done to the tensor)."""

    entries: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = field(default_factory=dict)

    def add(self, target: str, source: str, change: Callable[[Tensor], Tensor] | None = None) -> None:
        """One tensor, unchanged by default."""
        self.entries[target] = (source, change or _same)

    def add_layer(self, target: str, source: str, keys: Mapping[str, Any], change: Callable[[Tensor], Tensor] | None = None) -> None:
        """A layer's weight and, where it has one, its bias; `change` is for the weight's shape alone where it is `squeeze`."""
        self.add(f"{target}.weight", f"{source}.weight", change)
        if f"{source}.bias" in keys:
            self.add(f"{target}.bias", f"{source}.bias", None if change is squeeze else change)

    def used(self, component: str, origin: Mapping[str, str]) -> dict[str, str]:
        """`Plan.used`: key of the source -> "component.key" of every tensor that it goes to; `origin` is the source's key of each here.

        Raises:
            ValueError: the source lacks a key.
        """
        if missing := [key for key, _ in self.entries.values() if key not in origin]:
            raise ValueError(f"the source has no {', '.join(missing[:5])}.")
        targets: dict[str, list[str]] = {}
        for target, (source, _) in self.entries.items():
            targets.setdefault(origin[source], []).append(f"{component}.{target}")
        return {source: ", ".join(names) for source, names in targets.items()}

    def state(self, source: Mapping[str, Tensor]) -> dict[str, Tensor | Made]:
        """The new state dict, without copies: what has to be computed is so when it is written."""
        made: dict[str, Tensor | Made] = {}
        for target, (key, change) in self.entries.items():
            if change in (_same, squeeze, rows_first):
                made[target] = change(source[key])
                continue
            shape = change(torch.empty_like(source[key], device="meta")).shape
            made[target] = Made(lambda change=change, tensor=source[key]: change(tensor), tuple(shape), source[key].dtype)
        return made

    def apply(self, source: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The new state dict as tensors."""
        return {target: change(source[key]) for target, (key, change) in self.entries.items()}


def _same(tensor: Tensor) -> Tensor:
    return tensor


def squeeze(tensor: Tensor) -> Tensor:
    """A 1 x 1 convolution's weight (out, in, 1, ...) as a linear layer's (out, in)."""
    return tensor.flatten(1)


def rows_first(tensor: Tensor) -> Tensor:
    """The transpose of a matrix, as a view."""
    return tensor.T


def rows_by_kind(tensor: Tensor, num_heads: int) -> Tensor:
    """Rows that are ordered head by head (q, k, v of the first head, then of the second) as all q, all k, all v."""
    return tensor.unflatten(0, (num_heads, 3, -1)).transpose(0, 1).flatten(0, 2)


@dataclass(frozen=True)
class Layout:
    """What keys and shapes say of a U-Net; what they cannot say are the heads, the order of q, k and v, and everything about time.

    Args:
        time_channels: numbers that the time is embedded from.
        in_channels, out_channels: of pictures.
        widths: channels of each level, from the largest size to the smallest.
        layers_per_block: residual blocks per level on the way down.
        attention_levels: whether there is attention at each level.
        transformer_levels: whether that attention is a transformer that looks at a condition (latent diffusion).
        resample: "conv", "pool" or "residual".
        scale_shift: whether the time gives scales and shifts.
        num_class_embeds: rows of the class table, or None.
        attention_as_2d: whether q, k and v come from a 2-D convolution, which is consistency_models' code.
    """

    time_channels: int
    in_channels: int
    out_channels: int
    widths: tuple[int, ...]
    layers_per_block: int
    attention_levels: tuple[bool, ...]
    transformer_levels: tuple[bool, ...]
    resample: str
    scale_shift: bool
    num_class_embeds: int | None
    attention_as_2d: bool

    def attention_widths(self) -> list[int]:
        """Channels of every attention, on the way down and in the middle."""
        return [width for width, has in zip(self.widths, self.attention_levels, strict=True) if has] + [self.widths[-1]]


def looks_like_unet(keys: Any) -> bool:
    """Whether these are the keys of a whole U-Net (not of its encoder alone)."""
    keys = keys if isinstance(keys, (set, frozenset, dict, Mapping)) else set(keys)
    return all(key in keys for key in (*_NEEDED, "out.0.weight", "output_blocks.0.0.in_layers.0.weight"))


def _blocks(keys: Any, name: str) -> list[int]:
    return sorted({int(m[2]) for key in keys if (m := _NUMBER.match(key)) and m[1] == name})


def layout_of(state: Mapping[str, Tensor], layers: int | None = None) -> Layout:
    """Reads a state dict's layout.

    Args:
        state: key -> tensor, or anything with `shape`.
        layers: residual blocks per level, of an encoder alone whose shapes fit several numbers.
    Raises:
        ValueError: the keys are not those of this U-Net, or contradict each other; the message names the first that does.
    """
    if missing := [key for key in _NEEDED if key not in state]:
        raise ValueError(f"OpenAI's U-Net: no {missing[0]!r} among the {len(state)} keys.")
    inputs = _blocks(state, "input_blocks")
    has_decoder = "output_blocks.0.0.in_layers.0.weight" in state
    count = inputs[-1] + 1  # a level ends in residual blocks, so the last block always has weights
    gaps = [k for k in range(count) if k not in inputs]
    convs = [k for k in inputs if f"input_blocks.{k}.0.op.weight" in state]
    if convs:
        resample, layers = "conv", convs[0] - 1
    elif gaps:
        resample, layers = "pool", gaps[0] - 1
    else:
        resample, layers = _residual(state, count, has_decoder, layers)
    if layers < 1 or count % (layers + 1):
        raise ValueError(f"OpenAI's U-Net: {count} input blocks are not levels of {layers} residual blocks and a change of size.")
    levels = count // (layers + 1)
    downs = [level * (layers + 1) for level in range(1, levels)]
    if resample != "residual" and (convs or gaps) != downs:
        raise ValueError(f"OpenAI's U-Net: sizes change at the input blocks {convs or gaps}; with levels of {layers} they do at {downs}.")
    widths, attention, transformers = [], [], []
    for level in range(levels):
        first = 1 + level * (layers + 1)
        prefix = f"input_blocks.{first}"
        if f"{prefix}.0.out_layers.3.weight" not in state:
            raise ValueError(f"OpenAI's U-Net: '{prefix}.0.out_layers.3.weight' is missing: no residual block where one must be.")
        widths.append(state[f"{prefix}.0.out_layers.3.weight"].shape[0])
        attention.append(f"{prefix}.1.norm.weight" in state)
        transformers.append(f"{prefix}.1.transformer_blocks.0.norm1.weight" in state)
    emb = state["input_blocks.1.0.emb_layers.1.weight"].shape[0]
    qkv = state.get("middle_block.1.qkv.weight")
    return Layout(
        time_channels=state["time_embed.0.weight"].shape[1],
        in_channels=state["input_blocks.0.0.weight"].shape[1],
        out_channels=state["out.2.weight"].shape[0] if has_decoder and "out.2.weight" in state else 0,
        widths=tuple(widths),
        layers_per_block=layers,
        attention_levels=tuple(attention),
        transformer_levels=tuple(transformers),
        resample=resample,
        scale_shift=emb == 2 * widths[0],
        num_class_embeds=state["label_emb.weight"].shape[0] if "label_emb.weight" in state else None,
        attention_as_2d=qkv is not None and len(qkv.shape) == 4,
    )


def _residual(state: Mapping[str, Tensor], count: int, has_decoder: bool, said: int | None) -> tuple[str, int]:
    """(kind, residual blocks per level) of a network whose input blocks all have weights and none of which is a strided convolution."""
    if has_decoder:  # the first output block with a second residual block, or with a convolution, is the last of its level
        for k in _blocks(state, "output_blocks"):
            if any(f"output_blocks.{k}.{j}.in_layers.0.weight" in state for j in (1, 2)):
                return "residual", k
        return "conv", count - 1  # one level
    # without a way up only widths and attention tell a block that halves the size; try what fits all of them
    fitting = [layers for layers in range(1, count) if count % (layers + 1) == 0 and _fits(state, count, layers)]
    if said is not None:
        fitting = [layers for layers in fitting if layers == said]
    if not fitting:
        of = "residual blocks" if said is None else f"{said} residual blocks"
        raise ValueError(f"OpenAI's U-Net: {count} input blocks are not levels of {of}.")
    if len(fitting) > 1:
        raise ValueError(f"{count} input blocks may be levels of {' or '.join(map(str, fitting))} residual blocks: give classifier_depth.")
    return "residual", fitting[0]


def _fits(state: Mapping[str, Tensor], count: int, layers: int) -> bool:
    widths = [state[f"input_blocks.{k}.0.out_layers.3.weight"].shape[0] for k in range(1, count)]
    attention = [f"input_blocks.{k}.1.norm.weight" in state for k in range(1, count)]
    for k in range(1, count):
        level, place = divmod(k - 1, layers + 1)
        start = level * (layers + 1)
        if place == layers:
            if attention[k - 1] or widths[k - 1] != widths[k - 2]:
                return False
        elif widths[k - 1] != widths[start] or attention[k - 1] != attention[start]:
            return False
    return True


# ------------------------------------------------------------------------------------------------------------------------ the two targets

_ADM_RESIDUAL = {"in_layers.0": "norm_1", "in_layers.2": "conv_1", "emb_layers.1": "time", "out_layers.0": "norm_2",
                 "out_layers.3": "conv_2", "skip_connection": "shortcut"}  # fmt: skip
_UNET_2D_RESIDUAL = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
                     "out_layers.3": "conv2", "skip_connection": "conv_shortcut"}  # fmt: skip


def _residual_block(recipe: Recipe, target: str, source: str, keys: Any, names: Mapping[str, str]) -> None:
    for theirs, ours in names.items():
        if f"{source}.{theirs}.weight" in keys:
            recipe.add_layer(f"{target}.{ours}", f"{source}.{theirs}", keys)


def _qkv(tensor: Tensor, num_heads: int, by_head: bool) -> Tensor:
    rows = tensor.flatten(1) if tensor.ndim > 1 else tensor
    return rows_by_kind(rows, num_heads) if by_head else rows


def to_adm(
    layout: Layout, keys: Any, heads: Callable[[int], int], by_head: bool, up_heads: Callable[[int], int] | None = None
) -> Recipe:
    """The recipe for `ADMUNet2DModel`, or its encoder.

    Args:
        layout: of the state dict.
        keys: of the state dict.
        heads: channels -> number of heads.
        by_head: whether the rows of q, k and v are ordered head by head.
        up_heads: on the way up, where it differs.
    """
    recipe = Recipe()
    up_heads = up_heads or heads

    def attention(target: str, source: str, width: int, count: Callable[[int], int]) -> None:
        recipe.add_layer(f"{target}.norm", f"{source}.norm", keys)
        number = count(width)
        for part in ("weight", "bias"):
            recipe.add(f"{target}.qkv.{part}", f"{source}.qkv.{part}", lambda t: _qkv(t, number, by_head))
        recipe.add_layer(f"{target}.out", f"{source}.proj_out", keys, squeeze)

    _shared(recipe, keys)
    layers, levels = layout.layers_per_block, len(layout.widths)
    for level, width in enumerate(layout.widths):
        for i in range(layers):
            k = 1 + level * (layers + 1) + i
            _residual_block(recipe, f"down_blocks.{k - 1}.residual", f"input_blocks.{k}.0", keys, _ADM_RESIDUAL)
            if layout.attention_levels[level]:
                attention(f"down_blocks.{k - 1}.attention", f"input_blocks.{k}.1", width, heads)
        k = (level + 1) * (layers + 1)
        if level < levels - 1 and layout.resample == "conv":
            recipe.add_layer(f"down_blocks.{k - 1}.resample.conv", f"input_blocks.{k}.0.op", keys)
        elif level < levels - 1 and layout.resample == "residual":
            _residual_block(recipe, f"down_blocks.{k - 1}.resample", f"input_blocks.{k}.0", keys, _ADM_RESIDUAL)
    _residual_block(recipe, "mid_block.residual_1", "middle_block.0", keys, _ADM_RESIDUAL)
    attention("mid_block.attention", "middle_block.1", layout.widths[-1], heads)
    _residual_block(recipe, "mid_block.residual_2", "middle_block.2", keys, _ADM_RESIDUAL)
    if layout.out_channels == 0:
        return recipe
    for j, level in enumerate(reversed(range(levels))):
        for i in range(layers + 1):
            k = j * (layers + 1) + i
            _residual_block(recipe, f"up_blocks.{k}.residual", f"output_blocks.{k}.0", keys, _ADM_RESIDUAL)
            if layout.attention_levels[level]:
                attention(f"up_blocks.{k}.attention", f"output_blocks.{k}.1", layout.widths[level], up_heads)
            after = 2 if layout.attention_levels[level] else 1
            if level > 0 and i == layers and layout.resample == "conv":
                recipe.add_layer(f"up_blocks.{k}.resample.conv", f"output_blocks.{k}.{after}.conv", keys)
            elif level > 0 and i == layers and layout.resample == "residual":
                _residual_block(recipe, f"up_blocks.{k}.resample", f"output_blocks.{k}.{after}", keys, _ADM_RESIDUAL)
    recipe.add_layer("norm_out", "out.0", keys)
    recipe.add_layer("conv_out", "out.2", keys)
    return recipe


def _shared(recipe: Recipe, keys: Any) -> None:
    recipe.add_layer("time_embedding.linear_1", "time_embed.0", keys)
    recipe.add_layer("time_embedding.linear_2", "time_embed.2", keys)
    recipe.add_layer("conv_in", "input_blocks.0.0", keys)
    if "label_emb.weight" in keys:
        recipe.add("class_embedding.weight", "label_emb.weight")


def to_unet_2d(
    layout: Layout,
    keys: Any,
    heads: Callable[[int], int],
    by_head: bool,
    transformer: Callable[[Recipe, str, str, Any], None] | None = None,
) -> Recipe:
    """The recipe for diffusers' `UNet2DModel`, or `UNet2DConditionModel` with `transformer`, which maps one of its transformers.

    Args:
        layout, keys, heads, by_head: as in `to_adm`.
        transformer: f(recipe, target prefix, source prefix, keys), for levels that attend to a condition.
    """
    recipe = Recipe()

    def attention(target: str, source: str, width: int) -> None:
        if transformer is not None:
            transformer(recipe, target, source, keys)
            return
        count = heads(width)
        recipe.add_layer(f"{target}.group_norm", f"{source}.norm", keys)
        for n, name in enumerate(("to_q", "to_k", "to_v")):
            for part in ("weight", "bias"):
                recipe.add(f"{target}.{name}.{part}", f"{source}.qkv.{part}", lambda t, n=n, c=count: _qkv(t, c, by_head).chunk(3)[n])
        recipe.add_layer(f"{target}.to_out.0", f"{source}.proj_out", keys, squeeze)

    _shared(recipe, keys)
    layers, levels = layout.layers_per_block, len(layout.widths)
    for level, width in enumerate(layout.widths):
        block = f"down_blocks.{level}"
        for i in range(layers):
            source = f"input_blocks.{1 + level * (layers + 1) + i}"
            _residual_block(recipe, f"{block}.resnets.{i}", f"{source}.0", keys, _UNET_2D_RESIDUAL)
            if layout.attention_levels[level]:
                attention(f"{block}.attentions.{i}", f"{source}.1", width)
        source = f"input_blocks.{(level + 1) * (layers + 1)}.0"
        if level < levels - 1 and layout.resample == "conv":
            recipe.add_layer(f"{block}.downsamplers.0.conv", f"{source}.op", keys)
        elif level < levels - 1:
            _residual_block(recipe, f"{block}.downsamplers.0", source, keys, _UNET_2D_RESIDUAL)
    _residual_block(recipe, "mid_block.resnets.0", "middle_block.0", keys, _UNET_2D_RESIDUAL)
    attention("mid_block.attentions.0", "middle_block.1", layout.widths[-1])
    _residual_block(recipe, "mid_block.resnets.1", "middle_block.2", keys, _UNET_2D_RESIDUAL)
    for j, level in enumerate(reversed(range(levels))):
        block = f"up_blocks.{j}"
        for i in range(layers + 1):
            source = f"output_blocks.{j * (layers + 1) + i}"
            _residual_block(recipe, f"{block}.resnets.{i}", f"{source}.0", keys, _UNET_2D_RESIDUAL)
            if layout.attention_levels[level]:
                attention(f"{block}.attentions.{i}", f"{source}.1", layout.widths[level])
        after = f"{source}.{2 if layout.attention_levels[level] else 1}"
        if level > 0 and layout.resample == "conv":
            recipe.add_layer(f"{block}.upsamplers.0.conv", f"{after}.conv", keys)
        elif level > 0:
            _residual_block(recipe, f"{block}.upsamplers.0", after, keys, _UNET_2D_RESIDUAL)
    recipe.add_layer("conv_norm_out", "out.0", keys)
    recipe.add_layer("conv_out", "out.2", keys)
    return recipe
