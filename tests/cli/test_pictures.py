"""Names, atomic writes, the settings inside a PNG, grids."""

import io
import json
import sys
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from gen_pipelines.cli import pictures

SETTINGS = {"prompt": "a café, 日本", "seed": 3, "guidance_scale": 4.5, "negative_prompt": None, "gen_pipelines_version": "0.0"}


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("a red apple", "a-red-apple-7.png"),
        ("  A Red/Apple!  ", "a-red-apple-7.png"),
        ("../../etc/passwd", "etc-passwd-7.png"),
        ("日本の城", "日本の城-7.png"),
        ("", "picture-7.png"),
        ("🍎", "picture-7.png"),
    ],
)
def test_names(prompt, name):
    assert pictures.picture_name(prompt, 7) == name


def test_a_long_prompt_still_fits_a_file_name():
    assert len(pictures.picture_name("城" * 500, 2**63 - 1).encode()) < 255


def test_settings_survive_the_file(tmp_path):
    pictures.write_picture(Image.new("RGB", (4, 2), "red"), tmp_path / "new" / "a.png", SETTINGS)
    assert pictures.read_settings(tmp_path / "new" / "a.png") == SETTINGS
    with Image.open(tmp_path / "new" / "a.png") as image:
        assert image.getpixel((0, 0)) == (255, 0, 0)
        assert image.text["Description"] == SETTINGS["prompt"]
        assert image.text["Software"] == "gen_pipelines 0.0"


def test_a_foreign_picture_has_no_settings(tmp_path):
    Image.new("L", (2, 2)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="holds no settings"):
        pictures.read_settings(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    with pytest.raises((OSError, ValueError)):
        pictures.read_settings(tmp_path / "b.png")
    (tmp_path / "c.png").write_text("text")
    with pytest.raises(ValueError, match="is not a picture"):
        pictures.read_settings(tmp_path / "c.png")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": "3"}, "its setting seed is '3'"),
        ({"num": True}, "its setting num is True"),
        ({"model": 7}, "its setting model is 7"),
        ({"prompt": None}, "name no prompt"),
        ({"prompts": ["a", 3]}, "name no prompt"),
        ({"prompts": []}, "name no prompt"),
    ],
)
def test_settings_that_somebody_else_wrote(tmp_path, change, says):
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt(pictures.CHUNK, json.dumps(SETTINGS | change))
    Image.new("L", (2, 2)).save(tmp_path / "a.png", pnginfo=chunks)
    with pytest.raises(ValueError, match=says):
        pictures.read_settings(tmp_path / "a.png")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("old")
    with pytest.raises(RuntimeError), pictures.atomic(path) as side:
        side.write_text("half")
        raise RuntimeError
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    assert path.read_text() == "old"


def test_out_is_a_file_or_a_folder(tmp_path):
    (tmp_path / "folder.png").mkdir()
    assert pictures.is_file_name("new/apple.PNG")
    assert not pictures.is_file_name("new/v1.5")
    assert not pictures.is_file_name(tmp_path / "folder.png")
    (tmp_path / "mine.txt").mkdir()
    assert not pictures.is_file_name(tmp_path / "mine.txt") and not pictures.is_file_name("new/x.txt/")
    for name in ("x.txt", "new/apple.JSON", "x.pdf"):
        with pytest.raises(ValueError, match=r"is no ending of pictures; name a \.png file or a folder"):
            pictures.is_file_name(name)


def test_check_writable_creates_nothing(tmp_path):
    pictures.check_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("count", "columns", "size"), [(1, None, (4, 3)), (2, None, (10, 3)), (5, None, (16, 8)), (4, 2, (10, 8)), (3, 8, (16, 3))]
)
def test_grid(count, columns, size):
    images = [Image.new("RGB", (4, 3), (10 * i, 0, 0)) for i in range(count)]
    grid = pictures.make_grid(images, columns)
    assert grid.size == size
    across = (size[0] + 2) // 6
    for i in range(count):
        assert grid.getpixel((i % across * 6, i // across * 5)) == (10 * i, 0, 0)
    assert count == 1 or grid.getpixel((4, 0)) == (255, 255, 255)


def test_a_path_is_one_write(monkeypatch):
    """As in `python -u`, which is how torchrun runs its processes: every write of the text layer goes straight to the file."""
    writes = []

    class File(io.RawIOBase):
        def writable(self):
            return True

        def write(self, data):
            writes.append(bytes(data))
            return len(data)

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(File(), encoding="utf-8", write_through=True))
    pictures.announce(Path("a/apple-0.png"))
    assert [data for data in writes if data] == [b"a/apple-0.png\n"]
