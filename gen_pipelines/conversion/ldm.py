"""Latent diffusion's checkpoints: networks of nothing, of classes and of captions, and Stable Diffusion 1 and 2, with their autoencoders.

The file is Lightning's {state_dict, callbacks, ...}, or the state dict alone in safetensors. The schedule is in it, as a buffer of betas;
the number of heads is in its YAML file only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..processes.discrete_vp import DiscreteVPPath
from ..processes.parameterization import Parameterization
from .base import Component, Format, Made, Plan
from .clip_text import TextEncoder, read_tokenizer, text_encoder_of
from .keys import numbered
from .ldm_autoencoder import autoencoder_recipe, looks_like_autoencoder
from .ldm_bert import bert_of, read_bert_tokenizer
from .openai_unet import adm_config, fits_unet_2d, heads_of, unet_2d_config
from .reader import Checkpoint, tensors
from .unet_layout import Layout, Recipe, layout_of, looks_like_unet, to_adm, to_unet_2d

__all__ = ["Found", "LatentDiffusion", "add_autoencoder", "chosen_weights", "condition_config", "drop_the_rest", "path_of", "transformers"]

_UNET, _FIRST, _COND = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
_CLASSES = "cond_stage_model.embedding.weight"
# what Lightning's module keeps besides: all of it follows from the betas
_BUFFERS = frozenset(
    """betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod log_one_minus_alphas_cumprod
    sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod posterior_variance posterior_log_variance_clipped posterior_mean_coef1
    posterior_mean_coef2 lvlb_weights logvar scale_factor""".split()
)
_SD = {"scale_factor": 0.18215, "betas": (0.00085, 0.012, 1000)}
# what is known of the published files, all of which are called model.ckpt
PRESETS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("celeba256", "ffhq256", "lsun_beds256"), {"image_size": 64, "num_head_channels": 32, "scale_factor": 1.0}),
    "lsun_churches256": {"image_size": 32, "num_heads": 8},
    "cin256": {"image_size": 32, "num_head_channels": 32, "scale_factor": 1.0},
    "cin256-v2": {"image_size": 64, "num_heads": 1, "scale_factor": 1.0},
    "txt2img-1p4B": {"image_size": 32, "num_heads": 8, "prediction": "epsilon", **_SD},
    "stable-diffusion-1": {"image_size": 64, "num_heads": 8, "prediction": "epsilon", **_SD},
    "stable-diffusion-2-base": {"image_size": 64, "num_head_channels": 64, "prediction": "epsilon", **_SD},
    "stable-diffusion-2": {"image_size": 96, "num_head_channels": 64, "prediction": "v_prediction", **_SD},
}
_KINDS = {"image_size": int, "num_heads": int, "num_head_channels": int, "scale_factor": float, "prediction": str, "null_class": int}


def path_of(betas: Tensor) -> DiscreteVPPath:
    """The path of a checkpoint's betas, (N,): by its two ends where they are the squares of evenly spaced numbers, else beta by beta.

    References: Rombach et al. 2022, appendix E, https://arxiv.org/abs/2112.10752
    """
    betas = betas.double()
    first, last = float(betas[0]), float(betas[-1])
    for digits in range(3, 9):  # the file has 32-bit numbers; the ends were round ones
        ends = round(first, digits), round(last, digits)
        even = torch.linspace(max(ends[0], 0.0) ** 0.5, max(ends[1], 0.0) ** 0.5, len(betas), dtype=torch.float64) ** 2
        if torch.allclose(even, betas, rtol=1e-5, atol=1e-9):
            return DiscreteVPPath(len(betas), beta_start=ends[0], beta_end=ends[1], beta_schedule="scaled_linear")
    return DiscreteVPPath(len(betas), trained_betas=tuple(betas.tolist()))


def _path(first: float, last: float, count: int) -> DiscreteVPPath:
    """What a training of latent diffusion calls linear."""
    return DiscreteVPPath(count, beta_start=first, beta_end=last, beta_schedule="scaled_linear")


def condition_config(
    layout: Layout, state: Mapping[str, Tensor], heads: Callable[[int], int], size: int, classes: int | None = None
) -> dict[str, Any]:
    """Constructor arguments of `UNet2DConditionModel` for a network that attends to a condition.

    Args:
        layout, state: of the U-Net.
        heads: channels -> heads.
        size: of the latents.
        classes: rows of a table whose row is the condition; None for captions.
    Raises:
        ValueError: a part that diffusers' class does not have.
    """
    if layout.resample != "conv" or layout.scale_shift or layout.num_class_embeds is not None or layout.time_channels != layout.widths[0]:
        raise ValueError("a U-Net with transformers and residual up- and downsampling, scales of the time, or a class table is not known.")
    depths = _depths(layout, state)
    config = {
        "sample_size": size,
        "in_channels": layout.in_channels,
        "out_channels": layout.out_channels,
        "block_out_channels": list(layout.widths),
        "layers_per_block": layout.layers_per_block,
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in layout.attention_levels],
        "up_block_types": ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(layout.attention_levels)],
        "attention_head_dim": [heads(width) for width in layout.widths],  # diffusers has the number of heads under this name
        "cross_attention_dim": state["middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "use_linear_projection": state["middle_block.1.proj_in.weight"].ndim == 2,
        "transformer_layers_per_block": depths[-1] if len(set(depths)) == 1 else depths,
    }
    if classes is not None:  # a row of the table is a linear layer on the label written as zeros and a one
        config |= {"encoder_hid_dim": classes, "encoder_hid_dim_type": "text_proj"}
    return config


def _depths(layout: Layout, state: Mapping[str, Tensor]) -> list[int]:
    """Transformer blocks of each level, those of the middle where a level has none.

    Raises:
        ValueError: the middle has another number than the last level, whose number diffusers' class gives it.
    """

    def depth(place: str) -> int:
        return len(numbered(state, rf"{re.escape(place)}\.transformer_blocks\.(\d+)\."))

    middle, step = depth("middle_block.1"), layout.layers_per_block + 1
    depths = [depth(f"input_blocks.{1 + level * step}.1") or middle for level in range(len(layout.widths))]
    if depths[-1] != middle:
        raise ValueError(f"a U-Net with {depths[-1]} transformer blocks at the smallest size and {middle} in the middle is not known.")
    return depths


def transformers(recipe: Recipe, target: str, source: str, keys: Any) -> None:
    """diffusers' transformers have the keys of latent diffusion's."""
    for key in keys:
        if key.startswith(f"{source}."):
            recipe.add(target + key[len(source) :], key)


class LatentDiffusion(Format):
    """Becomes a `DiffusionImagePipeline`, or a `LatentTextToImagePipeline` where captions are the condition."""

    name = "ldm"
    title = "latent diffusion and Stable Diffusion"
    paper = "https://arxiv.org/abs/2112.10752"
    licence = "MIT for latent diffusion's published weights, CreativeML Open RAIL-M for Stable Diffusion's; others: see the source"
    extensions = (".ckpt", ".safetensors")
    options = {
        "config": "the YAML file of the training",
        "preset": f"a published checkpoint, instead of its YAML file: {', '.join(PRESETS)}",
        "num_heads": "heads of every attention, or",
        "num_head_channels": "channels per head",
        "image_size": "height and width of the latents",
        "scale_factor": "what latents are multiplied by, where the file does not have it",
        "null_class": "the class that means none (the last row of the table), for guidance",
        "prediction": "epsilon or v_prediction",
        "weights": "ema (default, where the file has it) or model",
        "tokenizer": "of a network with captions: the folder of its tokenizer (CLIP's, or BERT's)",
    }

    def matches(self, checkpoint: Checkpoint) -> float:
        found = Found(checkpoint)
        if not looks_like_unet(found.unet):
            return 0.0
        return 0.95 if looks_like_autoencoder(found.first) else 0.4

    def plan(self, checkpoint: Checkpoint, options: Mapping[str, Any]) -> Plan:
        found = Found(checkpoint)
        if not looks_like_unet(found.unet):
            raise ValueError(f"{checkpoint.path.name} holds no U-Net of latent diffusion.")
        settings = _settings(options)
        captions = any(key.startswith(_COND) and key != _CLASSES for key in found.keys)
        layout = layout_of(found.unet)
        _ask(checkpoint, settings, found, captions)
        from ..pipelines.diffusion_image import DiffusionImagePipeline

        plan = Plan(self.name, DiffusionImagePipeline, {})
        kept, origin = chosen_weights(plan, found, options)
        self._unet(plan, layout, kept, origin, settings, found)
        add_autoencoder(plan, found, settings["scale_factor"])
        drop_the_rest(plan, found)
        path = path_of(found.betas) if found.betas is not None else _path(*settings["betas"])
        network = Parameterization(path, settings["prediction"])
        from ..schedulers import DDIMScheduler

        plan.objects["scheduler"] = DDIMScheduler(timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False).bind(network)
        plan.init |= {"default_num_inference_steps": 50}
        if captions:
            self._captions(plan, checkpoint, found, options)
        elif found.classes is not None:
            rows = found.classes.shape[0]
            null = settings.get("null_class", rows - 1 if rows == 1001 else None)
            if null is not None and null != rows - 1:
                raise ValueError(f"null_class = {null}, but only the last of the {rows} classes, {rows - 1}, can mean none.")
            plan.init |= {"null_class": null, "default_guidance_scale": 1.0 if null is None else 3.0}
        return plan

    def _unet(
        self, plan: Plan, layout: Layout, state: dict[str, Tensor], origin: dict[str, str], settings: Mapping[str, Any], found: Found
    ) -> None:
        from diffusers import UNet2DConditionModel, UNet2DModel

        from ..models.denoisers.adm_unet import ADMUNet2DModel

        heads, size = heads_of(settings), settings["image_size"]
        extra: dict[str, Tensor | Made] = {}
        if any(layout.transformer_levels):
            classes = None if found.classes is None else found.classes.shape[0]
            cls, config = UNet2DConditionModel, condition_config(layout, state, heads, size, classes)
            recipe = to_unet_2d(layout, state, heads, True, transformers)
            if found.classes is not None:
                table = found.classes
                extra["encoder_hid_proj.weight"] = Made(lambda: table.T.contiguous(), tuple(table.T.shape), table.dtype)
                extra["encoder_hid_proj.bias"] = torch.zeros(table.shape[1], dtype=table.dtype)
                plan.used[found.prefix + _CLASSES] = "unet.encoder_hid_proj.weight"
        elif fits_unet_2d(layout, heads, heads):
            cls, config = UNet2DModel, unet_2d_config(layout, heads, size)
            recipe = to_unet_2d(layout, state, heads, True)
        else:
            cls, config = ADMUNet2DModel, adm_config(layout, settings, size)
            recipe = to_adm(layout, state, heads, True)
        plan.components["unet"] = Component(cls, config, lambda: {**recipe.state(state), **extra})
        plan.used |= recipe.used("unet", origin)

    def _captions(self, plan: Plan, checkpoint: Checkpoint, found: Found, options: Mapping[str, Any]) -> None:
        from ..pipelines.latent_text_to_image import LatentTextToImagePipeline

        plan.pipeline = LatentTextToImagePipeline
        if (bert := bert_of(found.keys, _COND + "transformer.", found.prefix)) is not None:
            bert.add_to(plan, "text_encoder")
            plan.objects["tokenizer"] = read_bert_tokenizer(options)
            plan.init = {"max_text_tokens": bert.config["max_position_embeddings"], "default_guidance_scale": 5.0}
            return
        _text_encoder(checkpoint, found).add_to(plan, "text_encoder")
        plan.objects["tokenizer"] = read_tokenizer(
            options, "openai/clip-vit-large-patch14; of Stable Diffusion 2, whose padding differs, those of its repository"
        )
        plan.init = {"default_guidance_scale": 7.5}


def chosen_weights(plan: Plan, found: Found, options: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(the U-Net's weights by its own keys, where each lies in the file): the average, or the last ones; the others are dropped.

    Raises:
        ValueError: the option "weights" is not known, or the file has no average.
    """
    weights = str(options.get("weights", "ema" if found.average else "model"))
    if weights not in ("ema", "model") or (weights == "ema" and not found.average):
        raise ValueError(f"weights = {weights!r}: {'none of ema, model' if found.average else 'this file has no averaged weights'}.")
    kept = dict(found.unet)
    origin = {key: found.prefix + _UNET + key for key in kept}
    if weights == "ema":
        kept = {key: found.average[key] for key in kept}
        plan.dropped |= dict.fromkeys(origin.values(), "the weights of the last step")
        origin = {key: found.prefix + _dotless(key) for key in kept}
    why = "the averaged weights" if weights == "model" else "state of the average"
    taken = set(origin.values())
    plan.dropped |= {at: why for key in found.keys if key.startswith("model_ema.") and (at := found.prefix + key) not in taken}
    return kept, origin


def add_autoencoder(plan: Plan, found: Found, scale_factor: float, **config: Any) -> None:
    """The file's autoencoder as the component `vae` or `vqvae`; `config` is more of its configuration.

    Raises:
        ValueError: it has none.
    """
    import diffusers

    if not looks_like_autoencoder(found.first, bare=True):
        raise ValueError("the file has no autoencoder (first_stage_model), whose latents the network draws.")
    name, made, recipe = autoencoder_recipe(found.first)
    made |= {"scaling_factor": scale_factor, **config}
    component = "vae" if name == "AutoencoderKL" else "vqvae"
    plan.components[component] = Component(getattr(diffusers, name), made, lambda: recipe.state(found.first))
    plan.used |= recipe.used(component, {key: found.prefix + _FIRST + key for key in found.first})


def drop_the_rest(plan: Plan, found: Found) -> None:
    """What follows from the schedule, the autoencoder's loss and the state of the training, by name."""
    for key in found.keys:
        if key in _BUFFERS or key == "denoiser.sigmas":
            plan.dropped[found.prefix + key] = "follows from the schedule"
        elif key.startswith(_FIRST + "loss."):
            plan.dropped[found.prefix + key] = "the autoencoder's loss"
    plan.dropped |= dict.fromkeys(found.others, "state of the training")


class Found:
    """The parts of a checkpoint, by their own names; `prefix` stands before them in the file."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        found, tree = tensors(checkpoint.tree), checkpoint.tree
        wrapped = isinstance(tree, dict) and isinstance(tree.get("state_dict"), dict)
        self.prefix = "state_dict." if wrapped else ""
        self.keys = {key.removeprefix(self.prefix): value for key, value in found.items() if key.startswith(self.prefix)}
        self.others = [key for key in found if not key.startswith(self.prefix)]
        self.unet = {key.removeprefix(_UNET): value for key, value in self.keys.items() if key.startswith(_UNET)}
        self.first = {key.removeprefix(_FIRST): value for key, value in self.keys.items() if key.startswith(_FIRST)}
        self.first = {key: value for key, value in self.first.items() if not key.startswith("loss.")}
        average = {key: self.keys.get(_dotless(key)) for key in self.unet}
        self.average = average if average and all(value is not None for value in average.values()) else None
        self.classes, self.betas = self.keys.get(_CLASSES), self.keys.get("betas")
        factor = self.keys.get("scale_factor")
        self.scale_factor = None if factor is None else float(factor)


def _dotless(key: str) -> str:
    """The name of a key's average: Lightning's buffers may have no dots."""
    return "model_ema." + ("diffusion_model." + key).replace(".", "")


def _settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """Of the YAML file, a preset and single options, the later over the former."""
    settings: dict[str, Any] = {}
    if (given := options.get("config")) is not None:
        try:
            model = given["model"]["params"]
            unet = model["unet_config"]["params"]
        except (KeyError, TypeError):
            raise ValueError("config: no model.params.unet_config.params there; give the YAML file of the training.") from None
        settings |= {name: unet[name] for name in ("num_heads", "num_head_channels") if unet.get(name, -1) != -1}
        size = model.get("image_size", unet.get("image_size"))
        settings |= {} if size is None else {"image_size": size}
        settings["scale_factor"] = model.get("scale_factor", 1.0)
        if {"linear_start", "linear_end"} <= set(model) and model.get("beta_schedule", "linear") == "linear":
            settings["betas"] = (float(model["linear_start"]), float(model["linear_end"]), int(model.get("timesteps", 1000)))
        settings["prediction"] = {"eps": "epsilon", "v": "v_prediction"}.get(model.get("parameterization", "eps"), "unknown")
    if (preset := options.get("preset")) is not None:
        if preset not in PRESETS:
            raise ValueError(f"preset {preset!r} is none of {', '.join(PRESETS)}.")
        settings |= {"prediction": "epsilon"} | PRESETS[preset]
    for name, kind in _KINDS.items():
        if name in options:
            try:
                settings[name] = kind(options[name])
            except (TypeError, ValueError):
                raise ValueError(f"{name} = {options[name]!r} is not a number.") from None
    if settings.get("prediction", "epsilon") not in ("epsilon", "v_prediction"):
        raise ValueError(f"prediction {settings['prediction']!r} is none of epsilon, v_prediction.")
    return settings


def _ask(checkpoint: Checkpoint, settings: dict[str, Any], found: Found, captions: bool) -> None:
    """What neither the file nor the settings say.

    Raises:
        ValueError: naming all of it.
    """
    if found.scale_factor is not None:
        settings["scale_factor"] = found.scale_factor
    if not captions:
        settings.setdefault("prediction", "epsilon")  # the code of networks without captions knows no other
    missing = [name for name in ("image_size", "scale_factor", "prediction") if name not in settings]
    if settings.get("num_heads", -1) < 1 and settings.get("num_head_channels", -1) < 1:
        missing.append("num_heads (or num_head_channels)")
    if found.betas is None and "betas" not in settings:
        missing.append("betas")
    if missing:
        raise ValueError(
            f"{checkpoint.path.name}: the file does not say {', '.join(missing)}. Give its YAML file (--config FILE), a published "
            f"checkpoint's name (--set preset=NAME, one of {', '.join(PRESETS)}), or each but betas by --set {missing[0].split()[0]}=..."
        )


def _text_encoder(checkpoint: Checkpoint, found: Found) -> TextEncoder:
    """CLIP's text encoder, of transformers or of open_clip.

    Raises:
        ValueError: it is another.
    """
    encoder = text_encoder_of(found.keys, _COND + "transformer.", found.prefix)
    # Stable Diffusion 2 looks at what the last block is given, after the last norm
    encoder = encoder or text_encoder_of(found.keys, _COND + "model.", found.prefix, without_last=True)
    if encoder is None:
        raise ValueError(f"{checkpoint.path.name}: its text encoder is neither one of CLIP's nor latent diffusion's own BERT.")
    return encoder
