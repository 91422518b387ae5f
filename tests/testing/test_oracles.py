"""The oracles are what they say: posterior means, flows and networks against definitions that are written another way."""

import math

import pytest
import torch
from torch.testing import assert_close

from gen_pipelines.processes import DATA, PATHS, EDMPath, LinearPath, Parameterization
from gen_pipelines.processes.level import Level
from gen_pipelines.testing import CONSISTENCY_NETWORKS, NETWORKS, OTHER_NETWORKS, GaussianOracle, MixtureOracle, moment_errors
from gen_pipelines.testing.linear import NotLinearError, propagate
from gen_pipelines.testing.oracle import native_time

COVARIANCE = torch.tensor([[0.09, 0.05, 0.0], [0.05, 0.16, -0.02], [0.0, -0.02, 0.04]], dtype=torch.float64)
MEAN = torch.tensor([0.5, -0.3, 0.1], dtype=torch.float64)
CORRELATED = GaussianOracle(MEAN, covariance=COVARIANCE)
_TWO = (GaussianOracle((0.6, 0.4, 0.0), (0.15, 0.2, 0.3)), GaussianOracle(-MEAN, covariance=0.2 * COVARIANCE))
CLUSTERS = MixtureOracle((1.0, 3.0), _TWO)
ALL = {"number": GaussianOracle(0.5, 0.3), "vector": GaussianOracle((0.5, -0.3), (0.3, 0.1)), "correlated": CORRELATED, "mixture": CLUSTERS,
       "mixture of numbers": MixtureOracle((0.4, 0.6), (GaussianOracle(-0.5, 0.1), GaussianOracle(0.4, 0.2)))}  # fmt: skip
LEVELS = [Level(0.8, 0.3), Level(0.1, 0.95), Level(1.0, 20.0), Level(0.0, 1.0)]
EVERY = {**NETWORKS, **OTHER_NETWORKS}


def points(oracle, count=6):
    return torch.randn(count, *oracle.event_shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def log_density(oracle, x, level):
    """Of x = alpha x_0 + sigma eps, by its own formula: torch's distributions."""
    if isinstance(oracle, MixtureOracle):
        return torch.logsumexp(torch.stack([math.log(w) + log_density(c, x, level) for w, c in zip(oracle.weights, oracle.components)]), 0)
    mean, covariance = oracle.moments()
    noisy = level.alpha**2 * covariance + level.sigma**2 * torch.eye(len(mean), dtype=torch.float64)
    if not oracle.event_shape:
        return torch.distributions.Normal(level.alpha * mean[0], noisy[0, 0].sqrt()).log_prob(x)
    return torch.distributions.MultivariateNormal(level.alpha * mean, noisy).log_prob(x)


@pytest.mark.parametrize("level", LEVELS[:3])
@pytest.mark.parametrize("oracle", ALL.values(), ids=ALL)
def test_the_posterior_mean_is_tweedies(oracle, level):
    """E[x_0 | x] = (x + sigma^2 grad log p(x)) / alpha."""
    x = points(oracle).requires_grad_()
    score = torch.autograd.grad(log_density(oracle, x, level).sum(), x)[0]
    assert_close(oracle.x_0(x, *level), (x + level.sigma**2 * score) / level.alpha)


@pytest.mark.parametrize("oracle", ALL.values(), ids=ALL)
def test_pure_noise_says_nothing_but_the_mean(oracle):
    x = points(oracle)
    assert_close(oracle.x_0(x, 0.0, 1.0), oracle.moments()[0].reshape(oracle.event_shape).expand_as(x))
    assert_close(oracle.x_0(x, 1.0, 0.0), x)


@pytest.mark.parametrize("oracle", ALL.values(), ids=ALL)
def test_draws_have_the_moments(oracle):
    """100,000 draws: standard errors below 0.002."""
    x = oracle.draw(100_000, torch.Generator().manual_seed(0))
    errors = moment_errors(x, oracle)
    assert errors["mean"] < 0.006
    assert errors["spread"] < 0.006
    assert moment_errors(x + 0.1, oracle)["mean"] == pytest.approx(0.1, abs=0.01)
    assert moment_errors(1.2 * x, oracle)["spread"] > 0.02


@pytest.mark.parametrize("path", [cls() for cls in PATHS.values()], ids=lambda p: p.name)
@pytest.mark.parametrize("oracle", [ALL["number"], CORRELATED], ids=["number", "correlated"])
def test_the_flow_solves_the_ode(oracle, path):
    """dx/dt = alpha' E[x_0 | x] + sigma' E[eps | x], by a central difference; and there and back is where one was."""
    t = path.t_min + 0.4 * (path.t_max - path.t_min)
    h = 1e-5 * (path.t_max - path.t_min) if path.name != "discrete_vp" else 0.25  # log sigma is linear between whole indices
    t = math.floor(t) + 0.5 if path.name == "discrete_vp" else t
    x, here = points(oracle), path.level(t)
    velocity = (oracle.ode(x, here, path.level(t + h)) - oracle.ode(x, here, path.level(t - h))) / (2 * h)
    x_0 = oracle.x_0(x, *here)
    expected = float(path.alpha_dot(t)) * x_0 + float(path.sigma_dot(t)) * (x - here.alpha * x_0) / here.sigma
    assert_close(velocity, expected, rtol=1e-4, atol=1e-6)
    assert_close(oracle.ode(oracle.ode(x, here, DATA), DATA, here), x)


@pytest.mark.parametrize("name", EVERY)
def test_the_network_says_the_posterior_mean(name):
    p, _ = EVERY[name]
    network = CORRELATED.network(p)
    low, high = p.trained_t_range
    for t in (low + 0.2 * (high - low), low + 0.9 * (high - low)):
        time, level = p.network_time(t), p.path.level(t)
        x = points(CORRELATED) * max(1.0, level.sigma)
        x_0, eps = p.denoise(network(x * p.input_scale(level), time), x, t)
        assert_close(x_0, CORRELATED.x_0(x, *level), rtol=1e-5, atol=1e-6)
        assert_close(level.alpha * x_0 + level.sigma * eps, x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CONSISTENCY_NETWORKS)
def test_the_consistency_network_says_where_the_curve_ends(name):
    p, _ = CONSISTENCY_NETWORKS[name]
    network, t = CORRELATED.consistency_network(p), 0.7 * p.path.t_max
    level = p.path.level(t)
    x = points(CORRELATED) * max(1.0, level.sigma)
    end = p.path.level(p.path.t_min) if p.prediction == "consistency" else DATA
    assert_close(p.denoise(network(x * p.input_scale(level), p.network_time(t)), x, t)[0], CORRELATED.ode(x, level, end))


def test_a_network_can_be_asked_at_any_time():
    """A scheduler that takes it for another kind of network does."""
    p = Parameterization(EDMPath(), "edm", sigma_data=0.5)
    assert native_time(p, 999) == 80.0
    assert native_time(p, -1e9) == 0.002
    assert native_time(p, math.nan) == 80.0
    assert native_time(Parameterization(LinearPath(), "flow_prediction"), 2000.0) == 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianOracle((0.0, 0.0), 1.0, covariance=COVARIANCE), "give one"),
        (lambda: GaussianOracle(MEAN, covariance=((1.0, 2.0), (0.0, 1.0))), "symmetric"),
        (lambda: GaussianOracle((0.0, 0.0), covariance=((1.0, 2.0), (2.0, 1.0))), "eigenvalue -1"),
        (lambda: GaussianOracle((0.0, 0.0), (1.0, -1.0)), "no spread below 0"),
        (lambda: GaussianOracle((0.0, 0.0), (1.0, 1.0, 1.0)), "give D numbers"),
        (lambda: MixtureOracle((1.0,), ()), "1 weights for 0 components"),
        (lambda: MixtureOracle((1.0, 0.0), (CORRELATED, CORRELATED)), "above 0"),
        (lambda: MixtureOracle((1.0, 1.0), (CORRELATED, GaussianOracle())), "use one"),
    ],
)
def test_bad_oracles_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---------------------------------------------------------------------------------------------------------------- loops as linear maps


def autoregression(x):
    """x' = 0.5 x + 0.1 + 0.3 z, then 2 x' + z' - z."""
    z = torch.randn(x.shape, dtype=x.dtype)
    a = 0.5 * x + 0.1 + 0.3 * z
    return [x, a, 2 * a + torch.randn_like(x) - z]


def test_the_map_is_read_off():
    loop = propagate(autoregression)
    assert loop.draws == 2
    assert_close(loop.gain, torch.tensor([1.0, 0.5, 1.0], dtype=torch.float64))
    assert_close(loop.offset, torch.tensor([0.0, 0.1, 0.2], dtype=torch.float64))
    assert_close(loop.variance, torch.tensor([0.0, 0.09, 0.16 + 1.0], dtype=torch.float64))
    mean, std = loop.moments(1.0, 4.0)
    assert_close(mean, torch.tensor([1.0, 0.6, 1.2], dtype=torch.float64))
    assert_close(std, torch.tensor([4.0, 1.09, 5.16], dtype=torch.float64).sqrt())


def test_what_is_no_affine_map_is_noticed():
    with pytest.raises(NotLinearError, match="sum of its parts"):
        propagate(lambda x: [x, x.clamp(-1, 1)])
    with pytest.raises(NotLinearError, match="noise of shape"):
        propagate(lambda x: [x, x + torch.randn(len(x), 3).sum(1, keepdim=True)])
