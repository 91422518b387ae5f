"""What every Gaussian path x_t = alpha(t) x_0 + sigma(t) eps has in common."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from .level import Level

__all__ = ["Path"]


def _in_float64(function: Callable[[Tensor], Tensor], t: Tensor | float) -> Tensor:
    """Evaluate in float64 and give back the dtype of `t`, but never less than float32."""
    t = torch.as_tensor(t, dtype=torch.float64) if not isinstance(t, Tensor) else t
    dtype = torch.promote_types(t.dtype, torch.float32) if t.is_floating_point() else torch.float32
    wide = torch.float32 if t.device.type == "mps" else torch.float64  # mps has no float64
    return function(t.to(wide)).to(dtype)


class Path(ABC):
    """x_t = alpha(t) x_0 + sigma(t) eps with lambda = log(alpha / sigma) falling from data to noise.

    Subclasses are frozen dataclasses. They give `name`, `t_min` and `t_max` (the ends of the native time, data end first) and, in
    float64, `_alpha`, `_sigma`, `_alpha_dot`, `_sigma_dot` and `_t_from_lambda`. The public methods take a time of any shape (a tensor,
    or a number, which becomes a float64 scalar) and return its shape and dtype; integer and half-precision times give float32.
    """

    name: ClassVar[str]
    t_min: float
    t_max: float

    @abstractmethod
    def _alpha(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _sigma(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _alpha_dot(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _sigma_dot(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _t_from_lambda(self, lambda_: Tensor) -> Tensor: ...

    def _lambda(self, t: Tensor) -> Tensor:
        return self._alpha(t).log() - self._sigma(t).log()

    def alpha(self, t: Tensor | float) -> Tensor:
        """Coefficient of x_0."""
        return _in_float64(self._alpha, t)

    def sigma(self, t: Tensor | float) -> Tensor:
        """Standard deviation of the noise."""
        return _in_float64(self._sigma, t)

    def alpha_dot(self, t: Tensor | float) -> Tensor:
        """d alpha / dt in the path's native time."""
        return _in_float64(self._alpha_dot, t)

    def sigma_dot(self, t: Tensor | float) -> Tensor:
        """d sigma / dt in the path's native time."""
        return _in_float64(self._sigma_dot, t)

    def lambda_(self, t: Tensor | float) -> Tensor:
        """Half log-SNR log(alpha / sigma), -inf where alpha = 0 and +inf where sigma = 0."""
        return _in_float64(self._lambda, t)

    def t_from_lambda(self, lambda_: Tensor | float) -> Tensor:
        """The time at which `lambda_` is reached; the inverse of `lambda_`."""
        return _in_float64(self._t_from_lambda, lambda_)

    def level(self, t: float) -> Level:
        """(alpha, sigma) at one time, Python floats."""
        t = torch.tensor(float(t), dtype=torch.float64)
        return Level(float(self._alpha(t)), float(self._sigma(t)))

    def to_config(self) -> dict[str, Any]:
        """A JSON-ready dict: `type` is the name in `PATHS`, the rest are the constructor's arguments."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"type": self.name, **{k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}}
