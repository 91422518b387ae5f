"""PixelSNAIL as prior over codes: blocks of causal residual convolutions, each followed by attention to all that came before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from .autoregressive import AutoregressivePrior

__all__ = ["ConfigMixin", "ModelMixin", "PixelSNAILPrior"]


class _CausalConv(nn.Module):
    """A k x k convolution over what is above a position and to the left of it, never the position itself; the masks are in the padding."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.kernel_size, self.reach = kernel_size, kernel_size // 2
        self.above = nn.Conv2d(in_channels, out_channels, (kernel_size - 1, kernel_size))
        self.left = nn.Conv2d(in_channels, out_channels, (1, self.reach), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, D, h, w)."""
        above = self.above(F.pad(x[:, :, :-1], (self.reach, self.reach, self.kernel_size - 1, 0)))
        return above + self.left(F.pad(x[:, :, :, :-1], (self.reach, 0)))


class _Pointwise(nn.Conv2d):
    """A convolution whose output has the size of its input."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)


class _Gated(nn.Module):
    """x + glu(conv(elu(conv(elu(x)) + aux)) + condition), the identity at the start. Chen et al. 2018, figure 3.

    Args:
        channels, hidden_channels: outside and inside.
        kernel_size: of both convolutions, odd.
        causal: `_CausalConv` in place of a plain one.
        auxiliary_channels, condition_channels: of two further inputs; 0 for none.
    """

    def __init__(
        self,
        channels: int,
        hidden_channels: int,
        kernel_size: int,
        dropout: float,
        causal: bool = False,
        auxiliary_channels: int = 0,
        condition_channels: int = 0,
    ) -> None:
        super().__init__()
        conv = _CausalConv if causal else _Pointwise
        self.dropout = dropout
        self.conv_in = conv(channels, hidden_channels, kernel_size)
        self.auxiliary = nn.Conv2d(auxiliary_channels, hidden_channels, 1) if auxiliary_channels else None
        self.conv_out = conv(hidden_channels, 2 * channels, kernel_size)
        self.condition = nn.Conv2d(condition_channels, 2 * channels, 1, bias=False) if condition_channels else None
        for parameter in self.conv_out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, auxiliary: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        """(B, C, h, w) to the same shape."""
        return self.finish(x, self.conv_out(self.middle(self.conv_in(F.elu(x)), auxiliary)), condition)

    def middle(self, h: Tensor, auxiliary: Tensor | None = None) -> Tensor:
        """Between the two convolutions."""
        if auxiliary is not None:
            h = h + self.auxiliary(F.elu(auxiliary))
        return F.dropout(F.elu(h), self.dropout, self.training)

    def finish(self, x: Tensor, h: Tensor, condition: Tensor | None) -> Tensor:
        """After them."""
        return x + F.glu(h if condition is None else h + self.condition(condition), 1)


class _Attention(nn.Module):
    """Every position attends to those before it, never to itself; the first one gets zeros."""

    def __init__(self, query_channels: int, key_channels: int, channels: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.to_q = nn.Linear(query_channels, channels)
        self.to_k, self.to_v = nn.Linear(key_channels, channels), nn.Linear(key_channels, channels)

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        """(B, C_q, h, w) and (B, C_k, h, w) to (B, channels, h, w)."""
        q = self._split(self.to_q, query)
        k, v = self._split(self.to_k, key), self._split(self.to_v, key)                                # (B, heads, T, channels / heads)
        count = q.shape[2]
        before = torch.ones(count, count, dtype=torch.bool, device=q.device).tril(-1)
        before[0, 0] = True  # so that its softmax is one of something; it is set to zero below
        mixed = F.scaled_dot_product_attention(q, k, v, before, self.dropout if self.training else 0.0)
        mixed = torch.cat([torch.zeros_like(mixed[:, :, :1]), mixed[:, :, 1:]], 2)
        return mixed.transpose(2, 3).flatten(1, 2).unflatten(2, query.shape[2:])

    def at(self, query: Tensor, key: Tensor, keys: Tensor, values: Tensor, place: int) -> Tensor:
        """One position, (B, C, 1, 1) each; its key and value are put into the cache, (B, heads, T, channels / heads) each."""
        keys[:, :, place], values[:, :, place] = self._split(self.to_k, key)[:, :, 0], self._split(self.to_v, key)[:, :, 0]
        q = self._split(self.to_q, query)                                                              # (B, heads, 1, channels / heads)
        mixed = F.scaled_dot_product_attention(q, keys[:, :, :place], values[:, :, :place]) if place else torch.zeros_like(q)
        return mixed.transpose(2, 3).flatten(1, 2).unsqueeze(3)

    def _split(self, to: nn.Linear, x: Tensor) -> Tensor:
        return to(x.flatten(2).transpose(1, 2)).unflatten(2, (self.heads, -1)).transpose(1, 2)


class _Block(nn.Module):
    """Causal residual layers, then attention with what came in, what came out and the coordinates; or a 1 x 1 convolution for it."""

    def __init__(
        self, width: int, residual: int, kernel_size: int, depth: int, attention: bool, heads: int, dropout: float, condition: int
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            _Gated(width, residual, kernel_size, dropout, causal=True, condition_channels=condition) for _ in range(depth)
        )
        if attention:
            self.key, self.query = _Gated(2 * width + 2, width, 1, dropout), _Gated(width + 2, width, 1, dropout)
            self.attention = _Attention(width + 2, 2 * width + 2, width // 2, heads, dropout)
            self.mix = _Gated(width, width, 1, dropout, auxiliary_channels=width // 2)
        else:
            self.attention = None
            self.mix = nn.Conv2d(width + 2, width, 1)

    def forward(self, x: Tensor, place: Tensor, condition: Tensor | None) -> Tensor:
        """x: (B, D, h, w), place: (B, 2, h, w)."""
        out = x
        for layer in self.layers:
            out = layer(out, condition=condition)
        if self.attention is None:
            return self.mix(torch.cat([out, place], 1))
        key, query = self.key(torch.cat([x, out, place], 1)), self.query(torch.cat([out, place], 1))
        return self.mix(out, self.attention(query, key))


class _Above(nn.Module):
    """Features of the codes of a level above."""

    def __init__(self, num_codes: int, channels: int, depth: int, dropout: float) -> None:
        super().__init__()
        self.first = _Pointwise(num_codes, channels, 3)
        self.layers = nn.ModuleList(_Gated(channels, channels, 3, dropout) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """(B, K, h, w) to (B, channels, h, w)."""
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x


@dataclass
class _Cache:
    """Rows that convolutions still look at, the present one last, with columns of zeros around: (B, channels, kernel size, w + 2 reach)."""

    codes: Tensor
    into: list[Tensor]  # of the first convolution of every causal layer
    between: list[Tensor]  # of the second
    above: list[tuple[Tensor, Tensor]]  # what they say of the rows above, for the whole present row
    row: Tensor  # the same of the very first convolution
    keys: list[Tensor]
    values: list[Tensor]
    given: Tensor | None
    label: Tensor | None


class PixelSNAILPrior(AutoregressivePrior):
    """Causal convolutions for what is near and attention for what is far, in turns.

    Args:
        num_codes: K, on this level and those above.
        shape: height and width of the codes.
        num_classes: for a class-conditional prior.
        condition_shapes: of the levels above, from the top down, each dividing `shape`.
        width, residual_channels: D, and channels inside the residual layers.
        kernel_size: odd, from 5 on, or 3 with attention: two convolutions of 3 step over every second code to the left.
        num_blocks, layers_per_block: blocks, and causal layers in each.
        attention, num_heads: attend at the end of each block; large maps of lower levels do without.
        out_layers: pointwise residual layers after the last block.
        condition_channels, condition_layers: of the network over the codes of a level above.
        dropout: in training.

    References: Chen et al. 2018, section 2 and figures 2 and 3, https://arxiv.org/abs/1712.09763; Razavi et al. 2019, section 3.2,
    https://arxiv.org/abs/1906.00446 (over codes, with those above as the condition)
    """

    @register_to_config
    def __init__(
        self,
        num_codes: int,
        shape: Sequence[int],
        num_classes: int | None = None,
        condition_shapes: Sequence[Sequence[int]] = (),
        width: int = 256,
        residual_channels: int = 256,
        kernel_size: int = 5,
        num_blocks: int = 4,
        layers_per_block: int = 4,
        attention: bool = True,
        num_heads: int = 8,
        out_layers: int = 0,
        condition_channels: int = 256,
        condition_layers: int = 3,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if kernel_size < (3 if attention else 5) or kernel_size % 2 == 0:
            raise ValueError(f"PixelSNAILPrior: kernel_size {kernel_size} is not allowed; give an odd number from 5 on (3 with attention).")
        if attention and (width % 2 or (width // 2) % num_heads):
            raise ValueError(f"PixelSNAILPrior: half of width {width} is not a multiple of num_heads {num_heads}.")
        for above in condition_shapes:
            if shape[0] % above[0] or shape[1] % above[1]:
                raise ValueError(f"PixelSNAILPrior: over codes of {tuple(shape)}; the level above, {tuple(above)}, does not divide it.")
        reach = kernel_size // 2
        self.above = nn.Conv2d(num_codes, width, (reach, kernel_size))
        self.left = nn.Conv2d(num_codes, width, (reach + 1, reach))
        self.of_class = nn.Embedding(num_classes + 1, width) if num_classes is not None else None
        self.of_codes = nn.ModuleList(_Above(num_codes, condition_channels, condition_layers, dropout) for _ in condition_shapes)
        given = condition_channels if condition_shapes else 0
        self.blocks = nn.ModuleList(
            _Block(width, residual_channels, kernel_size, layers_per_block, attention, num_heads, dropout, given)
            for _ in range(num_blocks)
        )
        self.out = nn.ModuleList(_Gated(width, residual_channels, 1, dropout) for _ in range(out_layers))
        self.head = nn.Conv2d(width, num_codes, 1)

    def forward(self, codes: Tensor, labels: Tensor | None = None, condition: Sequence[Tensor] = ()) -> Tensor:
        """Logits (B, K, h, w) of codes (B, h, w): see `AutoregressivePrior`."""
        self._check(len(codes), labels, condition)
        x, reach = self._one_hot(codes), self.config.kernel_size // 2                                  # (B, K, h, w)
        # what is said of a position is moved to the next one, down or to the right; the first row and column hear nothing
        above = self.above(F.pad(x[:, :, :-1], (reach, reach, reach - 1, 0)))
        left = self.left(F.pad(x[:, :, :, :-1], (reach - 1, 0, reach, 0)))
        x = F.pad(above, (0, 0, 1, 0)) + F.pad(left, (1, 0))                                           # (B, D, h, w)
        if self.of_class is not None:
            x = x + self._label(len(codes), labels)
        place, given = self._places(x).expand(len(x), -1, -1, -1), self._condition(condition)
        for block in self.blocks:
            x = block(x, place, given)
        return self._logits(x)

    def start(self, batch_size: int, labels: Tensor | None, condition: Sequence[Tensor]) -> _Cache:
        """Room for the rows that are looked at, and for keys and values."""
        self._check(batch_size, labels, condition)
        c, layers = self.config, [layer for block in self.blocks for layer in block.layers]
        weight = self.head.weight
        room = lambda *shape: weight.new_zeros(batch_size, *shape)
        window = (c.kernel_size, c.shape[1] + c.kernel_size - 1)
        head = (c.num_heads, c.shape[0] * c.shape[1], c.width // 2 // c.num_heads)
        attentions = [block for block in self.blocks if block.attention is not None]
        return _Cache(
            codes=room(c.num_codes, *window),
            into=[room(c.width, *window) for _ in layers],
            between=[room(c.residual_channels, *window) for _ in layers],
            above=[(weight, weight) for _ in layers],
            row=weight,
            keys=[room(*head) for _ in attentions],
            values=[room(*head) for _ in attentions],
            given=self._condition(condition),
            label=None if self.of_class is None else self._label(batch_size, labels),
        )

    def next_logits(self, cache: _Cache, codes: Tensor, row: int, column: int) -> Tensor:
        """Logits (B, K) at one position. What is said of the rows above is computed once a row, for all its positions."""
        reach = self.config.kernel_size // 2
        if column == 0:
            self._next_row(cache, codes, row)
        else:
            cache.codes[:, :, -1, column - 1 + reach] = self._one_hot(codes[:, row, column - 1, None, None])[:, :, 0, 0]
        x = cache.row[:, :, :, column : column + 1]                                                    # (B, D, 1, 1)
        if column > 0:
            x = x + self.left(cache.codes[:, :, -reach - 1 :, column : column + reach])
        if cache.label is not None:
            x = x + cache.label
        place = self._places(x)[:, :, row : row + 1, column : column + 1].expand(len(x), -1, -1, -1)
        given = None if cache.given is None else cache.given[:, :, row : row + 1, column : column + 1]
        number, attentions = 0, 0
        for block in self.blocks:
            out = x
            for layer in block.layers:
                out = self._layer_at(layer, cache, number, out, column, given)
                number += 1
            if block.attention is None:
                x = block.mix(torch.cat([out, place], 1))
                continue
            key, query = block.key(torch.cat([x, out, place], 1)), block.query(torch.cat([out, place], 1))
            keys, values = cache.keys[attentions], cache.values[attentions]
            x = block.mix(out, block.attention.at(query, key, keys, values, row * self.config.shape[1] + column))
            attentions += 1
        return self._logits(x)[:, :, 0, 0]

    def _layer_at(self, layer: _Gated, cache: _Cache, number: int, x: Tensor, column: int, given: Tensor | None) -> Tensor:
        reach = self.config.kernel_size // 2
        seen = slice(column, column + reach)
        above_in, above_out = (said[:, :, :, column : column + 1] for said in cache.above[number])
        into, between = cache.into[number], cache.between[number]
        into[:, :, -1, column + reach] = F.elu(x)[:, :, 0, 0]
        h = layer.middle(above_in + layer.conv_in.left(into[:, :, -1:, seen]))
        between[:, :, -1, column + reach] = h[:, :, 0, 0]
        return layer.finish(x, above_out + layer.conv_out.left(between[:, :, -1:, seen]), given)

    def _next_row(self, cache: _Cache, codes: Tensor, row: int) -> None:
        reach, width = self.config.kernel_size // 2, self.config.shape[1]
        if row > 0:
            cache.codes[:, :, -1, reach + width - 1] = self._one_hot(codes[:, row - 1, -1:, None])[:, :, 0, 0]
        for rows in (cache.codes, *cache.into, *cache.between):
            rows[:, :, :-1] = rows[:, :, 1:].clone()
            rows[:, :, -1] = 0
        cache.row = self.above(cache.codes[:, :, -1 - reach : -1])                                     # (B, D, 1, w)
        if row == 0:
            cache.row = torch.zeros_like(cache.row)
        layers = [layer for block in self.blocks for layer in block.layers]
        for number, layer in enumerate(layers):
            into, between = cache.into[number][:, :, :-1], cache.between[number][:, :, :-1]
            cache.above[number] = layer.conv_in.above(into), layer.conv_out.above(between)             # (B, D, 1, w) each

    def _one_hot(self, codes: Tensor) -> Tensor:
        """(B, h, w) to (B, K, h, w)."""
        return F.one_hot(codes, self.config.num_codes).permute(0, 3, 1, 2).to(self.head.weight.dtype)

    def _label(self, batch_size: int, labels: Tensor | None) -> Tensor:
        if labels is None:
            labels = torch.full((batch_size,), self.of_class.num_embeddings - 1, device=self.head.weight.device)
        return self.of_class(labels)[:, :, None, None]

    def _places(self, like: Tensor) -> Tensor:
        """Row and column of every position, from -1/2 to 1/2, (1, 2, h, w)."""
        axes = [torch.arange(n, device=like.device, dtype=like.dtype) / n - 0.5 for n in self.config.shape]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]

    def _condition(self, condition: Sequence[Tensor]) -> Tensor | None:
        """What the codes of the levels above say at each position, (B, condition_channels, h, w)."""
        if not self.of_codes:
            return None
        shape = self.config.shape
        maps = [net(self._one_hot(codes)) for net, codes in zip(self.of_codes, condition, strict=True)]
        grown = [m.repeat_interleave(shape[0] // m.shape[2], 2).repeat_interleave(shape[1] // m.shape[3], 3) for m in maps]
        return torch.stack(grown).sum(0)

    def _logits(self, x: Tensor) -> Tensor:
        for layer in self.out:
            x = layer(x)
        return self.head(F.elu(x))
