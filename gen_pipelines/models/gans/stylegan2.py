"""StyleGAN2: a generator whose convolutions are modulated by styles, and its discriminator.

References: Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN", https://arxiv.org/abs/1912.04958 (section 2.2
weight demodulation, section 4.1 skip and residual architectures), https://arxiv.org/abs/2006.06676 (class conditioning, appendix)
"""

from __future__ import annotations

import math

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from ..base import ConfigMixin, GenerativeModel, ModelMixin
from ..layers.equalized import EqualizedConv2d, EqualizedLinear, leaky_relu_
from ..layers.modulated_conv import modulated_conv2d
from ..layers.upfirdn import downsample2d, fir_filter, upsample2d
from .base import DiscriminatorOutput, GeneratorOutput, Generators
from .mapping import MappingNetwork

__all__ = ["ConfigMixin", "ModelMixin", "StyleGAN2Discriminator", "StyleGAN2Generator"]

ARCHITECTURES = ("skip", "resnet", "orig")
NOISE = ("random", "const", "none")


def check_size(owner: str, sample_size: int) -> list[int]:
    """The resolutions 4, 8, ..., sample_size.

    Raises:
        ValueError: not a power of two from 8 up.
    """
    if sample_size < 8 or sample_size & (sample_size - 1):
        raise ValueError(f"{owner}: sample_size = {sample_size}; give a power of two from 8 up (pad other pictures, as the pipeline does).")
    return [2**i for i in range(2, sample_size.bit_length())]


class StyledConv(nn.Module):
    """Modulated convolution, noise, bias, leaky ReLU: (B, I, H, W), style (B, w_dim) -> (B, O, up H, up W)."""

    def __init__(
        self, in_channels: int, out_channels: int, w_dim: int, size: int, up: int, taps: tuple[float, ...], clamp: float | None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.affine = EqualizedLinear(w_dim, in_channels, bias_init=1.0)
        self.noise_strength = nn.Parameter(torch.zeros([]))
        self.register_buffer("noise_const", torch.randn(size, size))
        self.register_buffer("resample_filter", fir_filter(taps), persistent=False)
        self.size, self.up, self.clamp = size, up, clamp

    def forward(self, x: Tensor, w: Tensor, noise: str = "random", generator: Generators = None, gain: float = 1.0) -> Tensor:
        x = modulated_conv2d(x, self.weight, self.affine(w), up=self.up, resample_filter=self.resample_filter)
        if noise == "random":
            added = randn_tensor((len(x), 1, self.size, self.size), generator=generator, device=x.device)
            x = x.add_((added * self.noise_strength).to(x.dtype))
        elif noise == "const":
            x = x.add_((self.noise_const * self.noise_strength).to(x.dtype))
        x = x.add_(self.bias.to(x.dtype).view(-1, 1, 1))
        return leaky_relu_(x, math.sqrt(2) * gain, None if self.clamp is None else self.clamp * gain)


class ToRGB(nn.Module):
    """Pointwise modulated convolution without demodulation: (B, I, H, W), (B, w_dim) -> (B, out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, w_dim: int, clamp: float | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.affine = EqualizedLinear(w_dim, in_channels, bias_init=1.0)
        self.gain, self.clamp = 1 / math.sqrt(in_channels), clamp

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        x = modulated_conv2d(x, self.weight, self.affine(w) * self.gain, demodulate=False)
        x = x + self.bias.to(x.dtype).view(-1, 1, 1)
        return x if self.clamp is None else x.clamp(-self.clamp, self.clamp)


class SynthesisBlock(nn.Module):
    """One resolution: two styled convolutions (one at 4 x 4, on a learned constant), and the picture so far."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        size: int,
        picture_channels: int,
        architecture: str,
        last: bool,
        taps: tuple[float, ...],
        clamp: float | None,
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self.register_buffer("resample_filter", fir_filter(taps), persistent=False)
        if in_channels == 0:
            self.const = nn.Parameter(torch.randn(out_channels, size, size))
        else:
            self.conv0 = StyledConv(in_channels, out_channels, w_dim, size, 2, taps, clamp)
        self.conv1 = StyledConv(out_channels, out_channels, w_dim, size, 1, taps, clamp)
        self.num_conv, self.num_torgb = (1 if in_channels == 0 else 2), int(last or architecture == "skip")
        if self.num_torgb:
            self.torgb = ToRGB(out_channels, picture_channels, w_dim, clamp)
        if in_channels and architecture == "resnet":
            self.skip = _UpSkip(in_channels, out_channels, taps)

    def forward(
        self, x: Tensor | None, picture: Tensor | None, ws: Tensor, noise: str, generator: Generators, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        styles = iter(ws.unbind(1))
        if x is None:
            x = self.const.to(dtype).expand(len(ws), -1, -1, -1)                                       # (B, C, 4, 4)
            if x.device.type == "cpu":  # filters and transposed convolutions are several times faster there with the channels last
                x = x.contiguous(memory_format=torch.channels_last)
            x = self.conv1(x, next(styles), noise, generator)
        elif self.architecture == "resnet":
            skip = self.skip(x) * math.sqrt(0.5)
            x = self.conv0(x, next(styles), noise, generator)
            x = skip + self.conv1(x, next(styles), noise, generator, gain=math.sqrt(0.5))              # (B, C, 2 h, 2 w)
        else:
            x = self.conv0(x, next(styles), noise, generator)
            x = self.conv1(x, next(styles), noise, generator)                                          # (B, C, 2 h, 2 w)
        if picture is not None:
            picture = upsample2d(picture, self.resample_filter)
        if self.num_torgb:
            y = self.torgb(x, next(styles)).float()
            picture = y if picture is None else picture + y                                            # (B, 3, 2 h, 2 w)
        return x, picture


class _UpSkip(nn.Module):
    """Pointwise convolution and upsampling of a residual block."""

    def __init__(self, in_channels: int, out_channels: int, taps: tuple[float, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 1, 1))
        self.register_buffer("resample_filter", fir_filter(taps), persistent=False)
        self.gain = 1 / math.sqrt(in_channels)

    def forward(self, x: Tensor) -> Tensor:
        return upsample2d(nn.functional.conv2d(x, (self.weight * self.gain).to(x.dtype)), self.resample_filter)


class SynthesisNetwork(nn.Module):
    """Styles (B, num_ws, w_dim) to pictures (B, out, H, W)."""

    def __init__(
        self,
        w_dim: int,
        sizes: list[int],
        channels: dict[int, int],
        out_channels: int,
        architecture: str,
        taps: tuple[float, ...],
        clamp: float | None,
    ) -> None:
        super().__init__()
        self.sizes = sizes
        for size in sizes:
            smaller = 0 if size == 4 else channels[size // 2]
            block = SynthesisBlock(smaller, channels[size], w_dim, size, out_channels, architecture, size == sizes[-1], taps, clamp)
            setattr(self, f"b{size}", block)
        # the styles of a block's picture are those of the next block's first convolution, so they are counted once, at the end
        self.num_ws = sum(getattr(self, f"b{size}").num_conv for size in sizes) + 1

    def forward(self, ws: Tensor, noise: str = "random", generator: Generators = None) -> Tensor:
        dtype = self.b4.const.dtype
        x = picture = None
        first = 0
        for size in self.sizes:
            block = getattr(self, f"b{size}")
            mine = ws[:, first : first + block.num_conv + block.num_torgb].to(dtype)
            x, picture = block(x, picture, mine, noise, generator, dtype)
            first += block.num_conv
        return picture


class StyleGAN2Generator(GenerativeModel):
    """Noise to styles to pictures.

    Args:
        sample_size: height and width, a power of two.
        out_channels: 1 for grey, 3 for colour.
        z_dim, w_dim: dimensions of noise and styles.
        num_classes: None for no conditioning.
        channel_base, channel_max: channels at resolution r are min(channel_base / r, channel_max).
        num_mapping_layers: of the mapping network.
        architecture: "skip" (pictures of all resolutions are added), "resnet" or "orig".
        resample_taps: of the filters around every change of resolution.
        conv_clamp: limits activations, for half precision (256); None for no limit.
        w_avg_beta: decay of the average style.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        out_channels: int = 3,
        z_dim: int = 512,
        w_dim: int = 512,
        num_classes: int | None = None,
        channel_base: int = 16384,
        channel_max: int = 512,
        num_mapping_layers: int = 8,
        architecture: str = "skip",
        resample_taps: tuple[float, ...] = (1, 3, 3, 1),
        conv_clamp: float | None = None,
        w_avg_beta: float = 0.998,
    ) -> None:
        super().__init__()
        if architecture not in ARCHITECTURES:
            raise ValueError(f"StyleGAN2Generator: architecture {architecture!r} is none of {', '.join(ARCHITECTURES)}.")
        sizes = check_size("StyleGAN2Generator", sample_size)
        channels = {size: min(channel_base // size, channel_max) for size in sizes}
        self.synthesis = SynthesisNetwork(w_dim, sizes, channels, out_channels, architecture, tuple(resample_taps), conv_clamp)
        self.mapping = MappingNetwork(z_dim, num_classes, w_dim, num_mapping_layers, w_avg_beta=w_avg_beta)

    @property
    def num_ws(self) -> int:
        """How many layers take a style."""
        return self.synthesis.num_ws

    def map(self, z: Tensor, labels: Tensor | None = None, truncation: float = 1.0, cutoff: int | None = None) -> Tensor:
        """Styles of every layer, (B, num_ws, w_dim), of noise (B, z_dim): truncated towards the average, up to layer `cutoff`."""
        w = self.mapping(z, labels)
        return self.mapping.truncate(w[:, None].expand(-1, self.num_ws, -1), truncation, cutoff)

    def synthesize(self, ws: Tensor, noise: str = "random", generator: Generators = None) -> Tensor:
        """Pictures (B, C, H, W), about [-1, 1], of styles (B, num_ws, w_dim).

        Args:
            noise: "random" (from `generator`), "const" (the one stored with the layer) or "none".
        """
        if noise not in NOISE:
            raise ValueError(f"noise {noise!r} is none of {', '.join(NOISE)}.")
        if ws.ndim != 3 or ws.shape[1] != self.num_ws:
            raise ValueError(f"styles have shape {tuple(ws.shape)}; give (B, {self.num_ws}, {self.config.w_dim}).")
        return self.synthesis(ws, noise, generator)

    def forward(
        self,
        z: Tensor,
        labels: Tensor | None = None,
        truncation: float = 1.0,
        cutoff: int | None = None,
        noise: str = "random",
        generator: Generators = None,
        return_dict: bool = True,
    ) -> GeneratorOutput | tuple[Tensor]:
        """z: noise (B, z_dim); labels: (B,) where there are classes. Pictures in about [-1, 1], (B, C, H, W)."""
        sample = self.synthesize(self.map(z, labels, truncation, cutoff), noise, generator)
        return GeneratorOutput(sample=sample) if return_dict else (sample,)


class _DiscriminatorBlock(nn.Module):
    """(B, I, h, w) -> (B, O, h / 2, w / 2)."""

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        picture_channels: int,
        architecture: str,
        taps: tuple[float, ...],
        clamp: float | None,
    ) -> None:
        super().__init__()
        self.architecture, first = architecture, in_channels == 0
        if first or architecture == "skip":
            self.fromrgb = EqualizedConv2d(picture_channels, mid_channels, 1, activation="lrelu", clamp=clamp)
        self.conv0 = EqualizedConv2d(mid_channels, mid_channels, 3, activation="lrelu", clamp=clamp)
        self.conv1 = EqualizedConv2d(mid_channels, out_channels, 3, activation="lrelu", down=2, resample_taps=taps, clamp=clamp)
        if architecture == "resnet":
            self.skip = EqualizedConv2d(mid_channels, out_channels, 1, bias=False, down=2, resample_taps=taps)
        self.register_buffer("resample_filter", fir_filter(taps), persistent=False)

    def forward(self, x: Tensor | None, picture: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if x is None or self.architecture == "skip":
            y = self.fromrgb(picture)
            x = y if x is None else x + y
            picture = downsample2d(picture, self.resample_filter) if self.architecture == "skip" else None
        if self.architecture == "resnet":
            skip = self.skip(x, gain=math.sqrt(0.5))
            return skip + self.conv1(self.conv0(x), gain=math.sqrt(0.5)), picture
        return self.conv1(self.conv0(x)), picture


def minibatch_std(x: Tensor, group_size: int, channels: int = 1) -> Tensor:
    """Appends the mean deviation of features over groups of pictures, (B, C, H, W) -> (B, C + F, H, W): a batch without variety shows.

    The groups are strided (picture i is grouped with i + B / group_size, ...), and within one process.

    References: Karras et al. 2018, section 3, https://arxiv.org/abs/1710.10196
    """
    batch, width, height_, width_ = x.shape
    group = min(group_size, batch)
    while batch % group:  # the largest group that divides the batch
        group -= 1
    y = x.float().reshape(group, -1, channels, width // channels, height_, width_)
    y = (y - y.mean(0)).square().mean(0)                                                               # (n, F, C / F, H, W)
    y = (y + 1e-8).sqrt().mean((2, 3, 4))                                                              # (n, F)
    y = y.reshape(-1, channels, 1, 1).repeat(group, 1, height_, width_)
    return torch.cat([x, y.to(x.dtype)], dim=1)


class _Epilogue(nn.Module):
    """(B, C, 4, 4) -> (B,) logits, or features that are projected on the class's vector."""

    def __init__(
        self,
        channels: int,
        cmap_dim: int,
        group_size: int | None,
        std_channels: int,
        picture_channels: int,
        architecture: str,
        clamp: float | None,
    ) -> None:
        super().__init__()
        self.group_size, self.cmap_dim, self.architecture = group_size, cmap_dim, architecture
        self.std_channels = 0 if group_size == 1 else std_channels
        if architecture == "skip":
            self.fromrgb = EqualizedConv2d(picture_channels, channels, 1, activation="lrelu")
        self.conv = EqualizedConv2d(channels + self.std_channels, channels, 3, activation="lrelu", clamp=clamp)
        self.fc = EqualizedLinear(channels * 16, channels, activation="lrelu")
        self.out = EqualizedLinear(channels, cmap_dim or 1)

    def forward(self, x: Tensor, picture: Tensor | None, cmap: Tensor | None) -> Tensor:
        if self.architecture == "skip":
            x = x + self.fromrgb(picture)
        if self.std_channels:
            x = minibatch_std(x, self.group_size or len(x), self.std_channels)
        x = self.out(self.fc(self.conv(x).flatten(1)).float())                                         # (B, cmap_dim or 1)
        return x.squeeze(1) if cmap is None else (x * cmap).sum(1) / math.sqrt(self.cmap_dim)


class StyleGAN2Discriminator(GenerativeModel):
    """Pictures to logits; StyleGAN3 uses the same.

    Args:
        architecture: "resnet", "skip" or "orig".
        mbstd_group_size: pictures in a group of the minibatch deviation, None for the whole batch; 1 turns it off.
        mbstd_num_channels: channels of it, each from a share of the features; 0 turns it off.
        cmap_dim: dimensions of the class's vector; as many as the features have by default.
        the rest: as in `StyleGAN2Generator`; `num_mapping_layers` is of the mapping of classes.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 3,
        num_classes: int | None = None,
        channel_base: int = 16384,
        channel_max: int = 512,
        architecture: str = "resnet",
        mbstd_group_size: int | None = 4,
        num_mapping_layers: int = 8,
        resample_taps: tuple[float, ...] = (1, 3, 3, 1),
        conv_clamp: float | None = None,
        mbstd_num_channels: int = 1,
        cmap_dim: int | None = None,
    ) -> None:
        super().__init__()
        if architecture not in ARCHITECTURES:
            raise ValueError(f"StyleGAN2Discriminator: architecture {architecture!r} is none of {', '.join(ARCHITECTURES)}.")
        self.sizes = check_size("StyleGAN2Discriminator", sample_size)[:0:-1]
        channels = {size: min(channel_base // size, channel_max) for size in [*self.sizes, 4]}
        for size in self.sizes:
            incoming = 0 if size == sample_size else channels[size]
            block = _DiscriminatorBlock(
                incoming, channels[size], channels[size // 2], in_channels, architecture, tuple(resample_taps), conv_clamp
            )
            setattr(self, f"b{size}", block)
        cmap_dim = 0 if num_classes is None else cmap_dim or channels[4]
        self.b4 = _Epilogue(channels[4], cmap_dim, mbstd_group_size, mbstd_num_channels, in_channels, architecture, conv_clamp)
        if num_classes is not None:
            self.mapping = MappingNetwork(0, num_classes, cmap_dim, num_mapping_layers, w_avg_beta=None)

    def forward(self, x: Tensor, labels: Tensor | None = None, return_dict: bool = True) -> DiscriminatorOutput | tuple[Tensor]:
        """x: pictures (B, C, H, W); labels: (B,) where there are classes. Logits (B,)."""
        if labels is not None and self.config.num_classes is None:
            raise ValueError("StyleGAN2Discriminator: this network was built without classes (num_classes=None); leave the labels out.")
        cmap = None if self.config.num_classes is None else self.mapping(None, labels)
        features, picture = None, x
        for size in self.sizes:
            features, picture = getattr(self, f"b{size}")(features, picture)                           # (B, C', h / 2, w / 2)
        logits = self.b4(features, picture, cmap)                                                      # (B,)
        return DiscriminatorOutput(logits=logits) if return_dict else (logits,)
