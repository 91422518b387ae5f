"""The networks of other codebases: written here from their own definitions, sampled with what their names stand for."""

import math

import diffusers
import pytest
import torch

from gen_pipelines.processes import CONVENTIONS, EDMPath, LinearPath, Parameterization
from gen_pipelines.schedulers import DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralScheduler

MEAN, STD = 0.3, 0.2  # within [-1, 1], so that clipping changes nothing


def estimate(x, a, s):
    """E[x_0 | a x_0 + s eps] for x_0 ~ N(MEAN, STD^2), and the noise that goes with it."""
    x_0 = MEAN + a * STD**2 / (a**2 * STD**2 + s**2) * (x - a * MEAN)
    return x_0, (x - a * x_0) / max(s, 1e-9)


def indexed(betas):
    bars = torch.cumprod(1 - betas, 0)
    ratios = ((1 - bars) / bars).sqrt().log()

    def network(x, index):
        low = min(int(math.floor(float(index))), len(bars) - 2)
        ratio = math.exp(ratios[low] + (float(index) - low) * (ratios[low + 1] - ratios[low]))
        a = 1 / math.sqrt(1 + ratio**2)
        return estimate(x, a, a * ratio)[1]

    return network


def with_variance(network):
    return lambda x, t: torch.cat([network(x, t), torch.full_like(x, 0.3)], 1)


def velocity(t_of, sign):
    """u = eps - x_0 on x = (1 - t) x_0 + t eps, or its negative."""

    def network(x, time):
        t = t_of(float(time))
        x_0, eps = estimate(x, 1 - t, t)
        return sign * (eps - x_0)

    return network


def preconditioned(sigma_data, raw):
    """A network that is given c_in x at log(sigma)/4; `raw` makes its output of (x, x_0, sigma)."""

    def network(scaled, time):
        sigma = math.exp(4 * float(time))
        x = scaled * math.sqrt(sigma**2 + sigma_data**2)
        return raw(x, estimate(x, 1.0, sigma)[0], sigma)

    return network


def edm_raw(x, x_0, sigma, data=0.5):
    c_skip, c_out = data**2 / (sigma**2 + data**2), sigma * data / math.sqrt(sigma**2 + data**2)
    return (x_0 - c_skip * x) / c_out


def svd_raw(x, x_0, sigma):
    """v with the state sigma-scaled: x_0 = x / (sigma^2 + 1) - v sigma / sqrt(sigma^2 + 1)."""
    return (x / (sigma**2 + 1) - x_0) * math.sqrt(sigma**2 + 1) / sigma


def consistency(scaled, time, data=0.5, least=0.002):
    sigma = math.exp(float(time) / 250)
    x = scaled * math.sqrt(sigma**2 + data**2)
    x_0 = MEAN + (x - MEAN) * math.sqrt((STD**2 + least**2) / (STD**2 + sigma**2))  # where the ODE's curve ends
    c_skip, c_out = data**2 / ((sigma - least) ** 2 + data**2), (sigma - least) * data / math.sqrt(sigma**2 + data**2)
    return (x_0 - c_skip * x) / c_out if c_out > 1e-6 else x_0


def score_sde(std_of):
    def network(x, time):
        t = float(time) / 999
        log_alpha = -0.25 * t**2 * (20 - 0.1) - 0.5 * t * 0.1
        return estimate(x, math.exp(log_alpha), std_of(log_alpha))[1]

    return network


def ve(x, sigma):
    sigma = float(sigma)
    return (estimate(x, 1.0, sigma)[0] - x) / sigma**2


def roots(first, last):
    return torch.linspace(first**0.5, last**0.5, 1000, dtype=torch.float64) ** 2


LINEAR_BETAS = torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64)
NATIVE = {
    "sd": indexed(roots(0.00085, 0.012)),
    "ldm": indexed(roots(0.0015, 0.0195)),
    "ddpm": indexed(LINEAR_BETAS),
    "guided_diffusion": with_variance(indexed(LINEAR_BETAS)),
    "dit": with_variance(indexed(LINEAR_BETAS)),
    "sd3": velocity(lambda time: time / 1000, 1),
    "flux": velocity(lambda time: time, 1),
    "lumina": velocity(lambda time: 1 - time, -1),
    "hidream": velocity(lambda time: time / 1000, -1),
    "nucleus": velocity(lambda time: time, -1),
    "sana": velocity(lambda time: time / 1000, 1),
    "mochi": velocity(lambda time: 1 - time / 1000, -1),
    "svd": preconditioned(1.0, svd_raw),
    "edm": preconditioned(0.5, edm_raw),
    "edm2": preconditioned(0.5, edm_raw),
    "consistency": consistency,
    "torchcfm": velocity(lambda time: 1 - time, -1),
    "sit": velocity(lambda time: 1 - time, -1),
    "rectified_flow": velocity(lambda time: 1 - time / 999, -1),
    "score_sde_vp": score_sde(lambda log_alpha: math.sqrt(1 - math.exp(2 * log_alpha))),
    "score_sde_sub_vp": score_sde(lambda log_alpha: 1 - math.exp(2 * log_alpha)),
    "score_sde_ve": ve,
}


def end(scheduler, network, generator=None, x=None):
    scheduler.set_timesteps(100)
    x = torch.tensor([[-1.0], [1.0]], dtype=torch.float64) if x is None else x
    x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x, generator=generator).prev_sample
    return x


def test_every_convention_has_a_network_here():
    assert set(NATIVE) == set(CONVENTIONS)


@pytest.mark.parametrize("name", [name for name in CONVENTIONS if name != "consistency"])
@pytest.mark.parametrize("cls", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_the_native_network_draws_its_data(name, cls):
    """The ideal network is affine and the solvers draw no noise: two chains say the mean and the spread."""
    low, high = end(cls().bind(Parameterization.named(name)), NATIVE[name])[:, 0].tolist()
    assert (low + high) / 2 == pytest.approx(MEAN, abs=0.02)
    assert (high - low) / 2 == pytest.approx(STD, abs=0.035)


@pytest.mark.parametrize("name", ["dit", "lumina", "rectified_flow", "svd", "score_sde_ve"])
def test_the_native_network_under_a_sampler_with_noise(name):
    """1,000 chains: standard errors of 0.004 and 0.003."""
    g = torch.Generator().manual_seed(0)
    start = torch.randn(1000, 1, generator=g, dtype=torch.float64)
    x = end(EulerAncestralScheduler().bind(Parameterization.named(name)), NATIVE[name], g, start)
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(x.std()) == pytest.approx(STD, abs=0.035)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_consistency_model_jumps(steps):
    from gen_pipelines.schedulers import ConsistencyScheduler

    scheduler, g = ConsistencyScheduler().bind(Parameterization.named("consistency")), torch.Generator().manual_seed(0)
    scheduler.set_timesteps(steps)
    x = torch.randn(4000, 1, generator=g, dtype=torch.float64) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(NATIVE["consistency"](scheduler.scale_model_input(x, t), t), t, x, generator=g).prev_sample
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.01)
    assert float(x.std()) == pytest.approx(STD, abs=0.01)


@pytest.mark.parametrize("name", CONVENTIONS)
def test_a_convention_is_stored_in_a_scheduler_config(name):
    p = Parameterization.named(name)
    assert Parameterization.from_config(p.to_config()) == p
    scheduler = DDIMScheduler().bind(p)
    assert DDIMScheduler.from_config(dict(scheduler.config)).parameterization == p


def test_names():
    assert Parameterization.named("SiT") == Parameterization(LinearPath(), "flow_prediction", time_input="1 - t", sign=-1)
    assert Parameterization.named("score-sde VP") == CONVENTIONS["score_sde_vp"].parameterization
    assert Parameterization.named("edm", path=EDMPath(0.002, 40.0)).path.sigma_max == 40.0
    assert Parameterization.named("sd", prediction="v_prediction").prediction == "v_prediction"
    with pytest.raises(ValueError, match="'stable' is not known; use one of sd, "):
        Parameterization.named("stable")


# ------------------------------------------------------------------------------------------------------------------- from a repository

FLOW = diffusers.FlowMatchEulerDiscreteScheduler
REPOSITORIES = [
    ("sd", diffusers.PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"), "UNet2DConditionModel"),
    ("ddpm", diffusers.DDPMScheduler(clip_sample=False), {"_class_name": "UNet2DModel", "in_channels": 3, "out_channels": 3}),
    ("guided_diffusion", diffusers.DDPMScheduler(clip_sample=False), {"_class_name": "UNet2DModel", "in_channels": 3, "out_channels": 6}),
    ("dit", diffusers.DDIMScheduler(clip_sample=False), "DiTTransformer2DModel"),
    ("dit", diffusers.DDIMScheduler(clip_sample=False), {"_class_name": "DiTTransformer2DModel", "in_channels": 4, "out_channels": 8}),
    ("sd3", FLOW(shift=3.0), "SD3Transformer2DModel"),
    ("flux", FLOW(shift=3.0, use_dynamic_shifting=True), "FluxTransformer2DModel"),
    ("flux", FLOW(), "QwenImageTransformer2DModel"),
    ("lumina", FLOW(), "Lumina2Transformer2DModel"),
    ("lumina", FLOW(), "ZImageTransformer2DModel"),
    ("hidream", FLOW(), "HiDreamImageTransformer2DModel"),
    ("nucleus", FLOW(), "NucleusMoEImageTransformer2DModel"),
    ("sana", FLOW(), {"_class_name": "SanaTransformer2DModel", "timestep_scale": 1.0}),
    ("flux", FLOW(), {"_class_name": "SanaTransformer2DModel", "timestep_scale": 0.001}),
    ("sana", diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), "SanaTransformer2DModel"),
    ("mochi", FLOW(invert_sigmas=True), "MochiTransformer3DModel"),
    (
        "svd",
        diffusers.EulerDiscreteScheduler(
            prediction_type="v_prediction", timestep_type="continuous", sigma_min=0.002, sigma_max=700.0, use_karras_sigmas=True
        ),
        "UNetSpatioTemporalConditionModel",
    ),
    ("edm", diffusers.EDMEulerScheduler(), "UNet2DConditionModel"),
    ("consistency", diffusers.CMStochasticIterativeScheduler(), "UNet2DModel"),
    ("sd3", FLOW(), {"_class_name": "UNet2DConditionModel", "in_channels": 4, "out_channels": 4}),
]


@pytest.mark.parametrize(("name", "scheduler", "model"), REPOSITORIES, ids=lambda v: v if isinstance(v, str) else None)
def test_a_repository_says_which_it_is(name, scheduler, model):
    config = {**scheduler.config, "_class_name": type(scheduler).__name__}
    found = Parameterization.from_config(config, model=model)
    learned = {"variance": "learned_range"} if found.learned_variance else {"variance": None}
    assert found.with_(**learned) == Parameterization.named(name)


def test_a_network_itself_and_its_class_may_be_given():
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=2, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    assert Parameterization.from_config(diffusers.DDPMScheduler().config, model=unet).variance == "learned_range"
    assert Parameterization.from_config(FLOW().config, model=diffusers.FluxTransformer2DModel).time_input == "t"


def test_every_model_class_exists():
    for convention in CONVENTIONS.values():
        for model in convention.models:
            assert isinstance(getattr(diffusers, model), type)


def test_what_was_said_stays():
    config = {**FLOW().config, "parameterization": {"time_input": "999 t"}}
    assert Parameterization.from_config(config, model="FluxTransformer2DModel").time_input == "999 t"
    assert Parameterization.from_config(FLOW().config, model="Lumina2Transformer2DModel", sign=1).sign == 1
    unknown = Parameterization.from_config(FLOW().config, model="MyTransformer", time_input="1 - t", sign=-1)
    assert unknown == Parameterization.named("sit")


@pytest.mark.parametrize(
    ("scheduler", "model", "message"),
    [
        (FLOW(), "MyTransformer", "not known what MyTransformer is given for the time"),
        (diffusers.DDIMScheduler(), "FluxTransformer2DModel", "velocity on the linear path, but the scheduler config describes"),
        (FLOW(), "CosmosTransformer3DModel", "preconditions on the linear path"),
        (FLOW(), {"_class_name": "SanaTransformer2DModel", "timestep_scale": 0.0015}, "not a whole number"),
        (FLOW(), {"in_channels": 4}, "no '_class_name'"),
    ],
)
def test_what_does_not_say_enough_is_refused(scheduler, model, message):
    with pytest.raises(ValueError, match=message):
        Parameterization.from_config(scheduler.config, model=model)


def test_a_model_that_is_none():
    with pytest.raises(TypeError, match="model is a int"):
        Parameterization.from_config(FLOW().config, model=3)
