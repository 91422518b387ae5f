"""k-diffusion's hourglass transformer: the converted pipeline computes what the original does, said again in `foreign_unets`."""

import json

import pytest
import torch
from conversion.checkpoints import hdit
from safetensors.torch import load_file
from torch.testing import assert_close

from gen_pipelines import AutoPipeline, HDiTModel, convert

SIGMA = torch.tensor([0.03, 1.3, 60.0])
BRANCHES = {
    "neighbourhood, global": {},
    "one level, global": {"widths": (16,), "layers": (2,), "attention": (("global", None, 8),)},
    "shifted windows": {"widths": (16, 16), "layers": (3, 2), "patch": 1,
                        "attention": (("shifted-window", 2, 8), ("shifted-window", 2, 16))},
    "three levels, none": {"widths": (16, 16, 32), "layers": (1, 1, 1), "channels": 1, "patch": 1, "mapping_layers": 0,
                           "attention": (("none", None, None), ("neighborhood", 3, 16), ("global", None, 16))},
    "whole neighbourhood, classes": {"widths": (16,), "layers": (2,), "attention": (("neighborhood", 3, 8),), "classes": 3},
}  # fmt: skip


def given(network, labels=(0, 2, 3)):
    """(labels, augmentation) of three pictures."""
    return torch.tensor(labels) if network.classes else None, torch.randn(3, 9, generator=torch.Generator().manual_seed(2))


def noisy(channels, size=8):
    return torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(1))


def check_close(actual, expected):
    assert_close(actual / expected.abs().max(), expected / expected.abs().max(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("branch", BRANCHES)
@torch.no_grad()
def test_it_denoises_as_the_original_does(branch, tmp_path):
    network = hdit.foreign(**BRANCHES[branch])
    convert(hdit.write(tmp_path, network), tmp_path / "out")
    pipe = AutoPipeline.from_pretrained(str(tmp_path / "out"))
    x, time = noisy(network.channels), SIGMA.log() / 4
    labels, augmentation = given(network)
    expected = network(x, SIGMA, labels)
    check_close(pipe.unet(x, time, labels).sample, expected)
    augmented = network(x, SIGMA, labels, augmentation=augmentation)
    check_close(pipe.unet(x, time, labels, augmentation=augmentation).sample, augmented)
    assert not torch.allclose(augmented, expected, atol=1e-2)
    p, s = pipe.scheduler.parameterization, SIGMA.view(-1, 1, 1, 1)
    noised = x * (1 + s)
    total = s.square() + 0.25
    denoised = 0.25 / total * noised + s / 2 / total.sqrt() * network(noised / total.sqrt(), SIGMA, labels)
    output = pipe.unet(p.scale_model_input(noised, SIGMA), p.network_time(SIGMA).float(), labels).sample
    check_close(p.denoise(output, noised, SIGMA)[0], denoised)


@torch.no_grad()
def test_pictures_that_are_no_squares(tmp_path):
    network = hdit.foreign()
    convert(hdit.write(tmp_path, network), tmp_path / "out")
    unet = HDiTModel.from_pretrained(tmp_path / "out" / "unet")
    x = torch.randn(3, 3, 8, 20, generator=torch.Generator().manual_seed(1))
    for wide in (x, x.mT):
        check_close(unet(wide, SIGMA.log() / 4).sample, network(wide, SIGMA))


@torch.no_grad()
def test_classes_and_the_one_that_means_none(tmp_path):
    network = hdit.foreign(**BRANCHES["whole neighbourhood, classes"])
    convert(hdit.write(tmp_path, network), tmp_path / "out")
    pipe = AutoPipeline.from_pretrained(str(tmp_path / "out"))
    pipe.set_progress_bar_config(disable=True)
    assert (pipe.null_class, pipe.num_classes, pipe.scheduler.config.use_karras_sigmas) == (3, 3, True)
    assert torch.isfinite(pipe(class_labels=[0, 2], num_inference_steps=2, guidance_scale=2.0, output_type="latent").images).all()
    said = hdit.configuration(network, dataset={"cond_dropout_rate": 0.0})
    plan = convert(hdit.write(tmp_path, network, said=said), dry_run=True)
    assert plan.components["unet"].config["num_class_embeds"] == 3 and "null_class" not in plan.init  # its last row was never trained


@torch.no_grad()
def test_a_vector_besides_the_time(tmp_path):
    network = hdit.foreign(condition=4)
    path, x = hdit.write(tmp_path, network), noisy(3)
    with pytest.raises(ValueError, match="condition=classes"):
        convert(path, dry_run=True)
    convert(path, tmp_path / "vector", options={"condition": "vector"})
    unet = HDiTModel.from_pretrained(tmp_path / "vector")
    vector = torch.randn(3, 4, generator=torch.Generator().manual_seed(4))
    check_close(unet(x, SIGMA.log() / 4, condition=vector).sample, network(x, SIGMA, vector=vector))
    convert(path, tmp_path / "classes", options={"condition": "classes"})
    unet = AutoPipeline.from_pretrained(str(tmp_path / "classes")).unet
    expected = network(x, SIGMA, vector=torch.eye(4)[[0, 3, 2]])
    check_close(unet(x, SIGMA.log() / 4, torch.tensor([0, 3, 2])).sample, expected)
    both = hdit.foreign(condition=4, classes=2)
    with pytest.raises(ValueError, match="give condition=vector"):
        convert(hdit.write(tmp_path, both), dry_run=True, options={"condition": "classes"})


def test_slim_files_other_weights_and_a_configuration_beside(tmp_path):
    network = hdit.foreign()
    convert(hdit.write(tmp_path, network), tmp_path / "ema")
    convert(hdit.write(tmp_path, network), tmp_path / "last", options={"weights": "model"})
    convert(hdit.write(tmp_path, network, "slim.safetensors", slim=True), tmp_path / "slim")
    weights = {name: load_file(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors") for name in ("ema", "last", "slim")}
    assert all(torch.equal(weights["slim"][key], value) and torch.equal(weights["last"][key], value + 1)
               for key, value in weights["ema"].items())  # fmt: skip
    torch.save(dict(network.w), tmp_path / "bare.pth")
    with pytest.raises(ValueError, match="--config FILE"):
        convert(tmp_path / "bare.pth", dry_run=True)
    (tmp_path / "config.json").write_text(json.dumps(hdit.configuration(network)))
    plan = convert(tmp_path / "bare.pth", dry_run=True, options={"config": str(tmp_path / "config.json")})
    assert plan.components["unet"].config["attention_types"] == ["neighborhood", "global"]


@pytest.mark.parametrize(("changes", "message"), [
    ({"type": "image_v1"}, "weights are those of 'image_transformer_v2'"),
    ({"widths": [16, 16]}, r"model.widths is \[16, 16\], but the weights are those of \[16, 32\]"),
    ({"depths": [2, 2]}, "model.depths"),
    ({"d_ffs": None}, r"model.d_ffs is \[48, 96\]"),
    ({"mapping_width": 64}, "mapping_width"),
    ({"mapping_depth": 0}, "mapping_depth is 0"),
    ({"mapping_d_ff": None}, "mapping_d_ff is 96"),
    ({"mapping_cond_dim": 3}, "mapping_cond_dim is 3"),
    ({"self_attns": None}, "heads of 16"),  # by default heads have 64 channels
    ({"self_attns": [{"type": "global", "d_head": 16}]}, "a list of 2 objects"),
    ({"self_attns": [{"type": "none"}, {"type": "global", "d_head": 16}]}, r"self_attns\[0\]"),
    ({"self_attns": [{"type": "local"}, {"type": "global", "d_head": 16}]}, "none of neighborhood"),
    ({"self_attns": [{"type": "shifted-window", "d_head": 16}, {"type": "global", "d_head": 16}]}, "window_size = None"),
    ({"self_attns": [{"type": "neighborhood", "d_head": 16, "kernel_size": 4}, {"type": "global", "d_head": 16}]}, "an odd one"),
    ({"patch_size": [2, 4]}, "squares"),
    ({"patch_size": [4, 4]}, "make 48 numbers of a patch, and the weights have 12"),
    ({"has_variance": True}, "has_variance"),
    ({"dropout_rate": [0.1]}, "dropout_rate"),
    ({"sigma_max": None}, "sigma_max = None"),
    ({"input_size": [4, 4]}, "a neighbourhood has 3"),
    ({"dataset": {"num_classes": 5}}, "num_classes is 5, but the weights are those of 0"),
])  # fmt: skip
def test_a_configuration_that_does_not_fit_is_refused(changes, message, tmp_path):
    network = hdit.foreign()
    path = hdit.write(tmp_path, network, said=hdit.configuration(network, **changes))
    with pytest.raises(ValueError, match=message):
        convert(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_not_converted(tmp_path):
    path = hdit.write(tmp_path)
    content = torch.load(path, weights_only=True)
    torch.save({**content, "model_ema": {**content["model_ema"], "mid_level.0.surprise": torch.zeros(2)}}, tmp_path / "more.pth")
    with pytest.raises(ValueError, match="have no place in it"):
        convert(tmp_path / "more.pth", dry_run=True)
    for key in ("up_levels.0.0.ff.up_proj.weight", "merges.0.proj.weight", "mid_level.1.self_attn.scale"):
        less = {name: value for name, value in content["model_ema"].items() if name != key}
        torch.save({**content, "model_ema": less}, tmp_path / "less.pth")
        with pytest.raises(ValueError, match="nothing fills|has no"):
            convert(tmp_path / "less.pth", dry_run=True)
    first = dict.fromkeys(("in_proj.weight", "time_emb.weight", "aug_emb.weight", "mapping.in_norm.scale"), torch.zeros(4, 1))
    torch.save({**content, "model": first, "model_ema": first}, tmp_path / "v1.pth")
    with pytest.raises(ValueError, match="image_transformer_v1, which is not converted"):
        convert(tmp_path / "v1.pth", dry_run=True)
