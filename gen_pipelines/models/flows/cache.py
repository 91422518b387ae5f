"""Values that follow from weights, kept until a weight changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Cached:
    """The value of a function of tensors, computed again when a number in one of them or their device has changed, or `key` is another.

    The numbers are compared, not the tensors' versions: an assignment through `.data`, as diffusers' `EMAModel` writes, counts none.
    """

    def __init__(self) -> None:
        self._value: Any = None
        self._key: Any = None
        self._seen: Tensor | None = None

    def get(self, tensors: Sequence[Tensor], key: Any, compute: Callable[[], Any]) -> Any:
        """`compute()`, or what it gave before if none of the tensors has changed since. With gradients it is always computed."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return compute()
        now = torch.cat([tensor.flatten() for tensor in tensors])
        key = (key, now.dtype, now.device)
        if self._seen is None or self._key != key or not torch.equal(self._seen, now):
            self._value, self._key, self._seen = compute(), key, now
        return self._value
