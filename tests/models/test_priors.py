"""Priors over codes: causal, conditional, and the same samples with a cache as without."""

import math

import pytest
import torch
from torch.testing import assert_close

from gen_pipelines import PixelCNNPrior, PixelSNAILPrior, TransformerPrior

PRIORS = {
    "transformer": (TransformerPrior, {"width": 16, "num_layers": 2, "num_heads": 2}),
    "pixel_cnn": (PixelCNNPrior, {"width": 8, "num_layers": 4, "attention_every": 2, "num_heads": 2}),
    "pixel_cnn_wide": (PixelCNNPrior, {"width": 8, "num_layers": 2, "attention_every": 0, "kernel_size": 5}),
    "pixel_snail": (
        PixelSNAILPrior,
        {"width": 8, "residual_channels": 6, "num_blocks": 2, "layers_per_block": 1, "num_heads": 2, "condition_channels": 4,
         "condition_layers": 1, "out_layers": 1},
    ),
    "pixel_snail_without_attention": (
        PixelSNAILPrior,
        {"width": 8, "residual_channels": 6, "num_blocks": 2, "layers_per_block": 2, "attention": False,
         "condition_channels": 4, "condition_layers": 1},
    ),
}  # fmt: skip
SHAPE, CODES = (4, 6), 7


def make(kind: str, **changes):
    cls, settings = PRIORS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(CODES, SHAPE, **{**settings, "num_classes": 3, "condition_shapes": [[2, 3]], **changes})
        for parameter in model.parameters():  # what starts as the identity would hide what is wrong
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model.double().eval()


def codes(count: int = 2, seed: int = 0, shape=SHAPE) -> torch.Tensor:
    return torch.randint(CODES, (count, *shape), generator=torch.Generator().manual_seed(seed))


ABOVE, LABELS = codes(2, 5, (2, 3)), torch.tensor([0, 2])


@pytest.mark.parametrize("kind", PRIORS)
def test_sampling_with_a_cache_is_sampling_without(kind):
    """The logits of every position, and so every code that is drawn; from one generator and from one per sample; class and codes above."""
    model = make(kind)
    seeds = lambda: [torch.Generator().manual_seed(i) for i in (3, 4)]
    full = model.sample(2, LABELS, [ABOVE], seeds(), use_cache=False)
    assert torch.equal(model.sample(2, LABELS, [ABOVE], seeds()), full)
    assert len(full.unique()) > 3
    cache, logits = model.start(2, LABELS, [ABOVE]), model(full, LABELS, [ABOVE])
    with torch.no_grad():
        for row in range(SHAPE[0]):
            for column in range(SHAPE[1]):
                assert_close(model.next_logits(cache, full, row, column), logits[:, :, row, column])
    alone = model.sample(1, LABELS[1:], [ABOVE[1:]], [torch.Generator().manual_seed(4)])
    assert torch.equal(alone[0], full[1])  # whatever batch it is drawn in
    likeliest = model.sample(2, LABELS, [ABOVE], temperature=0)
    assert torch.equal(likeliest, model(likeliest, LABELS, [ABOVE]).argmax(1))


@pytest.mark.parametrize("kind", PRIORS)
def test_a_position_depends_on_what_is_before_it_and_on_nothing_after(kind):
    """Every position before it is seen by the last one (the receptive field has no hole), and none at or after it by any."""
    model = make(kind, **({"num_layers": 8, "attention_every": 0} if kind == "pixel_cnn_wide" else {}))
    x = codes(1)
    base, above, labels = model(x, LABELS[:1], [ABOVE[:1]]).flatten(2), ABOVE[:1], LABELS[:1]
    for place in range(24):
        changed = x.clone().flatten(1)
        changed[0, place] = (changed[0, place] + 1) % CODES
        moved = (model(changed.view(1, *SHAPE), labels, [above]).flatten(2) - base).abs().sum((0, 1)) > 0
        assert not moved[: place + 1].any()
        assert moved[-1] or place == 23
    assert ((model(x, torch.tensor([1]), [above]).flatten(2) - base).abs().sum(1) > 0).all()
    assert ((model(x, labels, [(above + 1) % CODES]).flatten(2) - base).abs().sum(1) > 0).all()


@pytest.mark.parametrize("kind", PRIORS)
def test_probabilities_of_all_code_maps_sum_to_one(kind):
    cls, settings = PRIORS[kind]
    model = cls(2, (2, 2), **settings).double()
    every = torch.cartesian_prod(*[torch.arange(2)] * 4).view(-1, 2, 2)
    assert_close(model.log_prob(every).exp().sum().item(), 1.0)


@pytest.mark.parametrize("kind", PRIORS)
def test_saving_gradients_and_compiling(kind, tmp_path):
    model = make(kind).float()
    x = codes()
    nats = model.log_prob(x, LABELS, [ABOVE])
    nats.sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    # the vertical stack of the last layer leads nowhere but into the horizontal one
    assert not without
    model.save_pretrained(tmp_path)
    assert_close(type(model).from_pretrained(tmp_path).log_prob(x, LABELS, [ABOVE]), nats)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: model.log_prob(x, LABELS, [ABOVE]), fullgraph=True, backend="eager")
    assert_close(compiled(x), nats)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.log_prob(x, LABELS, [ABOVE]).dtype == torch.float32


@torch.no_grad()
def test_a_temperature_below_one_makes_codes_likelier():
    model = make("transformer")
    above, labels = ABOVE[:1].expand(60, -1, -1), LABELS[:1].expand(60)
    mean = lambda t: model.log_prob(model.sample(60, labels, [above], torch.Generator().manual_seed(0), t), labels, [above]).mean()
    assert mean(0.5) > mean(1.0) + 1 > mean(2.0)
    assert math.isfinite(mean(0.0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(codes(), torch.tensor([1]), [ABOVE]), r"shape \(2,\), got \(1,\)"),
        (lambda m: m(codes(), LABELS), r"\(h, w\) = \[\(2, 3\)\], got \[\]"),
        (lambda m: make("transformer", num_classes=None)(codes(), LABELS, [ABOVE]), "knows no classes"),
        (lambda m: make("transformer", width=15), "width 15 is not a multiple of num_heads 2"),
        (lambda m: make("pixel_cnn", kernel_size=4), "kernel_size 4"),
        (lambda m: make("pixel_snail", kernel_size=4), "kernel_size 4"),
        (lambda m: make("pixel_snail", width=10), "half of width 10 is not a multiple of num_heads 2"),
        (lambda m: make("pixel_snail", condition_shapes=[[3, 3]]), "does not divide it"),
        (lambda m: make("transformer", condition_shapes=[[3, 3]]), "does not divide it"),
    ],
)
def test_what_does_not_fit_is_an_error(call, message):
    with pytest.raises(ValueError, match=message):
        call(make("transformer"))
