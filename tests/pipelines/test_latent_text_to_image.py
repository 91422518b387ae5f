"""A caption becomes a picture: the same picture as diffusers', whatever the batch, and one clear error for what cannot work."""

import logging

import conftest
import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from gen_pipelines import AutoPipeline, ClassifierFreeGuidance, LatentTextToImagePipeline
from gen_pipelines.models.calling import encode_text
from gen_pipelines.schedulers import DDIMScheduler, DDPMScheduler, EulerScheduler, FlowMatchEulerScheduler


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_pipeline(scheduler, **denoiser):
    return quiet(
        LatentTextToImagePipeline(conftest.make_vae(), conftest.make_text_encoder(), conftest.make_tokenizer(), scheduler, **denoiser)
    )


@pytest.fixture(scope="module")
def sd(sd_folder):
    return quiet(AutoPipeline.from_pretrained(sd_folder))


@pytest.fixture(scope="module")
def flow():
    return make_pipeline(FlowMatchEulerScheduler(), transformer=conftest.make_transformer())


@pytest.fixture
def counted(flow):
    """The batch sizes that the network is called with."""
    batches = []
    hook = flow.transformer.register_forward_pre_hook(lambda module, args, kwargs: batches.append(len(args[0])), with_kwargs=True)
    yield batches
    hook.remove()


# ------------------------------------------------------------------------------------------------------------------------ beside diffusers


CALLS = {
    "one": {"prompt": "a red apple"},
    "no guidance": {"prompt": "a red apple", "guidance_scale": 1.0},
    "below one": {"prompt": "a red apple", "guidance_scale": 0.0},
    "negative": {"prompt": "a red apple", "negative_prompt": "blue", "guidance_scale": 3.0},
    "several": {"prompt": ["apple", "pear"], "negative_prompt": ["blue", "green"], "num_images_per_prompt": 2},
    "size": {"prompt": "apple", "height": 24, "width": 16},
}


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")  # diffusers' Euler under numpy 2
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler", "DDPMScheduler"])
def test_pictures_equal_those_of_diffusers(sd, sd_folder, scheduler):
    """fp32 on both sides; what differs is the order of a few sums (1e-6), the promise is 1e-4."""
    import diffusers

    twin = quiet(
        diffusers.StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None, feature_extractor=None, image_encoder=None)
    )
    # "leading" for all: the one grid on which each of diffusers' classes is right
    twin.scheduler = getattr(diffusers, scheduler).from_config(twin.scheduler.config, timestep_spacing="leading")
    sd.scheduler = getattr(diffusers, scheduler).from_config(twin.scheduler.config)
    for name, options in CALLS.items():
        options = {"num_inference_steps": 5, "output_type": "np", **options}
        theirs = twin(generator=seeded(), **options).images
        ours = sd(generator=seeded(), **options).images
        assert np.abs(ours - theirs).max() < 1e-4, (scheduler, name)


def test_eta_and_given_embeddings_equal_those_of_diffusers(sd, sd_folder):
    import diffusers

    twin = quiet(
        diffusers.StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None, feature_extractor=None, image_encoder=None)
    )
    sd.scheduler = twin.scheduler
    with torch.no_grad():
        embeds, negative = (encode_text(sd.tokenizer, sd.text_encoder, [text]).embeds for text in ("apple", "blue"))
    latents = torch.randn(1, 4, 8, 8, generator=seeded(1))
    for options in (
        {"prompt": "apple", "eta": 0.7},
        {"prompt_embeds": embeds, "negative_prompt_embeds": negative},
        {"prompt": "apple", "latents": latents},
        {"prompt_embeds": embeds, "guidance_scale": 1.0, "generator": [seeded(4)]},
    ):
        options = {"generator": seeded(), "num_inference_steps": 4, "output_type": "np", **options}
        theirs = twin(**{**options, "generator": seeded(4)}).images
        ours = sd(**{**options, "generator": seeded(4)}).images
        assert np.abs(ours - theirs).max() < 1e-4, options.keys()


def test_our_schedulers_run_in_diffusers_pipeline_and_ours_saved_loads_there(sd, tmp_path):
    import diffusers

    sd.scheduler = DDIMScheduler()
    sd.save_pretrained(tmp_path / "p")
    twin = quiet(
        diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "p", safety_checker=None, feature_extractor=None, image_encoder=None)
    )
    assert type(twin.scheduler) is DDIMScheduler
    options = {"prompt": "a", "num_inference_steps": 4, "output_type": "np"}
    assert np.abs(twin(generator=seeded(), **options).images - sd(generator=seeded(), **options).images).max() < 1e-4


# ------------------------------------------------------------------------------------------------------------------- generators and batches


@pytest.mark.parametrize("scheduler", [FlowMatchEulerScheduler(), DDPMScheduler()], ids=["deterministic", "stochastic"])
def test_with_one_generator_each_a_picture_does_not_depend_on_its_batch(flow, scheduler):
    pipe = make_pipeline(FlowMatchEulerScheduler(), transformer=flow.transformer)
    pipe.scheduler = scheduler
    prompts = ["a", "red apple", "hi"]
    options = {"num_inference_steps": 4, "output_type": "latent"}
    batch = pipe(prompts, generator=[seeded(i) for i in range(3)], **options).images
    for i, prompt in enumerate(prompts):
        alone = pipe(prompt, generator=[seeded(i)], **options).images[0]
        assert (batch[i] - alone).abs().max() <= 1e-5 * alone.abs().max()
        assert torch.equal(alone, pipe(prompt, generator=seeded(i), **options).images[0])


def test_pictures_of_one_prompt_lie_next_to_each_other(flow):
    options = {"num_inference_steps": 2, "output_type": "latent"}
    generators = [seeded(i) for i in range(4)]
    both = flow(["a", "b"], num_images_per_prompt=2, generator=generators, **options).images
    second = flow("b", num_images_per_prompt=2, generator=[seeded(2), seeded(3)], **options).images
    torch.testing.assert_close(both[2:], second, atol=1e-5, rtol=0)


def test_without_a_generator_the_default_one_is_drawn_from_and_not_seeded(flow):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        first = flow("a", num_inference_steps=2, output_type="latent").images
        second = flow("a", num_inference_steps=2, output_type="latent").images
        torch.manual_seed(7)
        assert torch.equal(flow("a", num_inference_steps=2, output_type="latent").images, first) and not torch.equal(first, second)


# ------------------------------------------------------------------------------------------------------------------------------- guidance


def test_both_branches_share_a_batch_and_the_idle_one_is_skipped(flow, counted):
    for scale, rows in ((3.0, 4), (1.0, 2), (0.5, 4), (0.0, 2), (ClassifierFreeGuidance(0.0), 2), (ClassifierFreeGuidance(0.5), 4)):
        counted.clear()
        flow(["a", "b"], guidance_scale=scale, num_inference_steps=3, generator=seeded(), output_type="latent")
        assert counted == [rows] * 3, scale


def test_guidance_is_linear_in_its_scale(flow):
    draws = {}
    for scale in (0.0, 1.0, 0.25, 4.0):
        options = {
            "guidance_scale": ClassifierFreeGuidance(scale),
            "num_inference_steps": 1,
            "generator": seeded(),
            "output_type": "latent",
        }
        draws[scale] = flow("a red apple", negative_prompt="blue", **options).images
    for scale in (0.25, 4.0):
        torch.testing.assert_close(draws[scale], draws[0.0] + scale * (draws[1.0] - draws[0.0]), atol=1e-5, rtol=0)


def test_the_negative_prompt_is_an_empty_caption_by_default_and_counts(flow, caplog):
    options = {"guidance_scale": 3.0, "num_inference_steps": 2, "output_type": "latent"}
    plain, empty, other = (flow("a", negative_prompt=n, generator=seeded(), **options).images for n in (None, "", "blue"))
    assert torch.equal(plain, empty) and not torch.equal(plain, other)
    with caplog.at_level(logging.WARNING):
        flow("a", negative_prompt="blue", guidance_scale=1.0, num_inference_steps=1, output_type="latent")
    assert "no effect" in caplog.text


def test_guiders_of_diffusers_are_driven(flow, counted):
    from diffusers import guiders
    from diffusers.hooks import LayerSkipConfig

    options = {"num_inference_steps": 4, "output_type": "latent"}
    plain = flow("a", guidance_scale=7.5, generator=seeded(), **options).images
    theirs = flow("a", guidance_scale=guiders.ClassifierFreeGuidance(guidance_scale=7.5), generator=seeded(), **options).images
    torch.testing.assert_close(theirs, plain, atol=1e-4, rtol=0)

    counted.clear()
    interval = guiders.ClassifierFreeGuidance(guidance_scale=7.5, start=0.25, stop=0.75)
    assert not torch.equal(flow("a", guidance_scale=interval, generator=seeded(), **options).images, plain)
    assert counted == [1, 2, 2, 1] and interval._step is None  # the guider itself is not touched

    counted.clear()
    skip = LayerSkipConfig(indices=[0], fqn="transformer_blocks", skip_attention=False, skip_ff=False, skip_attention_scores=True)
    perturbed = guiders.PerturbedAttentionGuidance(
        guidance_scale=7.5, perturbed_guidance_config=skip, perturbed_guidance_start=0.0, perturbed_guidance_stop=1.0
    )
    assert not torch.equal(flow("a", guidance_scale=perturbed, generator=seeded(), **options).images, plain)
    assert counted == [1] * 11  # branch by branch, as it changes the network in between; it begins after the first step
    torch.testing.assert_close(flow("a", guidance_scale=7.5, generator=seeded(), **options).images, plain, atol=0, rtol=0)


def test_a_guidance_of_ones_own(flow, counted):
    class FirstHalf:
        def branches(self, step, num_steps, timestep):
            return ("uncond", "cond") if step < num_steps // 2 else ("cond",)

        def combine(self, outputs):
            return outputs[-1]

    options = {"num_inference_steps": 4, "output_type": "latent", "generator": seeded()}
    assert flow("a", guidance_scale=FirstHalf(), **options).images.shape == (1, 4, 8, 8)
    assert counted == [2, 2, 1, 1]


# ------------------------------------------------------------------------------------------------------------------------------ the outputs


def test_output_types(flow):
    options = {"num_inference_steps": 2, "num_images_per_prompt": 2}
    draws = {kind: flow("a", generator=seeded(), output_type=kind, **options).images for kind in ("latent", "pt", "np", "pil")}
    assert draws["latent"].shape == (2, 4, 8, 8) and draws["latent"].dtype == torch.float32
    assert draws["pt"].shape == (2, 3, 16, 16) and 0 <= draws["pt"].min() and draws["pt"].max() <= 1
    assert np.array_equal(draws["np"], draws["pt"].permute(0, 2, 3, 1).numpy())
    assert isinstance(draws["pil"][0], Image.Image) and draws["pil"][0].size == (16, 16)
    as_tuple = flow("a", generator=seeded(), output_type="np", return_dict=False, **options)
    assert isinstance(as_tuple, tuple) and np.array_equal(as_tuple[0], draws["np"])
    torch.testing.assert_close(flow.image_processor.postprocess(flow.decode_latents(draws["latent"]), output_type="pt"), draws["pt"])


def test_the_latents_state_stays_in_float32_under_half_precision():
    pipe = make_pipeline(FlowMatchEulerScheduler(), transformer=conftest.make_transformer()).to(torch.bfloat16)
    dtypes = set()
    pipe("a", num_inference_steps=3, callback_on_step_end=lambda p, i, t, k: dtypes.add(k["latents"].dtype))
    assert dtypes == {torch.float32}


def test_scaling_and_shift_of_the_autoencoder():
    pipe = make_pipeline(FlowMatchEulerScheduler(), transformer=conftest.make_transformer())
    pipe.vae.register_to_config(scaling_factor=0.5, shift_factor=0.25)
    z = torch.randn(2, 4, 8, 8, generator=seeded())
    with torch.no_grad():
        torch.testing.assert_close(pipe.decode_latents(z), pipe.vae.decode(z / 0.5 + 0.25).sample)
        pipe.vae.register_to_config(shift_factor=None, latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[0.5] * 4)
        mean = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1)
        torch.testing.assert_close(pipe.decode_latents(z), pipe.vae.decode(z / 0.5 * 0.5 + mean).sample)


def test_defaults_of_a_pipeline_are_saved_with_it(flow, counted, tmp_path):
    pipe = quiet(
        LatentTextToImagePipeline(
            flow.vae, flow.text_encoder, flow.tokenizer, flow.scheduler, transformer=flow.transformer,
            default_num_inference_steps=3, default_guidance_scale=1.0,
        )
    )  # fmt: skip
    pipe("a", output_type="latent")
    assert counted == [1, 1, 1]
    pipe.save_pretrained(tmp_path / "p")
    again = AutoPipeline.from_pretrained(tmp_path / "p")
    assert (again.config.default_num_inference_steps, again.config.default_guidance_scale) == (3, 1.0)
    assert AutoPipeline.from_pretrained(tmp_path / "p", default_num_inference_steps=9).config.default_num_inference_steps == 9


def test_values_that_are_not_finite_are_reported_once(caplog):
    pipe = make_pipeline(FlowMatchEulerScheduler(), transformer=conftest.make_transformer())
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias[0] = float("inf")
    with caplog.at_level(logging.WARNING):
        images = pipe(["a", "b"], num_inference_steps=2, output_type="pt").images
    assert [r.getMessage() for r in caplog.records if "not finite" in r.getMessage()] and caplog.text.count("2 of 2 pictures") == 1
    assert images.shape == (2, 3, 16, 16)


# ------------------------------------------------------------------------------------------------------------------------------- callbacks


def test_callbacks_see_every_step_and_change_what_they_return(flow):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, float(timestep), pipe.num_timesteps, {k: tuple(v.shape) for k, v in tensors.items()}))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else {}

    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    options = {"num_inference_steps": 3, "output_type": "latent", "generator": seeded()}
    result = flow("a", callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names, **options).images
    assert [s[0] for s in seen] == [0, 1, 2] and seen[0][1] > seen[2][1] and seen[0][2] == 3
    assert seen[0][3] == {"latents": (1, 4, 8, 8), "prompt_embeds": (2, 16, 32), "negative_prompt_embeds": (1, 16, 32)}
    assert not result.any()


def test_a_callback_may_change_the_text_and_the_guidance(flow, counted):
    from diffusers.callbacks import SDCFGCutoffCallback

    options = {"num_inference_steps": 4, "output_type": "latent"}
    flow("a", callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.5), generator=seeded(), **options)
    assert counted == [2, 2, 2, 1]

    def swap(pipe, step, timestep, tensors):
        return {"prompt_embeds": tensors["prompt_embeds"].flip(0)} if step == 0 else None

    changed = flow(
        "a", callback_on_step_end=swap, callback_on_step_end_tensor_inputs=["prompt_embeds"], generator=seeded(), **options
    ).images
    assert not torch.equal(changed, flow("a", generator=seeded(), **options).images)
    with pytest.raises(ValueError, match="returned lattents"):
        flow("a", callback_on_step_end=lambda *a: {"lattents": None}, **options)
    assert type(flow.transformer.caption_projection).__name__ == "PixArtAlphaTextProjection"


def test_a_cut_off_of_guidance_keeps_each_prompt(flow):
    from diffusers.callbacks import SDCFGCutoffCallback

    options = {"num_inference_steps": 4, "output_type": "latent", "callback_on_step_end": SDCFGCutoffCallback(cutoff_step_ratio=0.3)}
    both = flow(["a", "b c"], generator=[seeded(0), seeded(1)], **options).images
    for i, prompt in enumerate(("a", "b c")):
        assert_close(both[i : i + 1], flow(prompt, generator=[seeded(i)], **options).images, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("returns", [True, False])
def test_a_callback_may_write_into_what_it_is_shown(flow, returns):
    def replace(pipe, step, timestep, tensors):
        return {"prompt_embeds": torch.zeros_like(tensors["prompt_embeds"])}

    def overwrite(pipe, step, timestep, tensors):
        tensors["prompt_embeds"].zero_()
        return tensors if returns else None

    options = {"num_inference_steps": 3, "output_type": "latent", "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    one, two = (flow("a", callback_on_step_end=callback, generator=seeded(), **options).images for callback in (replace, overwrite))
    assert torch.equal(one, two)


def test_latents_of_a_callback_keep_their_shape_and_precision(flow):
    def half(pipe, step, timestep, tensors):
        return {"latents": tensors["latents"].half()}

    assert flow("a", num_inference_steps=2, output_type="latent", callback_on_step_end=half).images.dtype == torch.float32
    with pytest.raises(ValueError, match=r"latents of shape \(1, 4, 4, 8\); they must keep \(1, 4, 8, 8\)"):
        flow("a", num_inference_steps=2, callback_on_step_end=lambda p, i, t, k: {"latents": k["latents"][:, :, :4]})


def test_a_callback_cannot_switch_guidance_on(flow):
    def guide(pipe, step, timestep, tensors):
        pipe._guidance_scale = 3.0

    with pytest.raises(ValueError, match="switched guidance on in a call that began without it"):
        flow("a", num_inference_steps=2, guidance_scale=1.0, callback_on_step_end=guide)


def test_a_callback_may_interrupt(flow, counted):
    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == 1

    assert flow("a", num_inference_steps=10, callback_on_step_end=stop, guidance_scale=1.0).images[0].size == (16, 16)
    assert len(counted) == 2
    flow("a", num_inference_steps=3, guidance_scale=1.0, output_type="latent")
    assert len(counted) == 5


def test_hooks_are_freed_and_offloading_changes_nothing():
    pipe = make_pipeline(FlowMatchEulerScheduler(), transformer=conftest.make_transformer())
    plain = pipe("a", num_inference_steps=2, generator=seeded(), output_type="np").images
    freed = []
    pipe.enable_model_cpu_offload(device="cpu")
    original = pipe.maybe_free_model_hooks
    pipe.maybe_free_model_hooks = lambda: (freed.append(1), original())
    assert np.array_equal(pipe("a", num_inference_steps=2, generator=seeded(), output_type="np").images, plain)
    with pytest.raises(RuntimeError, match="stop"):
        pipe("a", num_inference_steps=2, callback_on_step_end=lambda *a: (_ for _ in ()).throw(RuntimeError("stop")))
    assert len(freed) == 2


# -------------------------------------------------------------------------------------------------------------------------------- bad input

EMBEDS = torch.zeros(1, 16, conftest.TEXT_WIDTH)
BAD = {
    "no prompt": ({}, ValueError, "neither"),
    "both prompts": ({"prompt": "a", "prompt_embeds": EMBEDS}, ValueError, "both"),
    "empty list": ({"prompt": []}, ValueError, "empty list"),
    "a number": ({"prompt": 3}, TypeError, "string or a list of strings, got a int"),
    "a list of numbers": ({"prompt": ["a", 3]}, TypeError, "number 1 is of type int"),
    "bytes": ({"prompt": b"a"}, TypeError, "bytes"),
    "no steps": ({"prompt": "a", "num_inference_steps": 0}, ValueError, "num_inference_steps must be at least 1, got 0"),
    "negative steps": ({"prompt": "a", "num_inference_steps": -3}, ValueError, "at least 1"),
    "half a step": ({"prompt": "a", "num_inference_steps": 2.5}, TypeError, "whole number"),
    "too many steps of a kind": ({"prompt": "a", "timesteps": [10.0], "sigmas": [1.0]}, ValueError, "not both"),
    "no pictures": ({"prompt": "a", "num_images_per_prompt": 0}, ValueError, "num_images_per_prompt"),
    "odd height": ({"prompt": "a", "height": 18}, ValueError, "height must be a multiple of 4 pixels.*20|height.*16"),
    "no width": ({"prompt": "a", "width": 0}, ValueError, "width must be at least 1"),
    "width of text": ({"prompt": "a", "width": "16"}, TypeError, "width"),
    "guidance nan": ({"prompt": "a", "guidance_scale": float("nan")}, ValueError, "finite"),
    "guidance inf": ({"prompt": "a", "guidance_scale": float("inf")}, ValueError, "finite"),
    "guidance below 0": ({"prompt": "a", "guidance_scale": -1.0}, ValueError, "at least 0"),
    "guidance text": ({"prompt": "a", "guidance_scale": "7"}, TypeError, "guider of diffusers"),
    "eta": ({"prompt": "a", "eta": 1.5}, ValueError, "eta"),
    "eta nan": ({"prompt": "a", "eta": float("nan")}, ValueError, "eta"),
    "output type": ({"prompt": "a", "output_type": "jpg"}, ValueError, "pil, np, pt, latent"),
    "negative count": ({"prompt": ["a", "b", "c"], "negative_prompt": ["x", "y"]}, ValueError, "negative_prompt must be one caption or 3"),
    "negative number": ({"prompt": "a", "negative_prompt": 3}, TypeError, "negative_prompt"),
    "negatives": ({"prompt": "a", "negative_prompt": "b", "negative_prompt_embeds": EMBEDS}, ValueError, "got both"),
    "flat embeds": ({"prompt_embeds": EMBEDS[0]}, ValueError, "prompts, tokens, width"),
    "unlike embeds": ({"prompt_embeds": EMBEDS, "negative_prompt_embeds": EMBEDS[:, :3]}, ValueError, "shape of prompt_embeds"),
    "mask alone": ({"prompt": "a", "prompt_attention_mask": torch.ones(1, 16)}, ValueError, "must come with prompt_embeds"),
    "generator": ({"prompt": "a", "generator": 3}, TypeError, "torch.Generator"),
    "generator count": ({"prompt": "a", "generator": [torch.Generator()] * 2}, ValueError, "one per picture: 1 here, got 2"),
    "latents": ({"prompt": "a", "latents": torch.zeros(1, 4, 4, 4)}, ValueError, r"\(1, 4, 8, 8\)"),
    "callback": ({"prompt": "a", "callback_on_step_end": 3}, TypeError, "callable"),
    "callback tensors": ({"prompt": "a", "callback_on_step_end_tensor_inputs": ["noise"]}, ValueError, "got noise"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_clear_error_before_any_compute(flow, counted, name, monkeypatch):
    options, error, message = BAD[name]
    encoded = []
    hook = flow.text_encoder.register_forward_pre_hook(lambda *a: encoded.append(1))
    state = torch.random.get_rng_state()
    try:
        with pytest.raises(error, match=message):
            flow(**options)
    finally:
        hook.remove()
    assert not counted and not encoded and torch.equal(torch.random.get_rng_state(), state)


def test_a_call_with_an_unknown_argument_is_a_type_error(flow):
    with pytest.raises(TypeError, match="guidance_scael"):
        flow("a", guidance_scael=3)


def test_more_steps_than_the_network_knows_are_refused_before_the_text_is_encoded(sd):
    sd.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="1001"):
        sd("a", num_inference_steps=1001)


def test_a_pipeline_needs_exactly_one_denoiser_that_it_can_call():
    parts = (conftest.make_vae(), conftest.make_text_encoder(), conftest.make_tokenizer(), EulerScheduler())
    with pytest.raises(ValueError, match="neither"):
        LatentTextToImagePipeline(*parts)
    with pytest.raises(ValueError, match="both"):
        LatentTextToImagePipeline(*parts, unet=conftest.make_unet(), transformer=conftest.make_transformer())
    special = conftest.make_unet()
    special.register_to_config(class_embed_type="timestep")
    with pytest.raises(ValueError, match="class_embed_type"):
        LatentTextToImagePipeline(*parts, unet=special)


def test_an_empty_caption_and_unknown_letters_are_captions(flow):
    assert len(flow(["", "ünïcödé 🍎"], num_inference_steps=1).images) == 2


def test_pixart_folders_of_diffusers_load_as_ours(tmp_path):
    """T5 encoder, tokens limited by the pipeline, a learned variance that DDIM does not know of."""
    import diffusers
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    encoder = conftest._seeded(lambda: T5EncoderModel(T5Config(vocab_size=40, d_model=32, d_ff=32, d_kv=8, num_layers=1, num_heads=4)), 0)
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)] + [(c, -2.0) for c in "abcdefghijklmnopqrstuvwxyz"]
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0)
    transformer = conftest.make_transformer(out_channels=8)
    scheduler = diffusers.DDIMScheduler(clip_sample=False, steps_offset=1)
    theirs = quiet(diffusers.PixArtAlphaPipeline(tokenizer, encoder, conftest.make_vae(), transformer, scheduler))
    theirs.save_pretrained(str(tmp_path / "p"))
    ours = quiet(AutoPipeline.from_pretrained(tmp_path / "p"))
    assert type(ours) is LatentTextToImagePipeline and ours.config.max_text_tokens == 120
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np", "height": 16, "width": 16}
    reference = theirs("abc", generator=seeded(), use_resolution_binning=False, clean_caption=False, **options).images
    assert np.abs(ours("abc", generator=seeded(), **options).images - reference).max() < 1e-4
