"""RealNVP: a multi-scale flow of couplings with checkerboard and channel masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from .actnorm import ActNorm
from .base import NormalizingFlowModel
from .batch_norm import FlowBatchNorm
from .coupling import MaskedCoupling
from .glow import per_level, squeeze

__all__ = ["ConfigMixin", "ModelMixin", "RealNVPModel", "RealNVPScale"]

NORMALIZATIONS = {"batch_norm": FlowBatchNorm, "actnorm": ActNorm}


class RealNVPScale(nn.Module):
    """Couplings with checkerboard masks, squeeze, couplings with channel masks, at one scale; a normalisation after each coupling.

    Args:
        channels: of the input; its height and width are halved by the squeeze.
        couplings: how many with each of the two masks.
        network: hidden_channels, num_blocks.
        size: of the input, for a learned bias at every place; None for none.

    References: Dinh et al. 2017, section 3.6
    """

    def __init__(
        self,
        channels: int,
        couplings: int,
        hidden_channels: int,
        num_blocks: int,
        size: tuple[int, int] | None,
        kind: str,
        normalization: str,
    ) -> None:
        super().__init__()
        layer = lambda count, mask, number, place: nn.ModuleList(
            [
                MaskedCoupling(count, mask, number % 2 == 1, hidden_channels, num_blocks, place, kind),
                NORMALIZATIONS[normalization](count),
            ]
        )
        halved = None if size is None else (size[0] // 2, size[1] // 2)
        self.checkerboard = nn.ModuleList(layer(channels, "checkerboard", number, size) for number in range(couplings))
        self.channel = nn.ModuleList(layer(4 * channels, "channel", number, halved) for number in range(couplings))

    def forward(self, x: Tensor, initialize: bool = False) -> tuple[Tensor, Tensor]:
        """x: (B, C, H, W). Returns: y (B, 4 C, H / 2, W / 2), log_det (B,)."""
        total = x.new_zeros(len(x))
        for layers in (self.checkerboard, self.channel):
            for coupling, normalization in layers:
                x, log_det = coupling(x)
                if initialize:
                    normalization.initialize(x)
                x, normal_log_det = normalization(x)
                total = total + log_det + normal_log_det
            x = squeeze(x) if layers is self.checkerboard else x
        return x, total

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `forward`."""
        total = y.new_zeros(len(y))
        for layers in (self.channel, self.checkerboard):
            y = nn.functional.pixel_shuffle(y, 2) if layers is self.checkerboard else y
            for coupling, normalization in reversed(layers):
                y, normal_log_det = normalization.inverse(y)
                y, log_det = coupling.inverse(y)
                total = total + log_det + normal_log_det
        return y, total


class RealNVPModel(NormalizingFlowModel):
    """RealNVP: scales of (checkerboard couplings, squeeze, channel couplings); after each but the last half of the values is latent.

    The picture is first laid out by the logit, so that no value lies outside what pictures have.

    Args:
        in_channels: of the pictures.
        sample_size: height and width in pixels, a multiple of 2^num_levels.
        num_levels: scales.
        num_couplings: with each of the two masks, at each scale; for all scales or one number for each.
        hidden_channels: width of the coupling networks, for all scales or one number for each.
        num_blocks: residual blocks in them; 0 is one 1 x 1 convolution.
        split: half of the values leave after each scale but the last, as in the paper; without it all go on.
        coupling: "affine", or "additive" (NICE).
        normalization: after each coupling: "batch_norm" with its own log-determinant, as in the paper, or "actnorm".
        place_bias: coupling networks learn a bias for every place, so that they know where they are.
        pre_transform: "logit" (with `logit_alpha`), "none", or "marginal" (see `MarginalTransform`).
        dequantization: "uniform", or "variational" for a learned one, which is trained along.
        num_bits: the pictures' levels are cut to 2^num_bits.

    References: Dinh et al. 2017, "Density estimation using Real NVP", https://arxiv.org/abs/1605.08803
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        sample_size: int | tuple[int, int] = 32,
        num_levels: int = 2,
        num_couplings: int | tuple[int, ...] = 3,
        hidden_channels: int | tuple[int, ...] = 64,
        num_blocks: int = 4,
        split: bool = True,
        coupling: str = "affine",
        normalization: str = "batch_norm",
        place_bias: bool = False,
        pre_transform: str = "logit",
        logit_alpha: float = 0.05,
        num_class_labels: int | None = None,
        dequantization: str = "uniform",
        num_bits: int = 8,
    ) -> None:
        super().__init__()
        self._set_up(in_channels, sample_size, num_levels, num_bits, pre_transform, logit_alpha, dequantization, num_class_labels)
        if num_class_labels is not None:
            raise ValueError("RealNVPModel: its prior is N(0, I) and knows no classes; use GlowModel, or leave out num_class_labels.")
        if normalization not in NORMALIZATIONS:
            raise ValueError(f"RealNVPModel: normalization {normalization!r} is none of {', '.join(NORMALIZATIONS)}.")
        couplings, hidden = per_level("num_couplings", num_couplings, num_levels), per_level("hidden_channels", hidden_channels, num_levels)
        self.scales = nn.ModuleList()
        channels, size = in_channels, self.size
        for level in range(num_levels):
            place = size if place_bias else None
            self.scales.append(RealNVPScale(channels, couplings[level], hidden[level], num_blocks, place, coupling, normalization))
            channels, size = (2 if split and level + 1 < num_levels else 4) * channels, (size[0] // 2, size[1] // 2)
        self._splits, self._top = num_levels - 1 if split else 0, (channels, *size)

    @property
    def latent_shapes(self) -> list[tuple[int, int, int]]:
        """(c, h, w) of the latents of each scale, the finest first."""
        levels = range(1, self._splits + 1)
        return [*((self.config.in_channels * 2**n, self.size[0] >> n, self.size[1] >> n) for n in levels), self._top]

    def encode(self, x: Tensor, labels: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """x: (B, C, H, W) in [-1, 1). Returns: latents by scale, and log_det (B,)."""
        return self._encode(self.check(x, labels), initialize=False)

    def _encode(self, x: Tensor, initialize: bool) -> tuple[list[Tensor], Tensor]:
        total: Tensor | float = 0.0
        if self.data_transform is not None:
            if initialize and hasattr(self.data_transform, "initialize"):
                self.data_transform.initialize(x)
            x, total = self.data_transform(x)                                                          # (B, C, H, W), (B,)
        latents = []
        for number, scale in enumerate(self.scales):
            x, log_det = scale(x, initialize)                                                         # (B, 4 C, H / 2, W / 2), (B,)
            total = total + log_det
            if number < self._splits:
                x, z = x.chunk(2, 1)                                                                  # (B, 2 C, H / 2, W / 2) each
                latents.append(z)
        return [*latents, x], total

    def decode(self, latents: Sequence[Tensor], labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The inverse of `encode`: latents by scale to x, (B, C, H, W), and the log_det (B,) of this direction."""
        latents = self.check_latents(latents, labels)
        x, total = latents[-1], 0.0
        for number in reversed(range(len(self.scales))):
            if number < self._splits:
                x = torch.cat([x, latents[number]], 1)                                                # (B, 4 C, H / 2, W / 2)
            x, log_det = self.scales[number].inverse(x)                                               # (B, C, H, W), (B,)
            total = total + log_det
        if self.data_transform is not None:
            x, log_det = self.data_transform.inverse(x)
            total = total + log_det
        return x, total

    @torch.no_grad()
    def initialize_from_batch(self, x: Tensor, labels: Tensor | None = None) -> None:
        """Set normalisations (and the marginal transform) from dequantised pictures x (B, C, H, W) of all processes together, in order.

        Those that were initialised before, or loaded, stay as they are. Some 256 pictures are enough.
        """
        was_training = self.training
        self.eval()  # so that a batch norm uses what it has just measured, and its running averages stay
        try:
            self._encode(self.check(x, labels), initialize=True)
        finally:
            self.train(was_training)
