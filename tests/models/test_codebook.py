"""The vector quantiser: nearest codes, the straight-through gradient, averages, revival, when it learns and when it does not."""

import math

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from gen_pipelines.models.layers.codebook import VectorQuantizer, nearest


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(k: int = 8, d: int = 3, **settings) -> VectorQuantizer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VectorQuantizer(k, d, **settings)


@pytest.mark.parametrize("k", [5, 64, 128, 1000, 1024])
def test_the_nearest_code_is_that_of_a_table_of_distances(k):
    x, book = random(300, 7).double(), random(k, 7, seed=1).double()
    assert torch.equal(nearest(x, book), torch.cdist(x, book, compute_mode="donot_use_mm_for_euclid_dist").argmin(1))


class Largest(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for one in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(one, torch.Tensor):
                self.numel = max(self.numel, one.numel() * one.element_size())
        return result


def test_no_table_of_all_distances_exists():
    x, book = random(8192, 4), random(4096, 4)
    with Largest() as largest:
        nearest(x, book)
    assert 0 < largest.numel <= 16e6 < 8192 * 4096 * 4


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 6, 3)])
@pytest.mark.parametrize("update", ["ema", "loss"])
def test_values_are_the_codes_and_gradients_pass_straight_through(shape, update):
    quantizer = make(update=update)
    z = random(*shape).requires_grad_()
    output = quantizer(z)
    assert torch.equal(output.quantized, quantizer.decode(output.codes))  # not z + (e - z), which rounds
    assert torch.equal(output.codes, quantizer.encode(z))
    gradient = random(*shape, seed=5)
    assert torch.equal(torch.autograd.grad(output.quantized, z, gradient)[0], gradient)


def test_the_loss_is_the_papers_and_reaches_input_and_codebook():
    """Computed before the gradient is passed straight through: after it the difference is zero, and so is the gradient."""
    quantizer = make(update="loss", beta=0.25)
    z = random(2, 6, 3).requires_grad_()
    output = quantizer(z)
    chosen = quantizer.codebook[output.codes]
    distance = (z - chosen).square().flatten(1).mean(1)
    assert_close(output.loss, 1.25 * distance)
    output.loss.sum().backward()
    assert_close(z.grad, (0.25 * 2 * (z - chosen) / 18).detach())
    expected = torch.zeros(8, 3).index_add_(0, output.codes.flatten(), ((chosen - z) * 2 / 18).detach().reshape(-1, 3))
    assert_close(quantizer.codebook.grad, expected)
    assert make(update="ema")(z).loss.allclose(0.25 * distance)


def test_averages_follow_the_recurrence_and_smoothed_counts_are_not_stored():
    quantizer = make(revive_below=0.0, decay=0.9)
    size, total = quantizer.cluster_size.clone(), quantizer.cluster_sum.clone()
    for seed in range(3):
        z = random(4, 10, 3, seed=seed).requires_grad_()
        hot = torch.nn.functional.one_hot(quantizer(z).codes.flatten(), 8).float()
        quantizer.after_update()
        size, total = 0.9 * size + 0.1 * hot.sum(0), 0.9 * total + 0.1 * hot.T @ z.detach().view(-1, 3)
        assert_close(quantizer.cluster_size, size)
        assert_close(quantizer.cluster_sum, total)
        smoothed = (size + 1e-5) / (size.sum() + 8e-5) * size.sum()
        assert_close(quantizer.codebook, total / smoothed[:, None])


def test_micro_batches_of_one_update_are_one_batch():
    whole, parts = make(), make()
    z = random(6, 10, 3)
    whole(z)
    whole.after_update()
    for part in z.split(2):
        parts(part)
    parts.after_update()
    assert_close(parts.codebook, whole.codebook)
    assert_close(parts.usage, whole.usage)


def test_it_learns_only_in_training_with_gradients_and_once():
    quantizer = make()
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    with torch.no_grad():
        quantizer(random(2, 9, 3))
    quantizer.after_update()
    quantizer.eval()
    quantizer(random(2, 9, 3))
    quantizer.after_update()
    quantizer.train().encode(random(2, 9, 3))
    quantizer.after_update()
    for name, value in quantizer.state_dict().items():
        assert torch.equal(value, before[name]), name
    quantizer(random(2, 9, 3))
    quantizer.after_update()
    after = quantizer.codebook.clone()
    assert not torch.equal(after, before["codebook"])
    quantizer.after_update()  # nothing came since
    assert torch.equal(quantizer.codebook, after)


def test_revival_sets_all_three_averages():
    """A vector alone would be undone by the next update, which divides the old sum by the old count."""
    quantizer = make(decay=0.5)
    z = random(4, 50, 3)
    quantizer.initialize(z)
    far = torch.full((3,), 1e4)
    quantizer.codebook[2], quantizer.cluster_size[2], quantizer.cluster_sum[2] = far, 1e-6, far * 1e-6
    quantizer(z)
    quantizer.after_update()
    assert quantizer.codebook[2].abs().max() < 10
    assert (quantizer.codebook[2] == z.view(-1, 3)).all(1).any()  # one of the batch
    mean = quantizer.cluster_size[2]
    assert mean > 1
    assert_close(quantizer.cluster_sum[2], mean * quantizer.codebook[2])
    quantizer(z)
    quantizer.after_update()
    assert quantizer.codebook[2].abs().max() < 10  # it stays there
    without = make(decay=0.5, revive_below=0.0)
    without.load_state_dict(quantizer.state_dict())
    without.codebook[2] = far
    before = without.usage[2].item()
    without(z)
    without.after_update()
    assert without.usage[2] == before


def test_off_centre_data_uses_the_whole_codebook_from_the_start():
    """The published recurrences with zero counts and random vectors leave a few codes alive of 512 (unused ones are flung away)."""
    data = lambda seed: 0.5 * random(8, 32, 16, seed=seed) + 1.0
    quantizer = make(k=512, d=16, decay=0.95, revive_below=0.1)
    quantizer.initialize(data(1000))
    for seed in range(100):
        quantizer(data(seed))
        quantizer.after_update()
        assert quantizer.codebook.abs().max() < 10
    codes = quantizer.encode(0.5 * random(64, 128, 16, seed=77) + 1.0)
    assert len(codes.unique()) > 0.95 * 512


def test_initialisation_happens_once_and_not_after_loading():
    quantizer, z = make(), random(2, 30, 3)
    quantizer.initialize(z)
    assert all((row == z.view(-1, 3)).all(1).any() for row in quantizer.codebook)
    kept = quantizer.codebook.clone()
    quantizer.initialize(random(2, 30, 3, seed=4))
    assert torch.equal(quantizer.codebook, kept)
    other = make()
    other.load_state_dict(quantizer.state_dict())
    other.initialize(random(2, 30, 3, seed=4))
    assert torch.equal(other.codebook, kept)
    few = make()  # more codes than vectors: no two are the same
    few.initialize(random(1, 3, 3))
    assert len(few.codebook.unique(dim=0)) == 8


def test_perplexity_is_counted_over_an_epoch():
    """A batch of 4 vectors cannot have a perplexity above 4."""
    quantizer = make(revive_below=0.0, decay=0.999)
    quantizer.start_epoch(1)
    vectors = quantizer.codebook.clone()
    for part in vectors.split(4):
        assert quantizer(part[None]).perplexity <= 4 + 1e-4
        quantizer.after_update()
    assert_close(quantizer.epoch_perplexity(), torch.tensor(8.0))
    assert quantizer.epoch_used() == 1
    quantizer.start_epoch(1)
    assert quantizer.usage.sum() == 8
    quantizer.start_epoch(2)
    assert quantizer.usage.sum() == 0


def test_it_compiles_without_graph_breaks_and_is_float32_under_bf16():
    quantizer, z = make(k=128), random(2, 3, 4, 4)
    torch._dynamo.reset()
    compiled = torch.compile(lambda z: quantizer(z), fullgraph=True, backend="eager")
    expected = make(k=128)(z)
    found = compiled(z)
    assert torch.equal(found.quantized, expected.quantized)
    with torch.autocast("cpu", torch.bfloat16):
        output = quantizer(z.bfloat16())
    assert output.quantized.dtype == torch.bfloat16
    assert output.loss.dtype == torch.float32
    assert torch.equal(output.codes, quantizer.encode(z.bfloat16().float()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"update": "sgd"}, "none of ema, loss"), ({"k": 1}, "at least 2 vectors"), ({"decay": 1.0}, "decay 1.0")],
)
def test_settings_that_mean_nothing_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_wrong_shapes_and_codes_are_errors():
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\) or \(B, N, 3\); got \(2, 4\)"):
        make()(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="from 0 to 7, got 8 to 8"):
        make().decode(torch.tensor([[8]]))
    assert math.isfinite(float(make()(random(1, 2, 3)).perplexity))
