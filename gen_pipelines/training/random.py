"""Randomness that belongs to a sample, not to a process.

Every random number of training (time, noise, augmentation, dropout of a caption) is drawn from a generator that is seeded by
(seed, stream, row, draw). So a sample meets the same noise whichever rank, batch or resumed run it falls into: two ranks compute
the gradients of one, and nothing has to be stored to resume.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None

STREAMS = ("permutation", "augmentation", "objective", "sampling", "caching")


def seed_of(seed: int, stream: str, *counters: int) -> int:
    """A 64-bit seed for one purpose (one of `STREAMS`) and place; statistically independent of every other."""
    return int(np.random.SeedSequence([seed, STREAMS.index(stream), *counters]).generate_state(1, np.uint64)[0])


def sample_generators(seed: int, stream: str, rows: Sequence[int], draws: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per sample. `rows`: places in the data set; `draws`: how often each row has been drawn before."""
    return [torch.Generator().manual_seed(seed_of(seed, stream, row, draw)) for row, draw in zip(rows, draws, strict=True)]


def normal(shape: Sequence[int], generator: Generators, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers, shape (B, *event): with a list of B generators, sample i is drawn from generator i alone."""
    return _draw(torch.randn, shape, generator, device, dtype)


def uniform(shape: Sequence[int], generator: Generators, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform numbers on [0, 1), shape (B, *event): with a list of B generators, sample i is drawn from generator i alone."""
    return _draw(torch.rand, shape, generator, device, dtype)


def _draw(draw, shape, generator, device, dtype) -> Tensor:
    if generator is None or isinstance(generator, torch.Generator):
        source = generator.device if generator is not None else device
        return draw(*shape, generator=generator, device=source, dtype=dtype).to(device)
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators for a batch of {shape[0]}: pass one generator, or one per sample.")
    return torch.stack([draw(*shape[1:], generator=g, device=g.device, dtype=dtype) for g in generator]).to(device)
