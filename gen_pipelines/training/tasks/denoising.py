"""What the tasks that train denoisers share: the scheduler, the time density and the weighting of a recipe."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch

from ..config import coerce
from ..objectives.weightings import WEIGHTINGS


def rank_device() -> torch.device:
    """The accelerator of this rank, as the trainer will find it."""
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available() and not torch.backends.mps.is_available()).device


def build_scheduler(settings: dict[str, Any]) -> Any:
    """A scheduler of this library from `{class: NAME, ...arguments}`."""
    from ...schedulers import SCHEDULERS

    settings = dict(settings)
    classes = {cls.__name__: cls for cls in SCHEDULERS.values()}
    name = settings.pop("class", None)
    if name not in classes:
        raise ValueError(f"model.scheduler.class: {name!r} is none of {', '.join(classes)}.")
    return classes[name](**settings)


def choose(registry: dict[str, Any], settings: Any, where: str) -> Any:
    """An entry of a registry from `NAME` or `{name: NAME, ...arguments}`."""
    name, arguments = _name_and_arguments(settings, where)
    if name not in registry:
        raise ValueError(f"{where}: {name!r} is none of {', '.join(registry)}.")
    return registry[name](**_checked(arguments, registry[name], f"{where}: {name}"))


def choose_weighting(settings: Any) -> Any:
    """None, "likelihood", or a function of the SNR with its arguments filled in."""
    where = "objective.weighting"
    name, arguments = _name_and_arguments(settings, where)
    if name not in [*WEIGHTINGS, "likelihood"]:
        raise ValueError(f"{where}: {name!r} is none of {', '.join([*WEIGHTINGS, 'likelihood'])}.")
    function = WEIGHTINGS.get(name)
    arguments = _checked(arguments, function, f"{where}: {name}")
    return "likelihood" if name == "likelihood" else partial(function, **arguments) if arguments else function


def _name_and_arguments(settings: Any, where: str) -> tuple[Any, dict[str, Any]]:
    if not isinstance(settings, str | dict):
        raise ValueError(f"{where}: give a name, or {{name: NAME, ...arguments}}; got {settings!r}.")
    arguments = {"name": settings} if isinstance(settings, str) else dict(settings)
    return arguments.pop("name", None), arguments


def _checked(arguments: dict[str, Any], function: Any, where: str) -> dict[str, Any]:
    """Arguments of a time density or weighting, each one that it has, and a number."""
    known = [name for name in inspect.signature(function).parameters if name != "snr"] if function else []
    if unknown := sorted(set(arguments) - set(known)):
        raise ValueError(f"{where} takes no {', '.join(unknown)}; it takes {', '.join(known) or 'no arguments'}.")
    return {name: coerce(float, value, f"{where}.{name}") for name, value in arguments.items()}
