"""The task diffusion_image: exact resume, what is saved, labels and frames, latents, wrong recipes; and that it learns digits."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from gen_pipelines import AutoPipeline, DiffusionImagePipeline
from gen_pipelines.pipelines.pictures import as_pictures
from gen_pipelines.training.config import Recipe, build, load_recipe
from gen_pipelines.training.run import train
from gen_pipelines.training.state import checkpoints
from gen_pipelines.training.tasks import make_task
from tests.training.test_trainer import GRADIENTS, content, finish, start

UNET = {
    "class": "UNet2DModel",
    "sample_size": 12,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [16, 32],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "dropout": 0.1,  # draws from the global random state: resume must restore it
}
DIT = {"class": "DiTTransformer2DModel", "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "patch_size": 2}
DIT |= {"sample_size": 8, "in_channels": 1, "out_channels": 1, "dropout": 0.1}


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """sklearn's 8 x 8 digits as parquet, with labels."""
    import datasets
    from sklearn.datasets import load_digits

    data = load_digits()
    pictures = [Image.fromarray((picture * 255 / 16).round().astype("uint8")) for picture in data.images]
    folder = tmp_path_factory.mktemp("digits")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(i) for i in range(10)])})
    rows = {"image": pictures, "label": data.target.tolist()}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "train-00000-of-00001.parquet")
    return folder


def recipe(folder: Path, denoiser: dict = UNET, labels: bool = True, **loop) -> dict:
    return {
        "task": "diffusion_image",
        "data": {"name": str(folder), "resolution": 8, "channels": 1} | ({"label_column": "label"} if labels else {}),
        "model": {"denoiser": copy.deepcopy(denoiser), "scheduler": {"class": "DDPMScheduler"}, "default_num_inference_steps": 4},
        "objective": {"drop_label": 0.2},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
        "ema": {"decay": 0.9},
        "sample": {"pictures": 10, "steps": 2},
        "loop": {"steps": 4, "batch_size": 8, "checkpoint_every": 2, "log_every": 1, **loop},
    }


def written(settings: dict, folder: Path) -> Path:
    path = folder / f"recipe-{len(list(folder.iterdir()))}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_stop_and_resume_is_an_unbroken_run_bit_for_bit(kind, digits, tmp_path):
    settings = recipe(digits, UNET if kind == "unet" else DIT, labels=kind == "unet", sample_every=4, gradient_accumulation_steps=2)
    path = written(settings, tmp_path)
    train(path, output_dir=tmp_path / "whole")
    train(path, output_dir=tmp_path / "parts")
    last = checkpoints(tmp_path / "parts" / "checkpoints")[-1]
    for file in last.iterdir():
        file.unlink()
    last.rmdir()  # as if the run had been killed after step 2
    train(path, output_dir=tmp_path / "parts", resume=True)
    ends = [checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("whole", "parts")]
    assert content(ends[0]) == content(ends[1])
    part = "unet" if kind == "unet" else "transformer"
    files = [tmp_path / name / part / "diffusion_pytorch_model.safetensors" for name in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert list((tmp_path / "whole" / "samples").iterdir())

    pipe = AutoPipeline.from_pretrained(tmp_path / "whole")
    assert type(pipe) is DiffusionImagePipeline
    pipe.set_progress_bar_config(disable=True)
    picture = pipe(class_labels=3, guidance_scale=2.0).images[0] if kind == "unet" else pipe().images[0]
    assert (picture.size, picture.mode) == ((8, 8), "L")
    if kind == "unet":
        assert (pipe.num_classes, pipe.null_class, pipe.labels, pipe.unet.config.num_class_embeds) == (10, 10, {}, 11)
    else:
        assert (pipe.num_classes, pipe.null_class) == (None, 0)


def test_labels_are_dropped_as_often_as_asked_and_by_the_sample_alone(digits):
    task = make_task(build(Recipe, recipe(digits), "recipe"))
    batch = {"label": torch.full((1000,), 3), "row": list(range(1000)), "draw": [0] * 1000}
    labels = task._condition(batch, torch.zeros(1000)).labels
    assert set(labels.tolist()) == {3, 10}
    # 1000 draws of probability 0.2: within 5 standard deviations but for one seed in a million
    assert abs((labels == 10).sum().item() - 200) < 5 * 12.7
    half = {name: value[500:] for name, value in batch.items()}
    assert torch.equal(task._condition(half, torch.zeros(500)).labels, labels[500:])


def test_a_dit_drops_no_labels_by_itself(digits):
    """diffusers' class does in training, each block its own, from the global random state."""
    task = make_task(build(Recipe, recipe(digits, {**DIT, "dropout": 0.0}), "recipe"))
    network = task.networks["denoiser"].train()
    assert network.config.num_embeds_ada_norm == 10
    x, t, labels = torch.randn(256, 1, 8, 8), torch.zeros(256, dtype=torch.long), torch.arange(256) % 10
    outputs = [network(x, timestep=t, class_labels=labels).sample for _ in range(2)]
    assert torch.equal(*outputs)


def test_the_network_sees_framed_pictures(digits):
    task = make_task(build(Recipe, recipe(digits), "recipe"))
    seen = []
    task.networks["denoiser"].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    example = task.data[(0, 0)]
    batch = {"picture": example["picture"][None].float() / 127.5 - 1, "label": torch.tensor([1]), "row": [0], "draw": [0]}
    task.losses(task.networks, batch, "denoiser", torch.Generator().manual_seed(0))
    assert seen[0].shape == (1, 1, 12, 12) and task.pipeline(task.networks).picture_size == (8, 8)


def test_latents_of_a_given_autoencoder(digits, tmp_path):
    from diffusers import AutoencoderKL

    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    config = {"in_channels": 1, "out_channels": 1, "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}
    AutoencoderKL(**config, **kinds, latent_channels=2, scaling_factor=0.7, sample_size=8).save_pretrained(tmp_path / "vae")
    settings = recipe(digits, {**DIT, "sample_size": 4, "in_channels": 2, "out_channels": 2}, steps=2)
    settings["model"] |= {"vae": {"from": str(tmp_path / "vae")}, "scheduler": {"class": "FlowMatchEulerScheduler"}}
    settings["objective"] |= {"time_density": "logit_normal"}
    train(written(settings, tmp_path), output_dir=tmp_path / "run")
    pipe = AutoPipeline.from_pretrained(tmp_path / "run")
    assert pipe.vae.config.scaling_factor == 0.7 and pipe.parameterization.prediction == "flow_prediction"
    pipe.set_progress_bar_config(disable=True)
    assert pipe(class_labels=[1, 2], num_inference_steps=2).images[1].size == (8, 8)


@pytest.mark.parametrize("name", ["ddpm", "flow"])
def test_the_recipes_for_mnist_fit_their_budget(name, digits):
    path = Path(__file__).parents[2] / "configs" / "mnist" / f"{name}.yaml"
    task = make_task(load_recipe(path, [f"data.name={digits}"]))
    assert sum(p.numel() for p in task.networks["denoiser"].parameters()) <= 1_000_000
    pipe = task.pipeline(task.networks)
    assert (pipe.picture_size, pipe.latents_shape(1), pipe.null_class) == ((28, 28), (1, 1, 32, 32), 10)
    assert pipe.parameterization.prediction == {"ddpm": "epsilon", "flow": "flow_prediction"}[name]


WRONG = {
    "no denoiser": ({"model": {}}, "model.denoiser is missing"),
    "small": ({"model": {"denoiser": {**UNET, "sample_size": 4}}}, "sample_size: 4, but the pictures are 8 x 8; set it to 8"),
    "channels": ({"model": {"denoiser": {**UNET, "in_channels": 3}}}, "in_channels: 3, but the pictures"),
    "table": ({"model": {"denoiser": {**UNET, "num_class_embeds": 10}}}, "10 classes, and one more for none .*; set it to 11"),
    "no labels": ({"data": {"label_column": None}, "model": {"denoiser": {**UNET, "num_class_embeds": 3}}}, "set data.label_column"),
    "drop": ({"objective": {"drop_label": 1.5}}, "between 0 and 1"),
    "pictures": ({"sample": {"pictures": 0}}, "at least 1 picture"),
    "dtype": ({"model": {"denoiser": UNET, "save_dtype": "int8"}}, "save_dtype"),
    "unknown": ({"objective": {"drop_labels": 0.1}}, "unknown setting"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_recipe_is_one_error_before_any_training(name, digits):
    changes, message = WRONG[name]
    settings = recipe(digits)
    for group, values in changes.items():
        settings[group] = values if group == "model" else settings[group] | values
    with pytest.raises(ValueError, match=message):
        make_task(build(Recipe, settings, "recipe"))


@pytest.mark.slow
def test_two_ranks_have_the_gradients_of_one(digits, tmp_path):
    """Two gloo processes and one with the whole batch: labels, their dropping, times and noise belong to the samples."""
    settings = recipe(digits, {**UNET, "dropout": 0.0}, steps=2, checkpoint_every=0, max_grad_norm=None)
    settings["optimizer"]["eps"] = 1e-3  # Adam divides by the gradient's size: without it, rounding of tiny ones becomes the update
    path = written(settings, tmp_path)
    finish(start(path, tmp_path / "one", code=GRADIENTS))
    finish(start(path, tmp_path / "two", ranks=2, code=GRADIENTS))
    one, two = (load_file(f"{tmp_path / name}.gradients") for name in ("one", "two"))
    assert one.keys() == two.keys() and one
    scale = max(gradient.abs().max().item() for gradient in one.values())
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddpm", "flow"])
def test_it_learns_digits(kind, digits, tmp_path):
    """Most drawn digits look like their class: the nearest class mean of the data is the label's."""
    settings = recipe(digits, {**UNET, "block_out_channels": [32, 64], "dropout": 0.0}, steps=250, batch_size=64, checkpoint_every=0)
    settings["ema"] = {"decay": 0.98}
    settings["optimizer"] |= {"learning_rate": 2e-3, "schedule": "cosine"}
    if kind == "flow":
        settings["model"]["scheduler"] = {"class": "FlowMatchEulerScheduler"}
        settings["objective"]["time_density"] = "logit_normal"
    train(written(settings, tmp_path), output_dir=tmp_path / "run")
    pipe = AutoPipeline.from_pretrained(tmp_path / "run")
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    drawn = pipe(class_labels=list(range(10)) * 10, guidance_scale=2.0, num_inference_steps=25, generator=generator).images
    task = make_task(build(Recipe, settings, "recipe"))
    real = torch.stack([task.pictures.picture(i) for i in range(len(task.pictures))]).float() / 127.5 - 1
    labels = torch.tensor(task.pictures.labels)
    means = torch.stack([real[labels == c].mean(0) for c in range(10)])
    nearest = torch.cdist(as_pictures(drawn, 1).flatten(1), means.flatten(1)).argmin(1)
    accuracy = (nearest == torch.arange(10).repeat(10)).float().mean().item()
    assert accuracy > 0.6, accuracy  # of the data itself 0.9, of chance 0.1
