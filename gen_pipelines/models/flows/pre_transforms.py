"""Bijections that come before the first layer: from dequantised pictures in [-1, 1) to numbers on the whole line, value by value."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class LogitTransform(nn.Module):
    """y = logit(alpha + (1 - 2 alpha) (x + 1) / 2), so that no value of y is one that no picture has.

    log |dy/dx| = softplus(y) + softplus(-y) + log((1 - 2 alpha) / 2) for each value, counted here and nowhere else.

    References: Dinh et al. 2017, section 4.1, https://arxiv.org/abs/1605.08803 (they write alpha + (1 - alpha) x)
    """

    def __init__(self, alpha: float = 0.05) -> None:
        super().__init__()
        if not 0 < alpha < 0.5:
            raise ValueError(f"LogitTransform: alpha must lie between 0 and 0.5, got {alpha}; with 0 a black pixel is at minus infinity.")
        self.alpha = alpha

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, C, H, W) in [-1, 1]. Returns: y of that shape, log_det (B,)."""
        p = self.alpha + (1 - 2 * self.alpha) * (x + 1) / 2
        y = torch.log(p) - torch.log1p(-p)                                                            # (B, C, H, W)
        return y, self._log_slope(y).flatten(1).sum(1)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse; y of values that no picture has come out beyond [-1, 1]."""
        x = (torch.sigmoid(y) - self.alpha) / (1 - 2 * self.alpha) * 2 - 1                             # (B, C, H, W)
        return x, -self._log_slope(y).flatten(1).sum(1)

    def _log_slope(self, y: Tensor) -> Tensor:
        softplus = nn.functional.softplus
        return softplus(y) + softplus(-y) + math.log((1 - 2 * self.alpha) / 2)


class MarginalTransform(nn.Module):
    """y = Phi^-1(F(x)): F is the distribution of single values over the training pictures, Phi that of a standard normal.

    F is linear inside each of the 2^num_bits bins, so a uniformly dequantised value of any position in any picture is Gaussian before the
    first layer: a flow of few layers need not spend them on the spike of a black background. F is measured once, by `initialize`.

    References: Chen and Gopinath 2000, "Gaussianization", section 2 (one dimension)
    """

    def __init__(self, num_bits: int = 8, floor: float = 1e-6) -> None:
        super().__init__()
        self.count, self.floor = 2**num_bits, floor
        self.register_buffer("cumulative", torch.linspace(0, 1, self.count + 1, dtype=torch.float64).float())
        self.register_buffer("initialized", torch.tensor(False))

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Measure F on dequantised pictures x (B, C, H, W), over all processes; a bin that nothing fell into keeps a little of the mass."""
        if self.initialized:
            return
        bins = ((x + 1) * (self.count / 2)).floor().clamp_(0, self.count - 1).long()
        counts = torch.bincount(bins.flatten(), minlength=self.count).double()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
        share = (counts + 1e-3 * counts.sum() / self.count) / (counts.sum() * (1 + 1e-3))
        self.cumulative[1:] = share.cumsum(0).to(self.cumulative)
        self.cumulative[-1] = 1
        self.initialized.fill_(True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, C, H, W) in [-1, 1]. Returns: y of that shape, log_det (B,)."""
        cumulative = self.cumulative.to(x.dtype)
        place = (x + 1) * (self.count / 2)
        bins = place.detach().floor().clamp(0, self.count - 1).long()
        share = (cumulative[1:] - cumulative[:-1])[bins]                                              # (B, C, H, W)
        y = self._probit(cumulative[:-1][bins] + share * (place - bins))                              # (B, C, H, W)
        return y, (share.log() + self._log_slope(y)).flatten(1).sum(1)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse; y of values that no picture has come out beyond [-1, 1]."""
        cumulative = self.cumulative.to(y.dtype)
        p = (torch.special.ndtr(y) - self.floor) / (1 - 2 * self.floor)
        bins = (torch.searchsorted(cumulative, p.detach().contiguous(), right=True) - 1).clamp(0, self.count - 1)
        share = (cumulative[1:] - cumulative[:-1])[bins]
        x = (bins + (p - cumulative[:-1][bins]) / share) * (2 / self.count) - 1                       # (B, C, H, W)
        return x, -(share.log() + self._log_slope(y)).flatten(1).sum(1)

    def _probit(self, p: Tensor) -> Tensor:
        return torch.special.ndtri(self.floor + (1 - 2 * self.floor) * p)

    def _log_slope(self, y: Tensor) -> Tensor:
        """log of dy/dF times bins per unit of x: 1 / phi(y), the floor's share, and half the count of bins."""
        return 0.5 * y.square() + 0.5 * math.log(2 * math.pi) + math.log((1 - 2 * self.floor) * self.count / 2)


PRE_TRANSFORMS = ("none", "logit", "marginal")


def make_pre_transform(name: str, alpha: float, num_bits: int) -> nn.Module | None:
    """The pre-transform of a config.

    Raises:
        ValueError: an unknown name.
    """
    if name not in PRE_TRANSFORMS:
        raise ValueError(f"pre_transform: {name!r} is none of {', '.join(PRE_TRANSFORMS)}.")
    return {"none": lambda: None, "logit": lambda: LogitTransform(alpha), "marginal": lambda: MarginalTransform(num_bits)}[name]()
