"""What every normalizing flow of pictures has in common: latents that are standard normal, a density, samples at a temperature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from ...processes.random import Generators, normal
from ..base import GenerativeModel
from .dequantizer import VariationalDequantizer
from .pre_transforms import make_pre_transform

DEQUANTIZATIONS = ("uniform", "variational")


@dataclass
class FlowOutput(BaseOutput):
    """`log_prob`: log p(x), (B,). `latents`: standard normal under the model, one tensor (B, c, h, w) for each level."""

    log_prob: Tensor
    latents: list[Tensor]


class NormalizingFlowModel(GenerativeModel):
    """A bijection between dequantised pictures x in [-1, 1) and latents that are standard normal: log p(x) = log N(encode(x)) + log_det.

    The priors of a multi-scale flow are part of the bijection: a value that is split off is given back as (z - mean) / deviation, where
    mean and deviation may depend on what goes on and on the label. So temperature, interpolation and directions act on all levels alike.

    A subclass has `encode`, `decode`, `initialize_from_batch` and `latent_shapes`, and calls `_set_up` in its constructor.
    """

    dequantizer: VariationalDequantizer | None

    def _set_up(
        self,
        in_channels: int,
        sample_size: int | Sequence[int],
        num_levels: int,
        num_bits: int,
        pre_transform: str,
        logit_alpha: float,
        dequantization: str,
        num_class_labels: int | None,
    ) -> None:
        """Checks what all flows take, and makes the pre-transform and the dequantiser."""
        name = type(self).__name__
        size = (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)
        factor = 2**num_levels
        if len(size) != 2 or num_levels < 1 or any(side < factor or side % factor for side in size):
            raise ValueError(
                f"{name}: {num_levels} levels halve a picture {num_levels} times, so sample_size must be a multiple of {factor}; "
                f"got {sample_size}."
            )
        if not 1 <= num_bits <= 8:
            raise ValueError(f"{name}: num_bits must be from 1 to 8, got {num_bits}.")
        if dequantization not in DEQUANTIZATIONS:
            raise ValueError(f"{name}: dequantization {dequantization!r} is none of {', '.join(DEQUANTIZATIONS)}.")
        if num_class_labels is not None and num_class_labels < 1:
            raise ValueError(f"{name}: num_class_labels must be at least 1, or None for a flow without labels; got {num_class_labels}.")
        self.size = size
        self.data_transform = make_pre_transform(pre_transform, logit_alpha, num_bits)
        self.dequantizer = VariationalDequantizer(in_channels, num_bits) if dequantization == "variational" else None

    @property
    def latent_shapes(self) -> list[tuple[int, int, int]]:
        """(c, h, w) of the latents of each level, the finest level first."""
        raise NotImplementedError

    def encode(self, x: Tensor, labels: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """x: (B, C, H, W) in [-1, 1); labels: (B,). Returns: latents by level, and log_det (B,)."""
        raise NotImplementedError

    def decode(self, latents: Sequence[Tensor], labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The inverse of `encode`: latents by level to x, (B, C, H, W), and the log_det (B,) of this direction."""
        raise NotImplementedError

    def initialize_from_batch(self, x: Tensor, labels: Tensor | None = None) -> None:
        """Set what is initialised from data, from dequantised pictures x of all processes together; once, never again after loading."""
        raise NotImplementedError

    def forward(self, x: Tensor, labels: Tensor | None = None) -> FlowOutput:
        """The density and the latents of dequantised pictures.

        Args:
            x: (B, C, H, W) in [-1, 1).
            labels: (B,), for a class-conditional flow.
        """
        latents, log_det = self.encode(x, labels)                                                     # L x (B, c, h, w), (B,)
        return FlowOutput(log_prob=standard_normal_log_prob(latents) + log_det, latents=latents)

    def log_prob(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """log p(x) in nats, (B,), a density in the coordinates of x."""
        return self(x, labels).log_prob

    @torch.no_grad()
    def sample(
        self, batch_size: int, labels: Tensor | None = None, temperature: float = 1.0, generator: Generators = None
    ) -> tuple[Tensor, Tensor]:
        """Draw pictures. Returns: x (B, C, H, W), not clamped, and log p(x), (B,): the density of the model, whatever the temperature.

        Args:
            temperature: the deviation of the latents, of every level.
            generator: one for the batch, or one per picture.
        """
        latents = self.draw_latents(batch_size, temperature, generator)
        x, log_det = self.decode(latents, labels)
        return x, standard_normal_log_prob(latents) - log_det

    def draw_latents(self, batch_size: int, temperature: float = 1.0, generator: Generators = None) -> list[Tensor]:
        """Normal latents with deviation `temperature`, by level, the finest first; (B, c, h, w) each."""
        if batch_size < 1 or not temperature >= 0 or not math.isfinite(temperature):
            raise ValueError(f"batch_size must be at least 1 and temperature a number from 0; got {batch_size} and {temperature}.")
        device, dtype = next(self.parameters()).device, self.stream_dtype
        draws = [normal((batch_size, *shape), generator, device) for shape in self.latent_shapes]
        return [(temperature * draw).to(dtype) for draw in draws]

    @property
    def stream_dtype(self) -> torch.dtype:
        """The dtype of latents, log-determinants and everything that is inverted: that of the weights, but no less than float32."""
        return torch.promote_types(next(self.parameters()).dtype, torch.float32)  # diffusers' `dtype` looks at every module

    def check(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """x in the dtype of the stream.

        Raises:
            ValueError: pictures of another shape, or labels that are missing, superfluous or of another shape.
        """
        wanted = (self.config.in_channels, *self.size)
        if x.ndim != 4 or tuple(x.shape[1:]) != wanted:
            shape = ", ".join(map(str, wanted))
            raise ValueError(f"{type(self).__name__}: pictures of shape (B, {shape}) are needed, got {tuple(x.shape)}.")
        self.check_labels(len(x), labels)
        return x.to(self.stream_dtype)

    def check_labels(self, batch_size: int, labels: Tensor | None) -> None:
        """Raises ValueError where labels are missing, superfluous or of another shape."""
        classes = self.config.num_class_labels
        if (labels is None) != (classes is None):
            reason = "labels were given to a flow without classes" if classes is None else f"labels (from 0 to {classes - 1}) are needed"
            raise ValueError(f"{type(self).__name__}: {reason}.")
        if labels is not None and tuple(labels.shape) != (batch_size,):
            raise ValueError(f"{type(self).__name__}: labels have the shape ({batch_size},), one per picture; got {tuple(labels.shape)}.")

    def check_latents(self, latents: Sequence[Tensor], labels: Tensor | None) -> list[Tensor]:
        """The latents in the dtype of the stream; ValueError where they are not one per level and of its shape."""
        shapes = [tuple(latent.shape[1:]) for latent in latents]
        if shapes != self.latent_shapes:
            raise ValueError(f"{type(self).__name__}: latents of shapes {self.latent_shapes} by level are needed, got {shapes}.")
        self.check_labels(len(latents[0]), labels)
        dtype = self.stream_dtype
        return [latent.to(dtype) for latent in latents]


class ConditionalGaussian(nn.Module):
    """z = mean + exp(log_std) eps, where mean and log_std come from a convolution of what goes on (and a label): Glow's split prior.

    References: Kingma and Dhariwal 2018, section 3.3 and its code ("split2d"); Dinh et al. 2017, section 3.6 (without the condition)
    """

    def __init__(
        self, condition_channels: int, channels: int, num_class_labels: int | None = None, edge_value: float = 0.0
    ) -> None:
        super().__init__()
        from .coupling import ScaledConv2d

        self.condition = ScaledConv2d(condition_channels, 2 * channels, edge_value)
        self.label = _zero_embedding(num_class_labels, 2 * channels)

    def moments(self, h: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """mean and log_std of z, (B, c, H, W) each."""
        both = self.condition(h.to(self.condition.weight.dtype)).to(h.dtype)                          # (B, 2 c, H, W)
        if self.label is not None:
            both = both + self.label(labels).to(h.dtype)[:, :, None, None]
        return both.chunk(2, 1)

    def forward(self, z: Tensor, h: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z (B, c, H, W) given h (B, c', H, W). Returns: eps of z's shape, log_det (B,)."""
        mean, log_std = self.moments(h, labels)
        return (z - mean) * torch.exp(-log_std), -log_std.sum((1, 2, 3))

    def inverse(self, eps: Tensor, h: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The inverse of `forward`, for the same h."""
        mean, log_std = self.moments(h, labels)
        return torch.addcmul(mean, eps, torch.exp(log_std)), log_std.sum((1, 2, 3))


class LearnedGaussian(nn.Module):
    """z = mean + exp(log_std) eps with a learned mean and log_std for every value (and label): the prior at the top.

    References: Kingma and Dhariwal 2018, its code ("learn_top", "ycond")
    """

    def __init__(self, shape: tuple[int, int, int], num_class_labels: int | None = None) -> None:
        super().__init__()
        self.mean, self.log_std = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(shape))
        self.label = _zero_embedding(num_class_labels, 2 * math.prod(shape))

    def moments(self, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """mean and log_std of z, (1 or B, c, h, w) each."""
        if self.label is None:
            return self.mean[None], self.log_std[None]
        mean, log_std = self.label(labels).unflatten(1, (2, *self.mean.shape)).unbind(1)
        return self.mean + mean, self.log_std + log_std

    def forward(self, z: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z: (B, c, h, w). Returns: eps of that shape, log_det (B,)."""
        mean, log_std = (part.to(z.dtype) for part in self.moments(labels))
        return (z - mean) * torch.exp(-log_std), -log_std.sum((1, 2, 3)).expand(len(z))

    def inverse(self, eps: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The inverse of `forward`."""
        mean, log_std = (part.to(eps.dtype) for part in self.moments(labels))
        return mean + eps * torch.exp(log_std), log_std.sum((1, 2, 3)).expand(len(eps))


def standard_normal_log_prob(latents: Sequence[Tensor]) -> Tensor:
    """log N(latents; 0, I) in nats, (B,), of latents by level."""
    count = sum(latent[0].numel() for latent in latents)
    squares = sum(latent.square().sum((1, 2, 3)) for latent in latents)
    return -0.5 * squares - 0.5 * count * math.log(2 * math.pi)


def _zero_embedding(classes: int | None, width: int) -> nn.Embedding | None:
    if classes is None:
        return None
    embedding = nn.Embedding(classes, width)
    nn.init.zeros_(embedding.weight)
    return embedding
