"""Variational dequantisation: a small conditional flow that draws the noise which is added to integer levels."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...processes.random import Generators, normal
from .coupling import Coupling, CouplingNetwork
from .invertible_conv import InvertibleConv1x1


class VariationalDequantizer(nn.Module):
    """u = sigmoid(f(eps; levels)) in (0, 1), eps standard normal; f is a flow of affine couplings that look at the levels.

    References: Ho et al. 2019, section 3.1, https://arxiv.org/abs/1902.00275

    Args:
        in_channels: of the pictures; their height and width must be even.
        num_bits: levels run from 0 to 2^num_bits - 1.
        hidden_channels, num_steps: width of the networks and number of couplings.
    """

    def __init__(self, in_channels: int, num_bits: int = 8, hidden_channels: int = 32, num_steps: int = 4) -> None:
        super().__init__()
        channels = 4 * in_channels
        self.num_bits = num_bits
        self.context = nn.Sequential(
            nn.Conv2d(channels, hidden_channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden_channels, hidden_channels, 3, padding=1),
            nn.ReLU(),
        )
        self.mixings = nn.ModuleList(InvertibleConv1x1(channels) for _ in range(num_steps))
        network = lambda: CouplingNetwork(channels // 2, channels, hidden_channels, context_channels=hidden_channels)
        self.couplings = nn.ModuleList(Coupling(channels, network(), scale="tanh") for _ in range(num_steps))

    def sample(self, levels: Tensor, generator: Generators = None) -> tuple[Tensor, Tensor]:
        """levels: integers (B, C, H, W). Returns: u in (0, 1) of that shape, float32 or better, and log q(u | levels), (B,)."""
        dtype = torch.promote_types(self.context[0].weight.dtype, torch.float32)
        eps = normal(levels.shape, generator, levels.device).to(dtype)
        x = levels.to(dtype) * (2 / (2**self.num_bits - 1)) - 1
        context = self.context(nn.functional.pixel_unshuffle(x, 2).to(self.context[0].weight.dtype)).to(dtype)  # (B, hidden, H/2, W/2)
        z = nn.functional.pixel_unshuffle(eps, 2)                                                     # (B, 4 C, H/2, W/2)
        log_q = -0.5 * eps.square().flatten(1).sum(1) - 0.5 * eps[0].numel() * math.log(2 * math.pi)  # (B,)
        for mixing, coupling in zip(self.mixings, self.couplings, strict=True):
            z, log_det = mixing(z)
            log_q = log_q - log_det
            z, log_det = coupling(z, context)
            log_q = log_q - log_det
        softplus = nn.functional.softplus
        log_q = log_q + (softplus(z) + softplus(-z)).flatten(1).sum(1)                                # minus log of the sigmoid's slope
        return torch.sigmoid(nn.functional.pixel_shuffle(z, 2)), log_q
