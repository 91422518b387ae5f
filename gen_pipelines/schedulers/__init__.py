"""Schedulers: one sampler per file, each right on every network that a `Parameterization` describes."""

from .ddim import DDIMScheduler
from .ddpm import DDPMScheduler
from .dpm_solver_multistep import DPMSolverMultistepScheduler
from .euler import EulerScheduler
from .euler_ancestral import EulerAncestralScheduler
from .flow_match_euler import FlowMatchEulerScheduler
from .flow_match_heun import FlowMatchHeunScheduler
from .heun import HeunScheduler
from .unipc import UniPCScheduler

__all__ = [
    "SCHEDULERS", "DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "EulerAncestralScheduler", "EulerScheduler",
    "FlowMatchEulerScheduler", "FlowMatchHeunScheduler", "HeunScheduler", "UniPCScheduler",
]  # fmt: skip

# the command line's name -> class
SCHEDULERS = {
    "ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "euler": EulerScheduler,
    "euler_ancestral": EulerAncestralScheduler,
    "heun": HeunScheduler,
    "dpm_solver_multistep": DPMSolverMultistepScheduler,
    "unipc": UniPCScheduler,
    "flow_match_euler": FlowMatchEulerScheduler,
    "flow_match_heun": FlowMatchHeunScheduler,
}
