"""EDM2's U-Net, in which every layer keeps the magnitude of what goes through it."""

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
from ..layers.upfirdn import downsample2d, fir_filter, upsample2d
from .base import check_class_labels

__all__ = ["ConfigMixin", "EDM2UNetModel", "ModelMixin", "edm2", "unit_magnitude"]

_SILU_MAGNITUDE = 0.596  # the root mean square of silu of a standard normal


def unit_magnitude(x: Tensor, dims: Sequence[int]) -> Tensor:
    """x over its root mean square along `dims`, which is kept 1e-4 away from zero; computed in float32 at least.

    References: Karras et al. 2024, eq. 30 (pixel norm) and eq. 47 (weights), https://arxiv.org/abs/2312.02696
    """
    wide = x if x.dtype == torch.float64 else x.float()
    return x / (wide.square().mean(tuple(dims), keepdim=True).sqrt() + 1e-4).to(x.dtype)


def _silu(x: Tensor) -> Tensor:
    """eq. 81: silu, its magnitude restored."""
    return F.silu(x) / _SILU_MAGNITUDE


def _blend(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """eq. 88: (1 - w) a + w b, over the magnitude that it has for independent a and b."""
    return torch.lerp(a, b, weight) / math.hypot(1 - weight, weight)


def _join(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """eq. 103: channels next to each other, scaled so that each side counts as its weight says and the whole keeps its magnitude."""
    n_a, n_b = a.shape[1], b.shape[1]
    scale = math.sqrt(n_a + n_b) / math.hypot(1 - weight, weight)
    return torch.cat([a * (scale * (1 - weight) / math.sqrt(n_a)), b * (scale * weight / math.sqrt(n_b))], dim=1)


class _Fourier(nn.Module):
    """eq. 75: (B,) -> (B, N), cosines of random frequency and phase, of magnitude one; float32."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, t: Tensor) -> Tensor:
        return torch.cos(t.float()[:, None] * self.frequencies.float() + self.phases.float()) * math.sqrt(2)


class _Weighted(nn.Module):
    """A convolution, or with kernel_size 0 a linear layer, without bias, whose weights of each output have magnitude one.

    In training the stored weights are normalised as well, before each use (forced weight normalisation, eq. 66), so that an optimiser's
    step has the same effect however long the training.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 0) -> None:
        super().__init__()
        kernel = (kernel_size, kernel_size) if kernel_size else ()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *kernel))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        dims = range(1, self.weight.ndim)
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                self.weight.copy_(unit_magnitude(self.weight, dims))
        weight = self.weight if self.weight.dtype == torch.float64 else self.weight.float()
        weight = (unit_magnitude(weight, dims) * (gain / math.sqrt(weight[0].numel()))).to(x.dtype)
        return F.linear(x, weight) if weight.ndim == 2 else F.conv2d(x, weight, padding=weight.shape[-1] // 2)


class _Block(nn.Module):
    """A residual block with attention or without: (B, I, H, W) -> (B, O, H', W').

    In the encoder the trunk is resampled, brought to O channels and normalised per pixel before the branch; in the decoder the branch takes
    I channels and the trunk is brought to O channels where they meet.
    """

    def __init__(
        self, in_channels: int, out_channels: int, time_channels: int, encoder: bool, attention: bool = False, direction: str | None = None,
        *, taps: Sequence[float], channels_per_head: int, dropout: float, residual_balance: float, attention_balance: float,
        clip: float | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.encoder, self.direction, self.clip, self.dropout = encoder, direction, clip, dropout
        self.residual_balance, self.attention_balance = residual_balance, attention_balance
        self.num_heads = out_channels // channels_per_head if attention else 0
        self.conv_0 = _Weighted(out_channels if encoder else in_channels, out_channels, 3)
        self.time = _Weighted(time_channels, out_channels)
        self.time_gain = nn.Parameter(torch.zeros(()))
        self.conv_1 = _Weighted(out_channels, out_channels, 3)
        self.shortcut = _Weighted(in_channels, out_channels, 1) if in_channels != out_channels else None
        if attention and not self.num_heads:
            raise ValueError(f"EDM2UNetModel: {out_channels} channels are fewer than channels_per_head={channels_per_head}; lower that.")
        self.qkv = _Weighted(out_channels, 3 * out_channels, 1) if attention else None
        self.project = _Weighted(out_channels, out_channels, 1) if attention else None
        self.register_buffer("taps", fir_filter(taps), persistent=False)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        if self.direction is not None:
            x = downsample2d(x, self.taps) if self.direction == "down" else upsample2d(x, self.taps)
        if self.encoder:
            x = x if self.shortcut is None else self.shortcut(x)
            x = unit_magnitude(x, (1,))                                             # (B, O, H', W')
        h = self.conv_0(_silu(x))
        h = _silu(h * (self.time(time, self.time_gain) + 1)[:, :, None, None].to(h.dtype))
        h = self.conv_1(F.dropout(h, self.dropout, self.training))
        if not self.encoder and self.shortcut is not None:
            x = self.shortcut(x)
        x = _blend(x, h, self.residual_balance)
        if self.num_heads:
            x = _blend(x, self.attend(x), self.attention_balance)
        return x if self.clip is None else x.clamp(-self.clip, self.clip)

    def attend(self, x: Tensor) -> Tensor:
        """Cosine attention: queries, keys and values of every head and pixel have magnitude one."""
        batch, channels, height, width = x.shape
        qkv = self.qkv(x).reshape(batch, 3, self.num_heads, channels // self.num_heads, height * width)
        q, k, v = unit_magnitude(qkv, (3,)).transpose(3, 4).unbind(1)               # each (B, heads, H W, C / heads)
        h = F.scaled_dot_product_attention(q, k, v)
        return self.project(h.transpose(2, 3).reshape(batch, channels, height, width))


class _Level(nn.Module):
    """The blocks of one resolution; `first` is the convolution of the input, the block that resamples, or nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first: nn.Module | None = None
        self.blocks = nn.ModuleList()


class EDM2UNetModel(GenerativeModel):
    """A U-Net that keeps magnitudes by design: no biases, no group normalisation, weights of fixed norm.

    Args:
        sample_size: height and width of what it draws, pictures or latents.
        in_channels: of these; it gives as many.
        num_class_embeds: classes; None for a network without.
        base_channels: channels at resolution i are base_channels * channel_mults[i].
        layers_per_block: blocks at each resolution of the encoder; the decoder has one more.
        attention_resolutions: sizes whose blocks have attention.
        channels_per_head: of the attention.
        dropout: in the blocks.
        label_balance, concat_balance, residual_balance, attention_balance: the weight w of class against time, of the skip connection, of
            the residual branch, of the attention (0.3 is 30 percent of the new).
        clip: of activations, for half precision; None for none.
        resample_taps: the filter of all resampling.
        time_channels, embedding_channels: None for the first and the largest number of channels.
        logvar_channels: features of `log_variance`; 0 for a network without.

    References: Karras et al. 2024, section 2, figure 21 and appendix B (config G), https://arxiv.org/abs/2312.02696
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 4,
        num_class_embeds: int | None = None,
        base_channels: int = 192,
        channel_mults: Sequence[int] = (1, 2, 3, 4),
        layers_per_block: int = 3,
        attention_resolutions: Sequence[int] = (16, 8),
        channels_per_head: int = 64,
        dropout: float = 0.0,
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        residual_balance: float = 0.3,
        attention_balance: float = 0.3,
        clip: float | None = 256.0,
        resample_taps: Sequence[float] = (1, 1),
        time_channels: int | None = None,
        embedding_channels: int | None = None,
        logvar_channels: int = 128,
    ) -> None:
        super().__init__()
        widths = [base_channels * mult for mult in channel_mults]
        last = len(widths) - 1
        if sample_size % 2**last:
            raise ValueError(
                f"EDM2UNetModel: sample_size={sample_size} cannot be halved {last} times, once for each resolution after the first; give "
                "another size, or fewer channel_mults."
            )
        time_channels, embedding = time_channels or widths[0], embedding_channels or max(widths)

        # 1. The time and the class
        self.time = _Fourier(time_channels)
        self.embed_time = _Weighted(time_channels, embedding)
        self.embed_class = None if num_class_embeds is None else _Weighted(num_class_embeds, embedding)

        # 2. The encoder; one channel of ones stands in for the biases
        options = {
            "time_channels": embedding, "taps": tuple(resample_taps), "channels_per_head": channels_per_head, "dropout": dropout,
            "residual_balance": residual_balance, "attention_balance": attention_balance, "clip": clip,
        }  # fmt: skip
        self.encoder, channels, skips = nn.ModuleList(), in_channels + 1, []
        for i, width in enumerate(widths):
            level, attention = _Level(), (sample_size >> i) in attention_resolutions
            if i == 0:
                level.first, channels = _Weighted(channels, width, 3), width
            else:
                level.first = _Block(channels, channels, encoder=True, direction="down", **options)
            skips.append(channels)
            for _ in range(layers_per_block):
                level.blocks.append(_Block(channels, width, encoder=True, attention=attention, **options))
                channels = width
                skips.append(channels)
            self.encoder.append(level)

        # 3. The middle and the decoder
        self.middle_0 = _Block(channels, channels, encoder=False, attention=True, **options)
        self.middle_1 = _Block(channels, channels, encoder=False, **options)
        self.decoder = nn.ModuleList()
        for i in reversed(range(last + 1)):
            level, attention = _Level(), (sample_size >> i) in attention_resolutions
            if i < last:
                level.first = _Block(channels, channels, encoder=False, direction="up", **options)
            for _ in range(layers_per_block + 1):
                level.blocks.append(_Block(channels + skips.pop(), widths[i], encoder=False, attention=attention, **options))
                channels = widths[i]
            self.decoder.append(level)
        self.conv_out = _Weighted(channels, in_channels, 3)
        self.gain_out = nn.Parameter(torch.zeros(()))

        # 4. How wrong it is at each noise level
        self.logvar_time = _Fourier(logvar_channels) if logvar_channels else None
        self.logvar = _Weighted(logvar_channels, 1) if logvar_channels else None

    def forward(
        self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> UNet2DOutput | tuple[Tensor]:
        """EDM's raw F.

        Args:
            sample: c_in x, shape (B, C, H, W).
            timestep: log(sigma) / 4, a number or (B,).
            class_labels: (B,), where there are classes.
        Returns: `.sample`, (B, C, H, W).
        Raises:
            ValueError: labels for a network without classes, or none for one with.
        """
        check_class_labels(self, class_labels, self.embed_class is not None)
        config = self.config
        t = torch.as_tensor(timestep, device=sample.device)
        t = t.expand(len(sample)) if t.ndim == 0 else t
        time = self.embed_time(self.time(t).to(sample.dtype))                       # (B, D)
        if class_labels is not None:
            one_hot = F.one_hot(class_labels.long(), config.num_class_embeds).to(sample.dtype) * math.sqrt(config.num_class_embeds)
            time = _blend(time, self.embed_class(one_hot), config.label_balance)
        time = _silu(time)

        x, skips = torch.cat([sample, torch.ones_like(sample[:, :1])], dim=1), []
        for i, level in enumerate(self.encoder):
            x = level.first(x) if i == 0 else level.first(x, time)                  # (B, C_level, h, w)
            skips.append(x)
            for block in level.blocks:
                x = block(x, time)
                skips.append(x)
        x = self.middle_1(self.middle_0(x, time), time)
        for level in self.decoder:
            x = x if level.first is None else level.first(x, time)
            for block in level.blocks:
                x = block(_join(x, skips.pop(), config.concat_balance), time)
        out = self.conv_out(x, self.gain_out)
        return UNet2DOutput(sample=out) if return_dict else (out,)

    def log_variance(self, timestep: Tensor) -> Tensor:
        """u(sigma), the logarithm of the variance of its error at each noise level: (B,) of log(sigma) / 4 -> (B,). It weighs the loss.

        Raises:
            ValueError: the network was built without.

        References: Karras et al. 2024, eq. 21
        """
        if self.logvar is None:
            raise ValueError("EDM2UNetModel.log_variance: this network was built with logvar_channels=0.")
        return self.logvar(self.logvar_time(timestep).to(self.logvar.weight.dtype))[:, 0]


_SIZES = {"xxs": 64, "xs": 128, "s": 192, "m": 256, "l": 320, "xl": 384, "xxl": 448}


def edm2(size: str = "s", num_class_embeds: int | None = 1000, **changes: object) -> EDM2UNetModel:
    """One of the published sizes, xxs to xxl, for latents of 64 x 64 with 4 channels; `changes` for another input.

    References: Karras et al. 2024, table 6, https://arxiv.org/abs/2312.02696
    """
    if size not in _SIZES:
        raise ValueError(f"edm2: size={size!r} is not known; use one of {', '.join(_SIZES)}.")
    return EDM2UNetModel(num_class_embeds=num_class_embeds, base_channels=_SIZES[size], **changes)
