"""One text encoder: CLIP (Stable Diffusion 1 and 2, latent consistency models), T5 (PixArt), BERT (latent diffusion)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...models.calling import TextCondition, clip_layers, encode_text, is_clip


@dataclass(frozen=True)
class OneEncoder:
    """The last layer of one text encoder, its mask, and its pooled vector where it has one.

    Args:
        tokenizer, text_encoder: of one kind; None where captions come as embeddings.
        max_tokens: tokens per caption where the tokenizer does not say (T5).
        lower_case: PixArt's captions were trimmed and in lower case.
        pooled: whether the network is told a pooled vector.
    """

    tokenizer: Any
    text_encoder: nn.Module | None
    max_tokens: int | None = None
    lower_case: bool = False
    pooled: bool = False
    encoders: int = 1

    @property
    def takes_length(self) -> bool:
        return self.text_encoder is None or not is_clip(self.text_encoder)

    def missing(self) -> list[str]:
        return [name for name in ("tokenizer", "text_encoder") if getattr(self, name) is None]

    def clip_layers(self) -> int | None:
        return clip_layers(self.text_encoder)

    def encode(
        self, texts: Sequence[tuple[str, ...]], device: torch.device, clip_skip: int | None = None, max_length: int | None = None
    ) -> TextCondition:
        captions = [text.lower().strip() if self.lower_case else text for (text,) in texts]
        return encode_text(self.tokenizer, self.text_encoder, captions, device, max_length or self.max_tokens, clip_skip=clip_skip)
