"""Two CLIP encoders side by side: Stable Diffusion XL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...models.calling import TextCondition, clip_layers, tokenize


@dataclass(frozen=True)
class TwoClips:
    """Features of the layer before the last of both encoders, one behind the other; the pooled vector is the second's projection.

    One of the two may be absent (the refiner has the second only).

    References: Podell et al. 2023, section 2.1, https://arxiv.org/abs/2307.01952
    """

    first: tuple[Any, nn.Module | None]
    second: tuple[Any, nn.Module | None]
    pooled: bool = True
    takes_length: bool = False

    @property
    def _pairs(self) -> list[tuple[Any, nn.Module]]:
        return [(tokenizer, encoder) for tokenizer, encoder in (self.first, self.second) if encoder is not None]

    @property
    def encoders(self) -> int:
        return len(self._pairs) or 2

    def missing(self) -> list[str]:
        return ["text_encoder_2"] if self.second[1] is None else []

    def clip_layers(self) -> int | None:
        return min((layers for _, encoder in self._pairs if (layers := clip_layers(encoder)) is not None), default=None)

    def encode(
        self, texts: Sequence[tuple[str, ...]], device: torch.device, clip_skip: int | None = None, max_length: int | None = None
    ) -> TextCondition:
        towers = [
            clip_features(*pair, column, device, clip_skip) for pair, column in zip(self._pairs, zip(*texts, strict=True), strict=True)
        ]
        return TextCondition(torch.cat([features for features, _ in towers], dim=-1), pooled=towers[-1][1])  # (B, L, D_1 + D_2), (B, P)


def clip_features(
    tokenizer: Any, text_encoder: nn.Module, captions: Sequence[str], device: torch.device, clip_skip: int | None = None
) -> tuple[Tensor, Tensor]:
    """What the layer before a CLIP encoder's last says, without the last normalisation, (B, L, D), and its pooled vector, (B, P)."""
    tokens = tokenize(tokenizer, text_encoder, captions)
    output = text_encoder(tokens.input_ids.to(device), output_hidden_states=True)
    pooled = getattr(output, "text_embeds", None)
    return output.hidden_states[-(2 + (clip_skip or 0))], output.pooler_output if pooled is None else pooled
