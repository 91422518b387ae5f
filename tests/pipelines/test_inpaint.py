"""A part of a picture is drawn and the rest is kept: as diffusers does it, with every scheduler, and clear errors."""

import conftest
import numpy as np
import pytest
import torch
from editing import picture, quiet, rectangle, seeded, some
from PIL import Image

from gen_pipelines import LatentInpaintPipeline
from gen_pipelines.pipelines.editing import RePaint
from gen_pipelines.schedulers import SCHEDULERS, DDIMScheduler, FlowMatchEulerScheduler

TWINS = ["DDIMScheduler", "EulerDiscreteScheduler", "DDPMScheduler", "HeunDiscreteScheduler"]


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
@pytest.mark.parametrize("scheduler", some(TWINS, {"DDIMScheduler", "DDPMScheduler"}))
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
@pytest.mark.parametrize("name", some(SCHEDULERS, {"euler", "flow_match_heun"}))
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


def test_a_mask_thinner_than_a_latent_is_drawn(sd):
    """diffusers looks at one pixel of each latent and would draw nothing."""
    mask = rectangle(box=(5, 0, 6, 16))
    options = {"image": picture(), "mask_image": mask, "num_inference_steps": 3, "generator": seeded()}
    drawn = np.abs(np.asarray(sd("a", **options).images[0]).astype(int) - np.asarray(picture())).max(axis=2) > 0
    assert drawn[:, 5].mean() > 0.5 and not drawn[:, :5].any() and not drawn[:, 6:].any()


# ------------------------------------------------------------------------------------------------------------- beyond the frame, resampling


def test_drawing_beyond_the_frame(sd):
    original = np.asarray(picture())
    options = {"image": picture(), "num_inference_steps": 3, "generator": seeded()}
    image = np.asarray(sd("a", expand=(2, 4, 6, 0), **options).images[0])  # left, top, right, bottom
    assert image.shape == (20, 24, 3) and (image[4:, 2:18] == original).all()
    all_around = np.asarray(sd("a", expand=4, **options).images[0])
    assert all_around.shape == (24, 24, 3) and (all_around[4:20, 4:20] == original).all()
    small = np.asarray(sd("a", expand=4, height=16, width=16, **options).images[0])  # the picture is made smaller to fit
    assert small.shape == (16, 16, 3)
    assert (small[4:12, 4:12] == np.asarray(picture().resize((8, 8), Image.Resampling.LANCZOS))).all()
    both = np.asarray(sd("a", expand=4, mask_image=rectangle(box=(0, 0, 8, 16)), **options).images[0])
    assert (both[4:20, 12:20] == original[:, 8:]).all() and (both[4:20, 4:12] != original[:, :8]).any()


def test_drawing_beyond_the_frame_by_what_is_no_whole_latent(sd):
    """The picture lies where it was put, at the size that is left for it, whatever that size is."""
    options = {"image": picture(), "num_inference_steps": 2, "generator": seeded()}
    image = np.asarray(sd("a", expand=(1, 2, 2, 1), **options).images[0])  # 19 pixels, of which 18 are drawn: 15 are left
    assert image.shape == (18, 18, 3)
    assert (image[2:17, 1:16] == np.asarray(picture().resize((15, 15), Image.Resampling.LANCZOS))).all()


HOSTED_TOO = ["UniPCMultistepScheduler", "HeunDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"]


@pytest.mark.filterwarnings("ignore")  # those of grids that reach beyond the network's range, and of the rules of consistency networks
@pytest.mark.parametrize("name", some([*SCHEDULERS, *HOSTED_TOO], {"ddpm", "heun", "unipc", *HOSTED_TOO[:1]}))
def test_every_scheduler_resamples(sd, name):
    """The loop goes back on every path and with every solver; the last state still holds the picture where it is known."""
    import diffusers

    sd.scheduler = SCHEDULERS[name]() if name in SCHEDULERS else getattr(diffusers, name)()
    options = {"image": picture(), "mask_image": rectangle(), "num_inference_steps": 5, "output_type": "latent"}
    plain = sd("a", generator=seeded(), **options).images
    once = sd.num_timesteps
    twice = sd("a", generator=seeded(), resampling=RePaint(repeats=2, jump=2), **options).images
    assert sd.num_timesteps > once and torch.isfinite(twice).all()
    known = torch.ones(8, 8, dtype=torch.bool)
    known[2:6, 2:6] = False
    torch.testing.assert_close(twice[..., known], plain[..., known])
    assert (twice[..., ~known] - plain[..., ~known]).abs().max() > 1e-3


def test_with_one_generator_each_a_picture_does_not_depend_on_its_batch(sd):
    sd.scheduler = SCHEDULERS["ddpm"]()
    options = {"mask_image": rectangle(), "num_inference_steps": 4, "strength": 0.8, "output_type": "latent"}
    options["resampling"] = RePaint(repeats=2, jump=1)
    images = [picture(seed=i) for i in range(2)]
    batch = sd("a red apple", image=images, generator=[seeded(i) for i in range(2)], **options).images
    for i, image in enumerate(images):
        alone = sd("a red apple", image=image, generator=[seeded(i)], **options).images[0]
        assert (batch[i] - alone).abs().max() <= 2e-5 * alone.abs().max()  # eight stochastic steps


# ------------------------------------------------------------------------------------------------------------------------- what cannot work


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mask_image": None}, "give mask_image"),
        ({"mask_image": rectangle(8).resize((16, 8))}, "mask_image has 8 x 16 pixels and image 16 x 16"),
        ({"mask_image": [rectangle()] * 2}, "one per picture: 1 here, got 2"),
        ({"mask_image": torch.full((1, 1, 16, 16), 255.0)}, r"mask_image must be in \[0, 1\]"),
        ({"expand": -1}, "expand must be a number of pixels"),
        ({"expand": (1, 2)}, "left, top, right, bottom"),
        ({"expand": 8, "height": 16}, "height = 16 pixels leaves nothing of the picture: expand adds 16"),
        ({"resampling": 3}, r"resampling must be RePaint\(repeats, jump\) or None, got a int"),
        ({"image": torch.zeros(1, 4, 8, 8)}, "latents cannot be masked"),
    ],
)
def test_what_cannot_work_is_one_clear_error_before_anything_is_computed(sd, options, says):
    calls = []
    hook = sd.vae.encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises((ValueError, TypeError), match=says):
            sd(**{"prompt": "a", "image": picture(), "mask_image": rectangle(), "num_inference_steps": 2, **options})
    finally:
        hook.remove()
    assert calls == []


def test_a_network_of_another_input_is_refused(sd):
    from diffusers import UNet2DConditionModel

    config = dict(conftest.make_unet().config) | {"in_channels": 5}
    parts = {name: part for name, part in sd.components.items() if name not in ("unet", "transformer")}
    pipe = LatentInpaintPipeline(**parts, unet=UNet2DConditionModel.from_config(config))
    with pytest.raises(ValueError, match="has 5 channels; it must have 4 .* or 9"):
        pipe("a", image=picture(), mask_image=rectangle())


def test_a_mask_that_marks_nothing_gives_the_picture_and_says_so(sd, caplog):
    sd.scheduler = DDIMScheduler()
    empty = Image.new("L", (16, 16), 0)
    image = sd("a", image=picture(), mask_image=empty, num_inference_steps=2).images[0]
    assert (np.asarray(image) == np.asarray(picture())).all() and "marks nothing to draw" in caplog.text


def test_repositories_of_diffusers_load_as_this_one(twin, tmp_path):
    from gen_pipelines import AutoPipeline

    twin.save_pretrained(str(tmp_path / "p"))
    assert type(AutoPipeline.from_pretrained(tmp_path / "p")) is LatentInpaintPipeline
