"""Schedulers: one sampler per file, each right on every network that a `Parameterization` describes."""

from .bridge import BridgedScheduler
from .consistency import ConsistencyScheduler
from .ddim import DDIMScheduler
from .ddim_inverse import DDIMInverseScheduler
from .ddpm import DDPMScheduler
from .dpm_solver_multistep import DPMSolverMultistepScheduler
from .euler import EulerScheduler
from .euler_ancestral import EulerAncestralScheduler
from .flow_match_euler import FlowMatchEulerScheduler
from .flow_match_heun import FlowMatchHeunScheduler
from .heun import HeunScheduler
from .rectified_flow import RectifiedFlowScheduler
from .score_sde import ScoreSDEScheduler
from .unipc import UniPCScheduler

__all__ = [
    "SCHEDULERS", "BridgedScheduler", "ConsistencyScheduler", "DDIMInverseScheduler", "DDIMScheduler", "DDPMScheduler",
    "DPMSolverMultistepScheduler", "EulerAncestralScheduler", "EulerScheduler", "FlowMatchEulerScheduler", "FlowMatchHeunScheduler",
    "HeunScheduler", "RectifiedFlowScheduler", "ScoreSDEScheduler", "UniPCScheduler",
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
    "rectified_flow": RectifiedFlowScheduler,
    "score_sde": ScoreSDEScheduler,
    "consistency": ConsistencyScheduler,
}
