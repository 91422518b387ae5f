"""k-diffusion's first U-Net of pictures: every norm is adaptive, resampling has a filter, the output is preconditioned from outside."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from ..base import GenerativeModel
from ..layers.upfirdn import fir_filter, upfirdn2d
from .base import check_class_labels

__all__ = ["ConfigMixin", "KDiffusionUNetModel", "ModelMixin"]

TAPS = (1.0, 3.0, 3.0, 1.0)
CHANNELS_PER_GROUP, CHANNELS_PER_HEAD = 32, 64


def _zero(layer: nn.Module) -> nn.Module:
    """The last layer of a residual branch begins at zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _orthogonal(layer: nn.Module) -> nn.Module:
    nn.init.orthogonal_(layer.weight)
    return layer


class _AdaptiveNorm(nn.Module):
    """Group normalisation whose scale and shift come from the embedding: (B, C, H, W), (B, D) -> (B, C, H, W)."""

    def __init__(self, channels: int, embedding_channels: int) -> None:
        super().__init__()
        self.groups = max(1, channels // CHANNELS_PER_GROUP)
        self.linear = _zero(nn.Linear(embedding_channels, 2 * channels))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.linear(embedding)[:, :, None, None].chunk(2, dim=1)  # (B, C, 1, 1) each
        return F.group_norm(x, self.groups) * (scale + 1) + shift


class _Residual(nn.Module):
    """The residual block, (B, I, H, W) -> (B, O, H, W)."""

    def __init__(self, in_channels: int, channels: int, out_channels: int, embedding_channels: int, dropout: float) -> None:
        super().__init__()
        self.norm_1 = _AdaptiveNorm(in_channels, embedding_channels)
        self.conv_1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.norm_2 = _AdaptiveNorm(channels, embedding_channels)
        self.conv_2 = _zero(nn.Conv2d(channels, out_channels, 3, padding=1))
        self.dropout = nn.Dropout2d(dropout)
        same = in_channels == out_channels
        self.shortcut = None if same else _orthogonal(nn.Conv2d(in_channels, out_channels, 1, bias=False))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.dropout(self.conv_1(F.gelu(self.norm_1(x, embedding))))  # (B, M, H, W)
        h = self.dropout(self.conv_2(F.gelu(self.norm_2(h, embedding))))  # (B, O, H, W)
        return h + (x if self.shortcut is None else self.shortcut(x))


class _Attention(nn.Module):
    """Self-attention over all pixels, with a residual: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, embedding_channels: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = max(1, channels // CHANNELS_PER_HEAD), dropout
        if channels % self.num_heads:
            raise ValueError(f"KDiffusionUNetModel: {channels} channels cannot be dealt out to {self.num_heads} heads of attention.")
        self.norm = _AdaptiveNorm(channels, embedding_channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = _zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x, embedding)).reshape(batch, 3, self.num_heads, channels // self.num_heads, height * width)
        q, k, v = qkv.transpose(3, 4).unbind(1)  # each (B, heads, H W, C / heads)
        h = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return x + self.out(h.transpose(2, 3).reshape(x.shape))


class _Level(nn.Module):
    """The blocks of one resolution, each with attention behind it or without."""

    def __init__(self, widths: Sequence[int], channels: int, attention: bool, embedding_channels: int, dropout: float) -> None:
        super().__init__()
        ends = zip(widths[:-1], widths[1:], strict=True)
        self.blocks = nn.ModuleList(_Residual(i, channels, o, embedding_channels, dropout) for i, o in ends)
        self.attentions = nn.ModuleList(_Attention(o, embedding_channels, dropout) for o in widths[1:] if attention)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x, embedding)
            x = self.attentions[i](x, embedding) if self.attentions else x
        return x


class KDiffusionUNetModel(GenerativeModel):
    """The U-Net `image_v1` of k-diffusion, which is trained with EDM's preconditioning.

    A level halves the size with the filter (1, 3, 3, 1), edges reflected; its output is the one skip connection that the level of the same
    size gets on the way up, beside what comes from below. There is no middle.

    Args:
        sample_size: height and width of a picture.
        in_channels, out_channels: of pictures; more in than out where another picture is given beside the noisy one.
        patch_size: squares of pixels that are one pixel of the network.
        embedding_channels: of the embedding of the time.
        block_out_channels: of each level, the finest first.
        layers_per_block: residual blocks of each level, on the way down and on the way up.
        attention_levels: whether each level has attention behind its blocks.
        base_channels: of the first layer and the last; None for those of the first level.
        num_class_embeds: rows of the table of classes; None for a network without.
        condition_channels: numbers of a condition that is given as a vector (of how a training picture was augmented); zeros mean none.
        dropout: of whole channels in the blocks, of weights in the attention.

    Raises:
        ValueError: lists of different lengths, or a size that cannot be halved once for each level after the first.

    References: https://github.com/crowsonkb/k-diffusion (there is no paper); Karras et al. 2022, table 1 (the preconditioning),
    https://arxiv.org/abs/2206.00364
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 3,
        out_channels: int = 3,
        patch_size: int = 1,
        embedding_channels: int = 256,
        block_out_channels: Sequence[int] = (128, 256, 512),
        layers_per_block: Sequence[int] = (2, 4, 4),
        attention_levels: Sequence[bool] = (False, True, True),
        base_channels: int | None = None,
        num_class_embeds: int | None = None,
        condition_channels: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        widths, last = list(block_out_channels), len(block_out_channels) - 1
        if not len(widths) == len(layers_per_block) == len(attention_levels):
            raise ValueError(
                f"KDiffusionUNetModel: block_out_channels has {len(widths)} levels, layers_per_block {len(layers_per_block)}, "
                f"attention_levels {len(attention_levels)}; give one entry for each level."
            )
        smallest, rest = divmod(sample_size, patch_size * 2**last)
        if rest or (last and smallest < 2):
            raise ValueError(
                f"KDiffusionUNetModel: sample_size={sample_size} in patches of {patch_size} cannot be halved {last} times down to 2 or "
                "more, once for each level after the first; give another size, or fewer levels."
            )
        base = base_channels or widths[0]

        # 1. The time, and what else is known of the picture
        self.register_buffer("frequencies", torch.randn(embedding_channels // 2))
        self.condition = nn.Linear(condition_channels, embedding_channels, bias=False) if condition_channels else None
        self.class_embedding = None if num_class_embeds is None else nn.Embedding(num_class_embeds, embedding_channels)
        self.mapping_0, self.mapping_1 = (_orthogonal(nn.Linear(embedding_channels, embedding_channels)) for _ in range(2))

        # 2. Down and up again: a level takes the channels of the one before, and gives them back
        self.proj_in = nn.Conv2d(in_channels * patch_size**2, base, 1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for i, (width, layers, attention) in enumerate(zip(widths, layers_per_block, attention_levels, strict=True)):
            options = {"channels": width, "attention": attention, "embedding_channels": embedding_channels, "dropout": dropout}
            before = widths[i - 1] if i else base
            self.down.append(_Level([before] + [width] * layers, **options))
            entering = width if i == last else 2 * width
            self.up.insert(0, _Level([entering] + [width] * (layers - 1) + [before], **options))
        self.proj_out = _zero(nn.Conv2d(base, out_channels * patch_size**2, 1))
        self.register_buffer("taps", fir_filter(TAPS), persistent=False)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        condition: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """EDM's raw F.

        Args:
            sample: c_in x, shape (B, C, H, W).
            timestep: log(sigma) / 4, a number or (B,).
            class_labels: (B,), where there are classes.
            condition: (B, condition_channels), where the network takes one; None for zeros.
        Returns: `.sample`, (B, out_channels, H, W).
        Raises:
            ValueError: labels for a network without classes, or none for one with; a condition for a network without.
        """
        check_class_labels(self, class_labels, self.class_embedding is not None)
        if condition is not None and self.condition is None:
            raise ValueError("KDiffusionUNetModel: this network has condition_channels=0; leave condition out.")
        patch = self.config.patch_size
        t = torch.as_tensor(timestep, device=sample.device).to(self.frequencies.dtype).expand(len(sample))
        angles = 2 * math.pi * t[:, None] * self.frequencies  # (B, D / 2)
        embedding = torch.cat([angles.cos(), angles.sin()], dim=1).to(sample.dtype)
        if class_labels is not None:
            embedding = embedding + self.class_embedding(class_labels.long())
        if condition is not None:
            embedding = embedding + self.condition(condition.to(sample.dtype))
        embedding = F.gelu(self.mapping_1(F.gelu(self.mapping_0(embedding))))  # (B, D)

        x, skips = self.proj_in(F.pixel_unshuffle(sample, patch)), []  # (B, base, H / p, W / p)
        for i, level in enumerate(self.down):
            x = level(self.shrink(x) if i else x, embedding)  # (B, C_level, h, w)
            skips.append(x)
        skips.pop()
        for i, level in enumerate(self.up):
            x = level(torch.cat([self.enlarge(x), skips.pop()], dim=1) if i else x, embedding)
        out = F.pixel_shuffle(self.proj_out(x), patch)
        return UNet2DOutput(sample=out) if return_dict else (out,)

    def shrink(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H / 2, W / 2)."""
        return upfirdn2d(F.pad(x, (1, 1, 1, 1), "reflect"), self.taps, down=2)

    def enlarge(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2 H, 2 W)."""
        return upfirdn2d(F.pad(x, (1, 1, 1, 1), "reflect"), self.taps, up=2, padding=(0, -1), gain=4)
