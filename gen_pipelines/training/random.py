"""Randomness that belongs to a sample, not to a process.

Every random number of training (time, noise, augmentation, dropout of a caption) is drawn from a generator that is seeded by
(seed, stream, row, draw). So a sample meets the same noise whichever rank, batch or resumed run it falls into: two ranks compute
the gradients of one, and nothing has to be stored to resume.
"""

from collections.abc import Sequence

import numpy as np
import torch

from ..processes.random import Generators, normal, uniform

__all__ = ["STREAMS", "Generators", "normal", "sample_generators", "seed_of", "uniform"]

STREAMS = ("permutation", "augmentation", "objective", "sampling", "caching")


def seed_of(seed: int, stream: str, *counters: int) -> int:
    """A 64-bit seed for one purpose (one of `STREAMS`) and place; statistically independent of every other."""
    return int(np.random.SeedSequence([seed, STREAMS.index(stream), *counters]).generate_state(1, np.uint64)[0])


def sample_generators(seed: int, stream: str, rows: Sequence[int], draws: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per sample. `rows`: places in the data set; `draws`: how often each row has been drawn before."""
    return [torch.Generator().manual_seed(seed_of(seed, stream, row, draw)) for row, draw in zip(rows, draws, strict=True)]
