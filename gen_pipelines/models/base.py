"""The base of this library's own networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import ConfigMixin, ModelMixin

from ..bundled import BUNDLED, bundled_path
from ..hub.loading import LoadingError, as_loading_error, check_module, fetch_component
from ..hub.push import PushMixin, strip_origin

__all__ = ["ConfigMixin", "GenerativeModel", "ModelMixin"]

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "proxies")


class GenerativeModel(PushMixin, ModelMixin, ConfigMixin):
    """A network in diffusers' form that loads safetensors only and only when every weight is there."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """As diffusers' `ModelMixin.from_pretrained`, without pickles and without weights left at random; checked before it is built.

        Args:
            pretrained_model_name_or_path: a folder, a Hub id, or "bundled:NAME".
            subfolder: where in it, for example the component's name in a pipeline.
            variant: taken where it is there, else the plain weights.
            kwargs: revision, token, cache_dir, dtype, device_map, low_cpu_mem_usage, ...: as in diffusers.
        Raises:
            LoadingError: pickles were asked for, or the folder is no network of this class, whole and of one piece.
            OSError: the Hub cannot be reached or has no such repository.
        """
        if kwargs.setdefault("use_safetensors", True) is not True:
            raise LoadingError(
                f"{cls.__name__}.from_pretrained: only safetensors are loaded, got use_safetensors={kwargs['use_safetensors']!r}."
            )
        path, subfolder = str(pretrained_model_name_or_path), kwargs.pop("subfolder", None) or ""
        if path.startswith(BUNDLED):
            path = bundled_path(path.removeprefix(BUNDLED))
        hub = {name: kwargs.pop(name) for name in _HUB_OPTIONS if name in kwargs}
        folder = Path(path, subfolder)
        if not folder.is_dir():
            if Path(path).exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
                raise LoadingError(f"{folder} is not a folder; give one that save_pretrained(...) wrote, or a Hub id such as 'user/name'.")
            folder = fetch_component(path, subfolder, kwargs.get("variant"), **hub)
        files = check_module(folder, "gen_pipelines", cls, kwargs.get("variant"))
        if kwargs.get("variant") and f".{kwargs['variant']}" not in files[0].name:
            kwargs["variant"] = None
        return cls._from_checked_folder(folder, **kwargs)

    @classmethod
    def _from_checked_folder(cls, folder: str | Path, **kwargs: Any) -> Any:
        wants_info = kwargs.pop("output_loading_info", False)
        with as_loading_error(f"{folder} ({cls.__name__})"):
            model, info = super().from_pretrained(str(folder), output_loading_info=True, **kwargs)
        if missing := sorted(info["missing_keys"]):
            raise LoadingError(f"{folder}: no weights for {', '.join(missing[:5])} of {cls.__name__}; download or save it again.")
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As diffusers' `ModelMixin.save_pretrained`, in safetensors only; with `push_to_hub` the card is this library's.

        Raises:
            ValueError: pickles were asked for.
        """
        if kwargs.pop("safe_serialization", True) is not True:
            raise ValueError(f"{type(self).__name__}.save_pretrained: weights are safetensors only, got safe_serialization=False.")
        hub = {name: kwargs.pop(name) for name in ("repo_id", "private", "token", "commit_message", "create_pr") if name in kwargs}
        super().save_pretrained(str(save_directory), **kwargs)
        strip_origin(Path(save_directory))
        if push_to_hub:
            self.push_to_hub(hub.pop("repo_id", None) or Path(save_directory).resolve().name, variant=kwargs.get("variant"), **hub)
