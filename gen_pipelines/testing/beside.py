"""Every scheduler of this library beside those of diffusers, from one run."""

from .conformance import check_scheduler
from .networks import SEVEN
from .report import Report

__all__ = ["DIFFUSERS_OF", "beside_diffusers"]

# the name in SCHEDULERS -> the classes of diffusers that stand for the same, or for something near it
DIFFUSERS_OF: dict[str, tuple[str, ...]] = {
    "ddpm": ("DDPMScheduler",),
    "ddim": ("DDIMScheduler", "PNDMScheduler"),
    "euler": ("EulerDiscreteScheduler", "EDMEulerScheduler", "LMSDiscreteScheduler"),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler"),
    "heun": ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler"),
    "dpm_solver_multistep": (
        "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "EDMDPMSolverMultistepScheduler",
        "DEISMultistepScheduler",
    ),
    "unipc": ("UniPCMultistepScheduler", "SASolverScheduler", "IPNDMScheduler"),
    "flow_match_euler": ("FlowMatchEulerDiscreteScheduler",),
    "flow_match_heun": ("FlowMatchHeunDiscreteScheduler",),
    "rectified_flow": (),
    "score_sde": (),
}  # fmt: skip


def beside_diffusers(samples: int = 4_000, progress: bool = False) -> Report:
    """The moments of every scheduler, ours and diffusers' as they are, on the seven kinds of network that diffusers has.

    A class of diffusers is swapped in as its documentation says, `X.from_config(pipe.scheduler.config)`; noise and input are scaled
    wherever it offers to, which not every pipeline there does.

    Args:
        samples, progress: as in `check_scheduler`.
    """
    import diffusers

    from ..schedulers import SCHEDULERS

    todo = []
    for ours, theirs in DIFFUSERS_OF.items():
        todo.append((SCHEDULERS[ours], SCHEDULERS[ours].__name__))
        todo += [(getattr(diffusers, name), f"diffusers.{name}") for name in theirs]
    rows: list = []
    bar = todo
    if progress:
        from tqdm.auto import tqdm

        bar = tqdm(todo, unit="scheduler")
    for scheduler, name in bar:
        rows += check_scheduler(scheduler, checks=["moments"], networks=SEVEN, name=name, samples=samples).rows
    return Report(tuple(rows))
