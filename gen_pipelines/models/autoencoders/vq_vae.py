"""VQ-VAE with one level of codes, and VQ-VAE-2 with two or three."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from ..base import GenerativeModel
from ..layers.codebook import VectorQuantizer
from ..layers.convolutional import ConvDecoder, ConvEncoder, padding_to_multiple
from ..layers.distributions import Pixels, parameters_per_value, pixels

__all__ = ["ConfigMixin", "ModelMixin", "VQVAEDecoderOutput", "VQVAEEncoderOutput", "VQVAEModel", "VQVAEOutput"]


@dataclass
class VQVAEEncoderOutput:
    """What pictures become; every list has one entry per level, from the top (the coarsest) down.

    Attributes:
        codes: (B, h, w) each, int64.
        quantized: the codes' vectors, (B, d, h, w) each; gradients pass straight through.
        loss: of the quantisers, summed over the levels, (B,).
    """

    codes: list[Tensor]
    quantized: list[Tensor]
    loss: Tensor


@dataclass
class VQVAEDecoderOutput:
    """`distribution`: p(x | codes). `sample`: its mean, the picture to look at, (B, C, H, W) in [-1, 1]."""

    distribution: Pixels

    @property
    def sample(self) -> Tensor:
        return self.distribution.mean


@dataclass
class VQVAEOutput:
    """`codes` from the top down, `loss` of the quantisers (B,), and `distribution`, p(x | codes)."""

    codes: list[Tensor]
    loss: Tensor
    distribution: Pixels


class VQVAEModel(GenerativeModel):
    """An autoencoder whose latents are codes: each position of a level holds the number of one of K vectors.

    With one level this is the VQ-VAE. With more it is the VQ-VAE-2: the top level is quantised first, and every level below sees what is
    above it, so that it holds only what is missing; the decoder sees all.

    Args:
        sample_size: height and width of a picture, one number for a square. Pictures are padded inside to a multiple of the product of
            `downsample_factors`.
        in_channels: 1 or 3.
        downsample_factors: powers of two, from the bottom up: (4,) gives one level of a quarter of the size; (4, 2) a bottom of a quarter
            and a top of an eighth.
        hidden_channels, layers_per_block, residual_channels: of the convolutions and their residual blocks.
        num_embeddings, embedding_dim: K and d, the same on every level.
        codebook_update, decay, beta, revive_below: as in `VectorQuantizer`.
        likelihood, scale, num_components, num_bits, min_log_scale: of the decoder, as in `VAEModel`.

    References: van den Oord et al. 2017, https://arxiv.org/abs/1711.00937; Razavi et al. 2019, https://arxiv.org/abs/1906.00446
    """

    _supports_gradient_checkpointing = True  # of the convolutions; a quantiser that ran twice would count twice

    @register_to_config
    def __init__(
        self,
        sample_size: int | Sequence[int] = 28,
        in_channels: int = 1,
        downsample_factors: Sequence[int] = (4,),
        hidden_channels: int = 64,
        layers_per_block: int = 2,
        residual_channels: int = 32,
        num_embeddings: int = 256,
        embedding_dim: int = 32,
        codebook_update: str = "ema",
        decay: float = 0.99,
        beta: float = 0.25,
        revive_below: float = 0.03,
        likelihood: str = "discretized_logistic",
        scale: str = "per_pixel",
        num_components: int = 1,
        num_bits: int = 8,
        min_log_scale: float = -7.0,
    ) -> None:
        super().__init__()
        self.height, self.width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        factors = list(downsample_factors)
        if not 1 <= len(factors) <= 3 or any(f < 2 or f & (f - 1) for f in factors):
            raise ValueError(f"VQVAEModel: downsample_factors are one to three powers of two from 2 on, got {factors}.")
        if not 1 <= num_bits <= 8:
            raise ValueError(f"VQVAEModel: num_bits {num_bits} is not allowed; give 1 to 8.")
        halvings = [f.bit_length() - 1 for f in factors]
        width, d, levels = hidden_channels, embedding_dim, len(factors)
        block = {"layers_per_block": layers_per_block, "residual_channels": residual_channels}
        # numbered from the bottom up
        self.encoders = nn.ModuleList()
        self.upsamplers = nn.ModuleList()  # what is above a level, at the size of that level
        self.before_codes = nn.ModuleList()
        self.quantizers = nn.ModuleList()
        self.to_bottom = nn.ModuleList()  # what is above the bottom, at its size, for the decoder
        grow = 0
        for level, count in enumerate(halvings):
            above = level + 1 < levels
            self.encoders.append(ConvEncoder(in_channels if level == 0 else width, [width] * count, **block))
            if above:
                self.upsamplers.append(ConvDecoder(d, [width] * halvings[level + 1], d, **block))
            self.before_codes.append(nn.Conv2d(width + (d if above else 0), d, 1))
            self.quantizers.append(VectorQuantizer(num_embeddings, d, codebook_update, decay, beta, revive_below))
            if level > 0:
                grow += count
                self.to_bottom.append(nn.ConvTranspose2d(d, d, 2**grow, stride=2**grow))
        out_channels = in_channels * parameters_per_value(likelihood, scale, num_components)
        self.decoder = ConvDecoder(levels * d, [width] * halvings[0], out_channels, **block)
        self.log_scale = None
        if scale == "shared" and likelihood != "bernoulli":
            self.log_scale = nn.Parameter(torch.full((in_channels, 1, 1), -1.5))

    @property
    def code_shapes(self) -> list[tuple[int, int]]:
        """Height and width of the codes of every level, from the top down."""
        shapes, factor = [], 1
        for one in self.config.downsample_factors:
            factor *= one
            shapes.append((self._padded[0] // factor, self._padded[1] // factor))
        return shapes[::-1]

    @property
    def _factor(self) -> int:
        factor = 1
        for one in self.config.downsample_factors:
            factor *= one
        return factor

    @property
    def _padded(self) -> tuple[int, int]:
        return -(-self.height // self._factor) * self._factor, -(-self.width // self._factor) * self._factor

    def encode(self, x: Tensor) -> VQVAEEncoderOutput:
        """Codes of pictures x, (B, C, H, W) in [-1, 1]."""
        features = self._features(x)
        codes, quantized, losses = [], [], []
        above = None
        for level in reversed(range(len(features))):
            z = self._vectors(level, features, above)                                                  # (B, d, h, w)
            found = self.quantizers[level](z)
            codes.append(found.codes)
            quantized.append(found.quantized)
            losses.append(found.loss)
            above = found.quantized
        return VQVAEEncoderOutput(codes, quantized, torch.stack(losses).sum(0))

    def decode(self, quantized: Sequence[Tensor]) -> VQVAEDecoderOutput:
        """p(x | codes) for the codes' vectors, (B, d, h, w) of every level from the top down."""
        upward = list(quantized)[::-1]
        parts = [upward[0], *(grow(q) for grow, q in zip(self.to_bottom, upward[1:], strict=True))]
        output = self.decoder(torch.cat([part.to(self.dtype) for part in parts], 1))                   # (B, P C, H', W')
        padding, c = padding_to_multiple(self.height, self.width, self._factor), self.config
        output = output[:, :, padding[2] : padding[2] + self.height, padding[0] : padding[0] + self.width]
        described = pixels(output, c.likelihood, c.in_channels, c.num_components, c.num_bits, self.log_scale, c.min_log_scale)
        return VQVAEDecoderOutput(described)

    def decode_codes(self, codes: Sequence[Tensor]) -> VQVAEDecoderOutput:
        """p(x | codes) for codes (B, h, w) of every level from the top down.

        Raises:
            ValueError: another number of levels, other shapes, or codes that there are not.
        """
        shapes = [tuple(level.shape[1:]) for level in codes]
        if shapes != self.code_shapes:
            raise ValueError(f"VQVAEModel: codes of the shapes (B, h, w) with (h, w) = {self.code_shapes} are needed, got {shapes}.")
        quantizers = reversed(self.quantizers)
        return self.decode([quantizer.decode(level) for quantizer, level in zip(quantizers, codes, strict=True)])

    def forward(self, x: Tensor) -> VQVAEOutput:
        """Encodes pictures (B, C, H, W) in [-1, 1] and decodes them."""
        encoded = self.encode(x)
        return VQVAEOutput(encoded.codes, encoded.loss, self.decode(encoded.quantized).distribution)

    @torch.no_grad()
    def initialize_from_batch(self, x: Tensor) -> None:
        """Puts every codebook where the first pictures' vectors are, from the top down; once, and never again after loading."""
        features = self._features(x)
        above = None
        for level in reversed(range(len(features))):
            z = self._vectors(level, features, above)
            quantizer = self.quantizers[level]
            quantizer.initialize(z, seed=level)
            above = quantizer.decode(quantizer.encode(z))

    def _features(self, x: Tensor) -> list[Tensor]:
        """What the encoders see at every level, from the bottom up."""
        wanted = (self.config.in_channels, self.height, self.width)
        if x.ndim != 4 or tuple(x.shape[1:]) != wanted:
            raise ValueError(f"VQVAEModel: pictures of shape (B, {wanted[0]}, {wanted[1]}, {wanted[2]}) are needed, got {tuple(x.shape)}.")
        h = F.pad(x.to(self.decoder.conv_out.weight.dtype), padding_to_multiple(self.height, self.width, self._factor), value=-1.0)
        features = []
        for encoder in self.encoders:
            h = encoder(h)                                                                             # (B, width, h, w)
            features.append(h)
        return features

    def _vectors(self, level: int, features: list[Tensor], above: Tensor | None) -> Tensor:
        """What is quantised at a level: what it sees, and what is already said above it."""
        h = features[level]
        if above is not None:
            h = torch.cat([h, self.upsamplers[level](above.to(h.dtype))], 1)
        return self.before_codes[level](h)                                                             # (B, d, h, w)
