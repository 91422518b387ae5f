"""The likelihood of flows: it sums to one over a toy space, is a bound, and does not change with how pictures come."""

import itertools
import math

import pytest
import torch
from diffusers.configuration_utils import register_to_config
from PIL import Image
from torch.testing import assert_close

from gen_pipelines.likelihood.change_of_variables import flow_log_likelihood
from gen_pipelines.models.flows.base import NormalizingFlowModel
from gen_pipelines.models.flows.glow import GlowModel
from gen_pipelines.models.flows.realnvp import RealNVPModel


def tiny(make, pictures=None, **settings):
    torch.manual_seed(0)
    flow = make(in_channels=1, num_levels=1, hidden_channels=4, **settings).double()
    flow.initialize_from_batch(torch.rand(32, 1, *flow.size).double() ** 2 * 2 - 1 if pictures is None else pictures)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return flow.eval()


TOYS = {
    "glow": lambda: tiny(GlowModel, sample_size=2, num_steps=1, num_bits=2, pre_transform="marginal"),
    "realnvp": lambda: tiny(RealNVPModel, sample_size=2, num_couplings=1, num_blocks=0, num_bits=2, pre_transform="marginal"),
    "variational": lambda: tiny(GlowModel, sample_size=2, num_steps=1, num_bits=2, pre_transform="marginal", dequantization="variational"),
}
SPACE = torch.tensor(list(itertools.product(range(4), repeat=4)), dtype=torch.uint8).view(256, 1, 2, 2)


@pytest.mark.parametrize("name", ["glow", "realnvp"])
def test_the_bins_of_a_toy_space_sum_to_one(name):
    """Four pixels of four levels: the density, integrated over each picture's bin (Gauss-Legendre, 6 nodes a side), sums to one.

    The flow is initialised on pictures near the middle, so that it gives no mass to values beyond the last levels.
    """
    import numpy as np

    middle = 0.2 * torch.randn(64, 1, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    glow, realnvp = {"sample_size": 2, "num_steps": 1}, {"sample_size": 2, "num_couplings": 1, "num_blocks": 0}
    make, settings = (GlowModel, glow) if name == "glow" else (RealNVPModel, realnvp)
    flow = tiny(make, middle, num_bits=2, pre_transform="none", **settings)
    nodes, weights = (torch.from_numpy(one) for one in np.polynomial.legendre.leggauss(6))
    u = torch.cartesian_prod(*[(nodes + 1) / 2] * 4).view(-1, 1, 2, 2)                                # (1296, 1, 2, 2)
    w = torch.cartesian_prod(*[weights / 2] * 4).prod(1)                                              # (1296,)
    total = 0.0
    with torch.no_grad():
        for levels in SPACE.split(32):
            x = (levels.double()[:, None] + u) / 4 * 2 - 1
            density = flow.log_prob(x.flatten(0, 1)).view(len(levels), -1).exp() * (2 / 4) ** 4
            total += (density * w).sum().item()
    assert total == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("name", TOYS)
def test_bounds_sum_to_at_most_one(name):
    flow = TOYS[name]()
    result = flow_log_likelihood(flow, SPACE << 6, num_samples=8, generator=torch.Generator().manual_seed(0))
    assert 0.1 < result.nats.exp().sum() < 1
    assert result.dequantization == ("variational" if name == "variational" else "uniform") and result.kind == "exact"
    assert result.num_function_evaluations == 8 and result.stderr.shape == (256,) and (result.stderr > 0).all()


class TwoPixels(NormalizingFlowModel):
    """The identity on pictures of 1 x 2: independent standard normals, whose likelihood is computed by hand below."""

    @register_to_config
    def __init__(self, in_channels: int = 1, num_bits: int = 2, num_class_labels: int | None = None, dequantization: str = "uniform"):
        super().__init__()
        self.size, self.dequantizer, self.nothing = (1, 2), None, torch.nn.Parameter(torch.zeros(1))

    @property
    def latent_shapes(self):
        return [(1, 1, 2)]

    def encode(self, x, labels=None):
        return [x], x.new_zeros(len(x))

    def decode(self, latents, labels=None):
        return latents[0], latents[0].new_zeros(len(latents[0]))


def test_bits_per_dim_of_two_pixels_by_hand(monkeypatch):
    """Levels 1 and 3 of four, u = 1/2: x = 2 (k + 1/2) / 4 - 1 = -1/4 and 3/4, bins of width 1/2."""
    monkeypatch.setattr("gen_pipelines.likelihood.dequantization.uniform", lambda shape, *_: torch.full(tuple(shape), 0.5))
    result = flow_log_likelihood(TwoPixels(), torch.tensor([[[[1 << 6, 3 << 6]]]], dtype=torch.uint8))
    density = [math.exp(-0.5 * x**2) / math.sqrt(2 * math.pi) for x in (-0.25, 0.75)]
    probability = density[0] * density[1] * 0.5**2
    assert_close(result.nats, torch.tensor([math.log(probability)]), rtol=1e-4, atol=1e-4)
    assert_close(result.bits_per_dim, torch.tensor([-math.log2(probability) / 2]), rtol=1e-4, atol=1e-4)


PICTURES = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def flow():
    return tiny(GlowModel, sample_size=8, num_steps=2, pre_transform="logit").float()


def generators():
    return [torch.Generator().manual_seed(n) for n in range(5)]


def test_bits_do_not_change_with_batch_size_or_with_how_pictures_come(flow):
    expected = flow_log_likelihood(flow, PICTURES, generator=generators()).bits_per_dim
    forms = {
        "float in [-1, 1]": (PICTURES.float() / 127.5 - 1, {}),
        "float in [0, 1]": (PICTURES.float() / 255, {"value_range": (0, 1)}),
        "PIL": ([Image.fromarray(picture[0].numpy()) for picture in PICTURES], {}),
        "one at a time": (PICTURES, {"batch_size": 1}),
        "two at a time": (PICTURES, {"batch_size": 2}),
    }
    for name, (images, options) in forms.items():
        assert_close(flow_log_likelihood(flow, images, generator=generators(), **options).bits_per_dim, expected, msg=name)
    single = flow_log_likelihood(flow, PICTURES[3:4], generator=generators()[3:4]).bits_per_dim
    assert_close(single, expected[3:4])
    one, two = (
        flow_log_likelihood(flow, PICTURES, generator=torch.Generator().manual_seed(0), batch_size=size).nats for size in (1, 64)
    )
    assert_close(one, two)


def test_training_mode_does_not_change_the_number():
    model = tiny(RealNVPModel, sample_size=8, num_couplings=1, num_blocks=0, normalization="batch_norm").float().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    bits = flow_log_likelihood(model, PICTURES, generator=generators()).bits_per_dim
    assert model.training and all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert_close(bits, flow_log_likelihood(model.eval(), PICTURES, generator=generators()).bits_per_dim)


def test_nan_is_an_error_and_not_left_out(flow):
    broken = tiny(GlowModel, sample_size=8, num_steps=1).float()
    with torch.no_grad():
        broken.top.mean[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="5 of 5 log-likelihoods are not finite"):
        flow_log_likelihood(broken, PICTURES)


@pytest.mark.parametrize(
    ("images", "options", "match"),
    [
        (PICTURES[..., :4], {}, "8 x 8 pixels are needed"),
        (PICTURES, {"num_samples": 0}, "at least 1"),
        (PICTURES, {"labels": torch.zeros(5)}, "without classes"),
        (PICTURES.float(), {}, "span"),
    ],
)
def test_what_is_refused(flow, images, options, match):
    with pytest.raises(ValueError, match=match):
        flow_log_likelihood(flow, images, **options)
