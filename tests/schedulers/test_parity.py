"""Beside diffusers: one config, one deterministic toy network, one start; trajectories within 1e-5 of the sample's scale (fp32)."""

import inspect
import math

import pytest
import torch
from diffusers import schedulers as D

from gen_pipelines.schedulers import (
    ConsistencyScheduler,
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralScheduler,
    EulerScheduler,
    FlowMatchEulerScheduler,
    FlowMatchHeunScheduler,
    HeunScheduler,
    UniPCScheduler,
)  # fmt: skip

pytestmark = [
    pytest.mark.parity,
    # diffusers' Euler turns tensors to numpy arrays in a way that numpy 2 warns of
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
START = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
MIX = 0.06 * torch.randn(4, 4, generator=torch.Generator().manual_seed(1))


def toy(x, t):
    """Depends on its input, on the time, and mixes channels."""
    return torch.einsum("oc,bchw->bohw", MIX, x) + 0.8 * torch.tanh(x) + 0.1 * math.cos(float(t) / 300)


def run(scheduler, steps, start, network=toy, **kwargs):
    """(states, their levels' sigma): one list entry after each step, as the scheduler gives them."""
    if "generator" in inspect.signature(scheduler.step).parameters:
        kwargs["generator"] = torch.Generator().manual_seed(2)
    scheduler.set_timesteps(steps)
    x, states = start, []
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(scaled, t), t, x, return_dict=False, **kwargs)[0]
        states.append(x)
    return states


def assert_same(theirs, ours, tolerance=1e-5):
    assert len(theirs) == len(ours)
    worst = max(float((a - b).abs().max()) / max(1.0, float(a.abs().max())) for a, b in zip(theirs, ours, strict=True))
    assert worst < tolerance


def in_vp(states, sigmas):
    """States in sigma coordinates, as variance-preserving ones: divided by alpha on both sides means times alpha here."""
    return [x / math.sqrt(1 + float(s) ** 2) for x, s in zip(states, sigmas, strict=True)]


BETAS = [{}, SD, {"beta_schedule": "squaredcos_cap_v2"}]
PREDICTIONS = ["epsilon", "sample", "v_prediction"]


@pytest.mark.parametrize("betas", BETAS, ids=["linear", "sd", "cosine"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("clip", [True, False])
class TestDDIMAndDDPM:
    @pytest.mark.parametrize("eta", [0.0, 0.7])
    @pytest.mark.parametrize("extra", [{}, {"steps_offset": 1, "set_alpha_to_one": False}])
    def test_ddim(self, betas, prediction, clip, eta, extra):
        theirs = D.DDIMScheduler(**betas, prediction_type=prediction, clip_sample=clip, **extra)
        ours = DDIMScheduler.from_config(theirs.config)
        assert_same(run(theirs, 20, START, eta=eta), run(ours, 20, START, eta=eta))

    @pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large", "learned_range"])
    def test_ddpm(self, betas, prediction, clip, variance):
        theirs = D.DDPMScheduler(**betas, prediction_type=prediction, clip_sample=clip, variance_type=variance)
        ours = DDPMScheduler.from_config(theirs.config)
        network = toy
        if variance == "learned_range":
            network = lambda x, t: torch.cat([toy(x, t), torch.tanh(2 * x)], 1)
        assert_same(run(theirs, 20, START, network), run(ours, 20, START, network))


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_ddpm_on_other_grids(spacing):
    theirs = D.DDPMScheduler(timestep_spacing=spacing, clip_sample=False)
    assert_same(run(theirs, 30, START), run(DDPMScheduler.from_config(theirs.config), 30, START))


def test_ddim_use_clipped_model_output_and_variance_noise():
    theirs = D.DDIMScheduler()
    ours = DDIMScheduler.from_config(theirs.config)
    assert_same(run(theirs, 10, START, use_clipped_model_output=True), run(ours, 10, START, use_clipped_model_output=True))
    for s in (theirs, ours):
        s.set_timesteps(10)
    t, noise = ours.timesteps[3], torch.randn(START.shape, generator=torch.Generator().manual_seed(5))
    a = theirs.step(toy(START, t), int(t), START, eta=1.0, variance_noise=noise).prev_sample
    b = ours.step(toy(START, t), t, START, eta=1.0, variance_noise=noise).prev_sample
    assert_same([a], [b])


def test_dynamic_thresholding():
    theirs = D.DDIMScheduler(thresholding=True, sample_max_value=1.3, dynamic_thresholding_ratio=0.9)
    assert_same(run(theirs, 10, START), run(DDIMScheduler.from_config(theirs.config), 10, START))


@pytest.mark.parametrize("betas", BETAS[:2], ids=["linear", "sd"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    "grid",
    [
        {"timestep_spacing": "linspace"},
        {"timestep_spacing": "leading", "steps_offset": 1},
        {"timestep_spacing": "trailing"},
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True, "final_sigmas_type": "sigma_min"},
        {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 10.0},
    ],
    ids=lambda g: "-".join(map(str, g.values())),
)
def test_euler(betas, prediction, grid):
    """From one given start, compared after dividing by alpha (diffusers' state is in sigma coordinates)."""
    theirs = D.EulerDiscreteScheduler(**betas, prediction_type=prediction, **grid)
    ours = EulerScheduler.from_config(theirs.config)
    theirs.set_timesteps(20)
    start = START * float(theirs.init_noise_sigma)
    first, *sigmas = theirs.sigmas.tolist()
    assert_same(in_vp(run(theirs, 20, start), sigmas), run(ours, 20, in_vp([start], [first])[0]))
    torch.testing.assert_close(ours.timesteps.to(theirs.timesteps), theirs.timesteps, rtol=1e-5, atol=1e-4)  # fp32 tables there


def test_euler_on_cosine_betas_differs_by_diffusers_rounding_only():
    """Its sigma starts at 20291, and diffusers subtracts fp32 numbers of that size: 1e-3 of the sample is its rounding (ours: 1e-6)."""
    theirs = D.EulerDiscreteScheduler(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing", prediction_type="v_prediction")
    ours = EulerScheduler.from_config(theirs.config)
    theirs.set_timesteps(20)
    start = START * float(theirs.init_noise_sigma)
    first, *sigmas = theirs.sigmas.tolist()
    a, b = in_vp(run(theirs, 20, start), sigmas), run(ours, 20, in_vp([start], [first])[0])
    assert_same(a, b, 1e-3)
    exact = run(EulerScheduler.from_config(theirs.config), 20, in_vp([start.double()], [first])[0], lambda x, t: toy(x.float(), t).double())
    assert_same(exact, b, 1e-5)


@pytest.mark.parametrize(
    "grid",
    [
        {},
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"shift_terminal": 0.1},
        {"use_dynamic_shifting": True},
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    ],
    ids=lambda g: "-".join(map(str, g)) or "plain",
)
def test_flow_match_euler(grid, monkeypatch):
    theirs = D.FlowMatchEulerDiscreteScheduler(**grid)
    ours = FlowMatchEulerScheduler.from_config(theirs.config)
    for s in (theirs, ours):
        original = s.set_timesteps
        monkeypatch.setattr(s, "set_timesteps", lambda n, original=original: original(n, mu=1.1), raising=False)
    assert_same(run(theirs, 20, START), run(ours, 20, START))


def test_flow_match_euler_with_explicit_sigmas_is_shifted_as_in_diffusers():
    theirs = D.FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = FlowMatchEulerScheduler.from_config(theirs.config)
    sigmas = torch.linspace(1, 0.05, 20).tolist()
    for s in (theirs, ours):
        s.set_timesteps(sigmas=sigmas)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas)


def test_flow_match_stochastic():
    theirs = D.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    assert_same(run(theirs, 10, START)[:-1], run(FlowMatchEulerScheduler.from_config(theirs.config), 10, START)[:-1])


@pytest.mark.parametrize("churn", [{}, {"s_churn": 20.0, "s_noise": 1.0}])
def test_flow_match_heun(churn):
    """With churn diffusers raises the state before a step, but tells the network the time from before; and raises it again for the second
    stage. Ours raises once, at the end of the step before (Karras et al. 2022, algorithm 2)."""
    theirs = D.FlowMatchHeunDiscreteScheduler()
    ours = FlowMatchHeunScheduler.from_config(theirs.config, **churn)
    a, b = run(theirs, 20, START, **churn), run(ours, 20, START)
    if not churn:
        assert_same(a, b)
        torch.testing.assert_close(ours.timesteps, theirs.timesteps)
    else:
        assert float((a[-1] - b[-1]).abs().max()) > 1e-3


class Explicit:
    """One of ours on the nodes of another's grid."""

    def __init__(self, ours, sigmas):
        self.ours, self.sigmas = ours, [*sigmas[:-1], 0.0]
        self.step, self.scale_model_input = ours.step, ours.scale_model_input

    def set_timesteps(self, steps):
        self.ours.set_timesteps(sigmas=self.sigmas)
        self.timesteps = self.ours.timesteps


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_consistency_model(steps, clip):
    """On diffusers' nodes: it takes them from the 40 of the distillation, ours divide the whole range evenly (in sigma^(1/7))."""
    theirs = D.CMStochasticIterativeScheduler(clip_denoised=clip)
    theirs.set_timesteps(steps)
    ours = ConsistencyScheduler.from_config(theirs.config)
    a = run(theirs, steps, 80 * START)
    assert_same(a, run(Explicit(ours, theirs.sigmas.tolist()), steps, 80 * START))
    torch.testing.assert_close(ours.timesteps.double(), theirs.timesteps.double(), rtol=1e-5, atol=1e-4)
    ours.set_timesteps(10)
    edges = ours.sigmas[:-1].double() ** (1 / 7)
    torch.testing.assert_close(edges.diff(), edges.diff()[:1].expand(9), rtol=1e-4, atol=0.0)


def test_edm_and_svd():
    svd = D.EulerDiscreteScheduler(
        timestep_type="continuous", prediction_type="v_prediction", sigma_min=0.002, sigma_max=700.0, use_karras_sigmas=True
    )
    for theirs, scale in ((D.EDMEulerScheduler(), 80.0), (svd, 700.0)):
        ours = EulerScheduler.from_config(theirs.config)
        assert_same(run(theirs, 20, START * scale), run(ours, 20, START * scale))
        assert ours.init_noise_sigma == pytest.approx(scale, rel=1e-6)


def seeded(build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval()


@pytest.fixture(scope="module")
def unet():
    from diffusers import UNet2DModel

    unet = seeded(
        lambda: UNet2DModel(
            sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 16), layers_per_block=1, norm_num_groups=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
    )  # fmt: skip
    return torch.no_grad()(lambda x, t: unet(x, t).sample)


@pytest.fixture(scope="module")
def transformer():
    from diffusers import SD3Transformer2DModel

    transformer = seeded(
        lambda: SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=8, pos_embed_max_size=8,
        )
    )  # fmt: skip
    text = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(4))
    return torch.no_grad()(
        lambda x, t: transformer(x, encoder_hidden_states=text, pooled_projections=text[:, 0, :8], timestep=t.expand(2)).sample
    )


class TestRealNetworks:
    """The same with networks of diffusers' classes, small and untrained: a U-Net in pixels, and the transformer of Stable Diffusion 3."""

    @pytest.mark.parametrize(
        ("ours", "theirs", "options"),
        [
            (DDPMScheduler, "DDPMScheduler", {}),
            (DDIMScheduler, "DDIMScheduler", {"eta": 0.5}),
            (DDIMInverseScheduler, "DDIMInverseScheduler", {}),
            (DPMSolverMultistepScheduler, "DPMSolverMultistepScheduler", {}),
            (UniPCScheduler, "UniPCMultistepScheduler", {}),
        ],
    )
    def test_unet(self, unet, ours, theirs, options):
        theirs = getattr(D, theirs)(**SD)
        assert_same(run(theirs, 20, START, unet, **options), run(ours.from_config(theirs.config), 20, START, unet, **options))

    @pytest.mark.parametrize(
        ("ours", "theirs"),
        [
            (EulerScheduler, "EulerDiscreteScheduler"),
            (EulerAncestralScheduler, "EulerAncestralDiscreteScheduler"),
            (HeunScheduler, "HeunDiscreteScheduler"),
        ],
    )
    def test_unet_in_sigma(self, unet, ours, theirs):
        theirs = getattr(D, theirs)(**SD)
        theirs.set_timesteps(20)
        start, sigmas = START * float(theirs.sigmas[0]), theirs.sigmas.tolist()
        ours = ours.from_config({**theirs.config})
        a, b = in_vp(run(theirs, 20, start, unet), sigmas[1:]), run(ours, 20, in_vp([start], sigmas[:1])[0], unet)
        assert_same(a, b)

    @pytest.mark.parametrize(("rule", "theirs"), [("lcm", "LCMScheduler"), ("tcd", "TCDScheduler")])
    def test_unet_in_few_steps(self, unet, rule, theirs):
        theirs = getattr(D, theirs)()
        ours = ConsistencyScheduler.from_config(theirs.config, rule=rule)
        assert_same(run(theirs, 4, START, unet), run(ours, 4, START, unet))

    def test_unet_as_a_consistency_model(self, unet):
        theirs = D.CMStochasticIterativeScheduler()
        theirs.set_timesteps(4)
        ours = ConsistencyScheduler.from_config(theirs.config)
        assert_same(run(theirs, 4, 80 * START, unet), run(Explicit(ours, theirs.sigmas.tolist()), 4, 80 * START, unet))

    @pytest.mark.parametrize(
        ("ours", "theirs", "options"),
        [
            (FlowMatchEulerScheduler, "FlowMatchEulerDiscreteScheduler", {}),
            (FlowMatchEulerScheduler, "FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}),
            (FlowMatchHeunScheduler, "FlowMatchHeunDiscreteScheduler", {}),
        ],
    )
    def test_transformer(self, transformer, ours, theirs, options):
        theirs = getattr(D, theirs)(**options)
        assert_same(run(theirs, 20, START, transformer), run(ours.from_config(theirs.config), 20, START, transformer))


class TestWhereDiffusersIsWrong:
    """Differences that are kept on purpose, each with its reason."""

    def test_ddim_stride_on_linspace_and_trailing(self):
        """diffusers takes t - 1000 // N for the next step whatever the grid (issue #12633)."""
        for spacing, steps in (("linspace", 20), ("trailing", 30)):
            theirs = D.DDIMScheduler(timestep_spacing=spacing, clip_sample=False)
            a, b = run(theirs, steps, START), run(DDIMScheduler.from_config(theirs.config), steps, START)
            assert max(float((u - v).abs().max()) for u, v in zip(a, b, strict=True)) > 1e-3
        theirs = D.DDIMScheduler(timestep_spacing="trailing", clip_sample=False)  # 20 divides 1000: right, and equal
        assert_same(run(theirs, 20, START), run(DDIMScheduler.from_config(theirs.config), 20, START))

    def test_flow_shift_applied_twice_at_the_low_end(self):
        """issue #13243: the smallest sigma is shifted in the constructor and again in set_timesteps."""
        theirs = D.FlowMatchEulerDiscreteScheduler(shift=3.0)
        ours = FlowMatchEulerScheduler.from_config(theirs.config)
        theirs.set_timesteps(20)
        ours.set_timesteps(20)
        assert float(theirs.sigmas[-2]) == pytest.approx(0.0089, abs=1e-4)
        assert float(ours.sigmas[-2]) == pytest.approx(0.0030, abs=1e-4)
        heun = D.FlowMatchHeunDiscreteScheduler(shift=3.0)
        heun.set_timesteps(20)
        assert float(heun.sigmas[-2]) == pytest.approx(0.0089, abs=1e-4)
        ours = FlowMatchHeunScheduler.from_config(heun.config)
        ours.set_timesteps(20)
        assert float(ours.sigmas[-2]) == pytest.approx(0.0030, abs=1e-4)

    def test_euler_replaces_zero_snr_by_a_small_number(self):
        """diffusers' Euler enters pure noise as alpha^2 = 2**-24; ours has alpha = 0, as the network was trained."""
        theirs = D.EulerDiscreteScheduler(**SD, rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing")
        ours = EulerScheduler.from_config(theirs.config)
        ours.set_timesteps(10)
        theirs.set_timesteps(10)
        assert float(theirs.sigmas[0]) == pytest.approx(4096.0, rel=1e-3)
        assert float(ours.sigmas[0]) == math.inf
        start = START * float(theirs.init_noise_sigma)
        a = in_vp(run(theirs, 10, start), theirs.sigmas.tolist()[1:])
        assert_same(a, run(ours, 10, START), 1e-3)

    def test_fixed_large_adds_noise_in_the_last_step(self):
        """With steps_offset=1 or trailing spacing diffusers' DDPM ends at an index above 0 and adds beta noise to the finished picture."""
        theirs = D.DDPMScheduler(variance_type="fixed_large", steps_offset=1, clip_sample=False, prediction_type="sample")
        a, b = run(theirs, 20, START), run(DDPMScheduler.from_config(theirs.config), 20, START)
        assert_same(a[:-1], b[:-1])
        assert float((a[-1] - b[-1]).abs().max()) > 1e-3


GRIDS = [
    {"timestep_spacing": "linspace"},
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "trailing"},
    {"use_karras_sigmas": True},
]
EVERY_GRID = pytest.mark.parametrize("grid", GRIDS, ids=lambda g: "-".join(map(str, g.values())))


@pytest.mark.parametrize("betas", BETAS[:2], ids=["linear", "sd"])
class TestHigherOrder:
    @pytest.mark.parametrize("cls", [HeunScheduler, EulerAncestralScheduler])
    @pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
    @EVERY_GRID
    def test_in_sigma(self, betas, cls, prediction, grid):
        """Compared after dividing by alpha, as for Euler; the noise of the ancestral step is the same draw."""
        if cls is EulerAncestralScheduler and "use_karras_sigmas" in grid:
            pytest.skip("diffusers' EulerAncestralDiscrete has no Karras spacing")
        theirs = getattr(D, cls.__name__.replace("Scheduler", "DiscreteScheduler"))(**betas, prediction_type=prediction, **grid)
        ours = cls.from_config({**theirs.config})
        theirs.set_timesteps(12)
        start = START * float(theirs.sigmas[0])
        sigmas = theirs.sigmas.tolist()
        assert_same(in_vp(run(theirs, 12, start), sigmas[1:]), run(ours, 12, in_vp([start], sigmas[:1])[0]))
        torch.testing.assert_close(ours.timesteps.to(theirs.timesteps), theirs.timesteps, rtol=1e-5, atol=1e-4)

    @pytest.mark.filterwarnings("ignore:.*dpmsolver.*deprecated:FutureWarning")
    @pytest.mark.parametrize("prediction", PREDICTIONS)
    @EVERY_GRID
    @pytest.mark.parametrize(
        "solver",
        [
            {},
            {"solver_type": "heun"},
            {"solver_order": 1},
            {"algorithm_type": "sde-dpmsolver++"},
            {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
            {"algorithm_type": "sde-dpmsolver", "solver_type": "heun", "final_sigmas_type": "sigma_min", "euler_at_final": True},
        ],
        ids=lambda s: "-".join(map(str, s.values())) or "2m",
    )
    def test_dpm_solver(self, betas, prediction, grid, solver):
        theirs = D.DPMSolverMultistepScheduler(**betas, prediction_type=prediction, **grid, **solver)
        ours = DPMSolverMultistepScheduler.from_config(theirs.config)
        assert_same(run(theirs, 12, START), run(ours, 12, START))
        assert torch.equal(ours.timesteps, theirs.timesteps)

    @pytest.mark.parametrize("prediction", PREDICTIONS)
    @EVERY_GRID
    @pytest.mark.parametrize(
        "solver",
        [
            {},
            {"solver_type": "bh1"},
            {"solver_order": 3},
            {"predict_x0": False, "final_sigmas_type": "sigma_min"},
            {"disable_corrector": [1, 4]},
        ],
        ids=lambda s: "-".join(map(str, s.values())) or "2",
    )
    def test_unipc(self, betas, prediction, grid, solver):
        theirs = D.UniPCMultistepScheduler(**betas, prediction_type=prediction, **grid, **solver)
        ours = UniPCScheduler.from_config(theirs.config)
        tolerance = 1e-4 if "predict_x0" in solver and prediction == "sample" else 1e-5  # eps = (x - alpha x_0) / sigma: fp32 of both
        assert_same(run(theirs, 12, START), run(ours, 12, START), tolerance)
        assert torch.equal(ours.timesteps, theirs.timesteps)


def test_dpm_solver_keeps_lambda_above_a_limit():
    theirs = D.DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2", lambda_min_clipped=-5.1)
    ours = DPMSolverMultistepScheduler.from_config(theirs.config)
    assert_same(run(theirs, 20, START), run(ours, 20, START))
    assert torch.equal(ours.timesteps, theirs.timesteps)


def test_dpm_solver_of_third_order_is_of_second_order_in_diffusers():
    """Its second-derivative term has half the weight that the Taylor expansion needs; ours integrates it, and converges with order 3
    (test_order_of_convergence). Read off one step: the weight of the oldest estimate is half of ours."""
    theirs = D.DPMSolverMultistepScheduler(solver_order=3)
    theirs.set_timesteps(20)
    theirs._step_index = 10
    one, zero = torch.ones(1), torch.zeros(1)
    ours = DPMSolverMultistepScheduler.from_config(theirs.config)
    ours.set_timesteps(20)
    weights = ours._stages[10].data[2].outputs
    oldest = float(theirs.multistep_dpm_solver_third_order_update([one, zero, zero], sample=zero))
    second = float(theirs.multistep_dpm_solver_third_order_update([one, one, one], sample=zero))
    assert second == pytest.approx(sum(weights), rel=1e-4)
    assert abs(oldest - weights[2]) > 0.05 * abs(weights[2])


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("extra", [{}, {"steps_offset": 1, "set_alpha_to_one": False}, {"timestep_spacing": "trailing"}])
def test_ddim_inverse(clip, extra):
    theirs = D.DDIMInverseScheduler(**SD, clip_sample=clip, **extra)
    ours = DDIMInverseScheduler.from_config(theirs.config)
    assert_same(run(theirs, 20, START), run(ours, 20, START))
    assert torch.equal(ours.timesteps, theirs.timesteps)


@pytest.mark.parametrize("steps", [1, 4, 10])
@pytest.mark.parametrize("prediction", PREDICTIONS)
class TestConsistency:
    @pytest.mark.parametrize("extra", [{}, {"clip_sample": True}, {"timestep_scaling": 0.002, "original_inference_steps": 40}])
    def test_lcm(self, prediction, extra, steps):
        theirs = D.LCMScheduler(prediction_type=prediction, **extra)
        ours = ConsistencyScheduler.from_config(theirs.config, rule="lcm")
        assert_same(run(theirs, steps, START), run(ours, steps, START))
        assert torch.equal(ours.timesteps, theirs.timesteps)

    @pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
    def test_tcd(self, prediction, eta, steps):
        theirs = D.TCDScheduler(prediction_type=prediction)
        ours = ConsistencyScheduler.from_config(theirs.config, rule="tcd")
        assert_same(run(theirs, steps, START, eta=eta), run(ours, steps, START, eta=eta))
        assert torch.equal(ours.timesteps, theirs.timesteps)
