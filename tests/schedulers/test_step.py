"""What no step may do: wait for an accelerator, compute in half precision, keep tensors that are not its own."""

import warnings

import pytest
import torch
from analytic import NETWORKS
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from gen_pipelines.processes import DiscreteVPPath, EDMPath, Parameterization
from gen_pipelines.schedulers import SCHEDULERS, DDIMInverseScheduler
from gen_pipelines.schedulers.base import GaussianScheduler, SchedulerMixin, SchedulerOutput

EVERY_SCHEDULER = {**SCHEDULERS, "ddim_inverse": DDIMInverseScheduler}
EVERY = pytest.mark.parametrize("name", EVERY_SCHEDULER)
ALL_NETWORKS = {
    **{name: p for name, (p, _) in NETWORKS.items()},
    "clipped": Parameterization(DiscreteVPPath(), clip_sample=True),
    "thresholded": Parameterization(DiscreteVPPath(), thresholding=True, sample_max_value=1.5),
    "learned_variance": Parameterization(DiscreteVPPath(), variance="learned_range"),
    "consistency": Parameterization(EDMPath(), "consistency", sigma_data=0.5),
}

# every way through a step: (constructor's arguments, step's arguments)
WAYS: dict[str, list[tuple[dict, dict]]] = {
    "ddim": [({}, {}), ({}, {"eta": 0.5}), ({}, {"use_clipped_model_output": True})],
    "ddpm": [({}, {}), ({"variance_type": "fixed_large"}, {})],
    "euler": [({}, {}), ({"s_churn": 10.0, "s_noise": 1.1}, {})],
    "heun": [({}, {}), ({"s_churn": 10.0}, {})],
    "flow_match_heun": [({}, {}), ({"s_churn": 10.0}, {})],
    "dpm_solver_multistep": [
        ({}, {}),
        ({"algorithm_type": "dpmsolver", "solver_order": 3}, {}),
        ({"algorithm_type": "sde-dpmsolver++"}, {}),
        ({"algorithm_type": "sde-dpmsolver", "solver_type": "heun"}, {}),
    ],
    "unipc": [({}, {}), ({"predict_x0": False, "solver_order": 3}, {})],
    "flow_match_euler": [({}, {}), ({"stochastic_sampling": True}, {})],
    "score_sde": [({}, {}), ({"correct_steps": 1}, {})],
    "consistency": [({}, {}), ({"rule": "lcm"}, {}), ({"rule": "tcd"}, {"eta": 0.3}), ({"rule": "tcd"}, {"eta": 0.0})],
}

IN_EPS = ("'dpmsolver'", "'sde-dpmsolver'", "'predict_x0': False")  # the ways that keep eps


def made(name, p, steps=4, **arguments):
    """A scheduler for the network with its grid laid, or None where the two do not go together."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a consistency rule on most networks
        if arguments.get("rule") == "lcm" and p.path.name == "edm":
            return None  # LCM's rule needs a training index
        if arguments.get("variance_type", p.variance) != p.variance:
            p = p.with_(variance=arguments["variance_type"]) if not p.learned_variance else p
        scheduler = EVERY_SCHEDULER[name](**{k: v for k, v in arguments.items() if k != "variance_type"}).bind(p)
        scheduler.set_timesteps(steps)
    return scheduler


def combinations(name):
    for network, p in ALL_NETWORKS.items():
        for arguments, options in WAYS.get(name, [({}, {})]):
            if (scheduler := made(name, p, **arguments)) is not None:
                yield f"{name} {arguments} {options} on {network}", p, scheduler, options


def outputs_for(p, count, shape=(2, 3, 4), dtype=torch.float32, device="cpu"):
    """What a network might answer: any numbers will do here; small, so that nothing overflows."""
    shape = (shape[0], 2 * shape[1], *shape[2:]) if p.learned_variance else shape
    g = torch.Generator().manual_seed(3)
    return [(0.3 * torch.randn(shape, generator=g)).to(device, dtype) for _ in range(count)]


def walk(scheduler, p, outputs, x, options, generator=None):
    """The states after each step, and the estimates of x_0."""
    states, estimates = [], []
    for t, output in zip(scheduler.timesteps, outputs, strict=True):
        result = scheduler.step(output, t, x, generator=generator, **options)
        x = result.prev_sample
        states.append(x)
        estimates.append(result.pred_original_sample)
    return states, estimates


# ------------------------------------------------------------------------------------------------------------------- no synchronisation


class NoReading(TorchDispatchMode):
    """Fails on operations that read a tensor's values, or whose result has a shape that depends on them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten, packet = torch.ops.aten, func.overloadpacket
        masks = packet in (aten.index, aten.index_put, aten.index_put_) and any(i is not None and i.dtype == torch.bool for i in args[1])
        if masks or packet in (aten.nonzero, aten.masked_select, aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.unique_dim):
            pytest.fail(f"{func} in a step")
        return func(*args, **(kwargs or {}))


READERS = ("item", "tolist", "nonzero", "__bool__", "__float__", "__int__", "__index__", "cpu", "numpy")


@EVERY
def test_a_step_reads_no_tensor(name, monkeypatch):
    """It would stop an accelerator's queue: every scheduler, every way through its step, every kind of network."""
    for what, p, scheduler, options in combinations(name):
        x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
        outputs = outputs_for(p, len(scheduler.timesteps))
        if getattr(scheduler, "_kind", None) == "tcd":  # the levels of an eta are made at its first step, from tables on the CPU
            scheduler._cleaner_levels(options["eta"])
        with monkeypatch.context() as patch, NoReading():
            for reader in READERS:
                patch.setattr(torch.Tensor, reader, lambda *a, reader=reader, what=what: pytest.fail(f"Tensor.{reader}: {what}"))
            for t, output in zip(scheduler.timesteps, outputs, strict=True):
                scheduler.scale_model_input(x, t)
                x = scheduler.step(output, t, x, generator=torch.Generator().manual_seed(0), **options).prev_sample
            scheduler.add_noise(x, x, scheduler.timesteps[:1])


@EVERY
def test_a_step_works_on_tensors_without_values(name):
    """On the meta device there is nothing to read: whatever needs a value raises."""
    for what, p, scheduler, options in combinations(name):
        x = torch.empty(2, 3, 4, device="meta")
        states, estimates = walk(scheduler, p, outputs_for(p, len(scheduler.timesteps), device="meta"), x, options)
        for tensor in states + estimates:
            assert tensor.is_meta and tensor.shape == x.shape, what
        assert scheduler.add_noise(x, x, torch.empty(2, dtype=scheduler.timesteps.dtype, device="meta")).is_meta


def test_the_checks_notice_a_reading(monkeypatch):
    class Reads(GaussianScheduler, SchedulerMixin):
        def step(self, model_output, timestep, sample, generator=None, return_dict=True):
            i = self._begin(timestep)
            x_0, eps = self._predict(model_output, sample, i)
            return self._end(x_0 * float(eps.abs().max()), x_0, sample, i, return_dict)

    monkeypatch.setitem(EVERY_SCHEDULER, "reads", Reads)
    with pytest.raises(pytest.fail.Exception, match="in a step|Tensor.__float__"):
        test_a_step_reads_no_tensor("reads", monkeypatch)
    with pytest.raises(RuntimeError, match="meta"):
        test_a_step_works_on_tensors_without_values("reads")


# ------------------------------------------------------------------------------------------------- half precision, compiled networks


@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_arithmetic_is_wide_for_a_network_in_half_precision(name, dtype):
    """A state in float32 and outputs in half precision: as in float64 with the same outputs, to float32's rounding."""
    for what, p, scheduler, options in combinations(name):
        n, g = len(scheduler.timesteps), torch.Generator()
        x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
        outputs = outputs_for(p, n, dtype=dtype)
        noise = torch.randn(2 * n, 2, 3, 4, generator=torch.Generator().manual_seed(1))
        runs = []
        for wide in (torch.float32, torch.float64):
            draws = iter(noise.to(wide))
            scheduler._noise = lambda like, generator, draws=draws: next(draws)  # float32 and float64 draw different numbers
            given = outputs if wide is torch.float32 else [o.double() for o in outputs]
            runs.append(walk(scheduler, p, given, x.to(wide), options, g))
        for ours, exact in zip(sum(runs[0], []), sum(runs[1], []), strict=True):
            assert ours.dtype == torch.float32
            scale = max(1.0, float(exact.abs().max()))
            in_eps = any(word in what for word in IN_EPS)  # x_0 is eps divided by alpha, which is 5e-5 where the cosine path starts
            assert float((ours - exact).abs().max()) < (2e-3 if in_eps else 2e-5) * scale, what


@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_state_in_half_precision_is_rounded_once_per_step(name, dtype):
    """diffusers' pipelines keep the state in the network's dtype: what comes back is the wide result, rounded."""
    p = NETWORKS["sd_eps"][0]
    scheduler = made(name, p)
    x, outputs = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).to(dtype), outputs_for(p, 1, dtype=dtype)
    t = scheduler.timesteps[0]
    half = scheduler.step(outputs[0], t, x, generator=torch.Generator().manual_seed(0))
    wide = scheduler.step(outputs[0].float(), t, x.float(), generator=torch.Generator().manual_seed(0))
    assert half.prev_sample.dtype == dtype and torch.equal(half.prev_sample, wide.prev_sample.to(dtype))
    assert half.pred_original_sample.dtype == torch.float32 and torch.equal(half.pred_original_sample, wide.pred_original_sample)


@EVERY
def test_a_network_may_write_over_its_last_output(name):
    """As networks do that run as a CUDA graph (torch.compile, mode="reduce-overhead"): nothing that is kept may be the output itself."""
    for what, p, scheduler, options in combinations(name):
        outputs = outputs_for(p, len(scheduler.timesteps))
        x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
        expected, _ = walk(scheduler, p, outputs, x, options, torch.Generator().manual_seed(1))
        buffer, generator, y = torch.empty_like(outputs[0]), torch.Generator().manual_seed(1), x
        for t, output, wanted in zip(scheduler.timesteps, outputs, expected, strict=True):
            buffer.copy_(output)
            y = scheduler.step(buffer, t, y, generator=generator, **options).prev_sample
            buffer.fill_(float("nan"))
            assert torch.equal(y, wanted), what


def test_a_compiled_network_gives_the_same_trajectory():
    """One small network, compiled by its graph (no code generator is needed), under every scheduler; the time goes in as it comes."""

    def network(x, t):
        return torch.tanh(x @ weight) * torch.cos(t / 300)

    weight = 0.5 * torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(network, backend="aot_eager", dynamic=False)
    for name in EVERY_SCHEDULER:
        results = []
        for function in (network, compiled):
            scheduler = made(name, NETWORKS["sd_eps"][0])
            x, generator = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1)), torch.Generator().manual_seed(2)
            with torch.no_grad():
                for t in scheduler.timesteps:
                    x = scheduler.step(function(x, t.float()), t, x, generator=generator).prev_sample
            results.append(x)
        assert_close(results[0], results[1], rtol=0, atol=1e-6 * float(results[0].abs().max()))


# ------------------------------------------------------------------------------------------------------------- x_0 when it is asked for


@EVERY
def test_x_0_is_the_same_whenever_it_is_read(name):
    for what, p, scheduler, options in combinations(name):
        x, outputs = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)), outputs_for(p, len(scheduler.timesteps))
        late = []
        y, g, h = x, torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
        for t, output in zip(scheduler.timesteps, outputs, strict=True):
            late.append(scheduler.step(output, t, y, generator=g, **options))
            y = late[-1].prev_sample
        for t, output, result in zip(scheduler.timesteps, outputs, late, strict=True):
            x, x_0 = scheduler.step(output, t, x, generator=h, return_dict=False, **options)
            assert torch.equal(result.prev_sample, x) and torch.equal(result.pred_original_sample, x_0), what
            assert result.pred_original_sample is result.pred_original_sample


@pytest.mark.parametrize("changed", ["sample", "model_output"])
@EVERY
def test_x_0_is_never_computed_from_tensors_that_changed(name, changed):
    """Where it is read too late it says so; it is never silently of other numbers."""
    scheduler = made(name, NETWORKS["sd_eps"][0])
    tensors = {
        "sample": torch.randn(2, 3, generator=torch.Generator().manual_seed(0)),
        "model_output": torch.randn(2, 3, generator=torch.Generator().manual_seed(1)),
    }
    t, g = scheduler.timesteps[0], torch.Generator()
    expected = scheduler.step(tensors["model_output"], t, tensors["sample"], generator=g, return_dict=False)[1]
    late = scheduler.step(tensors["model_output"], t, tensors["sample"], generator=g)
    tensors[changed].zero_()
    if callable(late._x_0):
        with pytest.raises(RuntimeError, match="changed in place"):
            _ = late.pred_original_sample
    else:
        assert torch.equal(late.pred_original_sample, expected)


def test_in_inference_mode_x_0_is_right_after_a_change():
    scheduler = made("euler", NETWORKS["sd_eps"][0])
    with torch.inference_mode():
        x, output = torch.ones(1, 3), torch.full((1, 3), 0.5)
        expected = scheduler.step(output, scheduler.timesteps[0], x, return_dict=False)[1]
        late = scheduler.step(output, scheduler.timesteps[0], x)
        x.zero_()
        assert torch.equal(late.pred_original_sample, expected)


def test_gradients_go_through_a_step():
    for name in EVERY_SCHEDULER:
        scheduler = made(name, NETWORKS["sd_eps"][0])
        x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y, g = x, torch.Generator().manual_seed(0)
        total = 0.0
        for t in scheduler.timesteps:
            out = scheduler.step(torch.tanh(y), t, y, generator=g)
            total = total + out.pred_original_sample.square().sum()
            y = out.prev_sample
        (y.square().sum() + total).backward()
        assert torch.isfinite(x.grad).all() and (x.grad != 0).all(), name


def test_the_output_reads_like_any_output():
    x, x_0 = torch.ones(1), torch.zeros(1)
    out = SchedulerOutput(prev_sample=x, pred_original_sample=lambda: x_0)
    assert out[0] is x and out["prev_sample"] is x and out[1] is x_0 and out["pred_original_sample"] is x_0
    assert out.to_tuple() == (x, x_0) and out[:1] == (x,)
    assert SchedulerOutput(x).pred_original_sample is None
    prev, estimate = out
    assert prev is x and estimate is x_0
    assert "prev_sample" in repr(out)
    with pytest.raises(AttributeError):
        out["nothing"]


def test_a_tensor_that_lies_after_timesteps_in_memory_is_not_one_of_them():
    """Positions are found by address; the address one past the end may be anybody's."""
    scheduler = made("ddim", NETWORKS["sd_eps"][0], 4)
    storage = torch.zeros(5, dtype=torch.int64)
    storage[:4] = scheduler.timesteps
    storage[4] = 777
    scheduler._timesteps = storage[:4]
    x = torch.ones(1, 3)
    for t in scheduler.timesteps:
        x = scheduler.step(x, t, x).prev_sample
    with pytest.raises(ValueError, match="timestep 777 is not in the current schedule"):
        scheduler.step(x, storage[4], x)


# -------------------------------------------------------------------------------------------------------------------------------- noising


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_noising_by_table_and_by_formula_agree(dtype):
    p = NETWORKS["sd_eps"][0]
    scheduler = made("ddpm", p)
    x_0, noise = (torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(s)).to(dtype) for s in (0, 1))
    times = torch.tensor([0, 500, 999])
    looked_up, computed = scheduler.add_noise(x_0, noise, times), scheduler.add_noise(x_0, noise, times.double())
    assert looked_up.dtype == computed.dtype == dtype
    assert_close(looked_up, computed)
    other = made("ddpm", NETWORKS["cosine_x_0"][0])
    assert not torch.allclose(other.add_noise(x_0, noise, times), looked_up)
    with pytest.raises(ValueError, match="whole numbers from 0 to 999"):
        scheduler.add_noise(x_0, noise, torch.tensor([0, 500, 1000]))
