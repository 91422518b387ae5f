"""How a scheduler of diffusers is taken into one of our pipelines."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from .. import schedulers

if TYPE_CHECKING:
    from ..processes.parameterization import Parameterization

# diffusers class -> ours that steps alike from the same config
_TWINS = {
    "DDPMScheduler": "DDPMScheduler",
    "DDIMScheduler": "DDIMScheduler",
    "EulerDiscreteScheduler": "EulerScheduler",
    "FlowMatchEulerDiscreteScheduler": "FlowMatchEulerScheduler",
}


def host_scheduler(scheduler: Any, known: Parameterization | None) -> Any:
    """One of our schedulers from whatever was assigned: ours as it is, diffusers' as its twin.

    Args:
        scheduler: a scheduler of ours or of diffusers.
        known: what is known of the pipeline's network. While it is None, the config of a diffusers scheduler says what the network is;
            later only what differs from the defaults of its class counts, and the twin is not bound yet.
    Raises:
        ValueError: no twin exists for this class of diffusers.
    """
    if hasattr(scheduler, "bind") and hasattr(scheduler, "parameterization"):
        return scheduler
    name = type(scheduler).__name__
    if name not in _TWINS:
        raise ValueError(
            f"{name} of diffusers cannot be used here yet; those that can are {', '.join(_TWINS)}. "
            "Take one of gen_pipelines for the same network: from_pretrained(path, scheduler=DDIMScheduler.from_pretrained(path, "
            'subfolder="scheduler")), or pipe.scheduler = DDIMScheduler().'
        )
    twin = getattr(schedulers, _TWINS[name])
    if known is None:
        return twin.from_config(scheduler.config)
    # what the user did not set is the default of a class that knows nothing of this network: it says nothing
    silent = set(scheduler.config.get("_use_default_values", ()))
    takes = inspect.signature(twin.__init__).parameters
    return twin(**{key: value for key, value in scheduler.config.items() if key in takes and key not in silent})
