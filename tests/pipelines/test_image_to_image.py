"""A picture is redrawn from part of the way: the same picture as diffusers', whatever the scheduler, and clear errors."""

import logging

import conftest
import numpy as np
import pytest
import torch
from editing import picture, quiet, rectangle, seeded, some
from PIL import Image

from gen_pipelines import AutoPipeline, LatentImageToImagePipeline, LatentTextToImagePipeline
from gen_pipelines.pipelines.editing import RePaint, encode_latents, positions_for, renoise
from gen_pipelines.pipelines.pictures import read_pictures
from gen_pipelines.processes import PATHS
from gen_pipelines.processes.level import Level
from gen_pipelines.schedulers import SCHEDULERS, FlowMatchEulerScheduler
from gen_pipelines.schedulers.bridge import HOSTED

TWINS = ["DDIMScheduler", "EulerDiscreteScheduler", "DDPMScheduler", "HeunDiscreteScheduler"]


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
@pytest.mark.parametrize("scheduler", some(TWINS, {"DDIMScheduler", "DDPMScheduler"}))
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
@pytest.mark.parametrize("name", some(SCHEDULERS, {"euler", "flow_match_heun"}))
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


# ---------------------------------------------------------------------------------------------------------------------------- strengths


def test_strength_0_is_the_reconstruction_and_strength_1_is_text_to_image(flow):
    drawing = quiet(LatentTextToImagePipeline.from_pipe(flow))
    options = {"num_inference_steps": 4, "output_type": "latent"}
    same = flow("a", image=picture(), strength=1.0, height=16, width=16, generator=seeded(2), **options).images
    torch.testing.assert_close(same, drawing("a", generator=seeded(2), **options).images, atol=0, rtol=0)

    pixels = flow.image_processor.preprocess(picture())
    with torch.no_grad():
        clean = encode_latents(flow.vae, pixels, seeded(2))
        rendered = (flow.decode_latents(clean) / 2 + 0.5).clamp(0, 1)
    image = flow("a", image=picture(), strength=0.0, num_inference_steps=4, generator=seeded(2), output_type="pt").images
    torch.testing.assert_close(image, rendered)


def test_a_strength_of_less_than_a_step_says_so(flow, caplog):
    with caplog.at_level(logging.WARNING):
        flow("a", image=picture(), strength=0.2, num_inference_steps=4, output_type="latent")
    assert "strength 0.2 of 4 steps is none" in caplog.text and flow.num_timesteps == 0


HERE = {name: (lambda cls=cls: cls()) for name, cls in SCHEDULERS.items()}
HOSTED_HERE = sorted(set(HOSTED) - {"PNDMScheduler"})


@pytest.mark.filterwarnings("ignore")  # those of grids that reach beyond the network's range, and of the rules of consistency networks
@pytest.mark.parametrize("name", [*HERE, *some(HOSTED_HERE, {"UniPCMultistepScheduler", "HeunDiscreteScheduler"})])
def test_every_scheduler_starts_part_of_the_way_at_the_level_of_its_first_step(flow, name):
    """The first state is alpha x_0 + sigma noise at the first position, on the network's own path; the steps before are not run."""
    import diffusers

    if name == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
    flow.scheduler = HERE[name]() if name in HERE else getattr(diffusers, name)()
    clean, noise = torch.randn(2, 1, 4, 8, 8, generator=seeded(1))
    flow.scheduler.set_timesteps(6)
    every, positions = positions_for(flow.scheduler, 1.0), positions_for(flow.scheduler, 0.5)
    assert (
        every == list(range(len(flow.scheduler.timesteps)))
        and positions == every[-len(positions) :]
        and positions[0] in flow.scheduler.starts
    )
    state = flow.noise_to(positions, clean, None, noise)
    alpha, sigma = flow.scheduler.at(flow.scheduler.timesteps[positions[0]])[0]
    torch.testing.assert_close(state, alpha * clean + sigma * noise)
    assert 0.02 < alpha < 1.0
    images = flow("a", image=clean, latents=noise, strength=0.5, num_inference_steps=6, output_type="latent", generator=seeded()).images
    assert torch.isfinite(images).all() and flow.num_timesteps == len(positions)
    flow.scheduler = FlowMatchEulerScheduler()


@pytest.mark.filterwarnings("ignore:PNDMScheduler of diffusers goes")
def test_schedulers_that_cannot_start_part_of_the_way_are_refused(flow):
    import diffusers

    from gen_pipelines.schedulers import DDIMInverseScheduler

    for scheduler, says in ((diffusers.PNDMScheduler(), "PNDMScheduler can only be run"), (DDIMInverseScheduler(), "from data to noise")):
        flow.scheduler = scheduler
        with pytest.raises(ValueError, match=says):
            flow("a", image=picture(), strength=0.5, num_inference_steps=6)
    flow.scheduler = FlowMatchEulerScheduler()


# ------------------------------------------------------------------------------------------------------------------ pictures and batches


def test_with_one_generator_each_a_picture_does_not_depend_on_its_batch(flow):
    options = {"num_inference_steps": 4, "strength": 0.5, "output_type": "latent"}
    images = [picture(seed=i) for i in range(3)]
    batch = flow("a red apple", image=images, generator=[seeded(i) for i in range(3)], **options).images
    for i, image in enumerate(images):
        alone = flow("a red apple", image=image, generator=[seeded(i)], **options).images[0]
        assert (batch[i] - alone).abs().max() <= 1e-5 * alone.abs().max().clamp(min=1.0)
    prompts = ["a", "b", "c"]
    batch = flow(prompts, image=images, num_images_per_prompt=2, generator=[seeded(i) for i in range(6)], **options).images
    alone = flow("b", image=images[1], generator=[seeded(3)], **options).images[0]
    torch.testing.assert_close(batch[3], alone, atol=1e-5, rtol=0)


def test_pictures_of_every_kind_are_the_same_picture():
    image = picture()
    array = np.asarray(image)
    kinds = (image, array, array / 255, [array, array], torch.from_numpy(array.copy()).permute(2, 0, 1), torch.rand(2, 3, 4, 4))
    for kind in kinds[:5]:
        found = read_pictures("image", kind)
        found = np.asarray(found[0]) / 255 if isinstance(found, list) else found[0].permute(1, 2, 0).numpy()
        np.testing.assert_allclose(found, array / 255, atol=1e-6)
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert read_pictures("image", clear)[0].getpixel((0, 0)) == (255, 255, 255)
    assert read_pictures("mask_image", clear, background="black")[0].getpixel((0, 0)) == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"image": None}, "give image"),
        ({"image": "apple.png"}, "image must be a PIL picture, an array, a tensor or a list of these, got a str"),
        ({"image": []}, "empty list"),
        ({"image": [picture(16), picture(32)]}, "pictures of one size, got 16 x 16, 32 x 32"),
        ({"image": torch.full((1, 3, 16, 16), -0.5)}, r"image must be in \[0, 1\]"),
        ({"image": torch.full((1, 3, 16, 16), float("nan"))}, "not finite"),
        ({"image": torch.zeros(1, 5, 16, 16)}, "must have 1 or 3 channels"),
        ({"strength": 1.5}, "strength must be a number from 0"),
        ({"strength": True}, "strength must be a number from 0"),
        ({"prompt": ["a", "b"], "image": [picture()] * 3}, "one per prompt: 2 here, got 3"),
        ({"height": 17}, "height must be a multiple of"),
        ({"generator": [seeded()] * 2}, "one per picture: 1 here, got 2"),
        ({"image": torch.zeros(1, 4, 8, 8), "height": 32}, "cannot be resized"),
    ],
)
def test_what_cannot_work_is_one_clear_error_before_anything_is_computed(flow, options, says):
    calls = []
    hook = flow.vae.encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises((ValueError, TypeError), match=says):
            flow(**{"prompt": "a", "image": picture(), "num_inference_steps": 2, **options})
    finally:
        hook.remove()
    assert calls == []


def test_encoding_is_the_inverse_of_decoding_in_scale_and_shift():
    pipe = LatentImageToImagePipeline(
        conftest.make_vae(), conftest.make_text_encoder(), conftest.make_tokenizer(), FlowMatchEulerScheduler(),
        transformer=conftest.make_transformer(),
    )  # fmt: skip
    pixels = pipe.image_processor.preprocess(picture())
    with torch.no_grad():
        posterior = pipe.vae.encode(pixels).latent_dist
        expected = pipe.vae.decode(posterior.sample(seeded(1))).sample
        for options in (
            {"scaling_factor": 0.3, "shift_factor": 0.7},
            {"shift_factor": None, "latents_mean": [1.0] * 4, "latents_std": [2.0] * 4},
        ):
            pipe.vae.register_to_config(**options)
            torch.testing.assert_close(pipe.decode_latents(encode_latents(pipe.vae, pixels, seeded(1))), expected, atol=1e-5, rtol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------- loading, sharing


def test_folders_of_the_three_pipelines_load_as_each_other(flow, sd_folder, tmp_path):
    flow.save_pretrained(tmp_path / "p")
    loaded = AutoPipeline.from_pretrained(tmp_path / "p")
    assert type(loaded) is LatentImageToImagePipeline
    assert type(LatentTextToImagePipeline.from_pretrained(tmp_path / "p")) is LatentTextToImagePipeline
    shared = LatentTextToImagePipeline.from_pipe(flow, default_guidance_scale=2.0)
    assert shared.transformer is flow.transformer and shared.parameterization == flow.parameterization
    assert shared.config.default_guidance_scale == 2.0
    with pytest.raises(TypeError, match="unknown arguments vea"):
        LatentTextToImagePipeline.from_pipe(flow, vea=None)


# ------------------------------------------------------------------------------------------------------------------------ the way back


@pytest.mark.parametrize("path", sorted(PATHS))
def test_noise_added_to_a_noisy_sample_gives_the_marginal_of_the_noisier_level(path):
    """Exact: the coefficients of x_0, of the first noise and of the second are read off a linear map."""
    process = PATHS[path]()
    span = process.t_max - process.t_min
    here, there = process.level(process.t_min + 0.3 * span), process.level(process.t_min + 0.8 * span)
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(renoise(here.alpha * one, here, there, zero), there.alpha * one)
    variance = renoise(here.sigma * one, here, there, zero) ** 2 + renoise(zero, here, there, one) ** 2
    torch.testing.assert_close(variance, there.sigma**2 * one)
    torch.testing.assert_close(renoise(one, here, Level(0.0, 1.0), one), one)


def test_repaint_runs_each_stretch_as_often_as_asked():
    """Ten steps in stretches of three, each three times; two evaluations per step where the scheduler has two."""
    order = RePaint(repeats=3, jump=3).positions(range(10), 10)
    assert order[0] == 0 and order[-1] == 9 and len(order) == 10 + 3 * 3 * 2
    jumps = [(a, b) for a, b in zip(order, order[1:], strict=False) if b != a + 1]
    assert sorted(set(jumps)) == [(2, 0), (5, 3), (8, 6)] and len(jumps) == 6
    assert RePaint(repeats=1).positions(range(10), 10) == list(range(10))
    twice = RePaint(repeats=2, jump=2).positions([0, 2, 4, 6], 7)  # as Heun's
    assert twice == [0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 6]
    with pytest.raises(ValueError, match="jump must be a whole number of at least 1"):
        RePaint(jump=0)


# --------------------------------------------------------------------------------------------------------------------- other families


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")  # diffusers' Euler under numpy 2
@pytest.mark.parametrize(
    ("family", "task"),
    # diffusers' inpainting of Stable Diffusion 3 knows networks of 16 and 33 channels only, which no tiny one has
    [
        (f, t)
        for f in ("StableDiffusionXL", "StableDiffusion3", "Flux")
        for t in ("Img2Img", "Inpaint")
        if (f, t) != ("StableDiffusion3", "Inpaint")
    ],
)
def test_other_families_equal_those_of_diffusers(family, task):
    """Where strength times steps is whole: on a fraction diffusers runs one step more for its flows than for Stable Diffusion."""
    import diffusers
    import tiny_diffusers

    from gen_pipelines import LatentInpaintPipeline
    from gen_pipelines.pipelines.from_diffusers import MAPPED

    drawing = tiny_diffusers.TINY[f"{family}Pipeline"].build()
    if (family, task) == ("StableDiffusionXL", "Inpaint"):  # it decodes with these and encodes without
        drawing.vae.register_to_config(latents_mean=None, latents_std=None)
    ours = LatentImageToImagePipeline if task == "Img2Img" else LatentInpaintPipeline
    ours = quiet(ours.from_pipe(drawing, **MAPPED[f"{family}Pipeline"].defaults))
    theirs = quiet(getattr(diffusers, f"{family}{task}Pipeline").from_pipe(drawing))
    options = {
        "prompt": "a red apple",
        "image": picture(),
        "num_inference_steps": 4,
        "strength": 0.5,
        "output_type": "np",
        "guidance_scale": 3.0,
    }
    options |= {} if task == "Img2Img" else {"mask_image": rectangle()}
    size = {} if (family, task) == ("StableDiffusionXL", "Img2Img") else {"height": 16, "width": 16}  # that one takes the picture's
    expected = theirs(generator=seeded(1), **options, **size).images
    drawn = ours(generator=seeded(1), **options, **({} if task == "Img2Img" else {"keep_known": False})).images
    assert np.abs(drawn - expected).max() < 1e-4
