"""Guidance: which predictions a step needs, and how they become one.

A guidance is an object with `branches` and `combine`; a number is `ClassifierFreeGuidance`, and the guiders of diffusers are adapted.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Guidance(Protocol):
    """What a pipeline asks of a guidance. All branches of a step are evaluated in one batch."""

    def branches(self, step: int, num_steps: int, timestep: Tensor) -> tuple[str, ...]:
        """The predictions that this step needs, each "cond" (the prompt) or "uncond" (the negative prompt)."""
        ...

    def combine(self, outputs: Sequence[Tensor]) -> Tensor:
        """One prediction from those of the branches, in their order, each (B, C, H, W), float32."""
        ...


@dataclass(frozen=True)
class ClassifierFreeGuidance:
    """uncond + scale (cond - uncond), where the papers' w is scale - 1. At 1 and at 0 only the branch that counts is evaluated.

    References: Ho & Salimans 2022, eq. 6, https://arxiv.org/abs/2207.12598
    """

    scale: float = 7.5

    def branches(self, step: int, num_steps: int, timestep: Tensor) -> tuple[str, ...]:
        return ("cond",) if self.scale == 1.0 else ("uncond",) if self.scale == 0.0 else ("uncond", "cond")

    def combine(self, outputs: Sequence[Tensor]) -> Tensor:
        if len(outputs) == 1:
            return outputs[0]
        uncond, cond = outputs
        return torch.add(uncond, cond - uncond, alpha=self.scale)


class DiffusersGuidance:
    """A guider of diffusers (`diffusers.guiders`): classifier-free, adaptive projected, zero-star, tangential, skip-layer, ...

    A guider that hooks the network (`prepare_models`) is given one forward pass per branch instead of one batch.
    """

    def __init__(self, guider: Any) -> None:
        self._guider = copy.deepcopy(guider)  # it keeps the state of a run
        self._batches: list[Any] = []

    @property
    def hooks_network(self) -> bool:
        from diffusers.guiders.guider_utils import BaseGuidance

        return type(self._guider).prepare_models is not BaseGuidance.prepare_models

    def branches(self, step: int, num_steps: int, timestep: Tensor) -> tuple[str, ...]:
        self._guider.set_state(step=step, num_inference_steps=num_steps, timestep=timestep)
        self._batches = self._guider.prepare_inputs({"branch": ("cond", "uncond")})
        return tuple(batch.branch for batch in self._batches)

    @contextmanager
    def around(self, denoiser: nn.Module) -> Iterator[None]:
        """Entered once per branch, in order."""
        self._guider.prepare_models(denoiser)
        try:
            yield
        finally:
            self._guider.cleanup_models(denoiser)

    def combine(self, outputs: Sequence[Tensor]) -> Tensor:
        for batch, output in zip(self._batches, outputs, strict=True):
            batch.noise_pred = output
        return self._guider(self._batches).pred


def as_guidance(guidance: Any) -> Guidance:
    """A guidance from a number, one of our objects, or a guider of diffusers.

    Numbers mean what they mean in diffusers: up to 1 there is no guidance. For the formula at every scale pass
    ClassifierFreeGuidance(scale).

    Raises:
        ValueError: the number is not finite or negative.
        TypeError: it is none of these.
    """
    if isinstance(guidance, (int, float)) and not isinstance(guidance, bool):
        if not math.isfinite(guidance) or guidance < 0:
            raise ValueError(f"guidance_scale must be a finite number of at least 0 (1 and less: no guidance), got {guidance}.")
        return ClassifierFreeGuidance(max(1.0, float(guidance)))
    if hasattr(guidance, "branches") and hasattr(guidance, "combine"):
        return guidance
    if hasattr(guidance, "prepare_inputs") and hasattr(guidance, "set_state"):
        return DiffusersGuidance(guidance)
    raise TypeError(
        f"guidance_scale must be a number, an object with branches(...) and combine(...), or a guider of diffusers; "
        f"got a {type(guidance).__name__}."
    )
