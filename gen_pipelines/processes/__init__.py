"""Gaussian paths, what networks predict on them, and time grids: pure maths, float64 tables, no networks and no loops."""

from .conventions import CONVENTIONS, Convention
from .cosine import CosinePath
from .discrete_vp import DiscreteVPPath
from .edm import EDMPath
from .level import DATA, Level
from .linear import LinearPath
from .parameterization import PREDICTIONS, TIME_INPUTS, Parameterization
from .path import Path
from .paths import PATHS
from .sub_vp import SubVPPath
from .ve import VEPath
from .vp_sde import VPSDEPath

__all__ = [
    "CONVENTIONS", "DATA", "PATHS", "PREDICTIONS", "TIME_INPUTS", "Convention", "CosinePath", "DiscreteVPPath", "EDMPath", "Level",
    "LinearPath", "Parameterization", "Path", "SubVPPath", "VEPath", "VPSDEPath",
]  # fmt: skip
