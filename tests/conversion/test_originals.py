"""Numbers that the original implementations gave, for weights that a formula makes (`fakes.wave`), against the converted networks.

Where they are from: stylegan2-ada-pytorch at d72cc7d, stylegan3 at its main branch of 2021, with their reference operators in float32 on
a CPU; stylegan and stylegan2 in TensorFlow 1.15.5, their convolutions in NHWC; k-diffusion at 4601bf0, a
loop over queries in NATTEN's place. Rows are picture[:, :, 3, ::5] of two noises,
StyleGAN's truncated by 0.7 (of TensorFlow's networks, in the first three layers).
"""

import pytest
import torch
from conversion import fakes
from conversion.checkpoints import k_diffusion, stylegan1_tf, stylegan2_ada, stylegan2_tf, stylegan3

from gen_pipelines import (
    AutoPipeline,
    HDiTModel,
    KDiffusionUNetModel,
    StyleGAN2Discriminator,
    StyleGAN2Generator,
    StyleGAN3Generator,
    convert,
)

ADA = [
    0.946848, 1.254429, 1.263592, 0.519099, 0.943247, 1.27712, 1.391391, 0.603653, -0.241959, -0.306902, -0.18716, -0.34662,
    0.947008, 1.25446, 1.263635, 0.517167, 0.943619, 1.277654, 1.392027, 0.602749, -0.24181, -0.306511, -0.186675, -0.346407,
]  # fmt: skip
ADA_LOGITS = [-0.4400584, -0.4374909]
ALIAS_FREE_R = [
    0.238086, 0.238624, 0.238327, 0.238161, 0.220199, 0.218847, 0.217685, 0.216922, -0.057113, -0.0582, -0.058374, -0.058519,
    0.223276, 0.225951, 0.223447, 0.223883, 0.232349, 0.230153, 0.232997, 0.232071, -0.03737, -0.040936, -0.037278, -0.03809,
]  # fmt: skip
TENSORFLOW = {
    stylegan2_tf: [0.647233, 0.828247, 0.721695, 0.534092, 0.366474, 0.761033, 0.620054, 0.387735, -0.086643, 0.335893, 0.226793, 0.05902,
                   0.647787, 0.827551, 0.721496, 0.532176, 0.366208, 0.759207, 0.618907, 0.386063, -0.087604, 0.333797, 0.225236, 0.05838],
    stylegan1_tf: [-0.249369, -0.240609, -0.289968, -0.070111, -0.496737, -0.474175, -0.680848, -0.457112, -0.510482, -0.484728, -0.751514,
                   -0.629125, -0.248628, -0.239501, -0.289966, -0.080854, -0.498801, -0.477733, -0.685732, -0.460635, -0.514379, -0.491279,
                   -0.758988, -0.623772],
}  # fmt: skip

K_DIFFUSION = [
    12.976358, 13.221286, 13.226067, 12.811052, -5.606691, -5.780256, -5.778045, -5.373596, -0.690049, -0.616454, -0.625292, -0.952507,
    12.888084, 13.228579, 13.194881, 12.828888, -5.532215, -5.777616, -5.721422, -5.424043, -0.738443, -0.62859, -0.69802, -0.877768,
]  # fmt: skip
HOURGLASS = [
    0.259632, 0.011989, 0.419068, 0.650168, 0.428585, -0.070469, 0.632985, 0.085704, -0.085622, -0.0406, -0.16207, -0.615371,
    -0.210006, -0.234819, -0.201725, -0.221548, -0.02015, 0.144102, -0.096276, 0.177121, 0.201825, 0.293326, 0.162636, 0.293461,
]  # fmt: skip


def waved(model):
    """Filters and transforms are the network's own; the rest is waves, by the order of the names."""
    state = model.eval().state_dict()
    for k, name in enumerate(sorted(name for name in state if "filter" not in name and not name.endswith("transform"))):
        value = fakes.wave(tuple(state[name].shape), k)
        if name.endswith("magnitude_ema"):
            value = value.abs() + 0.5
        elif name.startswith("mapping.fc"):
            value = value * 100
        elif name.endswith("affine.bias"):
            value = value + 1
        state[name].copy_(value)
    return model


def row(pictures):
    return pictures[:, :, 3, ::5].flatten()


NOISE = 2 * fakes.wave((2, 8), 0)
LABELS = torch.tensor([0, 2])


@torch.no_grad()
def test_nvidias_stylegan2_ada():
    generator = waved(StyleGAN2Generator(**stylegan2_ada.GENERATOR))
    discriminator = waved(StyleGAN2Discriminator(**stylegan2_ada.DISCRIMINATOR))
    torch.testing.assert_close(row(generator(NOISE, LABELS, 0.7, noise="const").sample), torch.tensor(ADA), atol=2e-5, rtol=0)
    logits = discriminator(fakes.wave((2, 3, 16, 16), 1), LABELS).logits
    torch.testing.assert_close(logits, torch.tensor(ADA_LOGITS), atol=1e-5, rtol=0)


@torch.no_grad()
def test_nvidias_stylegan3_r():
    generator = waved(StyleGAN3Generator(**stylegan3.GENERATOR))
    torch.testing.assert_close(row(generator(NOISE, truncation=0.7).sample), torch.tensor(ALIAS_FREE_R), atol=5e-6, rtol=0)


@torch.no_grad()
def test_k_diffusions_network():
    """At sigma 0.1 and 7, with a vector of augmentations."""
    there = k_diffusion.foreign(size=16)
    unet = KDiffusionUNetModel(16, 3, 3, 1, there.mapping, there.widths, there.layers, there.attention, condition_channels=9).eval()
    state = unet.state_dict()
    for k, name in enumerate(sorted(state)):
        fan_in = state[name][0].numel() if state[name].ndim > 1 else 1
        state[name].copy_(fakes.wave(tuple(state[name].shape), k) * (1.5 / fan_in**0.5 if state[name].ndim > 1 else 1))
    time = torch.tensor([0.1, 7.0]).log() / 4
    pictures = unet(2 * fakes.wave((2, 3, 16, 16), 0), time, condition=fakes.wave((2, 9), 2)).sample
    torch.testing.assert_close(row(pictures), torch.tensor(K_DIFFUSION), atol=1e-4, rtol=0)


@torch.no_grad()
def test_k_diffusions_hourglass_transformer():
    """At sigma 0.1 and 7, a class and the one that means none, with a vector of augmentations."""
    network = HDiTModel(
        sample_size=16, patch_size=2, block_out_channels=(16, 32, 32), layers_per_block=(1, 2, 1), feed_forward_channels=(40, 64, 96),
        attention_types=("neighborhood", "shifted-window", "global"), attention_sizes=(3, 2, None), attention_head_dims=(16, 16, 8),
        mapping_channels=32, num_class_embeds=4,
    ).eval()  # fmt: skip
    state = network.state_dict()
    for k, name in enumerate(sorted(state)):
        fan_in = state[name][0].numel() if state[name].ndim > 1 else 1
        value = fakes.wave(tuple(state[name].shape), k) * (1.5 / fan_in**0.5 if state[name].ndim > 1 else 1)
        state[name].copy_(value + 5 if name.endswith("attention.scale") else value)
    time = torch.tensor([0.1, 7.0]).log() / 4
    pictures = network(2 * fakes.wave((2, 3, 16, 16), 0), time, torch.tensor([0, 3]), augmentation=fakes.wave((2, 9), 2)).sample
    torch.testing.assert_close(row(pictures), torch.tensor(HOURGLASS), atol=1e-4, rtol=0)


@pytest.mark.parametrize("example", TENSORFLOW, ids=["stylegan2", "stylegan1, fused"])
@torch.no_grad()
def test_tensorflows_networks(example, tmp_path):
    settings = {"fused_scale": True} if example is stylegan1_tf else {}
    convert(example.write(tmp_path, waves=True, **settings), tmp_path / "out")
    generator = AutoPipeline.from_pretrained(str(tmp_path / "out")).generator
    pictures = generator(NOISE, truncation=0.7, cutoff=3, noise="const").sample
    torch.testing.assert_close(row(pictures), torch.tensor(TENSORFLOW[example]), atol=2e-5, rtol=0)


def test_stylegan2_adas_classes_in_tensorflow(tmp_path):
    """Against NVIDIA's own conversion of the same pickle the pictures differed by 8e-7, the logits by 3e-7 of their scale."""
    convert(stylegan2_tf.write(tmp_path, classes=3), tmp_path / "out", options={"discriminator": True})
    pipe = AutoPipeline.from_pretrained(str(tmp_path / "out"))
    for name, network in stylegan2_tf.networks(3).items():
        for key, value in network.state_dict().items():
            # the discriminator's mapping learns at a tenth of the rate there, at a hundredth here, and stores what the rate multiplies
            expected = value * 10 if name == "discriminator" and key.startswith("mapping.fc") else value
            torch.testing.assert_close(getattr(pipe, name).state_dict()[key], expected, rtol=1e-6, atol=0, msg=key)


def test_what_the_converters_do_not_cover(tmp_path):
    cases = {
        "still growing": lambda: stylegan1_tf.write(tmp_path, lod=1.5),
        "pixel_norm": lambda: stylegan1_tf.write(tmp_path, use_pixel_norm=True),
        "surprise, which is not known": lambda: stylegan1_tf.write(tmp_path, surprise=1),
        "nonlinearity = 'relu'": lambda: stylegan2_tf.write(tmp_path, nonlinearity="relu"),
        "neither T": lambda: stylegan3.write(tmp_path, changes={"conv_kernel": 3}),
        "arguments surprise": lambda: stylegan3.write(tmp_path, changes={"surprise": 3}),
        "layer_features = 7": lambda: stylegan2_ada.write(tmp_path, changes={"mapping_kwargs": {"layer_features": 7}}),
        "nothing fills|no place|do not fit": lambda: stylegan3.write(tmp_path, changes={"num_layers": 5}),
    }
    for match, write in cases.items():
        with pytest.raises(ValueError, match=match):
            convert(write(), tmp_path / "out")
        assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"option network = 'g' is none of G_ema, G"):
        convert(stylegan2_ada.write(tmp_path), dry_run=True, options={"network": "g"})
    with pytest.raises(ValueError, match="discriminator = 'yes'; give true or false"):
        convert(stylegan2_ada.write(tmp_path), dry_run=True, options={"discriminator": "yes"})
