"""Activation normalisation: a scale and a shift for each channel, set so that the first batch has mean 0 and deviation 1."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel of x (B, C, H, W) over the batches of all processes together, (C,) each, with gradients.

    The sums are in float64 where there is one, so that several processes find what one finds.
    """
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    values = x.to(wide)
    count = torch.full((1,), x.numel() // x.shape[1], dtype=wide, device=x.device)
    totals = torch.cat([values.sum((0, 2, 3)), values.square().sum((0, 2, 3)), count])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from torch.distributed.nn.functional import all_reduce

        totals = all_reduce(totals)
    mean, square = totals[: x.shape[1]] / totals[-1], totals[x.shape[1] : -1] / totals[-1]
    return mean.to(x.dtype), (square - mean.square()).clamp_min(0).to(x.dtype)


class ActNorm(nn.Module):
    """y = exp(log_scale) (x + shift), for each channel.

    Until `initialize` it is the identity. The flag `initialized` is a buffer: it is saved, so a loaded model is never initialised again.

    References: Kingma and Dhariwal 2018, section 3.1, https://arxiv.org/abs/1807.03039
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(channels))
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialized", torch.tensor(False))

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set scale and shift from x (B, C, H, W), over all processes; does nothing if that has been done before.

        Raises:
            ValueError: x is not finite, so that nothing sensible can be measured.
        """
        if self.initialized:
            return
        mean, variance = moments(x)
        if not (torch.isfinite(mean).all() and torch.isfinite(variance).all()):
            raise ValueError("ActNorm.initialize: the batch has values that are not finite after the layers before; check the data.")
        self.shift.copy_(-mean)
        self.log_scale.copy_(-0.5 * torch.log(variance + 1e-6))
        self.initialized.fill_(True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, C, H, W). Returns: y of that shape, log_det (B,)."""
        y = (x + self.shift.view(-1, 1, 1)) * self.log_scale.exp().view(-1, 1, 1)                     # (B, C, H, W)
        return y, (self.log_scale.sum() * x[0, 0].numel()).expand(len(x))

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `forward`."""
        x = y * (-self.log_scale).exp().view(-1, 1, 1) - self.shift.view(-1, 1, 1)                    # (B, C, H, W)
        return x, (-self.log_scale.sum() * y[0, 0].numel()).expand(len(y))
