"""`generate` on a tiny random pipeline, from its arguments to the pictures on the disk."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gen_pipelines import __version__
from gen_pipelines.cli.main import main
from gen_pipelines.cli.pictures import read_settings

ROOT = Path(__file__).parents[2]


@pytest.fixture
def generate(sd_folder, tmp_path, monkeypatch, capsys):
    """generate(*words) -> (exit status, printed paths, stderr), in a new folder, in two steps."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, list[str], str]:
        usual = [] if "--like" in words else ["--model", sd_folder, "--steps", "2", "--device", "cpu"]  # what comes later wins
        status = main(["generate", *usual, *words])
        out, err = capsys.readouterr()
        return status, out.splitlines(), err

    return run


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def test_a_picture_and_the_settings_in_it(generate, sd_folder):
    status, paths, _ = generate("a red apple", "--negative", "a pear", "--guidance", "3", "--seed", "5")
    assert (status, paths) == (0, ["a-red-apple-5.png"])
    settings = read_settings(paths[0])
    assert settings.pop("model_revision").startswith("sha256:")
    assert settings.pop("torch_version")
    assert settings == {
        "prompt": "a red apple",
        "negative_prompt": "a pear",
        "seed": 5,
        "scheduler": "ddim",
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "height": 16,
        "width": 16,
        "dtype": "float32",
        "model": sd_folder,
        "revision": None,
        "pipeline": "LatentTextToImagePipeline",
        "gen_pipelines_version": __version__,
    }


def test_like_draws_it_again(generate):
    generate("a red apple", "--guidance", "2.5", "--scheduler", "euler", "--out", "first.png")
    status, paths, _ = generate("--like", "first.png", "--out", "again.png")
    assert (status, paths) == (0, ["again.png"])
    assert (pixels("first.png") == pixels("again.png")).all()
    assert read_settings("first.png") == read_settings("again.png")
    generate("--like", "first.png", "--seed", "1", "--out", "other.png")
    assert (pixels("first.png") != pixels("other.png")).any()
    assert read_settings("other.png") == read_settings("first.png") | {"seed": 1}


def test_a_picture_does_not_depend_on_its_neighbours(generate):
    status, paths, _ = generate("a cat", "a dog", "--num", "2", "--batch-size", "3")
    assert (status, paths) == (0, ["a-cat-0.png", "a-cat-1.png", "a-dog-2.png", "a-dog-3.png"])
    generate("a dog", "--seed", "2", "--out", "alone.png")
    # kernels round differently in another batch, by at most one level of 255
    assert np.abs(pixels("alone.png") - pixels("a-dog-2.png")).max() <= 1
    assert np.abs(pixels("alone.png") - pixels("a-dog-3.png")).max() > 1


def test_prompts_from_a_file_and_a_grid(generate):
    Path("prompts.txt").write_text("a cat\n\n  a dog  \n")
    status, paths, _ = generate("--prompts-file", "prompts.txt", "--num", "3", "--grid", "--out", "pictures")
    assert status == 0 and paths[-1] == "pictures/grid.png" and len(paths) == 7
    grid = pixels("pictures/grid.png")
    assert grid.shape == (16 + 2 + 16, 3 * 16 + 2 * 2, 3)  # a prompt in a row
    assert (grid[18:, 18:34] == pixels("pictures/a-dog-4.png")).all()
    assert read_settings("pictures/grid.png")["prompts"] == ["a cat", "a dog"]

    status, paths, _ = generate("--like", "pictures/grid.png", "--grid", "--out", "again.png")
    assert (status, paths) == (0, ["again.png"])
    assert (pixels("again.png") == grid).all()


def test_the_scheduler_changes_the_picture(generate):
    generate("a cat", "--out", "default.png")
    generate("a cat", "--scheduler", "DDIMScheduler", "--out", "same.png")  # its own keeps its settings
    generate("a cat", "--scheduler", "ddpm", "--out", "other.png")
    generate("a cat", "--scheduler", "DDPM", "--out", "capitals.png")
    assert (pixels("other.png") == pixels("capitals.png")).all()
    assert (pixels("default.png") == pixels("same.png")).all()
    assert np.abs(pixels("default.png") - pixels("other.png")).max() > 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--scheduler", "Nothing"], "--scheduler Nothing: there is no such scheduler; there are "),
        (["--size", "17x16"], "17"),
        (["--guidance", "-1"], "guidance"),
        (["--revision", "main"], "--revision main: "),
        (["--device", "abacus"], "--device abacus: cannot be used here"),
        (["--device", "cuda:99"], "--device cuda:99: cannot be used here"),
    ],
)
def test_bad_input_that_only_the_model_shows(generate, tmp_path, words, says):
    status, paths, err = generate("a cat", *words, "--out", "pictures")
    assert (status, paths) == (2, [])
    assert says in err.splitlines()[-1] and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_scheduler_is_answered_with_those_that_exist(generate):
    from gen_pipelines.schedulers import SCHEDULERS

    _, _, err = generate("a cat", "--scheduler", "Nothing")
    assert all(name in err for name in SCHEDULERS)


@pytest.fixture
def damaged(sd_folder, tmp_path_factory):
    """A copy of the pipeline, to be damaged."""
    import shutil

    return Path(shutil.copytree(sd_folder, tmp_path_factory.mktemp("damaged") / "pipeline"))


@pytest.mark.parametrize("damage", ["cut", "missing", "key", "index"])
def test_a_damaged_model_is_one_line(damaged, damage, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    weights = damaged / "unet" / "diffusion_pytorch_model.safetensors"
    scheduler = damaged / "scheduler" / "scheduler_config.json"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "missing":
        weights.unlink()
    elif damage == "key":
        scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"beta_strat": 0.1}))
    else:
        (damaged / "model_index.json").unlink()
    assert main(["generate", "a cat", "--model", str(damaged), "--out", "pictures"]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    culprit = {"cut": weights.name, "missing": weights.name, "key": "beta_strat", "index": "model_index.json"}[damage]
    assert err.startswith("gen-pipelines: error: ") and culprit in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_processes_draw_what_one_draws(generate, sd_folder, tmp_path):
    words = ["a cat", "a dog", "a red apple", "--grid", "--model", sd_folder, "--steps", "2", "--device", "cpu"]
    status, paths, _ = generate("a cat", "a dog", "a red apple", "--grid", "--out", "one")
    assert status == 0
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "gen_pipelines",
        "generate",
        *words,
        "--out",
        "two",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == sorted(path.replace("one/", "two/") for path in paths)
    for path in paths:
        assert np.abs(pixels(path) - pixels(path.replace("one/", "two/"))).max() <= 1  # another batch: one level of 255 at most
        assert read_settings(path) == read_settings(path.replace("one/", "two/"))


@pytest.mark.slow
def test_more_processes_than_pictures(sd_folder, tmp_path):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "gen_pipelines", "generate", "a cat"]
    options = ["--model", sd_folder, "--steps", "2", "--device", "cpu", "--grid", "--out", "cat.png"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command, *options], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["cat.png"] and [file.name for file in tmp_path.iterdir()] == ["cat.png"]


def test_a_gan_draws_seeds_with_truncation_and_again(tmp_path, monkeypatch, capsys):
    import torch

    from gen_pipelines import StyleGAN2Generator, StyleGANPipeline

    torch.manual_seed(0)
    network = StyleGAN2Generator(8, 1, 4, 4, channel_base=32, channel_max=4, num_mapping_layers=1)
    StyleGANPipeline(network).save_pretrained(tmp_path / "style")
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "--model", "style", "--seeds", "3-5", "--truncation", "0.5", "--out", "drawn"]) == 0
    paths = capsys.readouterr().out.splitlines()
    assert len(paths) == 3 and read_settings(paths[1])["seed"] == 4 and read_settings(paths[1])["truncation"] == 0.5
    assert main(["generate", "--like", paths[1], "--out", "again.png"]) == 0
    assert np.array_equal(pixels("again.png"), pixels(paths[1]))
    capsys.readouterr()
    for words, message in (
        (["--seeds", "3-5", "--num", "2"], "--seeds stands for --seed and --num"),
        (["--truncation", "nan"], "must be a finite number"),
        (["--steps", "3"], "--steps: a StyleGANPipeline has none"),
    ):
        assert main(["generate", "--model", "style", *words]) == 2
        assert message in capsys.readouterr().err
