"""Glow: a multi-scale flow of activation normalisation, invertible 1 x 1 convolutions and couplings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from .actnorm import ActNorm
from .base import ConditionalGaussian, LearnedGaussian, NormalizingFlowModel
from .cache import Cached
from .coupling import Coupling, CouplingNetwork
from .invertible_conv import InvertibleConv1x1, fold, fold_inverse, mix_channels
from .reversible import run_reversibly

__all__ = ["ConfigMixin", "GlowLevel", "GlowModel", "GlowStep", "ModelMixin"]


class GlowStep(nn.Module):
    """Activation normalisation, invertible 1 x 1 convolution, coupling.

    References: Kingma and Dhariwal 2018, figure 2a
    """

    def __init__(self, channels: int, network: CouplingNetwork, kind: str) -> None:
        super().__init__()
        self.actnorm = ActNorm(channels)
        self.conv = InvertibleConv1x1(channels)
        self.coupling = Coupling(channels, network, kind)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, C, H, W). Returns: y of that shape, log_det (B,)."""
        total = x.new_zeros(len(x))
        for part in (self.actnorm, self.conv, self.coupling):
            x, log_det = part(x)
            total = total + log_det
        return x, total

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `forward`."""
        total = y.new_zeros(len(y))
        for part in (self.coupling, self.conv, self.actnorm):
            y, log_det = part.inverse(y)
            total = total + log_det
        return y, total


class GlowLevel(nn.Module):
    """K steps at one resolution. What they do to the channels (actnorm and 1 x 1 convolution) is assembled for all steps at once.

    Args:
        reversible: recompute activations through the inverse when training: memory does not grow with K, at about 1.4 times the time.
    """

    def __init__(self, steps: Sequence[GlowStep], reversible: bool = False) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)
        self.reversible = reversible
        self._forward, self._inverse = Cached(), Cached()

    def _parts(self) -> tuple[list[ActNorm], list[InvertibleConv1x1], list[Tensor]]:
        actnorms, convs = [step.actnorm for step in self.steps], [step.conv for step in self.steps]
        tensors = [t for module in (*actnorms, *convs) for t in (*module.parameters(), *module.buffers())]
        return actnorms, convs, tensors

    def initialize(self, x: Tensor) -> Tensor:
        """Set the activation normalisations, one after the other, from x (B, C, H, W). Returns: the level's output."""
        for step in self.steps:
            step.actnorm.initialize(x)
            x, _ = step(x)
        return x

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, C, H, W). Returns: y of that shape, log_det (B,)."""
        actnorms, convs, tensors = self._parts()
        weights, biases, log_det = self._forward.get(tensors, x.dtype, lambda: fold(actnorms, convs, x.dtype))  # (K, C, C), (K, C), ()
        total = (log_det * x[0, 0].numel()).expand(len(x))                                            # (B,)
        if self.reversible and torch.is_grad_enabled():
            with torch.no_grad():
                inverses = fold_inverse(actnorms, convs, x.dtype)[0]                                  # (K, C, C)
            y, log_det = run_reversibly(x, weights, biases, inverses, [step.coupling for step in self.steps])
            return y, total + log_det
        scales: Tensor | None = None
        for step, weight, bias in zip(self.steps, weights, biases):
            x, log_s = step.coupling.move(mix_channels(x, weight, bias))                              # (B, C, H, W), (B, C / 2, H, W)
            scales = log_s if scales is None else scales + log_s
        return x, total if scales is None else total + scales.sum((1, 2, 3))

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `forward`."""
        actnorms, convs, tensors = self._parts()
        inverses, biases, log_det = self._inverse.get(tensors, y.dtype, lambda: fold_inverse(actnorms, convs, y.dtype))
        total = (log_det * y[0, 0].numel()).expand(len(y))                                            # (B,)
        scales: Tensor | None = None
        for step, inverse, bias in zip(reversed(self.steps), inverses.flip(0), biases.flip(0)):
            y, log_s = step.coupling.move_back(y)                                                     # (B, C, H, W), (B, C / 2, H, W)
            y, scales = mix_channels(y, inverse, bias), log_s if scales is None else scales + log_s
        return y, total if scales is None else total - scales.sum((1, 2, 3))


class GlowModel(NormalizingFlowModel):
    """Glow: L levels of (squeeze, K steps, split). The prior of what is split off depends on what goes on; that on top is learned.

    Args:
        in_channels: of the pictures.
        sample_size: height and width in pixels, a multiple of 2^num_levels.
        num_levels: L.
        num_steps: K, for all levels or one number for each.
        hidden_channels: width of the coupling networks, for all levels or one number for each.
        num_blocks: residual blocks in them; 0 is the paper's body, one 1 x 1 convolution.
        split: half of the values leave after each level but the last, as in the paper. Small pictures do better when all values go on: then
            levels only halve the picture, and there is one level of latents.
        coupling: "affine", for the best likelihood, or "additive", which samples well at temperatures near 1.
        place_bias: coupling networks learn a bias for every place, so that they know where they are.
        pre_transform: "none", "logit" (with `logit_alpha`), or "marginal" (see `MarginalTransform`).
        num_class_labels: of a class-conditional flow; the priors depend on the label.
        dequantization: "uniform", or "variational" for a learned one, which is trained along.
        num_bits: the pictures' levels are cut to 2^num_bits (the paper shows 5-bit pictures; likelihoods are of 8).
        reversible: train with memory that does not grow with K.
        edge_value: what the convolutions that start at zero see around the picture: 0, or 1 as some implementations have it.

    References: Kingma and Dhariwal 2018, "Glow", https://arxiv.org/abs/1807.03039
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        sample_size: int | tuple[int, int] = 32,
        num_levels: int = 3,
        num_steps: int | tuple[int, ...] = 32,
        hidden_channels: int | tuple[int, ...] = 512,
        num_blocks: int = 0,
        split: bool = True,
        coupling: str = "affine",
        place_bias: bool = False,
        pre_transform: str = "none",
        logit_alpha: float = 0.05,
        num_class_labels: int | None = None,
        dequantization: str = "uniform",
        num_bits: int = 8,
        reversible: bool = False,
        edge_value: float = 0.0,
    ) -> None:
        super().__init__()
        self._set_up(in_channels, sample_size, num_levels, num_bits, pre_transform, logit_alpha, dequantization, num_class_labels)
        steps, hidden = per_level("num_steps", num_steps, num_levels), per_level("hidden_channels", hidden_channels, num_levels)
        self.levels, self.priors = nn.ModuleList(), nn.ModuleList()
        channels, (height, width) = in_channels, self.size
        for level in range(num_levels):
            channels, height, width = 4 * channels, height // 2, width // 2
            place = (height, width) if place_bias else None
            outputs = channels if coupling == "affine" else channels // 2
            network = lambda: CouplingNetwork(
                channels // 2, outputs, hidden[level], num_blocks, place, edge_value=edge_value  # noqa: B023
            )
            self.levels.append(GlowLevel([GlowStep(channels, network(), coupling) for _ in range(steps[level])], reversible))
            if split and level + 1 < num_levels:
                channels //= 2
                self.priors.append(ConditionalGaussian(channels, channels, num_class_labels, edge_value))
        self.top = LearnedGaussian((channels, height, width), num_class_labels)

    @property
    def latent_shapes(self) -> list[tuple[int, int, int]]:
        """(c, h, w) of the latents of each level, the finest level first."""
        levels = range(1, len(self.priors) + 1)
        shapes = [(self.config.in_channels * 2**n, self.size[0] >> n, self.size[1] >> n) for n in levels]
        return [*shapes, tuple(self.top.mean.shape)]

    def encode(self, x: Tensor, labels: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """x: (B, C, H, W) in [-1, 1); labels: (B,). Returns: latents by level, and log_det (B,)."""
        x, total = self.check(x, labels), 0.0
        if self.data_transform is not None:
            x, total = self.data_transform(x)                                                          # (B, C, H, W), (B,)
        latents = []
        for number, level in enumerate(self.levels):
            x, log_det = level(squeeze(x))                                                            # (B, 4 C, H / 2, W / 2), (B,)
            total = total + log_det
            if number < len(self.priors):
                x, z = x.chunk(2, 1)                                                                  # (B, 2 C, H / 2, W / 2) each
                eps, log_det = self.priors[number](z, x, labels)
                latents.append(eps)
                total = total + log_det
        eps, log_det = self.top(x, labels)
        return [*latents, eps], total + log_det

    def decode(self, latents: Sequence[Tensor], labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The inverse of `encode`: latents by level to x, (B, C, H, W), and the log_det (B,) of this direction."""
        latents = self.check_latents(latents, labels)
        x, total = self.top.inverse(latents[-1], labels)
        for number in reversed(range(len(self.levels))):
            if number < len(self.priors):
                z, log_det = self.priors[number].inverse(latents[number], x, labels)
                x, total = torch.cat([x, z], 1), total + log_det                                      # (B, 4 C, H / 2, W / 2)
            x, log_det = self.levels[number].inverse(x)
            x, total = nn.functional.pixel_shuffle(x, 2), total + log_det                             # (B, C, H, W)
        if self.data_transform is not None:
            x, log_det = self.data_transform.inverse(x)
            total = total + log_det
        return x, total

    @torch.no_grad()
    def initialize_from_batch(self, x: Tensor, labels: Tensor | None = None) -> None:
        """Set actnorms (and the marginal transform) from dequantised pictures x (B, C, H, W) of all processes together, in order.

        Those that were initialised before, or loaded, stay as they are. Some 256 pictures are enough.
        """
        x = self.check(x, labels)
        if self.data_transform is not None:
            if hasattr(self.data_transform, "initialize"):
                self.data_transform.initialize(x)
            x, _ = self.data_transform(x)
        for number, level in enumerate(self.levels):
            x = level.initialize(squeeze(x))
            if number < len(self.priors):
                x, _ = x.chunk(2, 1)


def squeeze(x: Tensor) -> Tensor:
    """(B, C, H, W) to (B, 4 C, H / 2, W / 2), laid out pixel by pixel, which the convolutions like best."""
    return nn.functional.pixel_unshuffle(x, 2).contiguous(memory_format=torch.channels_last)


def per_level(name: str, value: int | Sequence[int], num_levels: int) -> list[int]:
    """A setting of every level from one number or one for each.

    Raises:
        ValueError: another count of numbers, or one below 1.
    """
    values = [value] * num_levels if isinstance(value, int) else list(value)
    if len(values) != num_levels or min(values) < 1:
        raise ValueError(f"{name}: give one number, or {num_levels} (one per level), each at least 1; got {value}.")
    return values
