"""Low-rank adapters (LoRA) in our pipelines, through diffusers' own loaders."""

from __future__ import annotations

from functools import cache
from typing import Any

from ..models.calling import is_a, unwrap

# what diffusers loads adapters with, by the denoiser they were made for
_LOADERS = {"SD3Transformer2DModel": "SD3LoraLoaderMixin", "FluxTransformer2DModel": "FluxLoraLoaderMixin"}


class _Loader:
    """What one of diffusers' mixins takes for a pipeline: it has its components and methods, and keeps which adapters are fused."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self._merged_adapters: set[str] = set()

    def __getattr__(self, name: str) -> Any:  # only for what the mixin does not have
        return getattr(self.__dict__["pipe"], name)


@cache
def _loader_class(mixin: str) -> type:
    from diffusers import loaders

    return type(mixin.replace("Mixin", ""), (_Loader, getattr(loaders, mixin)), {})


def _mixin_of(pipe: Any) -> str:
    denoiser = unwrap(pipe.denoiser)
    if is_a(denoiser, "UNet2DConditionModel"):
        is_xl = denoiser.config.get("addition_embed_type") == "text_time"
        return "StableDiffusionXLLoraLoaderMixin" if is_xl else "StableDiffusionLoraLoaderMixin"
    for name, mixin in _LOADERS.items():
        if is_a(denoiser, name):
            return mixin
    raise ValueError(
        f"{type(pipe).__name__}: diffusers has no LoRA loader for pipelines of {type(denoiser).__name__}; load the adapter into the "
        "network itself: pipe.denoiser.load_lora_adapter(...)."
    )


class LoraAdapters:
    """The methods of diffusers' LoRA mixins, for the pipelines whose denoisers they know; arguments are diffusers' own."""

    @property
    def lora_loader(self) -> Any:
        """diffusers' loader for this pipeline's denoiser.

        Raises:
            ValueError: diffusers has none for it.
        """
        cls = _loader_class(_mixin_of(self))
        if type(known := self.__dict__.get("_lora_loader")) is not cls:
            known = self.__dict__["_lora_loader"] = cls(self)
        return known

    def load_lora_weights(self, source: Any, adapter_name: str | None = None, **kwargs: Any) -> None:
        """Loads an adapter from a Hub id, a folder, a safetensors file or a dict of tensors; pickles are not read."""
        if kwargs.pop("use_safetensors", True) not in (True, None):
            raise ValueError("load_lora_weights: only safetensors are loaded, got use_safetensors=False; convert pickled weights first.")
        self.lora_loader.load_lora_weights(source, adapter_name=adapter_name, use_safetensors=True, **kwargs)

    def unload_lora_weights(self, **kwargs: Any) -> None:
        """Takes every adapter out again."""
        self.lora_loader.unload_lora_weights(**kwargs)

    def set_adapters(self, adapter_names: list[str] | str, adapter_weights: Any = None) -> None:
        """Says which adapters are active, and how strongly."""
        self.lora_loader.set_adapters(adapter_names, adapter_weights)

    def enable_lora(self) -> None:
        """Makes the adapters act again after `disable_lora`."""
        self.lora_loader.enable_lora()

    def disable_lora(self) -> None:
        """Leaves the adapters loaded and without effect."""
        self.lora_loader.disable_lora()

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """Takes these adapters out."""
        self.lora_loader.delete_adapters(adapter_names)

    def get_active_adapters(self) -> list[str]:
        """Names of the adapters that act."""
        return self.lora_loader.get_active_adapters()

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Component -> names of the adapters in it."""
        return self.lora_loader.get_list_adapters()

    def fuse_lora(self, **kwargs: Any) -> None:
        """Adds the active adapters to the weights, so that they cost nothing."""
        self.lora_loader.fuse_lora(**kwargs)

    def unfuse_lora(self, **kwargs: Any) -> None:
        """The inverse of `fuse_lora`."""
        self.lora_loader.unfuse_lora(**kwargs)

    def set_lora_device(self, adapter_names: list[str], device: Any) -> None:
        """Moves these adapters to a device."""
        self.lora_loader.set_lora_device(adapter_names, device)
