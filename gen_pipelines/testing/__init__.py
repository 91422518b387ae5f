"""The conformance suite for schedulers: data whose ideal network is known, and one call that tries a scheduler on every kind of network."""

from .conformance import CHECKS, PROMISES, Promise, check_scheduler, check_schedulers, moment_errors
from .networks import CONSISTENCY_NETWORKS, GRIDS, NETWORKS, OTHER_NETWORKS, SEVEN, Network, diffusers_scheduler
from .oracle import GaussianOracle, MixtureOracle, sample
from .report import ConformanceError, Report, Row

__all__ = [
    "CHECKS", "CONSISTENCY_NETWORKS", "GRIDS", "NETWORKS", "OTHER_NETWORKS", "PROMISES", "SEVEN", "ConformanceError", "GaussianOracle",
    "MixtureOracle", "Network", "Promise", "Report", "Row", "check_scheduler", "check_schedulers", "diffusers_scheduler", "moment_errors",
    "sample",
]  # fmt: skip
