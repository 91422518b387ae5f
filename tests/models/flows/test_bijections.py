"""Every bijection: its inverse, its log-determinant against the autograd Jacobian in both directions, gradients, saving, float64."""

import copy
import math

import pytest
import torch
from torch.testing import assert_close

from gen_pipelines.models.flows.actnorm import ActNorm, moments
from gen_pipelines.models.flows.base import ConditionalGaussian, LearnedGaussian
from gen_pipelines.models.flows.batch_norm import FlowBatchNorm
from gen_pipelines.models.flows.coupling import Coupling, CouplingNetwork, MaskedCoupling, ScaledConv2d, masked_parts, merged_parts
from gen_pipelines.models.flows.dequantizer import VariationalDequantizer
from gen_pipelines.models.flows.glow import GlowLevel, GlowStep
from gen_pipelines.models.flows.invertible_conv import InvertibleConv1x1, fold, fold_inverse
from gen_pipelines.models.flows.pre_transforms import LogitTransform, MarginalTransform
from gen_pipelines.models.flows.realnvp import RealNVPScale


class Given(torch.nn.Module):
    """A bijection with its second argument fixed."""

    def __init__(self, inner, *arguments):
        super().__init__()
        self.inner, self.arguments = inner, arguments

    def forward(self, x):
        return self.inner(x, *(a[: len(x)] for a in self.arguments))

    def inverse(self, y):
        return self.inner.inverse(y, *(a[: len(y)] for a in self.arguments))


def network(channels, outputs):
    return CouplingNetwork(channels, outputs, 5, num_blocks=0, size=(2, 4))


def level(reversible=False):
    return GlowLevel([GlowStep(4, network(2, 4), "affine") for _ in range(2)], reversible)


CONDITION, LABELS = torch.randn(3, 2, 2, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64), torch.tensor([2, 0, 1])

BIJECTIONS = {
    "logit": lambda: LogitTransform(0.05),
    "marginal": lambda: MarginalTransform(3),
    "actnorm": lambda: ActNorm(4),
    "batch_norm": lambda: FlowBatchNorm(4).eval(),
    "invertible_conv": lambda: InvertibleConv1x1(4),
    "affine_sigmoid": lambda: Coupling(4, network(2, 4), "affine", "sigmoid"),
    "affine_tanh": lambda: Coupling(4, network(2, 4), "affine", "tanh"),
    "affine_odd": lambda: Coupling(5, network(2, 6), "affine"),
    "additive": lambda: Coupling(4, network(2, 2), "additive"),
    "residual_network": lambda: Coupling(4, CouplingNetwork(2, 4, 5, num_blocks=2)),
    "checkerboard": lambda: MaskedCoupling(2, "checkerboard", False, 5, 0, (2, 4)),
    "checkerboard_flipped": lambda: MaskedCoupling(2, "checkerboard", True, 5, 1),
    "channel": lambda: MaskedCoupling(4, "channel", False, 5, 0, (2, 4), "additive"),
    "channel_flipped": lambda: MaskedCoupling(4, "channel", True, 5, 0, (2, 4)),
    "glow_step": lambda: GlowStep(4, network(2, 4), "affine"),
    "glow_level": level,
    "glow_level_reversible": lambda: level(reversible=True),
    "realnvp_scale": lambda: RealNVPScale(2, 2, 5, 0, (2, 4), "affine", "actnorm"),
    "realnvp_scale_batch_norm": lambda: RealNVPScale(2, 2, 5, 0, None, "affine", "batch_norm").eval(),
    "conditional_gaussian": lambda: Given(ConditionalGaussian(2, 4), CONDITION),
    "conditional_gaussian_label": lambda: Given(ConditionalGaussian(2, 4, 3), CONDITION, LABELS),
    "learned_gaussian": lambda: LearnedGaussian((4, 2, 4)),
    "learned_gaussian_label": lambda: Given(LearnedGaussian((4, 2, 4), 3), LABELS),
}
CHANNELS = {"checkerboard": 2, "checkerboard_flipped": 2, "realnvp_scale": 2, "realnvp_scale_batch_norm": 2, "affine_odd": 5}


def make(name):
    """A bijection with weights that are nowhere zero, in float64, and an input that its first layer has seen."""
    torch.manual_seed(0)
    bijection = BIJECTIONS[name]().double()
    x = torch.rand(3, CHANNELS.get(name, 4), 2, 4, dtype=torch.float64) * 1.9 - 0.95
    for part in bijection.modules():
        if hasattr(part, "initialize") and isinstance(part, ActNorm | FlowBatchNorm | MarginalTransform):
            part.initialize(x if part is bijection else torch.rand(3, _width(part), 2, 4, dtype=torch.float64))
    with torch.no_grad():
        for parameter in bijection.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return bijection, x


def _width(part):
    return len(part.shift) if isinstance(part, ActNorm) else len(part.running_mean) if isinstance(part, FlowBatchNorm) else 4


def jacobian_log_det(function, x):
    jacobian = torch.autograd.functional.jacobian(lambda z: function(z)[0][0], x)
    return torch.linalg.slogdet(jacobian.reshape(x.numel(), x.numel())).logabsdet


@pytest.mark.parametrize("name", BIJECTIONS)
def test_inverse_and_log_det_against_the_jacobian_in_both_directions(name):
    bijection, x = make(name)
    y, log_det = bijection(x)
    assert y.dtype == log_det.dtype == torch.float64 and log_det.shape == (3,)
    back, log_det_back = bijection.inverse(y)
    assert_close(back, x, rtol=1e-9, atol=1e-9)
    assert_close(log_det_back, -log_det, rtol=1e-9, atol=1e-9)
    # one picture: what depends on others in a batch (the label) is that of the first
    assert_close(jacobian_log_det(lambda z: bijection(z), x[:1]), log_det[0], rtol=1e-8, atol=1e-8)
    assert_close(jacobian_log_det(lambda z: bijection.inverse(z), y[:1].detach()), log_det_back[0], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", [name for name in BIJECTIONS if name not in ("logit", "marginal", "batch_norm")])  # these have none
def test_every_parameter_has_a_gradient_in_both_directions(name):
    bijection, x = make(name)
    for function in (bijection, bijection.inverse):
        argument = x if function is bijection else bijection(x)[0].detach()
        bijection.zero_grad()
        y, log_det = function(argument)
        (y.square().sum() + log_det.sum()).backward()
        for key, parameter in bijection.named_parameters():
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all() and parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize("name", BIJECTIONS)
def test_a_state_dict_restores_it_and_it_is_not_initialised_again(name):
    bijection, x = make(name)
    torch.manual_seed(99)
    other = BIJECTIONS[name]().double()
    other.train(bijection.training)
    other.load_state_dict(copy.deepcopy(bijection.state_dict()))
    for part in other.modules():
        if isinstance(part, ActNorm | MarginalTransform):
            part.initialize(torch.full((2, _width(part), 2, 4), 0.3, dtype=torch.float64) * torch.rand(2, 1, 1, 1))
    for one, two in zip(bijection(x), other(x), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", BIJECTIONS)
def test_float32_and_a_picture_alone(name):
    """In float32 it still inverts, and a picture's log-determinant does not depend on the batch it is in."""
    bijection, x = make(name)
    log_det = bijection(x)[1]
    assert_close(bijection(x[:1])[1], log_det[:1])
    if isinstance(bijection, Given):
        return
    single = copy.deepcopy(bijection).float()
    y, log_det_single = single(x.float())
    assert_close(single.inverse(y)[0], x.float(), rtol=1e-4, atol=1e-4)
    assert_close(log_det_single.double(), log_det, rtol=1e-4, atol=1e-3)


def test_actnorm_makes_the_first_batch_normal_once_and_only_when_told():
    x = 3 + 5 * torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    actnorm = ActNorm(4)
    for mode in (True, False):
        actnorm.train(mode)
        assert torch.equal(actnorm(x)[0], x) and torch.equal(actnorm.inverse(x)[0], x)  # neither direction, nor mode, initialises
    assert not actnorm.initialized
    actnorm.initialize(x)
    y, _ = actnorm(x)
    assert_close(y.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    assert_close(y.var((0, 2, 3), unbiased=False), torch.ones(4), atol=1e-4, rtol=0)
    assert "initialized" in actnorm.state_dict() and actnorm.initialized
    before = copy.deepcopy(actnorm.state_dict())
    actnorm.initialize(100 * x)
    assert all(torch.equal(value, before[key]) for key, value in actnorm.state_dict().items())


def test_actnorm_takes_one_picture_and_constant_channels():
    actnorm = ActNorm(2)
    actnorm.initialize(torch.ones(1, 2, 1, 1))  # the unbiased deviation of one value is NaN
    assert all(torch.isfinite(value).all() for value in actnorm(torch.ones(1, 2, 1, 1)))
    with pytest.raises(ValueError, match="not finite"):
        ActNorm(2).initialize(torch.full((2, 2, 1, 1), float("nan")))


def test_batch_norm_log_det_is_that_of_its_own_statistics():
    """In training the Jacobian of the whole batch has terms through the statistics; as in the paper the log_det is that of the scaling."""
    x = 2 + 3 * torch.randn(16, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layer = FlowBatchNorm(3).double()
    y, log_det = layer(x)
    variance = x.var((0, 2, 3), unbiased=False)
    assert_close(log_det, (-0.5 * torch.log(variance + layer.eps).sum() * 4).expand(16))
    assert_close(y.mean((0, 2, 3)), torch.zeros(3, dtype=torch.float64), atol=1e-10, rtol=0)
    with pytest.raises(RuntimeError, match=r"model.eval\(\)"):
        layer.inverse(y)
    assert_close(layer.running_mean, 0.1 * x.mean((0, 2, 3)))
    assert not torch.equal(layer.eval()(x)[0], y)


def test_moments_have_gradients_and_are_those_of_the_channels():
    x = torch.randn(4, 3, 2, 2, requires_grad=True)
    mean, variance = moments(x)
    assert_close(mean, x.mean((0, 2, 3)))
    assert_close(variance, x.var((0, 2, 3), unbiased=False))
    (mean.sum() + variance.sum()).backward()
    assert x.grad.abs().sum() > 0


def test_the_first_weight_is_a_rotation_and_its_inverse_is_exact():
    torch.manual_seed(0)
    convs = [InvertibleConv1x1(6).double() for _ in range(3)]
    actnorms = [ActNorm(6).double() for _ in range(3)]
    weight, _, log_det = fold(actnorms, convs, torch.float64)
    assert_close(weight @ weight.mT, torch.eye(6, dtype=torch.float64).expand(3, 6, 6), atol=1e-6, rtol=0)
    assert abs(log_det.item()) < 1e-5
    inverse, _, log_det_back = fold_inverse(actnorms, convs, torch.float64)
    assert_close(inverse @ weight, torch.eye(6, dtype=torch.float64).expand(3, 6, 6), atol=1e-10, rtol=0)
    assert_close(log_det_back, -log_det)


def test_the_folded_level_is_its_steps_one_after_the_other():
    folded, x = make("glow_level")
    y, log_det = folded(x)
    total = 0
    for step in folded.steps:
        x, one = step(x)
        total = total + one
    assert_close(y, x)
    assert_close(log_det, total)
    back, log_det_back = folded.inverse(y)
    for step in reversed(folded.steps):
        y, _ = step.inverse(y)
    assert_close(back, y)
    assert_close(log_det_back, -log_det)


def test_cached_weights_follow_every_change():
    """An update, loaded weights, another dtype: the folded weights and their inverses are those of the present parameters."""
    folded, x = make("glow_level")
    with torch.no_grad():
        y, _ = folded(x)
        value = folded._forward._value
        assert folded(x)[0] is not None and folded._forward._value is value  # nothing changed: kept
        folded.inverse(y)
        for change in (
            lambda: folded.steps[0].actnorm.shift.add_(0.5),
            lambda: folded.load_state_dict({k: v + 0.1 if "lower" in k else v for k, v in folded.state_dict().items()}),
            lambda: setattr(folded.steps[1].conv.log_diagonal, "data", folded.steps[1].conv.log_diagonal + 0.3),
            lambda: folded.steps[1].conv.upper.data.mul_(1.1),  # counts no version; diffusers' EMAModel writes so
            lambda: folded.steps[0].conv.sign.neg_(),
        ):
            change()
            new, _ = folded(x)
            assert not torch.equal(new, y)
            expected = x
            for step in folded.steps:
                expected, _ = step(expected)
            assert_close(new, expected)
            assert_close(folded.inverse(new)[0], x)
            y = new
        folded.float()
        assert folded(x.float())[0].dtype == torch.float32
    y, _ = folded(x.float())  # with gradients nothing is taken from the cache
    y.sum().backward()
    assert folded.steps[0].conv.lower.grad is not None


@pytest.mark.parametrize("flipped", [False, True])
def test_checkerboard_keeps_the_pixels_whose_row_and_column_add_up_to_even(flipped):
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
    kept = ((rows + columns) % 2 == int(flipped)).expand(2, -1, -1)
    layer = MaskedCoupling(2, "checkerboard", flipped, 5, 0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter))
    x = torch.randn(1, 2, 4, 6)
    y, _ = layer(x)
    assert torch.equal(y[0][kept], x[0][kept]) and not torch.isclose(y[0][~kept], x[0][~kept]).any()
    changed = x.clone()
    changed[0][~kept] += 1  # what changes says nothing about how it changes
    assert torch.equal(layer(changed)[1], layer(x)[1])


@pytest.mark.parametrize("mask", ["checkerboard", "channel"])
@pytest.mark.parametrize("flipped", [False, True])
def test_masked_parts_and_back(mask, flipped):
    x = torch.randn(2, 4, 4, 6)
    assert torch.equal(merged_parts(masked_parts(x, mask, flipped), mask, flipped), x)


def test_couplings_start_as_the_identity_up_to_a_constant():
    coupling = Coupling(4, network(2, 4))
    x = torch.randn(2, 4, 2, 4)
    y, log_det = coupling(x)
    scale = torch.sigmoid(torch.tensor(2.0))
    assert_close(y, torch.cat([x[:, :2], x[:, 2:] * scale], 1))
    assert_close(log_det, torch.full((2,), 16 * math.log(scale)))
    zero = ScaledConv2d(2, 3)
    assert zero(torch.randn(1, 2, 2, 2)).abs().sum() == 0


def test_log_sigmoid_stays_finite_where_the_sigmoid_is_zero():
    coupling = Coupling(4, network(2, 4))
    with torch.no_grad():
        coupling.network.last.bias[:2] = -200
    assert torch.isfinite(coupling(torch.randn(2, 4, 2, 4))[1]).all()


def test_logit_of_black_and_white_is_finite_and_zero_alpha_is_refused():
    y, log_det = LogitTransform(1e-6)(torch.tensor([[[[-1.0, 1 - 2**-23]]]]))
    assert torch.isfinite(y).all() and torch.isfinite(log_det).all()
    with pytest.raises(ValueError, match="between 0 and 0.5"):
        LogitTransform(0.0)


def test_the_marginal_transform_makes_values_gaussian():
    x = torch.where(torch.rand(64, 1, 8, 8) < 0.8, torch.rand(64, 1, 8, 8) / 256, torch.rand(64, 1, 8, 8)) * 2 - 1
    transform = MarginalTransform(8)
    transform.initialize(x)
    y, _ = transform(x)
    assert abs(y.mean().item()) < 0.05 and abs(y.std().item() - 1) < 0.05
    quantiles = torch.special.ndtri(torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]))
    assert_close(torch.quantile(y.flatten(), torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])), quantiles, atol=0.05, rtol=0)


def test_the_dequantiser_density_integrates_to_one_and_is_that_of_its_draws():
    """log q(u) against the Jacobian of eps -> u at fixed levels."""
    torch.manual_seed(0)
    dequantizer = VariationalDequantizer(1, 2, hidden_channels=4, num_steps=2).double()
    with torch.no_grad():
        for parameter in dequantizer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    levels = torch.randint(0, 4, (1, 1, 2, 2))
    seen = {}

    def draw(eps):
        import gen_pipelines.models.flows.dequantizer as module

        original, module.normal = module.normal, lambda *_: eps
        try:
            u, log_q = dequantizer.sample(levels)
        finally:
            module.normal = original
        seen["log_q"] = log_q
        return u

    eps = torch.randn(1, 1, 2, 2, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(draw, eps).reshape(4, 4)
    normal = -0.5 * eps.square().sum() - 2 * math.log(2 * math.pi)
    assert_close(seen["log_q"][0], normal - torch.linalg.slogdet(jacobian).logabsdet)
