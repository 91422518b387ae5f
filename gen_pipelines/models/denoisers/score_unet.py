"""The U-Net of score-based models: NCSN++, DDPM++ and, with its plain blocks, DDPM's."""

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
from ..layers.upfirdn import downsample2d, fir_filter, upfirdn2d, upsample2d
from .base import check_class_labels

__all__ = ["ConfigMixin", "ModelMixin", "ScoreUNetModel", "ddpmpp", "ncsnpp", "ncsnpp_large"]

TIME_EMBEDDINGS = ("positional", "fourier")
TIME_TRANSFORMS = ("none", "log", "geometric")
BLOCK_TYPES = ("biggan", "ddpm")
INPUT_PYRAMIDS = ("none", "input_skip", "residual")
OUTPUT_PYRAMIDS = ("none", "output_skip", "residual")
FOURIER_DEVIATION = 16.0  # of the random frequencies


def _xavier(layer: nn.Module) -> nn.Module:
    """DDPM's initialisation: uniform, with the mean of both fans."""
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _zero(layer: nn.Module) -> nn.Module:
    """The last layer of a residual branch begins at zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _conv(in_channels: int, out_channels: int, kernel_size: int = 3, zero: bool = False) -> nn.Module:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
    return _zero(conv) if zero else _xavier(conv)


class _Resampling(nn.Module):
    """(B, C, H, W) to twice or half the size, with a filter; without taps nearest neighbours, and means of 2 x 2."""

    def __init__(self, direction: str, taps: Sequence[float] | None) -> None:
        super().__init__()
        self.direction = direction
        self.register_buffer("taps", None if taps is None else fir_filter(taps), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.taps is None:
            return F.avg_pool2d(x, 2) if self.direction == "down" else F.interpolate(x, scale_factor=2, mode="nearest")
        return downsample2d(x, self.taps) if self.direction == "down" else upsample2d(x, self.taps)


class _StridedConv(nn.Module):
    """(B, I, H, W) -> (B, O, H / 2, W / 2): a 3 x 3 convolution at every second pixel, after a filter where there are taps."""

    def __init__(self, in_channels: int, out_channels: int, taps: Sequence[float] | None) -> None:
        super().__init__()
        self.conv = _xavier(nn.Conv2d(in_channels, out_channels, 3, stride=2))
        self.register_buffer("taps", None if taps is None else fir_filter(taps), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.taps is None:
            return self.conv(F.pad(x, (0, 1, 0, 1)))
        width = len(self.taps)  # what filter and convolution need on both sides is padded at once, before the filter
        return self.conv(upfirdn2d(x, self.taps, padding=((width + 1) // 2, width // 2)))


class _UpConv(nn.Module):
    """(B, I, H, W) -> (B, O, 2 H, 2 W): nearest neighbours, then a 3 x 3 convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = _conv(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class _Block(nn.Module):
    """The residual block, (B, I, H, W) -> (B, O, H', W'), that changes the size too where it is told a direction."""

    def __init__(
        self, in_channels: int, out_channels: int, time_channels: int, dropout: float, groups: int, gain: float,
        direction: str | None = None, taps: Sequence[float] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.gain = gain
        self.norm_0 = _norm(in_channels, groups)
        self.conv_0 = _conv(in_channels, out_channels)
        self.time = _xavier(nn.Linear(time_channels, out_channels))
        self.norm_1 = _norm(out_channels, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv_1 = _conv(out_channels, out_channels, zero=True)
        self.resample = None if direction is None else _Resampling(direction, taps)
        self.shortcut = None if direction is None and in_channels == out_channels else _conv(in_channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = F.silu(self.norm_0(x))                                                  # (B, I, H, W)
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)                               # (B, I, H', W')
        h = self.conv_0(h) + self.time(time)[:, :, None, None]                      # (B, O, H', W')
        h = self.conv_1(self.dropout(F.silu(self.norm_1(h))))
        return (h + (x if self.shortcut is None else self.shortcut(x))) * self.gain


class _Attention(nn.Module):
    """Self-attention of one head over all pixels, with a residual: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, groups: int, gain: float) -> None:
        super().__init__()
        self.gain = gain
        self.norm = _norm(channels, groups)
        self.to_q, self.to_k, self.to_v = (_xavier(nn.Linear(channels, channels)) for _ in range(3))
        self.to_out = _zero(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)                            # (B, H W, C)
        h = F.scaled_dot_product_attention(
            self.to_q(tokens)[:, None], self.to_k(tokens)[:, None], self.to_v(tokens)[:, None]
        )[:, 0]                                                                     # (B, H W, C)
        return (x + self.to_out(h).transpose(1, 2).reshape(x.shape)) * self.gain


def _norm(channels: int, smallest_group: int) -> nn.GroupNorm:
    return nn.GroupNorm(max(1, min(channels // smallest_group, 32)), channels, eps=1e-6)


class _EncoderLevel(nn.Module):
    """The blocks of one resolution, and the way to the next one.

    Attributes:
        blocks, attentions: in turn; no attentions at most resolutions.
        down: to half the size; None at the last resolution.
        pyramid_down, pyramid: of the shrunken input, its resampling and how it comes to the channels of this level.
    """

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.attentions = nn.ModuleList(), nn.ModuleList()
        self.down: nn.Module | None = None
        self.pyramid_down: nn.Module | None = None
        self.pyramid: nn.Module | None = None


class _DecoderLevel(nn.Module):
    """The blocks of one resolution, and the way to the next finer one.

    Attributes:
        attention: behind the last block; None at most resolutions.
        pyramid_up, norm, conv: of the growing output: its resampling, and what this level adds to it.
        up: to twice the size; None at the finest resolution.
    """

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        self.attention: nn.Module | None = None
        self.pyramid_up: nn.Module | None = None
        self.norm: nn.Module | None = None
        self.conv: nn.Module | None = None
        self.up: nn.Module | None = None


class ScoreUNetModel(GenerativeModel):
    """The U-Net of score-based generative models.

    DDPM++ is BigGAN's residual blocks, rescaled skips and a positional embedding of the time; NCSN++ adds filtered resampling, a pyramid of
    the input that is added to the encoder, and random Fourier features of log sigma. EDM trains both with two or three resolutions.

    Args:
        sample_size: height and width of a picture.
        in_channels, out_channels: of a picture.
        num_class_embeds: rows of the table of classes; None for a network without.
        base_channels: of the first convolution, and of the embedding of the time.
        block_out_channels: at each resolution, the finest first.
        layers_per_block: residual blocks at each resolution of the encoder; the decoder has one more.
        attention_resolutions: sizes at which there is attention: behind each block of the encoder, behind the last of the decoder.
        dropout: in the blocks.
        block_type: "biggan" (the blocks resample) or "ddpm" (a convolution with a stride; nearest neighbours and a convolution).
        resample_taps: the filter of all resampling, (1, 3, 3, 1) in NCSN++; None for means of 2 x 2 and nearest neighbours.
        input_pyramid: "none", "input_skip" (the shrunken input goes through a 1 x 1 convolution) or "residual" (it is carried along).
        combine: how "input_skip" joins: "sum", or "cat" of the channels.
        output_pyramid: "none", "output_skip" (each resolution adds to the output) or "residual" (a running sum is carried along).
        skip_rescale: every sum of a branch and its residual is divided by the square root of 2.
        smallest_group: group normalisation has 32 groups, or fewer, so that a group has at least this many channels.
        time_embedding: "positional" (sines and cosines of DDPM) or "fourier" (random frequencies).
        time_channels: how many sines and cosines; None for base_channels, and twice that with "fourier".
        embedding_mult: the embedding is this many times base_channels wide.
        time_scale: multiplies the time that the network is given, first of all.
        smallest_time: what less (of the scaled time) counts as; None for no limit. Rectified flows were never told less than 0.999.
        time_transform: then "none", "log", or "geometric": the number of a noise level in the geometric sequence from `sigma_range[1]` (0)
            down to `sigma_range[0]` (num_scales - 1), as networks know it that were trained on such a sequence.
        sigma_range, num_scales: of "geometric".
        divide_by_time: the output is divided by the (scaled) time; a score then, where that is sigma.

    Raises:
        ValueError: a name that is not known, or options that do not go together.

    References: Song et al. 2021, section 4.4 and appendix H, https://arxiv.org/abs/2011.13456; Karras et al. 2022, appendix F.1 and table
    7, https://arxiv.org/abs/2206.00364; Ho et al. 2020, appendix B, https://arxiv.org/abs/2006.11239 (the blocks "ddpm")
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 3,
        out_channels: int = 3,
        num_class_embeds: int | None = None,
        base_channels: int = 128,
        block_out_channels: Sequence[int] = (128, 256, 256, 256),
        layers_per_block: int = 4,
        attention_resolutions: Sequence[int] = (16,),
        dropout: float = 0.1,
        block_type: str = "biggan",
        resample_taps: Sequence[float] | None = None,
        input_pyramid: str = "none",
        combine: str = "sum",
        output_pyramid: str = "none",
        skip_rescale: bool = True,
        smallest_group: int = 4,
        time_embedding: str = "positional",
        time_channels: int | None = None,
        embedding_mult: int = 4,
        time_scale: float = 1.0,
        smallest_time: float | None = None,
        time_transform: str = "none",
        sigma_range: Sequence[float] | None = None,
        num_scales: int | None = None,
        divide_by_time: bool = False,
    ) -> None:
        super().__init__()
        _check_choices(
            time_embedding=(time_embedding, TIME_EMBEDDINGS), time_transform=(time_transform, TIME_TRANSFORMS),
            block_type=(block_type, BLOCK_TYPES), input_pyramid=(input_pyramid, INPUT_PYRAMIDS),
            output_pyramid=(output_pyramid, OUTPUT_PYRAMIDS), combine=(combine, ("sum", "cat")),
        )  # fmt: skip
        taps = None if resample_taps is None else tuple(resample_taps)
        if taps is not None and (block_type == "ddpm" or output_pyramid == "residual"):
            what = "block_type='ddpm'" if block_type == "ddpm" else "output_pyramid='residual'"
            raise ValueError(f"ScoreUNetModel: {what} upsamples without a filter; leave resample_taps out.")
        if time_transform == "geometric" and (sigma_range is None or num_scales is None):
            raise ValueError("ScoreUNetModel: time_transform='geometric' needs sigma_range=(smallest, largest) and num_scales.")
        if sample_size % 2 ** (len(block_out_channels) - 1):
            raise ValueError(
                f"ScoreUNetModel: sample_size={sample_size} cannot be halved {len(block_out_channels) - 1} times, once for each resolution "
                "after the first; give another size, or fewer block_out_channels."
            )
        self.gain = math.sqrt(0.5) if skip_rescale else 1.0

        # 1. The time and the class
        width = base_channels * embedding_mult
        sines = time_channels or base_channels * (2 if time_embedding == "fourier" else 1)
        self.num_sines = sines
        if time_embedding == "fourier":
            self.register_buffer("frequencies", torch.randn(sines // 2) * (2 * math.pi * FOURIER_DEVIATION))
        self.time_0, self.time_1 = _xavier(nn.Linear(sines, width)), _xavier(nn.Linear(width, width))
        self.class_embedding = None if num_class_embeds is None else nn.Embedding(num_class_embeds, sines)

        # 2. The encoder
        options = {"time_channels": width, "dropout": dropout, "groups": smallest_group, "gain": self.gain}
        self.conv_in = _conv(in_channels, base_channels)
        channels, pyramid_channels, skips = base_channels, in_channels, [base_channels]
        last = len(block_out_channels) - 1
        sizes = [sample_size >> i for i in range(last + 1)]
        self.encoder = nn.ModuleList()
        for i, (size, out) in enumerate(zip(sizes, block_out_channels, strict=True)):
            level = _EncoderLevel()
            for _ in range(layers_per_block):
                level.blocks.append(_Block(channels, out, **options))
                channels = out
                if size in attention_resolutions:
                    level.attentions.append(_Attention(channels, smallest_group, self.gain))
                skips.append(channels)
            if i < last:
                if block_type == "ddpm":
                    level.down = _StridedConv(channels, channels, None)
                else:
                    level.down = _Block(channels, channels, **options, direction="down", taps=taps)
                if input_pyramid == "input_skip":
                    level.pyramid_down = _Resampling("down", taps)
                    level.pyramid = _conv(pyramid_channels, channels, 1)
                    channels = 2 * channels if combine == "cat" else channels
                elif input_pyramid == "residual":
                    level.pyramid_down = _StridedConv(pyramid_channels, channels, taps)
                    pyramid_channels = channels
                skips.append(channels)
            self.encoder.append(level)

        # 3. The middle
        self.middle_0 = _Block(channels, channels, **options)
        self.middle_attention = _Attention(channels, smallest_group, self.gain)
        self.middle_1 = _Block(channels, channels, **options)

        # 4. The decoder
        self.decoder = nn.ModuleList()
        for i in reversed(range(last + 1)):
            level, out = _DecoderLevel(), block_out_channels[i]
            for _ in range(layers_per_block + 1):
                level.blocks.append(_Block(channels + skips.pop(), out, **options))
                channels = out
            if sizes[i] in attention_resolutions:
                level.attention = _Attention(channels, smallest_group, self.gain)
            if output_pyramid == "output_skip":
                level.pyramid_up = None if i == last else _Resampling("up", taps)
                level.norm, level.conv = _norm(channels, smallest_group), _conv(channels, out_channels, zero=True)
            elif output_pyramid == "residual":
                if i == last:
                    level.norm, level.conv = _norm(channels, smallest_group), _conv(channels, channels)
                else:
                    level.pyramid_up = _UpConv(pyramid_channels, channels)
                pyramid_channels = channels
            if i > 0:
                if block_type == "ddpm":
                    level.up = _UpConv(channels, channels)
                else:
                    level.up = _Block(channels, channels, **options, direction="up", taps=taps)
            self.decoder.append(level)
        if output_pyramid != "output_skip":
            self.norm_out, self.conv_out = _norm(channels, smallest_group), _conv(channels, out_channels, zero=True)

    def scale_time(self, timestep: Tensor) -> Tensor:
        """The time as it is embedded, before it is transformed: (B,) -> (B,), float64 (float32 where there is none)."""
        t = timestep.to(torch.float32 if timestep.device.type == "mps" else torch.float64) * self.config.time_scale
        return t if self.config.smallest_time is None else t.clamp_min(self.config.smallest_time)

    def embed_time(self, timestep: Tensor) -> Tensor:
        """Sines, then cosines, of the (scaled and transformed) time: (B,) -> (B, num_sines), float32."""
        config = self.config
        t = self.scale_time(timestep)  # wide: a geometric index is the logarithm of sigma times a hundred
        if config.time_transform == "log":
            t = t.log()
        elif config.time_transform == "geometric":
            low, high = config.sigma_range
            t = (math.log(high) - t.log()) * ((config.num_scales - 1) / (math.log(high) - math.log(low)))
        if config.time_embedding == "fourier":
            frequencies = self.frequencies.float()
        else:
            half = self.num_sines // 2
            frequencies = torch.exp(torch.arange(half, device=t.device, dtype=torch.float32) * (-math.log(10000.0) / max(half - 1, 1)))
        angles = t.float()[:, None] * frequencies
        return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, self.num_sines % 2))

    def forward(
        self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> UNet2DOutput | tuple[Tensor]:
        """The raw prediction for noisy pictures.

        Args:
            sample: shape (B, C, H, W).
            timestep: what the network is given for the time, a number or (B,): see `time_transform`.
            class_labels: (B,), where there are classes.
        Returns: `.sample`, (B, C', H, W).
        Raises:
            ValueError: labels for a network without classes, or none for one with.
        """
        check_class_labels(self, class_labels, self.class_embedding is not None)
        config = self.config
        t = torch.as_tensor(timestep, device=sample.device)
        t = t.expand(len(sample)) if t.ndim == 0 else t
        time = self.embed_time(t).to(sample.dtype)                                  # (B, sines)
        if class_labels is not None:
            time = time + self.class_embedding(class_labels)
        time = F.silu(self.time_1(F.silu(self.time_0(time))))                       # (B, D), and the activation in front of each block

        # the encoder, with the shrinking input beside it
        h, pyramid = self.conv_in(sample), sample
        skips = [h]
        for level in self.encoder:
            for i, block in enumerate(level.blocks):
                h = block(h, time)                                                  # (B, C_level, h, w)
                if len(level.attentions):
                    h = level.attentions[i](h)
                skips.append(h)
            if level.down is None:
                continue
            h = level.down(h) if config.block_type == "ddpm" else level.down(h, time)
            if config.input_pyramid != "none":
                pyramid = level.pyramid_down(pyramid)
            if config.input_pyramid == "input_skip":
                more = level.pyramid(pyramid)
                h = h + more if config.combine == "sum" else torch.cat([more, h], dim=1)
            elif config.input_pyramid == "residual":
                h = pyramid = (pyramid + h) * self.gain
            skips.append(h)

        h = self.middle_1(self.middle_attention(self.middle_0(h, time)), time)

        # the decoder, with the growing output beside it
        pyramid = None
        for level in self.decoder:
            for block in level.blocks:
                h = block(torch.cat([h, skips.pop()], dim=1), time)
            if level.attention is not None:
                h = level.attention(h)
            if config.output_pyramid == "output_skip":
                more = level.conv(F.silu(level.norm(h)))                            # (B, C', h, w)
                pyramid = more if pyramid is None else level.pyramid_up(pyramid) + more
            elif config.output_pyramid == "residual":
                if pyramid is None:
                    pyramid = level.conv(F.silu(level.norm(h)))
                else:
                    h = pyramid = (level.pyramid_up(pyramid) + h) * self.gain
            if level.up is not None:
                h = level.up(h) if config.block_type == "ddpm" else level.up(h, time)
        out = pyramid if config.output_pyramid == "output_skip" else self.conv_out(F.silu(self.norm_out(h)))
        if config.divide_by_time:
            out = out / self.scale_time(t).to(out.dtype)[:, None, None, None]
        return UNet2DOutput(sample=out) if return_dict else (out,)


def _check_choices(**given: tuple[str, tuple[str, ...]]) -> None:
    for name, (value, allowed) in given.items():
        if value not in allowed:
            raise ValueError(f"ScoreUNetModel: {name}={value!r} is not known; use one of {', '.join(allowed)}.")


def ddpmpp(deep: bool = False) -> ScoreUNetModel:
    """DDPM++ for CIFAR-10, of VP and sub-VP: 62 million parameters; twice the depth with `deep`.

    References: Song et al. 2021, section 4.4, https://arxiv.org/abs/2011.13456
    """
    return ScoreUNetModel(layers_per_block=8 if deep else 4)


def ncsnpp(deep: bool = False) -> ScoreUNetModel:
    """NCSN++ for CIFAR-10, of VE: -eps at sigma, for pictures in [-1, 1]; 63 million parameters; twice the depth with `deep`.

    References: Song et al. 2021, section 4.4, https://arxiv.org/abs/2011.13456
    """
    return ScoreUNetModel(
        layers_per_block=8 if deep else 4, resample_taps=(1, 3, 3, 1), input_pyramid="residual", time_embedding="fourier",
        time_scale=0.5, time_transform="log",
    )  # fmt: skip


def ncsnpp_large(sample_size: int = 256) -> ScoreUNetModel:
    """NCSN++ for pictures of 256 or 1024 pixels: pyramids of the input and of the output.

    References: Song et al. 2021, appendix H.3, https://arxiv.org/abs/2011.13456
    """
    sizes = {256: (128, (1, 1, 2, 2, 2, 2, 2), 2), 1024: (16, (1, 2, 4, 8, 16, 32, 32, 32), 1)}
    if sample_size not in sizes:
        raise ValueError(f"ncsnpp_large: sample_size={sample_size}; published are 256 and 1024.")
    base, mults, layers = sizes[sample_size]
    return ScoreUNetModel(
        sample_size=sample_size, base_channels=base, block_out_channels=tuple(base * mult for mult in mults), layers_per_block=layers,
        dropout=0.0, resample_taps=(1, 3, 3, 1), input_pyramid="input_skip", output_pyramid="output_skip", time_embedding="fourier",
        time_scale=0.5, time_transform="log",
    )  # fmt: skip
