"""The U-Net of the ablated diffusion models, with every setting that its descendants use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..base import GenerativeModel
from ..layers.unet_blocks import (
    EPS,
    GROUPS,
    RESAMPLINGS,
    MiddleStage,
    PixelAttention,
    Resample,
    Stage,
    TimedResidualBlock,
    TimeMLP,
    down_stages,
    heads_of,
)
from .base import check_class_labels

__all__ = ["ADMUNet2DModel", "ConfigMixin", "ModelMixin"]


class ADMUNet2DModel(GenerativeModel):
    """A U-Net of residual blocks with attention at some sizes, told a time and perhaps a class.

    What diffusers' `UNet2DModel` has no setting for: one number of heads for all widths (and another on the way up), resampling without
    convolutions, and a time embedding whose width is not that of the first convolution. Where a network needs none of these, use
    `UNet2DModel`.

    Args:
        sample_size: height and width that it was trained on; any multiple of 2^(levels - 1) works.
        in_channels, out_channels: of pictures; out_channels is twice in_channels where a variance was learned.
        block_out_channels: width of each level, from the largest size to the smallest; multiples of 32.
        layers_per_block: residual blocks per level on the way down; one more on the way up.
        attention_levels: for each level, whether its residual blocks are followed by attention. The middle always has it.
        attention_head_dim, num_attention_heads: channels per head, or the number of heads; exactly one of them.
        up_num_attention_heads: the number of heads on the way up, where it differs.
        resample_type: "conv" (strided convolution; nearest neighbour and convolution), "pool" (mean of 2 x 2; nearest neighbour) or
            "residual" (inside a residual block).
        time_scale_shift: the time gives scales and shifts after the norms; else it is added.
        time_channels: frequencies of the time, twice that many numbers are embedded in 4 times as many; block_out_channels[0] by default.
        num_class_embeds: rows of the class table; None for a network without classes.
        dropout: in the residual blocks.

    Raises:
        ValueError: settings that do not fit together.

    References: Ho et al. 2020, appendix B, https://arxiv.org/abs/2006.11239; Dhariwal & Nichol 2021, section 3,
    https://arxiv.org/abs/2105.05233
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        sample_size: int | Sequence[int] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: Sequence[int] = (128, 256, 384, 512),
        layers_per_block: int = 2,
        attention_levels: Sequence[bool] = (False, True, True, True),
        attention_head_dim: int | None = 64,
        num_attention_heads: int | None = None,
        up_num_attention_heads: int | None = None,
        resample_type: str = "residual",
        time_scale_shift: bool = True,
        time_channels: int | None = None,
        num_class_embeds: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        widths, levels = tuple(block_out_channels), tuple(bool(a) for a in attention_levels)
        if resample_type not in RESAMPLINGS:
            raise ValueError(f"ADMUNet2DModel: resample_type {resample_type!r} is none of {', '.join(RESAMPLINGS)}.")
        if len(levels) != len(widths):
            raise ValueError(f"ADMUNet2DModel: {len(widths)} block_out_channels, but {len(levels)} attention_levels; give one each.")
        if wrong := [width for width in widths if width % GROUPS]:
            raise ValueError(f"ADMUNet2DModel: block_out_channels must be multiples of {GROUPS}, the groups of its norms; got {wrong[0]}.")
        heads = {"num_attention_heads": num_attention_heads, "attention_head_dim": attention_head_dim}
        up_heads = heads if up_num_attention_heads is None else {**heads, "num_attention_heads": up_num_attention_heads}
        time_channels = time_channels or widths[0]
        time = 4 * time_channels
        shared = {"scale_shift": time_scale_shift, "dropout": dropout}

        self.time_embedding = TimeMLP(time_channels, time)
        self.class_embedding = None if num_class_embeds is None else nn.Embedding(num_class_embeds, time)
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.down_blocks, skips = down_stages(
            widths[0], widths, layers_per_block, levels, time, heads, resample_type, time_scale_shift, dropout
        )
        self.mid_block = MiddleStage(widths[-1], time, heads_of(widths[-1], **heads), **shared)
        self.up_blocks = nn.ModuleList()
        width = widths[-1]
        for level in reversed(range(len(widths))):
            for i in range(layers_per_block + 1):
                residual = TimedResidualBlock(width + skips.pop(), widths[level], time, **shared)
                width = widths[level]
                attention = PixelAttention(width, heads_of(width, **up_heads)) if levels[level] else None
                resample: nn.Module | None = None
                if level > 0 and i == layers_per_block:
                    if resample_type == "residual":
                        resample = TimedResidualBlock(width, width, time, resample="up", **shared)
                    else:
                        resample = Resample(width, "up", resample_type == "conv")
                self.up_blocks.append(Stage(residual, attention, resample))
        self.norm_out = nn.GroupNorm(GROUPS, width, eps=EPS)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)
        self.gradient_checkpointing = False

    def forward(
        self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> UNet2DOutput | tuple[Tensor]:
        """The network's output for pictures at a time.

        Args:
            sample: (B, C, H, W), H and W multiples of 2^(levels - 1).
            timestep: network time, a number, a 0-d tensor or (B,).
            class_labels: whole numbers, (B,); for a network with classes, and only for one.
            return_dict: False returns a tuple.
        Returns: `.sample`, (B, out_channels, H, W).
        Raises:
            ValueError: labels are missing, or given to a network without classes.
        """
        check_class_labels(self, class_labels, self.class_embedding is not None)
        t = torch.as_tensor(timestep, device=sample.device)
        time = self.time_embedding(t.expand(len(sample)) if t.ndim == 0 else t)  # (B, 4 T)
        if class_labels is not None:
            time = time + self.class_embedding(class_labels)
        x = self.conv_in(sample)  # (B, c, H, W)
        skips = [x]
        for stage in self.down_blocks:
            x = self._run(stage, x, time)
            skips.append(x)
        x = self._run(self.mid_block, x, time)  # (B, c', h, w)
        for stage in self.up_blocks:
            x = self._run(stage, torch.cat([x, skips.pop()], dim=1), time)
        x = self.conv_out(F.silu(self.norm_out(x)))  # (B, out_channels, H, W)
        return UNet2DOutput(sample=x) if return_dict else (x,)

    def _run(self, stage: nn.Module, *inputs: Any) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(stage, *inputs, use_reentrant=False)
        return stage(*inputs)
