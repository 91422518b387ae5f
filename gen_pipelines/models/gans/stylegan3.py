"""StyleGAN3: an alias-free generator, equivariant to translation (T) and to rotation as well (R).

Every layer treats its feature maps as samples of a continuous signal of limited bandwidth: the non-linearity acts at twice the rate and
is filtered, the constant is a sum of Fourier features, noise and skips are gone. `StyleGAN2Discriminator` is its discriminator.

References: Karras et al. 2021, "Alias-Free Generative Adversarial Networks", https://arxiv.org/abs/2106.12423 (section 3.2 and figure 4;
appendix C filters, appendix G configurations)
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ..base import ConfigMixin, GenerativeModel, ModelMixin
from ..layers.equalized import EqualizedLinear
from ..layers.filter_design import lowpass
from ..layers.filtered_lrelu import filtered_lrelu
from ..layers.modulated_conv import modulated_conv2d
from ..layers.ranks import mean_over_ranks, num_ranks
from .base import GeneratorOutput, Generators
from .mapping import MappingNetwork

__all__ = ["ConfigMixin", "ModelMixin", "StyleGAN3Generator"]

MAGNITUDE_HALF_LIFE = 20_000  # pictures after which a layer's average has half forgotten what its inputs' power was


class FourierInput(nn.Module):
    """The continuous input signal: sines of fixed random frequencies, moved and turned by a style, sampled on the first layer's grid.

    `transform` (3, 3) is a user's own motion of the picture's plane: pixel centres at -0.5 to 0.5, applied to where the signal is read.
    """

    def __init__(self, w_dim: int, channels: int, size: int, rate: float, bandwidth: float) -> None:
        super().__init__()
        self.size, self.rate, self.bandwidth = size, rate, bandwidth
        # uniform over the disc of frequencies below the bandwidth: 1 - exp(-r^2 / 2) of the radius of two normals is uniform
        frequencies = torch.randn(channels, 2)
        radii = frequencies.square().sum(1, keepdim=True).sqrt()
        frequencies = frequencies / radii * (1 - (-radii.square() / 2).exp()).sqrt() * bandwidth
        self.weight = nn.Parameter(torch.randn(channels, channels))
        self.affine = EqualizedLinear(w_dim, 4, weight_init=0.0)
        self.affine.bias = nn.Parameter(torch.tensor([1.0, 0.0, 0.0, 0.0]))  # no turn, no shift
        self.register_buffer("transform", torch.eye(3))
        self.register_buffer("freqs", frequencies)
        self.register_buffer("phases", torch.rand(channels) - 0.5)

    def forward(self, w: Tensor) -> Tensor:
        """w: (B, w_dim). Returns (B, C, size, size)."""
        cosine_sine_shift = self.affine(w.float())
        cosine_sine_shift = cosine_sine_shift / cosine_sine_shift[:, :2].norm(dim=1, keepdim=True)     # (B, 4)
        cosine, sine, dx, dy = cosine_sine_shift.unbind(1)
        zero, one = torch.zeros_like(dx), torch.ones_like(dx)
        turn = torch.stack([cosine, -sine, zero, sine, cosine, zero, zero, zero, one], 1).view(-1, 3, 3)
        move = torch.stack([one, zero, -dx, zero, one, -dy, zero, zero, one], 1).view(-1, 3, 3)
        motion = turn @ move @ self.transform                                                          # (B, 3, 3)
        phases = self.phases + (self.freqs @ motion[:, :2, 2:]).squeeze(2)                             # (B, C)
        frequencies = self.freqs @ motion[:, :2, :2]                                                   # (B, C, 2)
        # what a motion pushes beyond the sampling limit is faded out
        amplitudes = (1 - (frequencies.norm(dim=2) - self.bandwidth) / (self.rate / 2 - self.bandwidth)).clamp(0, 1)
        scale = 0.5 * self.size / self.rate
        theta = torch.tensor([[[scale, 0.0, 0.0], [0.0, scale, 0.0]]], device=w.device)
        grid = F.affine_grid(theta, [1, 1, self.size, self.size], align_corners=False)                 # (1, H, W, 2)
        x = torch.einsum("hwk,bck->bhwc", grid[0], frequencies) + phases[:, None, None]
        x = torch.sin(2 * math.pi * x) * amplitudes[:, None, None]
        return (x @ self.weight.T / math.sqrt(self.weight.shape[1])).permute(0, 3, 1, 2)               # (B, C, H, W)


class AliasFreeLayer(nn.Module):
    """Modulated convolution and filtered leaky ReLU between two sampling rates: (B, I, s, s) -> (B, O, s', s').

    Args:
        rates, cutoffs, half_widths, sizes: of the input's and the output's signals.
    """

    def __init__(
        self,
        w_dim: int,
        channels: tuple[int, int],
        sizes: tuple[int, int],
        rates: tuple[float, float],
        cutoffs: tuple[float, float],
        half_widths: tuple[float, float],
        is_torgb: bool,
        critical: bool,
        kernel: int,
        filter_size: int,
        lrelu_upsampling: int,
        radial: bool,
        clamp: float | None,
    ) -> None:
        super().__init__()
        self.is_torgb, self.kernel, self.clamp = is_torgb, (1 if is_torgb else kernel), clamp
        between = max(rates) * (1 if is_torgb else lrelu_upsampling)
        self.up, self.down = round(between / rates[0]), round(between / rates[1])
        up_taps = filter_size * self.up if self.up > 1 and not is_torgb else 1
        down_taps = filter_size * self.down if self.down > 1 and not is_torgb else 1
        self.weight = nn.Parameter(torch.randn(channels[1], channels[0], self.kernel, self.kernel))
        self.bias = nn.Parameter(torch.zeros(channels[1]))
        self.affine = EqualizedLinear(w_dim, channels[0], bias_init=1.0)
        self.register_buffer("magnitude_ema", torch.ones([]))
        self.register_buffer("up_filter", lowpass(up_taps, cutoffs[0], 2 * half_widths[0], between))
        # the last layers, sampled critically, cannot be radial: the corners of their spectra are in use
        self.register_buffer("down_filter", lowpass(down_taps, cutoffs[1], 2 * half_widths[1], between, radial and not critical))
        padding = (sizes[1] - 1) * self.down + 1 - (sizes[0] + self.kernel - 1) * self.up + up_taps + down_taps - 2
        before = (padding + self.up) // 2
        self.padding = (before, padding - before)

    def forward(self, x: Tensor, w: Tensor, update_average: bool = False) -> Tensor:
        if update_average:
            self._follow(x.detach())
        style = self.affine(w)
        if self.is_torgb:
            style = style / math.sqrt(self.weight[0].numel())
        x = modulated_conv2d(
            x, self.weight, style, not self.is_torgb, padding=self.kernel - 1, input_gain=self.magnitude_ema.rsqrt()
        )
        gain, slope = (1.0, 1.0) if self.is_torgb else (math.sqrt(2), 0.2)
        return filtered_lrelu(x, self.up_filter, self.down_filter, self.bias, self.up, self.down, self.padding, gain, slope, self.clamp)

    def _follow(self, x: Tensor) -> None:
        """Moves the average of E[x^2], over all processes, which divides what comes in (the paper's configuration C)."""
        power, images = mean_over_ranks(x.float().square().mean()), len(x) * num_ranks()
        self.magnitude_ema.lerp_(power.to(self.magnitude_ema), 1 - 0.5 ** (images / MAGNITUDE_HALF_LIFE))


class AliasFreeSynthesis(nn.Module):
    """Styles (B, num_ws, w_dim) to pictures (B, out, H, W)."""

    def __init__(
        self,
        w_dim: int,
        sample_size: int,
        out_channels: int,
        channel_base: int,
        channel_max: int,
        num_layers: int,
        num_critical: int,
        first_cutoff: float,
        first_stopband: float,
        last_stopband_rel: float,
        margin_size: int,
        output_scale: float,
        kernel: int,
        filter_size: int,
        lrelu_upsampling: int,
        radial: bool,
        clamp: float | None,
    ) -> None:
        super().__init__()
        self.num_ws, self.output_scale = num_layers + 2, output_scale
        last_cutoff = sample_size / 2
        progress = [min(i / (num_layers - num_critical), 1.0) for i in range(num_layers + 1)]
        cutoffs = [first_cutoff * (last_cutoff / first_cutoff) ** p for p in progress]
        last_stopband = last_cutoff * last_stopband_rel
        stopbands = [first_stopband * (last_stopband / first_stopband) ** p for p in progress]
        rates = [2.0 ** math.ceil(math.log2(min(2 * stopband, sample_size))) for stopband in stopbands]
        half_widths = [max(s, r / 2) - c for s, r, c in zip(stopbands, rates, cutoffs, strict=True)]
        sizes = [int(rate) + 2 * margin_size for rate in rates]
        sizes[-2:] = [sample_size] * 2
        channels = [round(min(channel_base / 2 / cutoff, channel_max)) for cutoff in cutoffs]
        channels[-1] = out_channels
        self.input = FourierInput(w_dim, channels[0], sizes[0], rates[0], cutoffs[0])
        self.layer_names = []
        for i in range(num_layers + 1):
            ends = (max(i - 1, 0), i)
            layer = AliasFreeLayer(
                w_dim,
                *(tuple(values[end] for end in ends) for values in (channels, sizes, rates, cutoffs, half_widths)),
                is_torgb=i == num_layers,
                critical=i >= num_layers - num_critical,
                kernel=kernel,
                filter_size=filter_size,
                lrelu_upsampling=lrelu_upsampling,
                radial=radial,
                clamp=clamp,
            )
            self.layer_names.append(f"L{i}_{sizes[i]}_{channels[i]}")
            setattr(self, self.layer_names[-1], layer)

    def forward(self, ws: Tensor, update_average: bool = False) -> Tensor:
        x = self.input(ws[:, 0]).to(self.input.weight.dtype)                                           # (B, C0, s0, s0)
        for name, w in zip(self.layer_names, ws[:, 1:].unbind(1), strict=True):
            x = getattr(self, name)(x, w.to(x.dtype), update_average)                                  # (B, C', s', s')
        return x.float() * self.output_scale                                                           # (B, out, H, W)


class StyleGAN3Generator(GenerativeModel):
    """Noise to styles to pictures, without aliasing.

    Args:
        variant: "t" (3 x 3 convolutions, separable filters) or "r" (1 x 1 convolutions, radial filters, twice the channels).
        channel_base, channel_max: channels at resolution r are min(channel_base / r, channel_max), doubled for "r".
        num_layers: without the last, which makes the colours; the last `num_critical` are sampled critically.
        first_cutoff, first_stopband, last_stopband_rel, margin_size, filter_size, lrelu_upsampling: section 3.2 of the paper.
        the rest: as in `StyleGAN2Generator`.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        out_channels: int = 3,
        z_dim: int = 512,
        w_dim: int = 512,
        num_classes: int | None = None,
        variant: str = "t",
        channel_base: int = 32768,
        channel_max: int = 512,
        num_mapping_layers: int = 2,
        num_layers: int = 14,
        num_critical: int = 2,
        first_cutoff: float = 2.0,
        first_stopband: float = 2**2.1,
        last_stopband_rel: float = 2**0.3,
        margin_size: int = 10,
        output_scale: float = 0.25,
        filter_size: int = 6,
        lrelu_upsampling: int = 2,
        conv_clamp: float | None = 256.0,
        w_avg_beta: float = 0.998,
    ) -> None:
        super().__init__()
        if variant not in ("t", "r"):
            raise ValueError(f"StyleGAN3Generator: variant {variant!r} is none of t, r.")
        if sample_size < 16 or sample_size & (sample_size - 1):
            raise ValueError(f"StyleGAN3Generator: sample_size = {sample_size}; give a power of two from 16 up.")
        rotates = variant == "r"
        self.synthesis = AliasFreeSynthesis(
            w_dim,
            sample_size,
            out_channels,
            channel_base * (1 + rotates),
            channel_max * (1 + rotates),
            num_layers,
            num_critical,
            first_cutoff,
            first_stopband,
            last_stopband_rel,
            margin_size,
            output_scale,
            kernel=1 if rotates else 3,
            filter_size=filter_size,
            lrelu_upsampling=lrelu_upsampling,
            radial=rotates,
            clamp=conv_clamp,
        )
        self.mapping = MappingNetwork(z_dim, num_classes, w_dim, num_mapping_layers, w_avg_beta=w_avg_beta)

    @property
    def num_ws(self) -> int:
        """How many layers take a style; the first is the input's motion."""
        return self.synthesis.num_ws

    def map(self, z: Tensor, labels: Tensor | None = None, truncation: float = 1.0, cutoff: int | None = None) -> Tensor:
        """Styles of every layer, (B, num_ws, w_dim), of noise (B, z_dim): truncated towards the average, up to layer `cutoff`."""
        w = self.mapping(z, labels)
        return self.mapping.truncate(w[:, None].expand(-1, self.num_ws, -1), truncation, cutoff)

    def synthesize(self, ws: Tensor, noise: str = "random", generator: Generators = None, update_average: bool = False) -> Tensor:
        """Pictures (B, C, H, W), about [-1, 1], of styles (B, num_ws, w_dim). There is no noise: `noise` and `generator` have no effect.

        Args:
            update_average: move the layers' averages of their inputs' power, as one pass per step of a training does.
        """
        if ws.ndim != 3 or ws.shape[1] != self.num_ws:
            raise ValueError(f"styles have shape {tuple(ws.shape)}; give (B, {self.num_ws}, {self.config.w_dim}).")
        return self.synthesis(ws, update_average)

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
