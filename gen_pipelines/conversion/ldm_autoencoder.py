"""The convolutional autoencoders of latent diffusion and taming transformers, as diffusers' AutoencoderKL or VQModel."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .unet_layout import Recipe, squeeze

__all__ = ["autoencoder_recipe", "looks_like_autoencoder"]

_RESIDUAL = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut"}
_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def looks_like_autoencoder(keys: Any, bare: bool = False) -> bool:
    """Whether these are the keys of such an autoencoder: with moments (KL) or with a codebook (VQ).

    Args:
        keys: without a prefix.
        bare: also without the convolutions around the latents, as Stable Diffusion 3 has it.
    """
    needed = ("encoder.down.0.block.0.conv1", "encoder.mid.attn_1.q", "decoder.up.0.block.0.conv1")
    around = () if bare else ("quant_conv", "post_quant_conv")
    return all(f"{key}.weight" in keys for key in (*needed, *around))


def autoencoder_recipe(state: Mapping[str, Tensor], sample_size: int | None = None) -> tuple[str, dict[str, Any], Recipe]:
    """The class of diffusers, its configuration without a scaling factor, and how its weights are made.

    Args:
        state: own key -> tensor; keys of a loss are not looked at.
        sample_size: of the pictures, if it is known.
    Raises:
        ValueError: a part that diffusers' classes do not have.
    """
    levels = 1 + max(int(m[1]) for key in state if (m := re.match(r"encoder\.down\.(\d+)\.", key)))
    layers = 1 + max(int(m[1]) for key in state if (m := re.match(r"encoder\.down\.0\.block\.(\d+)\.", key)))
    widths = [state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
    down = [f"encoder.down.{i}.attn.0.q.weight" in state for i in range(levels)]
    up = [f"decoder.up.{i}.attn.0.q.weight" in state for i in range(levels)]
    if lacking := [i for i in range(levels - 1) if f"encoder.down.{i}.downsample.conv.weight" not in state]:
        raise ValueError(f"autoencoder: level {lacking[0]} halves the size without a convolution, which diffusers' classes do not.")
    if "quantize.embed.weight" in state:
        raise ValueError("autoencoder: its codebook is a Gumbel-softmax one, which diffusers' VQModel does not have.")
    quantised = "quantize.embedding.weight" in state
    latents = state["decoder.conv_in.weight"].shape[1]
    config: dict[str, Any] = {
        "in_channels": state["encoder.conv_in.weight"].shape[1],
        "out_channels": state["decoder.conv_out.weight"].shape[0],
        "block_out_channels": widths,
        "layers_per_block": layers,
        "latent_channels": latents,
        "down_block_types": ["AttnDownEncoderBlock2D" if has else "DownEncoderBlock2D" for has in down],
        "up_block_types": ["AttnUpDecoderBlock2D" if has else "UpDecoderBlock2D" for has in reversed(up)],
    }
    if sample_size is not None:
        config["sample_size"] = sample_size
    if quantised:
        config["num_vq_embeddings"], config["vq_embed_dim"] = state["quantize.embedding.weight"].shape
    elif "quant_conv.weight" not in state and "post_quant_conv.weight" not in state:
        config |= {"use_quant_conv": False, "use_post_quant_conv": False}
    elif state["post_quant_conv.weight"].shape[1] != latents or state["quant_conv.weight"].shape[0] != 2 * latents:
        raise ValueError("autoencoder: embed_dim differs from z_channels, which diffusers' AutoencoderKL does not allow.")

    recipe = Recipe()
    add = lambda target, source, change=None: recipe.add_layer(target, source, state, change)

    def residual(target: str, source: str) -> None:
        for theirs, ours in _RESIDUAL.items():
            if f"{source}.{theirs}.weight" in state:
                add(f"{target}.{ours}", f"{source}.{theirs}")

    def attention(target: str, source: str) -> None:
        add(f"{target}.group_norm", f"{source}.norm")
        for theirs, ours in _ATTENTION.items():
            add(f"{target}.{ours}", f"{source}.{theirs}", squeeze)

    for half in ("encoder", "decoder"):
        add(f"{half}.conv_in", f"{half}.conv_in")
        residual(f"{half}.mid_block.resnets.0", f"{half}.mid.block_1")
        attention(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1")
        residual(f"{half}.mid_block.resnets.1", f"{half}.mid.block_2")
        add(f"{half}.conv_norm_out", f"{half}.norm_out")
        add(f"{half}.conv_out", f"{half}.conv_out")
    for level in range(levels):
        for name, block, count, has, change in (
            (f"encoder.down.{level}", f"encoder.down_blocks.{level}", layers, down[level], "down" if level < levels - 1 else None),
            (f"decoder.up.{level}", f"decoder.up_blocks.{levels - 1 - level}", layers + 1, up[level], "up" if level > 0 else None),
        ):
            for i in range(count):
                residual(f"{block}.resnets.{i}", f"{name}.block.{i}")
                if has:
                    attention(f"{block}.attentions.{i}", f"{name}.attn.{i}")
            if change is not None:
                add(f"{block}.{change}samplers.0.conv", f"{name}.{change}sample.conv")
    if "use_quant_conv" not in config:
        add("quant_conv", "quant_conv")
        add("post_quant_conv", "post_quant_conv")
    if quantised:
        recipe.add("quantize.embedding.weight", "quantize.embedding.weight")
    return ("VQModel" if quantised else "AutoencoderKL"), config, recipe
