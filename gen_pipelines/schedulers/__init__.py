"""Schedulers: one sampler per file, each right on every network that a `Parameterization` describes."""

from .ddim import DDIMScheduler
from .ddpm import DDPMScheduler
from .euler import EulerScheduler
from .flow_match_euler import FlowMatchEulerScheduler

__all__ = ["SCHEDULERS", "DDIMScheduler", "DDPMScheduler", "EulerScheduler", "FlowMatchEulerScheduler"]

# the command line's name -> class
SCHEDULERS = {
    "ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "euler": EulerScheduler,
    "flow_match_euler": FlowMatchEulerScheduler,
}
