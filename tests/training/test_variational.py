"""DDPM's variational bound against distributions of torch, Monte Carlo against the pipeline's bound, and where its gradients go."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from gen_pipelines.likelihood.vlb import variational_bound
from gen_pipelines.processes import PATHS, Parameterization
from gen_pipelines.schedulers.ddpm import upper_std
from gen_pipelines.schedulers.updates import posterior_coefficients, posterior_std
from gen_pipelines.training.objectives.denoising import DenoisingObjective
from gen_pipelines.training.objectives.time_densities import UniformLambda
from gen_pipelines.training.objectives.variational import VariationalObjective, bin_log_prob

PATH = PATHS["discrete_vp"](num_train_timesteps=20, beta_end=0.5)
VARIANCES = ["fixed_small", "fixed_large", "learned_range", "learned"]


def generators(count, seed=0):
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_a_step_of_the_bound_is_the_divergence_of_the_papers_gaussians(variance, prediction):
    """KL(q(x_(i-1) | x_i, x_0), p(x_(i-1) | x_i)) by torch, with the sampler's own mean and deviations (Ho et al. 2020, eqs. 6 to 8)."""
    p = Parameterization(PATH, prediction, variance=variance)
    objective = VariationalObjective(p, simple=0.0, bound=1.0)
    x_0, x_t, output = (torch.randn(1, 2, 3, dtype=torch.float64) for _ in range(3))
    learned = torch.rand(1, 2, 3, dtype=torch.float64) if variance.startswith("learned") else None
    for i in (1, 7, 19):
        here, there = PATH.level(i), PATH.level(i - 1)
        c_0, c_x = posterior_coefficients(here, there)
        guess, _ = p.with_(variance=None).denoise(output, x_t, float(i))
        small, large = posterior_std(here, there), upper_std(here, there)
        std = {"fixed_small": small, "fixed_large": large}.get(variance)
        if variance == "learned_range":  # Nichol & Dhariwal 2021, eq. 15
            std = torch.exp((learned + 1) / 2 * math.log(large) + (1 - learned) / 2 * math.log(small))
        if variance == "learned":
            std = learned.sqrt()
        true, model = Normal(c_0 * x_0 + c_x * x_t, small), Normal(c_0 * guess + c_x * x_t, std)
        got = objective.step_bound(x_0, x_t, torch.tensor([float(i)], dtype=torch.float64), output, learned)
        assert_close(got, kl_divergence(true, model).mean()[None], rtol=1e-5, atol=1e-7)


def test_the_bins_of_the_decoder_share_all_of_the_probability():
    x = torch.arange(256, dtype=torch.float64) * 2 / 255 - 1
    for mean in (-1.2, -1.0, 0.1, 0.999, 3.0):
        for std in (1e-3, 0.1, 5.0):
            log_p = bin_log_prob(x, torch.full_like(x, mean), torch.full_like(x, math.log(std)))
            assert_close(log_p.logsumexp(0), torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-6)
    far = torch.tensor([-1.0, 1.0, 0.0], requires_grad=True)  # a mean that is thousands of deviations away
    log_p = bin_log_prob(torch.tensor([1.0, -1.0, 0.5]), far, torch.full((3,), math.log(1e-4)))
    log_p.sum().backward()
    assert torch.isfinite(log_p).all() and torch.isfinite(far.grad).all()


def test_the_loss_is_unbiased_for_the_bound_of_the_whole_chain():
    """N E_i L_i is the sum over the chain that `variational_bound` takes on the same levels (fixed_small), but for the end at index 0."""
    p = Parameterization(PATH, "epsilon", variance="fixed_small")
    network = lambda x, t, condition=None: 0.7 * x
    x_0 = (torch.randint(0, 256, (1, 1, 2, 2), generator=torch.Generator().manual_seed(0)).double() * 2 / 255 - 1).expand(4000, 1, 2, 2)
    steps = torch.arange(1, 20, dtype=torch.float64)
    objective = VariationalObjective(p, simple=0.0, bound=1.0)
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros(4000, dtype=torch.float64)
    for i in steps:
        alpha, sigma = PATH.level(float(i))
        x_t = alpha * x_0 + sigma * torch.randn(x_0.shape, generator=generator, dtype=torch.float64)
        total += objective.step_bound(x_0, x_t, i.repeat(4000), network(x_t, i))
    assert total.std() > 0  # the mean of 4000 has an error of one sixtieth of it
    # Kingma et al. 2021, eq. 14: the same sum by squared errors of x_0, at the same levels
    expected = torch.zeros(4000, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    for i in steps:
        here, there = PATH.level(float(i)), PATH.level(float(i - 1))
        x_t = here.alpha * x_0 + here.sigma * torch.randn(x_0.shape, generator=generator, dtype=torch.float64)
        guess = (x_t - here.sigma * network(x_t, i)) / here.alpha
        snr = [(level.alpha / level.sigma) ** 2 for level in (here, there)]
        expected += 0.5 * (snr[1] - snr[0]) * (x_0 - guess).square().flatten(1).mean(1)
    assert_close(total, expected, rtol=1e-5, atol=1e-6)
    assert callable(variational_bound)
    many = objective(lambda x, t, c: 0.7 * x, x_0.float(), generator=torch.Generator().manual_seed(2))
    assert many.per_sample.shape == (4000,) and torch.equal(many.per_sample.detach(), many.metrics["bound"])
    # an index of 20 is the first one, whose decoder costs more: compared without it
    drawn = torch.rand(4000, 1, generator=torch.Generator().manual_seed(2))[:, 0]
    rest = many.per_sample[drawn >= 1 / 20].double()
    error = rest.std() / math.sqrt(len(rest))
    assert abs(rest.mean() * 19 / 20 - total.mean()) < 5 * error  # one seed in a million


def test_the_hybrid_loss_trains_the_mean_by_the_simple_loss_alone():
    """Nichol & Dhariwal 2021, section 3.1: the bound's gradient reaches the variance, and not the mean."""
    p = Parameterization(PATH, "epsilon", variance="learned_range")
    mean, variance = (torch.tensor(0.3, requires_grad=True) for _ in range(2))
    model = lambda x, t, condition: torch.cat([mean * x, variance * torch.ones_like(x)], dim=1)
    x_0 = torch.randn(8, 1, 4, 4).clamp(-1, 1)
    grads = {}
    for name, (simple, bound) in {"hybrid": (1.0, 0.1), "more": (1.0, 0.2), "bound": (0.0, 1.0)}.items():
        mean.grad = variance.grad = None
        VariationalObjective(p, simple, bound)(model, x_0, generator=generators(8)).per_sample.mean().backward()
        grads[name] = mean.grad.clone(), variance.grad.clone()
    assert_close(grads["hybrid"][0], grads["more"][0])
    assert_close(grads["hybrid"][1] * 2, grads["more"][1])
    assert grads["bound"][0].abs() > 0 and grads["bound"][1].abs() > 0
    simple = DenoisingObjective(Parameterization(PATH, "epsilon"))(lambda x, t, c: 0.3 * x, x_0, generator=generators(8)).per_sample
    out = VariationalObjective(p, 1.0, 0.1)(model, x_0, generator=generators(8))
    assert_close(out.metrics["simple"], simple)
    assert_close(out.per_sample.detach(), simple + 0.1 * out.metrics["bound"])


def test_the_best_variance_of_a_perfect_network_is_the_posteriors():
    """With the mean right, eq. 15's share of the upper deviation goes to 0: the bound is a divergence, and vanishes there."""
    p = Parameterization(PATH, "sample", variance="learned_range")
    x_0, x_t = torch.zeros(1, 1, 2, 2, dtype=torch.float64), torch.randn(1, 1, 2, 2, dtype=torch.float64)
    at = torch.tensor([5.0], dtype=torch.float64)
    values = [VariationalObjective(p).step_bound(x_0, x_t, at, x_0, torch.full_like(x_0, v)).item() for v in (-1.0, -0.9, 0.0, 1.0)]
    assert abs(values[0]) < 1e-9 and values == sorted(values)


@pytest.mark.parametrize("name", ["vp_sde", "ve", "sub_vp"])
def test_uniform_lambda_has_the_mean_of_the_likelihood_weighting_with_less_variance(name):
    """The weighted error of one in eps, over both time densities: equal means (Song et al. 2021b, section 4.2)."""
    p = Parameterization(PATHS[name](), "epsilon", time_input=None)
    uniform, spread = DenoisingObjective(p, weighting="likelihood"), DenoisingObjective(p, UniformLambda(), "likelihood")
    u = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
    one, other = (o.weight(o.time_density(u, p)) for o in (uniform, spread))
    assert_close(one.mean(), other.mean(), rtol=3e-3, atol=0)
    assert other.std() < 1e-9 < one.std() or name == "ve"  # on VE uniform is uniform in lambda


@pytest.mark.parametrize(("make", "message"), [
    (lambda: VariationalObjective(Parameterization(PATHS["vp_sde"](), "epsilon")), "discrete path"),
    (lambda: VariationalObjective(Parameterization(PATH, "epsilon"), 0.0, 0.0), "not both 0"),
    (lambda: VariationalObjective(Parameterization(PATH, "epsilon", variance="learned"), 1.0, 0.0), "trains no variance"),
])  # fmt: skip
def test_what_makes_no_sense_says_why(make, message):
    with pytest.raises(ValueError, match=message):
        make()
