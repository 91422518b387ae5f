"""VQ-VAE and VQ-VAE-2: shapes, codes in and out, saving, compiling, gradient checkpointing, the order of the levels."""

import pytest
import torch
from torch.testing import assert_close

from gen_pipelines import VQVAEModel
from gen_pipelines.models.layers.convolutional import ResidualBlock

LEVELS = {"one": (4,), "two": (2, 2), "three": (2, 2, 2)}
NETWORKS = {
    "staged": {},
    "compact": {"network": "compact"},
    "rectified": {"network": "compact", "rectified_skip": True, "downsample_factors": (4, 2)},
    "mlp": {"network": "mlp", "hidden_sizes": (12, 6), "num_positions": 5, "likelihood": "gaussian", "bounded_mean": True},
}
X = torch.randint(0, 256, (3, 1, 10, 14), generator=torch.Generator().manual_seed(0)) / 127.5 - 1


def make(kind: str = "two", **changes) -> VQVAEModel:
    settings = {"hidden_channels": 8, "layers_per_block": 1, "residual_channels": 4, "num_embeddings": 16, "embedding_dim": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VQVAEModel(**{"sample_size": (10, 14), "downsample_factors": LEVELS[kind], **settings, **changes})


@pytest.mark.parametrize("kind", LEVELS)
@pytest.mark.parametrize("update", ["ema", "loss"])
def test_shapes_gradients_codes_and_saving(kind, update, tmp_path):
    model = make(kind, codebook_update=update)
    model.initialize_from_batch(X)
    output = model(X)
    assert [tuple(codes.shape[1:]) for codes in output.codes] == model.code_shapes
    assert [a >= b for a, b in zip(model.code_shapes[1:], model.code_shapes)] == [True] * (len(LEVELS[kind]) - 1)  # the top is the coarsest
    nats = output.distribution.log_prob(X)
    (output.loss.sum() - nats.sum()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not without
    model.eval()
    assert_close(model.decode_codes(output.codes).distribution.log_prob(X), nats)
    model.save_pretrained(tmp_path)
    again = VQVAEModel.from_pretrained(tmp_path)
    assert_close(again(X).distribution.log_prob(X), nats)
    assert bool(again.quantizers[0].initialized)
    kept = again.quantizers[0].codebook.clone()
    again.train().initialize_from_batch(X * 0.5)
    assert torch.equal(again.quantizers[0].codebook, kept)


@pytest.mark.parametrize("network", NETWORKS)
def test_every_network_encodes_decodes_learns_and_is_saved(network, tmp_path):
    model = make("two", **NETWORKS[network])
    model.initialize_from_batch(X)
    output = model(X)
    assert [tuple(codes.shape[1:]) for codes in output.codes] == model.code_shapes
    nats = output.distribution.log_prob(X)
    (output.loss.sum() - nats.sum()).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    model.eval()
    assert_close(model.decode_codes(model.encode(X).codes).distribution.log_prob(X), nats)
    model.save_pretrained(tmp_path)
    assert_close(VQVAEModel.from_pretrained(tmp_path)(X).distribution.log_prob(X), nats)


def test_residual_blocks_add_to_what_they_were_given_or_to_what_is_left_of_it_after_the_first_activation():
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    for rectified in (False, True):
        block = ResidualBlock(4, 3, rectified)
        torch.nn.init.ones_(block.conv_out.weight)
        expected = (x.relu() if rectified else x) + block.conv_out(block.conv_in(x.relu()).relu())
        assert_close(block(x), expected)


def test_lower_levels_see_the_codes_above_them():
    """Which is what makes the priors' order right: the bottom's codes change with the top's, never the other way round."""
    model = make("two").eval()
    features = model._features(X)
    above = [quantizer_output.quantized for quantizer_output in [model.quantizers[1](model._vectors(1, features, None))]][0]
    assert (model._vectors(0, features, above) - model._vectors(0, features, torch.zeros_like(above))).abs().max() > 0


def test_gradient_checkpointing_counts_codes_once():
    states = []
    for on in (False, True):
        model = make("two")
        model.initialize_from_batch(X)
        if on:
            model.enable_gradient_checkpointing()
        output = model(X)
        (output.loss.sum() - output.distribution.log_prob(X).sum()).backward()
        for quantizer in model.quantizers:
            quantizer.after_update()
        states.append((model.state_dict(), [p.grad for p in model.parameters()]))
    for name, value in states[0][0].items():
        assert_close(states[1][0][name], value, msg=lambda text, n=name: f"{n}: {text}")
    assert_close(states[1][1], states[0][1])


def test_it_compiles_without_graph_breaks():
    model = make("two").eval()
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: model(x).distribution.log_prob(x), fullgraph=True, backend="eager")
    assert_close(compiled(X), model(X).distribution.log_prob(X))


def test_under_bf16_losses_are_float32():
    model = make("two")
    with torch.autocast("cpu", torch.bfloat16):
        output = model(X)
        assert output.loss.dtype == output.distribution.log_prob(X).dtype == torch.float32
    (output.loss.sum() - output.distribution.log_prob(X).sum()).backward()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: VQVAEModel(downsample_factors=(3,)), "powers of two from 2 on, got"),
        (lambda: VQVAEModel(network="wide"), "none of staged, compact, mlp"),
        (lambda: VQVAEModel(network="mlp", hidden_sizes=()), "needs hidden_sizes and num_positions"),
        (lambda: make().encode(torch.zeros(1, 1, 28, 28)), r"\(B, 1, 10, 14\) are needed"),
        (lambda: make().decode_codes([torch.zeros(1, 2, 2, dtype=torch.long)]), r"\(h, w\) = \[\(3, 4\), \(6, 8\)\] are needed, got"),
        (lambda: make().decode_codes([torch.full((1, 3, 4), 16), torch.zeros(1, 6, 8, dtype=torch.long)]), "from 0 to 15, got 16"),
    ],
)
def test_what_does_not_fit_is_an_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()
