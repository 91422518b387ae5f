"""A picture is redrawn from part of the way: the same picture as diffusers', whatever the scheduler, and clear errors."""


import conftest
import numpy as np
import pytest
import torch
from editing import picture, quiet, seeded

from gen_pipelines import (
    LatentImageToImagePipeline,
)
from gen_pipelines.schedulers import SCHEDULERS, FlowMatchEulerScheduler


@pytest.fixture(scope="module")
def sd(sd_folder):
    return quiet(LatentImageToImagePipeline.from_pretrained(sd_folder))


@pytest.fixture(scope="module")
def twin(sd_folder):
    import diffusers

    return quiet(
        diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(sd_folder, safety_checker=None, feature_extractor=None, image_encoder=None)
    )


@pytest.fixture(scope="module")
def flow():
    return quiet(
        LatentImageToImagePipeline(
            conftest.make_vae(), conftest.make_text_encoder(), conftest.make_tokenizer(), FlowMatchEulerScheduler(),
            transformer=conftest.make_transformer(),
        )
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------------ beside diffusers


@pytest.mark.filterwarnings("ignore:You have passed 2 text prompts")  # one picture for two, which it says will be an error
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")  # diffusers' Euler under numpy 2
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler", "DDPMScheduler", "HeunDiscreteScheduler"])
def test_pictures_equal_those_of_diffusers(sd, twin, scheduler):
    """fp32 on both sides; what differs is the order of a few sums (1e-6), the promise is 1e-4."""
    import diffusers

    # "leading" for all: the one grid on which each of diffusers' classes is right
    twin.scheduler = getattr(diffusers, scheduler).from_config(twin.scheduler.config, timestep_spacing="leading")
    sd.scheduler = getattr(diffusers, scheduler).from_config(twin.scheduler.config)
    calls = {
        "part": {"strength": 0.6},
        "little": {"strength": 0.3, "negative_prompt": "blue", "guidance_scale": 3.0},
        "several": {"strength": 0.8, "num_images_per_prompt": 2, "guidance_scale": 1.0},
        "tensor": {"strength": 0.5, "image": torch.rand(1, 3, 16, 24, generator=seeded(3))},
        "latents": {"strength": 0.5, "image": torch.randn(1, 4, 8, 8, generator=seeded(3))},
    }
    for name, options in calls.items():
        options = {"prompt": "a red apple", "image": picture(), "num_inference_steps": 5, "output_type": "np", **options}
        theirs = twin(generator=seeded(1), **options).images
        ours = sd(generator=seeded(1), **options).images
        assert np.abs(ours - theirs).max() < 1e-4, (scheduler, name)


@pytest.mark.filterwarnings("ignore:ConsistencyScheduler on a network")  # it samples another distribution there, the same on both sides
@pytest.mark.parametrize("name", SCHEDULERS)
def test_our_schedulers_run_in_diffusers_pipeline(sd, twin, sd_folder, name):
    """`from_config` in diffusers' own pipeline gives what ours gives with the same scheduler."""
    import diffusers

    config = diffusers.DDIMScheduler.from_pretrained(sd_folder, subfolder="scheduler").config
    twin.scheduler = SCHEDULERS[name].from_config(config)
    sd.scheduler = SCHEDULERS[name].from_config(config)
    options = {"prompt": "a red apple", "image": picture(), "num_inference_steps": 6, "strength": 0.6, "output_type": "np"}
    theirs = twin(generator=seeded(1), **options).images
    ours = sd(generator=seeded(1), **options).images
    assert np.abs(ours - theirs).max() < 1e-4
