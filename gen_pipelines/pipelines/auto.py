"""One loader for every pipeline: `AutoPipeline.from_pretrained` reads `model_index.json` and picks the class."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from ..bundled import BUNDLED, bundled_path
from ..hub.loading import components_of, read_index

# classes of diffusers that ours load, and what ours must be told about them
_FROM_DIFFUSERS: dict[str, tuple[str, dict[str, Any]]] = {
    "StableDiffusionPipeline": ("LatentTextToImagePipeline", {}),
    "StableDiffusionImg2ImgPipeline": ("LatentImageToImagePipeline", {}),
    "StableDiffusionInpaintPipeline": ("LatentInpaintPipeline", {}),
    "PixArtAlphaPipeline": (
        "LatentTextToImagePipeline",
        {"max_text_tokens": 120, "default_num_inference_steps": 20, "default_guidance_scale": 4.5},
    ),
    "PixArtSigmaPipeline": (
        "LatentTextToImagePipeline",
        {"max_text_tokens": 300, "default_num_inference_steps": 20, "default_guidance_scale": 4.5},
    ),
}

_IMAGES = "DiffusionImagePipeline"
_FROM_DIFFUSERS |= {
    "DDPMPipeline": (_IMAGES, {"default_num_inference_steps": 1000}),
    "DDIMPipeline": (_IMAGES, {}),
    "PNDMPipeline": (_IMAGES, {}),
    "LDMPipeline": (_IMAGES, {}),
    "DiTPipeline": (_IMAGES, {"default_guidance_scale": 4.0}),
    "ConsistencyModelPipeline": (_IMAGES, {"default_num_inference_steps": 1}),
}

# components that a class of diffusers may have and that ours can do without
_DISPENSABLE = {"safety_checker", "feature_extractor"}


class AutoPipeline:
    """Loads any pipeline: ours by their class, diffusers' repositories as ours where ours can, and as diffusers' own objects elsewhere.

    ```python
    pipe = AutoPipeline.from_pretrained("bundled:emoji")        # shipped in the package
    pipe = AutoPipeline.from_pretrained("runs/mine/pipeline")   # a folder
    pipe = AutoPipeline.from_pretrained("user/name")            # the Hub
    ```
    """

    def __init__(self) -> None:
        raise TypeError("AutoPipeline is not instantiated; call AutoPipeline.from_pretrained(repo_or_folder).")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """The pipeline in a folder, in a Hub repository, or shipped with this package.

        Args:
            pretrained_model_name_or_path: a folder, a Hub id, or "bundled:NAME".
            kwargs: as in `GenerativePipeline.from_pretrained`.
        Returns: one of our pipelines, or a diffusers pipeline where ours cannot stand in for it.
        Raises:
            ValueError: no pipeline there, a bundled name that does not exist, a class that nobody knows, or one that is code in the
                repository.
            OSError: the Hub cannot be reached or has no such repository.
        """
        from .base import GenerativePipeline

        path = str(pretrained_model_name_or_path)
        if path.startswith(BUNDLED):
            path = bundled_path(path.removeprefix(BUNDLED))
        if Path(path).exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
            index = read_index(path)
        else:
            options = {
                k: kwargs[k] for k in ("cache_dir", "force_download", "local_files_only", "token", "revision", "variant") if k in kwargs
            }
            index = read_index(GenerativePipeline.download_index(path, **options))
        target, options = cls._target(index, path)
        return target.from_pretrained(path, **{**options, **kwargs})

    @classmethod
    def takes_no_prompt(cls, index: dict[str, Any]) -> bool:
        """Whether the pipeline of a `model_index.json` draws without a prompt, `batch_size` pictures at a call."""
        import inspect

        target, _ = cls._target(index, "the model")
        takes = inspect.signature(target.__call__).parameters
        return "prompt" not in takes and "batch_size" in takes

    @classmethod
    def _target(cls, index: dict[str, Any], path: str) -> tuple[Any, dict[str, Any]]:
        import gen_pipelines

        name = index["_class_name"]
        if not isinstance(name, str):
            raise ValueError(
                f"{path}: its pipeline class {name!r} is code in the repository, which is never run; "
                "load it with diffusers if you trust it."
            )
        if (ours := _pipeline_class(gen_pipelines, name)) is not None:
            return ours, {}
        if name in _FROM_DIFFUSERS and _fits(index):
            ours_name, options = _FROM_DIFFUSERS[name]
            return getattr(gen_pipelines, ours_name), options
        diffusers = importlib.import_module("diffusers")
        if (theirs := _pipeline_class(diffusers, name)) is not None:
            return theirs, {"use_safetensors": True}
        raise ValueError(
            f"{path}: pipeline class {name!r} is known neither to gen_pipelines nor to diffusers {diffusers.__version__}; "
            f"update them, or check {path}."
        )


def _pipeline_class(library: Any, name: str) -> Any:
    from diffusers import DiffusionPipeline

    found = getattr(library, name, None)
    return found if isinstance(found, type) and issubclass(found, DiffusionPipeline) and found is not DiffusionPipeline else None


def _fits(index: dict[str, Any]) -> bool:
    """Whether a repository has what our pipeline needs and nothing else that matters."""
    parts = components_of(index)
    if _FROM_DIFFUSERS[index["_class_name"]][0] == _IMAGES:
        return _fits_images(parts)
    denoisers = {"unet": "UNet2DConditionModel", "transformer": "PixArtTransformer2DModel"}
    known = {"vae", "text_encoder", "tokenizer", "scheduler", *denoisers} | _DISPENSABLE
    needed = {"vae", "text_encoder", "tokenizer", "scheduler"}
    return needed <= set(parts) <= known and any(parts.get(name, ("", ""))[1] == cls for name, cls in denoisers.items())


def _fits_images(parts: dict[str, tuple[str, str]]) -> bool:
    """Whether DiffusionImagePipeline can run these components; a scheduler that cannot be hosted stays in its own pipeline."""
    from ..schedulers.bridge import REFUSED

    # DiT's repositories still have the name that its class had when it was published
    denoisers = {("unet", "UNet2DModel"), ("transformer", "DiTTransformer2DModel"), ("transformer", "Transformer2DModel")}
    named = {(name, cls) for name, (_, cls) in parts.items()}
    known = {"unet", "transformer", "vae", "vqvae", "scheduler"} | _DISPENSABLE
    return "scheduler" in parts and set(parts) <= known and len(named & denoisers) == 1 and parts["scheduler"][1] not in REFUSED
