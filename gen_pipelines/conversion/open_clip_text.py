"""The text half of an open_clip model, to transformers' `CLIPTextModelWithProjection`, which pipelines of diffusers read.

Only towers that are CLIP's: causal, pooled at the end of the text, without a class token. Others keep open_clip's own network, as
`OpenCLIPTextEncoder`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .base import Component, Format, Plan
from .keys import below, covered, get, numbered
from .reader import Checkpoint, tensors

_FIRST, _CONFIG = "token_embedding.weight", "open_clip_config.json"
_LAYER = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_WRAPPED = [f"{file}{ranks}{tower}" for file in ("", "state_dict.") for ranks in ("", "module.") for tower in ("", "text.")]
_PARTS = ("q_proj", "k_proj", "v_proj")
_DROPPED = {
    "visual.*": "the picture's half",
    "logit_scale": "the temperature of the contrastive loss",
    "logit_bias": "the offset of the contrastive loss",
    "attn_mask": "a constant: a text is read from its start",
}
# settings of open_clip's text towers that must have CLIP's value, with what they are where nothing is said
_USUAL = {"no_causal_mask": False, "embed_cls": False, "pool_type": "argmax", "proj_bias": False, "proj_type": "linear", "mlp_ratio": 4.0,
          "ls_init_value": None, "final_ln_after_pool": False}  # fmt: skip


class OpenCLIPText(Format):
    """Weights of https://github.com/mlfoundations/open_clip: a file, or a folder of the Hub with `open_clip_config.json`."""

    name = "open_clip_text"
    title = "open_clip"
    paper = "https://arxiv.org/abs/2212.07143"
    extensions = (".pt", ".bin", ".safetensors", "a folder")
    options: Mapping[str, str] = {
        "config": f"{_CONFIG}, where the source is not a folder that holds it",
        "architecture": "open_clip's name of the model, such as ViT-B-32, in place of the configuration",
        "quick_gelu": "true for x sigmoid(1.702 x) as the activation (OpenAI's weights), false for GELU, in place of both",
    }

    def matches(self, checkpoint: Checkpoint) -> float:
        """By the names of the text tower."""
        found = tensors(checkpoint.tree)
        prefix = _prefix(checkpoint, found)
        if prefix is None:
            return 0.0
        wanted = ("positional_embedding", "transformer.resblocks.0.attn.in_proj_weight", "ln_final.weight")
        return 0.95 * sum(prefix + key in found for key in wanted) / len(wanted)

    def plan(self, checkpoint: Checkpoint, options: Mapping[str, Any]) -> Plan:
        """One network, without a pipeline."""
        from transformers import CLIPTextModelWithProjection

        found = tensors(checkpoint.tree)
        prefix = _prefix(checkpoint, found)
        if prefix is None:
            raise ValueError(f"there is no {_FIRST}: its text tower is a network of transformers, which transformers itself loads.")
        whole = prefix.removesuffix("text.")
        state = below(found, prefix)
        config = config_from(state, settings_from(checkpoint, options))
        table = names(state)
        plan = Plan(self.name, None, {"text_encoder": Component(CLIPTextModelWithProjection, config, lambda: rename(state))})
        plan.used = {prefix + key: ", ".join(f"text_encoder.{one}" for one in ours) for key, ours in table.items()}
        plan.dropped = covered(_DROPPED, found, whole) | covered(_DROPPED, found, prefix)
        for name in checkpoint.tree:  # the same weights again in a second file, or the optimiser's state
            if whole and not whole.startswith(f"{name}."):
                plan.dropped |= covered({f"{name}.*": "not the model's weights, or the same in another file"}, found)
        return plan


def settings_from(checkpoint: Checkpoint, options: Mapping[str, Any]) -> dict[str, Any]:
    """What is said of the tower: `quick_gelu`, and open_clip's `text_cfg` where there is one.

    Raises:
        ValueError: nothing says which activation it has, or the architecture is unknown.
    """
    tree = checkpoint.tree
    given = options.get("config") or (tree.get(_CONFIG) if checkpoint.container == "folder" else None)
    if given is not None:
        model = given.get("model_cfg", given) if isinstance(given, dict) else None
        if not isinstance(model, dict) or not isinstance(model.get("text_cfg"), dict):
            raise ValueError(f"config: no configuration of open_clip's (it has no text_cfg); give {_CONFIG}.")
        settings = {**model["text_cfg"], "quick_gelu": bool(model.get("quick_gelu", False))}
    elif options.get("architecture") is not None:
        from ..models.text_encoders.open_clip import _architecture

        known = _architecture(str(options["architecture"]))
        settings = {**known["text_cfg"], "quick_gelu": bool(known.get("quick_gelu", False))}
    elif options.get("quick_gelu") is not None:
        settings = {}
    else:
        raise ValueError(
            f"the weights do not say which activation they were trained with: give --config {_CONFIG}, --set architecture=NAME "
            "(ViT-B-32, ...), or --set quick_gelu=true (OpenAI's weights) or false."
        )
    if options.get("quick_gelu") is not None:
        settings["quick_gelu"] = bool(options["quick_gelu"])
    return settings


def config_from(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of `CLIPTextModelWithProjection`.

    Raises:
        ValueError: the tower is not CLIP's, or the settings are another model's.
    """
    unusual = [f"{name} {settings[name]!r}" for name, usual in _USUAL.items() if settings.get(name, usual) != usual]
    unusual += [key for key in ("cls_emb", "text_projection.bias") if key in state]
    unusual += sorted({key.split(".", 3)[3] for key in state if re.match(r"transformer\.resblocks\.\d+\.(ls_[12]|attn\.ln)", key)})
    if settings.get("act_kwargs"):
        unusual.append(f"act_kwargs {settings['act_kwargs']!r}")
    if unusual:
        raise ValueError(
            f"the text tower has {', '.join(unusual)}, which CLIPTextModelWithProjection has not; use OpenCLIPTextEncoder.from_pretrained."
        )
    vocabulary, width = get(state, _FIRST).shape
    layers = len(numbered(state, r"transformer\.resblocks\.(\d+)\."))
    length = get(state, "positional_embedding").shape[0]
    projection = state.get("text_projection", state.get("text_projection.weight"))
    if projection is None:
        raise ValueError("the source has no text_projection.")
    heads = settings.get("heads", 16 if width == 1152 else max(width // 64, 1))
    said = {"width": width, "layers": layers, "context_length": length, "vocab_size": vocabulary}
    wrong = [f"{name} {settings[name]} for {value} of the weights" for name, value in said.items() if settings.get(name, value) != value]
    if wrong:
        raise ValueError(f"the configuration is another model's: {', '.join(wrong)}.")
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": get(state, "transformer.resblocks.0.mlp.c_fc.weight").shape[0],
        "projection_dim": projection.shape[1] if "text_projection" in state else projection.shape[0],
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": length,
        "hidden_act": "quick_gelu" if settings.get("quick_gelu") else "gelu",
        "layer_norm_eps": (settings.get("norm_kwargs") or {}).get("eps", 1e-5),
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": 0,
    }


def names(state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Their key -> transformers', of all that are known."""
    model = "text_model."
    table = {
        _FIRST: [f"{model}embeddings.token_embedding.weight"],
        "positional_embedding": [f"{model}embeddings.position_embedding.weight"],
        "ln_final.weight": [f"{model}final_layer_norm.weight"],
        "ln_final.bias": [f"{model}final_layer_norm.bias"],
        "text_projection": ["text_projection.weight"],
        "text_projection.weight": ["text_projection.weight"],
    }
    found = {key: table[key] for key in state if key in table}
    for key in state:
        match = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)", key)
        if not match:
            continue
        place, kind = f"{model}encoder.layers.{match[1]}.", match[3]
        if match[2] == "attn.in_proj":
            found[key] = [f"{place}self_attn.{part}.{kind}" for part in _PARTS]
        elif match[2] in _LAYER:
            found[key] = [f"{place}{_LAYER[match[2]]}.{kind}"]
    return found


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of `CLIPTextModelWithProjection`: queries, keys and values apart, the projection the other way round."""
    found = {}
    for key, ours in names(state).items():
        value = state[key].t() if key == "text_projection" else state[key]
        found |= dict(zip(ours, value.chunk(len(ours)), strict=True))
    return found


def _prefix(checkpoint: Checkpoint, found: Mapping[str, Tensor]) -> str | None:
    """What stands before the text tower's keys; of a folder with the same weights twice, in the safetensors.

    A tower inside a larger model, as Stable Diffusion's checkpoints have it, is none: the larger model is what is to be converted.
    """
    files = sorted(checkpoint.tree, key=lambda name: not name.endswith(".safetensors")) if checkpoint.container == "folder" else [""]
    for file, wrapped in itertools.product(files, _WRAPPED):
        prefix = f"{file}.{wrapped}" if file else wrapped
        if prefix + _FIRST in found and f"{prefix}transformer.resblocks.0.ln_1.weight" in found:
            return prefix
    return None
