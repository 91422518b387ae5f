"""The bridge: every scheduler of diffusers is hosted or refused by name, right on every kind of network, and an identity on its own."""

import copy
import inspect
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import conftest
import diffusers
import numpy as np
import pytest
import torch
from analytic import GAUSSIAN, NETWORKS, sample
from torch.testing import assert_close

import gen_pipelines
from gen_pipelines import AutoPipeline, BridgedScheduler, LatentTextToImagePipeline
from gen_pipelines.processes import CosinePath, EDMPath, Parameterization
from gen_pipelines.schedulers import SCHEDULERS
from gen_pipelines.schedulers.bridge import HOSTED, REFUSED, hosting_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers hands tensors to numpy
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Should have t[ab]"),  # torchsde's Brownian tree, asked one rounding beyond its end
]

SEVEN = [name for name in NETWORKS if name != "vp_cosine_v"]
SAMPLERS = [name for name, hosting in HOSTED.items() if not hosting.consistency]
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def theirs(name):
    return getattr(diffusers, name, None) or getattr(diffusers.schedulers, name)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------------------- hosted or refused, by name


def test_every_scheduler_of_diffusers_is_hosted_or_refused():
    exported = {
        name
        for module in (diffusers, diffusers.schedulers)
        for name in dir(module)
        if name.endswith("Scheduler") and not name.startswith("Flax") and isinstance(getattr(module, name), type)
    }
    assert len(exported) > 40 and exported <= {*HOSTED, *REFUSED}
    assert not set(HOSTED) & set(REFUSED)
    for name in exported:
        if name in HOSTED:
            assert hosting_of(theirs(name)) == (name, HOSTED[name])


@pytest.mark.parametrize("name", [name for name in REFUSED if hasattr(diffusers.schedulers, name)])
def test_a_refusal_names_the_class_and_the_reason(name):
    with pytest.raises(ValueError) as error:
        hosting_of(theirs(name))
    assert name in str(error.value) and REFUSED[name] in str(error.value)


def test_a_class_of_ones_own_is_hosted_as_what_it_extends_or_named():
    class MyScheduler(diffusers.DDIMScheduler):
        pass

    assert hosting_of(MyScheduler)[0] == "DDIMScheduler"
    with pytest.raises(ValueError, match="SchedulerMixin is no scheduler that the bridge knows"):
        hosting_of(diffusers.SchedulerMixin)


# ------------------------------------------------------------------------------------------------------------------------------ the oracle


def moments(name, network, steps=100, count=2000):
    p, grid = NETWORKS[network]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of their grids leave a network's range, which is said once: see below
        scheduler = BridgedScheduler(theirs(name)(), p).bind(p, grid)
        x = sample(scheduler, GAUSSIAN.network(p), (count, 1), steps=steps)
    return float(x.mean()), float(x.std())


def check_moments(name, network):
    """2,000 draws: standard errors of 0.007 (mean) and 0.005 (std); the rest of the tolerance is discretisation at 100 steps."""
    mean, std = moments(name, network)
    assert mean == pytest.approx(GAUSSIAN.mean, abs=0.04)
    assert std == pytest.approx(GAUSSIAN.std, abs=0.05)


DIAGONAL = [
    (name, SEVEN[(3 * i + 4) % 7]) for i, name in enumerate(SAMPLERS) if HOSTED[name].between in (None, "next")
]  # the others are slow


@pytest.mark.parametrize(("name", "network"), DIAGONAL)
def test_moments_on_a_foreign_network(name, network):
    check_moments(name, network)


@pytest.mark.slow  # half a minute: 23 classes on 7 kinds of network
@pytest.mark.parametrize("network", SEVEN)
@pytest.mark.parametrize("name", SAMPLERS)
def test_moments_on_every_network(name, network):
    check_moments(name, network)


def consistent(p):
    """The ideal consistency network: every state's own data point, by the ODE."""

    def network(scaled, time):
        t = min(max(float(p.path_time(float(time))), p.path.t_min), p.path.t_max)
        level = p.path.level(t)
        x = scaled / p.input_scale(level)
        x_0 = GAUSSIAN.ode(x, level, p.path.level(p.path.t_min))
        return p.target(x_0, (x - level.alpha * x_0) / level.sigma, t) if t > p.path.t_min else x_0

    return network


@pytest.mark.parametrize("name", [name for name, hosting in HOSTED.items() if hosting.consistency])
def test_consistency_rules_on_a_consistency_network(name):
    """Exact for the ideal network whatever the number of steps; 20,000 draws: standard errors of 0.002 and 0.0015.

    TCD with eta < 1 goes part of each way along the network's own eps, which is exact for trajectory functions only; at eta = 1 it is LCM.
    """
    p = Parameterization(EDMPath(), "consistency", sigma_data=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        scheduler = BridgedScheduler(theirs(name)(), p)
        x = sample(scheduler, consistent(p), (20_000, 1), steps=5, **({"eta": 1.0} if name == "TCDScheduler" else {}))
    assert float(x.mean()) == pytest.approx(GAUSSIAN.mean, abs=0.02)
    assert float(x.std()) == pytest.approx(GAUSSIAN.std, abs=0.02)


def test_a_consistency_rule_on_another_network_warns():
    with pytest.warns(UserWarning, match="LCMScheduler is a rule for consistency networks"):
        BridgedScheduler(diffusers.LCMScheduler(), NETWORKS["sd_eps"][0])


# -------------------------------------------------------------------------------------------------------------------------- the identity

NATIVE = {
    "ddim": lambda: diffusers.DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    "ddim_clip": lambda: diffusers.DDIMScheduler(),
    "ddim_zero_snr_v": lambda: diffusers.DDIMScheduler(
        **SD, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False
    ),
    "ddim_threshold": lambda: diffusers.DDIMScheduler(clip_sample=False, thresholding=True, sample_max_value=1.5),
    "ddpm": lambda: diffusers.DDPMScheduler(),
    "ddpm_learned": lambda: diffusers.DDPMScheduler(variance_type="learned_range"),
    "ddpm_x_0": lambda: diffusers.DDPMScheduler(prediction_type="sample", beta_schedule="squaredcos_cap_v2"),
    "pndm": lambda: diffusers.PNDMScheduler(**SD, skip_prk_steps=True, steps_offset=1),
    "pndm_prk": lambda: diffusers.PNDMScheduler(),
    "euler": lambda: diffusers.EulerDiscreteScheduler(**SD),
    "euler_leading": lambda: diffusers.EulerDiscreteScheduler(**SD, timestep_spacing="leading", steps_offset=1),
    "euler_karras_v": lambda: diffusers.EulerDiscreteScheduler(**SD, use_karras_sigmas=True, prediction_type="v_prediction"),
    "euler_svd": lambda: diffusers.EulerDiscreteScheduler(
        **SD, prediction_type="v_prediction", timestep_type="continuous", use_karras_sigmas=True, sigma_min=0.002, sigma_max=700.0
    ),
    "euler_ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(**SD),
    "heun": lambda: diffusers.HeunDiscreteScheduler(),
    "lms": lambda: diffusers.LMSDiscreteScheduler(**SD),
    "kdpm2": lambda: diffusers.KDPM2DiscreteScheduler(),
    "kdpm2_ancestral": lambda: diffusers.KDPM2AncestralDiscreteScheduler(),
    "dpm_sde": lambda: diffusers.DPMSolverSDEScheduler(noise_sampler_seed=3),
    "dpm_karras": lambda: diffusers.DPMSolverMultistepScheduler(**SD, use_karras_sigmas=True),
    "dpm_sde_multistep": lambda: diffusers.DPMSolverMultistepScheduler(**SD, algorithm_type="sde-dpmsolver++", solver_order=3),
    "dpm_flow": lambda: diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    "dpm_singlestep": lambda: diffusers.DPMSolverSinglestepScheduler(**SD),
    "unipc": lambda: diffusers.UniPCMultistepScheduler(**SD),
    "unipc_flow": lambda: diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    "deis": lambda: diffusers.DEISMultistepScheduler(**SD),
    "sa": lambda: diffusers.SASolverScheduler(**SD),
    "ipndm": lambda: diffusers.IPNDMScheduler(),
    "edm_euler": lambda: diffusers.EDMEulerScheduler(),
    "edm_dpm": lambda: diffusers.EDMDPMSolverMultistepScheduler(sigma_max=60.0, prediction_type="v_prediction"),
    "lcm": lambda: diffusers.LCMScheduler(),
    "tcd": lambda: diffusers.TCDScheduler(),
    "cm": lambda: diffusers.CMStochasticIterativeScheduler(),
    "flow": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow_stochastic": lambda: diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    "flow_heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(shift=2.0),
    "flow_lcm": lambda: diffusers.FlowMatchLCMScheduler(),
    "ltx": lambda: diffusers.LTXEulerAncestralRFScheduler(),
}


def any_network(x, t, learned=False):
    """Not a good network: the identity must hold for any."""
    out = torch.tanh(x.flip(-1)) * math_cos(float(t)) + 0.1 * x
    return torch.cat([out, torch.tanh(out)], 1) if learned else out


def math_cos(t):
    return float(np.cos(0.003 * t))


@pytest.mark.parametrize("name", NATIVE)
def test_on_its_own_network_it_is_the_scheduler_itself(name):
    """float32; where the state is in other coordinates it crosses over and back at every step, which costs a few roundings."""
    raw = NATIVE[name]()
    p = Parameterization(CosinePath(), "v_prediction", time_input="t") if name == "ipndm" else None
    bridged = BridgedScheduler(NATIVE[name](), p)
    learned = bridged.parameterization.learned_variance
    raw.set_timesteps(8)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*of diffusers goes .* training steps")  # 8 does not divide 1000, with them or with us
        warnings.filterwarnings("ignore", ".*outside the range")
        bridged.set_timesteps(8)
    assert_close(bridged.timesteps.double(), raw.timesteps.double(), rtol=3e-6, atol=1e-6)
    noise = torch.randn(2, 3, 4, 4, generator=seeded(1))
    x, y = noise * float(getattr(raw, "init_noise_sigma", 1.0)), noise * bridged.init_noise_sigma
    a, b = seeded(2), seeded(2)
    takes = {"generator": a} if "generator" in inspect.signature(raw.step).parameters else {}
    same_coordinates = all(c.to_ours == 1.0 for c in bridged._crossings)
    for i, t in enumerate(raw.timesteps):
        scaled = raw.scale_model_input(x, t) if hasattr(raw, "scale_model_input") else x
        x = raw.step(any_network(scaled, t, learned), t, x, **takes, return_dict=False)[0]
        t = bridged.timesteps[i]
        y = bridged.step(any_network(bridged.scale_model_input(y, t), t, learned), t, y, generator=b).prev_sample
        expected = x * bridged._crossings[i + 1].to_ours
        scale = float(expected.abs().max())
        if same_coordinates and bridged.parameterization.sigma_data is None:
            assert torch.equal(y, expected)
        assert_close(y, expected, rtol=0, atol=2e-5 * scale if "karras" in name or "kdpm" in name else 5e-6 * scale)


def test_which_are_bit_for_bit():
    for name in ("ddim", "ddpm", "pndm", "dpm_karras", "unipc", "deis", "sa", "flow", "flow_heun", "unipc_flow"):
        bridged = BridgedScheduler(NATIVE[name]())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            bridged.set_timesteps(8)
        assert all(c.to_ours == 1.0 and (c.from_x, c.from_output) == (0.0, 1.0) for c in bridged._crossings), name


# ------------------------------------------------------------------------------------------------------------------ copies, grids, errors


def test_the_hosted_scheduler_is_never_changed():
    hosted = diffusers.UniPCMultistepScheduler()
    config, state = dict(hosted.config), {k: copy.copy(v) for k, v in vars(hosted).items() if k != "_internal_dict"}
    p, grid = NETWORKS["sd3_flow"]
    first = BridgedScheduler(hosted, NETWORKS["ddpm_eps"][0])
    before = dict(first.config)
    second = first.bind(p, grid)
    sample(second, GAUSSIAN.network(p), (4, 1), steps=4)
    assert dict(hosted.config) == config
    for key, value in state.items():
        assert torch.equal(getattr(hosted, key), value) if isinstance(value, torch.Tensor) else getattr(hosted, key) == value, key
    assert second is not first and dict(first.config) == before and first._stages is None
    assert first.parameterization == NETWORKS["ddpm_eps"][0] and second.parameterization == p
    assert second.config["flow_shift"] == 3.0 and hosted.config.flow_shift == 1.0


def test_a_schedule_goes_with_its_network():
    sd, zero_snr, flow = (NETWORKS[name][0] for name in ("sd_eps", "zero_snr_v", "sd3_flow"))
    scheduler = BridgedScheduler(diffusers.DDIMScheduler(**SD, clip_sample=False, timestep_spacing="trailing"))
    assert scheduler.parameterization == sd
    for p in (zero_snr, flow):  # the network is corrected, or the scheduler lent: it starts where that network does
        bound = scheduler.bind(p)
        bound.set_timesteps(10)
        assert bound.parameterization == p and float(bound.timesteps[0]) == pytest.approx(999 if p is zero_snr else 1000, abs=0.5)
        assert bound._crossings[0].theirs.alpha == pytest.approx(0.0, abs=1e-3)
    kept = BridgedScheduler(diffusers.DDIMScheduler(**SD), flow)  # a schedule of one's own as the grid
    kept.set_timesteps(10)
    assert float(kept.sigmas[0]) < 0.92


def test_the_networks_grid_comes_along_and_arguments_win():
    p, grid = NETWORKS["sd_eps"]
    assert BridgedScheduler(diffusers.UniPCMultistepScheduler(), p).bind(p, grid).config["timestep_spacing"] == "leading"
    told = diffusers.UniPCMultistepScheduler(timestep_spacing="trailing")
    assert BridgedScheduler(told, p).bind(p, grid).config["timestep_spacing"] == "trailing"


def test_a_table_lies_along_the_networks_own_range():
    """On a flow DDIM's index counts 1/1000 ... 1 of the time, shifted; an SD network is never asked for more noise than it saw."""
    p, grid = NETWORKS["sd3_flow"]
    scheduler = BridgedScheduler(diffusers.DDIMScheduler(timestep_spacing="trailing"), p).bind(p, grid)
    scheduler.set_timesteps(10)
    t = torch.linspace(1, 0.1, 10, dtype=torch.float64)
    assert_close(scheduler.timesteps.double()[1:], (1000 * 3 * t / (1 + 2 * t))[1:], rtol=1e-4, atol=0.0)
    sd = BridgedScheduler(diffusers.EDMEulerScheduler(), NETWORKS["sd_eps"][0])
    sd.set_timesteps(10)  # would warn
    assert float(sd.sigmas[0]) == pytest.approx(14.61, abs=0.01)


def test_outside_the_trained_range_is_said_once():
    scheduler = BridgedScheduler(diffusers.FlowMatchEulerDiscreteScheduler(), NETWORKS["sd_eps"][0])
    with pytest.warns(UserWarning, match=r"of 20 nodes of FlowMatchEulerDiscreteScheduler's grid are outside"):
        scheduler.set_timesteps(20)
    assert float(scheduler.timesteps.max()) == 999


def test_a_stride_that_diffusers_gets_wrong_is_said():
    scheduler = BridgedScheduler(diffusers.DDIMScheduler(timestep_spacing="linspace"))
    with pytest.warns(UserWarning, match="12633"):
        scheduler.set_timesteps(10)


@pytest.mark.parametrize("limits", [{"clip_sample": True, "clip_sample_range": 0.4}, {"thresholding": True}])
@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_the_networks_limits_hold_in_every_class(name, limits):
    p = NETWORKS["ddpm_eps"][0].with_(**limits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        x = sample(BridgedScheduler(theirs(name)(), p), lambda x, t: -2 * x, (4, 2, 4), steps=4)
    assert float(x.abs().max()) <= limits.get("clip_sample_range", 1.0) + 1e-5


def test_a_loop_may_start_again_or_part_of_the_way():
    p, grid = NETWORKS["sd3_flow"]
    scheduler = BridgedScheduler(diffusers.DPMSolverMultistepScheduler(), p).bind(p, grid)
    network, x = GAUSSIAN.network(p), torch.randn(8, 1, generator=seeded())
    first = sample(scheduler, network, steps=12, x=x)
    assert torch.equal(sample(scheduler, network, steps=None, x=x), first)  # no history is left over
    twin = copy.deepcopy(scheduler)
    assert torch.equal(sample(twin, network, steps=None, x=x), first)
    scheduler.set_timesteps(50)
    scheduler.set_begin_index(25)
    data, t = GAUSSIAN.mean + GAUSSIAN.std * torch.randn(4000, 1, generator=seeded(1)), scheduler.timesteps[25]
    y = scheduler.add_noise(data, torch.randn(4000, 1, generator=seeded(2)), t[None])
    for t in scheduler.timesteps[25:]:
        y = scheduler.step(network(y, t), t, y).prev_sample
    assert float(y.mean()) == pytest.approx(GAUSSIAN.mean, abs=0.03) and float(y.std()) == pytest.approx(GAUSSIAN.std, abs=0.03)


def test_bad_calls_are_answered():
    p, _ = NETWORKS["sd3_flow"]
    x = torch.zeros(1, 1)
    pndm = BridgedScheduler(diffusers.PNDMScheduler(skip_prk_steps=True), p)
    with pytest.raises(ValueError, match="set_timesteps"):
        pndm.step(x, 1.0, x)
    pndm.set_timesteps(10)
    with pytest.raises(ValueError, match="PNDMScheduler.*cannot start at position 3"):
        pndm.step(x, pndm.timesteps[3], x)
    with pytest.raises(ValueError, match="eta = 0.5, but PNDMScheduler"):
        pndm.step(x, pndm.timesteps[0], x, eta=0.5)
    with pytest.raises(ValueError, match="cannot follow explicit timesteps"):
        pndm.set_timesteps(timesteps=[900.0, 500.0])
    with pytest.raises(ValueError, match="exactly one"):
        pndm.set_timesteps(10, sigmas=[1.0, 0.0])
    with pytest.raises(TypeError, match="hosted already"):
        BridgedScheduler(pndm)
    with pytest.raises(ValueError, match="names 'Nothing'"):
        BridgedScheduler.from_config({"_class_name": "Nothing"})


def test_explicit_times_are_what_the_network_sees():
    p, grid = NETWORKS["sd3_flow"]
    scheduler = BridgedScheduler(diffusers.FlowMatchEulerDiscreteScheduler(), p).bind(p, grid)
    scheduler.set_timesteps(timesteps=[999.0, 500.0, 100.0])
    assert scheduler.timesteps.tolist() == pytest.approx([999.0, 500.0, 100.0])
    assert scheduler.sigmas.tolist() == pytest.approx([0.999, 0.5, 0.1, 0.0])


def test_a_brownian_tree_is_seeded_by_the_generator():
    p, _ = NETWORKS["ddpm_eps"]
    scheduler = BridgedScheduler(diffusers.DPMSolverSDEScheduler(), p)
    a, b, c = (sample(scheduler, GAUSSIAN.network(p), steps=4, x=torch.ones(2, 3), generator=seeded(s)) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


# --------------------------------------------------------------------------------------------------------------------------- in pipelines


def make_pipeline(scheduler, **denoiser):
    pipe = LatentTextToImagePipeline(conftest.make_vae(), conftest.make_text_encoder(), conftest.make_tokenizer(), scheduler, **denoiser)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, steps=4, **options):
    pipe.set_progress_bar_config(disable=True)
    return pipe("a red apple", num_inference_steps=steps, generator=seeded(), output_type="np", **options).images


FEW = ["DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler", "EDMEulerScheduler"]


@pytest.mark.parametrize("name", FEW)
def test_diffusers_idiom_on_a_flow_is_right(name, tmp_path):
    """The swap that is silently wrong in diffusers: the pipeline's bridge samples the data, and means the same when it is loaded again."""
    pipe = make_pipeline(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), transformer=conftest.make_transformer())
    network = pipe.parameterization
    pipe.scheduler = theirs(name).from_config(pipe.scheduler.config)
    assert pipe.scheduler.hosted_class is theirs(name) and pipe.parameterization == network == NETWORKS["sd3_flow"][0]
    pipe.save_pretrained(tmp_path / "p")
    assert json.loads((tmp_path / "p" / "model_index.json").read_text())["scheduler"] == ["diffusers", name]
    assert theirs(name).from_pretrained(tmp_path / "p" / "scheduler")  # diffusers reads what we write
    again = AutoPipeline.from_pretrained(tmp_path / "p")
    assert again.parameterization == network and dict(again.scheduler.config) == dict(pipe.scheduler.config)
    assert np.array_equal(draw(again), draw(pipe))
    x = sample(again.scheduler, GAUSSIAN.network(network), (2000, 1), steps=100)
    assert float(x.mean()) == pytest.approx(GAUSSIAN.mean, abs=0.04) and float(x.std()) == pytest.approx(GAUSSIAN.std, abs=0.05)
    again.save_pretrained(tmp_path / "q")
    assert (tmp_path / "p/scheduler/scheduler_config.json").read_bytes() == (tmp_path / "q/scheduler/scheduler_config.json").read_bytes()


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", [*FEW, "FlowMatchEulerDiscreteScheduler"])
def test_the_config_says_what_the_network_is(name, network, tmp_path):
    """In memory and reloaded, for ours, for the bridge and for the class itself hosted anew."""
    p, grid = NETWORKS[network]
    scheduler = BridgedScheduler(theirs(name)(), p).bind(p, grid)
    assert Parameterization.from_config(scheduler.config) == p.with_(variance=scheduler.config.get("variance_type"))
    scheduler.save_pretrained(tmp_path)
    for again in (BridgedScheduler.from_pretrained(tmp_path), BridgedScheduler(theirs(name).from_pretrained(tmp_path))):
        assert again.parameterization.with_(variance=None) == p and dict(again.config) == dict(scheduler.config)
    assert SCHEDULERS["ddim"].from_config(scheduler.config).parameterization.with_(variance=None) == p


def test_a_stable_diffusion_folder_draws_as_in_diffusers(sd_folder):
    theirs_ = diffusers.StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None, feature_extractor=None, image_encoder=None)
    ours = AutoPipeline.from_pretrained(sd_folder)
    for cls in (diffusers.DDIMScheduler, diffusers.EulerDiscreteScheduler, diffusers.UniPCMultistepScheduler):
        theirs_.scheduler = cls.from_config(theirs_.scheduler.config)
        ours.scheduler = cls.from_config(ours.scheduler.config)
        assert np.abs(draw(ours) - draw(theirs_)).max() < 1e-4, cls


# ----------------------------------------------------------------------------------------------------- ours inside diffusers' own pipeline


def diffusers_pipeline(scheduler):
    return diffusers.StableDiffusionPipeline(
        vae=conftest.make_vae(), text_encoder=conftest.make_text_encoder(), tokenizer=conftest.make_tokenizer(), unet=conftest.make_unet(),
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def stable_diffusion():
    return diffusers_pipeline(diffusers.DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=False, steps_offset=1))


@pytest.mark.filterwarnings("ignore::UserWarning")  # a consistency rule on this network says so
@pytest.mark.parametrize("cls", SCHEDULERS.values(), ids=SCHEDULERS)
def test_ours_in_diffusers_pipeline_draws_the_same_picture(cls, stable_diffusion):
    """1e-4: the two pipelines batch the guidance differently."""
    native = stable_diffusion.scheduler
    ours = make_pipeline(cls.from_config(native.config), unet=conftest.make_unet())
    try:
        stable_diffusion.scheduler = cls.from_config(native.config)
        options = {"guidance_scale": 3.0}
        assert np.abs(draw(ours, **options) - draw(stable_diffusion, **options)).max() < 1e-4
    finally:
        stable_diffusion.scheduler = native


@pytest.mark.slow  # starts a process
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_ours_in_diffusers_pipeline_survive_saving_in_a_fresh_process(stable_diffusion, tmp_path):
    """diffusers finds a third-party component only in an imported library: `import gen_pipelines` alone must do."""
    native = stable_diffusion.scheduler
    new = {name: cls.from_config(native.config) for name, cls in SCHEDULERS.items()}
    new["bridged"] = BridgedScheduler(diffusers.UniPCMultistepScheduler.from_config(native.config))
    for name, scheduler in new.items():
        stable_diffusion.scheduler = scheduler
        np.save(tmp_path / f"{name}.npy", draw(stable_diffusion))
        stable_diffusion.save_pretrained(tmp_path / name)
    stable_diffusion.scheduler = native
    code = (
        "import sys, pathlib, gen_pipelines; assert 'torch' not in sys.modules\n"
        "import numpy as np, torch\n"
        "from diffusers import StableDiffusionPipeline\n"
        "for folder in (p for p in pathlib.Path(sys.argv[1]).iterdir() if p.is_dir()):\n"
        "    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, feature_extractor=None, image_encoder=None)\n"
        "    pipe.set_progress_bar_config(disable=True)\n"
        "    assert isinstance(pipe.scheduler, (gen_pipelines.BridgedScheduler, *gen_pipelines.SCHEDULERS.values())), folder\n"
        "    g = torch.Generator().manual_seed(0)\n"
        "    image = pipe('a red apple', num_inference_steps=4, generator=g, output_type='np').images\n"
        "    assert np.abs(image - np.load(str(folder) + '.npy')).max() < 1e-6, folder\n"
        "    print('same', folder.name)\n"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(gen_pipelines.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("same") == len(new)
