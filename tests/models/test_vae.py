"""The variational autoencoder: shapes, saving, compiling, precision, the committed rate."""

import pytest
import torch
from torch.testing import assert_close

from gen_pipelines import VAEModel

MLP = {"encoder_type": "mlp", "decoder_type": "mlp", "hidden_sizes": (16,)}
HALVES = {
    "conv": {"sample_size": 12, "block_out_channels": (8, 8), "latent_dim": 4},
    "padded": {"sample_size": (10, 14), "in_channels": 3, "block_out_channels": (8, 8), "latent_dim": 4, "num_components": 2},
    "mlp": {**MLP, "sample_size": (1, 2), "latent_dim": 2, "likelihood": "bernoulli"},
    "mixed": {**MLP, "encoder_type": "conv", "sample_size": 8, "block_out_channels": (8,), "likelihood": "gaussian", "scale": "shared"},
    "bounded": {**MLP, "sample_size": 4, "latent_dim": 2, "likelihood": "gaussian", "scale": "shared", "bounded_mean": True},
}


def make(kind: str, **changes) -> VAEModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VAEModel(**{**HALVES[kind], **changes})


def pictures(model: VAEModel, count: int = 3) -> torch.Tensor:
    levels = torch.randint(0, 256, (count, model.config.in_channels, model.height, model.width), generator=torch.Generator().manual_seed(1))
    x = levels / 127.5 - 1
    return torch.where(x > 0, 1.0, -1.0) if model.config.likelihood == "bernoulli" else x


@pytest.mark.parametrize("kind", HALVES)
def test_shapes_gradients_and_saving(kind, tmp_path):
    model = make(kind)
    x = pictures(model)
    output = model(x, num_samples=2, generator=torch.Generator().manual_seed(2))
    assert output.latents.shape == (2, 3, model.config.latent_dim)
    nats = output.distribution.log_prob(x)
    assert nats.shape == (2, 3)
    assert model.decode(output.latents[0]).sample.shape == x.shape
    (output.latent_dist.kl_per_dimension().sum() - nats.sum()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not without
    model.save_pretrained(tmp_path)
    again = VAEModel.from_pretrained(tmp_path)
    assert_close(again(x, 2, torch.Generator().manual_seed(2)).distribution.log_prob(x), nats)


@pytest.mark.parametrize("kind", HALVES)
def test_it_compiles_without_graph_breaks(kind):
    model = make(kind)
    x = pictures(model)
    noise = torch.randn(2, 3, model.config.latent_dim, generator=torch.Generator().manual_seed(2))

    def nats(x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        output = model(x, num_samples=2, noise=noise)
        return output.distribution.log_prob(x) - output.latent_dist.kl_per_dimension().sum(-1)

    torch._dynamo.reset()
    assert_close(torch.compile(nats, fullgraph=True, backend="eager")(x, noise), nats(x, noise))


def test_under_bf16_the_moments_and_likelihoods_are_float32():
    model = make("conv")
    x = pictures(model)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
        assert output.latent_dist.mean.dtype == output.distribution.log_prob(x).dtype == torch.float32
        assert model.decoder(torch.zeros(1, 8, 3, 3)).dtype == torch.bfloat16  # the body is not
    low = make("conv").to(torch.bfloat16)
    assert low(x).distribution.log_prob(x).dtype == torch.float32


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for on in (False, True):
        model = make("conv")
        if on:
            model.enable_gradient_checkpointing()
        x = pictures(model)
        model(x, generator=torch.Generator().manual_seed(0)).distribution.log_prob(x).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert_close(gradients[1], gradients[0])


def test_a_committed_rate_is_the_least_divergence_whatever_was_learned():
    """Also where the encoder says nothing at all, which without it has a divergence of zero."""
    model = make("conv", committed_rate=2.0)
    with torch.no_grad():
        model.to_moments.weight.zero_()
        model.to_moments.bias.zero_()
        q = model.encode(pictures(model)).latent_dist
        assert_close(q.kl_per_dimension(), torch.full((3, 4), 0.5), atol=1e-5, rtol=0)
        for seed in range(5):
            torch.nn.init.normal_(model.to_moments.weight, std=3.0, generator=torch.Generator().manual_seed(seed))
            assert (model.encode(pictures(model)).latent_dist.kl_per_dimension() >= 0.5 - 1e-5).all()
    q = model.encode(pictures(model)).latent_dist
    q.kl_per_dimension().sum().backward()
    assert torch.isfinite(model.to_moments.weight.grad).all()
    free = make("conv")
    with torch.no_grad():
        free.to_moments.weight.zero_()
        free.to_moments.bias.zero_()
        assert free.encode(pictures(free)).latent_dist.kl_per_dimension().abs().max() == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_type": "linear"}, "encoder_type 'linear' is none of conv, mlp"),
        ({"activation": "gelu"}, "activation 'gelu' is none of"),
        ({"committed_rate": -1.0}, "committed_rate -1.0"),
        ({"num_bits": 9}, "num_bits 9"),
    ],
)
def test_settings_that_mean_nothing_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        make("conv", **changes)


def test_an_encoder_that_runs_away_gives_no_infinity():
    model = make("conv")
    with torch.no_grad():
        model.to_moments.bias[4:] = torch.tensor([1e6, -1e6, 500.0, -500.0])
        kl = model.encode(pictures(model)).latent_dist.kl_per_dimension()
    assert torch.isfinite(kl).all()


def test_pictures_of_another_size_are_an_error():
    with pytest.raises(ValueError, match=r"\(B, 1, 12, 12\) are needed, got \(2, 1, 28, 28\)"):
        make("conv").encode(torch.zeros(2, 1, 28, 28))
