"""The residual GAN of WGAN-GP and SN-GAN.

References: Gulrajani et al. 2017, appendix C, https://arxiv.org/abs/1704.00028; Miyato et al. 2018, appendix B.4 (sums instead of a dense
layer at the end, spectral norm), https://arxiv.org/abs/1802.05957; Miyato & Koyama 2018 (projection), https://arxiv.org/abs/1802.05637
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from ..base import ConfigMixin, GenerativeModel, ModelMixin
from ..layers.batch_norm import ConditionalBatchNorm2d
from .base import DiscriminatorOutput, GeneratorOutput, check_labels, ladder, widths

__all__ = ["ConfigMixin", "ModelMixin", "ResNetDiscriminator", "ResNetGenerator"]


class _UpBlock(nn.Module):
    """(B, C, h, w) -> (B, C', 2 h, 2 w): norm, ReLU, upsample, convolve, twice; the skip is upsampled and mixed pointwise."""

    def __init__(self, channels: int, out_channels: int, num_classes: int | None) -> None:
        super().__init__()
        self.norm1, self.norm2 = ConditionalBatchNorm2d(channels, num_classes), ConditionalBatchNorm2d(out_channels, num_classes)
        self.conv1, self.conv2 = nn.Conv2d(channels, out_channels, 3, padding=1), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        h = self.conv1(F.interpolate(F.relu(self.norm1(x, labels)), scale_factor=2.0))
        h = self.conv2(F.relu(self.norm2(h, labels)))
        return h + F.interpolate(self.skip(x), scale_factor=2.0)


class _DownBlock(nn.Module):
    """(B, C, h, w) -> (B, C', h / 2, w / 2) by mean pooling, or the same size with down=False."""

    def __init__(self, channels: int, out_channels: int, down: bool = True, first: bool = False) -> None:
        super().__init__()
        self.down, self.first = down, first
        self.conv1, self.conv2 = nn.Conv2d(channels, out_channels, 3, padding=1), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.relu(self.conv1(x if self.first else F.relu(x))))  # a picture is not rectified
        if not self.down:
            return h + self.skip(x)
        return F.avg_pool2d(h, 2) + self.skip(F.avg_pool2d(x, 2))  # pooling commutes with a pointwise convolution and comes first: cheaper


class ResNetGenerator(GenerativeModel):
    """Noise to pictures by residual blocks; the arguments are those of `DCGANGenerator`."""

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        out_channels: int = 3,
        latent_dim: int = 128,
        base_channels: int = 128,
        max_channels: int = 256,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        self.smallest, doublings = ladder(sample_size)
        channels = widths(base_channels, max_channels, doublings)[::-1]
        self.stem = nn.Linear(latent_dim, channels[0] * self.smallest**2)
        self.blocks = nn.ModuleList(_UpBlock(a, b, num_classes) for a, b in zip(channels[:-1], channels[1:], strict=True))
        self.norm = ConditionalBatchNorm2d(channels[-1])
        self.head = nn.Conv2d(channels[-1], out_channels, 3, padding=1)
        _xavier(self)

    def forward(self, z: Tensor, labels: Tensor | None = None, return_dict: bool = True) -> GeneratorOutput | tuple[Tensor]:
        """z: noise (B, latent_dim); labels: (B,) where there are classes. Pictures in [-1, 1], (B, C, H, W)."""
        labels = check_labels("ResNetGenerator", labels, self.config.num_classes, len(z), z.device)
        x = self.stem(z).unflatten(1, (-1, self.smallest, self.smallest))                              # (B, C0, s, s)
        for block in self.blocks:
            x = block(x, labels)                                                                       # (B, C', 2 h, 2 w)
        sample = torch.tanh(self.head(F.relu(self.norm(x))))                                           # (B, out, H, W)
        return GeneratorOutput(sample=sample) if return_dict else (sample,)


class ResNetDiscriminator(GenerativeModel):
    """Pictures to one number each, without any batch norm, so that it is a critic for gradient penalties as it is.

    Args:
        spectral: spectral normalisation of every weight (SN-GAN).
        num_classes: adds the projection on the class's vector.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 3,
        base_channels: int = 128,
        max_channels: int = 256,
        num_classes: int | None = None,
        spectral: bool = False,
    ) -> None:
        super().__init__()
        _, doublings = ladder(sample_size)
        channels = [in_channels, *widths(base_channels, max_channels, doublings)[1:]]
        blocks = [_DownBlock(a, b, first=i == 0) for i, (a, b) in enumerate(zip(channels[:-1], channels[1:], strict=True))]
        self.blocks = nn.ModuleList([*blocks, _DownBlock(channels[-1], channels[-1], down=False)])
        self.head = nn.Linear(channels[-1], 1)
        self.classes = None if num_classes is None else nn.Embedding(num_classes, channels[-1])
        _xavier(self)
        if spectral:
            for module in list(self.modules()):
                if isinstance(module, (nn.Conv2d, nn.Linear, nn.Embedding)):
                    spectral_norm(module)

    def forward(self, x: Tensor, labels: Tensor | None = None, return_dict: bool = True) -> DiscriminatorOutput | tuple[Tensor]:
        """x: pictures (B, C, H, W); labels: (B,) where there are classes. Logits (B,)."""
        labels = check_labels("ResNetDiscriminator", labels, self.config.num_classes, len(x), x.device)
        for block in self.blocks:
            x = block(x)                                                                               # (B, C', h / 2, w / 2)
        x = F.relu(x).sum((2, 3))                                                                      # (B, C)
        logits = self.head(x).squeeze(1)                                                               # (B,)
        if labels is not None:
            logits = logits + (self.classes(labels) * x).sum(1)
        return DiscriminatorOutput(logits=logits) if return_dict else (logits,)


def _xavier(network: nn.Module) -> None:
    """Gain sqrt(2) before a rectifier, one on skips and heads."""
    for name, module in network.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            gain = 1.0 if name.rsplit(".", 1)[-1] in ("skip", "head", "stem") else math.sqrt(2)
            nn.init.xavier_uniform_(module.weight, gain)
            nn.init.zeros_(module.bias)
