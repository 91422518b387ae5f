"""One loader for every pipeline: `AutoPipeline.from_pretrained` reads `model_index.json` and picks the class."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from ..hub.loading import LoadingError, read_index
from .from_diffusers import CannotRun, mapped


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
        from .base import GenerativePipeline, local_or_hub

        path = local_or_hub(pretrained_model_name_or_path)
        if Path(path).exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
            index = read_index(path)
        else:
            options = {
                k: kwargs[k] for k in ("cache_dir", "force_download", "local_files_only", "token", "revision", "variant") if k in kwargs
            }
            index = read_index(GenerativePipeline.download_index(path, **options))
        target, options = cls._target(index, path)
        try:
            return target.from_pretrained(path, **{**options, **kwargs})
        except CannotRun:
            theirs = _pipeline_class(importlib.import_module("diffusers"), index["_class_name"])
            if theirs is None:
                raise
            return theirs.from_pretrained(path, **{"use_safetensors": True, **kwargs})

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
            raise LoadingError(
                f"{path}: its pipeline class {name!r} is code in the repository, which is never run; "
                "load it with diffusers if you trust it."
            )
        if (ours := _pipeline_class(gen_pipelines, name)) is not None:
            return ours, {}
        if (known := mapped(index)) is not None:
            return getattr(gen_pipelines, known.pipeline), {}
        diffusers = importlib.import_module("diffusers")
        if (theirs := _pipeline_class(diffusers, name)) is not None:
            return theirs, {"use_safetensors": True}
        raise LoadingError(
            f"{path}: pipeline class {name!r} is known neither to gen_pipelines nor to diffusers {diffusers.__version__}; "
            f"update them, or check {path}."
        )


def _pipeline_class(library: Any, name: str) -> Any:
    from diffusers import DiffusionPipeline

    found = getattr(library, name, None)
    return found if isinstance(found, type) and issubclass(found, DiffusionPipeline) and found is not DiffusionPipeline else None
