"""k-diffusion's U-Net: the converted pipeline computes what the original does, said again in `foreign_unets`."""

import json

import pytest
import torch
from conversion.checkpoints import k_diffusion
from safetensors.torch import load_file
from torch.testing import assert_close

from gen_pipelines import AutoPipeline, EulerScheduler, HeunScheduler, KDiffusionUNetModel, convert

SIGMA = torch.tensor([0.03, 1.3, 60.0])
BRANCHES = {
    "a wrapper": {},
    "no wrapper": {"wrapped": False},
    "patches": {"patch": 2, "channels": 1},
    "variance": {"variance": True, "patch": 2},
    "three levels, heads": {"widths": (32, 128, 96), "layers": (1, 1, 1), "attention": (False, True, True)},
    "one level": {"widths": (64,), "layers": (2,), "attention": (True,)},
    "a level left out": {"widths": (32, 48, 64), "layers": (1, 1, 2), "attention": (True, False, True), "skipped": 1},
}


def noisy(channels, size=8):
    return torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(1)) * (1 + SIGMA.view(-1, 1, 1, 1))


def denoised(network, x, sigma, **given):
    """D(x; sigma), from table 1 of Karras et al. 2022."""
    s = sigma.view(-1, 1, 1, 1)
    total = s.square() + 0.25
    return 0.25 / total * x + s / 2 / total.sqrt() * network(x / total.sqrt(), sigma, **given)


def ours(unet):
    return lambda x, sigma, **given: unet(x, sigma.log() / 4, **given).sample


def check_close(actual, expected):
    scale = expected.abs().amax((1, 2, 3), keepdim=True)
    assert_close(actual / scale, expected / scale, rtol=0, atol=1e-5)


def loaded(path, folder, **options):
    convert(path, folder, options=options)
    pipe = AutoPipeline.from_pretrained(str(folder))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("branch", BRANCHES)
@torch.no_grad()
def test_it_denoises_as_the_original_does(branch, tmp_path):
    network = k_diffusion.foreign(**BRANCHES[branch])
    pipe = loaded(k_diffusion.write(tmp_path, network), tmp_path / "out")
    x = noisy(network.channels)
    check_close(denoised(ours(pipe.unet), x, SIGMA), denoised(network, x, SIGMA))
    p = pipe.scheduler.parameterization
    output = pipe.unet(p.scale_model_input(x, SIGMA), p.network_time(SIGMA).float()).sample
    check_close(p.denoise(output, x, SIGMA)[0], denoised(network, x, SIGMA))
    if network.vector:
        vector = torch.randn(3, 9, generator=torch.Generator().manual_seed(4))
        augmented = denoised(network, x, SIGMA, vector=vector)
        check_close(denoised(ours(pipe.unet), x, SIGMA, condition=vector), augmented)
        assert not torch.allclose(augmented, denoised(network, x, SIGMA), atol=1e-2)


@torch.no_grad()
def test_classes_and_vectors(tmp_path):
    network = k_diffusion.foreign(condition=4)
    path, x, labels = k_diffusion.write(tmp_path, network), noisy(3), torch.tensor([0, 3, 2])
    vector = torch.cat([torch.zeros(3, 9), torch.nn.functional.one_hot(labels, 4)], 1)
    expected = denoised(network, x, SIGMA, vector=vector)
    with pytest.raises(ValueError, match="condition=classes"):
        convert(path, dry_run=True)
    pipe = loaded(path, tmp_path / "classes", condition="classes")
    check_close(denoised(ours(pipe.unet), x, SIGMA, class_labels=labels), expected)
    pipe(class_labels=[0, 3], num_inference_steps=2)
    convert(path, tmp_path / "vector", options={"condition": "vector"})
    unet = KDiffusionUNetModel.from_pretrained(tmp_path / "vector")
    check_close(denoised(ours(unet), x, SIGMA, condition=vector), expected)
    with pytest.raises(ValueError, match="takes no vector"):
        convert(k_diffusion.write(tmp_path), dry_run=True, options={"condition": "classes"})


@torch.no_grad()
def test_a_network_that_is_given_a_picture_stands_alone(tmp_path):
    network = k_diffusion.foreign(given=2, patch=2)
    convert(k_diffusion.write(tmp_path, network), tmp_path / "out")
    unet = KDiffusionUNetModel.from_pretrained(tmp_path / "out")
    x, second = noisy(3), noisy(2)
    actual = unet(torch.cat([x, second], 1), SIGMA.log() / 4).sample
    check_close(actual, network(x, SIGMA, second=second))


@torch.no_grad()
def test_it_samples_as_the_originals_samplers_do(tmp_path):
    """Its own (sample_dpmpp_2m_sde with eta 0 and Heun's rule: DPM-Solver++ 2M, the slope integrated), Heun's and Euler's."""
    network, steps = k_diffusion.foreign(), 6
    pipe = loaded(k_diffusion.write(tmp_path, network), tmp_path / "out")
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    ramp = torch.arange(steps, dtype=torch.float64) / (steps - 1)
    sigmas = [*((80 ** (1 / 7) + ramp * (0.01 ** (1 / 7) - 80 ** (1 / 7))) ** 7).tolist(), 0.0]
    denoise = lambda x, sigma: denoised(network, x, torch.full((2,), sigma))
    x, old, before = noise * sigmas[0], None, None
    for here, there in zip(sigmas[:-1], sigmas[1:], strict=True):
        x_0 = denoise(x, here)
        if not there:
            x = x_0
            continue
        h = -torch.tensor(there / here, dtype=torch.float64).log()
        x = x * (there / here) - torch.expm1(-h).float() * x_0
        if old is not None:
            x = x + (1 + torch.expm1(-h) / h).float() * (h / -torch.tensor(here / before, dtype=torch.float64).log()).float() * (x_0 - old)
        old, before = x_0, here
    multistep = x
    x = euler = noise * sigmas[0]
    for here, there in zip(sigmas[:-1], sigmas[1:], strict=True):
        slope = (x - denoise(x, here)) / here
        landed = x + (there - here) * slope
        slope = (slope + (landed - denoise(landed, there)) / there) / 2 if there else slope
        x, euler = x + (there - here) * slope, euler + (there - here) * (euler - denoise(euler, here)) / here
    draw = lambda: pipe(num_inference_steps=steps, batch_size=2, latents=noise, output_type="latent").images
    check_close(draw(), multistep)
    pipe.scheduler = HeunScheduler(use_karras_sigmas=True)
    check_close(draw(), x)
    pipe.scheduler = EulerScheduler(use_karras_sigmas=True)
    check_close(draw(), euler)


def test_slim_files_other_weights_and_a_configuration_beside(tmp_path):
    network = k_diffusion.foreign()
    path = k_diffusion.write(tmp_path, network)
    convert(path, tmp_path / "ema")
    convert(path, tmp_path / "last", options={"weights": "model"})
    slim = k_diffusion.write(tmp_path, network, "slim.safetensors", slim=True)
    convert(slim, tmp_path / "slim")
    weights = {name: load_file(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors") for name in ("ema", "last", "slim")}
    assert all(torch.equal(weights["slim"][key], value) and torch.equal(weights["last"][key], value + 1)
               for key, value in weights["ema"].items() if not key.startswith("taps"))  # fmt: skip
    with pytest.raises(ValueError, match="has no model_ema"):
        convert(slim, dry_run=True, options={"weights": "ema"})
    content = torch.load(path, weights_only=True)
    said = content.pop("config")
    torch.save(content, tmp_path / "without.pth")
    with pytest.raises(ValueError, match="--config FILE"):
        convert(tmp_path / "without.pth", dry_run=True)
    (tmp_path / "config.json").write_text(json.dumps(said))
    plan = convert(tmp_path / "without.pth", dry_run=True, options={"config": str(tmp_path / "config.json")})
    assert plan.components["unet"].config["layers_per_block"] == [1, 2]


@pytest.mark.parametrize(("changes", "message"), [
    ({"type": "image_transformer_v2"}, "weights are those of 'image_v1'"),
    ({"channels": [32, 32]}, r"model.channels is \[32, 32\], but the weights are those of \[32, 64\]"),
    ({"depths": [2, 2]}, "model.depths"),
    ({"self_attn_depths": [True, True]}, "self_attn_depths"),
    ({"mapping_cond_dim": 3}, "mapping_cond_dim is 3"),
    ({"mapping_out": 16}, "mapping_out"),
    ({"has_variance": True}, "make 4 channels of proj_out, and the weights have 3"),
    ({"patch_size": 2}, "make 12 channels of proj_in"),
    ({"augment_wrapper": False}, "those of a network with it"),
    ({"skip_stages": 2}, "skips all"),
    ({"sigma_max": None}, "sigma_max = None"),
    ({"input_size": [8, 16]}, "squares"),
    ({"cross_cond_dim": 8}, "no second sequence"),
    ({"sigma_min": 80}, "sigma_min"),
    ({"input_size": [7, 7]}, "cannot be halved"),
])  # fmt: skip
def test_a_configuration_that_does_not_fit_is_refused(changes, message, tmp_path):
    network = k_diffusion.foreign()
    path = k_diffusion.write(tmp_path, network, said=k_diffusion.configuration(network, **changes))
    with pytest.raises(ValueError, match=message):
        convert(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_not_converted(tmp_path):
    path = k_diffusion.write(tmp_path)
    content = torch.load(path, weights_only=True)

    def refused(message, **changes):
        torch.save({**content, "model_ema": {**content["model_ema"], **changes}}, tmp_path / "changed.pth")
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / "changed.pth", dry_run=True)

    refused("attends to a second sequence", **{"inner_model.u_net.d_blocks.1.3.kv_proj.weight": torch.zeros(2, 2)})
    refused("another filter", **{"inner_model.u_net.d_blocks.1.0.kernel": torch.full((4, 4), 1 / 16)})
    refused("have no place in it", **{"inner_model.u_net.d_blocks.1.2.surprise": torch.zeros(2)})
    for key in ("inner_model.u_net.d_blocks.1.1.main.6.weight", "inner_model.mapping.2.bias"):
        less = {name: value for name, value in content["model_ema"].items() if name != key}
        torch.save({**content, "model_ema": less}, tmp_path / "less.pth")
        with pytest.raises(ValueError, match="nothing fills|no place"):
            convert(tmp_path / "less.pth", dry_run=True)
