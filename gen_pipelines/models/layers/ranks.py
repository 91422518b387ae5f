"""Sums over the processes of a run, for statistics that belong to the whole batch (codebooks, free bits)."""

from __future__ import annotations

import torch
from torch import Tensor


def num_ranks() -> int:
    """Processes that train together; 1 without torch.distributed."""
    return torch.distributed.get_world_size() if torch.distributed.is_available() and torch.distributed.is_initialized() else 1


def rank() -> int:
    """The number of this process among them."""
    return torch.distributed.get_rank() if num_ranks() > 1 else 0


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of every rank's x, without gradients; x itself on one rank."""
    if num_ranks() == 1:
        return x
    x = x.detach().clone()
    torch.distributed.all_reduce(x)
    return x


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of every rank's x, without gradients; x itself on one rank."""
    return sum_over_ranks(x) / num_ranks() if num_ranks() > 1 else x
