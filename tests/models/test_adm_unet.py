"""The ablated diffusion models' U-Net; that it computes what OpenAI's code does is in tests/conversion."""

import pytest
import torch

from gen_pipelines import ADMUNet2DModel
from gen_pipelines.models.layers.unet_blocks import RESAMPLINGS, PixelAttention, TimedResidualBlock, sinusoids

SMALL = {"block_out_channels": (32, 64), "layers_per_block": 1, "attention_levels": (False, True), "attention_head_dim": 32}


def small(**changes):
    torch.manual_seed(0)
    return ADMUNet2DModel(**{**SMALL, **changes})


@pytest.mark.parametrize("resample", RESAMPLINGS)
def test_shapes_and_zero_at_the_start(resample):
    network = small(resample_type=resample, out_channels=6, sample_size=(8, 16))
    out = network(torch.randn(2, 3, 8, 16), 0.5)
    assert out.sample.shape == (2, 6, 8, 16) and float(out.sample.detach().abs().max()) == 0.0
    assert network(torch.randn(2, 3, 8, 16), torch.tensor([0.1, 3.0]), return_dict=False)[0].shape == (2, 6, 8, 16)


def test_blocks_start_as_the_identity():
    x, time = torch.randn(2, 32, 4, 4), torch.randn(2, 16)
    assert torch.equal(TimedResidualBlock(32, 32, 16)(x, time), x)
    assert torch.equal(PixelAttention(32, 4)(x), x)


def test_time_and_class_are_per_picture():
    network = small(num_class_embeds=3, sample_size=8).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        x, t, labels = torch.randn(3, 3, 8, 8).double(), torch.tensor([0.0, 5.0, 5.0]), torch.tensor([1, 1, 2])
        together = network(x, t, class_labels=labels).sample
        for i in range(3):
            alone = network(x[i : i + 1], t[i], class_labels=labels[i : i + 1]).sample
            torch.testing.assert_close(together[i : i + 1], alone)
        assert float((network(x, t, class_labels=labels.flip(0)).sample - together).abs().max()) > 1e-4


def test_checkpointing_changes_no_gradient():
    gradients = []
    for on in (False, True):
        network = small(sample_size=8)
        torch.nn.init.ones_(network.conv_out.weight)
        if on:
            network.enable_gradient_checkpointing()
        network(torch.ones(1, 3, 8, 8), 3.0).sample.square().mean().backward()
        gradients.append(network.conv_in.weight.grad)
    torch.testing.assert_close(*gradients)


def test_saved_and_loaded(tmp_path):
    network = small(sample_size=8, num_attention_heads=4, attention_head_dim=None, up_num_attention_heads=2)
    network.save_pretrained(tmp_path)
    again = ADMUNet2DModel.from_pretrained(tmp_path)
    assert again.config["up_num_attention_heads"] == 2
    for key, value in network.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)


def test_sinusoids_end_at_the_longest_period():
    table = sinusoids(torch.tensor([2.0]), 6)[0].double()
    angles = torch.tensor([2.0, 2.0 * 10000 ** (-1 / 3), 2.0 * 10000 ** (-2 / 3)], dtype=torch.float64)
    torch.testing.assert_close(table, torch.cat([angles.cos(), angles.sin()]), rtol=1e-6, atol=1e-7)
    assert sinusoids(torch.tensor([2.0]), 5).shape == (1, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resample_type": "fir"}, "none of conv, pool, residual"),
        ({"attention_levels": (True,)}, "give one each"),
        ({"block_out_channels": (32, 40)}, "multiples of 32"),
        ({"num_attention_heads": 2}, "got both"),
        ({"attention_head_dim": None}, "got neither"),
        ({"attention_head_dim": 48}, "heads of 48 channels"),
    ],
)
def test_what_does_not_fit_is_said(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_labels_are_for_networks_with_classes():
    with pytest.raises(ValueError, match="no classes"):
        small()(torch.zeros(1, 3, 8, 8), 0.0, class_labels=torch.tensor([0]))
    with pytest.raises(ValueError, match="give class_labels"):
        small(num_class_embeds=2)(torch.zeros(1, 3, 8, 8), 0.0)
