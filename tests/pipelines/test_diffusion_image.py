"""Pictures from noise: diffusers' own from its folders, classes, guidance, inversion, interpolation, inpainting, small in large."""

import json
import logging

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel, UNet2DModel, VQModel
from PIL import Image

from gen_pipelines import (
    SCHEDULERS,
    AutoPipeline,
    ClassifierFreeGuidance,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionImagePipeline,
    EulerScheduler,
    FlowMatchEulerScheduler,
    Parameterization,
)
from gen_pipelines.pipelines.interpolation import spherical
from gen_pipelines.pipelines.pictures import as_mask, as_pictures, crop, pad
from gen_pipelines.processes import PATHS
from gen_pipelines.schedulers.bridge import HOSTED
from tests.conftest import _seeded

# diffusers hands tensors to numpy
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SIZE = 8


def make_unet(seed=0, **changes):
    config = {
        "sample_size": SIZE,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
    }
    return _seeded(lambda: UNet2DModel(**{**config, **changes}), seed)


def make_dit(seed=1, **changes):
    config = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "sample_size": SIZE}
    network = _seeded(lambda: DiTTransformer2DModel(**{**config, **changes}), seed)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for parameter in network.parameters():  # the class starts with small ones, under which classes make no difference
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network


def make_autoencoder(cls=AutoencoderKL, seed=2, **changes):
    config = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "latent_channels": 4, "sample_size": 16}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return _seeded(lambda: cls(**{**config, **kinds, **changes}), seed)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ------------------------------------------------------------------------------------------------------- diffusers' folders

CM = {"num_class_embeds": 10, "class_embed_type": None}
VQ = {"num_vq_embeddings": 32, "latent_channels": 4}
# name -> (builds diffusers' pipeline, a call's options besides generator and output_type)
THEIRS = {
    "ddpm": (lambda: diffusers.DDPMPipeline(make_unet(), diffusers.DDPMScheduler()), {"batch_size": 2, "num_inference_steps": 5}),
    "ddpm, v and trailing": (
        lambda: diffusers.DDPMPipeline(
            make_unet(), diffusers.DDPMScheduler(prediction_type="v_prediction", timestep_spacing="trailing", variance_type="fixed_large")
        ),
        {"num_inference_steps": 4},
    ),
    "ddpm, learned variance": (
        lambda: diffusers.DDPMPipeline(make_unet(out_channels=6), diffusers.DDPMScheduler(variance_type="learned_range")),
        {"batch_size": 2, "num_inference_steps": 5},
    ),
    "ddpm, not square": (
        lambda: diffusers.DDPMPipeline(make_unet(sample_size=(8, 12)), diffusers.DDPMScheduler(clip_sample=False)),
        {"num_inference_steps": 3},
    ),
    "ddim": (lambda: diffusers.DDIMPipeline(make_unet(), diffusers.DDIMScheduler()), {"batch_size": 2, "num_inference_steps": 5}),
    "ddim, eta": (lambda: diffusers.DDIMPipeline(make_unet(), diffusers.DDIMScheduler()), {"eta": 0.7, "num_inference_steps": 5}),
    "ddim, clipped": (
        lambda: diffusers.DDIMPipeline(make_unet(), diffusers.DDIMScheduler()),
        {"eta": 0.5, "use_clipped_model_output": True, "num_inference_steps": 5},
    ),
    "pndm": (lambda: diffusers.PNDMPipeline(make_unet(), diffusers.PNDMScheduler()), {"batch_size": 2, "num_inference_steps": 6}),
    "dit": (
        lambda: diffusers.DiTPipeline(make_dit(out_channels=8), make_autoencoder(), diffusers.DDIMScheduler(clip_sample=False)),
        {"class_labels": [3, 999], "num_inference_steps": 4},
    ),
    "dit, no guidance": (
        lambda: diffusers.DiTPipeline(make_dit(), make_autoencoder(), diffusers.DDIMScheduler(clip_sample=False)),
        {"class_labels": [7], "guidance_scale": 1.0, "num_inference_steps": 4},
    ),
    "dit, dpm++": (
        lambda: diffusers.DiTPipeline(make_dit(out_channels=8), make_autoencoder(), diffusers.DPMSolverMultistepScheduler()),
        {"class_labels": [3, 4], "guidance_scale": 2.0, "num_inference_steps": 4},
    ),
    "consistency": (
        lambda: diffusers.ConsistencyModelPipeline(make_unet(), diffusers.CMStochasticIterativeScheduler()),
        {"batch_size": 2},
    ),
    "consistency, steps": (
        lambda: diffusers.ConsistencyModelPipeline(make_unet(), diffusers.CMStochasticIterativeScheduler()),
        {"num_inference_steps": 3},
    ),
    "consistency, timesteps": (
        lambda: diffusers.ConsistencyModelPipeline(make_unet(**CM), diffusers.CMStochasticIterativeScheduler()),
        {"timesteps": [22, 0], "num_inference_steps": None, "class_labels": 4},
    ),
    "consistency, latents": (
        lambda: diffusers.ConsistencyModelPipeline(make_unet(**CM), diffusers.CMStochasticIterativeScheduler(clip_denoised=False)),
        {"latents": torch.randn(2, 3, SIZE, SIZE, generator=seeded(9)), "batch_size": 2, "class_labels": [1, 2]},
    ),
    "ldm": (
        lambda: diffusers.LDMPipeline(make_autoencoder(VQModel, **VQ), make_unet(in_channels=4, out_channels=4), diffusers.DDIMScheduler()),
        {"batch_size": 2, "num_inference_steps": 4},
    ),
}


@pytest.mark.parametrize("name", THEIRS)
def test_the_picture_of_diffusers_from_diffusers_folder(name, tmp_path):
    build, options = THEIRS[name]
    theirs = quiet(build())
    theirs.save_pretrained(str(tmp_path / "pipe"))
    reference = theirs(generator=seeded(5), output_type="np", **options).images
    ours = quiet(AutoPipeline.from_pretrained(tmp_path / "pipe"))
    assert type(ours) is DiffusionImagePipeline
    drawn = ours(generator=seeded(5), output_type="np", **options).images
    assert reference.std() > 0.05 and reference.shape == drawn.shape
    assert np.abs(drawn - reference).max() < 1e-4
    ours.save_pretrained(tmp_path / "again")  # and our own folder, read again
    again = quiet(AutoPipeline.from_pretrained(tmp_path / "again"))
    assert np.array_equal(again(generator=seeded(5), output_type="np", **options).images, drawn)


def test_calls_without_options_do_what_diffusers_do(tmp_path):
    """The number of steps, the guidance scale and the noise of a call that says nothing; the other output types; a tuple."""
    for name, steps, scale in (("ddpm", 1000, 1.0), ("ddim", 50, 1.0), ("dit", 50, 4.0), ("consistency", 1, 1.0)):
        THEIRS[name][0]().save_pretrained(str(tmp_path / name))
        config = AutoPipeline.from_pretrained(tmp_path / name).config
        assert (config.default_num_inference_steps, config.default_guidance_scale) == (steps, scale)
    theirs, ours = quiet(THEIRS["dit"][0]()), quiet(AutoPipeline.from_pretrained(tmp_path / "dit"))
    for kind in ("pt", "pil"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            (reference,) = theirs([1, 2], num_inference_steps=2, output_type=kind, return_dict=False)
            torch.manual_seed(0)
            (drawn,) = ours(class_labels=[1, 2], num_inference_steps=2, output_type=kind, return_dict=False)
        difference = np.asarray(drawn[0], float) - np.asarray(reference[0], float)
        assert type(drawn[0]) is type(reference[0]) and np.abs(difference).max() <= (1 if kind == "pil" else 1e-4)


def test_ldm_draws_ddims_noise_from_the_generator_of_the_call():
    """diffusers' pipeline does not pass it on; both draw the same where there is none."""
    build, _ = THEIRS["ldm"]
    theirs = quiet(build())
    ours = quiet(DiffusionImagePipeline(theirs.scheduler, unet=theirs.unet, vqvae=theirs.vqvae))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        reference = theirs(eta=1.0, num_inference_steps=3, output_type="np").images
        torch.manual_seed(3)
        assert np.abs(ours(eta=1.0, num_inference_steps=3, output_type="np").images - reference).max() < 1e-4


def test_dit_names_its_classes(tmp_path):
    """`id2label` is in the Hub's model_index.json, and the transformer under the name that its class had then."""
    theirs = THEIRS["dit"][0]()
    theirs.save_pretrained(str(tmp_path / "dit"))
    index = json.loads((tmp_path / "dit" / "model_index.json").read_text())
    index |= {"id2label": {"0": "tench, Tinca tinca", "2": "white shark"}, "transformer": ["diffusers", "Transformer2DModel"]}
    (tmp_path / "dit" / "model_index.json").write_text(json.dumps(index))
    ours = quiet(AutoPipeline.from_pretrained(tmp_path / "dit"))
    assert type(ours) is DiffusionImagePipeline and type(ours.transformer) is DiTTransformer2DModel
    assert ours.labels == {"Tinca tinca": 0, "tench": 0, "white shark": 2} and ours.get_label_ids(["white shark", "tench"]) == [2, 0]
    named, numbered = (ours(class_labels=c, num_inference_steps=2, generator=seeded(), output_type="np").images for c in ("tench", 0))
    assert np.array_equal(named, numbered)
    with pytest.raises(ValueError, match="no class is called 'white sharks'; near it are white shark"):
        ours(class_labels="white sharks")
    ours.save_pretrained(tmp_path / "again")
    assert AutoPipeline.from_pretrained(tmp_path / "again").labels == ours.labels


@pytest.mark.parametrize("name", ["ddpm", "dit"])
def test_pipelines_are_made_of_each_other(name):
    """`from_pipe` from diffusers' pipeline and back: the same components, the same picture; and one generator per picture."""
    build, options = THEIRS[name]
    theirs = quiet(build())
    ours = quiet(DiffusionImagePipeline.from_pipe(theirs, default_guidance_scale=4.0))
    back = quiet(type(theirs).from_pipe(ours))
    assert ours.denoiser is theirs.components["unet" if name == "ddpm" else "transformer"]
    options = {**options, "output_type": "np"}
    reference = theirs(generator=[seeded(1), seeded(2)], **options).images
    options |= {} if name == "dit" else {"guidance_scale": 1.0}
    assert np.abs(ours(generator=[seeded(1), seeded(2)], **options).images - reference).max() < 1e-4
    options.pop("guidance_scale", None)
    assert np.abs(back(generator=[seeded(1), seeded(2)], **options).images - reference).max() < 1e-4


def test_what_cannot_run_here_stays_diffusers_own(tmp_path):
    score = diffusers.ScoreSdeVeScheduler()
    diffusers.DDPMPipeline(make_unet(), score).save_pretrained(str(tmp_path / "score"))
    assert type(AutoPipeline.from_pretrained(tmp_path / "score")) is diffusers.DDPMPipeline


# ------------------------------------------------------------------------------------------------------- schedulers, classes, guidance


def unconditional(scheduler=None, **options):
    return quiet(DiffusionImagePipeline(scheduler or DDIMScheduler(clip_sample=False), unet=make_unet(), **options))


def conditional(scheduler=None, null=True, **options):
    """A U-Net with four classes, and a fifth label for none."""
    unet = make_unet(num_class_embeds=5 if null else 4)
    with torch.no_grad():
        unet.class_embedding.weight.mul_(3)  # so that classes show
    return quiet(DiffusionImagePipeline(scheduler or DDIMScheduler(), unet=unet, null_class=4 if null else None, **options))


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("network", ["vp", "flow"])
@pytest.mark.filterwarnings("ignore:ConsistencyScheduler")
def test_every_scheduler_draws(name, network):
    pipe = unconditional(FlowMatchEulerScheduler() if network == "flow" else None)
    pipe.scheduler = SCHEDULERS[name]()
    images = pipe(batch_size=2, num_inference_steps=3, generator=[seeded(0), seeded(1)], output_type="pt").images
    assert images.shape == (2, 3, SIZE, SIZE) and torch.isfinite(images).all()
    alone = pipe(num_inference_steps=3, generator=[seeded(1)], output_type="pt").images
    assert torch.allclose(images[1], alone[0], atol=1e-4)  # whatever the batch


@pytest.mark.parametrize("network", ["vp", "flow"])
@pytest.mark.filterwarnings("ignore")  # of consistency rules, strides and grids that end outside the network's range: see test_bridge.py
def test_every_scheduler_of_diffusers_draws(network):
    for name in HOSTED:
        pipe = unconditional(FlowMatchEulerScheduler() if network == "flow" else None)
        pipe.scheduler = getattr(diffusers, name)()
        image = pipe(num_inference_steps=4, generator=[seeded()], output_type="pt").images
        assert image.shape == (1, 3, SIZE, SIZE) and torch.isfinite(image).all(), name


def test_guidance_is_between_the_null_class_and_the_class():
    """The formula on the network's outputs, by hand, for one step of a deterministic sampler."""
    pipe, noise = conditional(), torch.randn(2, 3, SIZE, SIZE, generator=seeded())
    seen = []
    pipe(class_labels=[1, 2], guidance_scale=3.0, timesteps=[500], latents=noise, output_type="latent",
         callback_on_step_end=lambda p, i, t, tensors: seen.append(t))  # fmt: skip
    with torch.no_grad():
        cond, uncond = (pipe.unet(noise, seen[0], class_labels=torch.tensor(c)).sample for c in ([1, 2], [4, 4]))
    pipe.scheduler.set_timesteps(timesteps=[500])
    wanted = pipe.scheduler.step(uncond + 3.0 * (cond - uncond), pipe.scheduler.timesteps[0], noise).prev_sample
    for guidance in (3.0, ClassifierFreeGuidance(3.0), diffusers.ClassifierFreeGuidance(3.0)):
        drawn = pipe(class_labels=[1, 2], guidance_scale=guidance, timesteps=[500], latents=noise, output_type="latent").images
        assert torch.allclose(drawn, wanted, atol=1e-5)
    assert (cond - uncond).abs().max() > 1e-2


def test_labels_where_none_are_given(caplog):
    with_null, without = conditional(), conditional(null=False)
    drawn = with_null(batch_size=2, num_inference_steps=2, generator=seeded(), output_type="pt").images
    null = with_null(class_labels=[4, 4], num_inference_steps=2, generator=seeded(), output_type="pt").images
    assert torch.equal(drawn, null)
    labels = without.draw_labels(400, seeded())
    assert set(labels) == {0, 1, 2, 3} and labels != without.draw_labels(400, seeded(1))
    # 400 draws of four: each count is within 5 standard deviations of 100 but for one run in a million
    assert all(abs(labels.count(c) - 100) < 5 * 8.7 for c in range(4))
    assert without.draw_labels(2, [seeded(3), seeded(4)]) == [*without.draw_labels(1, [seeded(3)]), *without.draw_labels(1, [seeded(4)])]
    with caplog.at_level(logging.WARNING):
        with_null(guidance_scale=3.0, num_inference_steps=1)
    assert "has no effect without class_labels" in caplog.text


def test_several_pictures_of_a_label():
    pipe, noise = conditional(), torch.randn(4, 3, SIZE, SIZE, generator=seeded())
    one = pipe(class_labels=[1, 2], num_images_per_label=2, latents=noise, num_inference_steps=2, output_type="pt").images
    two = pipe(class_labels=torch.tensor([1, 1, 2, 2]), latents=noise, num_inference_steps=2, output_type="pt").images
    three = pipe(class_labels=1, batch_size=4, latents=noise, num_inference_steps=2, output_type="pt").images
    assert torch.equal(one, two) and torch.equal(three[:2], one[:2]) and not torch.allclose(three[2:], one[2:], atol=1e-3)


def test_guidance_leaves_a_learned_variance_to_the_class():
    unet = make_unet(num_class_embeds=5, out_channels=6)
    pipe = quiet(DiffusionImagePipeline(DDPMScheduler(variance_type="learned_range"), unet=unet, null_class=4))
    pipe.scheduler.set_timesteps(3)
    x, t = torch.randn(1, 3, SIZE, SIZE, generator=seeded()), pipe.scheduler.timesteps[0]
    with torch.no_grad():
        output = pipe.predict_guided(pipe.scheduler, x, t, 0, pipe.conditions([1], "cpu"), ClassifierFreeGuidance(2.0))
        cond, uncond = (unet(x, t, class_labels=torch.tensor([c])).sample for c in (1, 4))
    assert torch.allclose(output[:, :3], uncond[:, :3] + 2 * (cond - uncond)[:, :3], atol=1e-5)
    assert torch.allclose(output[:, 3:], cond[:, 3:], atol=1e-5)


def test_callbacks_see_and_change_the_state():
    pipe = conditional()
    stop = lambda p, i, t, tensors: setattr(p, "_interrupt", i == 1)
    zero = lambda p, i, t, tensors: {"latents": torch.zeros_like(tensors["latents"])}
    seen = []
    pipe(num_inference_steps=5, callback_on_step_end=lambda p, i, t, tensors: (seen.append(i), stop(p, i, t, tensors))[1])
    assert seen == [0, 1] and pipe.num_timesteps == 5
    assert (pipe(num_inference_steps=2, callback_on_step_end=zero, output_type="latent").images == 0).all()
    with pytest.raises(ValueError, match="may return latents"):
        pipe(num_inference_steps=1, callback_on_step_end=lambda *a: {"image": 0})


# ------------------------------------------------------------------------------------------------------- 28 x 28 in a network of 32


def test_pictures_smaller_than_the_network():
    pipe = quiet(DiffusionImagePipeline(DDIMScheduler(), unet=make_unet(in_channels=1, out_channels=1), image_size=6))
    image = pipe(num_inference_steps=2, generator=seeded()).images[0]
    assert (image.size, image.mode) == ((6, 6), "L")
    whole = pipe(num_inference_steps=2, generator=seeded(), output_type="latent").images
    inner = pipe(num_inference_steps=2, generator=seeded(), output_type="pt").images
    assert torch.allclose(inner, (whole[..., 1:7, 1:7] / 2 + 0.5).clamp(0, 1))
    framed = pipe.from_pictures(as_pictures(image, 1))
    assert framed.shape == (1, 1, SIZE, SIZE) and (framed[..., 0, :] == -1).all() and (framed[..., :, -1] == -1).all()
    assert pipe.encode(image, num_inference_steps=2).shape == (1, 1, SIZE, SIZE)


def test_frames_and_crops_undo_each_other():
    x = torch.rand(2, 1, 5, 6, generator=seeded())
    for size in ((5, 6), (8, 8), (6, 9)):
        assert torch.equal(crop(pad(x, size), (5, 6)), x) and pad(x, size).shape[2:] == size


def test_pictures_come_in_many_forms():
    values = torch.randint(0, 256, (2, 3, 4, 5), generator=seeded(), dtype=torch.uint8)
    wanted = values.float() / 127.5 - 1
    pil = [Image.fromarray(v.permute(1, 2, 0).numpy()) for v in values]
    array = values.permute(0, 2, 3, 1).numpy()
    for images in (values, values / 255, pil, array, array / 255, list(values), list(array)):
        assert torch.allclose(as_pictures(images, 3), wanted, atol=1e-6)
    assert as_pictures(pil[0], 1).shape == (1, 1, 4, 5) and as_pictures(values[0], 3).shape == (1, 3, 4, 5)
    white = Image.new("L", (5, 4), 255)
    assert as_mask(white, (4, 5)).all() and as_mask(torch.ones(4, 5, dtype=torch.bool), (4, 5)).shape == (1, 1, 4, 5)


# ------------------------------------------------------------------------------------------------------- inversion and interpolation

class GaussianNetwork(UNet2DModel):
    """The ideal epsilon network of pictures whose pixels are N(0, 1) with the correlation `share` between any two."""

    share = 1.0

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        alpha = self.alphas[timestep.long()].view(-1, 1, 1, 1)
        sigma = (1 - alpha**2).sqrt()
        common, own = self.share * sample[0].numel() + 1 - self.share, 1 - self.share  # the covariance's two eigenvalues
        mean = sample.mean(dim=(1, 2, 3), keepdim=True)
        x_0 = alpha * (common / (alpha**2 * common + sigma**2) * mean + own / (alpha**2 * own + sigma**2) * (sample - mean))
        return ((sample - alpha * x_0) / sigma,)


def ideal():
    """A pipeline of DDPM with that network, 4 x 4."""
    config = {"sample_size": 4, "in_channels": 1, "out_channels": 1, "block_out_channels": (8,), "norm_num_groups": 8}
    network = _seeded(lambda: GaussianNetwork(**config, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)), 0)
    scheduler = DDPMScheduler(clip_sample=False)
    network.alphas = scheduler.parameterization.path.alpha(torch.arange(1000)).float()
    return quiet(DiffusionImagePipeline(scheduler, unet=network))


INVERTIBLE = {
    "v, trailing": lambda: DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing"),
    "flow": lambda: FlowMatchEulerScheduler(),
    "edm": lambda: EulerScheduler(parameterization=Parameterization(PATHS["edm"](0.02, 10.0), "edm")),
}


@pytest.mark.parametrize("name", ["ideal", *INVERTIBLE])
def test_inversion_closes_with_first_order(name):
    """Noise -> picture -> noise -> picture: the error halves when the step does."""
    if name == "ideal":
        pipe, picture = ideal(), torch.linspace(-1, 1, 5).view(5, 1, 1, 1).expand(5, 1, 4, 4)
    else:
        pipe, picture = unconditional(INVERTIBLE[name]()), torch.rand(2, 3, SIZE, SIZE, generator=seeded()) * 2 - 1
        with torch.no_grad():  # a smooth network: the order shows at few steps
            pipe.unet.conv_out.weight.mul_(0.1)
    errors = []
    for steps in (10, 20, 40):
        noise = pipe.invert(picture / 2 + 0.5, num_inference_steps=steps)
        errors.append((pipe.decode(noise, num_inference_steps=steps, output_type="latent") - picture).abs().max().item())
    assert errors[2] < 0.3 and errors[2] < 0.75 * errors[1] < 0.75**2 * errors[0], errors


def test_noise_of_a_picture_starts_a_call():
    """What `encode` gives is what `latents=` takes: DDIM with the pipeline's own scheduler ends where `decode` does."""
    pipe = conditional(DDIMScheduler(clip_sample=False))
    noise = pipe.encode(torch.rand(1, 3, SIZE, SIZE, generator=seeded()), class_labels=2, num_inference_steps=10)
    decoded = pipe.decode(noise, class_labels=2, num_inference_steps=10, output_type="pt")
    called = pipe(class_labels=2, num_inference_steps=10, latents=noise, output_type="pt").images
    assert torch.allclose(decoded, called, atol=1e-5)
    other = pipe.decode(noise, class_labels=3, num_inference_steps=10, output_type="pt")
    assert (decoded - other).abs().max() > 1e-2


def test_latent_pictures_are_inverted_too():
    pipe = quiet(DiffusionImagePipeline(DDIMScheduler(), transformer=make_dit(num_embeds_ada_norm=5), vae=make_autoencoder()))
    assert pipe.picture_size == (16, 16) and pipe.null_class == 5
    noise = pipe.invert(Image.new("RGB", (16, 16), "red"), class_labels=1, num_inference_steps=3)
    assert noise.shape == (1, 4, SIZE, SIZE)
    assert pipe.decode(noise, class_labels=1, num_inference_steps=3)[0].size == (16, 16)


def test_interpolation_goes_from_one_end_to_the_other():
    pipe = unconditional()
    a, b = torch.rand(2, 1, 3, SIZE, SIZE, generator=seeded())
    way = pipe.interpolate(a, b, num_images=5, num_inference_steps=20, output_type="pt")
    ends = [pipe.decode(pipe.encode(x, num_inference_steps=20), num_inference_steps=20, output_type="pt") for x in (a, b)]
    assert len(way) == 5 and torch.allclose(way[:1], ends[0], atol=1e-4) and torch.allclose(way[-1:], ends[1], atol=1e-4)
    drawn = pipe.interpolate(num_images=3, num_inference_steps=2, generator=seeded(1), output_type="latent")
    noise = torch.randn(2, 1, 3, SIZE, SIZE, generator=seeded(1))
    assert torch.allclose(drawn[:1], pipe.decode(noise[0], num_inference_steps=2, output_type="latent"), atol=1e-5)
    with pytest.raises(ValueError, match="no null class"):
        conditional(null=False).interpolate(a, b)


def test_spherical_interpolation_keeps_the_norm_and_the_angle():
    a, b = torch.randn(2, 3, 4, 5, 5, generator=seeded(), dtype=torch.float64)
    a, b = (x / x.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for x in (a, b))
    angle = lambda x, y: torch.acos((x * y).flatten(1).sum(1).clamp(-1, 1))
    for weight in (0.0, 0.3, 1.0):
        x = spherical(a, b, weight)
        assert torch.allclose(x.flatten(1).norm(dim=1), torch.ones(3, dtype=torch.float64))
        assert torch.allclose(angle(a, x), weight * angle(a, b), atol=1e-6)
    assert torch.allclose(spherical(a, a, 0.4), a)


# ------------------------------------------------------------------------------------------------------- inpainting


@pytest.mark.parametrize("name", ["ddpm", "heun", "dpm_solver_multistep"])
def test_inpainting_keeps_what_the_mask_keeps(name):
    pipe = unconditional()
    pipe.scheduler = SCHEDULERS[name]()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))
    mask = Image.new("L", (SIZE, SIZE), 0)
    mask.paste(255, (0, 0, SIZE // 2, SIZE))
    options = {"image": picture, "mask_image": mask, "num_inference_steps": 4}
    drawn = np.asarray(pipe(generator=seeded(), **options).images[0]).astype(int)
    given = np.asarray(picture).astype(int)
    assert np.abs(drawn[:, SIZE // 2 :] - given[:, SIZE // 2 :]).max() <= 1
    assert np.abs(drawn[:, : SIZE // 2] - given[:, : SIZE // 2]).max() > 20
    again = np.asarray(pipe(generator=seeded(), num_resamples=3, **options).images[0]).astype(int)
    assert np.abs(again[:, SIZE // 2 :] - given[:, SIZE // 2 :]).max() <= 1 and np.abs(again - drawn).max() > 1


def test_inpainting_with_resampling_draws_from_the_conditional():
    """Correlated Gaussian pixels, half of them kept: the mean and deviation of the others are known, and resampling approaches them."""
    pipe, pixels, value = ideal(), 8, 0.8
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, variance_type="fixed_large")  # the small one narrows in 50 steps
    pipe.unet.share = 0.5
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[:, :2] = True
    wanted = 0.5 * pixels / (0.5 * pixels + 0.5)  # regression of one pixel on the eight that are kept
    options = {"image": torch.full((1, 1, 4, 4), value / 2 + 0.5), "mask_image": mask, "num_inference_steps": 50, "output_type": "latent"}
    off = {}
    for times in (1, 10):
        drawn = pipe(1000, num_resamples=times, generator=seeded(), **options).images[:, :, :, :2]
        off[times] = abs(drawn.mean().item() - wanted * value), abs(drawn.std().item() / (1 - 0.5 * wanted) ** 0.5 - 1)
    assert off[10][0] < 0.05 and off[10][1] < 0.05, off  # five standard errors of the mean are 0.05
    assert off[1][0] > 0.1, off  # replacement alone is biased


# ------------------------------------------------------------------------------------------------------- bad input

X = torch.zeros(1, 3, SIZE, SIZE)
BAD = {
    "no pictures": ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
    "half a picture": ({"batch_size": 1.5}, TypeError, "batch_size must be a whole number"),
    "label too high": ({"class_labels": [0, 5]}, ValueError, "from 0 to 3, or 4 for none; got 5"),
    "label below": ({"class_labels": -1}, ValueError, "from 0 to 3"),
    "label of text": ({"class_labels": "cat"}, ValueError, "names no classes"),
    "half a label": ({"class_labels": [0.5]}, TypeError, "whole numbers or names"),
    "no label": ({"class_labels": []}, ValueError, "empty"),
    "batch and labels": ({"class_labels": [0, 1], "batch_size": 3}, ValueError, "batch_size is 3 and class_labels ask for 2"),
    "steps": ({"num_inference_steps": 0}, ValueError, "num_inference_steps"),
    "absurd steps": ({"num_inference_steps": 10**8}, ValueError, "at most 100,000"),
    "two grids": ({"timesteps": [1], "sigmas": [1.0]}, ValueError, "not both"),
    "eta": ({"eta": 2.0}, ValueError, "eta"),
    "output": ({"output_type": "jpg"}, ValueError, "pil, np, pt, latent"),
    "generators": ({"generator": [torch.Generator()] * 2}, ValueError, "one per picture: 1 here, got 2"),
    "latents": ({"latents": torch.zeros(1, 3, 4, 4)}, ValueError, r"\(1, 3, 8, 8\)"),
    "guidance": ({"guidance_scale": -1.0}, ValueError, "at least 0"),
    "mask alone": ({"mask_image": X[:, :1]}, ValueError, "got only mask_image"),
    "resample alone": ({"num_resamples": 2}, ValueError, "num_resamples is for inpainting"),
    "image size": ({"image": X[..., :4], "mask_image": X[:, :1]}, ValueError, "8 x 8 pixels for this model, got 8 x 4"),
    "image range": ({"image": X + 2, "mask_image": X[:, :1]}, ValueError, r"in \[0, 1\].*must be uint8"),
    "image range below": ({"image": X - 1, "mask_image": X[:, :1]}, ValueError, r"in \[0, 1\].*\(x \+ 1\) / 2"),
    "image nan": ({"image": X + float("nan"), "mask_image": X[:, :1]}, ValueError, "not finite"),
    "image channels": ({"image": X[:, :1], "mask_image": X[:, :1]}, ValueError, r"\(B, 3, H, W\)"),
    "image kind": ({"image": "cat.png", "mask_image": X[:, :1]}, TypeError, "PIL picture, an array"),
    "mask size": ({"image": X, "mask_image": X[:, :1, :4]}, ValueError, "mask_image must be 8 x 8"),
    "callback": ({"callback_on_step_end": 3}, TypeError, "callable"),
    "callback tensors": ({"callback_on_step_end_tensor_inputs": ["noise"]}, ValueError, "got noise"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_clear_error_before_any_compute(name):
    options, error, message = BAD[name]
    pipe = conditional()
    calls = []
    pipe.unet.register_forward_pre_hook(lambda *a: calls.append(1))
    state = torch.random.get_rng_state()
    with pytest.raises(error, match=message):
        pipe(**options)
    assert not calls and torch.equal(torch.random.get_rng_state(), state)


def test_components_that_cannot_work_are_refused_at_once():
    with pytest.raises(ValueError, match="neither"):
        DiffusionImagePipeline(DDIMScheduler())
    with pytest.raises(ValueError, match="null_class=4, but the U-Net has no classes"):
        DiffusionImagePipeline(DDIMScheduler(), unet=make_unet(), null_class=4)
    with pytest.raises(ValueError, match="image_size 9, but the network draws 8 x 8"):
        unconditional(image_size=9)
    with pytest.raises(ValueError, match="class_embed_type='identity'"):
        DiffusionImagePipeline(DDIMScheduler(), unet=make_unet(class_embed_type="identity"))
    with pytest.raises(ValueError, match="no null class to guide away from"):
        unconditional()(guidance_scale=2.0)
    with pytest.raises(ValueError, match="has no classes"):
        unconditional()(class_labels=[1])
    with pytest.raises(ValueError, match="follows no path to noise"):
        unconditional(diffusers.CMStochasticIterativeScheduler()).invert(X)
    with pytest.raises(ValueError, match="in pixels, and this model draws latents"):
        latent = DiffusionImagePipeline(DDIMScheduler(), unet=make_unet(in_channels=4, out_channels=4), vae=make_autoencoder())
        latent(image=X, mask_image=X[:, :1])


# ------------------------------------------------------------------------------------------------------------------- likelihood


def test_log_likelihood_counts_padding_and_belongs_to_the_picture():
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",), norm_num_groups=2, layers_per_block=1,
    ).eval()  # fmt: skip
    pipe = DiffusionImagePipeline(DDPMScheduler(clip_sample=False), unet=unet, image_size=6)
    pipe.set_progress_bar_config(disable=True)
    pictures = torch.randint(0, 256, (3, 1, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    own = lambda *seeds: [torch.Generator().manual_seed(seed) for seed in seeds]
    for kind, evaluations in (("ode", 5), ("vlb", 4)):
        many = pipe.log_likelihood(pictures, generator=own(1, 2, 3), kind=kind, steps=4, batch_size=2)
        one = pipe.log_likelihood(pictures[1:2], generator=own(2), kind=kind, steps=4)
        assert many.kind == kind and many.nats.shape == (3,) and many.num_function_evaluations == evaluations
        torch.testing.assert_close(many.nats[1:2], one.nats, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(many.bits_per_dim, -many.nats / (36 * 0.6931471805599453))
    twice = pipe.log_likelihood(pictures, num_samples=3, generator=own(1, 2, 3), steps=2)
    assert (twice.stderr > 0).all() and twice.num_function_evaluations == 9
    with pytest.raises(ValueError, match="none of ode, vlb"):
        pipe.log_likelihood(pictures, kind="exact")
    with pytest.raises(TypeError, match="takes no stepz"):
        pipe.log_likelihood(pictures, stepz=3)
    with pytest.raises(ValueError, match="6 x 6 pixels are needed"):
        pipe.log_likelihood(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler"])
@pytest.mark.filterwarnings("ignore:.*has a length of")
def test_a_network_that_was_distilled_to_jump_stays_one_whatever_draws_from_it(name, tmp_path):
    pipe = DiffusionImagePipeline(getattr(diffusers, name)(), unet=make_unet())
    pipe.scheduler = EulerScheduler()
    pipe.save_pretrained(tmp_path / "swapped")
    for one in (pipe, DiffusionImagePipeline.from_pretrained(tmp_path / "swapped")):
        one.set_progress_bar_config(disable=True)
        assert one.parameterization.jumps and not one.parameterization.has_path
        with pytest.warns(UserWarning, match="EulerScheduler on a consistency network"):
            one(batch_size=1, num_inference_steps=2)
        with pytest.raises(NotImplementedError, match="no likelihood"):
            one.log_likelihood(torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8))
        with pytest.raises(ValueError, match="nothing can be inverted"):
            one.encode(torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8), num_inference_steps=2)


def test_a_rule_for_jumps_does_not_make_a_network_jump():
    pipe = DiffusionImagePipeline(DDPMScheduler(), unet=make_unet())
    with pytest.warns(UserWarning, match="a rule for consistency networks"):
        pipe.scheduler = diffusers.LCMScheduler()
    assert pipe.parameterization.has_path
    pipe.scheduler = EulerScheduler()
    pipe.set_progress_bar_config(disable=True)
    pipe(batch_size=1, num_inference_steps=2)
