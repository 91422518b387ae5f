"""Distances between two sets of pictures by their features: Fréchet's and the kernel's. Whose features: the caller says it."""

from __future__ import annotations

import torch
from torch import Tensor

from .statistics import FeatureStatistics, check_features


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)): the squared Wasserstein distance of the two Gaussians with these moments.

    The trace of the root is that of the symmetric (C1^(1/2) C2 C1^(1/2))^(1/2), whose eigenvalues are real and not negative; singular
    covariances need no epsilon. Biased upwards by the number of samples: compare at equal numbers.

    References: Heusel et al. 2017, eq. 6, https://arxiv.org/abs/1706.08500; Dowson & Landau 1982
    """
    if len(first.mean) != len(second.mean):
        raise ValueError(f"frechet_distance: features of {len(first.mean)} and of {len(second.mean)} numbers are not comparable.")
    a, b = first.covariance, second.covariance
    values, vectors = torch.linalg.eigh(a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ b @ root
    trace = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    return ((first.mean - second.mean).square().sum() + a.trace() + b.trace() - 2 * trace).item()


def kernel_mmd(first: Tensor, second: Tensor) -> float:
    """Unbiased estimate of the squared maximum mean discrepancy under k(x, y) = (x . y / D + 1)^3; may be slightly negative.

    Args:
        first, second: features, (N, D) and (M, D).

    References: Bińkowski et al. 2018, section 4, https://arxiv.org/abs/1801.01401; Gretton et al. 2012, eq. 3
    """
    x, y = first.double(), second.double()
    n, m, dim = len(x), len(y), x.shape[1]
    own, other, cross = ((a @ b.T / dim + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = (own.sum() - own.trace()) / (n * (n - 1)) + (other.sum() - other.trace()) / (m * (m - 1))
    return (within - 2 * cross.mean()).item()


def kernel_distance(first: Tensor, second: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> tuple[float, float]:
    """`kernel_mmd` averaged over random subsets without replacement; unbiased at every number of samples.

    Args:
        first, second: features, (N, D) and (M, D).
        subsets: how many.
        subset_size: pictures of each set in a subset; at most as many as the smaller set has.
        seed: of the subsets.
    Returns: mean and standard deviation over subsets.
    """
    check_features(first, "kernel_distance")
    check_features(second, "kernel_distance")
    size = min(subset_size, len(first), len(second))
    if size < 2 or subsets < 1:
        raise ValueError(f"kernel_distance: needs at least 2 pictures of each set and 1 subset; got {size} and {subsets}.")
    generator = torch.Generator().manual_seed(seed)
    draw = lambda x: x[torch.randperm(len(x), generator=generator)[:size]]
    values = torch.tensor([kernel_mmd(draw(first), draw(second)) for _ in range(subsets)], dtype=torch.float64)
    return values.mean().item(), values.std(unbiased=False).item()
