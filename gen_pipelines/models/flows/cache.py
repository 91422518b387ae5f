"""Values that follow from weights, kept until a weight changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Cached:
    """The value of a function of tensors, computed again when one of them has changed: its version, memory, dtype or device."""

    def __init__(self) -> None:
        self._value, self._state = None, None

    def get(self, tensors: Sequence[Tensor], compute: Callable[[], Any]) -> Any:
        """`compute()`, or what it gave before if none of the tensors has changed since. With gradients it is always computed."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return compute()
        if any(tensor.is_inference() for tensor in tensors):  # they count no versions
            return compute()
        if self._state is None or not all(
            old.data_ptr() == new.data_ptr() and version == new._version and old.dtype == new.dtype and old.device == new.device
            for (old, version), new in zip(self._state, tensors, strict=True)
        ):
            self._value = compute()
            # the aliases keep the memory, so that nothing else can come to lie at the same address
            self._state = [(tensor.detach(), tensor._version) for tensor in tensors]
        return self._value
