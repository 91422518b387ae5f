"""Schedulers: one sampler per file, each right on every network that a `Parameterization` describes."""

import difflib
import re

from .bridge import HOSTED, BridgedScheduler
from .choice import choose_scheduler, parse_scheduler, scheduler_class, scheduler_name, scheduler_settings
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
    "HeunScheduler", "RectifiedFlowScheduler", "ScoreSDEScheduler", "UniPCScheduler", "choose_scheduler",
    "find_scheduler", "parse_scheduler", "scheduler_class", "scheduler_name", "scheduler_settings",
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


def find_scheduler(name: str, said: str = "scheduler") -> type:
    """The class that a command line names.

    Args:
        name: a key of `SCHEDULERS` ("dpm_solver_multistep") or the name of a class, with or without "Scheduler" at its end; capitals and
            underscores do not matter. Ours come first, then those of diffusers.
        said: how the message calls it.
    Raises:
        ValueError: there is none; the message lists those there are.
    """
    ours = {_plain(word): scheduler for short, scheduler in SCHEDULERS.items() for word in (short, scheduler.__name__)}
    if (found := ours.get(_plain(name))) is not None:
        return found
    theirs = {_plain(word): word for word in HOSTED}
    if _plain(name) in theirs:
        import diffusers

        return getattr(diffusers, theirs[_plain(name)])
    near = difflib.get_close_matches(_plain(name), ours, n=1)
    meant = [short for short, scheduler in SCHEDULERS.items() if near and scheduler is ours[near[0]]]
    hint = f", did you mean {meant[0]}" if meant else ""
    raise ValueError(
        f"{said} {name}: there is no such scheduler{hint}; there are {', '.join(SCHEDULERS)}, and those of diffusers by their class."
    )


def _plain(name: str) -> str:
    """A scheduler's name as it is compared: in small letters, without underscores, without the word at its end."""
    return re.sub(r"[_-]|scheduler$", "", name.lower())
