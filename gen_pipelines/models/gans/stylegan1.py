"""StyleGAN: styles enter by adaptive instance normalisation.

Progressive growing is left out: the whole network is trained at once ("skip" adds the pictures of all resolutions, which is what replaced
growing in StyleGAN2, section 4.1), and "orig" is the network at the end of growing, into which grown weights load.

References: Karras et al. 2019, "A Style-Based Generator Architecture for Generative Adversarial Networks", https://arxiv.org/abs/1812.04948
(section 2, figure 1b; section 3.1 style mixing)
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from ..base import ConfigMixin, GenerativeModel, ModelMixin
from ..layers.equalized import EqualizedConv2d, EqualizedLinear, leaky_relu_
from ..layers.upfirdn import fir_filter, upfirdn2d, upsample2d
from .base import GeneratorOutput, Generators
from .mapping import MappingNetwork
from .stylegan2 import NOISE, check_size

__all__ = ["ConfigMixin", "ModelMixin", "StyleGAN1Generator"]


def adain(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Every channel of every picture to mean zero and deviation one, then (1 + scale) y + shift; x (B, C, H, W), the others (B, C).

    References: Huang & Belongie 2017, eq. 8, https://arxiv.org/abs/1703.06868
    """
    wide = x.float()
    wide = wide - wide.mean((2, 3), keepdim=True)
    wide = wide * (wide.square().mean((2, 3), keepdim=True) + 1e-8).rsqrt()
    return torch.addcmul(shift[:, :, None, None], wide, 1 + scale[:, :, None, None]).to(x.dtype)


class _Epilogue(nn.Module):
    """Noise with a strength per channel, bias, leaky ReLU, adaptive instance norm: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, w_dim: int, size: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))
        self.noise_strength = nn.Parameter(torch.zeros(channels))
        self.register_buffer("noise_const", torch.randn(size, size))
        self.affine = EqualizedLinear(w_dim, 2 * channels)
        self.size = size

    def forward(self, x: Tensor, w: Tensor, noise: str, generator: Generators) -> Tensor:
        if noise != "none":
            shape = (len(x), 1, self.size, self.size)
            added = randn_tensor(shape, generator=generator, device=x.device) if noise == "random" else self.noise_const
            x = x + (added * self.noise_strength[:, None, None]).to(x.dtype)
        x = leaky_relu_(x + self.bias.to(x.dtype)[:, None, None], gain=1.0)
        return adain(x, *self.affine(w).chunk(2, dim=1))


class _Block(nn.Module):
    """One resolution: (B, I, h, w) -> (B, O, 2 h, 2 w), styles (B, 2, w_dim); the learned constant at 4 x 4."""

    def __init__(self, in_channels: int, out_channels: int, w_dim: int, size: int, taps: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("blur", fir_filter(taps), persistent=False)
        if in_channels == 0:
            self.const = nn.Parameter(torch.ones(out_channels, size, size))
        else:
            self.conv0 = EqualizedConv2d(in_channels, out_channels, 3, bias=False)
        self.epilogue0 = _Epilogue(out_channels, w_dim, size)
        self.conv1 = EqualizedConv2d(out_channels, out_channels, 3, bias=False)
        self.epilogue1 = _Epilogue(out_channels, w_dim, size)

    def forward(self, x: Tensor | None, ws: Tensor, noise: str, generator: Generators) -> Tensor:
        if x is None:
            x = self.const.to(ws.dtype).expand(len(ws), -1, -1, -1)                                    # (B, O, 4, 4)
        else:
            x = self.conv0(nn.functional.interpolate(x, scale_factor=2.0))                             # (B, O, 2 h, 2 w)
            x = upfirdn2d(x, self.blur, padding=((len(self.blur) - 1) // 2, len(self.blur) // 2))
        x = self.epilogue0(x, ws[:, 0], noise, generator)
        return self.epilogue1(self.conv1(x), ws[:, 1], noise, generator)


class StyleGAN1Generator(GenerativeModel):
    """Noise to styles to pictures; arguments as in `StyleGAN2Generator`. Two styles per resolution, the coarsest first."""

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        out_channels: int = 3,
        z_dim: int = 512,
        w_dim: int = 512,
        num_classes: int | None = None,
        channel_base: int = 8192,
        channel_max: int = 512,
        num_mapping_layers: int = 8,
        architecture: str = "skip",
        resample_taps: tuple[float, ...] = (1, 2, 1),
        w_avg_beta: float = 0.995,
    ) -> None:
        super().__init__()
        if architecture not in ("skip", "orig"):
            raise ValueError(f"StyleGAN1Generator: architecture {architecture!r} is none of skip, orig.")
        self.sizes = check_size("StyleGAN1Generator", sample_size)
        channels = {size: min(channel_base // size * 2, channel_max) for size in self.sizes}
        for size in self.sizes:
            block = _Block(0 if size == 4 else channels[size // 2], channels[size], w_dim, size, tuple(resample_taps))
            setattr(self, f"b{size}", block)
            if architecture == "skip" or size == sample_size:
                setattr(self, f"torgb{size}", EqualizedConv2d(channels[size], out_channels, 1))
        self.register_buffer("resample_filter", fir_filter((1, 3, 3, 1)), persistent=False)
        self.mapping = MappingNetwork(z_dim, num_classes, w_dim, num_mapping_layers, w_avg_beta=w_avg_beta)

    @property
    def num_ws(self) -> int:
        """How many layers take a style."""
        return 2 * len(self.sizes)

    def map(self, z: Tensor, labels: Tensor | None = None, truncation: float = 1.0, cutoff: int | None = None) -> Tensor:
        """Styles of every layer, (B, num_ws, w_dim), of noise (B, z_dim): truncated towards the average, up to layer `cutoff`."""
        w = self.mapping(z, labels)
        return self.mapping.truncate(w[:, None].expand(-1, self.num_ws, -1), truncation, cutoff)

    def synthesize(self, ws: Tensor, noise: str = "random", generator: Generators = None) -> Tensor:
        """Pictures (B, C, H, W), about [-1, 1], of styles (B, num_ws, w_dim); `noise`: "random", "const" or "none"."""
        if noise not in NOISE:
            raise ValueError(f"noise {noise!r} is none of {', '.join(NOISE)}.")
        if ws.ndim != 3 or ws.shape[1] != self.num_ws:
            raise ValueError(f"styles have shape {tuple(ws.shape)}; give (B, {self.num_ws}, {self.config.w_dim}).")
        ws = ws.to(self.b4.const.dtype)
        x = picture = None
        for i, size in enumerate(self.sizes):
            x = getattr(self, f"b{size}")(x, ws[:, 2 * i : 2 * i + 2], noise, generator)               # (B, C', 2 h, 2 w)
            if picture is not None:
                picture = upsample2d(picture, self.resample_filter)
            if (head := getattr(self, f"torgb{size}", None)) is not None:
                picture = head(x).float() if picture is None else picture + head(x).float()            # (B, out, 2 h, 2 w)
        return picture

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
