"""A scheduler in one word: every scheduler of the registry, with settings and without."""

import json
from types import SimpleNamespace

import diffusers
import pytest

from gen_pipelines.processes import Parameterization
from gen_pipelines.schedulers import (
    SCHEDULERS,
    BridgedScheduler,
    DDIMScheduler,
    choose_scheduler,
    find_scheduler,
    parse_scheduler,
    scheduler_name,
    scheduler_settings,
)
from gen_pipelines.schedulers.base import VP_NETWORK
from gen_pipelines.schedulers.bridge import HOSTED


@pytest.mark.parametrize("short", SCHEDULERS)
def test_a_scheduler_is_found_by_every_way_of_writing_its_name(short):
    cls = SCHEDULERS[short]
    for name in (short, short.upper(), short.replace("_", "-"), cls.__name__, cls.__name__.removesuffix("Scheduler"), cls.__name__.lower()):
        assert find_scheduler(name) is cls


def test_schedulers_of_diffusers_are_found_and_no_others():
    from gen_pipelines.schedulers import find_scheduler

    for name in set(HOSTED) - {cls.__name__ for cls in SCHEDULERS.values()}:
        assert find_scheduler(name) is getattr(diffusers, name)
    with pytest.raises(ValueError, match="--scheduler eulr: there is no such scheduler, did you mean euler; there are ddpm"):
        find_scheduler("eulr", "--scheduler")


def other_value(value):
    """Something that an argument with this default takes as well."""
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else 0.25


@pytest.mark.parametrize("short", SCHEDULERS)
def test_a_scheduler_with_its_settings_has_a_name_that_gives_it_back(short):
    cls = SCHEDULERS[short]
    p = Parameterization.from_config({**VP_NETWORK, "beta_schedule": "scaled_linear"})
    assert scheduler_name(cls().bind(p)) == short and scheduler_settings(cls().bind(p)) == {}  # betas are the network's
    chosen = {key: other_value(value) for key, value in cls.solver_defaults.items() if isinstance(value, bool | int | float)}
    chosen["timestep_spacing"] = "linspace" if cls.grid_defaults.get("timestep_spacing") != "linspace" else "trailing"
    name = scheduler_name(cls(**chosen).bind(p))
    assert name == ":".join([short, *(f"{key}={json.dumps(value).strip(chr(34))}" for key, value in sorted(chosen.items()))])
    assert parse_scheduler(name) == (cls, chosen)
    for own in (DDIMScheduler().bind(p), cls(**chosen).bind(p)):
        pipe = SimpleNamespace(scheduler=own, parameterization=p)
        assert dict(choose_scheduler(pipe, name).bind(p).config) == dict(cls(**chosen).bind(p).config)


def test_the_models_own_scheduler_keeps_what_a_name_does_not_say():
    own = DDIMScheduler(timestep_spacing="trailing", steps_offset=1).bind(Parameterization.from_config(VP_NETWORK))
    pipe = SimpleNamespace(scheduler=own, parameterization=own.parameterization)
    assert choose_scheduler(pipe, "ddim") is own
    assert scheduler_name(choose_scheduler(pipe, "DDIM:steps_offset=0")) == "ddim:timestep_spacing=trailing"
    assert scheduler_name(choose_scheduler(pipe, "ddpm")) == "ddpm"


def test_schedulers_of_diffusers_have_such_names_too():
    p = Parameterization.from_config(VP_NETWORK)
    hosted = BridgedScheduler(diffusers.DEISMultistepScheduler(solver_order=3), p)
    assert scheduler_name(hosted) == "DEISMultistepScheduler:solver_order=3"
    pipe = SimpleNamespace(scheduler=hosted, parameterization=p)
    assert scheduler_name(choose_scheduler(pipe, "deis_multistep:solver_order=1")) == "DEISMultistepScheduler:solver_order=1"
    unhosted = SimpleNamespace(scheduler=diffusers.DDIMScheduler(), name="of diffusers")
    chosen = choose_scheduler(unhosted, "DEISMultistepScheduler:solver_order=1")
    assert type(chosen) is diffusers.DEISMultistepScheduler and scheduler_name(chosen) == "DEISMultistepScheduler:solver_order=1"


@pytest.mark.parametrize(("text", "message"), [
    ("ddim:shift", "--scheduler ddim:shift: 'shift' is no key=value; write ddim:timestep_spacing=trailing"),
    ("ddim:shfit=1", "--scheduler ddim:shfit=1: DDIMScheduler has no setting shfit; it has .*shift"),
    ("ddim:beta_start=1", "DDIMScheduler has no setting beta_start"),
    ("dim:shift=1", "--scheduler dim: there is no such scheduler, did you mean ddim"),
])  # fmt: skip
def test_a_setting_that_there_is_not_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_scheduler(text, "--scheduler")
