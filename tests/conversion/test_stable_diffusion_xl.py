"""Stable Diffusion XL in one file: against the network's forward pass, said again, and against diffusers' own reading and pipeline."""

import copy

import diffusers
import pytest
import torch
from conversion.checkpoints import stable_diffusion_xl as xl
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint, convert_open_clip_checkpoint
from openai_layout import Forward
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from gen_pipelines import AutoPipeline, convert
from gen_pipelines.models.calling import TextCondition, predict
from gen_pipelines.processes import DiscreteVPPath


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("xl")
    convert(xl.write(folder), folder / "out", options=xl.OPTIONS)
    loaded = AutoPipeline.from_pretrained(str(folder / "out"))
    loaded.set_progress_bar_config(disable=True)
    return loaded


def sines(numbers, count):
    angles = numbers[..., None] * 10000.0 ** (-torch.arange(count // 2) / (count // 2))
    return torch.cat([angles.cos(), angles.sin()], -1)


@torch.no_grad()
def test_the_network_is_the_original_ones(pipe):
    """Podell et al. 2023, section 2: text of both encoders as the condition; pooled text and six sizes join the time."""
    state, generator = xl.unet_state(), torch.Generator().manual_seed(3)
    shapes = (2, 4, 8, 8), (2, 5, xl.FIRST_WIDTH + xl.WIDTH), (2, xl.WIDTH)
    x, context, pooled = (torch.randn(shape, generator=generator) for shape in shapes)
    sizes, t = torch.tensor([[16.0, 16, 0, 0, 16, 16], [32, 24, 3, 5, 16, 16]]), torch.tensor([3, 900])
    told = torch.cat([pooled, sines(sizes, xl.SIZES).flatten(1)], 1)
    hidden = F.silu(told @ state["label_emb.0.0.weight"].T + state["label_emb.0.0.bias"])
    forward = Forward(
        {**state, "label_emb.weight": hidden @ state["label_emb.0.2.weight"].T + state["label_emb.0.2.bias"]},
        lambda width: width // 64, True, "conv", 1, 3,
    )  # fmt: skip
    wanted = forward(x, t, labels=torch.arange(2), context=context)
    got = predict(pipe.unet, x, t, TextCondition(context, pooled=pooled, size=sizes))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_diffusers_reads_the_same_from_the_same_keys(pipe):
    file = {key: value.clone() for key, value in xl.parts().items()}
    unet = convert_ldm_unet_checkpoint(dict(file), {**pipe.unet.config, "class_embed_type": None})
    vae = convert_ldm_vae_checkpoint(dict(file), pipe.vae.config)
    second = convert_open_clip_checkpoint(pipe.text_encoder_2, dict(file), prefix="conditioner.embedders.1.model.")
    for theirs, network in ((unet, pipe.unet), (vae, pipe.vae), (second, pipe.text_encoder_2)):
        ours = network.state_dict()
        assert set(theirs) == set(ours)
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value.reshape(ours[key].shape), rtol=0, atol=0, msg=key)
    text = pipe.text_encoder.state_dict()
    for key, value in xl.clip_state()[0].state_dict().items():
        assert torch.equal(text[key], value), key


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' grids
def test_it_draws_what_diffusers_draws(pipe):
    theirs = diffusers.StableDiffusionXLPipeline(
        pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.tokenizer, pipe.tokenizer_2, pipe.unet,
        diffusers.EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading",
                                         steps_offset=1), add_watermarker=False,
    )  # fmt: skip
    theirs.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 3, "guidance_scale": 5.0, "height": 16, "width": 16, "output_type": "np"}
    for more in ({}, {"negative_prompt": "blue"}):
        pictures = [p("a red apple!", generator=torch.Generator().manual_seed(1), **call, **more).images for p in (theirs, pipe)]
        assert abs(pictures[0] - pictures[1]).max() < 1e-4
    ids = pipe.tokenizer_2(["apple"], padding="max_length", max_length=xl.LENGTH).input_ids[0]
    assert ids[-1] == 0 and pipe.tokenizer(["apple"], padding="max_length", max_length=xl.LENGTH).input_ids[0][-1] == 513
    assert pipe.config.force_zeros_for_empty_prompt and pipe.vae.config.scaling_factor == 0.13025


def test_marks_options_and_another_container(tmp_path):
    path = xl.write(tmp_path, v_pred=torch.zeros(0), ztsnr=torch.zeros(0))
    plan = convert(path, dry_run=True, options=xl.OPTIONS)
    p = plan.objects["scheduler"].parameterization
    assert p.prediction == "v_prediction" and not plan.notes
    assert p.path == DiscreteVPPath(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True)
    assert {"v_pred", "ztsnr", "denoiser.sigmas"} <= set(plan.dropped)
    state = load_file(path)
    state.pop("ztsnr")
    torch.save({"state_dict": state, "global_step": 4, "loops": {"best": torch.zeros(1)}}, tmp_path / "model.ckpt")
    options = {**xl.OPTIONS, "prediction": "epsilon", "tokenizer_2": xl.OPTIONS["tokenizer"], "scale_factor": 0.5}
    plan = convert(tmp_path / "model.ckpt", dry_run=True, options=options)
    assert plan.format == "stable_diffusion_xl" and plan.objects["scheduler"].parameterization.prediction == "epsilon"
    assert plan.objects["tokenizer_2"].pad_token == "<|endoftext|>" and plan.components["vae"].config["scaling_factor"] == 0.5


def test_what_is_missing_or_not_converted_is_named(tmp_path):
    path, state = xl.write(tmp_path), xl.parts()
    options = copy.copy(xl.OPTIONS)

    def refused(message, changed=None, **given):
        if changed is not None:
            save_file({key: value.contiguous() for key, value in changed.items()}, tmp_path / "changed.safetensors")
        with pytest.raises(ValueError, match=message):
            convert(path if changed is None else tmp_path / "changed.safetensors", tmp_path / "out", options={**options, **given})
        assert not (tmp_path / "out").exists()

    refused("tokenizer=FOLDER", tokenizer=str(tmp_path))
    refused("tokenizer_2=FOLDER", tokenizer_2=str(tmp_path))
    refused("prediction 'v' is none", prediction="v")
    refused("image_size = 'large'", image_size="large")
    refused("no averaged weights", weights="ema")
    without = lambda start: {key: value for key, value in state.items() if not key.startswith(start)}
    refused("no text encoder conditioner.embedders.0.transformer", without("conditioner.embedders.0."))
    refused("no autoencoder", without("first_stage_model."))
    refiner = {key.replace("embedders.1", "embedders.0"): value for key, value in without("conditioner.embedders.0.").items()}
    refused("the refiner", refiner)
    refused("no place in it: model.diffusion_model.surprise", {**state, "model.diffusion_model.surprise": torch.zeros(1)})
    refused("nothing fills|no place|the source has no", without("model.diffusion_model.label_emb.0.2."))
