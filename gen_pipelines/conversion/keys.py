"""What mappers ask the keys of a state dict."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor


def get(state: Mapping[str, Tensor], key: str) -> Tensor:
    """The tensor of a key.

    Raises:
        ValueError: the source lacks it.
    """
    if key not in state:
        raise ValueError(f"the source has no {key}.")
    return state[key]


def below(found: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose keys begin with a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}


def numbered(state: Mapping[str, Tensor], pattern: str) -> list[int]:
    """The numbers that the first group of a pattern takes at the beginning of keys, in order."""
    return sorted({int(match[1]) for key in state if (match := re.match(pattern, key))})


def covered(reasons: Mapping[str, str], found: Mapping[str, Tensor], prefix: str = "") -> dict[str, str]:
    """Those reasons why keys (or patterns with * at their end) are dropped that there are keys for."""
    full = {prefix + pattern: why for pattern, why in reasons.items()}
    covers = lambda pattern, key: key.startswith(pattern[:-1]) if pattern.endswith("*") else key == pattern
    return {pattern: why for pattern, why in full.items() if any(covers(pattern, key) for key in found)}
