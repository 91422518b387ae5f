"""The registry of Gaussian paths."""

from typing import Any

from .cosine import CosinePath
from .discrete_vp import DiscreteVPPath
from .edm import EDMPath
from .linear import LinearPath
from .path import Path
from .sub_vp import SubVPPath
from .ve import VEPath
from .vp_sde import VPSDEPath

__all__ = ["PATHS", "path_from_config"]

PATHS: dict[str, type[Path]] = {p.name: p for p in (DiscreteVPPath, VPSDEPath, SubVPPath, VEPath, EDMPath, LinearPath, CosinePath)}


def path_from_config(config: dict[str, Any]) -> Path:
    """The inverse of `Path.to_config`.

    Raises:
        ValueError: an unknown `type`, or an argument that the path does not take.
    """
    kwargs = dict(config)
    kind = kwargs.pop("type", None)
    if kind not in PATHS:
        raise ValueError(f"path type {kind!r} is not known; use one of {', '.join(PATHS)}.")
    allowed = set(PATHS[kind].__dataclass_fields__)
    if unknown := sorted(set(kwargs) - allowed):
        raise ValueError(f"path {kind!r} does not take {', '.join(unknown)}; it takes {', '.join(sorted(allowed)) or 'no arguments'}.")
    return PATHS[kind](**kwargs)
