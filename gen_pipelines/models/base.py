"""The base of this library's own networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import ConfigMixin, ModelMixin

__all__ = ["ConfigMixin", "GenerativeModel", "ModelMixin"]


class GenerativeModel(ModelMixin, ConfigMixin):
    """A network in diffusers' form that loads safetensors only and only when every weight is there."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """As diffusers' `ModelMixin.from_pretrained`, without pickles and without weights left at random.

        Raises:
            ValueError: pickles were asked for, or the file has no weights for a parameter or buffer of the model.
        """
        if kwargs.setdefault("use_safetensors", True) is not True:
            raise ValueError(
                f"{cls.__name__}.from_pretrained: only safetensors are loaded, got use_safetensors={kwargs['use_safetensors']!r}."
            )
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        if missing := sorted(info["missing_keys"]):
            raise ValueError(
                f"{pretrained_model_name_or_path}: no weights for {', '.join(missing[:5])} of {cls.__name__}; download or save it again."
            )
        return (model, info) if wants_info else model
