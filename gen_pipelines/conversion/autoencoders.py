"""The autoencoder that a denoiser of latents was trained on, taken along from a folder of diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .base import Component, Plan
from .reader import read, read_text, tensors

__all__ = ["read_autoencoder"]

_NAMES = ("diffusion_pytorch_model.safetensors",)
_CLASSES = {"AutoencoderKL": "vae", "VQModel": "vqvae"}
# names that the attention of the autoencoder had in files of 2022
_OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def read_autoencoder(plan: Plan, folder: Any, channels: int, usual: str) -> None:
    """Adds the autoencoder in `folder` to a plan.

    Args:
        plan: of a denoiser of latents; changed.
        folder: of an AutoencoderKL or VQModel as diffusers saves it, or "none".
        channels: of the latents.
        usual: the repository that published networks of the kind need, for the message.
    Raises:
        ValueError: no folder was given, it is none, or its latents have another number of channels.
    """
    if folder is None:
        raise ValueError(
            f"the network draws latents, and the autoencoder that makes pictures of them is not in the file: give --set vae=FOLDER with "
            f"an AutoencoderKL or VQModel in diffusers' layout (published networks use {usual}), or vae=none to convert without one."
        )
    if str(folder).lower() == "none":
        plan.notes.append(f"without its autoencoder: it draws latents (output_type='latent'); published networks use {usual}")
        return
    import diffusers

    folder = Path(str(folder)).expanduser()
    config_file, weights = folder / "config.json", [folder / name for name in _NAMES if (folder / name).is_file()]
    if not config_file.is_file() or not weights:
        raise ValueError(f"vae={folder}: no config.json and {_NAMES[0]} there; give the folder of an autoencoder in diffusers' layout.")
    config = read_text(config_file)
    name = config.get("_class_name") if isinstance(config, dict) else None
    if name not in _CLASSES:
        raise ValueError(f"vae={folder} holds a {name}; known are {', '.join(_CLASSES)}.")
    if config.get("latent_channels", 3 if name == "VQModel" else 4) != channels:
        raise ValueError(f"vae={folder} has {config.get('latent_channels')} channels of latents, and the network draws {channels}.")
    source = read(weights[0])
    component, state = _CLASSES[name], tensors(source.tree)
    renamed = {key: _current(key) for key in state}
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    plan.sources["vae"] = source
    cls = getattr(diffusers, name)
    plan.components[component] = Component(cls, config, lambda: {renamed[key]: _flat(key, t) for key, t in state.items()})
    plan.used |= {f"vae:{key}": f"{component}.{new}" for key, new in renamed.items()}


def _current(key: str) -> str:
    parts = key.split(".")
    if "attentions" in parts and parts[-2] in _OLD:
        parts[-2:-1] = _OLD[parts[-2]].split(".")
    return ".".join(parts)


def _flat(key: str, tensor: Any) -> Any:
    return tensor.flatten(1) if "attentions" in key and tensor.ndim == 4 else tensor
