"""CLIP for the pooled vector, T5 for the tokens: Flux."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...models.calling import TextCondition, tokenize
from .two_clips_and_t5 import t5_features


@dataclass(frozen=True)
class ClipAndT5:
    """T5's tokens and CLIP's pooled vector.

    Args:
        first, second: (tokenizer, encoder) of CLIP and of T5.
        max_tokens: of a caption in T5.
    """

    first: tuple[Any, nn.Module | None]
    second: tuple[Any, nn.Module | None]
    max_tokens: int = 512
    pooled: bool = True
    takes_length: bool = True
    encoders: int = 2

    def missing(self) -> list[str]:
        return [name for name, pair in (("text_encoder", self.first), ("text_encoder_2", self.second)) if pair[1] is None]

    def clip_layers(self) -> int | None:
        return None  # of CLIP only the pooled vector is read

    def encode(
        self, texts: Sequence[tuple[str, ...]], device: torch.device, clip_skip: int | None = None, max_length: int | None = None
    ) -> TextCondition:
        one, two = zip(*texts, strict=True)
        tokenizer, clip = self.first
        pooled = clip(tokenize(tokenizer, clip, one).input_ids.to(device)).pooler_output  # (B, P)
        return TextCondition(t5_features(*self.second, two, device, max_length or self.max_tokens), pooled=pooled)
