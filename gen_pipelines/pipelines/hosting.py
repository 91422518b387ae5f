"""How a scheduler of diffusers is taken into one of our pipelines."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from ..schedulers.bridge import BridgedScheduler, hosting_of

if TYPE_CHECKING:
    from ..processes.parameterization import Parameterization

_LIMITS = ("clip_sample", "clip_sample_range", "thresholding", "dynamic_thresholding_ratio", "sample_max_value")
_BETAS = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")


def host_scheduler(scheduler: Any, known: Parameterization | None) -> Any:
    """One of our schedulers from whatever was assigned: ours as it is, diffusers' hosted in a `BridgedScheduler`.

    Args:
        scheduler: a scheduler of ours or of diffusers; it is not changed.
        known: what is known of the pipeline's network. While it is None, the config of a diffusers scheduler says what the network is;
            later what differs there from the defaults of its class must agree with the network.
    Raises:
        ValueError: this class of diffusers cannot be hosted; its arguments contradict the network.
    """
    if hasattr(scheduler, "bind") and hasattr(scheduler, "parameterization"):
        return scheduler
    hosting_of(type(scheduler))
    if known is None:
        return BridgedScheduler(scheduler)
    _check_contradictions(scheduler, known)
    return BridgedScheduler(scheduler, known)


def _check_contradictions(scheduler: Any, known: Parameterization) -> None:
    """Raises ValueError for an argument that says something else of the network. A class's default knows no network: it says nothing."""
    name, network = type(scheduler).__name__, known.to_config()
    plain = lambda value: list(value) if isinstance(value, tuple) else value.tolist() if hasattr(value, "tolist") else value
    for key, parameter in inspect.signature(type(scheduler).__init__).parameters.items():
        if key not in (*_BETAS, *_LIMITS, "num_train_timesteps", "prediction_type", "sigma_data") or key not in scheduler.config:
            continue
        value = plain(scheduler.config[key])
        if key in _LIMITS:
            _check_limit(name, key, value, parameter.default, known)
            continue
        if value == parameter.default or (key in network and value == plain(network[key])) or not (key in network or key in _BETAS):
            continue
        raise ValueError(
            f"{name}: {key}={value!r} was given, but the network has {network.get(key)!r} ({known.path.name} path, {known.prediction}); "
            f"leave the argument out, take {name}.from_config(pipe.scheduler.config), or correct what is known of the network by assigning "
            "pipe.parameterization. A schedule of one's own as the grid: BridgedScheduler(scheduler, pipe.parameterization)."
        )


def _check_limit(name: str, key: str, value: Any, default: Any, known: Parameterization) -> None:
    """How x_0 is limited is the network's, too. A number counts where what it belongs to is on."""
    switch = {"clip_sample_range": "clip_sample"}.get(key, "thresholding")
    if value == default or value == getattr(known, key) or (key != "clip_sample" and key != switch and not getattr(known, switch)):
        return
    raise ValueError(
        f"{name}: {key}={value!r} was given, but what is known of the network says {getattr(known, key)!r}; leave the argument out, or "
        f"correct it by assigning pipe.parameterization = pipe.parameterization.with_({key}={value!r})."
    )
