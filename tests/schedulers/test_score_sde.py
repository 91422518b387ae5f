"""The reverse SDE: marginals as coefficient identities, and predictor-corrector sampling."""

import pytest
from analytic import GAUSSIAN, NETWORKS, sample

from gen_pipelines.processes import DATA, PATHS
from gen_pipelines.processes.level import Level
from gen_pipelines.schedulers import ScoreSDEScheduler
from gen_pipelines.schedulers.score_sde import langevin_coefficients, reverse_sde_coefficients

PATH = pytest.mark.parametrize("path", [cls() for cls in PATHS.values()], ids=lambda p: p.name)


def levels(path, *fractions):
    return [path.level(path.t_min + (path.t_max - path.t_min) * u) for u in fractions]


@PATH
@pytest.mark.parametrize("flow_time", [True, False])
def test_update_keeps_the_marginal_to_first_order(path, flow_time):
    """With the true x_0 and eps: the mean exactly, the variance with an error of second order (a quarter where the step is half)."""
    errors = []
    for width in (0.004, 0.002):
        here, there = levels(path, 0.6, 0.6 - width)
        c_0, c_eps, std = reverse_sde_coefficients(here, there, flow_time)
        assert c_0 == pytest.approx(there.alpha)
        errors.append(c_eps**2 + std**2 - there.sigma**2)
        assert std > 0
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.1)


@PATH
def test_noise_is_that_of_the_forward_process(path):
    """std^2 per time is g^2 = d sigma^2 / dt - 2 (d log alpha / dt) sigma^2."""
    t = path.t_min + 0.55 * (path.t_max - path.t_min)
    step = 1e-4 * (path.t_max - path.t_min)
    here, there = path.level(t), path.level(t - step)
    alpha, sigma, alpha_dot, sigma_dot = (float(f(t - 0.5 * step)) for f in (path.alpha, path.sigma, path.alpha_dot, path.sigma_dot))
    g_2 = 2 * sigma * sigma_dot - 2 * alpha_dot / alpha * sigma**2
    _, _, std = reverse_sde_coefficients(here, there)
    assert std**2 / step == pytest.approx(g_2, rel=2e-3)


@PATH
@pytest.mark.parametrize("snr", [0.05, 0.16, 0.4])
def test_langevin_keeps_the_marginal(path, snr):
    (here,) = levels(path, 0.5)
    c_0, c_eps, std = langevin_coefficients(here, snr)
    assert c_0 == here.alpha
    assert c_eps**2 + std**2 == pytest.approx(here.sigma**2)
    assert std == pytest.approx(2 * snr * here.sigma, rel=snr**2)  # Song et al.'s noise, sqrt(2 epsilon)


def test_pure_noise_and_data_are_finite():
    noise = Level(0.0, 1.0)
    assert reverse_sde_coefficients(noise, Level(0.1, 0.9), True) == pytest.approx((0.1, 0.8, 0.2**0.5))
    assert reverse_sde_coefficients(Level(0.9, 0.1), DATA) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("network", NETWORKS)
def test_predictor_corrector(network):
    p, grid = NETWORKS[network]
    scheduler = ScoreSDEScheduler(correct_steps=1).bind(p, grid)
    x = sample(scheduler, GAUSSIAN.network(p), (20_000,), steps=200)
    assert len(scheduler.timesteps) == 400
    assert scheduler.order == 2
    assert float(x.mean()) == pytest.approx(GAUSSIAN.mean, abs=0.02)
    assert float(x.std()) == pytest.approx(GAUSSIAN.std, abs=0.035)


def test_errors():
    for bad in ({"correct_steps": -1}, {"snr": 0.9}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            ScoreSDEScheduler(**bad).set_timesteps(3)
