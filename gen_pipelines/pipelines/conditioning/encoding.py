"""Which text encoders a network was trained with: one small class per family, chosen by the class of the denoiser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from ...models.calling import TextCondition, is_a, unwrap
from .clip_and_t5 import ClipAndT5
from .one_encoder import OneEncoder
from .two_clips import TwoClips
from .two_clips_and_t5 import TwoClipsAndT5


class TextEncoding(Protocol):
    """How the captions of one family become a condition.

    Attributes:
        encoders: how many captions a picture may have, one per text encoder (`prompt`, `prompt_2`, `prompt_3`).
        pooled: whether the network is told a pooled vector too, so that given embeddings need one beside them.
        takes_length: whether the number of tokens of a caption may be chosen (T5).
    """

    encoders: int
    pooled: bool
    takes_length: bool

    def missing(self) -> list[str]:
        """Names of the components that captions need and that are not there."""
        ...

    def clip_layers(self) -> int | None:
        """Layers of the CLIP encoder that `clip_skip` counts in; None where there is none."""
        ...

    def encode(
        self, texts: Sequence[tuple[str, ...]], device: torch.device, clip_skip: int | None = None, max_length: int | None = None
    ) -> TextCondition:
        """The condition of B captions, each given once per text encoder."""
        ...


def text_encoding(pipe: Any) -> TextEncoding:
    """The encoding for a pipeline's denoiser. One encoder alone, of the width that the network takes, serves any family."""
    denoiser = unwrap(pipe.denoiser)
    config = denoiser.config
    is_xl = is_a(denoiser, "UNet2DConditionModel") and config.get("addition_embed_type") == "text_time"
    is_sd3, is_flux = is_a(denoiser, "SD3Transformer2DModel"), is_a(denoiser, "FluxTransformer2DModel")
    pooled = is_xl or is_sd3 or is_flux
    alone = pipe.text_encoder is not None and pipe.text_encoder_2 is None and pipe.text_encoder_3 is None
    wanted = config.get("joint_attention_dim") or config.get("cross_attention_dim")
    if not pooled or (alone and getattr(pipe.text_encoder.config, "hidden_size", None) == wanted):
        max_tokens = pipe.config.get("max_text_tokens")
        return OneEncoder(pipe.tokenizer, pipe.text_encoder, max_tokens, pipe.config.get("lower_case_captions", False), pooled)
    first, second = (pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)
    if is_xl:
        return TwoClips(first, second)
    if is_flux:
        return ClipAndT5(first, second, pipe.config.get("max_text_tokens") or 512)
    third = (pipe.tokenizer_3, pipe.text_encoder_3)
    return TwoClipsAndT5(first, second, third, config.joint_attention_dim, pipe.config.get("max_text_tokens") or 256)
