"""The variational autoencoder, with convolutional or fully connected halves and three likelihoods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from ...processes.random import Generators, normal
from ..base import GenerativeModel
from ..layers.convolutional import ConvDecoder, ConvEncoder, padding_to_multiple
from ..layers.distributions import LOG_VARIANCE_RANGE, DiagonalGaussian, Pixels, parameters_per_value, pixels

__all__ = ["ConfigMixin", "ModelMixin", "VAEDecoderOutput", "VAEEncoderOutput", "VAEModel", "VAEOutput"]

ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh}
_COMMITTED_EPS = 1e-6  # under the square root of delta-VAE's mean, whose gradient at zero is infinite


@dataclass
class VAEEncoderOutput:
    """`latent_dist`: q(z | x), each of its tensors (B, d)."""

    latent_dist: DiagonalGaussian


@dataclass
class VAEDecoderOutput:
    """`distribution`: p(x | z). `sample`: its mean, the picture to look at, (B, C, H, W) in [-1, 1]."""

    distribution: Pixels

    @property
    def sample(self) -> Tensor:
        return self.distribution.mean


@dataclass
class VAEOutput:
    """What a bound is made of, for K draws.

    Attributes:
        latent_dist: q(z | x), (B, d).
        latents: draws from it, (K, B, d).
        distribution: p(x | z); its `log_prob(x)` is (K, B).
    """

    latent_dist: DiagonalGaussian
    latents: Tensor
    distribution: Pixels


class VAEModel(GenerativeModel):
    """p(x) = int p(x | z) N(z; 0, I) dz with q(z | x) = N(mean(x), diag std(x)^2).

    Args:
        sample_size: height and width of a picture, one number for a square. Pictures are padded inside where the network needs it.
        in_channels: 1 or 3, of a picture.
        latent_dim: d.
        encoder_type, decoder_type: "conv" (`ConvEncoder`, `ConvDecoder`) or "mlp" (fully connected). A limited decoder needs its latents.
        block_out_channels, layers_per_block: of the convolutional halves, from the largest size to the smallest.
        hidden_sizes: of the fully connected halves, from the picture to the latents.
        decoder_block_out_channels, decoder_hidden_sizes: of the decoder, where it is to differ.
        activation: of the fully connected halves: relu, silu or tanh.
        likelihood: of the decoder: "discretized_logistic" (8-bit pictures), "bernoulli" (binarised ones; its output is logits) or
            "gaussian" (a density, so that bits are counted with dequantised pictures).
        scale: "per_pixel" (an output of the decoder) or "shared" (one learned number per channel), of the last two.
        num_components: logistics in the mixture for each value.
        num_bits: pictures have 2^num_bits levels.
        min_log_scale: scales below e to this power count as this.
        bounded_mean: of the Gaussian: its mean is 2 sigmoid(output) - 1 in place of the output.
        committed_rate: nats of delta-VAE: the posterior cannot say less than this, whatever is learned. Every dimension has the KL
            divergence of at least committed_rate / d from the prior, its mean being moved away from 0 by as much as its variance lacks.

    References: Kingma & Welling 2014, https://arxiv.org/abs/1312.6114; Razavi et al. 2019, section 2.1 and its appendix on independent
    latents, https://arxiv.org/abs/1901.03416 (committed rate)
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        sample_size: int | Sequence[int] = 28,
        in_channels: int = 1,
        latent_dim: int = 32,
        encoder_type: str = "conv",
        decoder_type: str = "conv",
        block_out_channels: Sequence[int] = (32, 64),
        layers_per_block: int = 1,
        hidden_sizes: Sequence[int] = (200, 200),
        decoder_block_out_channels: Sequence[int] | None = None,
        decoder_hidden_sizes: Sequence[int] | None = None,
        activation: str = "silu",
        likelihood: str = "discretized_logistic",
        scale: str = "per_pixel",
        num_components: int = 1,
        num_bits: int = 8,
        min_log_scale: float = -7.0,
        committed_rate: float = 0.0,
        bounded_mean: bool = False,
    ) -> None:
        super().__init__()
        self.height, self.width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        for name, kind in (("encoder_type", encoder_type), ("decoder_type", decoder_type)):
            if kind not in ("conv", "mlp"):
                raise ValueError(f"VAEModel: {name} {kind!r} is none of conv, mlp.")
        if activation not in ACTIVATIONS:
            raise ValueError(f"VAEModel: activation {activation!r} is none of {', '.join(ACTIVATIONS)}.")
        if committed_rate < 0:
            raise ValueError(f"VAEModel: committed_rate {committed_rate} is not allowed; give 0 (none) or more nats.")
        if not 1 <= num_bits <= 8:
            raise ValueError(f"VAEModel: num_bits {num_bits} is not allowed; give 1 to 8.")
        out_channels = in_channels * parameters_per_value(likelihood, scale, num_components, bounded_mean)
        if encoder_type == "conv":
            self.encoder, shape = _conv_encoder((self.height, self.width), in_channels, block_out_channels, layers_per_block)
            self.to_moments = nn.Linear(shape[0] * shape[1] * shape[2], 2 * latent_dim)
        else:
            sizes = [in_channels * self.height * self.width, *hidden_sizes]
            self.encoder = _mlp(sizes, ACTIVATIONS[activation])
            self.to_moments = nn.Linear(sizes[-1], 2 * latent_dim)
        if decoder_type == "conv":
            widths = list(decoder_block_out_channels or block_out_channels)
            factor = 2 ** len(widths)
            self._small = (widths[-1], -(-self.height // factor), -(-self.width // factor))
            self.from_latents = nn.Linear(latent_dim, self._small[0] * self._small[1] * self._small[2])
            self.decoder = ConvDecoder(widths[-1], widths, out_channels, layers_per_block)
        else:
            sizes = [latent_dim, *list(decoder_hidden_sizes or hidden_sizes)[::-1]]
            self.from_latents = _mlp(sizes, ACTIVATIONS[activation])
            self.decoder = nn.Linear(sizes[-1], out_channels * self.height * self.width)
        self.log_scale = None
        if scale == "shared" and likelihood != "bernoulli":
            self.log_scale = nn.Parameter(torch.full((in_channels, 1, 1), -1.5))

    def encode(self, x: Tensor) -> VAEEncoderOutput:
        """q(z | x) of pictures x, (B, C, H, W) in [-1, 1]."""
        self._check(x)
        x = x.to(self.to_moments.weight.dtype)
        if self.config.encoder_type == "conv":
            padding = padding_to_multiple(self.height, self.width, 2 ** len(self.config.block_out_channels))
            h = self.encoder(F.pad(x, padding, value=-1.0))                                            # (B, c, h, w)
        else:
            h = self.encoder((x.flatten(1) + 1) / 2)                                                   # (B, hidden); black is zero
        moments = self.to_moments(h.flatten(1))                                                        # (B, 2 d)
        mean, log_variance = moments.to(torch.promote_types(moments.dtype, torch.float32)).chunk(2, dim=1)
        log_variance = log_variance.clamp(*LOG_VARIANCE_RANGE)
        if self.config.committed_rate:
            lacking = 2 * self.config.committed_rate / self.config.latent_dim + 1 + log_variance - log_variance.exp()
            away = torch.sqrt(F.relu(lacking) + mean.square() + _COMMITTED_EPS)
            mean = torch.where(mean < 0, -away, away)
        return VAEEncoderOutput(DiagonalGaussian(mean, log_variance))

    def decode(self, z: Tensor) -> VAEDecoderOutput:
        """p(x | z) for latents z, (..., d)."""
        leading = z.shape[:-1]
        h = self.from_latents(z.to(self.dtype).reshape(-1, z.shape[-1]))
        if self.config.decoder_type == "conv":
            output = self.decoder(h.view(-1, *self._small))                                            # (N, P C, H', W')
            padding = padding_to_multiple(self.height, self.width, 2 ** (len(self.decoder.blocks)))
            output = output[:, :, padding[2] : padding[2] + self.height, padding[0] : padding[0] + self.width]
        else:
            output = self.decoder(h).view(len(h), -1, self.height, self.width)                         # (N, P C, H, W)
        c = self.config
        output = output.unflatten(0, leading)
        settings = (c.likelihood, c.in_channels, c.num_components, c.num_bits, self.log_scale, c.min_log_scale, c.bounded_mean)
        return VAEDecoderOutput(pixels(output, *settings))

    def forward(self, x: Tensor, num_samples: int = 1, generator: Generators = None, noise: Tensor | None = None) -> VAEOutput:
        """Encodes pictures, draws latents and decodes them.

        Args:
            x: (B, C, H, W) in [-1, 1].
            num_samples: draws K for each picture.
            generator: one, or one per picture.
            noise: standard normal numbers to use instead, (K, B, d).
        """
        latent_dist = self.encode(x).latent_dist
        if noise is None:
            shape = (len(x), num_samples, self.config.latent_dim)
            noise = normal(shape, generator, x.device, latent_dist.mean.dtype).transpose(0, 1)         # (K, B, d)
        latents = latent_dist.sample(noise)                                                            # (K, B, d)
        return VAEOutput(latent_dist, latents, self.decode(latents).distribution)

    def _check(self, x: Tensor) -> None:
        wanted = (self.config.in_channels, self.height, self.width)
        if x.ndim != 4 or tuple(x.shape[1:]) != wanted:
            raise ValueError(f"VAEModel: pictures of shape (B, {wanted[0]}, {wanted[1]}, {wanted[2]}) are needed, got {tuple(x.shape)}.")


def _conv_encoder(
    size: tuple[int, int], in_channels: int, widths: Sequence[int], layers_per_block: int
) -> tuple[ConvEncoder, tuple[int, int, int]]:
    """A convolutional encoder and the shape of its output."""
    factor = 2 ** len(widths)
    return ConvEncoder(in_channels, widths, layers_per_block), (widths[-1], -(-size[0] // factor), -(-size[1] // factor))


def _mlp(sizes: Sequence[int], activation: type[nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in zip(sizes, sizes[1:]):
        linear = nn.Linear(before, after)
        nn.init.xavier_uniform_(linear.weight)  # Glorot & Bengio 2010: torch's own is too small for tanh, and training starts late
        nn.init.zeros_(linear.bias)
        layers += [linear, activation()]
    return nn.Sequential(*layers)
