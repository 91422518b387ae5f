"""The text encoder that latent diffusion trained with its first text-to-image network, as diffusers' `LDMBertModel`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .clip_text import TextEncoder
from .keys import below, get, numbered

__all__ = ["bert_of", "read_bert_tokenizer"]

_CHANNELS_PER_HEAD = 64
_TOP = {"token_emb": "model.embed_tokens", "pos_emb.emb": "model.embed_positions", "norm": "model.layer_norm", "to_logits": "to_logits"}
_ATTENTION = {"0": "self_attn_layer_norm", "1.to_q": "self_attn.q_proj", "1.to_k": "self_attn.k_proj", "1.to_v": "self_attn.v_proj",
              "1.to_out": "self_attn.out_proj"}  # fmt: skip
_FEED_FORWARD = {"0": "final_layer_norm", "1.net.0.0": "fc1", "1.net.2": "fc2"}


def bert_of(found: Mapping[str, Tensor], at: str, prefix: str = "") -> TextEncoder | None:
    """The encoder whose keys begin with `at`; None where there is none. Arguments as in `text_encoder_of`.

    Raises:
        ValueError: its layers do not take turns, or lack a key.
    """
    state = below(found, at)
    if "token_emb.weight" not in state or "attn_layers.layers.0.1.to_q.weight" not in state:
        return None
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertModel

    layers = numbered(state, r"attn_layers\.layers\.(\d+)\.")
    if len(layers) % 2 or layers != list(range(len(layers))):
        raise ValueError(f"latent diffusion's text encoder: {len(layers)} layers, which are not attention and feed-forward in turns.")
    names = dict(_TOP)
    for place in layers:
        parts = _FEED_FORWARD if place % 2 else _ATTENTION
        names |= {f"attn_layers.layers.{place}.{theirs}": f"model.layers.{place // 2}.{ours}" for theirs, ours in parts.items()}
    table = {}
    for key in state:
        layer, _, kind = key.rpartition(".")
        if layer in names:
            table[key] = [f"{names[layer]}.{kind}"]
    inner, width = get(state, "attn_layers.layers.0.1.to_q.weight").shape
    vocabulary = get(state, "token_emb.weight").shape[0]
    config = {
        "vocab_size": vocabulary,
        "max_position_embeddings": get(state, "pos_emb.emb.weight").shape[0],
        "encoder_layers": len(layers) // 2,
        "encoder_ffn_dim": get(state, "attn_layers.layers.1.1.net.0.0.weight").shape[0],
        "encoder_attention_heads": max(1, inner // _CHANNELS_PER_HEAD),
        "head_dim": min(inner, _CHANNELS_PER_HEAD),
        "d_model": width,
    }
    weights = {new: state[key] for key, names_here in table.items() for new in names_here}
    return TextEncoder(LDMBertModel, config, weights, {prefix + at + key: new for key, new in table.items()})


def read_bert_tokenizer(options: Mapping[str, Any]) -> Any:
    """BERT's tokenizer from the folder that the option `tokenizer` names.

    Raises:
        ValueError: the option is missing, or the folder has no vocabulary.
    """
    from transformers import BertTokenizer

    folder = options.get("tokenizer")
    if folder is None or not (Path(str(folder)) / "vocab.txt").is_file():
        raise ValueError("the tokenizer is not in the file: give --set tokenizer=FOLDER with vocab.txt (that of bert-base-uncased).")
    return BertTokenizer.from_pretrained(str(folder), local_files_only=True)
