"""Batch normalisation over all processes, and with a gain and bias per class."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose statistics are those of the whole batch over all processes, on any device.

    (torch's `SyncBatchNorm` refuses the CPU.) The gradient flows through the sums of all ranks. (B, C, H, W) -> (B, C, H, W).

    References: Ioffe & Szegedy 2015, algorithm 1, https://arxiv.org/abs/1502.03167
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x)
        from torch.distributed.nn.functional import all_reduce

        wide = x.float()
        count = torch.full((1,), float(x.numel() // x.shape[1]), device=x.device)
        sums = torch.cat([count, wide.sum((0, 2, 3)), wide.square().sum((0, 2, 3))])
        total = all_reduce(sums)
        count, (mean, square) = total[0], total[1:].chunk(2)
        mean, square = mean / count, square / count
        variance = (square - mean.square()).clamp_min(0)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var), self.momentum)
        y = (wide - mean[:, None, None]) * (variance + self.eps).rsqrt()[:, None, None]
        if self.affine:
            y = y * self.weight[:, None, None] + self.bias[:, None, None]
        return y.to(x.dtype)


class ConditionalBatchNorm2d(nn.Module):
    """Batch norm whose gain and bias belong to a class; without classes, plain batch norm.

    References: Dumoulin et al. 2017, eq. 5, https://arxiv.org/abs/1610.07629
    """

    def __init__(self, channels: int, num_classes: int | None = None) -> None:
        super().__init__()
        self.norm = SyncedBatchNorm2d(channels, affine=num_classes is None)
        if num_classes is not None:
            self.gain, self.bias = nn.Embedding(num_classes, channels), nn.Embedding(num_classes, channels)
            nn.init.ones_(self.gain.weight)
            nn.init.zeros_(self.bias.weight)
        self.conditional = num_classes is not None

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """x: (B, C, H, W); labels: (B,), needed where there are classes."""
        x = self.norm(x)
        return x if not self.conditional else torch.addcmul(_map(self.bias, labels), x, _map(self.gain, labels))


def _map(table: nn.Embedding, labels: Tensor) -> Tensor:
    return F.embedding(labels, table.weight)[:, :, None, None]
