"""Foreign checkpoints, read as data and turned into pipelines: one file per format, one restricted reader, `convert`."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import Format

# name of a format -> (module, class); a module is imported when its format is asked for
_FORMATS: dict[str, tuple[str, str]] = {
    "open_clip_text": (".open_clip_text", "OpenCLIPText"),
    "pythae": (".pythae", "Pythae"),
    "rosinality_glow": (".rosinality_glow", "RosinalityGlow"),
    "rosinality_vqvae": (".rosinality_vqvae", "RosinalityVQVAE"),
    "stylegan2_ada": (".stylegan2_ada", "StyleGAN2Ada"),
    "stylegan3": (".stylegan3", "StyleGAN3"),
    "openai_unet": (".openai_unet", "OpenAIUNet"),
    "openai_classifier": (".openai_classifier", "OpenAIClassifier"),
    "dit": (".dit", "DiT"),
    "ldm": (".ldm", "LatentDiffusion"),
    "stable_diffusion_xl": (".stable_diffusion_xl", "StableDiffusionXL"),
    "stable_diffusion_3": (".stable_diffusion_3", "StableDiffusion3"),
    "stylegan2_tf": (".stylegan2_tf", "StyleGAN2TF"),
    "stylegan1_tf": (".stylegan1_tf", "StyleGAN1TF"),
    "rosinality_stylegan2": (".rosinality_stylegan2", "RosinalityStyleGAN2"),
    "taming_vqgan": (".taming_vqgan", "TamingVQGAN"),
    "k_diffusion": (".k_diffusion", "KDiffusion"),
    "edm": (".edm", "EDM"),
    "edm2": (".edm2", "EDM2"),
    "score_sde": (".score_sde", "ScoreSDE"),
}


class _Registry(Mapping):
    def __getitem__(self, name: str) -> Format:
        module, cls = _FORMATS[name]
        return getattr(importlib.import_module(module, __name__), cls)()

    def __iter__(self) -> Iterator[str]:
        return iter(_FORMATS)

    def __len__(self) -> int:
        return len(_FORMATS)


FORMATS: Mapping[str, Format] = _Registry()

_HOME = {
    "convert": ".base",
    "Component": ".base",
    "Format": ".base",
    "Plan": ".base",
    "export_state_dict": ".export",
    "read": ".reader",
    "tensors": ".reader",
}

__all__ = ["FORMATS", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name], __name__), name)
