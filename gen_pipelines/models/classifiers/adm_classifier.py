"""The classifier of noisy pictures that guides the ablated diffusion models: the way down of their U-Net, and a pooling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from ..base import ConfigMixin, GenerativeModel, ModelMixin
from ..layers.unet_blocks import EPS, GROUPS, RESAMPLINGS, MiddleStage, TimeMLP, down_stages, heads_of
from .conv_classifier import ClassifierOutput

__all__ = ["POOLINGS", "ADMClassifier", "ConfigMixin", "ModelMixin"]

POOLINGS = ("attention", "mean", "levels", "normed_levels")
_HIDDEN = 2048


class AttentionPooling(nn.Module):
    """One vector from all pixels: their mean attends to them and to itself, (B, C, H, W) to (B, out_channels).

    References: Radford et al. 2021, section 2.4, https://arxiv.org/abs/2103.00020
    """

    def __init__(self, channels: int, size: int, num_heads: int, out_channels: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.position = nn.Parameter(torch.randn(size**2 + 1, channels) / channels**0.5)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.flatten(2).transpose(1, 2)  # (B, H W, C)
        tokens = torch.cat([pixels.mean(dim=1, keepdim=True), pixels], dim=1) + self.position
        q, k, v = self.qkv(tokens).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        pooled = F.scaled_dot_product_attention(q[:, :, :1], k, v)  # (B, heads, 1, C / heads)
        return self.out(pooled.flatten(1))


class ADMClassifier(GenerativeModel):
    """log p(y | x_t, t) up to a constant, for `ClassifierGuidance`.

    Args:
        sample_size: height and width of the pictures.
        in_channels, num_classes: of the pictures; of the answers.
        block_out_channels, layers_per_block, attention_levels, attention_head_dim, resample_type, time_scale_shift, time_channels: as in
            `ADMUNet2DModel`.
        pooling: "attention"; "mean" over the pixels; or "levels", the means of every block's pixels in a two-layer network, whose hidden
            layer has a norm in "normed_levels".

    Raises:
        ValueError: settings that do not fit together.

    References: Dhariwal & Nichol 2021, section 4 and appendix H, https://arxiv.org/abs/2105.05233
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 3,
        num_classes: int = 1000,
        block_out_channels: Sequence[int] = (128, 256, 384, 512),
        layers_per_block: int = 4,
        attention_levels: Sequence[bool] = (False, True, True, True),
        attention_head_dim: int = 64,
        resample_type: str = "residual",
        time_scale_shift: bool = True,
        time_channels: int | None = None,
        pooling: str = "attention",
    ) -> None:
        super().__init__()
        widths, levels = tuple(block_out_channels), tuple(bool(a) for a in attention_levels)
        if resample_type not in RESAMPLINGS or pooling not in POOLINGS:
            allowed = f"resample_type is one of {', '.join(RESAMPLINGS)}, pooling of {', '.join(POOLINGS)}"
            raise ValueError(f"ADMClassifier: resample_type {resample_type!r}, pooling {pooling!r}; {allowed}.")
        if len(levels) != len(widths):
            raise ValueError(f"ADMClassifier: {len(widths)} block_out_channels, but {len(levels)} attention_levels; give one each.")
        time_channels = time_channels or widths[0]
        heads = {"num_attention_heads": None, "attention_head_dim": attention_head_dim}
        self.time_embedding = TimeMLP(time_channels, 4 * time_channels)
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.down_blocks, skips = down_stages(
            widths[0], widths, layers_per_block, levels, 4 * time_channels, heads, resample_type, time_scale_shift, 0.0
        )
        count = heads_of(widths[-1], **heads)
        self.mid_block = MiddleStage(widths[-1], 4 * time_channels, count, time_scale_shift, 0.0)
        self.norm_out = nn.GroupNorm(GROUPS, widths[-1] if "levels" not in pooling else _HIDDEN, eps=EPS) if pooling != "levels" else None
        if pooling == "attention":
            self.pool = AttentionPooling(widths[-1], sample_size // 2 ** (len(widths) - 1), count, num_classes)
        elif pooling == "mean":
            self.linear_out = nn.Linear(widths[-1], num_classes)
        else:
            self.linear_in = nn.Linear(sum(skips) + widths[-1], _HIDDEN)
            self.linear_out = nn.Linear(_HIDDEN, num_classes)

    def forward(self, sample: Tensor, timestep: Tensor | float, return_dict: bool = True) -> ClassifierOutput | tuple[Tensor, Tensor]:
        """What it says of noisy pictures.

        Args:
            sample: (B, C, H, W), with attention pooling of the size of the config.
            timestep: network time, a number, a 0-d tensor or (B,).
            return_dict: False returns a tuple.
        Returns: `.logits`, (B, num_classes), and `.features`, what they are a function of, (B, F).
        """
        t = torch.as_tensor(timestep, device=sample.device)
        time = self.time_embedding(t.expand(len(sample)) if t.ndim == 0 else t)  # (B, 4 T)
        x = self.conv_in(sample)
        means = [x.mean(dim=(2, 3))]
        for stage in (*self.down_blocks, self.mid_block):
            x = stage(x, time)
            means.append(x.mean(dim=(2, 3)))
        pooling = self.config.pooling
        if "levels" in pooling:
            features = self.linear_in(torch.cat(means, dim=1))  # (B, 2048)
            hidden = F.relu(features) if pooling == "levels" else F.silu(self.norm_out(features))
            logits = self.linear_out(hidden)
        else:
            x = F.silu(self.norm_out(x))  # (B, C, h, w)
            features = x.mean(dim=(2, 3))
            logits = self.pool(x) if pooling == "attention" else self.linear_out(features)
        return ClassifierOutput(logits=logits, features=features) if return_dict else (logits, features)
