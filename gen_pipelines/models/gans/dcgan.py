"""The deep convolutional GAN.

References: Radford, Metz & Chintala 2016, https://arxiv.org/abs/1511.06434; class conditioning as in Miyato & Koyama 2018,
https://arxiv.org/abs/1802.05637; spectral norm, Miyato et al. 2018, https://arxiv.org/abs/1802.05957
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from ..base import ConfigMixin, GenerativeModel, ModelMixin
from ..layers.batch_norm import ConditionalBatchNorm2d
from .base import DiscriminatorOutput, GeneratorOutput, check_labels, ladder, normal_init, widths

__all__ = ["ConfigMixin", "DCGANDiscriminator", "DCGANGenerator", "ModelMixin"]

NORMS = ("batch", "layer", "none")


class DCGANGenerator(GenerativeModel):
    """Noise to pictures by transposed convolutions of stride 2, batch norm (per class where there are classes) and ReLU.

    Args:
        sample_size: height and width of the pictures: 4 to 7 times a power of two (28, 32, 64).
        out_channels: 1 for grey, 3 for colour.
        latent_dim: D of the noise (B, D).
        base_channels: channels at the largest resolution; doubled at every halving, up to `max_channels`.
        num_classes: None for no conditioning.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        out_channels: int = 3,
        latent_dim: int = 128,
        base_channels: int = 64,
        max_channels: int = 512,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        self.smallest, doublings = ladder(sample_size)
        channels = widths(base_channels, max_channels, doublings)[::-1]
        self.stem = nn.Linear(latent_dim, channels[0] * self.smallest**2, bias=False)
        self.stem_norm = ConditionalBatchNorm2d(channels[0], num_classes)
        pairs = list(zip(channels[:-1], channels[1:], strict=True))
        self.ups = nn.ModuleList(nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False) for a, b in pairs)
        self.norms = nn.ModuleList(ConditionalBatchNorm2d(b, num_classes) for _, b in pairs)
        self.head = nn.Conv2d(channels[-1], out_channels, 3, padding=1)
        normal_init(self)

    def forward(self, z: Tensor, labels: Tensor | None = None, return_dict: bool = True) -> GeneratorOutput | tuple[Tensor]:
        """z: noise (B, latent_dim); labels: (B,) where there are classes. Pictures in [-1, 1], (B, C, H, W)."""
        labels = check_labels("DCGANGenerator", labels, self.config.num_classes, len(z), z.device)
        x = self.stem(z).unflatten(1, (-1, self.smallest, self.smallest))                              # (B, C0, s, s)
        x = F.relu(self.stem_norm(x, labels))
        for up, norm in zip(self.ups, self.norms, strict=True):
            x = F.relu(norm(up(x), labels))                                                            # (B, C / 2, 2 h, 2 w)
        sample = torch.tanh(self.head(x))                                                              # (B, out, H, W)
        return GeneratorOutput(sample=sample) if return_dict else (sample,)


class DCGANDiscriminator(GenerativeModel):
    """Pictures to one number each, by convolutions of stride 2 and leaky ReLU; with classes, the projection is added.

    Args:
        norm: "batch", "layer" (over channels and positions) or "none". A gradient penalty is per picture, which batch norm is not: take
            "layer" or "none" with it (Gulrajani et al. 2017, section 4).
        spectral: spectral normalisation of every weight.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 3,
        base_channels: int = 64,
        max_channels: int = 512,
        num_classes: int | None = None,
        norm: str = "batch",
        spectral: bool = False,
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"DCGANDiscriminator: norm {norm!r} is none of {', '.join(NORMS)}.")
        smallest, doublings = ladder(sample_size)
        channels = widths(base_channels, max_channels, doublings)[1:]
        pairs = list(zip([in_channels, *channels[:-1]], channels, strict=True))
        self.downs = nn.ModuleList(nn.Conv2d(a, b, 4, 2, 1) for a, b in pairs)
        # none on the first layer (Radford et al. 2016, section 3)
        self.norms = nn.ModuleList(nn.Identity() if i == 0 else _norm(norm, b) for i, (_, b) in enumerate(pairs))
        self.head = nn.Linear(channels[-1] * smallest**2, 1)
        self.classes = None if num_classes is None else nn.Embedding(num_classes, channels[-1] * smallest**2)
        normal_init(self)
        if spectral:
            for layer in [*self.downs, self.head, *([self.classes] if self.classes is not None else [])]:
                spectral_norm(layer)

    def forward(self, x: Tensor, labels: Tensor | None = None, return_dict: bool = True) -> DiscriminatorOutput | tuple[Tensor]:
        """x: pictures (B, C, H, W); labels: (B,) where there are classes. Logits (B,)."""
        labels = check_labels("DCGANDiscriminator", labels, self.config.num_classes, len(x), x.device)
        for down, norm in zip(self.downs, self.norms, strict=True):
            x = F.leaky_relu(norm(down(x)), 0.2)                                                       # (B, 2 C, h / 2, w / 2)
        x = x.flatten(1)                                                                               # (B, C s s)
        logits = self.head(x).squeeze(1)                                                               # (B,)
        if labels is not None:
            logits = logits + (self.classes(labels) * x).sum(1)
        return DiscriminatorOutput(logits=logits) if return_dict else (logits,)


def _norm(name: str, channels: int) -> nn.Module:
    return {"batch": ConditionalBatchNorm2d(channels), "layer": nn.GroupNorm(1, channels), "none": nn.Identity()}[name]
