"""What a network is told about the size of the picture."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ...models.calling import TextCondition, is_a, unwrap

Pair = tuple[int, int]

_SIZES = ("original_size", "crops_coords_top_left", "target_size")


@dataclass(frozen=True)
class PictureSize:
    """The size of the picture, and of what it is said to be cut from, all in pixels, rows first.

    Attributes:
        height, width: of the picture.
        original_size: of the picture before it was scaled: small values give the look of an enlarged one; the picture's by default.
        crops_coords_top_left: where it was cut out; (0, 0) by default.
        target_size: the picture's by default.
        negative_original_size, negative_crops_coords_top_left, negative_target_size: the same for the negative prompt; as for the prompt
            unless the first and the last are given.

    References: Podell et al. 2023, section 2.2, https://arxiv.org/abs/2307.01952
    """

    height: int
    width: int
    original_size: Pair | None = None
    crops_coords_top_left: Pair | None = None
    target_size: Pair | None = None
    negative_original_size: Pair | None = None
    negative_crops_coords_top_left: Pair | None = None
    negative_target_size: Pair | None = None

    def check(self, denoiser: nn.Module) -> None:
        """Raises ValueError or TypeError on sizes that are no pair of numbers, or that the network is not told."""
        for name in (*_SIZES, *(f"negative_{name}" for name in _SIZES)):
            value = getattr(self, name)
            if value is None:
                continue
            if not _told_frames(denoiser):
                raise ValueError(
                    f"{name} has no effect: the network of this pipeline is not told it (Stable Diffusion XL is); leave it out."
                )
            if not isinstance(value, (list, tuple)) or len(value) != 2 or not all(type(v) is int for v in value):
                raise TypeError(f"{name} must be two whole numbers, rows first, got {value!r}.")

    def on(self, conditions: dict[str, TextCondition], denoiser: nn.Module) -> dict[str, TextCondition]:
        """The conditions with what this network is told of the size."""
        if _told_frames(denoiser):
            numbers = {name: self._frames(negative=name == "uncond") for name in conditions}
        elif getattr(unwrap(denoiser), "use_additional_conditions", False):
            numbers = dict.fromkeys(conditions, (self.height, self.width))
        else:
            return conditions
        return {name: replace(condition, size=self._rows(numbers[name], condition)) for name, condition in conditions.items()}

    def _frames(self, negative: bool) -> tuple[int, ...]:
        picture = (self.height, self.width)
        own = negative and self.negative_original_size is not None and self.negative_target_size is not None
        original, crop, target = (getattr(self, f"negative_{name}" if own else name) for name in _SIZES)
        return (*(original or picture), *(crop or (0, 0)), *(target or picture))

    @staticmethod
    def _rows(numbers: tuple[Any, ...], condition: TextCondition) -> torch.Tensor:
        return torch.tensor([numbers], device=condition.embeds.device, dtype=torch.float32).expand(len(condition), -1)


def _told_frames(denoiser: nn.Module) -> bool:
    return is_a(denoiser, "UNet2DConditionModel") and unwrap(denoiser).config.get("addition_embed_type") == "text_time"
