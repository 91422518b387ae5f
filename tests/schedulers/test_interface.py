"""What pipelines rely on: the loop, positions, configs in memory and on disk, binding, errors. Every scheduler of the registry."""

import copy
import inspect
import json
import subprocess
import sys
import tracemalloc

import pytest
import torch
from analytic import GAUSSIAN, NETWORKS, sample
from diffusers import schedulers as D
from torch.testing import assert_close

import gen_pipelines
from gen_pipelines.pipelines.hosting import host_scheduler
from gen_pipelines.processes import DiscreteVPPath, LinearPath, Parameterization, SubVPPath
from gen_pipelines.processes.config import DIFFUSERS_KEYS, OUR_KEYS
from gen_pipelines.schedulers import SCHEDULERS

# most networks here are not consistency networks, and the rule says so
pytestmark = pytest.mark.filterwarnings("ignore:ConsistencyScheduler on a network that predicts:UserWarning")
EVERY = pytest.mark.parametrize("cls", SCHEDULERS.values(), ids=SCHEDULERS)
EVERY_NETWORK = pytest.mark.parametrize("network", NETWORKS)
FLOW = NETWORKS["sd3_flow"][0]


def bound(cls, network="ddpm_eps"):
    p, grid = NETWORKS[network]
    return cls().bind(p, grid)


def states(scheduler, network, x, generator=None):
    out = []
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x, generator=generator).prev_sample
        out.append(x)
    return out


@pytest.mark.parametrize("cls", [*SCHEDULERS.values(), D.DDIMScheduler, D.DPMSolverMultistepScheduler], ids=lambda cls: cls.__module__)
@pytest.mark.parametrize("network", ["ddpm_eps", "sd3_flow"])
def test_absurd_numbers_of_steps_are_refused_before_anything_is_made(cls, network):
    p, grid = NETWORKS[network]
    scheduler = host_scheduler(cls(), p).bind(p, grid)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="num_inference_steps = 100000000; give at most 100,000"):
            scheduler.set_timesteps(10**8)
        assert tracemalloc.get_traced_memory()[1] < 10**7
    finally:
        tracemalloc.stop()


@EVERY
class TestInterface:
    def test_is_exported_and_has_diffusers_interface(self, cls):
        assert getattr(gen_pipelines, cls.__name__) is cls
        assert list(inspect.signature(cls.set_timesteps).parameters)[1:] == ["num_inference_steps", "device", "timesteps", "sigmas", "mu"]
        step = inspect.signature(cls.step).parameters
        assert list(step)[1:4] == ["model_output", "timestep", "sample"]
        assert {"generator", "return_dict"} <= set(step)
        assert not any(p.kind is p.VAR_KEYWORD for p in step.values())
        for name in ("scale_noise", "add_noise", "index_for_timestep", "set_begin_index", "order", "save_pretrained", "bind"):
            assert hasattr(cls, name)

    @EVERY_NETWORK
    def test_grid_is_sound(self, cls, network):
        scheduler = bound(cls, network)
        scheduler.set_timesteps(10)
        assert len(scheduler.sigmas) == len(scheduler.timesteps) + 1
        assert float(scheduler.sigmas[-1]) == 0.0
        assert scheduler.init_noise_sigma == (1.0 if network != "edm" else pytest.approx(80.0))
        assert scheduler.timesteps.dtype == (torch.int64 if (scheduler.timesteps % 1 == 0).all() and "flow" not in network and
                                             network not in ("vp_cosine_v", "edm") else torch.float32)  # fmt: skip

    def test_tuple_is_the_output(self, cls):
        p, _ = NETWORKS["ddpm_eps"]
        x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
        results = []
        for return_dict in (True, False):
            scheduler = bound(cls)
            scheduler.set_timesteps(5)
            t = scheduler.timesteps[0]
            results.append(scheduler.step(0.5 * x, t, x, generator=torch.Generator().manual_seed(0), return_dict=return_dict))
        assert torch.equal(results[0].prev_sample, results[1][0])
        assert torch.equal(results[0].pred_original_sample, results[1][1])
        assert_close(results[0].pred_original_sample, p.denoise(0.5 * x, x, float(t))[0])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_the_samples_dtype_is_kept_and_arithmetic_is_wide(self, cls, dtype):
        scheduler = bound(cls)
        scheduler.set_timesteps(5)
        x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
        out = scheduler.step(-x.half(), scheduler.timesteps[0], x, generator=torch.Generator().manual_seed(0))
        assert out.prev_sample.dtype == dtype
        assert out.pred_original_sample.dtype in (torch.float32, torch.float64)
        assert not torch.equal(out.prev_sample, x)

    @EVERY_NETWORK
    def test_the_sample_that_came_in_is_not_changed(self, cls, network):
        scheduler = bound(cls, network)
        scheduler.set_timesteps(4)
        x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        out, before = 0.3 * x, x.clone()
        for t in scheduler.timesteps:
            scheduler.step(out, t, x, generator=torch.Generator().manual_seed(0))
            assert torch.equal(x, before)
            assert torch.equal(out, 0.3 * before)

    def test_one_generator_per_sample_makes_a_picture_independent_of_its_batch(self, cls):
        p, _ = NETWORKS["ddpm_eps"]
        network = GAUSSIAN.network(p)
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
        whole, alone = bound(cls), bound(cls)
        whole.set_timesteps(6)
        alone.set_timesteps(6)
        together = states(whole, network, x, [torch.Generator().manual_seed(i) for i in range(3)])[-1]
        single = states(alone, network, x[1:2], [torch.Generator().manual_seed(1)])[-1]
        assert_close(together[1:2], single, rtol=0, atol=1e-5)

    def test_global_random_state_is_not_seeded(self, cls):
        p, _ = NETWORKS["ddpm_eps"]
        before = torch.random.get_rng_state()
        sample(bound(cls), GAUSSIAN.network(p), (4,), steps=3)
        assert torch.equal(before, torch.random.get_rng_state())

    # ------------------------------------------------------------------ positions

    def test_begin_index_runs_the_tail(self, cls):
        p, _ = NETWORKS["ddpm_eps"]
        scheduler, network = bound(cls), GAUSSIAN.network(p)
        scheduler.set_timesteps(8)
        k = 3 * cls.order
        scheduler.set_begin_index(k)
        x_0, noise = torch.full((5,), 0.5), torch.randn(5, generator=torch.Generator().manual_seed(0))
        x = scheduler.add_noise(x_0, noise, scheduler.timesteps[k : k + 1].repeat(5))
        level = scheduler._stages[k].here
        assert_close(x, level.alpha * x_0 + level.sigma * noise)
        for t in scheduler.timesteps[k:]:
            x = scheduler.step(network(x, t), t, x, generator=torch.Generator().manual_seed(1)).prev_sample
        assert scheduler.step_index == len(scheduler.timesteps)
        assert torch.isfinite(x).all()

    @pytest.mark.parametrize("how", [float, lambda t: t.clone(), lambda t: t.item(), lambda t: t.clone().expand(2)])
    def test_a_timestep_may_come_by_value(self, cls, how):
        p, _ = NETWORKS["ddpm_eps"]
        network = GAUSSIAN.network(p)
        x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
        a, b = bound(cls), bound(cls)
        a.set_timesteps(6)
        b.set_timesteps(6)
        g, h = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
        y = x
        for t in a.timesteps:
            x = a.step(network(x, t), t, x, generator=g).prev_sample
            y = b.step(network(y, t), how(t), y, generator=h).prev_sample
            assert torch.equal(x, y)

    def test_a_loop_may_start_again(self, cls):
        p, _ = NETWORKS["ddpm_eps"]
        scheduler, network = bound(cls), GAUSSIAN.network(p)
        scheduler.set_timesteps(6)
        x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
        first = states(scheduler, network, x)
        half = scheduler.timesteps[: 3 * cls.order]
        y = x
        for t in half:
            y = scheduler.step(network(y, t), t, y, generator=torch.Generator().manual_seed(0)).prev_sample
        again = states(scheduler, network, x)
        for a, b in zip(first, again, strict=True):
            assert torch.equal(a, b)

    def test_a_copy_works_alone(self, cls):
        p, _ = NETWORKS["ddpm_eps"]
        scheduler, network = bound(cls), GAUSSIAN.network(p)
        scheduler.set_timesteps(5)
        twin = copy.deepcopy(scheduler)
        x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
        assert torch.equal(states(scheduler, network, x)[-1], states(twin, network, x)[-1])

    def test_errors(self, cls):
        scheduler = bound(cls)
        x = torch.zeros(2, 3)
        for use in (lambda: scheduler.timesteps, lambda: scheduler.sigmas, lambda: scheduler.step(x, 1, x)):
            with pytest.raises(ValueError, match="call set_timesteps"):
                use()
        scheduler.set_timesteps(5)
        with pytest.raises(ValueError, match=f"{cls.__name__}.step: timestep 3 is not in the current schedule"):
            scheduler.step(x, 3, x)
        with pytest.raises(ValueError, match="must agree"):
            scheduler.step(torch.zeros(2, 4), scheduler.timesteps[0], x)
        with pytest.raises(ValueError, match="3 generators for a batch of 2"):
            scheduler._noise(x, [torch.Generator() for _ in range(3)])
        with pytest.raises(TypeError, match="beta_strat"):
            cls(beta_strat=1.0)
        with pytest.raises(ValueError, match="unknown config key 'beta_strat'"):
            cls.from_config({**bound(cls).config, "beta_strat": 1.0})
        with pytest.raises(ValueError, match="give num_inference_steps"):
            scheduler.set_timesteps()

    # ------------------------------------------------------------------ noising

    @EVERY_NETWORK
    def test_add_noise_is_the_path_at_any_network_time(self, cls, network):
        p, _ = NETWORKS[network]
        scheduler = bound(cls, network)
        t = torch.tensor([p.trained_t_range[1] * f for f in (0.25, 0.5, 1.0)], dtype=torch.float64)
        t = t.round() if p.path.name == "discrete_vp" else t
        g = torch.Generator().manual_seed(0)
        x_0, noise = (torch.randn(3, 2, 2, generator=g) for _ in range(2))
        expected = p.path.alpha(t)[:, None, None] * x_0 + p.path.sigma(t)[:, None, None] * noise
        times = p.network_time(t).float()
        for noisy in (scheduler.add_noise(x_0, noise, times), scheduler.scale_noise(x_0, times, noise)):
            assert noisy.dtype == torch.float32
            assert_close(noisy, expected.float(), rtol=1e-4, atol=1e-4)

    @EVERY_NETWORK
    @pytest.mark.parametrize("options", [{}, {"use_karras_sigmas": True}])
    def test_add_noise_knows_the_elements_of_timesteps_however_they_are_given(self, cls, network, options):
        scheduler = cls(**options).bind(NETWORKS[network][0])
        scheduler.set_timesteps(12)
        x_0, noise = torch.zeros(2, 2), torch.ones(2, 2)
        for t in scheduler.timesteps[1:]:
            expected = scheduler.add_noise(x_0, noise, t)
            assert_close(scheduler.add_noise(x_0, noise, t.repeat(2)), expected, rtol=1e-3, atol=1e-6)
            assert_close(scheduler.add_noise(x_0, noise, t.clone()), expected, rtol=1e-3, atol=1e-6)

    @EVERY_NETWORK
    def test_velocity_and_tables_are_the_path_s(self, cls, network):
        p, _ = NETWORKS[network]
        scheduler = bound(cls, network)
        g = torch.Generator().manual_seed(0)
        x_0, noise = (torch.randn(2, 3, generator=g) for _ in range(2))
        t = torch.tensor([0.25, 1.0], dtype=torch.float64) * p.trained_t_range[1]
        t = t.round() if p.path.name == "discrete_vp" else t
        expected = p.path.alpha(t)[:, None] * noise - p.path.sigma(t)[:, None] * x_0
        assert_close(scheduler.get_velocity(x_0, noise, p.network_time(t).float()), expected.float(), rtol=1e-4, atol=1e-4)
        if p.path.name == "discrete_vp":
            assert_close((1 - scheduler.betas.double()).cumprod(0).float(), scheduler.alphas_cumprod, rtol=1e-4, atol=1e-6)
            with pytest.raises(ValueError, match=f"whole numbers from 0 to {len(scheduler) - 1}"):
                scheduler.add_noise(x_0, noise, torch.tensor([5, len(scheduler)]))
        else:
            assert not hasattr(scheduler, "alphas_cumprod") and not hasattr(scheduler, "betas")

    # ------------------------------------------------------------------ configs

    @EVERY_NETWORK
    def test_config_in_memory_and_reloaded_mean_the_same(self, cls, network, tmp_path):
        scheduler = bound(cls, network)
        scheduler.save_pretrained(tmp_path)
        loaded = cls.from_pretrained(tmp_path)
        assert loaded.parameterization == scheduler.parameterization == NETWORKS[network][0]
        assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == cls.__name__
        for other in SCHEDULERS.values():
            a, b = other.from_config(scheduler.config), other.from_config(loaded.config)
            assert a.parameterization == b.parameterization == NETWORKS[network][0]
            assert a.grid_options() == b.grid_options()
            a.set_timesteps(7)
            b.set_timesteps(7)
            assert torch.equal(a.timesteps, b.timesteps)
            assert torch.equal(a.sigmas, b.sigmas)

    def test_an_untouched_default_is_a_value(self, cls, tmp_path):
        """Trap G17: diffusers drops keys at their default in memory, so a swap differs before and after saving."""
        theirs = D.EulerDiscreteScheduler(beta_schedule="scaled_linear")
        theirs.save_pretrained(tmp_path)
        memory = cls.from_config(theirs.config)
        disk = cls.from_config(D.EulerDiscreteScheduler.load_config(tmp_path))
        assert memory.grid_options() == disk.grid_options()
        assert memory.grid_options().timestep_spacing == "linspace"
        assert memory.parameterization == disk.parameterization

    def test_saving_twice_gives_the_same_bytes(self, cls, tmp_path):
        bound(cls, "sd3_flow").save_pretrained(tmp_path / "a")
        cls.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
        assert (tmp_path / "a/scheduler_config.json").read_bytes() == (tmp_path / "b/scheduler_config.json").read_bytes()

    def test_every_key_is_known(self, cls):
        assert set(inspect.signature(cls.__init__).parameters) - {"self"} <= DIFFUSERS_KEYS | OUR_KEYS
        assert set(cls.solver_defaults) <= OUR_KEYS

    def test_the_config_is_read_when_the_grid_is_laid(self, cls):
        """diffusers' pipelines rewrite the config after construction."""
        from diffusers.configuration_utils import FrozenDict

        scheduler = bound(cls, "sd_eps")
        scheduler.set_timesteps(10)
        before = scheduler.timesteps
        scheduler._internal_dict = FrozenDict({**scheduler.config, "prediction_type": "v_prediction", "steps_offset": 3})
        scheduler.set_timesteps(10)
        assert scheduler.parameterization.prediction == "v_prediction"
        assert torch.equal(scheduler.timesteps, before + 2)  # it was 1

    # ------------------------------------------------------------------ binding

    def test_binding_copies(self, cls):
        scheduler = cls()
        before = dict(scheduler.config)
        flow, vp = scheduler.bind(FLOW), scheduler.bind(NETWORKS["sd_eps"][0])
        assert dict(scheduler.config) == before
        assert flow.parameterization == FLOW
        assert vp.parameterization == NETWORKS["sd_eps"][0]
        assert flow.is_bound
        assert not scheduler.is_bound

    def test_the_networks_grid_comes_along_and_arguments_win(self, cls):
        assert cls().bind(FLOW, {"shift": 3.0}).grid_options().shift == 3.0
        assert cls(shift=5.0).bind(FLOW, {"shift": 3.0}).grid_options().shift == 5.0
        assert cls().bind(FLOW, {"shift": 3.0}).bind(FLOW).grid_options().shift == 3.0

    def test_a_contradicting_argument_raises(self, cls):
        with pytest.raises(ValueError, match="prediction_type='v_prediction' was given"):
            cls(prediction_type="v_prediction").bind(NETWORKS["sd_eps"][0])
        with pytest.raises(ValueError, match="beta_start"):
            cls(beta_start=0.1).bind(FLOW)
        cls(beta_start=0.00085).bind(NETWORKS["sd_eps"][0])  # agreeing is fine
        with pytest.raises(TypeError, match="give a Parameterization"):
            cls().bind("flow")

    def test_overrides_of_from_config(self, cls):
        base = bound(cls, "sd_eps").config
        assert cls.from_config(base, prediction_type="v_prediction").parameterization.prediction == "v_prediction"
        assert cls.from_config(base, timestep_spacing="trailing").grid_options().timestep_spacing == "trailing"
        sub_vp = Parameterization(SubVPPath(), "score")
        assert cls.from_config(base, parameterization=sub_vp).parameterization == sub_vp
        assert cls(parameterization=sub_vp).parameterization == sub_vp

    def test_diffusers_reads_what_we_write(self, cls, tmp_path):
        bound(cls, "sd3_flow").save_pretrained(tmp_path)
        theirs = D.DPMSolverMultistepScheduler.from_pretrained(tmp_path)
        assert theirs.config.prediction_type == "flow_prediction"
        assert theirs.config.use_flow_sigmas
        assert theirs.config.flow_shift == 3.0
        bound(cls, "sd_eps").save_pretrained(tmp_path)
        theirs = D.DDIMScheduler.from_pretrained(tmp_path)
        assert theirs.config.beta_schedule == "scaled_linear"
        assert not theirs.config.clip_sample


def test_defaults_are_diffusers():
    for ours, theirs in (("ddim", D.DDIMScheduler), ("ddpm", D.DDPMScheduler), ("euler", D.EulerDiscreteScheduler)):
        assert SCHEDULERS[ours]().parameterization.with_(variance=None) == Parameterization.from_config(theirs().config).with_(
            variance=None
        )
        assert SCHEDULERS[ours]().config["timestep_spacing"] == theirs().config.timestep_spacing
    assert SCHEDULERS["flow_match_euler"]().parameterization == Parameterization(LinearPath(), "flow_prediction")
    assert SCHEDULERS["ddim"](num_train_timesteps=50).parameterization.path == DiscreteVPPath(num_train_timesteps=50)
    assert SCHEDULERS["ddim"](beta_schedule="scaled_linear").parameterization.clip_sample  # the rest stays diffusers' default


@pytest.mark.slow  # starts a process
def test_inside_diffusers_pipelines_after_saving_in_a_fresh_process(tmp_path):
    """diffusers finds a third-party component only in an imported library: `import gen_pipelines` alone must do."""
    from diffusers import DDIMPipeline, DDPMPipeline, UNet2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
            down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        )  # fmt: skip
    assert DDIMPipeline is not None
    pipe = DDPMPipeline(unet=unet, scheduler=SCHEDULERS["ddim"]())
    pipe.set_progress_bar_config(disable=True)
    images = pipe(generator=torch.Generator().manual_seed(0), num_inference_steps=4, output_type="np").images
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == ["gen_pipelines", "DDIMScheduler"]
    code = (
        "import gen_pipelines, torch, sys\n"
        "from diffusers import DDPMPipeline\n"
        "pipe = DDPMPipeline.from_pretrained(sys.argv[1]); pipe.set_progress_bar_config(disable=True)\n"
        "assert type(pipe.scheduler).__module__.startswith('gen_pipelines'), type(pipe.scheduler)\n"
        "print(float(pipe(generator=torch.Generator().manual_seed(0), num_inference_steps=4, output_type='np').images.sum()))\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    assert float(run.stdout.split()[-1]) == pytest.approx(float(images.sum()), rel=1e-5)
