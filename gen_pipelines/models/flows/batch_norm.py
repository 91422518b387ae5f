"""Batch normalisation as a bijection, with the log-determinant of its own statistics."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .actnorm import moments


class FlowBatchNorm(nn.Module):
    """y = (x - mean) / sqrt(variance + eps), for each channel; log_det = -0.5 H W sum log(variance + eps).

    In training the statistics are those of the batch (of all processes together), gradients go through them, and running averages are
    kept; in evaluation the running averages make it an affine bijection. Sampling needs `eval()`: the batch's statistics are of x.

    References: Dinh et al. 2017, section 3.7 and appendix E, https://arxiv.org/abs/1605.08803
    """

    def __init__(self, channels: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_variance", torch.ones(channels))
        self.register_buffer("initialized", torch.tensor(False))

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Start the running averages at the statistics of x (B, C, H, W), over all processes; once."""
        if self.initialized:
            return
        mean, variance = moments(x)
        self.running_mean.copy_(mean)
        self.running_variance.copy_(variance)
        self.initialized.fill_(True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, C, H, W). Returns: y of that shape, log_det (B,)."""
        if self.training:
            mean, variance = moments(x)
            with torch.no_grad():
                self.running_mean.lerp_(mean.detach().to(self.running_mean), self.momentum)
                self.running_variance.lerp_(variance.detach().to(self.running_variance), self.momentum)
        else:
            mean, variance = self.running_mean, self.running_variance
        y = (x - mean.view(-1, 1, 1)) * torch.rsqrt(variance + self.eps).view(-1, 1, 1)               # (B, C, H, W)
        return y, (-0.5 * torch.log(variance + self.eps).sum() * x[0, 0].numel()).expand(len(x))

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse, in evaluation mode.

        Raises:
            RuntimeError: in training mode, where the statistics are those of a batch that does not exist yet.
        """
        if self.training:
            raise RuntimeError("FlowBatchNorm.inverse: sampling in training mode has no statistics to undo; call model.eval() first.")
        scale = torch.sqrt(self.running_variance + self.eps)
        x = y * scale.view(-1, 1, 1) + self.running_mean.view(-1, 1, 1)                               # (B, C, H, W)
        return x, (scale.log().sum() * y[0, 0].numel()).expand(len(y))
