"""A PixelCNN with attention as prior over codes: two stacks of masked convolutions, and a cache in sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from .autoregressive import AutoregressivePrior, CodeCondition

__all__ = ["ConfigMixin", "ModelMixin", "PixelCNNPrior"]


def _gate(x: Tensor) -> Tensor:
    """tanh(a) sigmoid(b) of the two halves of the channels. van den Oord et al. 2016, eq. 2."""
    a, b = x.chunk(2, dim=1)
    return torch.tanh(a) * torch.sigmoid(b)


class _Layer(nn.Module):
    """One gated layer of both stacks. The masks are in the padding: a convolution over what is above, one over what is to the left."""

    def __init__(self, width: int, kernel_size: int) -> None:
        super().__init__()
        self.reach = kernel_size // 2
        self.vertical = nn.Conv2d(width, 2 * width, (self.reach + 1, kernel_size))
        self.horizontal = nn.Conv2d(width, 2 * width, (1, self.reach + 1))
        self.link = nn.Conv2d(2 * width, 2 * width, 1)
        self.out = nn.Conv2d(width, width, 1)
        self.given = nn.Conv2d(width, 4 * width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, above: Tensor, left: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D, h, w) of both stacks and of the condition to both stacks."""
        for_above, for_left = self.given(condition).chunk(2, dim=1)                                    # (B, 2 D, h, w)
        seen = self.vertical(F.pad(above, (self.reach, self.reach, self.reach, 0)))                    # rows up to this one
        left = left + self.out(_gate(self.horizontal(F.pad(left, (self.reach, 0, 0, 0))) + self.link(seen) + for_left))
        return above + _gate(seen + for_above), left


class _Attention(nn.Module):
    """Every position attends to itself and those before it, which hold nothing of the code at the position."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.to_qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, keys: Tensor | None = None, values: Tensor | None = None, place: int = 0) -> Tensor:
        """x: (B, T, D), all positions; or with a cache, (B, heads, T, D / heads) each, the one at `place`."""
        q, k, v = self.to_qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if keys is None:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            keys[:, :, place], values[:, :, place] = k[:, :, 0], v[:, :, 0]
            mixed = F.scaled_dot_product_attention(q, keys[:, :, : place + 1], values[:, :, : place + 1])
        return x + self.out(mixed.transpose(1, 2).flatten(2))


@dataclass
class _Cache:
    above: list[Tensor]  # input of every layer's vertical stack, (B, D, h, w)
    left: list[Tensor]  # of the horizontal one
    seen: list[Tensor]  # what the vertical stack says of the present row, (B, 2 D, 1, w)
    given: list[tuple[Tensor, Tensor]]
    keys: list[Tensor]
    values: list[Tensor]


class PixelCNNPrior(AutoregressivePrior):
    """Gated masked convolutions over what is above and to the left, with causal attention in between.

    Args:
        num_codes: K, on this level and those above.
        shape: height and width of the codes.
        num_classes: for a class-conditional prior.
        condition_shapes: of the levels above, from the top down.
        width, num_layers, kernel_size: D, gated layers, and the (odd) size of their kernels before masking.
        attention_every: an attention layer after every so many gated ones; 0 for none.
        num_heads: of the attention.

    References: van den Oord et al. 2016, "Conditional Image Generation with PixelCNN Decoders", section 2, https://arxiv.org/abs/1606.05328;
    Chen et al. 2018, https://arxiv.org/abs/1712.09763 (attention); Ramachandran et al. 2017, https://arxiv.org/abs/1704.06001 (cache)
    """

    @register_to_config
    def __init__(
        self,
        num_codes: int,
        shape: Sequence[int],
        num_classes: int | None = None,
        condition_shapes: Sequence[Sequence[int]] = (),
        width: int = 64,
        num_layers: int = 6,
        kernel_size: int = 3,
        attention_every: int = 3,
        num_heads: int = 4,
    ) -> None:
        super().__init__()
        if kernel_size < 3 or kernel_size % 2 == 0:
            raise ValueError(f"PixelCNNPrior: kernel_size {kernel_size} is not allowed; give an odd number from 3 on.")
        if attention_every and width % num_heads:
            raise ValueError(f"PixelCNNPrior: width {width} is not a multiple of num_heads {num_heads}.")
        self.embed = nn.Embedding(num_codes, width)
        self.position = nn.Parameter(0.02 * torch.randn(1, width, *shape))
        self.condition = CodeCondition(width, num_codes, shape, num_classes, condition_shapes)
        self.layers = nn.ModuleList([_Layer(width, kernel_size) for _ in range(num_layers)])
        with_attention = [attention_every and (i + 1) % attention_every == 0 for i in range(num_layers)]
        self.attentions = nn.ModuleList([_Attention(width, num_heads) if has else nn.Identity() for has in with_attention])
        self.head = nn.Sequential(nn.ReLU(), nn.Conv2d(width, 2 * width, 1), nn.ReLU(), nn.Conv2d(2 * width, num_codes, 1))

    def forward(self, codes: Tensor, labels: Tensor | None = None, condition: Sequence[Tensor] = ()) -> Tensor:
        """Logits (B, K, h, w) of codes (B, h, w): see `AutoregressivePrior`."""
        self._check(len(codes), labels, condition)
        given = self.condition(len(codes), labels, condition, self.position) + self.position                          # (B, D, h, w)
        x = self.embed(codes).permute(0, 3, 1, 2)                                                      # (B, D, h, w)
        above, left = F.pad(x[:, :, :-1], (0, 0, 1, 0)), F.pad(x[:, :, :, :-1], (1, 0))                # moved by one row, by one column
        for layer, attention in zip(self.layers, self.attentions, strict=True):
            above, left = layer(above, left, given)
            if isinstance(attention, _Attention):
                left = attention(left.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, left.shape[2:])
        return self.head(left)

    def start(self, batch_size: int, labels: Tensor | None, condition: Sequence[Tensor]) -> _Cache:
        """Room for what every layer is given, and what the condition says to it."""
        self._check(batch_size, labels, condition)
        c, layers = self.config, len(self.layers)
        room = lambda *shape: torch.zeros(batch_size, *shape, device=self.device, dtype=self.dtype)
        given = self.condition(batch_size, labels, condition, self.position) + self.position
        head = (c.num_heads, c.shape[0] * c.shape[1], c.width // c.num_heads)
        return _Cache(
            above=[room(c.width, *c.shape) for _ in range(layers + 1)],
            left=[room(c.width, *c.shape) for _ in range(layers + 1)],
            seen=[room(2 * c.width, 1, c.shape[1]) for _ in range(layers)],
            given=[layer.given(given).chunk(2, dim=1) for layer in self.layers],
            keys=[room(*head) for _ in range(layers)],
            values=[room(*head) for _ in range(layers)],
        )

    def next_logits(self, cache: _Cache, codes: Tensor, row: int, column: int) -> Tensor:
        """Logits (B, K) at one position. The vertical stack moves once a row, the horizontal one by a position."""
        if column == 0:
            self._next_row(cache, codes, row)
        else:
            cache.left[0][:, :, row, column] = self.embed(codes[:, row, column - 1])
        for number, (layer, attention) in enumerate(zip(self.layers, self.attentions, strict=True)):
            first = max(column - layer.reach, 0)
            window = F.pad(cache.left[number][:, :, row : row + 1, first : column + 1], (layer.reach - (column - first), 0))
            seen, given = cache.seen[number][:, :, :, column : column + 1], cache.given[number][1]
            gated = _gate(layer.horizontal(window) + layer.link(seen) + given[:, :, row : row + 1, column : column + 1])
            left = cache.left[number][:, :, row : row + 1, column : column + 1] + layer.out(gated)     # (B, D, 1, 1)
            if isinstance(attention, _Attention):
                place = row * self.config.shape[1] + column
                mixed = attention(left.flatten(2).transpose(1, 2), cache.keys[number], cache.values[number], place)
                left = mixed.transpose(1, 2).unsqueeze(3)
            cache.left[number + 1][:, :, row, column] = left[:, :, 0, 0]
        return self.head(left)[:, :, 0, 0]

    def _next_row(self, cache: _Cache, codes: Tensor, row: int) -> None:
        if row > 0:
            cache.above[0][:, :, row] = self.embed(codes[:, row - 1]).transpose(1, 2)
        for number, layer in enumerate(self.layers):
            first = max(row - layer.reach, 0)
            window = cache.above[number][:, :, first : row + 1]
            window = F.pad(window, (layer.reach, layer.reach, layer.reach - (row - first), 0))
            cache.seen[number] = seen = layer.vertical(window)                                         # (B, 2 D, 1, w)
            gated = _gate(seen + cache.given[number][0][:, :, row : row + 1])
            cache.above[number + 1][:, :, row] = cache.above[number][:, :, row] + gated[:, :, 0]
