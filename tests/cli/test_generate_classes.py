"""`generate` and `info` on a model that draws classes, or nothing in particular, instead of prompts."""

import json

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image

from gen_pipelines import DDIMScheduler, DiffusionImagePipeline
from gen_pipelines.cli.generate import build_parser, read_classes
from gen_pipelines.cli.main import main
from gen_pipelines.cli.pictures import read_settings
from tests.conftest import _seeded


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    config = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16), "norm_num_groups": 8}
    kinds = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "layers_per_block": 1}
    unet = _seeded(lambda: UNet2DModel(**config, **kinds, num_class_embeds=5), 0)
    with torch.no_grad():
        unet.class_embedding.weight.mul_(5)  # so that classes show
    folder = tmp_path_factory.mktemp("model")
    names = {0: "tench", 2: "white shark"}
    DiffusionImagePipeline(DDIMScheduler(), unet=unet, image_size=6, null_class=4, id2label=names).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def generate(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, list[str], str]:
        usual = [] if "--like" in words else ["--model", model, "--steps", "2", "--device", "cpu"]
        status = main(["generate", *usual, *words])
        out, err = capsys.readouterr()
        return status, out.splitlines(), err

    return run


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def test_pictures_of_nothing_in_particular(generate):
    status, paths, _ = generate("--num", "4", "--grid", "--seed", "3")
    assert (status, paths) == (0, [*(f"picture-{i}.png" for i in range(3, 7)), "grid.png"])
    assert pixels("picture-3.png").shape == (6, 6) and pixels("grid.png").shape == (14, 14)  # as square as it can be
    assert (pixels("grid.png")[8:, 8:] == pixels("picture-6.png")).all()
    status, paths, _ = generate("--like", "picture-5.png", "--out", "again.png")
    assert status == 0 and (pixels("again.png") == pixels("picture-5.png")).all()


def test_pictures_of_classes(generate):
    status, paths, _ = generate("--classes", "0-1,white shark", "--num", "2", "--guidance", "2", "--grid")
    names = ["class-0-0.png", "class-0-1.png", "class-1-2.png", "class-1-3.png", "class-white-shark-4.png", "class-white-shark-5.png"]
    assert (status, paths) == (0, [*names, "grid.png"])
    assert pixels("grid.png").shape == (3 * 6 + 2 * 2, 2 * 6 + 2)  # a class in a row
    settings = read_settings(names[4])
    assert (settings["class_label"], settings["prompt"], settings["pipeline"]) == ("white shark", "", "DiffusionImagePipeline")
    generate("--classes", "2", "--seed", "4", "--guidance", "2", "--out", "two.png")
    generate("--classes", "1", "--seed", "4", "--guidance", "2", "--out", "one.png")
    assert np.abs(pixels("two.png") - pixels(names[4])).max() <= 1 < np.abs(pixels("two.png") - pixels("one.png")).max()
    for picture in (names[2], "grid.png"):
        words = ["--grid"] if picture == "grid.png" else []
        assert generate("--like", picture, *words, "--out", "again.png")[0] == 0
        assert np.abs(pixels("again.png") - pixels(picture)).max() <= 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["a cat"], "which takes no prompt; leave it out, or give --classes"),
        (["a cat", "--classes", "1"], "--classes and prompts"),
        (["--classes", "9"], "class_labels must be from 0 to 3, or 4 for none; got 9"),
        (["--classes", "dog"], "no class is called 'dog'"),
        (["--classes", "3-1"], "3-1 runs backwards; write 1-3"),
        (["--classes", " , "], "no class in it"),
        (["--size", "8x8"], "--size 8x8: this model draws 6x6"),
        (["--negative", "a dog"], "which takes no prompt; leave it out"),
    ],
)
def test_bad_input(generate, tmp_path, words, says):
    status, paths, err = generate(*words, "--out", "pictures")
    assert (status, paths) == (2, []) and says in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_prompts_still_wants_one(generate, sd_folder):
    status, _, err = generate("--model", sd_folder)
    assert status == 2 and "no prompt: say what the picture shows" in err
    status, _, err = generate("--model", sd_folder, "--classes", "1")
    assert status == 2 and "which draws from prompts; give one" in err


def test_lists_of_classes():
    read = lambda text: read_classes(build_parser().parse_args(["--classes", text]), {})
    assert read("0-3, 7,white shark") == ["0", "1", "2", "3", "7", "white shark"]


def test_info(model, capsys):
    assert main(["info", model, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["pipeline"] == "DiffusionImagePipeline" and facts["components"]["unet"]["class"] == "UNet2DModel"
    assert facts["parameterization"]["prediction"] == "epsilon"
