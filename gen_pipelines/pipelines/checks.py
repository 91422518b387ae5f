"""Checks of a call's arguments that every pipeline makes before it computes anything: what came, what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .conditioning.captions import check_count, shape_of

__all__ = [
    "OUTPUT_TYPES",
    "check_callback",
    "check_count",
    "check_eta",
    "check_generator",
    "check_output_type",
    "latents_from_callback",
    "shape_of",
    "version_of",
]

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def check_eta(eta: Any) -> None:
    """A number from 0 to 1.

    Raises:
        ValueError: it is none.
    """
    if isinstance(eta, bool) or not isinstance(eta, Real) or not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must be a number from 0 (deterministic) to 1, got {eta!r}.")


def check_output_type(output_type: Any, allowed: Sequence[str] = OUTPUT_TYPES) -> None:
    """One of `allowed`.

    Raises:
        ValueError: it is none.
    """
    if output_type not in allowed:
        raise ValueError(f"output_type must be one of {', '.join(allowed)}, got {output_type!r}.")


def check_generator(generator: Any, batch: int) -> None:
    """None, one torch.Generator, or a list with one per picture of the batch.

    Raises:
        TypeError, ValueError: it is something else, or there are too few or too many.
    """
    if generator is None:
        return
    many = isinstance(generator, (list, tuple))
    if wrong := [type(g).__name__ for g in (generator if many else [generator]) if not isinstance(g, torch.Generator)]:
        raise TypeError(f"generator must be a torch.Generator or a list of them, got {wrong[0]}.")
    if many and len(generator) != batch:
        raise ValueError(f"generator must be one, or one per picture: {batch} here, got {len(generator)}.")


def check_callback(callback: Any, names: Sequence[str], allowed: Sequence[str]) -> None:
    """Something callable, or None; `names` are tensors that it may ask for.

    Raises:
        TypeError, ValueError: it is not.
    """
    if callback is not None and not callable(callback):
        raise TypeError(f"callback_on_step_end must be callable, got a {type(callback).__name__}.")
    if unknown := [name for name in names if name not in allowed]:
        raise ValueError(f"callback_on_step_end_tensor_inputs must be among {', '.join(allowed)}, got {', '.join(map(str, unknown))}.")


def version_of(tensor: Tensor | None) -> int | None:
    """How often a tensor was written into; None where it does not count, as in inference mode."""
    return None if tensor is None or tensor.is_inference() else tensor._version


def latents_from_callback(value: Any, before: Tensor) -> Tensor:
    """The latents that a callback returned, in the dtype and on the device of those that it was given.

    Raises:
        ValueError: they are none, or of another shape.
    """
    if not isinstance(value, Tensor) or value.shape != before.shape:
        raise ValueError(f"callback_on_step_end returned latents of shape {shape_of(value)}; they must keep {shape_of(before)}.")
    return value.to(before)
