"""`edit` on a tiny random pipeline, from its arguments to the pictures on the disk."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from editing import picture, rectangle
from PIL import Image

from gen_pipelines.cli.main import main
from gen_pipelines.cli.pictures import read_settings

ROOT = Path(__file__).parents[2]


@pytest.fixture
def edit(sd_folder, tmp_path, monkeypatch, capsys):
    """edit(*words) -> (exit status, printed paths, stderr), in a new folder with a picture and a mask, in two steps."""
    monkeypatch.chdir(tmp_path)
    picture().save("photo.png")
    rectangle().save("mask.png")

    def run(*words: str) -> tuple[int, list[str], str]:
        status = main(["edit", "--model", sd_folder, "--steps", "4", "--device", "cpu", *words])
        out, err = capsys.readouterr()
        return status, out.splitlines(), err

    return run


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def test_a_picture_redrawn_and_the_settings_in_it(edit):
    status, paths, err = edit("photo.png", "--prompt", "a red apple", "--strength", "0.5", "--seed", "3", "--num", "2", "--grid")
    assert (status, paths) == (0, ["photo-a-red-apple-3.png", "photo-a-red-apple-4.png", "grid.png"]), err
    settings = read_settings(paths[0])
    expected = {"prompt": "a red apple", "seed": 3, "strength": 0.5, "image": "photo.png", "pipeline": "LatentImageToImagePipeline"}
    assert {name: settings[name] for name in expected} == expected and len(settings["image_sha256"]) == 64
    assert np.abs(pixels(paths[0]) - pixels(paths[1])).max() > 1
    assert pixels("grid.png").shape == (16, 16 + 2 + 16, 3)

    again, alone, _ = edit("--image", "photo.png", "--prompt", "a red apple", "--strength", "0.5", "--seed", "4", "--out", "alone.png")
    assert (again, alone) == (0, ["alone.png"])
    assert np.abs(pixels("alone.png") - pixels(paths[1])).max() <= 1  # kernels round differently in another batch


def test_a_mask_a_border_and_a_scheduler(edit):
    status, paths, err = edit("photo.png", "--mask", "mask.png", "--prompt", "a", "--resample", "2x2", "--scheduler", "euler", "--out", "m")
    assert (status, paths) == (0, ["m/photo-a-0.png"]), err
    known = pixels("mask.png") == 0
    assert (pixels(paths[0])[known] == pixels("photo.png")[known]).all()
    assert np.abs(pixels(paths[0]) - pixels("photo.png")).max() > 1
    settings = read_settings(paths[0])
    assert (settings["mask"], settings["resampling"], settings["strength"], settings["scheduler"]) == ("mask.png", [2, 2], 1.0, "euler")

    status, paths, err = edit("photo.png", "--expand", "0,2,8,0", "--prompt", "a", "--out", "wide.png")
    assert status == 0, err
    assert pixels("wide.png").shape == (18, 24, 3)
    assert (pixels("wide.png")[2:, :16] == pixels("photo.png")).all()


def test_the_prompt_of_a_picture_of_ours_is_taken(edit, sd_folder, capsys):
    assert main(["generate", "a blue heart", "--model", sd_folder, "--steps", "2", "--device", "cpu", "--out", "heart.png"]) == 0
    capsys.readouterr()
    status, paths, err = edit("heart.png", "--strength", "0.5")
    assert (status, paths) == (0, ["heart-a-blue-heart-0.png"]), err
    status, _, err = edit("photo.png")
    assert status == 2 and "no prompt: say what the result shows with --prompt; photo.png does not hold one" in err
    assert main(["generate", "--like", "heart-a-blue-heart-0.png"]) == 2
    assert "made of heart.png by gen-pipelines edit" in capsys.readouterr().err


def test_a_large_picture_is_drawn_at_the_size_of_the_model(edit):
    picture(64).save("large.png")
    status, _, err = edit("large.png", "--prompt", "a", "--out", "small.png")
    assert status == 0 and "large.png has 64x64 pixels and the model draws about 16x16; the result has 16x16" in err
    assert pixels("small.png").shape == (16, 16, 3)
    assert edit("large.png", "--prompt", "a", "--size", "24x16", "--out", "asked.png")[0] == 0
    assert pixels("asked.png").shape == (24, 16, 3)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "no picture: name one"),
        (["nothing.png", "--prompt", "a"], "nothing.png: no such picture"),
        (["text.png", "--prompt", "a"], "text.png is not a picture"),
        (["cut.png", "--prompt", "a"], "cut.png cannot be read"),
        (["photo.png", "--prompt", "a", "--mask", "nothing.png"], "--mask nothing.png: no such picture"),
        (["photo.png", "--prompt", "a", "--mask", "mask.png", "--mask", "mask.png"], "2 masks for 1 pictures"),
        (["photo.png", "--prompt", "a", "--mask", "thin.png"], "mask_image has 4 x 16 pixels and image 16 x 16"),
        (["photo.png", "--prompt", "a", "--strength", "2"], "--strength 2.0: must lie between 0"),
        (["photo.png", "--prompt", "a", "--expand", "1,2"], "'1,2' is not a border"),
        (["photo.png", "--prompt", "a", "--resample", "0", "--mask", "mask.png"], "'0' is not a resampling"),
        (["photo.png", "--prompt", "a", "--resample", "2"], "--resample: needs --mask or --expand"),
        (["photo.png", "--prompt", "a", "--expand", "8", "--size", "16"], "height = 16 pixels leaves nothing of the picture"),
        (["photo.png", "--prompt", "a", "--scheduler", "PNDMScheduler"], "can only be run from its first timestep"),
        (["photo.png", "--prompt", "a", "--out", "photo.png"], "never overwritten"),
        (["photo.png", "--prompt", "a", "--num", "2", "--out", "one.png"], "one file cannot take 2 pictures"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(edit, tmp_path, words, says):
    Path("text.png").write_text("no picture")
    Path("cut.png").write_bytes(Path("photo.png").read_bytes()[:80])
    rectangle().resize((16, 4)).save("thin.png")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    status, paths, err = edit(*words)
    assert (status, paths) == (2, []), err
    assert says in err.splitlines()[-1] and "Traceback" not in err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.slow
def test_two_processes_draw_what_one_draws(edit, sd_folder, tmp_path):
    words = ["photo.png", "--prompt", "a red apple", "--num", "3", "--grid"]
    status, paths, _ = edit(*words, "--out", "one")
    assert status == 0
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "gen_pipelines", "edit", *words]
    command[command.index("--num")] = "--num-images"  # torchrun takes --num for an abbreviation of an option of its own
    options = ["--model", sd_folder, "--steps", "4", "--device", "cpu", "--out", "two"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command, *options], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == sorted(path.replace("one/", "two/") for path in paths)
    for path in paths:
        assert np.abs(pixels(path) - pixels(path.replace("one/", "two/"))).max() <= 1
