"""EQ-T and EQ-R: the rotation of pictures against the rotation of functions, and the order of the networks that the paper reports."""

import math

import pytest
import torch
from torch.testing import assert_close

import gen_pipelines
from gen_pipelines.evaluation.equivariance import measure_equivariance, moved_input, resample

SMALL = {"sample_size": 64, "out_channels": 1, "z_dim": 16, "w_dim": 16, "channel_base": 512, "channel_max": 16, "num_mapping_layers": 2}
NETWORKS = {
    "t": ("StyleGAN3Generator", {"variant": "t"}),
    "r": ("StyleGAN3Generator", {"variant": "r"}),
    "2": ("StyleGAN2Generator", {}),
    "1": ("StyleGAN1Generator", {}),
}


def build(name, **changes):
    torch.manual_seed(0)
    kind, options = NETWORKS[name]
    return getattr(gen_pipelines, kind)(**SMALL | options | changes)


def turn(angle):
    return torch.tensor([[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0], [0.0, 0.0, 1.0]])


def waves(motion, size=48, cycles=9.0):
    """A sum of three waves of up to `cycles` per picture, read at motion p, (1, 1, H, W)."""
    axis = (torch.arange(size, dtype=torch.float64) + 0.5) / size - 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    x, y = (torch.stack([x, y, torch.ones_like(x)], -1) @ motion.double().T)[..., :2].unbind(-1)
    return sum(torch.sin(2 * math.pi * (a * x + b * y) + c) for a, b, c in ((cycles, 0, 0.3), (-4, 5, 1.0), (2, -1, 2.0)))[None, None]


@pytest.mark.parametrize("motion", [turn(0.7), turn(2.5), torch.tensor([[1.0, 0, 0.03], [0, 1, -0.05], [0, 0, 1]])])
def test_a_resampled_picture_is_the_picture_of_the_moved_function(motion):
    moved, valid = resample(waves(motion), torch.eye(3))
    sampled, valid_too = resample(waves(torch.eye(3)), motion)
    valid = valid & valid_too
    assert valid.sum() > 500
    assert_close(sampled[valid], moved[valid], rtol=0, atol=0.01)
    assert_close(sampled[valid], waves(motion)[valid], rtol=0, atol=0.03)                              # within the passband
    assert (resample(waves(torch.eye(3), cycles=23.9), torch.eye(3))[0][valid] - waves(torch.eye(3), cycles=0.0)[valid]).abs().max() < 1.5


def test_the_input_moves_and_comes_back():
    for name in ("t", "2"):
        network = build(name)
        before = {key: value.clone() for key, value in network.state_dict().items()}
        ws = torch.randn(1, network.num_ws, 16)
        with torch.no_grad():
            still = network.synthesize(ws, "none")
            with moved_input(network, turn(math.pi)):
                assert not torch.allclose(network.synthesize(ws, "none"), still, atol=1e-3)
            with moved_input(network, torch.eye(3)):
                assert_close(network.synthesize(ws, "none"), still, rtol=1e-4, atol=1e-4)
        assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_what_turns_with_its_input_and_what_does_not():
    """Random networks at 64 x 64: T moves, R moves and turns, StyleGAN 1 and 2 do neither."""
    found = {}
    for name in NETWORKS:
        found[name] = measure_equivariance(build(name), 2, 2, torch.Generator().manual_seed(0), peak=None)
    assert found["r"].rotation > found["t"].rotation + 25
    for name in ("1", "2"):
        assert found[name].translation < min(found["t"].translation, found["r"].translation) - 25
        assert found[name].rotation < found["r"].rotation - 25
    assert min(found["t"].translation, found["r"].translation) > 45


def test_the_peak_and_what_is_refused():
    network = build("2", sample_size=32)
    draw = lambda peak: measure_equivariance(network, 1, 1, torch.Generator().manual_seed(0), peak=peak)
    assert draw(4.0).translation - draw(2.0).translation == pytest.approx(20 * math.log10(2))
    with pytest.raises(TypeError, match="has no styles"):
        measure_equivariance(gen_pipelines.DCGANGenerator(16, 1))
    with pytest.raises(ValueError, match="at least 1"):
        measure_equivariance(network, 0)
    with pytest.raises(ValueError, match="max_shift = 0.5"):
        measure_equivariance(network, 1, max_shift=0.5)
