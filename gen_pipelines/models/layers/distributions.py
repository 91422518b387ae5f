"""What encoders and decoders of autoencoders say: a Gaussian over latents, and a distribution over the values of a picture.

All of it is computed in float32 or better, whatever the precision of the network that gave the parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ...processes.random import Generators, normal, uniform

LOG_VARIANCE_RANGE = (-20.0, 20.0)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass
class DiagonalGaussian:
    """N(mean, diag exp(log_variance)), independent over the last dimension.

    Attributes:
        mean, log_variance: (..., d).
    """

    mean: Tensor
    log_variance: Tensor

    @property
    def std(self) -> Tensor:
        """Standard deviations, (..., d)."""
        return torch.exp(0.5 * self.log_variance)

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std noise: the reparameterised sample (Kingma & Welling 2014, section 2.4); noise standard normal, (..., d)."""
        return self.mean + self.std * noise

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density in nats, summed over the last dimension."""
        square = (z - self.mean).square() * torch.exp(-self.log_variance)
        return -0.5 * (square + self.log_variance + math.log(2 * math.pi)).sum(-1)

    def kl_per_dimension(self) -> Tensor:
        """KL(N(mean, std^2), N(0, 1)) of every dimension in nats, (..., d). Kingma & Welling 2014, appendix B."""
        return 0.5 * (self.mean.square() + self.log_variance.exp() - 1 - self.log_variance)

    def detach(self) -> DiagonalGaussian:
        """The same without gradients."""
        return DiagonalGaussian(self.mean.detach(), self.log_variance.detach())


def standard_normal_log_prob(z: Tensor) -> Tensor:
    """log N(z; 0, I) in nats, summed over the last dimension."""
    return -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)


@dataclass
class BernoulliPixels:
    """Every value is black (-1) or white (+1), independently.

    Attributes:
        logits: of white, (..., C, H, W).
    """

    logits: Tensor

    @property
    def mean(self) -> Tensor:
        """The expected picture in [-1, 1], (..., C, H, W)."""
        return 2 * torch.sigmoid(self.logits) - 1

    def log_prob(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) of -1 and +1. Returns: nats per picture, (..., B), by way of the logits, which are safe in every precision."""
        return -F.softplus(-x * _wide(self.logits)).sum((-3, -2, -1))

    def sample(self, generator: Generators = None) -> Tensor:
        """A picture of -1 and +1, (B, C, H, W)."""
        u = uniform(self.logits.shape, generator, self.logits.device)
        return torch.where(u < torch.sigmoid(_wide(self.logits)), 1.0, -1.0)


@dataclass
class GaussianPixels:
    """A density over real values, independent: bits per dimension need dequantised pictures.

    Attributes:
        mean: (..., C, H, W).
        log_scale: of the standard deviation, broadcastable to it.
    """

    mean: Tensor
    log_scale: Tensor

    def log_prob(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W). Returns: the log-density in nats, (..., B)."""
        mean, log_scale = _wide(self.mean), _wide(self.log_scale)
        square = ((x - mean) * torch.exp(-log_scale)).square()
        return (-0.5 * (square + math.log(2 * math.pi)) - log_scale).expand(mean.shape).sum((-3, -2, -1))

    def sample(self, generator: Generators = None) -> Tensor:
        """A picture, (B, C, H, W), not clipped."""
        noise = normal(self.mean.shape, generator, self.mean.device)
        return _wide(self.mean) + torch.exp(_wide(self.log_scale)) * noise


@dataclass
class DiscretizedLogistic:
    """Probabilities of the n levels k = 0 .. n - 1, which lie at x = 2 k / (n - 1) - 1: a mixture of logistics, cut into bins.

    P(k) = sum_m pi_m [F((x + h - mu_m) / s_m) - F((x - h - mu_m) / s_m)] with F the sigmoid and h = 1 / (n - 1); the first and the last bin
    reach to infinity, so that the levels' probabilities sum to one.

    Attributes:
        component_logits, means, log_scales: (..., M, C, H, W); log_scales may be broadcastable to it.
        num_levels: n.

    References: Kingma et al. 2016, appendix C.2, https://arxiv.org/abs/1606.04934; Salimans et al. 2017, eq. 2,
    https://arxiv.org/abs/1701.05517 (mixtures)
    """

    component_logits: Tensor
    means: Tensor
    log_scales: Tensor
    num_levels: int = 256

    @property
    def mean(self) -> Tensor:
        """The picture of the mixture's mean, in [-1, 1], (..., C, H, W)."""
        means = _wide(self.means).clamp(-1, 1)
        if means.shape[-4] == 1:
            return means.squeeze(-4)
        return (torch.softmax(_wide(self.component_logits), -4) * means).sum(-4)

    def log_prob(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) at the levels. Returns: nats per picture, (..., B).

        Of the bin's two ends a > b: log(F(a) - F(b)) = log F(a) + log F(-b) + log(1 - e^(b - a)), and nothing nearly equal is subtracted.
        """
        half = 1 / (self.num_levels - 1)
        x = x.unsqueeze(-4)                                                                             # (B, 1, C, H, W)
        low, high = x < -1 + half, x > 1 - half
        log_scales = _wide(self.log_scales)
        inverse = torch.exp(-log_scales)
        centred = x - _wide(self.means)
        above = F.logsigmoid((centred + half) * inverse)
        below = F.logsigmoid((half - centred) * inverse)
        width = torch.log(-torch.expm1(-2 * half * inverse))
        zero = above.new_zeros(())
        parts = torch.where(high, zero, above) + torch.where(low, zero, below) + torch.where(low | high, zero, width)
        if parts.shape[-4] == 1:
            mixed = parts.squeeze(-4)
        else:
            mixed = torch.logsumexp(parts + torch.log_softmax(_wide(self.component_logits), -4), -4)    # (..., B, C, H, W)
        return mixed.sum((-3, -2, -1))

    def sample(self, generator: Generators = None) -> Tensor:
        """A picture at the levels, (B, C, H, W)."""
        shape = self.means.shape
        u = uniform((shape[0], 2, *shape[2:]), generator, self.means.device).clamp(1e-6, 1 - 1e-6)
        pick, place = u[:, :1], u[:, 1:]
        cumulative = torch.softmax(_wide(self.component_logits), -4).cumsum(-4)
        chosen = (pick > cumulative).sum(-4, keepdim=True).clamp(max=shape[-4] - 1)
        mean, log_scale = (
            _wide(part).expand(shape).gather(-4, chosen).squeeze(-4) for part in (self.means, self.log_scales)
        )                                                                                               # (B, C, H, W)
        place = place.squeeze(-4)
        x = mean + torch.exp(log_scale) * (torch.log(place) - torch.log1p(-place))
        steps = (self.num_levels - 1) / 2
        return ((x.clamp(-1, 1) + 1) * steps).round() / steps - 1


Pixels = BernoulliPixels | GaussianPixels | DiscretizedLogistic


def parameters_per_value(likelihood: str, scale: str, num_components: int, bounded_mean: bool = False) -> int:
    """How many numbers a decoder gives for each value of a picture.

    Raises:
        ValueError: an unknown likelihood or scale, or components or a bounded mean where they mean nothing.
    """
    if likelihood not in ("bernoulli", "gaussian", "discretized_logistic"):
        raise ValueError(f"likelihood {likelihood!r} is none of bernoulli, gaussian, discretized_logistic.")
    if scale not in ("shared", "per_pixel"):
        raise ValueError(f"scale {scale!r} is none of shared, per_pixel.")
    if num_components < 1 or (num_components > 1 and likelihood != "discretized_logistic"):
        raise ValueError(f"num_components {num_components}: 1, or more for the likelihood discretized_logistic; got {likelihood!r}.")
    if bounded_mean and likelihood != "gaussian":
        raise ValueError(f"bounded_mean: for the likelihood gaussian; got {likelihood!r}.")
    per_component = 1 if likelihood == "bernoulli" or scale == "shared" else 2
    return per_component * num_components + (num_components if num_components > 1 else 0)


def pixels(
    output: Tensor,
    likelihood: str,
    channels: int,
    num_components: int = 1,
    num_bits: int = 8,
    log_scale: Tensor | None = None,
    min_log_scale: float = -7.0,
    bounded_mean: bool = False,
) -> Pixels:
    """The distribution that a decoder's output describes.

    Args:
        output: (..., C * `parameters_per_value(...)`, H, W).
        log_scale: a shared scale of shape (C, 1, 1); None where the output holds one per value.
        min_log_scale: scales below e to this power count as this.
        bounded_mean: a Gaussian's mean is 2 sigmoid(output) - 1, inside the range of pictures, and not the output itself.
    """
    output = _wide(output)
    if likelihood == "bernoulli":
        return BernoulliPixels(output)
    parts = output.unflatten(-3, (-1, channels))                                                        # (..., P, C, H, W)
    if log_scale is None:
        count = num_components
        # around 1/4 at the start: gradients reach every value, and no value is certain yet
        log_scales = parts[..., count : 2 * count, :, :, :] - 1.5
        logits = parts[..., 2 * count :, :, :, :] if num_components > 1 else parts[..., :1, :, :, :]
    else:
        count = num_components
        log_scales = _wide(log_scale)
        logits = parts[..., count:, :, :, :] if num_components > 1 else parts[..., :1, :, :, :]
    means, log_scales = parts[..., :count, :, :, :], log_scales.clamp(min=min_log_scale)
    if bounded_mean:
        means = 2 * torch.sigmoid(means) - 1
    if likelihood == "gaussian":
        return GaussianPixels(means.squeeze(-4), log_scales if log_scale is not None else log_scales.squeeze(-4))
    if num_components > 1:  # apart at the start, or they would all learn the same
        spread = torch.linspace(-1, 1, num_components, device=output.device, dtype=output.dtype)
        means = means + spread.view(-1, 1, 1, 1)
    return DiscretizedLogistic(logits, means, log_scales, 2**num_bits)
