"""Samplers on Gaussian data as exact linear maps: mean and variance of every state, without one random number.

With the ideal network of Gaussian data in one dimension every stage of a usual solver is affine in the state, in what it remembers and in
the noise it draws: x_i = gain_i x + offset_i + sum_k weight_ik z_k. The weights are read off by running the loop on a batch in which each
entry has one thing switched on, with the scheduler's `torch.randn` answered by unit vectors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["LinearLoop", "NotLinearError", "PlannedNoise", "propagate"]


class NotLinearError(Exception):
    """The loop is not an affine map of its start and of plain normal draws (it clips, or has its own source of noise)."""


class PlannedNoise(TorchFunctionMode):
    """Answers `torch.randn` and its relatives inside the block with `plan(number of the draw, what was drawn)`."""

    def __init__(self, plan: Callable[[int, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.plan, self.count = plan, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.randn, torch.randn_like, torch.normal):
            self.count += 1
            return out if self.plan is None else self.plan(self.count - 1, out)
        return out


@dataclass(frozen=True)
class LinearLoop:
    """The states of a loop: before each network evaluation, and the last.

    Args:
        gain, offset: x_i = gain x + offset + noise, one number per state.
        variance: of the noise that was drawn on the way.
        draws: how many times the scheduler drew noise.
    """

    gain: Tensor
    offset: Tensor
    variance: Tensor
    draws: int

    def moments(self, mean: float, variance: float) -> tuple[Tensor, Tensor]:
        """(mean, standard deviation) of every state for a start with these moments."""
        return self.gain * mean + self.offset, (self.gain**2 * variance + self.variance).sqrt()


def propagate(loop: Callable[[Tensor], list[Tensor]], expect: int = 0) -> LinearLoop:
    """Read off the map.

    Args:
        loop: start (B, 1), float64 -> the states, each (B, 1); it must begin anew each time it is called.
        expect: how many draws of noise to provide for; where there are more, the loop runs a second time.

    Raises:
        NotLinearError: superposition does not hold.
    """
    draws = expect
    while True:
        start = torch.zeros(draws + 3, 1, dtype=torch.float64)  # nothing, the start alone, each draw alone, everything together
        start[1], start[-1] = 1.0, 1.7

        def plan(k: int, drawn: Tensor, start: Tensor = start) -> Tensor:
            if drawn.shape != start.shape:
                raise NotLinearError(f"it drew noise of shape {tuple(drawn.shape)} for a sample of shape {tuple(start.shape)}")
            drawn = torch.zeros_like(drawn)
            drawn[-1] = 0.3
            if k + 3 < len(start):
                drawn[k + 2] = 1.0
            return drawn

        with PlannedNoise(plan) as noise:
            states = torch.stack([s[:, 0].double() for s in loop(start)])  # (states, batch)
        if noise.count <= draws:
            break
        draws = noise.count
    offset, ones = states[:, 0], states - states[:, :1]
    gain, weights = ones[:, 1], ones[:, 2:-1]
    together = offset + 1.7 * gain + 0.3 * weights.sum(1)
    if not torch.allclose(together, states[:, -1], rtol=1e-5, atol=1e-6 * float(states.abs().max())):
        raise NotLinearError("the whole is not the sum of its parts")
    return LinearLoop(gain, offset, weights.square().sum(1), noise.count)
