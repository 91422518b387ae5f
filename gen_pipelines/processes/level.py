"""One noise level of a Gaussian path."""

import math
from typing import NamedTuple

__all__ = ["DATA", "Level"]


class Level(NamedTuple):
    """x = alpha x_0 + sigma eps: both coefficients at one point of a path, Python floats (float64)."""

    alpha: float
    sigma: float

    @property
    def lambda_(self) -> float:
        """Half log-SNR, log(alpha / sigma): -inf for pure noise, +inf for data."""
        if self.alpha == 0.0:
            return -math.inf
        return math.inf if self.sigma == 0.0 else math.log(self.alpha) - math.log(self.sigma)

    @property
    def ratio(self) -> float:
        """sigma / alpha, the noise level of the same picture in variance-exploding coordinates; inf for pure noise."""
        return math.inf if self.alpha == 0.0 else self.sigma / self.alpha


DATA = Level(1.0, 0.0)  # where every path ends
