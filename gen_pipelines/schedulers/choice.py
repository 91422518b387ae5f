"""A scheduler in one word, as a command line names it and a result records it: `ddim`, `ddim:timestep_spacing=trailing:steps_offset=1`."""

import inspect
import json
import math
from typing import Any

from ..processes.config import NETWORK_KEYS

__all__ = ["choose_scheduler", "parse_scheduler", "scheduler_class", "scheduler_name", "scheduler_settings"]

_SEPARATOR = ":"  # a shell leaves it alone, and no value holds one


def parse_scheduler(text: str, said: str = "scheduler") -> tuple[type, dict[str, Any]]:
    """The class and the settings that a text names.

    Args:
        text: a name as `find_scheduler` takes it, then any number of `:key=value`, arguments of the class; values are JSON, or words.
        said: how messages call it.
    Raises:
        ValueError: there is no such scheduler, it has no such argument, or no such value of it.
    """
    from . import find_scheduler

    name, *pairs = text.split(_SEPARATOR)
    wanted, settings = find_scheduler(name, said), {}
    takes = _settings_of(wanted)
    for pair in pairs:
        key, separator, value = (part.strip() for part in pair.partition("="))
        if not separator or not value:
            raise ValueError(f"{said} {text}: {pair!r} is no key=value; write {name}:timestep_spacing=trailing.")
        if key in settings:
            raise ValueError(f"{said} {text}: {key} is set twice; set it once.")
        if key not in takes:
            raise ValueError(f"{said} {text}: {wanted.__name__} has no setting {key}; it has {', '.join(sorted(takes))}.")
        settings[key] = _value(value, takes[key], f"{said} {text}: {key}={value}")
    return wanted, settings


def choose_scheduler(pipe: Any, text: str, said: str = "scheduler") -> Any:
    """The scheduler that a text names, for a pipeline to take as its `scheduler`.

    Its own class keeps the settings that it has, except those that the text gives; another class has its defaults and takes the network and
    the grid from the pipeline.

    Raises:
        ValueError: as `parse_scheduler`; or a pipeline that draws without steps, or a setting without effect on its network.
    """
    wanted, settings = parse_scheduler(text, said)
    if getattr(pipe, "scheduler", None) is None:
        raise ValueError(f"{said} {text}: a {type(pipe).__name__} draws without steps; leave it out.")
    own = scheduler_class(pipe.scheduler)
    if own.__name__ == wanted.__name__:
        if not settings:
            return pipe.scheduler
        wanted, chosen = own, type(pipe.scheduler).from_config(pipe.scheduler.config, **settings)
    elif hasattr(pipe, "parameterization"):
        chosen = wanted(**settings)
    else:  # in a pipeline of diffusers only the config knows the network
        chosen = wanted.from_config(pipe.scheduler.config, **settings)
    network = getattr(pipe, "parameterization", None)
    config = chosen.bind(network).config if network is not None and hasattr(chosen, "bind") else chosen.config
    takes = _settings_of(wanted)
    if idle := [key for key, value in settings.items() if key not in takes or _plain(config.get(key)) != _plain(value)]:
        raise ValueError(f"{said} {text}: {idle[0]} does nothing in {wanted.__name__} on this model's network; leave it out.")
    return chosen


def scheduler_name(scheduler: Any, settings: dict[str, Any] | None = None) -> str:
    """The text that names a scheduler: its short name, or its class where it has none, and settings.

    Args:
        settings: those to say; by default all that are not the class's defaults.
    """
    from . import SCHEDULERS

    own = scheduler_class(scheduler).__name__
    name = next((short for short, one in SCHEDULERS.items() if one.__name__ == own), own)
    said = scheduler_settings(scheduler) if settings is None else settings
    return _SEPARATOR.join([name, *(f"{key}={_text(value)}" for key, value in sorted(said.items()))])


def scheduler_settings(scheduler: Any) -> dict[str, Any]:
    """The settings of a scheduler that are not its class's defaults.

    What describes the network (betas, prediction, clipping) is not among them: it belongs to the model.
    """
    from .base import GaussianScheduler
    from .bridge import BridgedScheduler

    own = scheduler_class(scheduler)
    if isinstance(scheduler, BridgedScheduler):
        plain = BridgedScheduler(own(), scheduler.parameterization).config
    elif isinstance(scheduler, GaussianScheduler):
        plain = own().bind(scheduler.parameterization).config
    else:
        plain = own().config
    usual = {key: plain.get(key, default) for key, default in _settings_of(own).items()}
    found = {key: scheduler.config[key] for key in sorted(usual) if key in scheduler.config}
    if found.get("flow_shift") == found.get("shift"):  # two names of one thing
        found.pop("flow_shift", None)
    return {key: value for key, value in found.items() if _plain(value) != _plain(usual[key])}


def scheduler_class(scheduler: Any) -> type:
    """The scheduler's class, of diffusers where one of diffusers is hosted."""
    return getattr(scheduler, "hosted_class", type(scheduler))


def _settings_of(scheduler: type) -> dict[str, Any]:
    """Arguments of the class that say how it samples, and their defaults."""
    parameters = inspect.signature(scheduler.__init__).parameters
    return {key: parameter.default for key, parameter in parameters.items() if key not in ("self", *NETWORK_KEYS)}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _value(text: str, default: Any, where: str) -> Any:
    """What a text says, of the kind that the default is."""
    try:
        value = json.loads({"true": "true", "false": "false", "none": "null"}.get(text.lower(), text))
    except ValueError:
        value = text
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and not math.isfinite(value):
        raise ValueError(f"{where} is no finite number.")
    if value is None or default is None or isinstance(default, list | tuple | dict):
        return value
    if isinstance(default, bool):
        fits, kind = isinstance(value, bool), "true or false"
    elif isinstance(default, int | float):
        real = isinstance(default, float)
        fits, kind = number and (real or isinstance(value, int)), "a number" if real else "a whole number"
        value = float(value) if fits and real else value
    else:
        fits, kind = isinstance(value, str), "a word"
    if not fits:
        raise ValueError(f"{where}: give {kind}.")
    return value


def _text(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # 3.0 and 3 are one setting
    return value if isinstance(value, str) else json.dumps(_plain(value), separators=(",", ":"))
