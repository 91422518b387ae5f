"""Two CLIP encoders and T5 in one sequence: Stable Diffusion 3."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.calling import TextCondition, clip_layers, tokenize
from .two_clips import clip_features


@dataclass(frozen=True)
class TwoClipsAndT5:
    """CLIP's features side by side, padded with zeros to T5's width and followed by T5's; both pooled vectors, one behind the other.

    T5 may be absent, as the network was trained without it now and then: zeros take its place.

    Args:
        first, second, third: (tokenizer, encoder) of the two CLIPs and of T5.
        width: of a token, which is T5's.
        max_tokens: of a caption in T5.

    References: Esser et al. 2024, section 4 and appendix B.3, https://arxiv.org/abs/2403.03206
    """

    first: tuple[Any, nn.Module | None]
    second: tuple[Any, nn.Module | None]
    third: tuple[Any, nn.Module | None]
    width: int
    max_tokens: int = 256
    pooled: bool = True
    takes_length: bool = True
    encoders: int = 3

    def missing(self) -> list[str]:
        return [name for name, pair in (("text_encoder", self.first), ("text_encoder_2", self.second)) if pair[1] is None]

    def clip_layers(self) -> int | None:
        counts = [clip_layers(encoder) for _, encoder in (self.first, self.second)]
        return min((layers for layers in counts if layers is not None), default=None)

    def encode(
        self, texts: Sequence[tuple[str, ...]], device: torch.device, clip_skip: int | None = None, max_length: int | None = None
    ) -> TextCondition:
        one, two, three = zip(*texts, strict=True)
        features_1, pooled_1 = clip_features(*self.first, one, device, clip_skip)
        features_2, pooled_2 = clip_features(*self.second, two, device, clip_skip)
        clip = torch.cat([features_1, features_2], dim=-1)  # (B, L, D_1 + D_2)
        t5 = self._t5(three, max_length or self.max_tokens, clip)  # (B, L', D)
        embeds = torch.cat([F.pad(clip, (0, self.width - clip.shape[-1])), t5], dim=1)  # (B, L + L', D)
        return TextCondition(embeds, pooled=torch.cat([pooled_1, pooled_2], dim=-1))

    def _t5(self, captions: Sequence[str], length: int, like: Tensor) -> Tensor:
        if self.third[1] is None:
            return like.new_zeros(len(captions), length, self.width)
        return t5_features(*self.third, captions, like.device, length)


def t5_features(tokenizer: Any, text_encoder: nn.Module, captions: Sequence[str], device: torch.device, length: int) -> Tensor:
    """T5's last layer, (B, length, D), its padding not masked: so Stable Diffusion 3 and Flux were trained."""
    return text_encoder(tokenize(tokenizer, text_encoder, captions, length).input_ids.to(device)).last_hidden_state
