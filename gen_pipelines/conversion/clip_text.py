"""CLIP's text encoders inside larger checkpoints, in transformers' layout or open_clip's, and their tokenizers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import open_clip_text
from .base import Component, Plan

__all__ = ["TextEncoder", "read_tokenizer", "text_encoder_of"]


@dataclass
class TextEncoder:
    """A text encoder that was found in a file.

    Args:
        cls: of transformers.
        config: its arguments.
        state: its weights.
        table: key in the file -> its keys here.
        dropped: key in the file -> why it is not needed.
    """

    cls: type
    config: dict[str, Any]
    state: dict[str, Tensor]
    table: dict[str, list[str]]
    dropped: dict[str, str] = field(default_factory=dict)

    def add_to(self, plan: Plan, name: str) -> None:
        """Makes it a component of a plan."""
        plan.components[name] = Component(self.cls, self.config, lambda: self.state)
        plan.used |= {old: ", ".join(f"{name}.{key}" for key in new) for old, new in self.table.items()}
        plan.dropped |= self.dropped


def text_encoder_of(
    found: Mapping[str, Tensor], at: str, prefix: str = "", projected: bool = False, without_last: bool = False
) -> TextEncoder | None:
    """The text encoder whose keys begin with `at`; None where there is none.

    Args:
        found: the file's tensors by their keys.
        at: what stands before the encoder's own keys.
        prefix: what stands before these keys in the file.
        projected: whether the pooled vector is projected (`CLIPTextModelWithProjection`). Where transformers' layout has no projection, it
            is the identity.
        without_last: of open_clip, leave out the last block.
    """
    state = {key.removeprefix(at): value for key, value in found.items() if key.startswith(at)}
    if "text_model.embeddings.token_embedding.weight" in state:
        encoder = _of_transformers(state, projected)
    elif "token_embedding.weight" in state and "text_projection" in state:
        encoder = _of_open_clip(state, projected, without_last)
    else:
        return None
    encoder.table = {prefix + at + key: new for key, new in encoder.table.items()}
    encoder.dropped = {prefix + at + key: why for key, why in encoder.dropped.items()}
    return encoder


def _class(projected: bool) -> tuple[type, str]:
    """(the class, what stands before its keys where the file has text_model.): it depends on the version of transformers."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    cls = CLIPTextModelWithProjection if projected else CLIPTextModel
    with torch.device("meta"):
        small = CLIPTextConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=2)
        wrapped = any(key.startswith("text_model.") for key in cls(small).state_dict())
    return cls, "" if wrapped else "text_model."


def _of_transformers(state: dict[str, Tensor], projected: bool) -> TextEncoder:
    cls, outer = _class(projected)
    dropped = {key: "counts from 0" for key in state if key.endswith("position_ids")}
    dropped |= {"logit_scale": "the temperature of the contrastive loss"} if "logit_scale" in state else {}
    if not projected and "text_projection.weight" in state:
        dropped["text_projection.weight"] = "the pooled vector is not looked at"
    kept = {key: value for key, value in state.items() if key not in dropped}
    config = _config(kept)
    table = {key: [key.removeprefix(outer)] for key in kept}
    weights = {key.removeprefix(outer): value for key, value in kept.items()}
    if projected:
        width = config["hidden_size"]
        weights.setdefault("text_projection.weight", torch.eye(width, dtype=next(iter(kept.values())).dtype))
        config["projection_dim"] = weights["text_projection.weight"].shape[0]
    return TextEncoder(cls, config, weights, table, dropped)


def _of_open_clip(state: dict[str, Tensor], projected: bool, without_last: bool) -> TextEncoder:
    cls, outer = _class(projected)
    config = open_clip_text.config_from(state, {"quick_gelu": False})
    unused = ("logit_scale", "attn_mask") if projected else ("text_projection", "logit_scale", "attn_mask")
    dropped = {key: "of the contrastive loss, or a constant" for key in state if key in unused}
    if without_last:
        config["num_hidden_layers"] -= 1
        last = f"transformer.resblocks.{config['num_hidden_layers']}."
        dropped |= {key: "the last block, which Stable Diffusion 2 leaves out" for key in state if key.startswith(last)}
    kept = {key: value for key, value in state.items() if key not in dropped}
    table = {key: [one.removeprefix(outer) for one in names] for key, names in open_clip_text.names(kept).items()}
    weights = {key.removeprefix(outer): value for key, value in open_clip_text.rename(kept).items()}
    return TextEncoder(cls, config, weights, table, dropped)


def _config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """From shapes: heads have 64 channels; up to OpenAI's largest the activation is theirs, beyond (open_clip's bigG) it is GELU."""
    depth = 1 + max(int(key.split(".")[3]) for key in state if key.startswith("text_model.encoder.layers."))
    vocabulary, width = state["text_model.embeddings.token_embedding.weight"].shape
    return {
        "hidden_size": width,
        "intermediate_size": state["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": depth,
        "num_attention_heads": max(width // 64, 1),
        "max_position_embeddings": state["text_model.embeddings.position_embedding.weight"].shape[0],
        "vocab_size": vocabulary,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "hidden_act": "quick_gelu" if width <= 768 else "gelu",
        "projection_dim": width,
    }


def read_tokenizer(options: Mapping[str, Any], of: str, option: str = "tokenizer", **changes: Any) -> Any:
    """CLIP's tokenizer from the folder that an option names.

    Args:
        options: of the conversion.
        of: whose files these are, for the message.
        option: its name.
        changes: of its settings, such as `pad_token`.
    Raises:
        ValueError: the option is missing, or the folder has no vocabulary.
    """
    from transformers import CLIPTokenizer

    folder = options.get(option)
    if folder is None or not (Path(str(folder)) / "vocab.json").is_file():
        raise ValueError(f"the tokenizer is not in the file: give --set {option}=FOLDER with vocab.json and merges.txt (those of {of}).")
    return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True, **changes)
