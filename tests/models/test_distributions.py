"""Distributions of latents and pixels: sums, closed forms, tails."""

import math

import pytest
import torch
from torch.testing import assert_close

from gen_pipelines.models.layers.distributions import (
    BernoulliPixels,
    DiagonalGaussian,
    DiscretizedLogistic,
    GaussianPixels,
    parameters_per_value,
    pixels,
    standard_normal_log_prob,
)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("components", [1, 3])
@pytest.mark.parametrize("levels", [2, 4, 256])
def test_the_levels_probabilities_sum_to_one(components, levels):
    """At every scale, also where one bin holds everything and where the mean lies far outside."""
    shape = (24, components, 1, 1, 1)  # 24 pictures of one pixel
    scales = torch.linspace(-7, 3, 24, dtype=torch.float64).view(24, 1, 1, 1, 1).expand(shape)
    p = DiscretizedLogistic(random(*shape), 3 * random(*shape), scales, levels)
    x = 2 * torch.arange(levels, dtype=torch.float64) / (levels - 1) - 1
    total = sum(p.log_prob(value.expand(24, 1, 1, 1)).exp() for value in x)
    assert_close(total, torch.ones_like(total), rtol=1e-9, atol=1e-9)


def test_a_level_is_the_difference_of_two_sigmoids():
    means, log_scales = random(1, 1, 1, 2, 2) / 3, torch.full((1, 1, 1, 2, 2), -2.0, dtype=torch.float64)
    x = torch.tensor([10, 100, 128, 200], dtype=torch.float64).view(1, 1, 2, 2) / 127.5 - 1
    cdf = lambda v: torch.sigmoid((v - means[:, 0]) / log_scales[:, 0].exp())
    direct = (cdf(x + 1 / 255) - cdf(x - 1 / 255)).log().sum()
    assert_close(DiscretizedLogistic(means, means, log_scales).log_prob(x)[0], direct)


def test_a_level_far_from_the_mean_has_a_finite_log_probability_and_gradient():
    """In float32 a difference of sigmoids is 0 there, and its logarithm -inf."""
    means = torch.full((1, 1, 1, 1, 1), 0.9, requires_grad=True)
    p = DiscretizedLogistic(means, means, torch.full((1, 1, 1, 1, 1), -7.0))
    nats = p.log_prob(torch.full((1, 1, 1, 1), -0.5))
    nats.sum().backward()
    assert_close(nats.item(), -1.4 * math.exp(7), rtol=0.02, atol=0)
    assert math.isfinite(means.grad.item())
    assert means.grad.item() < 0


def test_the_divergence_from_the_prior_is_its_closed_form_and_its_samples_mean():
    q = DiagonalGaussian(random(1, 3), random(1, 3))
    known = torch.distributions.kl_divergence(torch.distributions.Normal(q.mean, q.std), torch.distributions.Normal(0.0, 1.0))
    assert_close(q.kl_per_dimension(), known)
    z = q.sample(random(400_000, 3))
    sampled = q.log_prob(z) - standard_normal_log_prob(z)
    error = sampled.std() / math.sqrt(len(z))
    assert abs(sampled.mean() - known.sum()) < 5 * error  # false alarm below 1e-6
    assert_close(q.log_prob(z[:9]), torch.distributions.Normal(q.mean, q.std).log_prob(z[:9]).sum(-1))


def test_bernoulli_and_gaussian_are_torchs_and_broadcast_over_draws():
    logits, x = random(3, 2, 1, 2, 2), torch.sign(random(2, 1, 2, 2))
    known = torch.distributions.Bernoulli(logits=logits).log_prob((x + 1) / 2).sum((2, 3, 4))
    assert_close(BernoulliPixels(logits).log_prob(x), known)
    assert_close(BernoulliPixels(torch.full((1, 1, 1, 1), 300.0)).log_prob(torch.full((1, 1, 1, 1), -1.0)), torch.tensor([-300.0]))
    scale = random(1, 1, 1)
    known = torch.distributions.Normal(logits, scale.exp()).log_prob(x).sum((2, 3, 4))
    assert_close(GaussianPixels(logits, scale).log_prob(x), known)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian", "discretized_logistic"])
@pytest.mark.parametrize("scale", ["shared", "per_pixel"])
def test_a_decoders_output_becomes_a_distribution_whose_samples_have_its_mean(likelihood, scale):
    components = 3 if likelihood == "discretized_logistic" else 1
    channels, count = 2, parameters_per_value(likelihood, scale, components)
    output = 0.3 * random(1, channels * count, 2, 2).expand(40_000, -1, -1, -1).float()
    shared = torch.full((channels, 1, 1), -2.0) if scale == "shared" and likelihood != "bernoulli" else None
    p = pixels(output, likelihood, channels, components, 8, shared)
    drawn = p.sample(torch.Generator().manual_seed(1))
    assert drawn.shape == p.mean.shape == (40_000, channels, 2, 2)
    assert (drawn.mean(0) - p.mean[0]).abs().max() < 0.12  # the ends gather what lies beyond, so a little is allowed
    if likelihood == "discretized_logistic":
        assert_close((drawn + 1) * 127.5, ((drawn + 1) * 127.5).round(), atol=1e-4, rtol=0)


def test_a_bounded_mean_is_the_grey_value_of_a_sigmoid():
    output = random(3, 2, 4, 4)
    p = pixels(output, "gaussian", 2, log_scale=torch.zeros(2, 1, 1), bounded_mean=True)
    assert_close((p.mean + 1) / 2, torch.sigmoid(output))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("poisson", "shared", 1), "none of bernoulli, gaussian, discretized_logistic"),
        (("gaussian", "learned", 1), "none of shared, per_pixel"),
        (("bernoulli", "shared", 2), "num_components 2"),
        (("discretized_logistic", "shared", 1, True), "bounded_mean: for the likelihood gaussian"),
    ],
)
def test_unknown_choices_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        parameters_per_value(*settings)
