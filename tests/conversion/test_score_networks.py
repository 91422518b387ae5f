"""EDM, EDM2 and score_sde_pytorch: the converted pipelines compute what the originals do, said again in `foreign_unets`."""

import math

import numpy as np
import pytest
import torch
from conversion.checkpoints import edm, edm2, score_sde
from conversion.foreign_unets import Dhariwal, Weights
from diffusers import UNet2DModel
from torch.testing import assert_close

from gen_pipelines import AutoPipeline, Parameterization, ScoreUNetModel, convert
from gen_pipelines.conversion import edm_keys, score_unet_keys
from gen_pipelines.conversion.score_sde import PRESETS

BATCH = 3


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noisy(sigma, channels, size):
    x = torch.randn(len(sigma), channels, size, size, generator=generator(1))
    return x * (1 + sigma.view(-1, 1, 1, 1))


@torch.no_grad()
def predicted(pipe, x, sigma, labels=None):
    """x_0 of noisy pictures x = x_0 + sigma eps, whatever the network's path."""
    p = pipe.scheduler.parameterization
    t = p.path.t_from_lambda(-sigma.double().log())
    state = (x * p.path.alpha(t).view(-1, 1, 1, 1)).float()
    options = {} if labels is None else {"class_labels": labels}
    output = pipe.unet(p.scale_model_input(state, t), p.network_time(t).float(), **options).sample
    return p.denoise(output, state, t)[0]


def loaded(path, folder, **options):
    convert(path, folder, options=options)
    pipe = AutoPipeline.from_pretrained(str(folder))
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ------------------------------------------------------------------------------------------------------------------------------ EDM


def edm_denoiser(network, precond):
    """D(x; sigma), from table 1 of Karras et al. 2022."""

    def denoise(x, sigma, labels):
        s = sigma.view(-1, 1, 1, 1)
        if precond == "EDMPrecond":
            total = s.square() + 0.25
            return 0.25 / total * x + s / 2 / total.sqrt() * network(x / total.sqrt(), sigma.log() / 4, labels)
        if precond == "VPPrecond":
            t = ((0.1**2 + 2 * 19.9 * (1 + sigma**2).log()).sqrt() - 0.1) / 19.9
            return x - s * network(x / (1 + s**2).sqrt(), 999 * t, labels)
        return x + s * network(x, (sigma / 2).log(), labels)

    return denoise


@pytest.mark.parametrize("precond", ["EDMPrecond", "VPPrecond", "VEPrecond"])
def test_edm_denoises_as_the_original_does(precond, tmp_path):
    pipe = loaded(edm.write(tmp_path, precond=precond), tmp_path / "out")
    sigma, labels = torch.tensor([0.05, 1.3, 60.0]), torch.tensor([0, 2, 1])
    x = noisy(sigma, 3, 8)
    with torch.no_grad():
        expected = edm_denoiser(edm.foreign(), precond)(x, sigma, labels)
    # random features of t * 999 at frequencies about 16: a rounding of the time is a thousand times larger in the angle
    tolerance = 1e-2 if precond == "VPPrecond" else 1e-5
    scale = expected.abs().amax((1, 2, 3), keepdim=True)
    assert_close(predicted(pipe, x, sigma, labels) / scale, expected / scale, rtol=0, atol=tolerance)


@torch.no_grad()
def test_edm_samples_as_algorithm_1_does(tmp_path):
    pipe = loaded(edm.write(tmp_path), tmp_path / "out")
    denoise, steps, labels = edm_denoiser(edm.foreign(), "EDMPrecond"), 6, torch.tensor([1, 2])
    noise = torch.randn(2, 3, 8, 8, generator=generator(3))
    ramp = torch.arange(steps, dtype=torch.float64) / (steps - 1)
    sigmas = [*((80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7).tolist(), 0.0]
    x = noise * sigmas[0]
    for here, there in zip(sigmas[:-1], sigmas[1:], strict=True):
        slope = (x - denoise(x, torch.full((2,), here), labels)) / here
        landed = x + (there - here) * slope
        if there:
            slope = (slope + (landed - denoise(landed, torch.full((2,), there), labels)) / there) / 2
        x = x + (there - here) * slope
    drawn = pipe(class_labels=labels.tolist(), num_inference_steps=steps, latents=noise, output_type="latent").images
    assert_close(drawn / x.abs().max(), x / x.abs().max(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("changes", [
    {"taps": (1, 1), "fourier": False, "input": "none", "classes": 0},
    {"taps": (1, 1), "fourier": False, "input": "none", "widths": (32, 32, 16), "layers": 2, "attention": (0, 2)},
    {"input": "input_skip", "output": "output_skip"},
    {"input": "residual", "output": "output_skip", "classes": 0},
], ids=["DDPM++", "deep", "skips", "residual in, skip out"])  # fmt: skip
@torch.no_grad()
def test_every_branch_of_ddpmpp_and_ncsnpp_in_edm(changes):
    foreign = edm.foreign(**changes)
    given = edm.arguments(foreign)
    model = ScoreUNetModel(**edm_keys.score_unet_config(given)).eval()
    model.load_state_dict(edm_keys.score_unet_state(given, foreign.w))
    x, t = torch.randn(BATCH, 3, 8, 8, generator=generator()), torch.tensor([-1.4, 0.01, 1.1])
    labels = torch.tensor([0, 2, 1]) if foreign.classes else None
    assert_close(model(x, t, labels).sample, foreign(x, t, labels), rtol=0, atol=2e-5)


@torch.no_grad()
def test_adm_is_diffusers_unet():
    changes = {"base": 128, "widths": (128, 256), "attention": (1,), "taps": (1, 1), "fourier": False, "input": "none"}
    foreign = Dhariwal(Weights(), numbered=False, **{**edm.SETTINGS, **changes})
    x, t, labels = torch.randn(2, 3, 8, 8, generator=generator()), torch.tensor([0.3, 700.0]), torch.tensor([2, 0])
    expected = foreign(x, t, labels)
    names = ("img_resolution", "in_channels", "out_channels", "label_dim", "augment_dim", "model_channels", "channel_mult", "num_blocks",
             "attn_resolutions", "dropout")  # fmt: skip
    given = {name: edm.arguments(foreign)[name] for name in names}
    model = UNet2DModel(**edm_keys.adm_config(given)).eval()
    model.load_state_dict(edm_keys.adm_state(given, foreign.w))
    assert_close(model(x, t, labels).sample, expected, rtol=0, atol=2e-5)


def test_a_null_class_comes_of_label_dropout(tmp_path):
    foreign = edm.foreign()
    pipe = loaded(edm.write(tmp_path, given={**edm.arguments(foreign), "label_dropout": 0.1}), tmp_path / "out")
    assert (pipe.num_classes, pipe.null_class) == (3, 3)
    assert_close(pipe.unet.class_embedding.weight[3], foreign.w["map_label.bias"])


def test_improved_ddpm_is_the_cosine_schedule(tmp_path):
    """u_j of Karras et al. 2022, table 1: the noise levels, from j = M to 0, which the network knows as M - 1 - j."""
    from gen_pipelines.conversion.edm import parameterization_of

    p = parameterization_of("iDDPMPrecond", edm.ATTRIBUTES["iDDPMPrecond"])
    bar = lambda j: math.sin(math.pi / 2 * j / 1000 / 1.008) ** 2
    u, levels = 0.0, {}
    for j in range(1000, 0, -1):
        u = math.sqrt((u**2 + 1) / max(bar(j - 1) / bar(j), 0.001) - 1)
        levels[1000 - j] = u
    for index in (0, 17, 500, 998):
        assert p.path.level(index).ratio == pytest.approx(levels[index], rel=1e-3)  # a path multiplies in float32
    assert p.learned_variance and p.time_input == "index"


@pytest.mark.parametrize(("changes", "message"), [
    ({"given": {**edm.arguments(edm.foreign()), "wings": 2}}, "'wings'"),
    ({"class_name": "GliderUNet"}, "of no layout that is known"),
])  # fmt: skip
def test_another_network_in_edms_pickle_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert(edm.write(tmp_path, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_narrow_adm_is_refused():
    given = {"img_resolution": 8, "in_channels": 3, "out_channels": 3, "model_channels": 64}
    with pytest.raises(ValueError, match="at least 128 channels"):
        edm_keys.adm_config(given)


# ----------------------------------------------------------------------------------------------------------------------------- EDM2


@torch.no_grad()
def test_edm2_denoises_as_the_original_does(tmp_path):
    pipe = loaded(edm2.write(tmp_path), tmp_path / "out", vae="none")
    foreign = edm2.foreign()
    sigma, labels = torch.tensor([0.05, 1.3, 60.0]), torch.tensor([0, 2, 1])
    x = noisy(sigma, 4, 8)
    expected = edm_denoiser(foreign, "EDMPrecond")(x, sigma, labels)
    scale = expected.abs().amax((1, 2, 3), keepdim=True)
    assert_close(predicted(pipe, x, sigma, labels) / scale, expected / scale, rtol=0, atol=1e-5)
    assert_close(pipe.unet.log_variance(sigma.log() / 4), foreign.uncertainty(sigma.log() / 4))
    pipe(class_labels=[0], num_inference_steps=2, output_type="latent", generator=generator())


def test_edm2_takes_an_autoencoder_along(tmp_path):
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).eval()
    vae.save_pretrained(tmp_path / "vae")
    source = edm2.write(tmp_path, dtype=torch.float16)  # as NVIDIA's own are
    with pytest.raises(ValueError, match="stabilityai/sd-vae-ft-mse"):
        convert(source, tmp_path / "out")
    pipe = loaded(source, tmp_path / "out", vae=str(tmp_path / "vae"))
    drawn = pipe(class_labels=[2], num_inference_steps=2, generator=generator(), output_type="latent").images
    shape = (1, -1, 1, 1)
    raw = drawn * torch.tensor(2 * edm2.STD).view(shape) + torch.tensor(edm2.MEAN).view(shape)
    with torch.no_grad():
        expected = vae.decode(raw).sample.clamp(0, 1)  # EDM2's pictures
        encoded = pipe.vae.encode(torch.full((1, 3, 8, 8), 0.5)).latent_dist.mode()[..., 2:-2, 2:-2]
        assert_close(encoded.shape, vae.encode(torch.full((1, 3, 8, 8), 0.75)).latent_dist.mode()[..., 2:-2, 2:-2].shape)
    pictures = pipe(class_labels=[2], num_inference_steps=2, generator=generator(), output_type="pt").images
    assert_close(pictures, expected, rtol=0, atol=1e-5)


def test_edm2_of_pictures_needs_no_autoencoder(tmp_path):
    pipe = loaded(edm2.write(tmp_path, encoder="StandardRGBEncoder", channels=3, classes=0), tmp_path / "out")
    assert pipe.vae is None and pipe.num_classes is None
    assert np.isfinite(pipe(num_inference_steps=2, generator=generator(), output_type="np").images).all()


# ------------------------------------------------------------------------------------------------------------------------ score_sde

SMALL = {"base": 16, "widths": (16, 32), "layers": 1, "attention": (0,), "size": 16}
NETWORKS = {
    "NCSN++ for VE": ({**SMALL, "taps": (1, 3, 3, 1), "fourier": True, "input": "residual"}, {"sde": "vesde"}),
    "large NCSN++ for VE": (
        {**SMALL, "widths": (16, 16, 32), "taps": (1, 3, 3, 1), "fourier": True, "input": "input_skip", "output": "output_skip"},
        {"sde": "vesde"},
    ),
    "NCSN++ for discrete VE": ({**SMALL, "taps": (1, 3, 3, 1), "input": "residual"}, {"sde": "vesde"}),
    "DDPM++ for VP": (SMALL, {"sde": "vpsde", "continuous": True}),
    "NCSN++ for VP": ({**SMALL, "taps": (1, 3, 3, 1), "input": "residual"}, {"sde": "vpsde", "continuous": True}),
    "DDPM++ for discrete VP": ({**SMALL, "layers": 2}, {"sde": "vpsde", "continuous": False}),
    "DDPM++ for sub-VP": ({**SMALL, "attention": (0, 1)}, {"sde": "subvpsde"}),
    "DDPM++ for rectified flow": (SMALL, {"sde": "rectified_flow"}),
    "large NCSN++ for rectified flow": (
        {**SMALL, "taps": (1, 3, 3, 1), "fourier": True, "input": "input_skip", "output": "output_skip"}, {"sde": "rectified_flow"},
    ),
}  # fmt: skip


def score_of(network, sde, continuous, x, t):
    """The score of pictures in the network's own units at time t (B,) of its SDE, as Song et al. 2021 define them (appendices B to D)."""
    column = lambda v: v.view(-1, 1, 1, 1)
    if sde == "vesde":
        sigma = 0.01 * (50 / 0.01) ** t
        embedded = sigma.log() if network.fourier else 999 * (1 - t)
        return network(2 * x - 1, embedded) / column(sigma)
    log_alpha = -0.25 * t**2 * 19.9 - 0.05 * t
    variance = 1 - torch.exp(2 * log_alpha)
    std = variance if sde == "subvpsde" else variance.sqrt()
    if not continuous:
        std = (1 - torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)).sqrt()[(999 * t).round().long()]
    return -network(x, 999 * t) / column(std)


@pytest.mark.parametrize("kind", NETWORKS)
@torch.no_grad()
def test_score_sde_has_the_originals_score(kind, tmp_path):
    settings, options = NETWORKS[kind]
    pipe = loaded(score_sde.write(tmp_path, **{"taps": (1, 1), "fourier": False, "input": "none", **settings}), tmp_path / "out", **options)
    network, sde = score_sde.foreign(**{"taps": (1, 1), "fourier": False, "input": "none", **settings}), options["sde"]
    p = pipe.scheduler.parameterization
    x = torch.randn(BATCH, 3, 16, 16, generator=generator())
    time = torch.tensor([9, 400, 980]) / 999  # of the source
    column = lambda v: v.view(-1, 1, 1, 1)
    if sde == "rectified_flow":
        expected = network(x, 999 * time if not network.fourier else (999 * time).log())
        expected = expected / column(999 * time) if network.fourier else expected
        t = 1 - time.double()
        output = pipe.unet(x, p.network_time(t).float()).sample
        x_0, eps = p.denoise(output, x, t)
        actual = x_0 - eps
    else:
        unit = 2 if sde == "vesde" else 1  # pictures in [0, 1] to [-1, 1]
        expected = score_of(network, sde, options.get("continuous", True), x, time) / unit
        ours = 2 * x - 1 if sde == "vesde" else x
        t = 2 * 0.01 * (50 / 0.01) ** time.double() if sde == "vesde" else time.double()
        t = t if options.get("continuous", True) else 999 * t
        output = pipe.unet(ours, p.network_time(t).float()).sample
        x_0, eps = p.denoise(output, ours, t)
        actual = -eps / column(p.path.sigma(t))
    scale = expected.abs().amax((1, 2, 3), keepdim=True)
    assert_close((actual / scale).float(), expected / scale, rtol=0, atol=1e-4 if network.fourier else 2e-5)


@torch.no_grad()
def test_rectified_flow_samples_by_euler(tmp_path):
    plain = {"taps": (1, 1), "fourier": False, "input": "none", **SMALL}
    pipe = loaded(score_sde.write(tmp_path, **plain), tmp_path / "out", sde="rectified_flow")
    network, steps = score_sde.foreign(**plain), 5
    x = noise = torch.randn(2, 3, 16, 16, generator=generator(4))
    for i in range(steps):
        x = x + network(x, torch.full((2,), 999 * max(i / steps, 1e-3))) / steps  # training begins at a thousandth
    drawn = pipe(batch_size=2, num_inference_steps=steps, latents=noise, output_type="latent").images
    assert_close(drawn, x, rtol=0, atol=1e-4)


def test_the_average_is_taken_unless_the_weights_are_asked_for(tmp_path):
    source = score_sde.write(tmp_path)
    foreign = score_sde.foreign()
    pipe = loaded(source, tmp_path / "ema", **score_sde.OPTIONS)
    last = loaded(source, tmp_path / "model", weights="model", **score_sde.OPTIONS)
    assert_close(pipe.unet.conv_in.weight, foreign.w["all_modules.3.weight"])
    assert_close(last.unet.conv_in.weight, foreign.w["all_modules.3.weight"] + 1)
    assert_close(pipe.unet.frequencies, last.unet.frequencies)
    with pytest.raises(ValueError, match="weights=model"):
        convert(score_sde.write(tmp_path, "bare.pth", average=False), tmp_path / "no", options=score_sde.OPTIONS)
    unwrapped = loaded(score_sde.write(tmp_path, "bare.pth", wrapped=""), tmp_path / "unwrapped", **score_sde.OPTIONS)
    assert_close(unwrapped.unet.conv_in.weight, pipe.unet.conv_in.weight)


@pytest.mark.parametrize(("options", "message"), [
    ({}, "preset=.*sde= one of vesde"),
    ({"sde": "vpsde"}, "continuous"),
    ({"sde": "sde"}, "'sde' is not known"),
    ({"preset": "ve/nothing"}, "known are ve/cifar10"),
    ({"sde": "vesde", "fir": False}, "with filters"),
    ({"sde": "rectified_flow", "centered": False}, "centered=false"),
    ({"sde": "vesde", "weights": "best"}, "none of ema, model"),
    ({"sde": "vesde", "config": {"model": {"nf": 128}}}, "nf=128, but the weights"),
    ({"sde": "vesde", "image_size": "large"}, "whole number"),
])  # fmt: skip
def test_score_sde_says_what_is_missing(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert(score_sde.write(tmp_path), tmp_path / "out", options=options)
    assert not (tmp_path / "out").exists()


def test_a_configuration_file_says_it_all(tmp_path):
    sections = "training: {sde: vpsde, continuous: true}\nmodel: {nf: 16, beta_max: 15.0}\ndata: {image_size: 16}\n"
    (tmp_path / "config.yaml").write_text(sections)
    plain = {"taps": (1, 1), "fourier": False, "input": "none", **SMALL}
    pipe = loaded(score_sde.write(tmp_path, **plain), tmp_path / "out", config=str(tmp_path / "config.yaml"))
    assert pipe.scheduler.parameterization == Parameterization.named("score_sde_vp").with_(
        path=type(Parameterization.named("score_sde_vp").path)(0.1, 15.0)
    )


def test_an_average_of_another_network_is_refused(tmp_path):
    content = torch.load(score_sde.write(tmp_path), weights_only=True)
    content["ema"]["shadow_params"] = content["ema"]["shadow_params"][:-1]
    torch.save(content, tmp_path / "short.pth")
    with pytest.raises(ValueError, match="moving average has"):
        convert(tmp_path / "short.pth", tmp_path / "out", options=score_sde.OPTIONS)


@pytest.mark.parametrize("block", ["ddpm", "biggan"])
@pytest.mark.parametrize("input", ["none", "input_skip", "residual"])
@pytest.mark.parametrize("output", ["none", "output_skip", "residual"])
@pytest.mark.parametrize("attention", [(), (1, 2)])
def test_shapes_say_the_architecture(block, input, output, attention):
    """Keys that our own layout gives, read back; `combine` and the filters where they show."""
    taps = (1, 3, 3, 1) if block == "biggan" and output != "residual" else None
    with torch.device("meta"):
        model = ScoreUNetModel(
            16, 1, 1, base_channels=8, block_out_channels=(8, 16, 16), layers_per_block=2, block_type=block, input_pyramid=input,
            output_pyramid=output, attention_resolutions=[16 >> i for i in attention], resample_taps=taps,
            combine="cat" if input == "input_skip" and block == "ddpm" else "sum",
        )  # fmt: skip
    state = numbered(model, attention)
    config = score_unet_keys.config_from(state)
    for name in ("in_channels", "base_channels", "block_out_channels", "layers_per_block", "block_type", "input_pyramid", "output_pyramid",
                 "combine"):  # fmt: skip
        assert config[name] == model.config[name], name
    assert config["attention_levels"] == attention
    assert set(score_unet_keys.key_map(state, config).values()) == set(model.state_dict())


def numbered(model, attention):
    """Our state dict under the foreign keys."""
    config = {**model.config, "attention_levels": attention}
    inverse_block = {value: key for key, value in score_unet_keys._BLOCK.items()}
    inverse_block["shortcut"] = "Conv_2" if model.config.block_type == "biggan" else "NIN_0"
    inverse_attention = {value: key for key, value in score_unet_keys._ATTENTION.items()}
    filtered = model.config.resample_taps is not None
    found = {}
    for number, place in enumerate(score_unet_keys.layout(config)):
        inside = {key[len(place) + 1 :]: value for key, value in model.state_dict().items() if key.startswith(f"{place}.")}
        for name, value in inside.items():
            head, _, leaf = name.rpartition(".")
            table = inverse_block if head in inverse_block and "norm_0.weight" in inside else inverse_attention
            head = table.get(head, head)
            wrapped = place.endswith((".pyramid", ".conv")) and "decoder" not in place or place.endswith(("up.conv", "down.conv"))
            if wrapped:
                head = "Conv2d_0" if filtered and place.endswith("pyramid_down.conv") else "Conv_0"
            leaf = {"weight": "W", "bias": "b"}[leaf] if head.startswith("NIN") else leaf
            value = value.flatten(1).T if head == "NIN_0" and leaf == "W" and value.ndim == 4 else value
            found[f"all_modules.{number}.{head}{'.' if head else ''}{leaf}"] = value
    return found


def test_a_list_with_a_gap_is_refused():
    state = dict(score_sde.foreign().w)
    with pytest.raises(ValueError, match=r"all_modules\.4 is missing"):
        score_unet_keys.config_from({key: value for key, value in state.items() if not key.startswith("all_modules.4.")})
    with pytest.raises(ValueError, match=r"all_modules\.3: no module"):
        score_unet_keys.config_from({**state, "all_modules.3.extra": torch.zeros(1)})


def test_every_preset_is_complete():
    for name, preset in PRESETS.items():
        assert preset["sde"] in ("vesde", "vpsde", "subvpsde", "rectified_flow") and preset["image_size"] in (32, 64, 256, 1024), name
        assert ("continuous" in preset) == (preset["sde"] == "vpsde"), name
