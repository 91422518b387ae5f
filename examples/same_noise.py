"""Models, samplers and numbers of steps side by side: each row draws from the same noise, as it comes.

    python examples/same_noise.py bundled:mnist-flow@20 bundled:mnist-flow@2@rectified_flow bundled:mnist-consistency@2 --out few_steps.png
    python examples/same_noise.py "own=runs/mnist-ddpm@20" "2M=runs/mnist-ddpm@20@dpm_solver_multistep" --columns 10 --out samplers.png

A row is [LABEL=]MODEL@STEPS[@SCHEDULER], the scheduler in the words that the command line takes. Pictures of a model of classes run through
its classes.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont

from gen_pipelines import AutoPipeline
from gen_pipelines.schedulers import choose_scheduler

GAP, TEXT = 2, 20


@dataclass(frozen=True)
class Row:
    """What is drawn in a row, and what stands before it."""

    label: str
    model: str
    steps: int
    scheduler: str | None

    @classmethod
    def read(cls, text: str) -> Row:
        """From [LABEL=]MODEL@STEPS[@SCHEDULER].

        Raises:
            ValueError: it is written otherwise.
        """
        model, *rest = text.split("@")
        label, _, model = model.rpartition("=")
        if not 1 <= len(rest) <= 2 or not rest[0].isdecimal() or not model:
            raise ValueError(f"{text!r}: a row is [LABEL=]MODEL@STEPS[@SCHEDULER], such as bundled:mnist-flow@20@heun.")
        steps, scheduler = int(rest[0]), rest[1] if len(rest) > 1 else None
        words = [model.removeprefix("bundled:"), f"{steps} step{'s' if steps > 1 else ''}", *([scheduler] if scheduler else [])]
        return cls(label or ", ".join(words), model, steps, scheduler)


def draw(row: Row, columns: int, seed: int) -> list[Image.Image]:
    """The pictures of a row, each from its own generator."""
    pipe = AutoPipeline.from_pretrained(row.model)
    pipe.set_progress_bar_config(desc=row.label, leave=False)
    if row.scheduler is not None:
        pipe.scheduler = choose_scheduler(pipe, row.scheduler)
    asked = {"class_labels": [i * pipe.num_classes // columns for i in range(columns)]} if pipe.num_classes else {"batch_size": columns}
    generators = [torch.Generator().manual_seed(seed + i) for i in range(columns)]
    return pipe(**asked, num_inference_steps=row.steps, generator=generators).images


def sheet(rows: list[Row], columns: int, seed: int, scale: int) -> Image.Image:
    """Rows of pictures with their labels before them."""
    drawn = [[one.convert("RGB") for one in draw(row, columns, seed)] for row in rows]
    width, height = (scale * side for side in drawn[0][0].size)
    font = ImageFont.load_default(size=TEXT)
    margin = 2 * GAP + max(int(font.getlength(row.label)) for row in rows) + TEXT // 2
    page = Image.new("RGB", (margin + columns * (width + GAP), len(rows) * (height + GAP)), "white")
    pen = ImageDraw.Draw(page)
    for i, (row, pictures) in enumerate(zip(rows, drawn, strict=True)):
        top = i * (height + GAP)
        pen.text((2 * GAP, top + height / 2), row.label, fill="black", font=font, anchor="lm")
        for k, picture in enumerate(pictures):
            page.paste(picture.resize((width, height), Image.Resampling.LANCZOS), (margin + k * (width + GAP), top))
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", metavar="[LABEL=]MODEL@STEPS[@SCHEDULER]")
    parser.add_argument("--columns", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=int, default=2, help="enlargement of each picture (default 2)")
    parser.add_argument("--out", default="same_noise.png")
    args = parser.parse_args()
    try:
        rows = [Row.read(text) for text in args.rows]
    except ValueError as error:
        parser.error(str(error))
    sheet(rows, args.columns, args.seed, args.scale).save(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
