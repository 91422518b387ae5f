"""Stable Diffusion XL in one file: the U-Net, both text encoders and the autoencoder.

References: Podell et al. 2023, https://arxiv.org/abs/2307.01952
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..processes.discrete_vp import DiscreteVPPath
from ..processes.parameterization import Parameterization
from .base import Component, Format, Plan
from .clip_text import read_tokenizer, text_encoder_of
from .ldm import Found, add_autoencoder, chosen_weights, condition_config, drop_the_rest, transformers
from .openai_unet import heads_of
from .reader import Checkpoint
from .unet_layout import layout_of, looks_like_unet, to_unet_2d

__all__ = ["StableDiffusionXL"]

_FIRST, _SECOND = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
_REFINER = "conditioner.embedders.0.model."  # its only text encoder
_CHANNELS_PER_HEAD = 64
_SIZES = 6  # numbers that say how large the picture was and how it was cut
_MARKS = {"v_pred": "says that the network predicts v", "ztsnr": "says that the schedule ends in pure noise"}
_KINDS = {"image_size": (int, 128), "scale_factor": (float, 0.13025)}


class StableDiffusionXL(Format):
    """Becomes a `LatentTextToImagePipeline` with two text encoders and Euler's method."""

    name = "stable_diffusion_xl"
    title = "Stable Diffusion XL"
    paper = "https://arxiv.org/abs/2307.01952"
    licence = "CreativeML Open RAIL++-M for Stability AI's own weights; others: see the source"
    extensions = (".safetensors", ".ckpt")
    options: Mapping[str, str] = {
        "tokenizer": "the folder of CLIP's tokenizer (vocab.json and merges.txt), which is not in the file",
        "tokenizer_2": "the folder of the second encoder's, where it is not the same vocabulary padded with '!'",
        "prediction": "epsilon (default) or v_prediction (default where the file has the key v_pred)",
        "image_size": "height and width of the latents (128)",
        "scale_factor": "what latents are multiplied by (0.13025)",
        "weights": "ema (default, where the file has it) or model",
    }

    def matches(self, checkpoint: Checkpoint) -> float:
        found = Found(checkpoint)
        if not looks_like_unet(found.unet) or "label_emb.0.0.weight" not in found.unet:
            return 0.0
        return 1.0 if any(key.startswith((_SECOND, _REFINER)) for key in found.keys) else 0.3

    def plan(self, checkpoint: Checkpoint, options: Mapping[str, Any]) -> Plan:
        from diffusers import UNet2DConditionModel

        from ..pipelines.latent_text_to_image import LatentTextToImagePipeline
        from ..schedulers import EulerScheduler

        found = Found(checkpoint)
        if not looks_like_unet(found.unet) or "label_emb.0.0.weight" not in found.unet:
            raise ValueError(f"{checkpoint.path.name} holds no U-Net of Stable Diffusion XL.")
        if any(key.startswith(_REFINER) for key in found.keys):
            raise ValueError(f"{checkpoint.path.name} is the refiner of Stable Diffusion XL, which is told a score of beauty that no "
                             "pipeline here gives; it is not converted.")  # fmt: skip
        settings = {name: _number(options, name, *kind) for name, kind in _KINDS.items()}
        plan = Plan(self.name, LatentTextToImagePipeline, {})

        # 1. The text encoders
        first = text_encoder_of(found.keys, _FIRST, found.prefix)
        second = text_encoder_of(found.keys, _SECOND, found.prefix, projected=True)
        if missing := [at for at, encoder in ((_FIRST, first), (_SECOND, second)) if encoder is None]:
            raise ValueError(f"{checkpoint.path.name} has no text encoder {missing[0]}*.")
        first.add_to(plan, "text_encoder")
        second.add_to(plan, "text_encoder_2")

        # 2. The U-Net
        state, origin = chosen_weights(plan, found, options)
        layout = layout_of(state)
        heads = heads_of({"num_head_channels": _CHANNELS_PER_HEAD})
        told = state["label_emb.0.0.weight"].shape[1]
        config = condition_config(layout, state, heads, settings["image_size"]) | {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": (told - second.config["projection_dim"]) // _SIZES,
            "projection_class_embeddings_input_dim": told,
        }
        recipe = to_unet_2d(layout, state, heads, True, transformers)
        recipe.add_layer("add_embedding.linear_1", "label_emb.0.0", state)
        recipe.add_layer("add_embedding.linear_2", "label_emb.0.2", state)
        plan.components["unet"] = Component(UNet2DConditionModel, config, lambda: recipe.state(state))
        plan.used |= recipe.used("unet", origin)

        # 3. The autoencoder, whose halves overflow float16, and the rest
        add_autoencoder(plan, found, settings["scale_factor"], force_upcast=True)
        drop_the_rest(plan, found)
        plan.dropped |= {found.prefix + key: why for key, why in _MARKS.items() if key in found.keys}

        # 4. Tokenizers and scheduler
        of = "openai/clip-vit-large-patch14"
        plan.objects["tokenizer"] = read_tokenizer(options, of)
        if "tokenizer_2" in options:
            plan.objects["tokenizer_2"] = read_tokenizer(options, of, "tokenizer_2")
        else:
            plan.objects["tokenizer_2"] = read_tokenizer(options, of, pad_token="!")
        prediction = str(options.get("prediction", "v_prediction" if "v_pred" in found.keys else "epsilon"))
        if prediction not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction {prediction!r} is none of epsilon, v_prediction.")
        path = DiscreteVPPath(
            1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr="ztsnr" in found.keys
        )  # fmt: skip
        plan.objects["scheduler"] = EulerScheduler(timestep_spacing="leading", steps_offset=1).bind(Parameterization(path, prediction))
        plan.init = {"force_zeros_for_empty_prompt": True, "default_guidance_scale": 5.0}
        if "prediction" not in options and "v_pred" not in found.keys:
            plan.notes.append("it was taken for granted that the network predicts the noise (prediction=epsilon), as Stability AI's does")
        return plan


def _number(options: Mapping[str, Any], name: str, kind: type, usual: float) -> Any:
    try:
        value = kind(options.get(name, usual))
    except (TypeError, ValueError):
        value = 0
    if value <= 0:
        raise ValueError(f"{name} = {options[name]!r} is not a number above 0.")
    return value
