"""What a person sees of a training while it runs, beside the losses."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image


@dataclass(frozen=True)
class Seen:
    """What a task's `draw_samples` may return instead of a picture alone.

    Attributes:
        picture: written to `samples/step-*.png`.
        row: the same few samples every time; the rows of all times, below each other, are `samples/strip.png`.
        metrics: numbers for the log.
    """

    picture: Image.Image
    row: Image.Image | None = None
    metrics: dict[str, float] = field(default_factory=dict)


def add_row(path: Path, row: Image.Image, place: int) -> None:
    """Put a row into the strip at `path`, `place` rows below the top: in the place of one that a stopped run left there.

    A strip of another width, of a run with other samples, is begun again.
    """
    strip = Image.new(row.mode, (row.width, (place + 1) * row.height), "white")
    if path.is_file():
        with Image.open(path) as before:
            if before.width == row.width and before.mode == row.mode:
                strip.paste(before.crop((0, 0, row.width, min(before.height, place * row.height))))
    strip.paste(row, (0, place * row.height))
    strip.save(path)
