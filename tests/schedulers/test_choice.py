"""A scheduler in one word: every scheduler of the registry, with settings and without."""

import json
from types import SimpleNamespace

import diffusers
import pytest
import torch
from analytic import NETWORKS

from gen_pipelines import DiffusionImagePipeline
from gen_pipelines.processes import Parameterization
from gen_pipelines.schedulers import (
    SCHEDULERS,
    BridgedScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerScheduler,
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
    ("ddim:shift=1:shift=2", "shift is set twice"),
    ("heun:use_karras_sigmas=no", "use_karras_sigmas=no: give true or false"),
    ("ddim:steps_offset=1.5", "steps_offset=1.5: give a whole number"),
    ("heun:s_churn=much", "s_churn=much: give a number"),
    ("heun:s_churn=NaN", "s_churn=NaN is no finite number"),
    ("heun:timestep_spacing=3", "timestep_spacing=3: give a word"),
    ("dim:shift=1", "--scheduler dim: there is no such scheduler, did you mean ddim"),
])  # fmt: skip
def test_a_setting_that_there_is_not_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_scheduler(text, "--scheduler")


def pipeline(scheduler):
    from diffusers import UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = UNet2DModel(8, 1, 1, block_out_channels=(8,), norm_num_groups=2, layers_per_block=1, **blocks)
    return DiffusionImagePipeline(scheduler, unet=unet)


@pytest.mark.parametrize("network", ["ddpm_eps", "sd3_flow", "edm"])
@pytest.mark.parametrize("short", SCHEDULERS)
def test_on_a_pipeline_a_name_gives_its_scheduler_back(short, network):
    """Whatever the model's own grid is, and on every path; and the model's own comes back as it was."""
    p = NETWORKS[network][0]
    own = EulerScheduler(use_karras_sigmas=True).bind(p)
    pipe = pipeline(own)
    config = dict(pipe.scheduler.config)
    pipe.scheduler = choose_scheduler(pipe, f"{short}:use_beta_sigmas=true:use_karras_sigmas=false")
    chosen = dict(pipe.scheduler.config)
    name = scheduler_name(pipe.scheduler, {**scheduler_settings(pipe.scheduler), "use_karras_sigmas": False})
    assert "use_beta_sigmas=true" in name
    pipe.scheduler = own
    assert dict(pipe.scheduler.config) == config  # nothing of the other's grid stays
    pipe.scheduler = choose_scheduler(pipe, name)
    assert dict(pipe.scheduler.config) == chosen


def test_a_shift_has_one_name_whichever_way_it_was_given():
    flow = NETWORKS["sd3_flow"][0]
    for given in ({"shift": 3}, {"shift": 3.0}, {"flow_shift": 3.0}):
        bound = DPMSolverMultistepScheduler(**given).bind(flow)
        assert bound.config["shift"] == 3 and scheduler_name(bound) == "dpm_solver_multistep:shift=3"
        bound.set_timesteps(4)
        plain = DPMSolverMultistepScheduler().bind(flow)
        plain.set_timesteps(4)
        assert not torch.equal(bound.timesteps, plain.timesteps)


def test_a_setting_that_does_nothing_is_refused():
    theirs = pipeline(diffusers.DDIMScheduler())
    with pytest.raises(ValueError, match="use_karras_sigmas does nothing in DDIMScheduler on this model's network"):
        choose_scheduler(theirs, "ddim:use_karras_sigmas=true")  # only ours of this name has it
    ours = pipeline(EulerScheduler().bind(NETWORKS["edm"][0]))
    with pytest.raises(ValueError, match="sigma_min does nothing in HeunScheduler"):
        choose_scheduler(ours, "heun:sigma_min=0.1")  # there it is the network's
