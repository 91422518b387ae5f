"""Bounds of autoencoders: they are bounds, they rise with k, and their unit does not depend on how they are asked for."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from gen_pipelines import VAEModel, VAEPipeline
from gen_pipelines.likelihood import to_levels
from gen_pipelines.likelihood.collapse import latent_diagnostics
from gen_pipelines.likelihood.elbo import elbo
from gen_pipelines.likelihood.iwae import iwae


def toy(likelihood: str = "discretized_logistic", seed: int = 0, **changes) -> VAEModel:
    """2 pixels x 4 levels, two latents, with weights that make the latents matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VAEModel(
            sample_size=(1, 2), encoder_type="mlp", decoder_type="mlp", hidden_sizes=(8,), latent_dim=2, likelihood=likelihood,
            num_bits=1 if likelihood == "bernoulli" else 2, **changes,
        )  # fmt: skip
        for parameter in model.parameters():
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model.double().eval()


def space(levels: int) -> torch.Tensor:
    """Every picture of 2 pixels, (levels^2, 1, 1, 2)."""
    return torch.tensor(list(itertools.product(range(levels), repeat=2))).view(-1, 1, 1, 2)


def exact(model: VAEModel, levels: torch.Tensor, points: int = 81) -> torch.Tensor:
    """log p of every picture, z integrated on a grid over [-8, 8]^2."""
    axis = torch.linspace(-8, 8, points, dtype=torch.float64)
    z = torch.cartesian_prod(axis, axis)
    weight = -0.5 * z.square().sum(1) - math.log(2 * math.pi) + 2 * math.log(16 / (points - 1))
    top = 2**model.config.num_bits - 1
    with torch.no_grad():
        p = model.decode(z[:, None]).distribution
        return torch.stack([torch.logsumexp(p.log_prob(x[None]).sum(1) + weight, 0) for x in levels.double() * 2 / top - 1])


@pytest.mark.parametrize("likelihood", ["discretized_logistic", "bernoulli"])
@pytest.mark.parametrize("changes", [{}, {"committed_rate": 1.0}])
def test_on_a_toy_space_bounds_lie_below_the_exact_probabilities_which_sum_to_one(likelihood, changes):
    model = toy(likelihood, **changes)
    levels = space(2**model.config.num_bits)
    log_p = exact(model, levels)
    assert_close(log_p.exp().sum().item(), 1.0, atol=1e-6, rtol=0)
    totals = []
    for result in (
        elbo(model, levels, 2000, torch.Generator().manual_seed(1)),
        iwae(model, levels, 2000, torch.Generator().manual_seed(1)),
    ):
        assert (result.nats <= log_p + 6 * result.stderr + 0.02).all()
        totals.append(result.nats.exp().sum().item())
    assert totals[0] < 0.999  # the bound of these weights is not tight, or the next lines would show nothing
    assert totals[0] < totals[1] < 1.02
    assert abs(totals[1] - 1) < 0.12  # with enough draws the importance-weighted one nearly is


def test_the_bound_of_a_density_counts_the_bins():
    """A Gaussian decoder speaks of real values: over all pictures its dequantised bound still sums to at most one."""
    model = toy("gaussian", scale="shared", min_log_scale=-3.0)
    result = iwae(model, space(4), 1000, torch.Generator().manual_seed(0))
    assert result.dequantization == "uniform"
    assert result.nats.exp().sum() < 1.02
    assert result.bits_per_dim.shape == (16,)


def test_the_importance_weighted_bound_rises_with_k_from_the_elbo():
    model, levels = toy(), space(4).repeat(60, 1, 1, 1)
    bound = lambda k: iwae(model, levels, k, torch.Generator().manual_seed(k), batch_size=960).nats.mean().item()
    means = [elbo(model, levels, 20, torch.Generator().manual_seed(0), batch_size=960).nats.mean().item()]
    means += [bound(k) for k in (1, 2, 5, 20, 100)]
    assert abs(means[0] - means[1]) < 0.05 * abs(means[0])  # one draw is the ELBO
    assert means[1:] == sorted(means[1:])
    assert means[-1] - means[1] > 0.05


def test_a_picture_has_one_number_whatever_batch_and_form_it_comes_in():
    """Batch sizes, uint8, floats in [-1, 1], PIL, and by hand."""
    pipe = VAEPipeline(toy_28())
    levels = torch.randint(0, 256, (5, 1, 8, 8), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    own = lambda: [torch.Generator().manual_seed(i) for i in range(5)]
    whole = pipe.log_likelihood(levels, generator=own(), num_samples=3)
    assert_close(pipe.log_likelihood(levels.float() / 127.5 - 1, generator=own(), num_samples=3).nats, whole.nats)
    again = to_levels(levels.float() / 255, value_range=(0, 1))  # the other range has to be said
    assert_close(pipe.log_likelihood(again, generator=own(), num_samples=3).nats, whole.nats)
    from PIL import Image

    pictures = [Image.fromarray(picture[0].numpy()) for picture in levels]
    single = torch.cat([pipe.log_likelihood(p, generator=[g], num_samples=3).bits_per_dim for p, g in zip(pictures, own())])
    assert_close(single, whole.bits_per_dim, rtol=1e-5, atol=0)
    assert_close(whole.bits_per_dim, -whole.nats / (64 * math.log(2)))
    small = elbo(pipe.vae, levels, 3, torch.Generator().manual_seed(0), batch_size=2)
    assert_close(small.nats, elbo(pipe.vae, levels, 3, torch.Generator().manual_seed(0)).nats)
    assert whole.kind == "elbo"
    assert whole.stderr.shape == (5,)


def toy_28() -> VAEModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VAEModel(sample_size=8, block_out_channels=(8,), latent_dim=3).eval()


def test_two_pixels_by_hand():
    """Weights that ignore z: the bound is the likelihood minus the divergence, both known."""
    model = toy()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.to_moments.bias.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    inside = lambda a, b: math.log(1 / (1 + math.exp(-a)) - 1 / (1 + math.exp(-b)))
    s, h = math.exp(-1.5), 1 / 3
    nats = math.log(1 / (1 + math.exp(-((-1 + h) / s)))) + inside((1 / 3 + h) / s, (1 / 3 - h) / s) - 0.5
    result = elbo(model, torch.tensor([0, 2]).view(1, 1, 1, 2), 2)
    assert_close(result.nats.item(), nats, rtol=1e-6, atol=0)
    assert_close(result.bits_per_dim.item(), -nats / (2 * math.log(2)), rtol=1e-6, atol=0)


def test_a_binary_model_gives_nats_of_binarised_pictures_only():
    pipe = VAEPipeline(toy("bernoulli").float())
    grey = torch.full((2, 1, 1, 2), 100, dtype=torch.uint8)
    result = pipe.log_likelihood(grey >> 7 << 7 | 127, generator=torch.Generator().manual_seed(0))
    assert result.bits_per_dim is None
    assert result.dequantization == "dynamic binarization"


def test_many_draws_are_decoded_in_parts_and_counted_all(monkeypatch):
    import gen_pipelines.likelihood.iwae as module

    model, levels = toy_28(), torch.randint(0, 256, (5, 1, 8, 8), generator=torch.Generator().manual_seed(3))
    whole = iwae(model, levels, 23, torch.Generator().manual_seed(0))
    monkeypatch.setattr(module, "ROWS", 7)
    decoded = []
    monkeypatch.setattr(model, "decode", lambda z: decoded.append(z.shape[0]) or VAEModel.decode(model, z))
    parts = iwae(model, levels, 23, torch.Generator().manual_seed(0), batch_size=2)
    assert_close(parts.nats, whole.nats)
    assert_close(parts.stderr, whole.stderr, rtol=1e-3, atol=1e-6)
    assert sum(decoded) == 3 * 23
    assert max(decoded) <= 7
    assert whole.num_function_evaluations == 23


def test_a_model_that_gives_no_number_is_an_error_and_not_left_out():
    model = toy_28()
    model.decoder.conv_out.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="2 of 2 log-likelihoods are not finite"):
        elbo(model, torch.zeros(2, 1, 8, 8, dtype=torch.long), 2)


def test_nothing_random_is_taken_from_the_global_state():
    pipe = VAEPipeline(toy_28())
    levels = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    before = torch.get_rng_state()
    first = pipe.log_likelihood(levels, generator=torch.Generator().manual_seed(0), kind="iwae", num_samples=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert_close(pipe.log_likelihood(levels, generator=torch.Generator().manual_seed(0), kind="iwae", num_samples=5).nats, first.nats)


def test_diagnostics_tell_a_collapsed_posterior_from_one_that_speaks():
    model = toy_28()
    levels = torch.randint(0, 256, (300, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    batches = list((levels / 127.5 - 1).split(100))
    generator = lambda: torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.to_moments.weight.zero_()
        model.to_moments.bias.zero_()
        silent = latent_diagnostics(model, batches, generator())
        # dimension 0 says which of the pictures it is, exactly; 1 a little; 2 nothing
        torch.nn.init.normal_(model.to_moments.weight[0], std=2.0, generator=generator())
        model.to_moments.bias[3] = -12.0
        torch.nn.init.normal_(model.to_moments.weight[1], std=0.02, generator=generator())
        speaking = latent_diagnostics(model, batches, generator())
    assert silent.active_units == 0
    assert silent.kl_per_dimension.abs().max() == 0
    assert abs(silent.mutual_information) < 1e-4
    assert speaking.active_units in (1, 2)
    assert speaking.kl_per_dimension[0] > 1
    assert speaking.kl_per_dimension[2] == 0
    assert math.log(300) - 0.7 < speaking.mutual_information <= math.log(300) + 1e-4 == speaking.max_mutual_information + 1e-4
    with pytest.raises(ValueError, match="at least 2"):
        latent_diagnostics(model, [batches[0][:1]])
