"""A part of a picture is drawn and the rest is kept: as diffusers does it, with every scheduler, and clear errors."""


import conftest
import numpy as np
import pytest
import torch
from editing import picture, quiet, rectangle, seeded

from gen_pipelines import LatentInpaintPipeline
from gen_pipelines.schedulers import SCHEDULERS, DDIMScheduler, FlowMatchEulerScheduler


@pytest.fixture(scope="module")
def sd(sd_folder):
    return quiet(LatentInpaintPipeline.from_pretrained(sd_folder))


@pytest.fixture(scope="module")
def twin(sd_folder):
    import diffusers

    return quiet(
        diffusers.StableDiffusionInpaintPipeline.from_pretrained(sd_folder, safety_checker=None, feature_extractor=None, image_encoder=None)
    )


def make_inpainting_unet():
    """A U-Net whose input has the latents, the mask and the masked picture's latents."""
    from diffusers import UNet2DConditionModel

    config = dict(conftest.make_unet().config) | {"in_channels": 9}
    return conftest._seeded(lambda: UNet2DConditionModel.from_config(config), 2)


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")  # diffusers' Euler under numpy 2
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler", "DDPMScheduler", "HeunDiscreteScheduler"])
@pytest.mark.parametrize("channels", [4, 9])
def test_pictures_equal_those_of_diffusers(sd, twin, scheduler, channels):
    """fp32 on both sides; what differs is the order of a few sums (1e-6), the promise is 1e-4."""
    import diffusers

    if channels == 9:
        unet = make_inpainting_unet()
        parts = {name: part for name, part in sd.components.items() if name not in ("unet", "transformer")}
        sd = quiet(LatentInpaintPipeline(**parts, unet=unet))
        parts = {name: part for name, part in twin.components.items() if name != "unet"}
        twin = quiet(diffusers.StableDiffusionInpaintPipeline(**parts, unet=unet, requires_safety_checker=False))
    twin.scheduler = getattr(diffusers, scheduler).from_config(twin.scheduler.config, timestep_spacing="leading")
    sd.scheduler = getattr(diffusers, scheduler).from_config(twin.scheduler.config)
    calls = {
        "whole way": {},
        "part": {"strength": 0.6, "negative_prompt": "blue", "guidance_scale": 3.0},
        "several": {"strength": 0.8, "num_images_per_prompt": 2, "guidance_scale": 1.0},
    }
    for name, options in calls.items():
        options = {"prompt": "a red apple", "num_inference_steps": 5, "output_type": "np", **options}
        options |= {"image": picture(), "mask_image": rectangle(), "height": 16, "width": 16}
        theirs = twin(generator=seeded(1), **options).images
        ours = sd(generator=seeded(1), keep_known=False, **options).images
        assert np.abs(ours - theirs).max() < 1e-4, (scheduler, channels, name)


@pytest.mark.filterwarnings("ignore:ConsistencyScheduler on a network")  # it samples another distribution there, the same on both sides
@pytest.mark.parametrize("name", SCHEDULERS)
def test_our_schedulers_run_in_diffusers_pipeline(sd, twin, sd_folder, name):
    """`from_config` in diffusers' own pipeline gives what ours gives with the same scheduler."""
    import diffusers

    config = diffusers.DDIMScheduler.from_pretrained(sd_folder, subfolder="scheduler").config
    twin.scheduler = SCHEDULERS[name].from_config(config)
    sd.scheduler = SCHEDULERS[name].from_config(config)
    for strength in (1.0, 0.6):
        options = {"prompt": "a red apple", "num_inference_steps": 6, "strength": strength, "output_type": "np"}
        options |= {"image": picture(), "mask_image": rectangle(), "height": 16, "width": 16}
        theirs = twin(generator=seeded(1), **options).images
        ours = sd(generator=seeded(1), keep_known=False, **options).images
        assert np.abs(ours - theirs).max() < 1e-4, strength


# ---------------------------------------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("kind", ["pil", "np", "pt"])
def test_known_pixels_are_exactly_kept_and_the_rest_is_drawn(sd, kind):
    """The box does not lie on cells of the latents: what a cell covers besides is put back."""
    original, mask = picture(), rectangle(box=(3, 3, 9, 10))
    options = {"image": original, "mask_image": mask, "num_inference_steps": 3, "output_type": kind, "generator": seeded()}
    image = sd("a red apple", **options).images[0]
    image = np.asarray(image) if kind == "pil" else (image.permute(1, 2, 0).numpy() if kind == "pt" else image)
    known = np.asarray(mask) == 0
    was = np.asarray(original) if kind == "pil" else np.asarray(original) / 255
    assert np.abs(image[known] - was[known]).max() < 1e-6 if kind != "pil" else (image[known] == was[known]).all()
    assert np.abs(image[~known].astype(float) - was[~known]).max() > 0.05


def test_the_latents_of_the_known_part_are_at_the_level_of_each_step(sd):
    """Outside of the mask the state after a step is alpha x_0 + sigma noise at the level that was reached: the path's own marginal."""
    scheduler = DDIMScheduler()
    for own in (scheduler, FlowMatchEulerScheduler(), SCHEDULERS["heun"]()):
        sd.scheduler = own
        noise = torch.randn(1, 4, 8, 8, generator=seeded(5))
        states = []

        def keep(pipe, step, timestep, tensors):
            states.append(tensors["latents"])  # noqa: B023

        options = {"image": picture(), "mask_image": rectangle(), "num_inference_steps": 4, "latents": noise, "output_type": "latent"}
        last = sd("a", generator=seeded(), callback_on_step_end=keep, **options).images
        known = torch.ones(1, 1, 8, 8, dtype=torch.bool)
        known[..., 2:6, 2:6] = False
        clean = torch.where(known, last, 0.0)  # the last state has the picture's own latents there
        for i, state in enumerate(states[:-1]):
            alpha, sigma = sd.scheduler.at(sd.scheduler.timesteps[i + 1])[0]
            expected = alpha * clean + sigma * noise
            torch.testing.assert_close(torch.where(known, state, 0.0), torch.where(known, expected, 0.0), atol=1e-5, rtol=0)
        assert len(states) == len(sd.scheduler.timesteps)
