"""How well a text-to-image pipeline draws captions whose pictures are known.

One picture is drawn for each caption; the real pictures are ranked by their distance to it (16 x 16 average-pooled RGB, mean squared
error), and the rank of the caption's own picture counts. Reported over all captions and over those whose every word occurs in training;
also the autoencoder's reconstruction, in dB, and the time per picture.

    python benchmarks/emoji_quality.py --data FOLDER [--model bundled:emoji] [--guidance 3] [--grid docs/images/emoji_grid.png]

FOLDER holds the captioned data set (columns image and text, splits train and test). With `--split holdout` the captions are those that
the training recipe held out, which is where settings such as the guidance scale are chosen: never on the test split.
"""

import argparse
import json
import re
import time
from pathlib import Path

import torch
from PIL import Image

from gen_pipelines import AutoPipeline
from gen_pipelines.training.config import DataConfig
from gen_pipelines.training.data import PictureData, known_words_holdout, load_rows
from gen_pipelines.training.tasks.autoencoder import psnr
from gen_pipelines.training.tasks.base import grid


def words(caption: str) -> set[str]:
    return set(re.findall(r"[a-z0-9'’\-]+", caption.lower()))


def ranks(drawn: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """The place of picture i among all `real` by distance to `drawn[i]`, 0 the nearest. Both (N, 3, H, W), same range. Returns: (N,)."""
    pooled = [torch.nn.functional.adaptive_avg_pool2d(pictures.double(), 16).flatten(1) for pictures in (drawn, real)]
    distance = torch.cdist(*pooled)  # (N, N)
    return (distance < distance.diagonal()[:, None]).sum(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="bundled:emoji")
    parser.add_argument("--split", choices=["test", "holdout"], default="test")
    parser.add_argument("--holdout", type=int, default=64, help="rows that the recipe held out")
    parser.add_argument("--recipe-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--guidance", type=float, default=None)
    parser.add_argument("--scheduler", default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--write", type=Path, help="write the report as JSON, such as FOLDER/evaluation.json, where `info` finds it")
    parser.add_argument("--grid", type=Path, help="write the drawn pictures, as they came, real ones in the row above")
    parser.add_argument("--rows", type=int, default=6, help="rows of 16 captions in the grid")
    arguments = parser.parse_args()

    settings = {"name": arguments.data, "text_column": "text", "resolution": 64}
    train = load_rows(DataConfig(**settings))
    captions_of_training = [str(text) for text in train["text"]]
    kept, held = known_words_holdout(captions_of_training, len(train), arguments.holdout, arguments.recipe_seed)
    if arguments.split == "test":
        config = DataConfig(**settings, split="test")
        data = PictureData(load_rows(config), config)
    else:
        data = PictureData(train, DataConfig(**settings), held)
    captions = data.captions()
    known_words = set().union(*(words(captions_of_training[row]) for row in kept))
    known = torch.tensor([words(caption) <= known_words for caption in captions])
    real = torch.stack([data.picture(i) for i in range(len(data))]).float() / 255  # (N, 3, 64, 64)

    pipe = AutoPipeline.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype))
    pipe.set_progress_bar_config(disable=True)
    if arguments.scheduler:
        from gen_pipelines.schedulers import SCHEDULERS

        pipe.scheduler = SCHEDULERS[arguments.scheduler]()
    drawn, start = [], time.perf_counter()
    for first in range(0, len(captions), arguments.batch):
        batch = captions[first : first + arguments.batch]
        generators = [torch.Generator().manual_seed(arguments.seed + first + i) for i in range(len(batch))]
        options = {} if arguments.guidance is None else {"guidance_scale": arguments.guidance}
        drawn.append(pipe(batch, num_inference_steps=arguments.steps, generator=generators, output_type="pt", **options).images.float())
    seconds = (time.perf_counter() - start) / len(captions)
    drawn = torch.cat(drawn)
    place = ranks(drawn, real)

    def share(chosen: torch.Tensor, top: int) -> float:
        return round(100 * (place[chosen] < top).double().mean().item(), 1)

    everything = torch.ones_like(known)
    report = {
        "model": arguments.model,
        "split": arguments.split,
        "steps": arguments.steps,
        "guidance": arguments.guidance if arguments.guidance is not None else pipe.config.get("default_guidance_scale"),
        "captions": len(captions),
        "top-1 %": share(everything, 1),
        "top-5 %": share(everything, 5),
        "captions of known words": int(known.sum()),
        "known words: top-1 %": share(known, 1),
        "known words: top-5 %": share(known, 5),
        "reconstruction dB": round(psnr(pipe.vae.float(), data), 2),
        "seconds per picture": round(seconds, 3),
    }
    print(json.dumps(report, indent=2))
    if arguments.write:
        arguments.write.write_text(json.dumps(report, indent=2) + "\n")
    if arguments.grid:
        rows = []
        for first in range(0, min(arguments.rows * 16, len(captions) // 16 * 16), 16):
            rows += [real[first : first + 16], drawn[first : first + 16]]
        picture = grid(torch.cat(rows) * 2 - 1, columns=16)
        arguments.grid.parent.mkdir(parents=True, exist_ok=True)
        framed = Image.new("RGB", (picture.width + 16, picture.height + 16), "white")
        framed.paste(picture, (8, 8))
        framed.save(arguments.grid)
        print("grid:", arguments.grid)
        print(
            "\n".join(
                f"{'' if ok else '(unknown word) '}{caption}" for caption, ok in zip(captions[: arguments.rows * 16], known, strict=False)
            )
        )


if __name__ == "__main__":
    main()
