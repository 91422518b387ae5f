"""A transformer as prior over codes, with keys and values cached in sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from .autoregressive import AutoregressivePrior, CodeCondition

__all__ = ["ConfigMixin", "ModelMixin", "TransformerPrior"]


class _Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); both the identity at the start."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_qkv, self.to_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp_in, self.mlp_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        for last in (self.to_out, self.mlp_out):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, keys: Tensor | None = None, values: Tensor | None = None, place: int = 0) -> Tensor:
        """x: (B, T, D), all positions; or with a cache, (B, heads, T, D / heads) each, the one at `place`."""
        q, k, v = self.to_qkv(self.norm_1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, T, D / heads) each
        if keys is None:
            drop = self.dropout if self.training else 0.0
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=drop)
        else:
            keys[:, :, place], values[:, :, place] = k[:, :, 0], v[:, :, 0]
            mixed = F.scaled_dot_product_attention(q, keys[:, :, : place + 1], values[:, :, : place + 1])
        x = x + F.dropout(self.to_out(mixed.transpose(1, 2).flatten(2)), self.dropout, self.training)  # (B, T, D)
        hidden = F.gelu(self.mlp_in(self.norm_2(x)))                                                   # (B, T, 4 D)
        return x + F.dropout(self.mlp_out(hidden), self.dropout, self.training)


@dataclass
class _Cache:
    keys: list[Tensor]
    values: list[Tensor]
    condition: Tensor


class TransformerPrior(AutoregressivePrior):
    """A causal transformer over the codes of one level in raster order.

    Position i is given the code at i - 1, its own place, the class, and the codes of the levels above at its place.

    Args:
        num_codes: K, on this level and those above.
        shape: height and width of the codes.
        num_classes: for a class-conditional prior.
        condition_shapes: of the levels above, from the top down.
        width, num_layers, num_heads: D, blocks, and heads of attention.
        dropout: in training.

    References: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762; Esser et al. 2021, section 3.2, https://arxiv.org/abs/2012.09841
    (over codes)
    """

    @register_to_config
    def __init__(
        self,
        num_codes: int,
        shape: Sequence[int],
        num_classes: int | None = None,
        condition_shapes: Sequence[Sequence[int]] = (),
        width: int = 128,
        num_layers: int = 4,
        num_heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"TransformerPrior: width {width} is not a multiple of num_heads {num_heads}.")
        self.embed = nn.Embedding(num_codes + 1, width)  # the last stands before the first code
        self.position = nn.Parameter(0.02 * torch.randn(1, shape[0] * shape[1], width))
        self.condition = CodeCondition(width, num_codes, shape, num_classes, condition_shapes)
        self.blocks = nn.ModuleList([_Block(width, num_heads, dropout) for _ in range(num_layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_codes)

    def forward(self, codes: Tensor, labels: Tensor | None = None, condition: Sequence[Tensor] = ()) -> Tensor:
        """Logits (B, K, h, w) of codes (B, h, w): see `AutoregressivePrior`."""
        self._check(len(codes), labels, condition)
        before = F.pad(codes.flatten(1)[:, :-1], (1, 0), value=self.config.num_codes)                  # (B, T)
        given = self.condition(len(codes), labels, condition, self.position).flatten(2).transpose(1, 2)               # (B, T, D)
        x = self.embed(before) + self.position + given                                                 # (B, T, D)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))                                                               # (B, T, K)
        return logits.transpose(1, 2).unflatten(2, tuple(self.config.shape))

    def start(self, batch_size: int, labels: Tensor | None, condition: Sequence[Tensor]) -> _Cache:
        """Room for the keys and values of every position."""
        self._check(batch_size, labels, condition)
        c = self.config
        shape = (batch_size, c.num_heads, c.shape[0] * c.shape[1], c.width // c.num_heads)
        room = [torch.zeros(shape, device=self.device, dtype=self.dtype) for _ in range(2 * len(self.blocks))]
        given = self.condition(batch_size, labels, condition, self.position).flatten(2).transpose(1, 2)
        return _Cache(room[::2], room[1::2], given)

    def next_logits(self, cache: _Cache, codes: Tensor, row: int, column: int) -> Tensor:
        """Logits (B, K) at one position; the keys and values of it are kept."""
        place = row * self.config.shape[1] + column
        before = torch.full_like(codes[:, 0, 0], self.config.num_codes) if place == 0 else codes.flatten(1)[:, place - 1]
        x = (self.embed(before) + self.position[:, place] + cache.condition[:, place])[:, None]        # (B, 1, D)
        for block, keys, values in zip(self.blocks, cache.keys, cache.values, strict=True):
            x = block(x, keys, values, place)
        return self.head(self.norm(x))[:, 0]
