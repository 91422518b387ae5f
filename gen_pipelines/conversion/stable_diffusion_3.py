"""Stable Diffusion 3 and 3.5 in one file: the transformer, the autoencoder, and those of the three text encoders that are in it.

References: Esser et al. 2024, https://arxiv.org/abs/2403.03206
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..processes.parameterization import Parameterization
from .base import Component, Format, Plan
from .clip_text import TextEncoder, read_tokenizer, text_encoder_of
from .keys import below, get, numbered
from .ldm import Found, add_autoencoder, drop_the_rest
from .reader import Checkpoint
from .unet_layout import Recipe

__all__ = ["StableDiffusion3", "transformer_recipe"]

_NEEDED = ("x_embedder.proj.weight", "pos_embed", "context_embedder.weight", "joint_blocks.0.x_block.attn.qkv.weight")
_CLIPS = {"text_encoder": "text_encoders.clip_l.transformer.", "text_encoder_2": "text_encoders.clip_g.transformer."}
_T5 = "text_encoders.t5xxl.transformer."
_COPY = "encoder.embed_tokens.weight"
_CHANNELS_PER_HEAD = 64
_TOP = {
    "x_embedder.proj": "pos_embed.proj", "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2", "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2", "context_embedder": "context_embedder", "final_layer.linear": "proj_out",
}  # fmt: skip
# of a block: their layer -> diffusers' (the first three are q, k and v of one layer)
_PICTURE = {
    "attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"), "attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "attn.proj": "attn.to_out.0", "attn2.proj": "attn2.to_out.0", "attn.ln_q": "attn.norm_q", "attn.ln_k": "attn.norm_k",
    "attn2.ln_q": "attn2.norm_q", "attn2.ln_k": "attn2.norm_k", "adaLN_modulation.1": "norm1.linear", "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}  # fmt: skip
_TEXT = {
    "attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "attn.proj": "attn.to_add_out",
    "attn.ln_q": "attn.norm_added_q", "attn.ln_k": "attn.norm_added_k", "adaLN_modulation.1": "norm1_context.linear",
    "mlp.fc1": "ff_context.net.0.proj", "mlp.fc2": "ff_context.net.2",
}  # fmt: skip


def _scale_first(tensor: Tensor) -> Tensor:
    """Rows of shift and scale as scale and shift."""
    return torch.cat(tensor.chunk(2)[::-1])


def transformer_recipe(state: Mapping[str, Tensor], size: int) -> tuple[dict[str, Any], Recipe]:
    """Constructor arguments of diffusers' `SD3Transformer2DModel`, and how its weights are made.

    Args:
        state: own key -> tensor.
        size: of the latents that it was trained on.
    """
    blocks = numbered(state, r"joint_blocks\.(\d+)\.")
    width, channels, patch = get(state, "x_embedder.proj.weight").shape[:3]
    context, joint = get(state, "context_embedder.weight").shape
    config = {
        "sample_size": size,
        "patch_size": patch,
        "in_channels": channels,
        "num_layers": len(blocks),
        "attention_head_dim": _CHANNELS_PER_HEAD,
        "num_attention_heads": width // _CHANNELS_PER_HEAD,
        "joint_attention_dim": joint,
        "caption_projection_dim": context,
        "pooled_projection_dim": get(state, "y_embedder.mlp.0.weight").shape[1],
        "out_channels": get(state, "final_layer.linear.weight").shape[0] // patch**2,
        "pos_embed_max_size": math.isqrt(get(state, "pos_embed").shape[1]),
        "dual_attention_layers": [i for i in blocks if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in state],
        "qk_norm": "rms_norm" if "joint_blocks.0.x_block.attn.ln_q.weight" in state else None,
    }
    recipe = Recipe()
    recipe.add("pos_embed.pos_embed", "pos_embed")
    for theirs, ours in _TOP.items():
        recipe.add_layer(ours, theirs, state)
    recipe.add_layer("norm_out.linear", "final_layer.adaLN_modulation.1", state, _scale_first)
    for i in blocks:
        for half, names in (("x_block", _PICTURE), ("context_block", _TEXT)):
            for theirs, ours in names.items():
                source, target = f"joint_blocks.{i}.{half}.{theirs}", f"transformer_blocks.{i}"
                if f"{source}.weight" not in state:
                    continue
                if isinstance(ours, tuple):
                    for n, name in enumerate(ours):
                        recipe.add_layer(f"{target}.{name}", source, state, lambda t, n=n: t.chunk(3)[n])
                elif i == blocks[-1] and ours == "norm1_context.linear":  # the last block only reads the text
                    recipe.add_layer(f"{target}.{ours}", source, state, _scale_first)
                else:
                    recipe.add_layer(f"{target}.{ours}", source, state)
    return config, recipe


class StableDiffusion3(Format):
    """Becomes a `LatentTextToImagePipeline`; captions need both CLIP encoders, which some files leave out."""

    name = "stable_diffusion_3"
    title = "Stable Diffusion 3"
    paper = "https://arxiv.org/abs/2403.03206"
    licence = "Stability AI Community License for Stability AI's own weights; others: see the source"
    extensions = (".safetensors",)
    options: Mapping[str, str] = {
        "tokenizer": "the folder of CLIP's tokenizer (vocab.json and merges.txt), which is not in the file",
        "tokenizer_2": "the folder of the second encoder's, where it is not the same vocabulary padded with '!'",
        "tokenizer_3": "the folder of T5's, where the file has T5",
        "image_size": "height and width of the latents (128)",
    }

    def matches(self, checkpoint: Checkpoint) -> float:
        found = Found(checkpoint)
        return 1.0 if all(key in found.unet for key in _NEEDED) else 0.0

    def plan(self, checkpoint: Checkpoint, options: Mapping[str, Any]) -> Plan:
        from diffusers import SD3Transformer2DModel

        from ..pipelines.latent_text_to_image import LatentTextToImagePipeline
        from ..schedulers import FlowMatchEulerScheduler

        found = Found(checkpoint)
        if missing := [key for key in _NEEDED if key not in found.unet]:
            raise ValueError(f"{checkpoint.path.name} holds no transformer of Stable Diffusion 3: it has no {missing[0]}.")
        size = options.get("image_size", 128)
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"image_size = {size!r}; give a whole number above 0.")
        plan = Plan(self.name, LatentTextToImagePipeline, {})
        config, recipe = transformer_recipe(found.unet, size)
        plan.components["transformer"] = Component(SD3Transformer2DModel, config, lambda: recipe.state(found.unet))
        plan.used |= recipe.used("transformer", {key: f"{found.prefix}model.diffusion_model.{key}" for key in found.unet})
        add_autoencoder(plan, found, 1.5305, shift_factor=0.0609, force_upcast=True)
        drop_the_rest(plan, found)

        # The text encoders that are there, and their tokenizers; captions need both of CLIP's
        encoders = {name: text_encoder_of(found.keys, at, found.prefix, projected=True) for name, at in _CLIPS.items()}
        encoders["text_encoder_3"] = _t5_of(found)
        for name, encoder in encoders.items():
            tokenizer = name.replace("text_encoder", "tokenizer")
            if encoder is None:
                plan.init |= {name: None, tokenizer: None}
                continue
            encoder.add_to(plan, name)
            plan.objects[tokenizer] = _tokenizer(options, tokenizer)
        if lacking := [name for name in _CLIPS if encoders[name] is None]:
            plan.notes.append(f"the file has no {' and no '.join(lacking)}: captions must come as embeddings")
        plan.objects["scheduler"] = FlowMatchEulerScheduler(shift=3.0).bind(Parameterization.named("sd3"))
        plan.init |= {"max_text_tokens": 256, "default_num_inference_steps": 28, "default_guidance_scale": 7.0}
        return plan


def _tokenizer(options: Mapping[str, Any], name: str) -> Any:
    clip = "openai/clip-vit-large-patch14"
    if name == "tokenizer_3":
        from transformers import T5TokenizerFast

        folder = options.get(name)
        if folder is None or not any((Path(str(folder)) / file).is_file() for file in ("spiece.model", "tokenizer.json")):
            raise ValueError("T5's tokenizer is not in the file: give --set tokenizer_3=FOLDER with spiece.model or tokenizer.json (those "
                             "of google/t5-v1_1-xxl).")  # fmt: skip
        return T5TokenizerFast.from_pretrained(str(folder), local_files_only=True)
    if name == "tokenizer_2":
        return read_tokenizer(options, clip, name) if name in options else read_tokenizer(options, clip, pad_token="!")
    return read_tokenizer(options, clip)


def _t5_of(found: Found) -> TextEncoder | None:
    """T5's encoder, if the file has it; its heads have 64 channels."""
    state = below(found.keys, _T5)
    if "shared.weight" not in state:
        return None
    from transformers import T5EncoderModel

    first = "encoder.block.0.layer."
    inner, width = get(state, f"{first}0.SelfAttention.q.weight").shape
    buckets, heads = get(state, f"{first}0.SelfAttention.relative_attention_bias.weight").shape
    gated = f"{first}1.DenseReluDense.wi_0.weight" in state
    config = {
        "vocab_size": state["shared.weight"].shape[0],
        "d_model": width,
        "d_kv": inner // heads,
        "d_ff": get(state, f"{first}1.DenseReluDense.{'wi_0' if gated else 'wi'}.weight").shape[0],
        "num_layers": len(numbered(state, r"encoder\.block\.(\d+)\.")),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu" if gated else "relu",
    }
    at, dropped = found.prefix + _T5, {}
    if _COPY in state:
        if not torch.equal(state[_COPY], state["shared.weight"]):
            raise ValueError(f"{at}{_COPY} differs from shared.weight, which T5's encoder has as one.")
        dropped[at + _COPY] = "the same as shared.weight"
        state.pop(_COPY)
    return TextEncoder(T5EncoderModel, config, state, {at + key: [key] for key in state}, dropped)
