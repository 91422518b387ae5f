"""Mean and covariance of features as they stream by, mergeable over batches, processes and resumed runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class FeatureStatistics:
    """Count, mean and scatter of vectors, in float64.

    Two of them merge into that of both sets, whatever the order, up to rounding of 1e-15 relative to the largest entry.

    Attributes:
        count: vectors seen.
        mean: (D,).
        scatter: sum of (x - mean) (x - mean)^T, (D, D).

    References: Chan, Golub & LeVeque 1979, eqs. 2.1a and 2.1b, in matrix form
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def empty(cls, dim: int) -> FeatureStatistics:
        """Those of no vectors of length `dim`."""
        return cls(0, torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64))

    @classmethod
    def of(cls, features: Tensor) -> FeatureStatistics:
        """Those of vectors (N, D).

        Raises:
            ValueError: not a matrix, or numbers that are not finite: they would make every later number NaN.
        """
        check_features(features, "FeatureStatistics")
        x = features.detach().cpu().double()
        if not len(x):
            return cls.empty(x.shape[1])
        mean = x.mean(0)
        centred = x - mean
        return cls(len(x), mean, centred.T @ centred)

    def merge(self, other: FeatureStatistics) -> FeatureStatistics:
        """The statistics of both sets together."""
        if len(self.mean) != len(other.mean):
            raise ValueError(f"FeatureStatistics: features of {len(self.mean)} and {len(other.mean)} numbers do not merge.")
        count = self.count + other.count
        if not count:
            return FeatureStatistics.empty(len(self.mean))
        away = other.mean - self.mean
        mean = self.mean + away * (other.count / count)
        return FeatureStatistics(count, mean, self.scatter + other.scatter + torch.outer(away, away) * (self.count * other.count / count))

    def update(self, features: Tensor) -> FeatureStatistics:
        """The statistics with more vectors (N, D)."""
        return self.merge(FeatureStatistics.of(features))

    @property
    def covariance(self) -> Tensor:
        """Unbiased, (D, D).

        Raises:
            ValueError: fewer than two vectors.
        """
        if self.count < 2:
            raise ValueError(f"FeatureStatistics: a covariance needs at least 2 vectors, there are {self.count}.")
        return self.scatter / (self.count - 1)

    @property
    def std(self) -> Tensor:
        """Standard deviation of each feature, (D,)."""
        return self.covariance.diagonal().sqrt()

    def scaled(self, scale: Tensor) -> FeatureStatistics:
        """The statistics of features divided by `scale`, (D,)."""
        scale = scale.double()
        return FeatureStatistics(self.count, self.mean / scale, self.scatter / torch.outer(scale, scale))


def check_features(features: Tensor, name: str) -> None:
    """A finite matrix (N, D).

    Raises:
        ValueError: it is not.
    """
    if features.ndim != 2:
        raise ValueError(f"{name}: features have shape (pictures, numbers), got {tuple(features.shape)}.")
    if bad := int((~torch.isfinite(features)).any(1).sum()):
        raise ValueError(f"{name}: {bad} of {len(features)} vectors of features are not finite; count such pictures and leave them out.")
