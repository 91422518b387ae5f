"""What the denoisers have in common."""

from __future__ import annotations

from typing import Any

from torch import nn


def check_class_labels(network: nn.Module, class_labels: Any, has_classes: bool) -> None:
    """Raises ValueError for labels given to a network without classes, or none to one with."""
    if (class_labels is None) == has_classes:
        has = "has classes: give class_labels" if has_classes else "has no classes: leave class_labels out"
        raise ValueError(f"{type(network).__name__}: this network {has}.")
