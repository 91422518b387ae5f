"""A sequence of pictures as one: a strip side by side, or an animation that a browser plays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

__all__ = ["animation_options", "save_animation", "strip"]

ANIMATED = (".png", ".gif")


def strip(pictures: Sequence[Image.Image], columns: int | None = None, gap: int = 0) -> Image.Image:
    """Pictures of one size side by side; in rows of `columns`, where that is given, `gap` white pixels apart.

    Raises:
        ValueError: no pictures, or pictures of several sizes.
    """
    if not pictures:
        raise ValueError("strip: there are no pictures.")
    if len(sizes := sorted({picture.size for picture in pictures})) > 1:
        raise ValueError(f"strip: the pictures have different sizes, {', '.join(f'{h} x {w}' for w, h in sizes)}.")
    columns = min(columns or len(pictures), len(pictures))
    (width, height), rows = sizes[0], math.ceil(len(pictures) / columns)
    whole = Image.new(pictures[0].mode, (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, picture in enumerate(pictures):
        whole.paste(picture, (i % columns * (width + gap), i // columns * (height + gap)))
    return whole


def save_animation(frames: Sequence[Image.Image], path: str | Path, frames_per_second: float = 20.0) -> None:
    """Write frames as an animation without end: an animated PNG (no loss) or a GIF (256 colours), by the ending of `path`.

    Raises:
        ValueError: another ending, no frames, or a speed that is not positive.
    """
    path = Path(path)
    if path.suffix.lower() not in ANIMATED:
        raise ValueError(f"save_animation: {path.name} ends in none of {', '.join(ANIMATED)}.")
    if not frames:
        raise ValueError("save_animation: there are no frames.")
    frames[0].save(path, **animation_options(frames, frames_per_second))


def animation_options(frames: Sequence[Image.Image], frames_per_second: float) -> dict[str, Any]:
    """What Pillow's `frames[0].save` takes to write all of them.

    Raises:
        ValueError: a speed that is not positive and finite.
    """
    if not (math.isfinite(frames_per_second) and frames_per_second > 0):
        raise ValueError(f"frames_per_second = {frames_per_second}: give a positive number.")
    return {"save_all": True, "append_images": list(frames[1:]), "duration": 1000 / frames_per_second, "loop": 0}
