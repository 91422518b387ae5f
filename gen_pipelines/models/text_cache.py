"""What depends only on the captions, computed once per call instead of once per step: text keys and values, caption projection, masks.

Cross-attention projects the same text to the same keys and values at every step of a sampler. Here the attention layers of a denoiser get,
for the duration of a `with` block, a processor that keeps the projections of every caption it has seen. The numbers are the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .calling import Condition, TextCondition


def _same(seen: Tensor, text: Tensor) -> bool:
    """Whether two tensors are the same memory; `seen` is alive, so its memory cannot have been given to another tensor."""
    return seen.data_ptr() == text.data_ptr() and seen.shape == text.shape and seen.stride() == text.stride() and seen.dtype == text.dtype


class _Memo(nn.Module):
    """A module that remembers its answers. A view of an answer is recognised too, because it is the same memory."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.answers: list[tuple[Tensor, Tensor]] = []

    def forward(self, text: Tensor) -> Tensor:
        for seen, answer in self.answers:
            if _same(seen, text):
                return answer
        self.answers.append((text, self.module(text)))
        return self.answers[-1][1]


class CachedAttnProcessor:
    """Scaled dot-product attention that projects a text to keys and values the first time it sees it.

    One object serves one attention layer. A text is recognised by its memory, so whoever changes a text in place must start anew.
    What is held is one key and one value per layer and distinct text.
    """

    def __init__(self) -> None:
        self._texts: list[tuple[Tensor, Tensor, Tensor]] = []  # (text, key, value)

    def __call__(
        self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        x, text = hidden_states, encoder_hidden_states
        query = self._heads(attn, attn.to_q(x))  # (B, heads, N, D / heads)
        if text is None:
            key, value = self._heads(attn, attn.to_k(x)), self._heads(attn, attn.to_v(x))
        else:
            key, value = self._text_key_value(attn, text)  # (B, heads, L, D / heads)
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attention_mask is not None:  # (B, 1, L), a bias
            attention_mask = attention_mask.unsqueeze(1)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)  # (B, heads, N, D / heads)
        out = attn.to_out[0](out.transpose(1, 2).flatten(2))  # (B, N, D)
        return out if attn.rescale_output_factor == 1.0 else out / attn.rescale_output_factor

    @staticmethod
    def _heads(attn: nn.Module, x: Tensor) -> Tensor:
        return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

    def _text_key_value(self, attn: nn.Module, text: Tensor) -> tuple[Tensor, Tensor]:
        for seen, key, value in self._texts:
            if _same(seen, text):
                return key, value
        normed = attn.norm_encoder_hidden_states(text) if attn.norm_cross else text
        key, value = self._heads(attn, attn.to_k(normed)), self._heads(attn, attn.to_v(normed))
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        self._texts.append((text, key, value))
        return key, value


class TextCache:
    """What a `with cached_text(...)` block is given: `prepare(condition)` returns the condition to call the network with."""

    def __init__(self, dtype: torch.dtype | None = None, masked: bool = False, trim: bool = True) -> None:
        self._dtype, self._masked, self._trim = dtype, masked, trim

    def prepare(self, condition: Condition | None) -> Condition | None:
        """The same condition in the network's dtype and with its mask as the bias that attention adds. Call it once, outside the loop."""
        if not isinstance(condition, TextCondition):
            return condition
        if self._dtype is not None:
            condition = condition.to(dtype=self._dtype)
        if not self._masked or condition.mask is None or condition.mask.ndim != 2:
            return condition
        length = condition.mask.shape[1]
        if self._trim and len(used := condition.mask.any(dim=0).nonzero()):
            # a column that is padding for every caption has weight exp(-10000) = 0 in every softmax: it is left out
            length = int(used.max()) + 1
        embeds, mask = condition.embeds[:, :length].contiguous(), condition.mask[:, :length]
        bias = (1 - mask.to(embeds.dtype)) * -10000.0  # (B, L), diffusers' values
        return replace(condition, embeds=embeds, mask=bias.unsqueeze(1))  # (B, 1, L), its form of a ready bias


def _cacheable(attn: Any) -> bool:
    """Layers whose processor is the stock one and that do nothing which `CachedAttnProcessor` does not do."""
    return (
        type(attn.processor).__name__ == "AttnProcessor2_0"
        and attn.spatial_norm is None
        and attn.group_norm is None
        and not attn.residual_connection
        and attn.to_out is not None
        and (not attn.to_out[1].training or attn.to_out[1].p == 0.0)
    )


@contextmanager
def cached_text(denoiser: nn.Module, trim: bool = True) -> Iterator[TextCache]:
    """Within the block the denoiser keeps what depends only on its captions; afterwards it is as before, whatever happened.

    For inference (`UNet2DConditionModel`, `PixArtTransformer2DModel`); every other network, a compiled one, and layers with a processor of
    their own (IP-Adapter, xformers, ...) are left as they are. Within the block a denoiser serves one thread.

    Args:
        denoiser: the network; its attention processors, and PixArt's caption projection, are replaced and restored.
        trim: where the network takes a mask, leave out the columns that are padding for every caption of the batch. The sums are the same
            up to the rounding of another order (1e-6); without it the results are the same bits.
    Yields: a `TextCache`, whose `prepare(condition)` must be applied to each condition once.
    """
    from diffusers.models.attention_processor import Attention

    names = {cls.__name__ for cls in type(denoiser).__mro__}
    parameter = next(denoiser.parameters(), None)
    dtype = parameter.dtype if parameter is not None and parameter.dtype.is_floating_point else None
    if not names & {"UNet2DConditionModel", "PixArtTransformer2DModel"}:
        yield TextCache(dtype)
        return
    layers = [m for m in denoiser.modules() if isinstance(m, Attention) and _cacheable(m)]
    before = [layer.processor for layer in layers]
    is_pixart = "PixArtTransformer2DModel" in names
    projection = denoiser.caption_projection if is_pixart else None
    try:
        for layer in layers:
            layer.processor = CachedAttnProcessor()
        if projection is not None:
            denoiser.caption_projection = _Memo(projection)
        yield TextCache(dtype, masked=is_pixart, trim=trim)
    finally:
        for layer, processor in zip(layers, before, strict=True):
            layer.processor = processor
        if projection is not None:
            denoiser.caption_projection = projection
