"""Random numbers that belong to a sample: one generator for a batch, or one per sample."""

from collections.abc import Sequence

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None


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
