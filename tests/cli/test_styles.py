"""`edit` on a GAN: one picture of mixtures, of a walk, of a projection, of directions, with the settings in it."""

import numpy as np
import pytest
from PIL import Image

import gen_pipelines
from gen_pipelines import GANPipeline, StyleGANPipeline
from gen_pipelines.cli.main import main
from gen_pipelines.cli.pictures import read_settings
from tests.conftest import _seeded


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """Folders of a StyleGAN with classes, and of a GAN without."""
    folder = tmp_path_factory.mktemp("models")
    build = lambda: gen_pipelines.StyleGAN2Generator(16, 1, 8, 8, 3, channel_base=128, channel_max=16, num_mapping_layers=2)
    StyleGANPipeline(_seeded(build, 0), image_size=14).save_pretrained(folder / "style")
    plain = _seeded(lambda: gen_pipelines.DCGANGenerator(16, 1, latent_dim=8, base_channels=4), 0)
    GANPipeline(plain, image_size=14).save_pretrained(folder / "gan")
    return {name: str(folder / name) for name in ("style", "gan")}


@pytest.fixture
def edit(models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*words: str, model: str = "style", verb: str = "edit") -> tuple[int, list[str], str]:
        status = main([verb, "--model", models[model], "--device", "cpu", *words])
        out, err = capsys.readouterr()
        return status, out.splitlines(), err

    return run


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def test_style_mixing_of_seeds(edit):
    status, paths, err = edit("--style-mix", "--rows", "1-2", "--columns", "4-6", "--class", "2", "--truncation", "0.7")
    assert (status, paths) == (0, ["mixed.png"]), err
    whole = pixels("mixed.png")
    assert whole.shape == (14 * 7, 14 * 4)
    settings = read_settings("mixed.png")
    expected = {"edit": "style-mix", "rows": [1, 2], "columns": [4, 5, 6], "layers": "all", "truncation": 0.7, "class_label": "2"}
    assert {name: settings[name] for name in expected} == expected
    # the sources are the pictures that generate draws with these seeds
    assert edit("--classes", "2", "--seeds", "1-2", "--truncation", "0.7", verb="generate")[0] == 0
    assert np.abs(whole[14:28, :14] - pixels("class-2-1.png")).max() <= 1
    words = ("--rows", "1-2", "--columns", "4-6", "--class", "2", "--truncation", "0.7", "--out", "a.png")
    status, paths, err = edit("--style-mix", "fine", *words)
    assert (status, paths) == (0, ["a.png"]), err
    assert np.abs(pixels("a.png")[14:] - whole[14 * 5 :]).max() <= 1
    status, _, err = edit("--like", "mixed.png", verb="generate")
    assert status == 2 and "made by gen-pipelines edit --style-mix" in err


def test_a_walk_is_an_animation_or_a_strip(edit):
    status, paths, err = edit("--walk", "6", "--stops", "0-1", model="gan")
    assert (status, paths) == (0, ["walk.png"]), err
    with Image.open("walk.png") as picture:
        assert picture.n_frames == 6
        picture.seek(3)
        middle = np.asarray(picture.convert("L")).astype(int)
    assert read_settings("walk.png")["stops"] == [0, 1]
    status, paths, err = edit("--walk", "6", "--stops", "0-1", "--grid", "--out", "strip.png", model="gan")
    assert (status, paths) == (0, ["strip.png"]), err
    assert pixels("strip.png").shape == (14, 84) and (pixels("strip.png")[:, 42:56] == middle).all()


def test_projection_and_directions(edit):
    assert edit("--classes", "1", "--seed", "3", "--out", "one.png", verb="generate")[0] == 0
    status, paths, err = edit("one.png", "--project", "w+", "--steps", "3", "--out", "found")
    assert (status, paths) == (0, ["found/projected.png"]), err
    assert pixels(paths[0]).shape == (14, 30) and (pixels(paths[0])[:, :14] == pixels("one.png")).all()
    assert read_settings(paths[0])["space"] == "w+" and len(read_settings(paths[0])["image_sha256"]) == 64
    status, paths, err = edit("--directions", "2", "--reach", "2", "--seed", "3", "--class", "1", "--layers", "fine")
    assert (status, paths) == (0, ["directions.png"]), err
    table = pixels("directions.png")
    assert table.shape == (30, 16 * 7 - 2) and np.abs(table[:14, 48:62] - pixels("one.png")).max() <= 1
    status, paths, err = edit("one.png", "--project", "w+", "--directions", "1", "--steps", "3", "--out", "d.png")
    assert status == 0, err
    assert np.abs(pixels("d.png")[:, 48:62] - pixels("found/projected.png")[:, 16:]).max() <= 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--style-mix", "--walk", "3"], "--style-mix and --walk: one at a time"),
        (["--style-mix", "--prompt", "a"], "--prompt: has no meaning with --style-mix"),
        (["--style-mix", "--rows", "3-1"], "'3-1' are no seeds"),
        (["--style-mix", "rough"], "invalid choice: 'rough'"),
        (["--rows", "1-2"], "--rows: has no meaning without --style-mix"),
        (["--truncation", "0.5"], "--truncation: has no meaning without"),
        (["--style-mix", "--class", "3"], "3 is none of 0 to 2"),
        (["--walk", "1"], "at least 2 pictures"),
        (["--project", "w"], "--project: 0 pictures; name one"),
        (["--directions", "0"], "at least 1"),
        (["--directions", "9"], "styles have 8 dimensions"),
        (["--directions", "1", "--reach", "inf"], "must be a finite number"),
        (["--style-mix", "--reach", "1"], "--reach: has no meaning with --style-mix"),
        (["one.png", "--project", "w", "--out", "one.png"], "never overwritten"),
        (["one.png", "--style-mix"], "draws from seeds and takes no picture"),
        (["--style-mix", "--model", "bundled:emoji"], "is a LatentTextToImagePipeline; it needs a StyleGANPipeline"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(edit, tmp_path, words, says):
    Image.new("L", (14, 14)).save("one.png")
    status, paths, err = edit(*words)
    assert (status, paths) == (2, []), err
    assert says in err.splitlines()[-1] and "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["one.png"]


def test_a_gan_without_styles_is_refused(edit):
    status, _, err = edit("--style-mix", model="gan")
    assert status == 2 and "is a GANPipeline; it needs a StyleGANPipeline" in err
