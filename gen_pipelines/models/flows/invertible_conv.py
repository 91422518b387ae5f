"""The invertible 1 x 1 convolution, LU-parametrised, and its fold with the activation normalisation before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .actnorm import ActNorm


class InvertibleConv1x1(nn.Module):
    """y = W x at every pixel, W = P L (U + diag(sign exp(log_diagonal))): log_det = H W sum log_diagonal; inverses by triangular solves.

    P (a permutation) and the signs stay as they were drawn; L has ones on its diagonal, U is strictly upper triangular. At first W is a
    random rotation.

    References: Kingma and Dhariwal 2018, section 3.2, https://arxiv.org/abs/1807.03039
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))[0]
        permutation, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal()
        self.register_buffer("permutation", permutation.float())
        self.register_buffer("sign", diagonal.sign().float())
        self.lower = nn.Parameter(lower.tril(-1).float())
        self.upper = nn.Parameter(upper.triu(1).float())
        self.log_diagonal = nn.Parameter(diagonal.abs().log().float())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, C, H, W). Returns: y of that shape, log_det (B,)."""
        with torch.autocast(x.device.type, enabled=False):
            permutation, lower, upper = lu_factors([self], x.dtype)
            weight = (permutation @ lower @ upper)[0]                                                 # (C, C)
        y = mix_channels(x, weight)                                                                   # (B, C, H, W)
        return y, (self.log_diagonal.sum() * x[0, 0].numel()).expand(len(x))

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `forward`."""
        return mix_channels(y, lu_inverse([self], y.dtype)[0]), (-self.log_diagonal.sum() * y[0, 0].numel()).expand(len(y))


def mix_channels(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """weight (C, C) applied at every pixel of x (B, C, H, W), plus bias (C,), never in less than float32: it has to be inverted."""
    if not torch.is_autocast_enabled(x.device.type):
        return _mix(x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        return _mix(x, weight, bias)


def _mix(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # a matrix product over the pixels, which lie channel by channel (see `squeeze`): on a CPU half the time of a convolution
    return nn.functional.linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)              # (B, C, H, W)


def lu_factors(convs: Sequence[InvertibleConv1x1], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """P, L and U (with its diagonal) of K convolutions of one width, (K, C, C) each."""
    stack = lambda name: torch.stack([getattr(conv, name) for conv in convs]).to(dtype)
    lower = stack("lower").tril(-1) + torch.eye(convs[0].lower.shape[0], device=convs[0].lower.device, dtype=dtype)
    upper = stack("upper").triu(1) + torch.diag_embed(stack("sign") * stack("log_diagonal").exp())
    return stack("permutation"), lower, upper


def lu_inverse(convs: Sequence[InvertibleConv1x1], dtype: torch.dtype) -> Tensor:
    """W^-1 = U^-1 L^-1 P^T of K convolutions, (K, C, C), by two triangular solves in float64 where there is one."""
    wide = torch.float32 if convs[0].lower.device.type == "mps" else torch.float64
    with torch.autocast(convs[0].lower.device.type, enabled=False):
        permutation, lower, upper = lu_factors(convs, wide)
        half = torch.linalg.solve_triangular(lower, permutation.mT, upper=False, unitriangular=True)
        return torch.linalg.solve_triangular(upper, half, upper=True).to(dtype)


def fold(actnorms: Sequence[ActNorm], convs: Sequence[InvertibleConv1x1], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """K pairs of actnorm and convolution as K affine maps of the channels: y = A x + c.

    A = W diag(s), c = A shift. One batch of small matrix products for a whole level instead of 2 K passes over the pixels.

    Returns: A (K, C, C), c (K, C), and the sum of log |det A| over K, () for each pixel.
    """
    with torch.autocast(convs[0].lower.device.type, enabled=False):
        permutation, lower, upper = lu_factors(convs, dtype)
        log_scale = torch.stack([actnorm.log_scale for actnorm in actnorms]).to(dtype)               # (K, C)
        shift = torch.stack([actnorm.shift for actnorm in actnorms]).to(dtype)                       # (K, C)
        weight = (permutation @ lower @ upper) * log_scale.exp()[:, None, :]                          # (K, C, C)
        bias = (weight @ shift[:, :, None])[:, :, 0]                                                  # (K, C)
        log_det = log_scale.sum() + sum(conv.log_diagonal.sum() for conv in convs)
        return weight, bias, log_det


def fold_inverse(actnorms: Sequence[ActNorm], convs: Sequence[InvertibleConv1x1], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The inverses of `fold`'s maps, x = A^-1 y - shift: A^-1 (K, C, C), -shift (K, C), and minus its log-determinant."""
    inverse = lu_inverse(convs, dtype)
    log_scale = torch.stack([actnorm.log_scale for actnorm in actnorms]).to(dtype)
    shift = torch.stack([actnorm.shift for actnorm in actnorms]).to(dtype)
    log_det = log_scale.sum() + sum(conv.log_diagonal.sum() for conv in convs)
    return inverse * (-log_scale).exp()[:, :, None], -shift, -log_det
