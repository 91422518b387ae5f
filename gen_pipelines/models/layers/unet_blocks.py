"""The blocks of the ablated diffusion models' U-Net: residual blocks that may change the size, and attention over pixels."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RESAMPLINGS = ("conv", "pool", "residual")
GROUPS, EPS = 32, 1e-5


def sinusoids(t: Tensor, width: int, max_period: float = 10000.0) -> Tensor:
    """cos and then sin of t at width / 2 frequencies, max_period^(-2 i / width): (B,) to (B, width), float32; an odd width ends in a zero.

    References: Vaswani et al. 2017, section 3.5, https://arxiv.org/abs/1706.03762
    """
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=t.device, dtype=torch.float32) * (-math.log(max_period) / half))
    angles = t.float()[:, None] * frequencies  # (B, half)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, width % 2))


class TimeMLP(nn.Module):
    """linear, SiLU, linear on the sinusoids of the time: (B,) to (B, out_channels)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.linear_1 = nn.Linear(in_channels, out_channels)
        self.linear_2 = nn.Linear(out_channels, out_channels)

    def forward(self, t: Tensor) -> Tensor:
        features = sinusoids(t, self.in_channels).to(self.linear_1.weight.dtype)  # (B, in_channels)
        return self.linear_2(F.silu(self.linear_1(features)))


class TimedResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm x))))), with the time in the middle and, if asked, half or twice the size on both ways.

    Args:
        in_channels, out_channels: a 1 x 1 convolution takes x along where they differ.
        time_channels: of the embedded time.
        scale_shift: the time gives a scale and a shift after the second norm; else it is added before it.
        resample: None, "up" (nearest neighbour) or "down" (mean of 2 x 2).
        dropout: before the last convolution.

    References: Nichol & Dhariwal 2021, section 3 (scale and shift), https://arxiv.org/abs/2102.09672; Dhariwal & Nichol 2021, section 3,
    https://arxiv.org/abs/2105.05233; Brock et al. 2019 (resampling inside the block), https://arxiv.org/abs/1809.11096
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_channels: int,
        scale_shift: bool = True,
        resample: str | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.norm_1 = nn.GroupNorm(GROUPS, in_channels, eps=EPS)
        self.conv_1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_channels, out_channels * (2 if scale_shift else 1))
        self.norm_2 = nn.GroupNorm(GROUPS, out_channels, eps=EPS)
        self.dropout = nn.Dropout(dropout)
        self.conv_2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        nn.init.zeros_(self.conv_2.weight)
        nn.init.zeros_(self.conv_2.bias)

    def resampled(self, x: Tensor) -> Tensor:
        """Half or twice the size, where this block changes it."""
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        return F.avg_pool2d(x, 2) if self.resample == "down" else x

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv_1(self.resampled(F.silu(self.norm_1(x))))  # (B, out, H', W')
        time = self.time(F.silu(time))[:, :, None, None]  # (B, out or 2 out, 1, 1)
        if self.scale_shift:
            scale, shift = time.chunk(2, dim=1)
            h = self.norm_2(h) * (1 + scale) + shift
        else:
            h = self.norm_2(h + time)
        h = self.conv_2(self.dropout(F.silu(h)))  # (B, out, H', W')
        return self.shortcut(self.resampled(x)) + h


class PixelAttention(nn.Module):
    """x plus attention of every pixel to every other, in `num_heads` heads: (B, C, H, W) to the same.

    The rows of `qkv` are all queries, then all keys, then all values, each head after head.
    """

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.GroupNorm(GROUPS, channels, eps=EPS)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, H W, C)
        q, k, v = self.qkv(tokens).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, H W, C / heads)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, H W, C)
        return x + self.out(h).transpose(1, 2).reshape(x.shape)


class Resample(nn.Module):
    """Half or twice the size, (B, C, H, W): with a 3 x 3 convolution ("conv") or without one ("pool")."""

    def __init__(self, channels: int, direction: str, with_conv: bool) -> None:
        super().__init__()
        self.direction = direction
        self.conv = nn.Conv2d(channels, channels, 3, stride=2 if direction == "down" else 1, padding=1) if with_conv else None

    def forward(self, x: Tensor) -> Tensor:
        if self.direction == "up":
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            return x if self.conv is None else self.conv(x)
        return F.avg_pool2d(x, 2) if self.conv is None else self.conv(x)


class Stage(nn.Module):
    """What stands between two skip connections: a residual block, attention, and a change of size, each of which may be missing."""

    def __init__(self, residual: nn.Module | None, attention: nn.Module | None, resample: nn.Module | None) -> None:
        super().__init__()
        self.residual, self.attention, self.resample = residual, attention, resample

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        if self.residual is not None:
            x = self.residual(x, time)
        if self.attention is not None:
            x = self.attention(x)
        if self.resample is None:
            return x
        return self.resample(x, time) if isinstance(self.resample, TimedResidualBlock) else self.resample(x)


def heads_of(channels: int, num_attention_heads: int | None, attention_head_dim: int | None) -> int:
    """How many heads an attention over this many channels has.

    Raises:
        ValueError: both numbers or neither are given, or the channels cannot be dealt out.
    """
    if (num_attention_heads is None) == (attention_head_dim is None):
        given = "neither" if num_attention_heads is None else "both"
        raise ValueError(f"attention: give num_attention_heads or attention_head_dim, got {given}.")
    heads = channels // attention_head_dim if num_attention_heads is None else num_attention_heads
    if heads < 1 or channels % heads or (attention_head_dim is not None and channels % attention_head_dim):
        what = f"heads of {attention_head_dim} channels" if num_attention_heads is None else f"{num_attention_heads} heads"
        raise ValueError(f"attention: {channels} channels cannot be dealt out to {what}.")
    return heads


def down_stages(
    in_channels: int,
    block_out_channels: tuple[int, ...],
    layers_per_block: int,
    attention_levels: tuple[bool, ...],
    time_channels: int,
    heads: dict[str, int | None],
    resample_type: str,
    scale_shift: bool,
    dropout: float,
) -> tuple[nn.ModuleList, list[int]]:
    """The way down, one stage per skip connection, and the channels of the skip connections, that of the input first."""
    stages, skips, width = nn.ModuleList(), [in_channels], in_channels
    for level, channels in enumerate(block_out_channels):
        for _ in range(layers_per_block):
            residual = TimedResidualBlock(width, channels, time_channels, scale_shift, dropout=dropout)
            attention = PixelAttention(channels, heads_of(channels, **heads)) if attention_levels[level] else None
            stages.append(Stage(residual, attention, None))
            width = channels
            skips.append(width)
        if level < len(block_out_channels) - 1:
            if resample_type == "residual":
                resample = TimedResidualBlock(width, width, time_channels, scale_shift, "down", dropout)
            else:
                resample = Resample(width, "down", resample_type == "conv")
            stages.append(Stage(None, None, resample))
            skips.append(width)
    return stages, skips


class MiddleStage(nn.Module):
    """Residual block, attention, residual block at the smallest size: (B, C, h, w) to the same."""

    def __init__(self, channels: int, time_channels: int, num_heads: int, scale_shift: bool, dropout: float) -> None:
        super().__init__()
        self.residual_1 = TimedResidualBlock(channels, channels, time_channels, scale_shift, dropout=dropout)
        self.attention = PixelAttention(channels, num_heads)
        self.residual_2 = TimedResidualBlock(channels, channels, time_channels, scale_shift, dropout=dropout)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.residual_2(self.attention(self.residual_1(x, time)), time)
