"""Generators and discriminators: what holds for all of them, in a loop, and what is special to one."""

import math

import pytest
import torch
from torch.testing import assert_close

import gen_pipelines
from gen_pipelines.models.gans.stylegan2 import minibatch_std

SMALL = {"sample_size": 16, "out_channels": 1}
STYLE = SMALL | {"z_dim": 8, "w_dim": 8, "channel_base": 128, "channel_max": 8, "num_mapping_layers": 2}
GENERATORS = {
    "DCGANGenerator": SMALL | {"latent_dim": 8, "base_channels": 4},
    "ResNetGenerator": SMALL | {"latent_dim": 8, "base_channels": 4},
    "StyleGAN1Generator": STYLE,
    "StyleGAN2Generator": STYLE,
    "StyleGAN3Generator": STYLE | {"num_layers": 4, "num_critical": 1},
}
DISCRIMINATORS = {
    "DCGANDiscriminator": {"sample_size": 16, "in_channels": 1, "base_channels": 4, "norm": "layer"},
    "ResNetDiscriminator": {"sample_size": 16, "in_channels": 1, "base_channels": 4},
    "StyleGAN2Discriminator": {"sample_size": 16, "in_channels": 1, "channel_base": 128, "channel_max": 8, "mbstd_group_size": 2},
}
STYLED = [name for name in GENERATORS if name.startswith("Style")]


def build(name, **changes):
    torch.manual_seed(0)
    return getattr(gen_pipelines, name)(**(GENERATORS | DISCRIMINATORS)[name] | changes)


def noise(count, dim=8):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("num_classes", [None, 3])
@pytest.mark.parametrize("name", GENERATORS)
def test_generators_draw_save_and_load(name, num_classes, tmp_path):
    model = build(name, num_classes=num_classes).eval()
    labels = None if num_classes is None else torch.tensor([0, 1, 2, 0])
    draw = {} if name not in STYLED else {"noise": "const"}
    with torch.no_grad():
        sample = model(noise(4), labels, **draw).sample
        assert sample.shape == (4, 1, 16, 16) and torch.isfinite(sample).all()
        assert_close(model(noise(4)[1:3], None if labels is None else labels[1:3], **draw).sample, sample[1:3], rtol=1e-4, atol=1e-5)
        model.save_pretrained(tmp_path)
        again = getattr(gen_pipelines, name).from_pretrained(tmp_path)
        assert torch.equal(again.eval()(noise(4), labels, **draw).sample, sample)
        if num_classes is not None:
            other = model(noise(4), labels.roll(1), **draw).sample
            untrained = name in ("DCGANGenerator", "ResNetGenerator")  # all classes of a conditional norm begin alike
            assert untrained == bool(torch.allclose(other, sample))
    wrong = torch.tensor([0, 1, 2]) if num_classes else torch.tensor([0, 0, 0, 0])
    with pytest.raises(ValueError, match="give 4 whole numbers" if num_classes else "without classes"):
        model(noise(4), wrong)


@pytest.mark.parametrize("num_classes", [None, 3])
@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_discriminators_judge_save_load_and_have_penalties(name, num_classes, tmp_path):
    model = build(name, num_classes=num_classes)
    labels = None if num_classes is None else torch.tensor([0, 1, 2, 0])
    pictures = torch.randn(4, 1, 16, 16, requires_grad=True)
    logits = model(pictures, labels).logits
    assert logits.shape == (4,)
    model.save_pretrained(tmp_path)
    assert torch.equal(getattr(gen_pipelines, name).from_pretrained(tmp_path).train()(pictures, labels).logits, logits)
    (gradient,) = torch.autograd.grad(logits.sum(), pictures, create_graph=True)
    gradient.square().sum().backward()  # what R1 and a gradient penalty need: the gradient of a gradient
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["DCGANDiscriminator", "ResNetDiscriminator"])
def test_spectral_norm_bounds_the_slope(name, tmp_path):
    """Every layer has norm at most one, so with slopes of at most one the network's is bounded; a plain one of large weights is not."""
    model = build(name, spectral=True, **({"norm": "none"} if name.startswith("DCGAN") else {})).train()
    x = torch.randn(2, 1, 16, 16, requires_grad=True)
    for _ in range(20):  # the power iteration settles
        logits = model(x).logits
    weight = dict(model.named_modules())["head"].weight
    assert_close(torch.linalg.matrix_norm(weight.detach(), 2), torch.tensor(1.0), rtol=1e-3, atol=0)
    model.eval()
    logits = model(x).logits
    model.save_pretrained(tmp_path)
    assert_close(type(model).from_pretrained(tmp_path).eval()(x).logits, logits)


@pytest.mark.parametrize("name", STYLED)
def test_truncation_pulls_to_the_average(name):
    model = build(name).eval()
    model.mapping.w_avg.copy_(torch.randn(8))
    with torch.no_grad():
        average = model.synthesize(model.mapping.w_avg.expand(2, model.num_ws, -1), noise="const")
        assert_close(model(noise(2), truncation=0.0, noise="const").sample, average)
        full = model.map(noise(2))
        half = model.map(noise(2), truncation=0.5, cutoff=2)
        assert_close(half[:, :2], (full[:, :2] + model.mapping.w_avg) / 2)
        assert torch.equal(half[:, 2:], full[:, 2:])


@pytest.mark.parametrize("name", ["StyleGAN1Generator", "StyleGAN2Generator"])
def test_styles_of_fine_layers_leave_the_coarse_ones_alone(name):
    """Mixing from layer k on: what the network computed before layer k is the same, bit for bit."""
    model = build(name).eval()
    seen = []
    model_block = model.b8 if name == "StyleGAN1Generator" else model.synthesis.b8
    model_block.register_forward_hook(lambda module, inputs, output: seen.append(output[0] if isinstance(output, tuple) else output))
    with torch.no_grad():
        first, second = model.map(noise(2)), model.map(noise(2).flip(0))
        boundary = model.num_ws - 2  # the last resolution
        mixed = torch.cat([first[:, :boundary], second[:, boundary:]], 1)
        one, two = (model.synthesize(ws, noise="none") for ws in (first, mixed))
    assert torch.equal(seen[0], seen[1]) and not torch.allclose(one, two)


def test_the_average_style_follows_the_mapping():
    model = build("StyleGAN2Generator", w_avg_beta=0.5)
    before = model.mapping.w_avg.clone()
    styles = model.mapping(noise(4), update_average=True)
    assert_close(model.mapping.w_avg, (before + styles.detach().mean(0)) / 2)
    model.mapping(noise(4))
    assert_close(model.mapping.w_avg, (before + styles.detach().mean(0)) / 2)


@pytest.mark.parametrize("architecture", ["skip", "resnet", "orig"])
def test_architectures_of_stylegan2(architecture):
    generator = build("StyleGAN2Generator", architecture=architecture)
    discriminator = build("StyleGAN2Discriminator", architecture=architecture)
    logits = discriminator(generator(noise(4)).sample).logits
    logits.sum().backward()
    assert logits.shape == (4,)
    unreached = [n for model in (generator, discriminator) for n, p in model.named_parameters() if p.grad is None]
    assert not unreached
    assert generator.num_ws == 2 * int(math.log2(16)) - 2


def test_random_noise_belongs_to_the_sample():
    model = build("StyleGAN2Generator").eval()
    for module in model.modules():
        if hasattr(module, "noise_strength"):
            torch.nn.init.ones_(module.noise_strength)

    def draw(seeds):
        return model(noise(4)[: len(seeds)] * 0 + 1, generator=[torch.Generator().manual_seed(s) for s in seeds]).sample

    with torch.no_grad():
        many, one = draw([5, 6, 7]), draw([6])
    assert_close(many[1:2], one, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(many[0], many[1])


def test_minibatch_deviation_sees_a_collapsed_batch():
    x = torch.randn(8, 4, 3, 3)
    appended = minibatch_std(x, 4)
    assert appended.shape == (8, 5, 3, 3)
    grouped = x.reshape(4, 2, 4, 3, 3)
    assert_close(appended[1, 4, 0, 0], (grouped[:, 1].var(0, unbiased=False) + 1e-8).sqrt().mean())
    assert (minibatch_std(x[:1].expand(8, -1, -1, -1), 4)[:, 4] < 2e-4).all()


@pytest.mark.parametrize("shift", [(2, 0), (-1, 3)])
def test_stylegan3_moves_with_its_input_and_stylegan2_has_no_such_thing(shift):
    """A translation of the input signal by whole output pixels translates the picture (up to the filters' leakage and the border)."""
    model = build("StyleGAN3Generator", sample_size=32, num_layers=6, num_critical=2, channel_max=16).eval()
    model.mapping.w_avg.zero_()
    with torch.no_grad():
        ws = model.map(noise(1))
        still = model.synthesize(ws)
        model.synthesis.input.transform[0, 2], model.synthesis.input.transform[1, 2] = -shift[0] / 32, -shift[1] / 32
        moved = model.synthesize(ws)
    expected = still.roll((shift[1], shift[0]), (2, 3))
    inner = (slice(None), slice(None), slice(8, -8), slice(8, -8))
    error = (moved[inner] - expected[inner]).square().mean()
    wrong = (moved[inner] - still[inner]).square().mean()
    assert error < 0.02 * wrong, (error, wrong)


@pytest.mark.parametrize(("name", "changes", "message"), [
    ("StyleGAN2Generator", {"sample_size": 28}, "power of two"),
    ("StyleGAN3Generator", {"variant": "x"}, "none of t, r"),
    ("DCGANGenerator", {"sample_size": 30}, "times a power of two"),
    ("DCGANDiscriminator", {"norm": "instance"}, "none of batch, layer, none"),
])  # fmt: skip
def test_what_cannot_be_built_says_why(name, changes, message):
    with pytest.raises(ValueError, match=message):
        build(name, **changes)
