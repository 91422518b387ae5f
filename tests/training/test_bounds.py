"""Losses of variational autoencoders: values, gradients, and what keeps a posterior from collapsing."""

import pytest
import torch
from torch.testing import assert_close

from gen_pipelines import ELBOObjective, IWAEObjective, PriorObjective, TransformerPrior, VAEModel, VQObjective, VQVAEModel


def make(**changes) -> VAEModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VAEModel(sample_size=8, block_out_channels=(8,), latent_dim=3, **changes).double()


X = torch.randint(0, 256, (6, 1, 8, 8), generator=torch.Generator().manual_seed(0)).double() / 127.5 - 1


def seeded(seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 * seed + i) for i in range(len(X))]


def test_the_loss_is_the_bound_summed_over_values_and_not_over_the_batch():
    model = make()
    output = ELBOObjective()(model, X, generator=seeded())
    assert_close(output.per_sample, -output.metrics["elbo"])
    assert_close(output.metrics["elbo"], output.metrics["reconstruction"] - output.metrics["kl"])
    half = ELBOObjective()(model, X[:3], generator=seeded()[:3])
    assert_close(half.per_sample, output.per_sample[:3])
    assert_close(ELBOObjective(beta=4.0)(model, X, generator=seeded()).per_sample, output.per_sample + 3 * output.metrics["kl"])


def test_warm_up_is_linear_and_leaves_the_reported_bound_alone():
    model = make()
    losses = [ELBOObjective(warmup_steps=10)(model, X, step=step, generator=seeded()) for step in (0, 4, 9, 500)]
    assert [round(loss.metrics["beta"].item(), 6) for loss in losses] == [0.1, 0.5, 1.0, 1.0]
    for loss in losses:
        assert_close(loss.metrics["elbo"], losses[-1].metrics["elbo"])
    assert_close(losses[0].per_sample + 0.9 * losses[0].metrics["kl"], losses[-1].per_sample)


def test_free_bits_act_on_the_batch_mean_of_each_dimension():
    """max(lambda, mean over the batch), not the mean of max: a dimension below it costs lambda and has no gradient."""
    model = make()
    with torch.no_grad():  # dimension 0 far above, 1 and 2 below on the mean, though single pictures may be above
        model.to_moments.bias[0] = 3.0
    kl = model.encode(X).latent_dist.kl_per_dimension()
    floor = (kl.mean(0)[1:].max() * 1.01).item()
    assert (kl[:, 1:] > floor).any()
    output = ELBOObjective(free_bits=floor)(model, X, generator=seeded())
    charged = output.per_sample.mean() + output.metrics["reconstruction"].mean()
    assert_close(charged, kl.mean(0).clamp(min=floor).sum())
    assert_close(output.metrics["kl"], kl.sum(1).detach())  # reported as it is
    grads = torch.autograd.grad(charged_part(model, floor), model.to_moments.bias)[0]
    direct = torch.autograd.grad(model.encode(X).latent_dist.kl_per_dimension().mean(0).clamp(min=floor).sum(), model.to_moments.bias)[0]
    assert_close(grads, direct)
    assert grads[1] == 0
    assert grads[0] != 0


def charged_part(model: VAEModel, floor: float) -> torch.Tensor:
    with_, without = (ELBOObjective(beta=beta, free_bits=floor)(model, X, generator=seeded()).per_sample.mean() for beta in (1.0, 0.0))
    return with_ - without


def test_one_importance_sample_is_the_elbo_on_average_and_more_are_higher():
    model = make()
    bound = lambda k: torch.stack([-IWAEObjective(k)(model, X, generator=seeded(i)).per_sample.mean() for i in range(15)]).mean()
    elbo = torch.stack([ELBOObjective()(model, X, generator=seeded(i)).metrics["elbo"].mean() for i in range(15)]).mean()
    with torch.no_grad():
        one, five, fifty = bound(1), bound(5), bound(50)
    assert abs(one - elbo) < 0.02 * abs(elbo)
    assert one < five < fifty


@pytest.mark.parametrize("estimator", ["standard", "stl", "dreg"])
def test_estimators_agree_on_the_value_and_the_decoders_gradient(estimator):
    gradients = {}
    for name in ("standard", estimator):
        model = make()
        output = IWAEObjective(5, name)(model, X, generator=seeded())
        output.per_sample.mean().backward()
        gradients[name] = (output.per_sample.detach(), model.decoder.conv_out.weight.grad, model.to_moments.weight.grad)
    assert_close(gradients[estimator][0], gradients["standard"][0])
    assert_close(gradients[estimator][1], gradients["standard"][1])
    if estimator != "standard":
        assert (gradients[estimator][2] - gradients["standard"][2]).abs().max() > 1e-6


def test_the_doubly_reparameterised_gradient_has_the_mean_of_the_plain_one_and_less_noise():
    found = {}
    for name in ("standard", "dreg"):
        rows, model = [], make()
        model.requires_grad_(False)
        model.to_moments.bias.requires_grad_(True)
        for i in range(80):
            IWAEObjective(8, name)(model, X, generator=seeded(i)).per_sample.mean().backward()
            rows.append(model.to_moments.bias.grad)
            model.to_moments.bias.grad = None
        found[name] = torch.stack(rows)
    plain, dreg = found["standard"], found["dreg"]
    error = ((plain.var(0) + dreg.var(0)) / 80).sqrt()
    assert ((plain.mean(0) - dreg.mean(0)).abs() < 5 * error + 1e-9).all()  # false alarm below 1e-5
    assert (dreg.var(0) < plain.var(0)).all()


def test_stl_has_no_noise_where_the_posterior_is_exact():
    """A decoder that ignores z has the prior as posterior: every weight is the same, and the encoder's gradient is exactly zero."""
    gradients = {}
    for name in ("standard", "stl"):
        model = make()
        with torch.no_grad():
            model.from_latents.weight.zero_()
            model.to_moments.weight.zero_()
            model.to_moments.bias.zero_()
        IWAEObjective(4, name)(model, X, generator=seeded()).per_sample.mean().backward()
        gradients[name] = model.to_moments.bias.grad.abs().max()
    assert gradients["stl"] < 1e-12 < gradients["standard"]


@pytest.mark.parametrize("make_it", [lambda: ELBOObjective(beta=-1.0), lambda: IWAEObjective(0), lambda: IWAEObjective(5, "vimco")])
def test_settings_that_mean_nothing_are_errors(make_it):
    with pytest.raises(ValueError, match=r"ELBOObjective: .*|IWAEObjective: .*"):
        make_it()


def test_the_loss_of_a_vq_vae_is_of_the_sample_whatever_the_batch():
    """The weight of the quantisation term does not grow with the batch; both terms are means over what they are of."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VQVAEModel(sample_size=8, hidden_channels=8, layers_per_block=1, num_embeddings=8, embedding_dim=4).double().eval()
    output = model(X)
    whole = VQObjective(weight=2.0)(model, X)
    assert_close(whole.per_sample, -output.distribution.log_prob(X) / 64 + 2 * output.loss)
    assert_close(VQObjective(weight=2.0)(model, X[2:4]).per_sample, whole.per_sample[2:4])
    squared = VQObjective("squared_error", variance=0.5)(model, X)
    assert_close(squared.per_sample, (output.distribution.mean - X).square().mean((1, 2, 3)) / 0.5 + output.loss)
    z, codes = model._vectors(0, model._features(X), None), output.codes[0]
    assert_close(output.loss, 0.25 * (z - model.quantizers[0].decode(codes)).square().mean((1, 2, 3)))


def test_the_loss_of_priors_is_nats_per_code_and_labels_are_dropped_by_the_samples_own_generator():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        priors = [
            TransformerPrior(5, (2, 2), 3, width=8, num_layers=1, num_heads=2),
            TransformerPrior(5, (4, 4), 3, [[2, 2]], width=8, num_layers=1, num_heads=2),
        ]
    codes = [torch.randint(5, (6, side, side), generator=torch.Generator().manual_seed(side)) for side in (2, 4)]
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    direct = -(priors[0].log_prob(codes[0], labels) + priors[1].log_prob(codes[1], labels, codes[:1])) / 20
    assert_close(PriorObjective()(priors, codes, labels=labels).per_sample, direct)
    nothing = PriorObjective(drop_label=1.0)(priors, codes, labels=labels, generator=seeded()).per_sample
    assert_close(nothing, PriorObjective()(priors, codes, labels=torch.full((6,), 3)).per_sample)
    some = PriorObjective(drop_label=0.5)(priors, codes, labels=labels, generator=seeded(7)).per_sample
    dropped = (some - nothing).abs() < 1e-6
    assert 0 < dropped.sum() < 6
    part = PriorObjective(drop_label=0.5)(priors, [level[1:3] for level in codes], labels=labels[1:3], generator=seeded(7)[1:3]).per_sample
    assert_close(part, some[1:3])


def test_a_codebook_that_is_hardly_used_is_warned_of_before_its_prior_is_trained(caplog):
    from gen_pipelines.training.tasks.prior import encode_pictures

    class Pictures:
        def __len__(self) -> int:
            return 6

        def picture(self, item: int) -> torch.Tensor:
            return ((X[item] + 1) * 127.5).round().to(torch.uint8)

    model = VQVAEModel(sample_size=8, hidden_channels=8, layers_per_block=1, num_embeddings=64, embedding_dim=4).eval()
    model.quantizers[0].codebook[1:] = 1e6
    codes = encode_pictures(model, Pictures(), batch_size=4)
    assert codes[0].shape == (6, 2, 2)
    assert "uses 1 of 64" in caplog.text
