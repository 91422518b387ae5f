"""The path of EDM: variance exploding, with EDM's range of noise levels."""

from dataclasses import dataclass
from typing import ClassVar

from .ve import VEPath

__all__ = ["EDMPath"]


@dataclass(frozen=True)
class EDMPath(VEPath):
    """x = x_0 + sigma eps; the native time is sigma, from `sigma_min` to `sigma_max`.

    References: Karras et al. 2022, table 1 (sigma(t) = t, s(t) = 1), https://arxiv.org/abs/2206.00364
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    name: ClassVar[str] = "edm"
