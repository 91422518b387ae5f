"""Likelihoods of denoisers against closed forms: every parameterization's ideal network for Gaussian data has a known density."""

import math

import pytest
import torch
from analytic import GAUSSIAN, NETWORKS
from torch.testing import assert_close

from gen_pipelines.likelihood.denoiser import Denoiser, levels_log_prob, unit_level
from gen_pipelines.likelihood.ode import SOLVERS, ode_log_density, ode_log_likelihood
from gen_pipelines.likelihood.vlb import variational_bound
from gen_pipelines.processes import LinearPath, Parameterization

KINDS = {name: parameterization for name, (parameterization, _) in NETWORKS.items()}
FLOW = Parameterization(LinearPath(), "flow_prediction")


def generators(count, seed=0):
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def closed_form(x, low, high):
    """log p(x), nats (B,): the ideal flow is affine, z = c m + (x - m) slope at the noise's end, and z is standard normal there.

    (That a trained range ends before pure noise is a fault of the model, which its likelihood has to show.)
    """
    c, s = unit_level(low)
    slope = math.sqrt((c * GAUSSIAN.std) ** 2 + s**2) / math.sqrt(GAUSSIAN.std**2 + math.exp(-2 * high))
    z = c * GAUSSIAN.mean + (x - GAUSSIAN.mean) * slope
    return (torch.distributions.Normal(0.0, 1.0).log_prob(z) + math.log(slope)).flatten(1).sum(1)


@pytest.mark.parametrize("solver", ["adams", "rk4", "dopri5"])
@pytest.mark.parametrize("name", KINDS)
def test_the_flow_of_every_network_has_the_density_of_its_data(name, solver):
    """Within 1e-3 nats per dimension, whatever the network predicts and on whatever path, up to the very ends of its trained range."""
    denoiser = Denoiser(GAUSSIAN.network(KINDS[name]), KINDS[name])
    low, high = denoiser.lambda_range()
    x = GAUSSIAN.mean + GAUSSIAN.std * torch.randn(6, 5, dtype=torch.float64)
    log_p, _ = ode_log_density(denoiser, x, low, high, solver=solver, trace="exact")
    error = (log_p - closed_form(x, low, high)).abs().max() / 5
    assert error < 1e-3, error


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("adams", 3), ("rk4", 4)])
def test_solvers_converge_with_their_order(solver, order):
    """Twice the steps, 2^order less error; Adams begins with a step of lower order, so three of its formula's four are sure."""
    denoiser = Denoiser(GAUSSIAN.network(FLOW), FLOW)
    x = GAUSSIAN.mean + GAUSSIAN.std * torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = closed_form(x, -4.0, 3.0)
    coarse, fine = (
        (ode_log_density(denoiser, x, -4.0, 3.0, steps=steps, solver=solver, trace="exact")[0] - wanted).abs().mean() for steps in (64, 128)
    )
    assert 2 ** (order - 0.25) < coarse / fine < 2 ** (order + 1.25), coarse / fine


@pytest.mark.parametrize("solver", ["adams", "rk4", "dopri5"])
def test_solvers_agree_and_probes_are_unbiased(solver):
    """For a linear field without interaction every probe gives the trace itself; with one, their mean does."""
    mix = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    spread = torch.tensor([0.2, 0.4, 0.8, 1.6], dtype=torch.float64)
    covariance = mix @ torch.diag(spread**2) @ mix.T

    def network(x, time):
        t = float(FLOW.path_time(float(time)))
        level = FLOW.path.level(min(max(t, 0.0), 1.0))
        gain = level.alpha * covariance @ torch.linalg.inv(level.alpha**2 * covariance + level.sigma**2 * torch.eye(4, dtype=x.dtype))
        x_0 = x @ gain.T
        return FLOW.target(x_0, (x - level.alpha * x_0) / level.sigma, t)

    denoiser = Denoiser(network, FLOW)
    x = torch.randn(1, 4, dtype=torch.float64).expand(256, 4)
    low, high = denoiser.lambda_range(high=4.0)
    expected = torch.distributions.MultivariateNormal(
        torch.zeros(4, dtype=torch.float64), covariance + math.exp(-8.0) * torch.eye(4, dtype=torch.float64)
    ).log_prob(x[:1])
    exact, _ = ode_log_density(denoiser, x[:1], low, high, steps={"adams": 128}.get(solver, 64), solver=solver, trace="exact")
    assert_close(exact, expected, rtol=0, atol=2e-3)
    probed, _ = ode_log_density(denoiser, x, low, high, generators(256), steps=64, solver=solver)
    assert probed.std() > 0.01
    assert abs(probed.mean() - expected.item()) < 4 * probed.std() / 16


def gaussian_levels(count, dims, seed=0):
    """8-bit pictures of the Gaussian data, (count, 1, 1, dims), and their probabilities, nats (count,)."""
    x = GAUSSIAN.mean + GAUSSIAN.std * torch.randn(count, 1, 1, dims, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    levels = ((x + 1) * 127.5).round().clamp(0, 255).long()
    # the density of the data times the width of a level
    values = levels.double() / 127.5 - 1
    nats = (torch.distributions.Normal(GAUSSIAN.mean, GAUSSIAN.std).log_prob(values) + math.log(2 / 255)).flatten(1).sum(1)
    return levels, nats


@pytest.mark.parametrize("closing", ["uniform", "decoder"])
def test_8_bit_pictures_cost_what_they_should(closing):
    """A bound by little: the mean over pictures is within a few hundredths of a bit of the truth, from below."""
    levels, nats = gaussian_levels(256, 8)
    network = GAUSSIAN.network(FLOW)
    high = {"uniform": 7.0, "decoder": 6.0}[closing]  # the noise of a decoder fills a level
    result = ode_log_likelihood(network, FLOW, levels, generator=generators(256), closing=closing, lambda_range=(None, high), steps=24)
    assert result.kind == "ode" and result.num_function_evaluations == 25 and result.bits_per_dim.shape == (256,)
    loss = (nats - result.nats).mean() / 8 / math.log(2)
    assert -0.002 < loss < {"uniform": 0.005, "decoder": 0.03}[closing], loss
    assert result.dequantization == {"uniform": "uniform", "decoder": "gaussian"}[closing]


def test_the_variational_bound_rises_to_the_truth_with_more_steps():
    levels, nats = gaussian_levels(256, 8)
    network = GAUSSIAN.network(FLOW)
    gaps = []
    for steps in (10, 160, 320):
        result = variational_bound(network, FLOW, levels, generator=generators(256), steps=steps, lambda_range=(None, 6.0))
        assert result.kind == "vlb" and result.num_function_evaluations == steps
        gaps.append(((nats - result.nats).mean() / 8).item())
    assert gaps[0] > gaps[1] > gaps[2] > 0
    assert abs(2 * gaps[2] - gaps[1]) < 0.02, gaps                                                     # what is left falls as 1 / steps


def test_levels_given_a_noisy_picture_sum_to_one_and_choose_the_nearest():
    y = torch.tensor([[-1.02, -0.5, 0.3, 1.01]])
    for deviation in (0.002, 0.05):
        every = torch.stack([levels_log_prob(torch.full((1, 1), k), y[:, i : i + 1], deviation) for k in range(256) for i in range(4)])
        assert_close(every.view(256, 4).logsumexp(0), torch.zeros(4), rtol=0, atol=1e-4)
    nearest = ((y + 1) * 127.5).round().clamp(0, 255)
    assert_close(levels_log_prob(nearest, nearest / 127.5 - 1 + 1e-4, 1e-4), torch.zeros(1))


@pytest.mark.parametrize("closing", ["uniform", "decoder"])
def test_bounds_on_a_toy_space_sum_to_at_most_one(closing):
    """Two pixels of four levels: a model of real numbers gives each picture a share, and shares are probabilities.

    Bounds that are decoded from a little noise are loose here: the model's numbers lie between the levels too.
    """
    levels = torch.cartesian_prod(torch.arange(4), torch.arange(4)).view(16, 1, 1, 2)
    network = GAUSSIAN.network(FLOW)
    options = {"num_bits": 2, "lambda_range": (None, 5.0), "steps": 16}
    result = ode_log_likelihood(network, FLOW, levels, num_samples=32, generator=generators(16), closing=closing, **options)
    assert (0.3 if closing == "uniform" else 0.0) < result.nats.exp().sum() <= 1.0
    bound = variational_bound(network, FLOW, levels, num_samples=32, generator=generators(16), num_bits=2, lambda_range=(None, 5.0))
    assert 0.0 < bound.nats.exp().sum() <= 1.0


def test_a_picture_with_its_generator_does_not_depend_on_the_batch_and_padding_is_counted():
    levels, _ = gaussian_levels(4, 6)
    network = GAUSSIAN.network(FLOW)
    for function in (ode_log_likelihood, variational_bound):
        many = function(network, FLOW, levels, generator=generators(4), steps=8)
        one = function(network, FLOW, levels[2:3], generator=generators(1, seed=2), steps=8)
        assert_close(many.nats[2:3], one.nats, rtol=1e-5, atol=1e-4)
        fewer = function(network, FLOW, levels, num_dims=3, generator=generators(4), steps=8)
        assert torch.equal(fewer.nats, many.nats)
        assert torch.allclose(fewer.bits_per_dim, 2 * many.bits_per_dim)




@pytest.mark.parametrize(("options", "message"), [
    ({"solver": "rk45"}, "none of adams, rk4, heun, euler, dopri5"),
    ({"trace": "all"}, "none of hutchinson, exact"),
    ({"closing": "open"}, "none of uniform, decoder"),
    ({"steps": 0}, "at least 1"),
    ({"num_samples": 0}, "at least 1"),
    ({"lambda_range": (3.0, 2.0)}, "nothing in common"),
])  # fmt: skip
def test_bad_input_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        ode_log_likelihood(lambda x, t: pytest.fail("evaluated"), FLOW, torch.zeros(1, 1, 2, 2, dtype=torch.long), **options)


def test_a_network_that_breaks_down_is_an_error():
    with pytest.raises(ValueError, match="not finite"):
        ode_log_likelihood(lambda x, t: x * math.nan, FLOW, torch.zeros(1, 1, 2, 2, dtype=torch.long))


def test_unit_levels_are_a_point_on_the_circle():
    for lambda_ in (-9.0, 0.0, 3.0):
        c, s = unit_level(lambda_)
        assert_close(torch.tensor([c**2 + s**2, math.log(c / s)]), torch.tensor([1.0, lambda_]))


def test_the_default_takes_49_evaluations_and_the_others_96():
    denoiser = Denoiser(GAUSSIAN.network(FLOW), FLOW)
    x = torch.randn(2, 3, dtype=torch.float64)
    for low, high in ((-7.0, 7.0), (-5.0, 4.4)):
        assert ode_log_density(denoiser, x, low, high)[1] == 49
    for solver in ("euler", "heun", "rk4"):
        assert ode_log_density(denoiser, x, -7.0, 7.0, solver=solver)[1] == 96
    default, tight = (
        ode_log_density(denoiser, x, -7.0, 7.0, torch.Generator().manual_seed(0), **options)[0] for options in ({}, {"solver": "dopri5"})
    )
    assert (default - tight).abs().max() / 3 < 0.01 * math.log(2)  # 0.01 bits per dimension


@pytest.mark.parametrize("solver", SOLVERS)
def test_half_precision_is_integrated_in_float32(solver):
    denoiser = Denoiser(GAUSSIAN.network(FLOW), FLOW)
    log_p, _ = ode_log_density(denoiser, torch.randn(2, 3).half(), -2.0, 2.0, steps=2, solver=solver, tolerance=1e-2)
    assert log_p.dtype == torch.float32
