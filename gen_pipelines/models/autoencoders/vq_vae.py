"""VQ-VAE with one level of codes, and VQ-VAE-2 with two or three."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from ..base import GenerativeModel
from ..layers.codebook import VectorQuantizer
from ..layers.convolutional import CompactDecoder, CompactEncoder, ConvDecoder, ConvEncoder, padding_to_multiple
from ..layers.distributions import Pixels, parameters_per_value, pixels

__all__ = ["ConfigMixin", "ModelMixin", "VQVAEDecoderOutput", "VQVAEEncoderOutput", "VQVAEModel", "VQVAEOutput"]

NETWORKS = ("staged", "compact", "mlp")


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
        likelihood, scale, num_components, num_bits, min_log_scale, bounded_mean: of the decoder, as in `VAEModel`.
        network: "staged" (residual blocks at every size), "compact" (the papers': all residual blocks at the smallest size of a level, see
            `CompactEncoder`) or "mlp" (fully connected, with ReLU; one level, and no `downsample_factors`).
        hidden_sizes, num_positions: of "mlp": its layers from the picture to the codes, and how many codes there are; they are laid out as
            one row, (B, 1, num_positions).
        rectified_skip: of the residual blocks of "compact", see `ResidualBlock`.

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
        bounded_mean: bool = False,
        network: str = "staged",
        hidden_sizes: Sequence[int] = (512,),
        num_positions: int = 16,
        rectified_skip: bool = False,
    ) -> None:
        super().__init__()
        if network not in NETWORKS:
            raise ValueError(f"VQVAEModel: network {network!r} is none of {', '.join(NETWORKS)}.")
        self.height, self.width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        factors = list(downsample_factors)
        if not 1 <= len(factors) <= 3 or any(f < 2 or f & (f - 1) for f in factors):
            raise ValueError(f"VQVAEModel: downsample_factors are one to three powers of two from 2 on, got {factors}.")
        if network == "mlp" and (not hidden_sizes or num_positions < 1):
            raise ValueError(f"VQVAEModel: the network mlp needs hidden_sizes and num_positions, got {hidden_sizes} and {num_positions}.")
        if not 1 <= num_bits <= 8:
            raise ValueError(f"VQVAEModel: num_bits {num_bits} is not allowed; give 1 to 8.")
        out_channels = in_channels * parameters_per_value(likelihood, scale, num_components, bounded_mean)
        quantizer = lambda: VectorQuantizer(num_embeddings, embedding_dim, codebook_update, decay, beta, revive_below)
        if network == "mlp":
            sizes, values = [in_channels * self.height * self.width, *hidden_sizes], num_positions * embedding_dim
            self.encoders = nn.ModuleList([_mlp(sizes)])
            self.before_codes = nn.ModuleList([nn.Linear(sizes[-1], values)])
            self.quantizers = nn.ModuleList([quantizer()])
            self.from_codes = _mlp([values, *list(hidden_sizes)[::-1]])
            self.decoder = nn.Linear(hidden_sizes[0], out_channels * self.height * self.width)
        else:
            blocks = {"residual_channels": residual_channels, "rectified_skip": rectified_skip}
            self._add_convolutions(network, hidden_channels, embedding_dim, out_channels, quantizer, layers_per_block, blocks)
        self.log_scale = None
        if scale == "shared" and likelihood != "bernoulli":
            self.log_scale = nn.Parameter(torch.full((in_channels, 1, 1), -1.5))

    def _add_convolutions(
        self, network: str, width: int, d: int, out_channels: int, quantizer: Callable[[], nn.Module], depth: int, blocks: dict[str, Any]
    ) -> None:
        halvings = [f.bit_length() - 1 for f in self.config.downsample_factors]
        levels = len(halvings)
        if network == "compact":
            encoder = lambda inputs, count: CompactEncoder(inputs, width, count, depth, **blocks)
            decoder = lambda inputs, count, outputs: CompactDecoder(inputs, width, outputs, count, depth, **blocks)
            grown = lambda f: nn.ConvTranspose2d(d, d, 2 * f, stride=f, padding=f // 2)
        else:
            encoder = lambda inputs, count: ConvEncoder(inputs, [width] * count, depth, blocks["residual_channels"])
            decoder = lambda inputs, count, outputs: ConvDecoder(inputs, [width] * count, outputs, depth, blocks["residual_channels"])
            grown = lambda f: nn.ConvTranspose2d(d, d, f, stride=f)
        # numbered from the bottom up
        self.encoders = nn.ModuleList()
        self.upsamplers = nn.ModuleList()  # what is above a level, at the size of that level
        self.before_codes = nn.ModuleList()
        self.quantizers = nn.ModuleList()
        self.to_bottom = nn.ModuleList()  # what is above the bottom, at its size, for the decoder
        grow = 0
        for level, count in enumerate(halvings):
            above = level + 1 < levels
            self.encoders.append(encoder(self.config.in_channels if level == 0 else width, count))
            if above:
                self.upsamplers.append(decoder(d, halvings[level + 1], d))
            self.before_codes.append(nn.Conv2d(width + (d if above else 0), d, 1))
            self.quantizers.append(quantizer())
            if level > 0:
                grow += count
                self.to_bottom.append(grown(2**grow))
        self.decoder = decoder(levels * d, halvings[0], out_channels)

    @property
    def code_shapes(self) -> list[tuple[int, int]]:
        """Height and width of the codes of every level, from the top down."""
        if self.config.network == "mlp":
            return [(1, self.config.num_positions)]
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
        c, upward = self.config, list(quantized)[::-1]
        if c.network == "mlp":
            output = self.decoder(self.from_codes(upward[0].to(self.dtype).flatten(1)))
            output = output.view(len(output), -1, self.height, self.width)                             # (B, P C, H, W)
        else:
            parts = [upward[0], *(grow(q) for grow, q in zip(self.to_bottom, upward[1:], strict=True))]
            output = self.decoder(torch.cat([part.to(self.dtype) for part in parts], 1))               # (B, P C, H', W')
            padding = padding_to_multiple(self.height, self.width, self._factor)
            output = output[:, :, padding[2] : padding[2] + self.height, padding[0] : padding[0] + self.width]
        settings = (c.likelihood, c.in_channels, c.num_components, c.num_bits, self.log_scale, c.min_log_scale, c.bounded_mean)
        return VQVAEDecoderOutput(pixels(output, *settings))

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
        h = x.to(self.before_codes[0].weight.dtype)
        if self.config.network == "mlp":
            return [self.encoders[0]((h.flatten(1) + 1) / 2)]                                          # (B, hidden); black is zero
        h = F.pad(h, padding_to_multiple(self.height, self.width, self._factor), value=-1.0)
        features = []
        for encoder in self.encoders:
            h = encoder(h)                                                                             # (B, width, h, w)
            features.append(h)
        return features

    def _vectors(self, level: int, features: list[Tensor], above: Tensor | None) -> Tensor:
        """What is quantised at a level: what it sees, and what is already said above it."""
        h = features[level]
        if self.config.network == "mlp":
            return self.before_codes[0](h).view(len(h), self.config.embedding_dim, 1, self.config.num_positions)
        if above is not None:
            h = torch.cat([h, self.upsamplers[level](above.to(h.dtype))], 1)
        return self.before_codes[level](h)                                                             # (B, d, h, w)


def _mlp(sizes: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in zip(sizes, sizes[1:]):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers)
