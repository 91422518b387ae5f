"""Pictures on disk: names, atomic writes, the settings stored inside a PNG, and grids. Imports only PIL, and only when used."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gen_pipelines.hub import saving

if TYPE_CHECKING:
    from PIL.Image import Image

# The text chunk that holds every setting as JSON. "Software" and "Description", which picture viewers show, are written beside it.
CHUNK = "gen_pipelines"
_KINDS: dict[str, Any] = {
    **dict.fromkeys(("prompt", "negative_prompt", "model", "revision", "model_revision", "scheduler", "dtype", "class_label"), str),
    **dict.fromkeys(("image", "mask", "edit"), str),
    **dict.fromkeys(("seed", "num", "num_inference_steps", "height", "width"), int),
    **dict.fromkeys(("guidance_scale", "temperature"), int | float),
    **dict.fromkeys(("prompts", "class_labels"), list),
}
_OTHER_FORMATS = {".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm"}
_ENDING = re.compile(r"\.[A-Za-z][A-Za-z0-9]{1,4}")  # of a file; not of a folder such as v1.5


def is_file_name(out: str | Path) -> bool:
    """Whether `--out` names one picture (`apple.png`) rather than a folder.

    Raises:
        ValueError: it names a picture in another format, which could not hold the settings, or another kind of file.
    """
    path = Path(out)
    if path.is_dir():
        return False
    if path.suffix.lower() in _OTHER_FORMATS:
        raise ValueError(f"--out {out}: pictures are written as PNG, which holds the settings that drew them; name a .png file or a folder")
    if _ENDING.fullmatch(path.suffix) and path.suffix.lower() != ".png" and not str(out).endswith(("/", os.sep)):
        raise ValueError(f"--out {out}: {path.suffix} is no ending of pictures; name a .png file or a folder ({out}/ is one)")
    return path.suffix.lower() == ".png"


def picture_name(prompt: str, seed: int) -> str:
    """A file name that tells pictures of one call apart: the prompt's words, then the picture's own seed."""
    words = re.sub(r"\W+", "-", prompt.lower()).strip("-_")[:48].strip("-_")
    return f"{words or 'picture'}-{seed}.png"


def check_writable(folder: str | Path) -> None:
    """Find out, by writing, whether a folder takes files, without creating it.

    Raises:
        OSError: the folder, or the nearest of its parents that exists, is a file or takes no files.
    """
    try:
        saving.check_writable(folder)
    except NotADirectoryError as error:
        raise NotADirectoryError(f"--out {folder}: {error.filename} is a file; name a folder, or a .png file in one") from None
    except OSError as error:
        raise type(error)(f"--out {folder}: cannot write to {error.filename} ({error.strerror}); name another folder") from error


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A path to write to, in the same folder, that takes the name `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    side = path.with_name(f".{path.name[:100]}.{os.getpid()}.tmp")
    try:
        yield side
        os.replace(side, path)
    finally:
        side.unlink(missing_ok=True)


def write_picture(image: Image, path: Path, settings: dict[str, Any], **options: Any) -> None:
    """Write a PNG whose text chunks hold the settings that drew it; the file is there as a whole or not at all.

    `options` are Pillow's (those of an animation).
    """
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    prompts = settings.get("prompts", [settings.get("prompt", "")])
    chunks.add_itxt("Description", "; ".join(prompts))
    chunks.add_text("Software", f"gen_pipelines {settings['gen_pipelines_version']}")
    chunks.add_itxt(CHUNK, json.dumps(settings, ensure_ascii=False))
    with atomic(path) as side:
        image.save(side, format="PNG", pnginfo=chunks, **options)


def announce(path: Path) -> None:
    """Print a picture's path. In one write: torchrun runs its processes unbuffered, where `print` writes the end of the line by itself
    and the paths of two processes can meet on one line."""
    print(f"{path}\n", end="", flush=True)


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings that drew a picture.

    Raises:
        OSError: the file is missing, or is cut short.
        ValueError: the file is not a picture, or holds no settings of ours, or they are not what we write.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            image.load()
            text = image.info.get(CHUNK)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such picture") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not a picture; name a PNG drawn by gen-pipelines generate") from error
    if text is None:
        raise ValueError(f"{path} holds no settings: it was not drawn by gen-pipelines, or was saved again by a program that dropped them")
    try:
        settings = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: its {CHUNK!r} text is not JSON ({error})") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: its {CHUNK!r} text is not a table of settings")
    for name, kind in _KINDS.items():  # anybody can write a PNG
        if (value := settings.get(name)) is not None and (isinstance(value, bool) or not isinstance(value, kind)):
            raise ValueError(f"{path}: its setting {name} is {value!r}; this is not what gen-pipelines generate writes")
    prompts = settings.get("prompts", [settings.get("prompt")]) + (settings.get("class_labels") or [])
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"{path}: its settings name no prompt; this is not what gen-pipelines generate writes")
    return settings


def make_grid(images: Sequence[Image], columns: int | None = None) -> Image:
    """Pictures of one size side by side, row by row, 2 pixels of white between them.

    Args:
        images: at least one.
        columns: pictures in a row; None makes the grid as square as it can be.
    """
    from PIL import Image

    columns = columns or math.ceil(math.sqrt(len(images)))
    columns = min(columns, len(images))
    width, height, gap = images[0].width, images[0].height, 2
    rows = math.ceil(len(images) / columns)
    grid = Image.new(images[0].mode, (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        grid.paste(image, (i % columns * (width + gap), i // columns * (height + gap)))
    return grid
