"""The result type, and pictures as levels."""

import math

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from gen_pipelines.likelihood import LikelihoodResult, dequantize, from_levels, to_levels
from gen_pipelines.likelihood.dequantization import nearest_levels


def test_bits_per_dim_of_two_pixels_by_hand():
    """Two pixels of four levels, all equally likely: log 1/16 nats, which is two bits per pixel."""
    result = LikelihoodResult.from_nats(torch.tensor([math.log(1 / 16)]), "exact", 2)
    assert_close(result.bits_per_dim, torch.tensor([2.0]))
    assert result.stderr is None and result.dequantization == "none"


def test_draws_give_mean_and_standard_error():
    draws = torch.tensor([[0.0, -1.0], [2.0, -1.0], [4.0, -1.0]])
    result = LikelihoodResult.from_draws(draws, "elbo", None, num_function_evaluations=3)
    assert_close(result.nats, torch.tensor([2.0, -1.0]))
    assert_close(result.stderr, torch.tensor([2 / math.sqrt(3), 0.0]))
    assert result.bits_per_dim is None and result.num_function_evaluations == 3
    assert LikelihoodResult.from_draws(draws[:1], "elbo", 4).stderr is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_is_an_error(bad):
    with pytest.raises(ValueError, match=r"1 of 3 log-likelihoods are not finite \(pictures \[1\]"):
        LikelihoodResult.from_nats(torch.tensor([0.0, bad, 1.0]), "exact", 4)


def test_what_is_refused():
    with pytest.raises(ValueError, match="kind 'guess' is none of exact"):
        LikelihoodResult.from_nats(torch.zeros(2), "guess", 4)
    with pytest.raises(ValueError, match="one number per picture"):
        LikelihoodResult.from_nats(torch.zeros(2, 2), "exact", 4)
    with pytest.raises(ValueError, match="at least 1"):
        LikelihoodResult.from_nats(torch.zeros(2), "exact", 0)


LEVELS = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)


def test_every_form_of_a_picture_has_the_same_levels():
    picture = Image.fromarray(LEVELS[0, 0].numpy())
    for images in (LEVELS, LEVELS[0], LEVELS.float() / 127.5 - 1, LEVELS.double() / 127.5 - 1, from_levels(LEVELS), picture, [picture]):
        assert torch.equal(to_levels(images, channels=1, size=(16, 16)), LEVELS)
    assert torch.equal(to_levels(LEVELS.float() / 255, value_range=(0, 1)), LEVELS)
    assert torch.equal(to_levels((LEVELS.float() / 127.5 - 1).half()), LEVELS)
    assert torch.equal(to_levels(picture.convert("RGB"), channels=1), LEVELS)
    assert torch.equal(to_levels(picture, channels=3), LEVELS.expand(-1, 3, -1, -1))
    assert torch.equal(to_levels(picture.convert("RGB")), LEVELS.expand(-1, 3, -1, -1))
    assert torch.equal(to_levels(LEVELS, num_bits=5), LEVELS // 8)


@pytest.mark.parametrize("num_bits", range(1, 9))
def test_levels_become_pictures_and_come_back(num_bits):
    levels = torch.arange(2**num_bits, dtype=torch.uint8).view(1, 1, 1, -1)
    pictures = from_levels(levels, num_bits)
    assert pictures.min() == -1 and pictures.max() == 1
    assert torch.equal(to_levels(pictures, num_bits=num_bits), levels)


@pytest.mark.parametrize(
    ("images", "error", "match"),
    [
        (LEVELS.float() / 255, ValueError, r"between the levels .* \(255 \* x\)\.round"),
        (LEVELS.float(), ValueError, "span 0 to 255"),
        (torch.full((1, 1, 2, 2), float("nan")), ValueError, "not finite"),
        (LEVELS.long(), TypeError, "uint8 or float"),
        (torch.zeros(4, 4), ValueError, r"\(B, C, H, W\)"),
        (Image.new("RGBA", (16, 16)), ValueError, "mode RGBA"),
        (Image.new("I;16", (16, 16)), ValueError, "mode I;16"),
        ([], TypeError, "got an empty list"),
        (["picture"], TypeError, "list with str"),
        ([Image.new("L", (16, 16)), Image.new("L", (8, 8))], ValueError, "differ in size"),
        (Image.new("RGB", (16, 16), "red"), ValueError, "1 channels are needed"),
        (Image.new("L", (8, 8)), ValueError, "16 x 16 pixels are needed, these have 8 x 8"),
    ],
)
def test_pictures_that_cannot_be_levels_are_refused(images, error, match):
    with pytest.raises(error, match=match):
        to_levels(images, channels=1, size=(16, 16))


@pytest.mark.parametrize("num_bits", [8, 5, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dequantised_pictures_stay_in_their_bins(num_bits, dtype):
    levels = (torch.arange(2**num_bits, dtype=torch.uint8).repeat(64)).view(1, 1, 64, -1)
    x, weight = dequantize(levels, num_bits, torch.Generator().manual_seed(0), dtype=dtype)
    assert x.dtype == dtype and x.min() >= -1 and x.max() < 1
    assert_close(weight, torch.tensor([levels.numel() * math.log(2 / 2**num_bits)], dtype=dtype))
    assert torch.equal(nearest_levels(x.double(), num_bits), levels)


def test_the_last_bin_holds_the_largest_noise(monkeypatch):
    """255 + u rounds to 256 in float32 for the largest u that torch draws; x would leave [-1, 1) and its logit would be infinite."""
    monkeypatch.setattr("gen_pipelines.likelihood.dequantization.uniform", lambda shape, *_: torch.full(tuple(shape), 1 - 2**-24))
    x, _ = dequantize(torch.full((1, 1, 2, 2), 255, dtype=torch.uint8))
    assert x.max() < 1
    assert (nearest_levels(x) == 255).all()


def test_noise_belongs_to_the_picture():
    levels = LEVELS.expand(3, -1, -1, -1)
    seeds = lambda numbers: [torch.Generator().manual_seed(n) for n in numbers]
    assert torch.equal(dequantize(levels, 8, seeds([0, 1, 2]))[0][2], dequantize(levels[:1], 8, seeds([2]))[0][0])


def test_a_learned_dequantiser_is_weighted_by_its_density():
    """q(u) = 2u on [0, 1): E[1 / q] over q is one, so the weight is the uniform one minus log 2u."""

    class Triangle:
        def sample(self, levels, generator=None):
            u = torch.rand(levels.shape, generator=generator).sqrt()
            return u, (2 * u).log().flatten(1).sum(1)

    x, weight = dequantize(LEVELS, 8, torch.Generator().manual_seed(0), Triangle())
    u = (x + 1) * 128 - LEVELS
    assert_close(weight, 256 * math.log(2 / 256) - (2 * u).log().flatten(1).sum(1), atol=1e-1, rtol=1e-3)
