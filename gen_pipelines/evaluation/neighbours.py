"""Fidelity and coverage by nearest neighbours: precision, recall, density, coverage; and how near to the training pictures a model draws.

Everything is computed in blocks of rows, so that memory grows with one side alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .statistics import check_features

BLOCK = 1000


@dataclass(frozen=True)
class Manifolds:
    """How two sets of features overlap, by balls around every point that reach to its k-th neighbour in its own set.

    Attributes:
        precision: share of drawn pictures inside a ball of a real one.
        recall: share of real pictures inside a ball of a drawn one.
        density: how many balls of real pictures a drawn one lies in, over k; above 1 in the crowded middle.
        coverage: share of real pictures whose ball holds a drawn one.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def manifolds(real: Tensor, drawn: Tensor, k_precision: int = 3, k_density: int = 5) -> Manifolds:
    """Precision and recall with `k_precision` neighbours, density and coverage with `k_density`; the papers' numbers are the defaults.

    Args:
        real, drawn: features, (N, D) and (M, D). Best of equal number: precision grows with N, recall with M.
    Raises:
        ValueError: too few pictures for so many neighbours.

    References: Kynkäänniemi et al. 2019, eqs. 1 to 3, https://arxiv.org/abs/1904.06991; Naeem et al. 2020, eqs. 3 and 4,
    https://arxiv.org/abs/2002.09797
    """
    check_features(real, "manifolds")
    check_features(drawn, "manifolds")
    most = max(k_precision, k_density)
    if min(len(real), len(drawn)) <= most or min(k_precision, k_density) < 1:
        raise ValueError(f"manifolds: {most} neighbours need more than {most} pictures in each set, got {len(real)} and {len(drawn)}.")
    x, y = real.double(), drawn.double()
    ball_x, wide_x, ball_y = radii(x, k_precision), radii(x, k_density), radii(y, k_precision)
    hits, recalled, covered = torch.zeros(len(y)), 0, 0
    precise = torch.zeros(len(y), dtype=torch.bool)
    for rows, distance in blocks(x, y):                                                                # (R, M)
        precise |= (distance <= ball_x[rows, None]).any(0)
        recalled += int((distance <= ball_y).any(1).sum())
        inside = distance <= wide_x[rows, None]
        hits += inside.sum(0)
        covered += int(inside.any(1).sum())
    return Manifolds(
        precision=precise.double().mean().item(),
        recall=recalled / len(x),
        density=hits.double().mean().item() / k_density,
        coverage=covered / len(x),
    )


def blocks(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Distances from x (N, D) to y (M, D), a block of rows of x at a time: (rows, (R, M))."""
    for first in range(0, len(x), BLOCK):
        rows = slice(first, min(first + BLOCK, len(x)))
        yield rows, torch.cdist(x[rows], y)


def radii(x: Tensor, k: int) -> Tensor:
    """Distance of each point (N, D) to its k-th neighbour among the others, (N,)."""
    found = torch.empty(len(x), dtype=x.dtype)
    for rows, distance in blocks(x, x):
        distance[torch.arange(len(distance)), torch.arange(rows.start, rows.stop)] = 0.0  # rounding may say otherwise
        found[rows] = distance.kthvalue(k + 1, dim=1).values
    return found


def nearest(x: Tensor, y: Tensor) -> Tensor:
    """Distance of each point of x (N, D) to the nearest of y (M, D), (N,); exact where it is zero."""
    found = torch.empty(len(x), dtype=torch.float64)
    for rows, distance in blocks(x, y):
        place = distance.argmin(1)
        found[rows] = (x[rows].double() - y[place].double()).norm(dim=1)  # the matrix product of cdist leaves 1e-3 where there is 0
    return found
