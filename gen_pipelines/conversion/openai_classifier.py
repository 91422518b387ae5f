"""Guided diffusion's classifiers of noisy pictures: the way down of OpenAI's U-Net."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .base import Component, Format, Plan
from .reader import Checkpoint, tensors
from .unet_layout import Layout, Recipe, layout_of, rows_first, squeeze, to_adm

__all__ = ["OpenAIClassifier", "classifier_recipe"]

_NEEDED = ("time_embed.0.weight", "input_blocks.0.0.weight", "input_blocks.1.0.in_layers.0.weight", "middle_block.1.qkv.weight",
           "out.0.weight")  # fmt: skip


def _is_classifier(keys: Any) -> bool:
    return all(key in keys for key in _NEEDED) and "output_blocks.0.0.in_layers.0.weight" not in keys


def _pooling(state: Mapping[str, Tensor]) -> str:
    """By the keys under `out`."""
    if "out.2.positional_embedding" in state:
        return "attention"
    if "out.3.weight" in state:
        return "mean" if state["out.3.weight"].ndim == 4 else "normed_levels"
    return "levels"


def classifier_recipe(state: Mapping[str, Tensor], layout: Layout, head_dim: int) -> tuple[dict[str, Any], Recipe]:
    """Constructor arguments of `ADMClassifier`, without the size of the pictures, and how its weights are made.

    Raises:
        ValueError: heads that do not fit a width.
    """
    if wrong := [width for width in layout.attention_widths() if width % head_dim]:
        raise ValueError(f"num_head_channels = {head_dim} does not fit an attention over {wrong[0]} channels.")
    pooling = _pooling(state)
    recipe = to_adm(layout, state, lambda width: width // head_dim, by_head=True)
    if pooling == "attention":
        recipe.add_layer("norm_out", "out.0", state)
        recipe.add("pool.position", "out.2.positional_embedding", rows_first)
        recipe.add_layer("pool.qkv", "out.2.qkv_proj", state, squeeze)  # all q, then all k, then all v
        recipe.add_layer("pool.out", "out.2.c_proj", state, squeeze)
        last = "out.2.c_proj"
    elif pooling == "mean":
        last = "out.3"
        recipe.add_layer("norm_out", "out.0", state)
        recipe.add_layer("linear_out", last, state, squeeze)
    else:
        last = "out.3" if pooling == "normed_levels" else "out.2"
        recipe.add_layer("linear_in", "out.0", state)
        if pooling == "normed_levels":
            recipe.add_layer("norm_out", "out.1", state)
        recipe.add_layer("linear_out", last, state)
    if f"{last}.weight" not in state:
        raise ValueError(f"the source has no {last}.weight.")
    config = {
        "in_channels": layout.in_channels,
        "num_classes": state[f"{last}.weight"].shape[0],
        "block_out_channels": list(layout.widths),
        "layers_per_block": layout.layers_per_block,
        "attention_levels": list(layout.attention_levels),
        "attention_head_dim": head_dim,
        "resample_type": layout.resample,
        "time_scale_shift": layout.scale_shift,
        "time_channels": layout.time_channels,
        "pooling": pooling,
    }
    return config, recipe


class OpenAIClassifier(Format):
    """Becomes an `ADMClassifier`, a network alone, for `ClassifierGuidance`."""

    name = "openai_classifier"
    title = "guided diffusion's classifiers"
    paper = "https://arxiv.org/abs/2105.05233"
    licence = "MIT for OpenAI's published weights; others: see the source"
    extensions = (".pt",)
    options = {
        "image_size": "height and width of the pictures, where the pooling does not say it",
        "classifier_depth": "residual blocks per level, where shapes do not say it",
        "num_head_channels": "64 by default, as in the training",
    }

    def matches(self, checkpoint: Checkpoint) -> float:
        return 0.9 if _is_classifier(tensors(checkpoint.tree)) else 0.0

    def plan(self, checkpoint: Checkpoint, options: Mapping[str, Any]) -> Plan:
        from ..models.classifiers.adm_classifier import ADMClassifier

        state = tensors(checkpoint.tree)
        if not _is_classifier(state):
            raise ValueError(f"{checkpoint.path.name} holds no classifier of guided diffusion.")
        numbers = {}
        for name in self.options:
            try:
                numbers[name] = None if options.get(name) is None else int(options[name])
            except (TypeError, ValueError):
                raise ValueError(f"{name} = {options[name]!r} is not a number.") from None
        layout = layout_of(state, numbers["classifier_depth"])
        config, recipe = classifier_recipe(state, layout, numbers["num_head_channels"] or 64)
        size = numbers["image_size"]
        if config["pooling"] == "attention":
            pixels = state["out.2.positional_embedding"].shape[1] - 1
            known = math.isqrt(pixels) * 2 ** (len(layout.widths) - 1)
            if size not in (None, known):
                raise ValueError(f"image_size = {size}, but the checkpoint is for {known}.")
            size = known
        if size is None:
            raise ValueError(f"{checkpoint.path.name}: the file does not say image_size; give --set image_size=N.")
        plan = Plan(self.name, None, {"classifier": Component(ADMClassifier, {"sample_size": size, **config}, lambda: recipe.state(state))})
        plan.used = recipe.used("classifier", {key: key for key in state})
        plan.notes.append("a classifier of noisy pictures, at the same index as the network that it guides (linear or cosine betas)")
        return plan
