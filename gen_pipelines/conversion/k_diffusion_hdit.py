"""k-diffusion's `image_transformer_v2` (HDiT): what its keys and its configuration say, and where its weights go.

References: https://github.com/crowsonkb/k-diffusion; Crowson et al. 2024, https://arxiv.org/abs/2401.11605
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .k_diffusion_config import Section
from .keys import get, numbered
from .unet_layout import Recipe

__all__ = ["NEEDED", "HDiTSettings", "hdit_config", "hdit_recipe", "hdit_settings"]

NEEDED = ("patch_in.proj.weight", "time_emb.weight", "time_in_proj.weight", "mapping.in_norm.scale", "patch_out.proj.weight")
_LAYER = {
    "self_attn.norm.linear.weight": "norm_attention.linear.weight", "self_attn.qkv_proj.weight": "attention.qkv.weight",
    "self_attn.scale": "attention.scale", "self_attn.pos_emb.freqs": "attention.frequencies",
    "self_attn.out_proj.weight": "attention.out.weight", "ff.norm.linear.weight": "norm.linear.weight",
    "ff.up_proj.weight": "feed_forward.up.weight", "ff.down_proj.weight": "feed_forward.down.weight",
}  # fmt: skip
_MAPPING = {"norm.scale": "norm.scale", "up_proj.weight": "feed_forward.up.weight", "down_proj.weight": "feed_forward.down.weight"}
_WHOLE = {
    "patch_in.proj.weight": "patch_in.weight", "time_emb.weight": "time_frequencies", "time_in_proj.weight": "time.weight",
    "aug_emb.weight": "augmentation_frequencies", "aug_in_proj.weight": "augmentation.weight", "mapping.in_norm.scale": "mapping.0.scale",
    "out_norm.scale": "norm_out.scale", "patch_out.proj.weight": "patch_out.weight",
}  # fmt: skip


@dataclass(frozen=True)
class HDiTSettings:
    """What the configuration says, checked."""

    size: int
    channels: int
    patch: int
    sigma_data: float
    sigma_min: float
    sigma_max: float
    condition: int  # numbers of a vector besides the time
    classes: int | None  # rows of the table that are used
    null: bool  # whether the last of them means none
    kinds: tuple[str, ...]
    sizes: tuple[int | None, ...]
    dropouts: tuple[float, ...]
    mapping_dropout: float


def _levels(state: Mapping[str, Tensor]) -> list[str]:
    """What stands before the layers of each level on the way down, the middle last."""
    return [f"down_levels.{i}" for i in numbered(state, r"down_levels\.(\d+)\.")] + ["mid_level"]


def _shapes(state: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """Of each level what shapes say of it; `heads` is None where it does not attend."""
    found: dict[str, list[Any]] = {"depths": [], "widths": [], "d_ffs": [], "heads": []}
    for level in _levels(state):
        scale = state.get(f"{level}.0.self_attn.scale")
        hidden, width = get(state, f"{level}.0.ff.down_proj.weight").shape[::-1]
        found["depths"].append(len(numbered(state, rf"{level}\.(\d+)\.ff\.")))
        found["widths"].append(width)
        found["d_ffs"].append(hidden)
        found["heads"].append(None if scale is None else len(scale))
    return found


def hdit_settings(section: Section, dataset: Mapping[str, Any], state: Mapping[str, Tensor]) -> HDiTSettings:
    """What the configuration says, where the shapes do not contradict it.

    Args:
        section: "model" of the configuration.
        dataset: "dataset" of it, which says how many classes there are; may be empty.
        state: the network.
    Raises:
        ValueError: they do, or something is missing; the message names it.
    """
    shapes = _shapes(state)
    count = len(shapes["depths"])
    blocks = numbered(state, r"mapping\.blocks\.(\d+)\.")
    seen = {
        "depths": shapes["depths"], "widths": shapes["widths"], "d_ffs": shapes["d_ffs"],
        "mapping_width": get(state, "time_in_proj.weight").shape[0], "mapping_depth": len(blocks),
        "mapping_d_ff": get(state, "mapping.blocks.0.down_proj.weight").shape[1] if blocks else None,
        "mapping_cond_dim": state["mapping_cond_in_proj.weight"].shape[1] if "mapping_cond_in_proj.weight" in state else 0,
    }  # fmt: skip
    usual = {"mapping_width": 256, "mapping_depth": 2, "mapping_cond_dim": 0, "mapping_d_ff": 3 * seen["mapping_width"],
             "d_ffs": [3 * width for width in shapes["widths"]]}  # fmt: skip
    for key, value in seen.items():
        told = usual.get(key) if section.get(key) is None else section[key]
        if value is not None and (list(told) if isinstance(told, tuple) else told) != value:
            raise ValueError(f"config: model.{key} is {told!r}, but the weights are those of {value!r}.")
    if section.flag("has_variance", False):
        raise ValueError("config: model.has_variance is true, but image_transformer_v2 estimates none.")
    patch = section.get("patch_size")
    if not isinstance(patch, (list, tuple)) or len(patch) != 2 or patch[0] != patch[1] or not isinstance(patch[0], int):
        raise ValueError(f"config: model.patch_size = {patch!r}; patches are squares here: it must be twice the same whole number.")
    channels, wanted = int(section.number("input_channels", least=1)), get(state, "patch_in.proj.weight").shape[1]
    if channels * patch[0] ** 2 != wanted:
        raise ValueError(f"config: input_channels {channels} and patch_size {list(patch)} make {channels * patch[0] ** 2} numbers of a "
                         f"patch, and the weights have {wanted}.")  # fmt: skip
    kinds, sizes = _attention(section, shapes)
    dropouts = section.get("dropout_rate") or 0.0
    dropouts = [dropouts] * count if isinstance(dropouts, (int, float)) else dropouts
    probable = isinstance(dropouts, (list, tuple)) and all(isinstance(p, (int, float)) and 0 <= p < 1 for p in dropouts)
    if not probable or len(dropouts) != count:
        raise ValueError(f"config: model.dropout_rate = {section.get('dropout_rate')!r}; it must be a probability for each of the {count} "
                         "levels.")  # fmt: skip
    classes, null = _classes(dataset, state)
    return HDiTSettings(
        section.size(), channels, patch[0], float(section.number("sigma_data", 1.0)), float(section.number("sigma_min")),
        float(section.number("sigma_max")), seen["mapping_cond_dim"], classes, null, kinds, sizes, tuple(float(p) for p in dropouts),
        float(section.number("mapping_dropout_rate", 0.0)),
    )  # fmt: skip


def _attention(section: Section, shapes: Mapping[str, list[Any]]) -> tuple[tuple[str, ...], tuple[int | None, ...]]:
    """(types, sizes) of each level's attention, which shapes cannot say."""
    count = len(shapes["depths"])
    told = section.get("self_attns") or [{"type": "neighborhood"}] * (count - 1) + [{"type": "global"}]
    if not isinstance(told, (list, tuple)) or len(told) != count or not all(isinstance(one, Mapping) for one in told):
        raise ValueError(f"config: model.self_attns = {told!r}; it must be a list of {count} objects, one for each level.")
    kinds, sizes = [], []
    for i, one in enumerate(told):
        kind, heads, width = one.get("type"), shapes["heads"][i], shapes["widths"][i]
        keys = {"neighborhood": "kernel_size", "shifted-window": "window_size", "global": None, "none": None}
        if kind not in keys:
            raise ValueError(f"config: model.self_attns[{i}].type = {kind!r} is none of {', '.join(keys)}.")
        head = None if kind == "none" else one.get("d_head", 64)
        if head != (width // heads if heads else None):
            raise ValueError(f"config: model.self_attns[{i}] = {dict(one)!r}, but the weights are those of "
                             f"{f'heads of {width // heads}' if heads else 'a level without attention'}.")  # fmt: skip
        size = one.get(keys[kind], 7 if kind == "neighborhood" else None) if keys[kind] else None
        if keys[kind] and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(f"config: model.self_attns[{i}].{keys[kind]} = {size!r}; it must be a whole number of at least 1.")
        kinds.append(kind)
        sizes.append(size)
    return tuple(kinds), tuple(sizes)


def _classes(dataset: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[int | None, bool]:
    """(rows of the class table that were trained, whether the last of them means no class)."""
    rows = state["class_emb.weight"].shape[0] if "class_emb.weight" in state else 0
    told = dataset.get("num_classes", max(0, rows - 1))
    if not isinstance(told, int) or rows != (told + 1 if told else 0):
        raise ValueError(f"config: dataset.num_classes is {told!r}, but the weights are those of {max(0, rows - 1)}.")
    null = dataset.get("cond_dropout_rate", 0.1) != 0
    return (told + null if told else None), bool(told) and null


def hdit_config(state: Mapping[str, Tensor], settings: HDiTSettings, classes: bool) -> dict[str, Any]:
    """Constructor arguments of `HDiTModel`.

    Args:
        state: the network.
        settings: of its configuration.
        classes: whether the vector that it is given is a class.
    """
    shapes = _shapes(state)
    blocks = numbered(state, r"mapping\.blocks\.(\d+)\.")
    return {
        "sample_size": settings.size,
        "in_channels": settings.channels,
        "out_channels": settings.channels,
        "patch_size": settings.patch,
        "block_out_channels": shapes["widths"],
        "layers_per_block": shapes["depths"],
        "feed_forward_channels": shapes["d_ffs"],
        "attention_types": list(settings.kinds),
        "attention_sizes": list(settings.sizes),
        "attention_head_dims": [n and width // n for n, width in zip(shapes["heads"], shapes["widths"], strict=True)],
        "mapping_channels": get(state, "time_in_proj.weight").shape[0],
        "mapping_layers": len(blocks),
        "mapping_feed_forward_channels": get(state, "mapping.blocks.0.down_proj.weight").shape[1] if blocks else None,
        "augmentation_channels": get(state, "aug_emb.weight").shape[1],
        "num_class_embeds": settings.condition if classes else settings.classes,
        "condition_channels": 0 if classes else settings.condition,
        "dropouts": list(settings.dropouts),
        "mapping_dropout": settings.mapping_dropout,
    }


def hdit_recipe(state: Mapping[str, Tensor], settings: HDiTSettings, classes: bool) -> Recipe:
    """How the weights of `HDiTModel` are made; arguments as in `hdit_config`."""
    recipe = Recipe()
    for theirs, ours in _WHOLE.items():
        recipe.add(ours, theirs)
    blocks = numbered(state, r"mapping\.blocks\.(\d+)\.")
    for i in blocks:
        for theirs, ours in _MAPPING.items():
            recipe.add(f"mapping.{i + 1}.{ours}", f"mapping.blocks.{i}.{theirs}")
    recipe.add(f"mapping.{len(blocks) + 1}.scale", "mapping.out_norm.scale")
    if settings.classes is not None:
        recipe.add("class_embedding.weight", "class_emb.weight", None if settings.null else (lambda t: t[:-1]))
    if settings.condition:
        target = "class_embedding.weight" if classes else "condition.weight"
        recipe.add(target, "mapping_cond_in_proj.weight", (lambda t: t.T) if classes else None)
    levels = {"mid_level": "middle"}
    for i in range(len(_levels(state)) - 1):
        levels |= {f"down_levels.{i}": f"down.{i}", f"up_levels.{i}": f"up.{i}"}
        recipe.add(f"merges.{i}.weight", f"merges.{i}.proj.weight")
        recipe.add(f"splits.{i}.proj.weight", f"splits.{i}.proj.weight")
        recipe.add(f"splits.{i}.weight", f"splits.{i}.fac")
    for theirs, ours in levels.items():
        for j in numbered(state, rf"{theirs}\.(\d+)\."):
            for source, target in _LAYER.items():
                if f"{theirs}.{j}.{source}" in state:
                    recipe.add(f"{ours}.{j}.{target}", f"{theirs}.{j}.{source}")
    return recipe
