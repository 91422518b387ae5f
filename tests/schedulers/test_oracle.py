"""Every scheduler on every kind of network, against data whose ideal network is known."""

import pytest
import torch
from analytic import GAUSSIAN, NETWORKS, sample
from torch.testing import assert_close

from gen_pipelines.processes import DATA, DiscreteVPPath, EDMPath, LinearPath, Parameterization, SubVPPath, VEPath, VPSDEPath
from gen_pipelines.schedulers import SCHEDULERS
from gen_pipelines.schedulers.multistep import MultistepScheduler

SAMPLERS = [name for name in SCHEDULERS if name != "consistency"]  # it has its own oracle, consistency networks: test_consistency.py
STEPS = {"score_sde": 400}  # Euler-Maruyama; the others have 100
DETERMINISTIC = ["ddim", "euler", "flow_match_euler"]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_have_the_datas_moments(name, network):
    """20,000 draws: a standard error of the mean is 0.002, of the standard deviation 0.0015; the tolerances are discretisation."""
    p, grid = NETWORKS[network]
    scheduler = SCHEDULERS[name]().bind(p, grid)
    x = sample(scheduler, GAUSSIAN.network(p), (20_000,), steps=STEPS.get(name, 100))
    mean, std = GAUSSIAN.mean, GAUSSIAN.std
    if isinstance(scheduler, MultistepScheduler) and grid.get("timestep_spacing") == "leading":
        # diffusers' leading grid for these solvers begins at index 901 of 1000, which is kept for parity: noise of variance 1 is not the
        # marginal there, and the right answer is where the exact flow takes it
        zero, one = (GAUSSIAN.ode(torch.tensor(v), scheduler._stages[0].here, DATA) for v in (0.0, 1.0))
        mean, std = float(zero), float(one - zero)
    assert float(x.mean()) == pytest.approx(mean, abs=0.02)
    assert float(x.std()) == pytest.approx(std, abs=0.035)


@pytest.mark.parametrize(
    "p",
    [
        Parameterization(VPSDEPath()),
        Parameterization(SubVPPath(), "score", time_input="t"),
        Parameterization(VEPath(), "score"),
        Parameterization(EDMPath(), "epsilon"),
        Parameterization(LinearPath(), "epsilon", lambda_range=(-5.0, 7.0)),
        Parameterization(LinearPath(), "flow_prediction", time_input="1 - t", sign=-1),
        Parameterization(DiscreteVPPath(), "flow_prediction"),
        Parameterization(DiscreteVPPath(), "edm", sigma_data=0.3),
    ],
    ids=lambda p: f"{p.path.name}-{p.prediction}",
)
@pytest.mark.parametrize("name", SAMPLERS)
def test_other_paths_and_predictions(name, p):
    x = sample(SCHEDULERS[name]().bind(p), GAUSSIAN.network(p), (20_000,), steps=STEPS.get(name, 100))
    assert float(x.mean()) == pytest.approx(GAUSSIAN.mean, abs=0.02)
    assert float(x.std()) == pytest.approx(GAUSSIAN.std, abs=0.035)


@pytest.mark.parametrize("network", NETWORKS)
def test_first_order_solvers_agree_on_one_grid(network):
    """DDIM = Euler in sigma = Euler in flow time; 1e-5, fp32 sums of different order."""
    p, _ = NETWORKS[network]
    low, high = p.trained_t_range
    times = high - (high - max(low, 1e-3 * high)) * (torch.arange(12, dtype=torch.float64) / 12) ** 2
    timesteps = [float(torch.tensor(p.network_time(float(t)), dtype=torch.float32)) for t in times]
    x = torch.randn(64, generator=torch.Generator().manual_seed(1))
    results = []
    for name in DETERMINISTIC:
        scheduler = SCHEDULERS[name]().bind(p)
        scheduler.set_timesteps(timesteps=timesteps)
        results.append(sample(scheduler, GAUSSIAN.network(p), steps=None, x=x * scheduler.init_noise_sigma))
    assert_close(results[1], results[0], rtol=0, atol=1e-5)
    assert_close(results[2], results[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("network", NETWORKS)
def test_ddpm_is_ddim_at_eta_1_with_the_same_noise(network):
    p, grid = NETWORKS[network]
    ddpm, ddim = (SCHEDULERS[n]().bind(p, grid) for n in ("ddpm", "ddim"))
    a = sample(ddpm, GAUSSIAN.network(p), (64,), steps=20)
    b = sample(ddim, GAUSSIAN.network(p), (64,), steps=20, eta=1.0)
    assert_close(a, b, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_first_order_convergence_to_the_odes_solution(name):
    p = Parameterization(LinearPath(), "flow_prediction")
    network = GAUSSIAN.network(p)
    x = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors, counts = [], [32, 64, 128, 256]
    for n in counts:  # between two interior levels: a last step to sigma 0 is a floor
        scheduler = SCHEDULERS[name]().bind(p)
        scheduler.set_timesteps(timesteps=[1000 * (0.9 - 0.6 * i / n) for i in range(n + 1)])
        state = x
        for t in scheduler.timesteps[:-1]:
            state = scheduler.step(network(state, t), t, state).prev_sample
        exact = GAUSSIAN.ode(x, p.path.level(0.9), p.path.level(0.3))
        errors.append(float((state - exact).abs().max()))
    slope = torch.tensor([a / b for a, b in zip(errors, errors[1:], strict=False)]).log2().mean()
    assert float(slope) == pytest.approx(1.0, abs=0.1)


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
