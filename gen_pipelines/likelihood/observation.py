"""Levels of a picture as what a decoder's distribution is over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..processes.random import Generators, uniform
from .dequantization import dequantize


@dataclass
class Observation:
    """Pictures as a distribution sees them.

    Attributes:
        x: (B, C, H, W) in [-1, 1].
        weight: what is added to log p(x) to speak of the levels, (B,); the width of the bins where p is a density.
        dequantization: how x came from the levels, as in `LikelihoodResult`.
        num_dims: values in a picture; None for binarised pictures, which are not counted in bits.
    """

    x: Tensor
    weight: Tensor
    dequantization: str
    num_dims: int | None


def observe(levels: Tensor, likelihood: str, num_bits: int = 8, generator: Generators = None) -> Observation:
    """Prepares levels for a likelihood.

    Args:
        levels: integers from 0 to 2^num_bits - 1, (B, C, H, W).
        likelihood: "discretized_logistic" takes the levels as they are; "gaussian" a point in their bin, uniformly drawn; "bernoulli"
            black or white, drawn with the grey value as the probability of white (dynamic binarisation; black and white stay as they are).
        generator: one, or one per picture.
    """
    top, zero = 2**num_bits - 1, torch.zeros(len(levels), device=levels.device)
    if likelihood == "gaussian":
        x, weight = dequantize(levels, num_bits, generator)
        return Observation(x, weight, "uniform", levels[0].numel())
    if likelihood == "bernoulli":
        white = uniform(levels.shape, generator, levels.device) < levels.float() / top
        return Observation(torch.where(white, 1.0, -1.0), zero, "dynamic binarization", None)
    return Observation(levels.float() * (2 / top) - 1, zero, "none", levels[0].numel())


def own_generators(generator: Generators, count: int) -> Sequence[torch.Generator] | None:
    """One generator per picture, seeded from a single one, so that results do not depend on how pictures are batched; None stays None."""
    if not isinstance(generator, torch.Generator):
        return generator
    seeds = torch.randint(2**63 - 1, (count,), generator=generator, device=generator.device).tolist()
    return [torch.Generator().manual_seed(seed) for seed in seeds]
