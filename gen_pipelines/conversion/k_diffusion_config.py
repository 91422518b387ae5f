"""k-diffusion's configuration (JSON): its section "model", read with checks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from .reader import Checkpoint, plain

__all__ = ["Section", "configuration"]


class Section(dict[str, Any]):
    """The section "model"; what is read is of the kind that it must be.

    Raises:
        ValueError: it is not; the message names the entry.
    """

    def number(self, key: str, usual: float | None = None, least: float = 0.0) -> float:
        """A number of at least `least`."""
        value = self.get(key, usual)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < least:
            raise ValueError(f"config: model.{key} = {value!r}; it must be a number of at least {least:g}.")
        return value

    def flag(self, key: str, usual: bool) -> bool:
        """True or false."""
        value = self.get(key, usual)
        if not isinstance(value, bool):
            raise ValueError(f"config: model.{key} = {value!r}; it must be true or false.")
        return value

    def size(self) -> int:
        """The side of the pictures, which are squares."""
        sizes = self.get("input_size")
        if not isinstance(sizes, (list, tuple)) or len(sizes) != 2 or sizes[0] != sizes[1] or not isinstance(sizes[0], int):
            raise ValueError(f"config: model.input_size = {sizes!r}; pipelines draw squares: it must be twice the same whole number.")
        return sizes[0]


def configuration(checkpoint: Checkpoint, given: Any, kind: str) -> tuple[Section, dict[str, Any]]:
    """The sections "model" and "dataset" of the configuration.

    Args:
        checkpoint: which may hold it.
        given: the one that was given instead, or None.
        kind: the type of network that the keys are those of.
    Raises:
        ValueError: there is none, or it is of another kind of network.
    """
    content = given
    if content is None and checkpoint.container == "safetensors" and "config" in checkpoint.metadata:
        try:
            content = json.loads(checkpoint.metadata["config"])
        except ValueError:
            raise ValueError(f"{checkpoint.path.name}: the configuration in its header is not valid JSON; give --config FILE.") from None
    if content is None and isinstance(checkpoint.tree, dict):
        content = plain(checkpoint.tree.get("config"))
    if content is None:
        raise ValueError(f"{checkpoint.path.name} does not hold its configuration (sigma_data, sizes, ...): give the JSON file of the "
                         "training by --config FILE.")  # fmt: skip
    model = content.get("model") if isinstance(content, Mapping) else None
    if not isinstance(model, Mapping):
        raise ValueError('config: no section "model" there; give the JSON file of the training.')
    if model.get("type") != kind:
        raise ValueError(f"config: the network is of type {model.get('type')!r}, and the weights are those of {kind!r}.")
    dataset = content.get("dataset")
    return Section(model), dict(dataset) if isinstance(dataset, Mapping) else {}
