"""The hourglass diffusion transformer: pixels as tokens, merged four by four on the way down, with local attention where they are many."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..base import GenerativeModel
from .base import check_class_labels

__all__ = ["ATTENTION_TYPES", "Blocks", "ConfigMixin", "HDiTModel", "ModelMixin", "attend_in_blocks", "neighborhoods", "shifted_windows"]

ATTENTION_TYPES = ("neighborhood", "shifted-window", "global", "none")
EPS = 1e-6
_LARGEST_BLOCK = 8  # queries along one side that share their keys; a trade of copies against masked work, without effect on the result


# ---------------------------------------------------------------------------------------------------------------------- local attention


class Blocks(NamedTuple):
    """How one side of a picture is dealt out to blocks of queries with the keys that they share.

    Args:
        queries: (n, t) places, each place once.
        keys: (n, r) places.
        allowed: (n, t, r), whether a query looks at a key.
    """

    queries: Tensor
    keys: Tensor
    allowed: Tensor


def neighborhoods(length: int, size: int, device: torch.device | None = None) -> Blocks:
    """Every place looks at the `size` places around it; at the ends the window is shifted to stay inside.

    Args:
        length: of the side, at least `size`.
        size: of the window, odd.
        device: of the result.
    References: Hassani et al. 2023, https://arxiv.org/abs/2204.07143
    """
    block = max(t for t in range(1, _LARGEST_BLOCK + 1) if length % t == 0)
    span = min(length, block + size - 1)  # of all windows of a block
    queries = torch.arange(length, device=device).view(-1, block)
    keys = (queries[:, :1] - size // 2).clamp(0, length - span) + torch.arange(span, device=device)
    first = (queries - size // 2).clamp(0, length - size)[:, :, None]  # (n, t, 1)
    return Blocks(queries, keys, (first <= keys[:, None]) & (keys[:, None] < first + size))


def shifted_windows(length: int, size: int, shift: int, device: torch.device | None = None) -> Blocks:
    """Windows of `size` places, moved back by `shift`; what the first one gets from the other end sees only itself.

    Args:
        length: of the side, a multiple of `size`.
        size: of a window.
        shift: places, less than `size`.
        device: of the result.
    References: Liu et al. 2021, section 3.2, https://arxiv.org/abs/2103.14030
    """
    places = torch.arange(length, device=device).view(-1, size)
    brought = places < shift
    return Blocks((places - shift) % length, (places - shift) % length, brought[:, :, None] == brought[:, None])


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, rows: Blocks, columns: Blocks) -> Tensor:
    """Attention with scale 1, in which a query looks at the keys that both its row and its column allow.

    Args:
        q, k, v: (B, heads, H, W, E).
        rows, columns: of the height and of the width.
    Returns: (B, heads, H, W, E).
    """
    batch, heads, height, width, channels = q.shape

    def blocks(x: Tensor, row: Tensor, column: Tensor) -> Tensor:
        x = x[:, :, row[:, None, :, None], column[None, :, None, :]]  # (B, heads, n, m, t, u, E)
        return x.reshape(batch * heads, len(row) * len(column), -1, channels)

    allowed = rows.allowed[:, None, :, None, :, None] & columns.allowed[None, :, None, :, None, :]  # (n, m, t, u, r, s)
    allowed = allowed.flatten(4, 5).flatten(2, 3).flatten(0, 1)  # (n m, t u, r s)
    keys, values = (blocks(x, rows.keys, columns.keys) for x in (k, v))
    out = F.scaled_dot_product_attention(blocks(q, rows.queries, columns.queries), keys, values, allowed, scale=1.0)
    shape = (len(rows.queries), len(columns.queries), rows.queries.shape[1], columns.queries.shape[1])
    out = out.view(batch, heads, *shape, channels).transpose(3, 4).reshape(q.shape)
    return out[:, :, rows.queries.flatten().argsort()[:, None], columns.queries.flatten().argsort()]


# ------------------------------------------------------------------------------------------------------------------------------ the parts


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What norms and angles are computed in."""
    return torch.promote_types(dtype, torch.float32)


def _places(count: int, extent: float, like: Tensor) -> Tensor:
    """The centres of `count` equal parts of [-extent, extent]: (count,)."""
    steps = torch.arange(count, dtype=_wide(like.dtype), device=like.device)
    return ((2 * steps + 1) / count - 1) * extent


def _rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    wide = x.to(_wide(x.dtype))
    return x * (scale.to(wide.dtype) * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turns number i of the first half of E by angle i, together with number i + E / 4: (..., E), (..., E / 4) -> (..., E)."""
    a, b, rest = x.split([angles.shape[-1], angles.shape[-1], x.shape[-1] - 2 * angles.shape[-1]], dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), rest], dim=-1)


def _merge(x: Tensor, side: int) -> Tensor:
    """(B, H, W, C) -> (B, H / s, W / s, s s C)."""
    return x.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3).flatten(3)


def _split(x: Tensor, side: int) -> Tensor:
    """(B, H, W, s s C) -> (B, H s, W s, C)."""
    return x.unflatten(3, (side, side, -1)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _fourier(x: Tensor, frequencies: Tensor) -> Tensor:
    """Cosines and sines of 2 pi times the products: (B, I), (D / 2, I) -> (B, D)."""
    angles = 2 * math.pi * x.to(frequencies.dtype) @ frequencies.T
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _zero(layer: nn.Linear) -> nn.Linear:
    """The last layer of a residual branch begins at zero."""
    nn.init.zeros_(layer.weight)
    return layer


def _linear(channels: int, out_channels: int) -> nn.Linear:
    return nn.Linear(channels, out_channels, bias=False)


class _RMSNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return _rms_norm(x, self.scale)


class _AdaptiveNorm(nn.Module):
    """RMS normalisation whose scale comes from the embedding: (B, H, W, C), (B, D) -> (B, H, W, C)."""

    def __init__(self, channels: int, embedding_channels: int) -> None:
        super().__init__()
        self.linear = _zero(_linear(embedding_channels, channels))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return _rms_norm(x, self.linear(embedding)[:, None, None] + 1)


class _GEGLU(nn.Module):
    """The feed-forward network, whose one half gates the other: (..., C) -> (..., C)."""

    def __init__(self, channels: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.up, self.down = _linear(channels, 2 * hidden), _zero(_linear(hidden, channels))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(x).chunk(2, dim=-1)
        return self.down(self.dropout(value * F.gelu(gate)))


class _Attention(nn.Module):
    """Self-attention by cosine similarity, with axial rotary positions: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, channels: int, head_dim: int, kind: str, size: int | None, shifted: bool, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.kind, self.size = channels // head_dim, kind, size
        self.shift = size // 2 if kind == "shifted-window" and shifted else 0
        self.qkv, self.out = _linear(channels, 3 * channels), _zero(_linear(channels, channels))
        self.scale = nn.Parameter(torch.full((self.num_heads,), 10.0))
        self.dropout = nn.Dropout(dropout)
        # from pi to 10 pi over all heads, each head with some of every octave; the same for rows and columns
        steps = torch.arange(head_dim // 8 * self.num_heads) / (head_dim // 8 * self.num_heads)
        self.register_buffer("frequencies", (math.pi * 10.0**steps).view(-1, self.num_heads).T.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        q, k, v = self.qkv(x).unflatten(3, (3, self.num_heads, -1)).permute(3, 0, 4, 1, 2, 5)  # each (B, heads, H, W, E)
        angles = self.angles(height, width, x)  # (heads, H, W, E / 4)
        q, k = (_rotate(self.unit(y), angles) for y in (q, k))
        if self.kind == "global":
            h = F.scaled_dot_product_attention(*(y.flatten(2, 3) for y in (q, k, v)), scale=1.0).view(v.shape)
        elif self.kind == "neighborhood":
            h = attend_in_blocks(q, k, v, *(neighborhoods(n, self.size, x.device) for n in (height, width)))
        else:
            h = attend_in_blocks(q, k, v, *(shifted_windows(n, self.size, self.shift, x.device) for n in (height, width)))
        return self.out(self.dropout(h.permute(0, 2, 3, 1, 4).flatten(3)))

    def unit(self, x: Tensor) -> Tensor:
        """Of length sqrt(scale), so that products are the scale times a cosine."""
        wide = x.to(_wide(x.dtype))
        scale = self.scale.to(wide.dtype).sqrt()[:, None, None, None] * torch.rsqrt(wide.square().sum(-1, keepdim=True) + EPS)
        return x * scale.to(x.dtype)

    def angles(self, height: int, width: int, x: Tensor) -> Tensor:
        """Of rows, then of columns, whose places are in [-1, 1] along the longer side: (heads, H, W, E / 4)."""
        longer = max(height, width)
        frequencies = self.frequencies.to(_wide(x.dtype))[:, None, None]  # (heads, 1, 1, E / 8)
        rows = _places(height, height / longer, x).view(-1, 1, 1) * frequencies
        columns = _places(width, width / longer, x).view(1, -1, 1) * frequencies
        shape = (self.num_heads, height, width, self.frequencies.shape[1])
        return torch.cat([rows.expand(shape), columns.expand(shape)], dim=3)


class _Layer(nn.Module):
    """Attention, where the level has it, and the feed-forward network, each with a residual: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, channels: int, hidden: int, embedding_channels: int, attention: nn.Module | None, dropout: float) -> None:
        super().__init__()
        self.attention = attention
        self.norm_attention = None if attention is None else _AdaptiveNorm(channels, embedding_channels)
        self.norm = _AdaptiveNorm(channels, embedding_channels)
        self.feed_forward = _GEGLU(channels, hidden, dropout)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        if self.attention is not None:
            x = x + self.attention(self.norm_attention(x, embedding))
        return x + self.feed_forward(self.norm(x, embedding))


class _MappingLayer(nn.Module):
    """(B, D) -> (B, D)."""

    def __init__(self, channels: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.feed_forward = _RMSNorm(channels), _GEGLU(channels, hidden, dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.feed_forward(self.norm(x))


class _Join(nn.Module):
    """A token becomes four, blended with those of the way down: (B, H, W, I), (B, 2 H, 2 W, O) -> (B, 2 H, 2 W, O)."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj = _linear(channels, 4 * out_channels)
        self.weight = nn.Parameter(torch.tensor([0.5]))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return torch.lerp(skip, _split(self.proj(x), 2), self.weight.to(x.dtype))


# ---------------------------------------------------------------------------------------------------------------------------- the network


class HDiTModel(GenerativeModel):
    """The hourglass diffusion transformer (HDiT), `image_transformer_v2` of k-diffusion, which is trained with EDM's preconditioning.

    Its cost grows with the number of pixels where attention is local. Any size goes in that patches, mergings and windows divide; positions
    are relative to the longer side.

    Args:
        sample_size: height and width of a picture.
        in_channels, out_channels: of pictures.
        patch_size: squares of pixels that are one token.
        block_out_channels: width of the tokens at each level, the finest first; the last level is the middle.
        layers_per_block: of each level, on the way down and again on the way up.
        feed_forward_channels: inside the feed-forward networks of each level; None for three times the width.
        attention_types: of each level: "neighborhood" (every token sees those around it), "shifted-window" (windows, every second layer
            moved by half of one), "global" or "none".
        attention_sizes: side of the neighbourhood (odd) or of the window at each level, in tokens; without effect for other types.
        attention_head_dims: channels of a head at each level, a multiple of 8.
        mapping_channels, mapping_layers, mapping_feed_forward_channels: of the network that maps time, class and the rest to the embedding;
            None for three times the channels.
        augmentation_channels: numbers that say how a training picture was augmented, zeros when drawing; 0 for none.
        num_class_embeds: rows of the class table, None for a network without classes.
        condition_channels: of a vector that the network is given besides the time; 0 for none.
        dropouts: of each level, while training; None for none.
        mapping_dropout: likewise.

    Raises:
        ValueError: sizes that do not fit each other; the message names them.

    References: Crowson et al. 2024, https://arxiv.org/abs/2401.11605; neighbourhood attention: Hassani et al. 2023,
    https://arxiv.org/abs/2204.07143
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        sample_size: int = 256,
        in_channels: int = 3,
        out_channels: int = 3,
        patch_size: int = 4,
        block_out_channels: Sequence[int] = (128, 256, 512),
        layers_per_block: Sequence[int] = (2, 2, 4),
        feed_forward_channels: Sequence[int] | None = None,
        attention_types: Sequence[str] = ("neighborhood", "neighborhood", "global"),
        attention_sizes: Sequence[int | None] = (7, 7, None),
        attention_head_dims: Sequence[int | None] = (64, 64, 64),
        mapping_channels: int = 256,
        mapping_layers: int = 2,
        mapping_feed_forward_channels: int | None = None,
        augmentation_channels: int = 9,
        num_class_embeds: int | None = None,
        condition_channels: int = 0,
        dropouts: Sequence[float] | None = None,
        mapping_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        widths, levels = tuple(block_out_channels), len(block_out_channels)
        hidden = [3 * width for width in widths] if feed_forward_channels is None else feed_forward_channels
        dropouts = [0.0] * levels if dropouts is None else dropouts
        lengths = {"layers_per_block": layers_per_block, "feed_forward_channels": hidden, "attention_types": attention_types,
                   "attention_sizes": attention_sizes, "attention_head_dims": attention_head_dims, "dropouts": dropouts}  # fmt: skip
        if wrong := [name for name, values in lengths.items() if len(values) != levels]:
            raise ValueError(f"HDiTModel: block_out_channels has {levels} levels, {wrong[0]} {len(lengths[wrong[0]])} entries.")
        for kind, size, head, width in zip(attention_types, attention_sizes, attention_head_dims, widths, strict=True):
            if kind not in ATTENTION_TYPES:
                raise ValueError(f"HDiTModel: attention type {kind!r} is none of {', '.join(ATTENTION_TYPES)}.")
            if kind != "none" and (not head or head % 8 or width % head):
                raise ValueError(f"HDiTModel: {width} channels cannot be dealt out to heads of {head}; it must be a multiple of 8.")
            if kind in ("neighborhood", "shifted-window") and (not size or size < 1 or (kind == "neighborhood" and size % 2 == 0)):
                raise ValueError(f"HDiTModel: {kind} attention of size {size}; a window has a size, and a neighbourhood an odd one.")
        if mapping_channels % 2:
            raise ValueError(f"HDiTModel: mapping_channels={mapping_channels} must be even: half are cosines, half sines.")
        self.check_size(sample_size, sample_size)

        # 1. The time, and what else is known of the picture
        self.register_buffer("time_frequencies", torch.randn(mapping_channels // 2, 1))
        self.time = _linear(mapping_channels, mapping_channels)
        augmented = augmentation_channels > 0
        self.register_buffer("augmentation_frequencies", torch.randn(mapping_channels // 2, augmentation_channels) if augmented else None)
        self.augmentation = _linear(mapping_channels, mapping_channels) if augmented else None
        self.class_embedding = None if num_class_embeds is None else nn.Embedding(num_class_embeds, mapping_channels)
        self.condition = _linear(condition_channels, mapping_channels) if condition_channels else None
        inside = mapping_feed_forward_channels or 3 * mapping_channels
        self.mapping = nn.Sequential(
            _RMSNorm(mapping_channels),
            *(_MappingLayer(mapping_channels, inside, mapping_dropout) for _ in range(mapping_layers)),
            _RMSNorm(mapping_channels),
        )

        # 2. Down, the middle, and up; entry i of every list is of level i
        def layer(level: int, number: int) -> _Layer:
            kind, dropout = attention_types[level], dropouts[level]
            attention = None
            if kind != "none":
                attention = _Attention(widths[level], attention_head_dims[level], kind, attention_sizes[level], number % 2 == 1, dropout)
            return _Layer(widths[level], hidden[level], mapping_channels, attention, dropout)

        self.patch_in = _linear(in_channels * patch_size**2, widths[0])
        self.down, self.up, self.merges, self.splits = (nn.ModuleList() for _ in range(4))
        for i, depth in enumerate(layers_per_block[:-1]):
            self.down.append(nn.ModuleList(layer(i, j) for j in range(depth)))
            self.up.append(nn.ModuleList(layer(i, depth + j) for j in range(depth)))
            self.merges.append(_linear(4 * widths[i], widths[i + 1]))
            self.splits.append(_Join(widths[i + 1], widths[i]))
        self.middle = nn.ModuleList(layer(levels - 1, j) for j in range(layers_per_block[-1]))
        self.norm_out = _RMSNorm(widths[0])
        self.patch_out = _zero(_linear(widths[0], out_channels * patch_size**2))
        self.gradient_checkpointing = False

    def check_size(self, height: int, width: int) -> None:
        """
        Raises:
            ValueError: a picture of this size cannot be dealt out to patches, levels and windows.
        """
        config = self.config
        for i, (kind, size) in enumerate(zip(config.attention_types, config.attention_sizes, strict=True)):
            for pixels in (height, width):
                side, rest = divmod(pixels, config.patch_size * 2**i)
                if rest or not side:
                    multiple = config.patch_size * 2 ** (len(config.attention_types) - 1)
                    raise ValueError(f"HDiTModel: {height} x {width} is no picture of patches and levels; its sides must be multiples of "
                                     f"{multiple}.")  # fmt: skip
                if kind == "neighborhood" and side < size:
                    raise ValueError(f"HDiTModel: {height} x {width} leaves {side} tokens at level {i}, a neighbourhood has {size}.")
                if kind == "shifted-window" and side % size:
                    raise ValueError(f"HDiTModel: {height} x {width} leaves {side} tokens at level {i}, which are no windows of {size}.")

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        condition: Tensor | None = None,
        augmentation: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """EDM's raw F.

        Args:
            sample: c_in x, shape (B, C, H, W).
            timestep: log(sigma) / 4, a number or (B,).
            class_labels: (B,), where there are classes.
            condition: (B, condition_channels), where the network takes one; None for zeros.
            augmentation: (B, augmentation_channels), likewise.
            return_dict: False returns a tuple.
        Returns: `.sample`, (B, out_channels, H, W).
        Raises:
            ValueError: labels for a network without classes, or none for one with; a vector for one without; a size that does not fit.
        """
        check_class_labels(self, class_labels, self.class_embedding is not None)
        for name, given, layer in (("condition", condition, self.condition), ("augmentation", augmentation, self.augmentation)):
            if given is not None and layer is None:
                raise ValueError(f"HDiTModel: this network has {name}_channels=0; leave {name} out.")
        self.check_size(*sample.shape[2:])
        patch = self.config.patch_size

        t = torch.as_tensor(timestep, device=sample.device).expand(len(sample))[:, None]
        embedding = self.time(_fourier(t, self.time_frequencies).to(sample.dtype))  # (B, D)
        if self.augmentation is not None:
            numbers = sample.new_zeros(len(sample), self.config.augmentation_channels) if augmentation is None else augmentation
            embedding = embedding + self.augmentation(_fourier(numbers, self.augmentation_frequencies).to(sample.dtype))
        if class_labels is not None:
            embedding = embedding + self.class_embedding(class_labels.long())
        if condition is not None:
            embedding = embedding + self.condition(condition.to(sample.dtype))
        embedding = self.mapping(embedding)  # (B, D)

        x, skips = self.patch_in(_merge(sample.movedim(1, 3), patch)), []  # (B, H / p, W / p, C_0)
        for layers, merge in zip(self.down, self.merges, strict=True):
            x = self.run(layers, x, embedding)  # (B, h, w, C_level)
            skips.append(x)
            x = merge(_merge(x, 2))
        x = self.run(self.middle, x, embedding)
        for layers, split in zip(reversed(self.up), reversed(self.splits), strict=True):
            x = self.run(layers, split(x, skips.pop()), embedding)
        out = _split(self.patch_out(self.norm_out(x)), patch).movedim(3, 1)
        return UNet2DOutput(sample=out) if return_dict else (out,)

    def run(self, layers: nn.ModuleList, x: Tensor, embedding: Tensor) -> Tensor:
        """The layers of a level, one after the other: (B, h, w, C) -> (B, h, w, C)."""
        for layer in layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, embedding, use_reentrant=False)
            else:
                x = layer(x, embedding)
        return x
