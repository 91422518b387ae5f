"""Which pipelines of diffusers load as ours, and what ours must be told about their folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..hub.loading import LoadingError, components_of
from ..schedulers.bridge import REFUSED

Parts = Mapping[str, tuple[str, str]]

# components that a class of diffusers may have and that ours can do without
DISPENSABLE = {"safety_checker", "feature_extractor"}


class CannotRun(LoadingError):
    """A network needs what our pipeline does not give it; diffusers' own pipeline of the folder runs it."""


@dataclass(frozen=True)
class Mapped:
    """What is known of one class of diffusers.

    Args:
        pipeline: the name of ours.
        fits: whether ours can run a folder's components, given as name -> (library, class).
        defaults: constructor arguments of ours, where the folder's index does not say them.
        renamed: their name of a component -> ours.
    """

    pipeline: str
    fits: Callable[[Parts], bool]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)


def has_parts(needed: set[str], denoisers: set[str], optional: set[str] = frozenset()) -> Callable[[Parts], bool]:
    """Whether there are the components that are needed, a denoiser of one of the classes, and nothing else that matters."""

    def fits(parts: Parts) -> bool:
        named = [cls for name, (_, cls) in parts.items() if name in ("unet", "transformer")]
        known = {*needed, *optional, *DISPENSABLE, "scheduler", "unet", "transformer"}
        return {*needed, "scheduler"} <= set(parts) <= known and len(named) == 1 and named[0] in denoisers

    return fits


_ONE = {"vae", "text_encoder", "tokenizer"}
_TWO = {*_ONE, "text_encoder_2", "tokenizer_2"}
_TEXT = "LatentTextToImagePipeline"
_SD = has_parts(_ONE, {"UNet2DConditionModel"})
# PixArt's repositories still have the name that its class had when it was published
_PIXART = has_parts(_ONE, {"PixArtTransformer2DModel", "Transformer2DModel"})
_PIXART_CALL = {"lower_case_captions": True, "resolution_binning": True, "default_num_inference_steps": 20, "default_guidance_scale": 4.5}

MAPPED: dict[str, Mapped] = {
    "StableDiffusionPipeline": Mapped(_TEXT, _SD),
    "StableDiffusionImg2ImgPipeline": Mapped("LatentImageToImagePipeline", _SD),
    "StableDiffusionInpaintPipeline": Mapped("LatentInpaintPipeline", _SD),
    "StableDiffusionXLPipeline": Mapped(
        _TEXT,
        has_parts({"vae", "text_encoder_2", "tokenizer_2"}, {"UNet2DConditionModel"}, {"text_encoder", "tokenizer"}),
        {"force_zeros_for_empty_prompt": True, "default_guidance_scale": 5.0},
    ),
    "StableDiffusion3Pipeline": Mapped(
        _TEXT,
        has_parts(_TWO, {"SD3Transformer2DModel"}, {"text_encoder_3", "tokenizer_3"}),
        {"max_text_tokens": 256, "default_num_inference_steps": 28, "default_guidance_scale": 7.0},
    ),
    "FluxPipeline": Mapped(
        _TEXT,
        has_parts(_TWO, {"FluxTransformer2DModel"}),
        {"max_text_tokens": 512, "default_num_inference_steps": 28, "default_guidance_scale": 3.5},
    ),
    "LatentConsistencyModelPipeline": Mapped(_TEXT, _SD, {"default_num_inference_steps": 4, "default_guidance_scale": 8.5}),
    "LDMTextToImagePipeline": Mapped(
        _TEXT,
        has_parts({"vqvae", "bert", "tokenizer"}, {"UNet2DConditionModel"}),
        {"max_text_tokens": 77, "default_guidance_scale": 1.0},
        {"vqvae": "vae", "bert": "text_encoder"},
    ),
    "PixArtAlphaPipeline": Mapped(_TEXT, _PIXART, {"max_text_tokens": 120, **_PIXART_CALL}),
    "PixArtSigmaPipeline": Mapped(_TEXT, _PIXART, {"max_text_tokens": 300, **_PIXART_CALL}),
}

_IMAGES = "DiffusionImagePipeline"
# DiT's repositories still have the name that its class had when it was published
_some_image_parts = has_parts(set(), {"UNet2DModel", "DiTTransformer2DModel", "Transformer2DModel"}, {"vae", "vqvae"})


def _image_parts(parts: Parts) -> bool:
    """A scheduler that cannot be hosted stays in its own pipeline."""
    return _some_image_parts(parts) and parts["scheduler"][1] not in REFUSED


MAPPED |= {
    "DDPMPipeline": Mapped(_IMAGES, _image_parts, {"default_num_inference_steps": 1000}),
    "DDIMPipeline": Mapped(_IMAGES, _image_parts),
    "PNDMPipeline": Mapped(_IMAGES, _image_parts),
    "LDMPipeline": Mapped(_IMAGES, _image_parts),
    "DiTPipeline": Mapped(_IMAGES, _image_parts, {"default_guidance_scale": 4.0}),
    "ConsistencyModelPipeline": Mapped(_IMAGES, _image_parts, {"default_num_inference_steps": 1}),
}


def mapped(index: Mapping[str, Any]) -> Mapped | None:
    """What is known of the class that a `model_index.json` names, if ours can run the folder."""
    name = index.get("_class_name")
    known = MAPPED.get(name) if isinstance(name, str) else None
    return known if known is not None and known.fits(components_of(index)) else None
