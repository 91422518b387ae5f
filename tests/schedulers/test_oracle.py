"""Every scheduler on every kind of network, against data whose ideal network is known: the public suite, and what it has not."""

import warnings

import diffusers
import pytest
import torch
from analytic import GAUSSIAN, NETWORKS, sample
from torch.testing import assert_close

from gen_pipelines.schedulers import (
    SCHEDULERS,
    BridgedScheduler,
    DDIMInverseScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    UniPCScheduler,
)  # fmt: skip
from gen_pipelines.testing import CHECKS, CONSISTENCY_NETWORKS, OTHER_NETWORKS, Promise, check_scheduler

FIRST_ORDER = ["ddim", "euler", "flow_match_euler", "rectified_flow"]  # and without noise
LONG = ("mixture", "grids")


class Stochastic(DDIMScheduler):
    """DDIM at eta = 1."""

    def step(self, *args, eta=1.0, **kwargs):
        return super().step(*args, eta=eta, **kwargs)


def dpm(**fixed):
    return lambda **options: DPMSolverMultistepScheduler(**{**fixed, **options})


FULL = {"lower_order_final": False}
# class or factory, and what it promises where that is not its class's
EVERY = {
    **{name: (cls, None) for name, cls in SCHEDULERS.items()},
    "ddim_inverse": (DDIMInverseScheduler, None),
    "ddim eta 1": (Stochastic, Promise(order=1, steps=200, exact_for_points=True)),  # noise at every step and first order: more steps
    # the last step but one of a shifted flow grid is three times the one before in lambda: extrapolation pays for it at 100 steps
    "dpm 3M": (dpm(solver_order=3), Promise(order=3, order_options=FULL, order_counts=(128, 256), exact_for_points=True, spread=0.06)),
    "dpm eps 2M": (dpm(algorithm_type="dpmsolver", final_sigmas_type="zero"), Promise(order=2, order_options=FULL, exact_for_points=True)),
    "dpm sde 1": (dpm(algorithm_type="sde-dpmsolver++", solver_order=1), Promise(order=1, exact_for_points=True)),
    "dpm sde 2M": (dpm(algorithm_type="sde-dpmsolver++"), Promise(order=2, order_options=FULL, exact_for_points=True, spread=0.06)),
    "unip 2": (
        lambda **o: UniPCScheduler(**{"disable_corrector": list(range(999)), **o}),
        Promise(order=2, order_options=FULL, exact_for_points=True),
    ),
}


@pytest.mark.parametrize("name", [*SCHEDULERS, "ddim_inverse"])
def test_conformance(name):
    """Moments, marginals, order, exactness, round trips, grids, saving and refusals on the kinds of network in use."""
    make, promise = EVERY[name]
    networks = None if name == "consistency" else NETWORKS
    report = check_scheduler(make, checks=[c for c in CHECKS if c not in LONG], networks=networks, promise=promise, name=name)
    report.raise_for_failures()
    assert not [row for row in report.rows if row.verdict == "refused"]
    judged = {row.check for row in report.rows if row.passed}
    assert judged >= ({"moments", "grid", "refusals"} if name != "ddim_inverse" else {"round trip"})
    assert "order" in judged or name in ("consistency", "ddim_inverse")


@pytest.mark.slow  # ten seconds each
@pytest.mark.parametrize("name", EVERY)
def test_everything_on_every_path_and_prediction(name):
    """The rest of the networks, a hundred other grids, and clusters; and variants of the solvers."""
    make, promise = EVERY[name]
    checks = [c for c in CHECKS if not (name == "ddim eta 1" and c == "save and load")]  # a class of this file does not load by name
    report = check_scheduler(make, checks=checks, promise=promise, name=name)
    report.raise_for_failures()
    assert not [row for row in report.rows if row.verdict == "refused"]
    assert name in ("consistency", "ddim_inverse") or {row.check for row in report.rows if row.passed} >= {"order", *LONG}


def test_every_path_and_prediction_is_among_the_networks():
    from gen_pipelines.processes import PATHS, PREDICTIONS

    all_ = [p for p, _ in {**NETWORKS, **OTHER_NETWORKS}.values()]
    assert {p.path.name for p in all_} == set(PATHS)
    assert {p.prediction for p in all_} == set(PREDICTIONS) - {"consistency"}


@pytest.mark.parametrize("network", NETWORKS)
def test_first_order_solvers_agree_on_one_grid(network):
    """DDIM = Euler in sigma = Euler in flow time; 1e-5, fp32 sums of different order."""
    p, _ = NETWORKS[network]
    low, high = p.trained_t_range
    times = high - (high - max(low, 1e-3 * high)) * (torch.arange(12, dtype=torch.float64) / 12) ** 2
    timesteps = [float(torch.tensor(p.network_time(float(t)), dtype=torch.float32)) for t in times]
    x = torch.randn(64, generator=torch.Generator().manual_seed(1))
    results = []
    for name in FIRST_ORDER:
        scheduler = SCHEDULERS[name]().bind(p)
        scheduler.set_timesteps(timesteps=timesteps)
        results.append(sample(scheduler, GAUSSIAN.network(p), steps=None, x=x * scheduler.init_noise_sigma))
    assert_close(results[1], results[0], rtol=0, atol=1e-5)
    assert_close(results[2], results[0], rtol=0, atol=1e-5)
    assert_close(results[3], results[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("network", NETWORKS)
def test_ddpm_is_ddim_at_eta_1_with_the_same_noise(network):
    p, grid = NETWORKS[network]
    ddpm, ddim = (SCHEDULERS[n]().bind(p, grid) for n in ("ddpm", "ddim"))
    a = sample(ddpm, GAUSSIAN.network(p), (64,), steps=20)
    b = sample(ddim, GAUSSIAN.network(p), (64,), steps=20, eta=1.0)
    assert_close(a, b, rtol=0, atol=1e-8)


@pytest.mark.parametrize("network", ["sd_eps", "sd3_flow", "edm"])
def test_churn_keeps_the_distribution(network):
    p, grid = NETWORKS[network]
    x = sample(SCHEDULERS["euler"](s_churn=20.0).bind(p, grid), GAUSSIAN.network(p), (20_000,), steps=200)
    assert float(x.mean()) == pytest.approx(GAUSSIAN.mean, abs=0.02)
    assert float(x.std()) == pytest.approx(GAUSSIAN.std, abs=0.035)


def test_churn_raises_the_levels_that_the_network_sees():
    p, _ = NETWORKS["edm"]
    plain, churn = SCHEDULERS["euler"]().bind(p), SCHEDULERS["euler"](s_churn=4.0, s_tmin=0.05, s_tmax=50.0).bind(p)
    plain.set_timesteps(10)
    churn.set_timesteps(10)
    for a, b in zip(plain.sigmas[:-1].tolist(), churn.sigmas[:-1].tolist(), strict=True):
        assert b == pytest.approx(a * 1.4 if 0.05 <= a <= 50 else a, rel=1e-5)
    assert_close(churn.timesteps, churn.sigmas[:-1].log() / 4)


def test_stochastic_flow_sampling():
    p, grid = NETWORKS["sd3_flow"]
    scheduler = SCHEDULERS["flow_match_euler"](stochastic_sampling=True).bind(p, grid)
    x = sample(scheduler, GAUSSIAN.network(p), (20_000,), steps=100)
    assert float(x.mean()) == pytest.approx(GAUSSIAN.mean, abs=0.02)


@pytest.mark.parametrize("variance", ["learned_range", "learned", "fixed_large"])
@pytest.mark.parametrize("network", ["ddpm_eps", "sd3_flow", "edm"])
def test_ddpm_with_other_variances(network, variance):
    """The network says the posterior's own variance for learned ones, so that the answer is known; many steps for the large one."""
    p, grid = NETWORKS[network]
    p = p.with_(variance=variance)
    scheduler = SCHEDULERS["ddpm"]().bind(p, grid)
    scheduler.set_timesteps(200)
    inner, stages = GAUSSIAN.network(p), iter(scheduler._stages)

    def network_with_variance(x, t):
        small = next(stages).data[0]
        second = torch.full_like(x, -1.0 if variance == "learned_range" else small**2)
        return torch.cat([inner(x, t), second], 1) if variance != "fixed_large" else inner(x, t)

    x = sample(scheduler, network_with_variance, (10_000, 1), steps=None)
    assert float(x.mean()) == pytest.approx(GAUSSIAN.mean, abs=0.02)
    assert float(x.std()) == pytest.approx(GAUSSIAN.std, abs=0.035)


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "consistency"])
def test_a_consistency_network_under_another_solver_warns_once(name):
    p, _ = CONSISTENCY_NETWORKS["consistency"]
    scheduler = SCHEDULERS[name]().bind(p)
    with pytest.warns(UserWarning, match=f"{type(scheduler).__name__} on a consistency network: its x_0 is the end of the curve"):
        scheduler.set_timesteps(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.set_timesteps(4)
        SCHEDULERS["consistency"]().bind(p).set_timesteps(4)


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers hands tensors to numpy
def test_a_hosted_solver_on_a_consistency_network_warns_once():
    p, _ = CONSISTENCY_NETWORKS["consistency"]
    scheduler = BridgedScheduler(diffusers.EulerDiscreteScheduler(), p)
    with pytest.warns(UserWarning, match="on a consistency network"):
        scheduler.set_timesteps(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        scheduler.set_timesteps(4)
        BridgedScheduler(diffusers.CMStochasticIterativeScheduler(), p).set_timesteps(4)
