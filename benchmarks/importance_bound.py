"""The importance-weighted bound of VAEs on a binarised test split, in nats.

    python benchmarks/importance_bound.py runs/elbo runs/iwae --data ylecun/mnist [--draws 5000] [--few 50] [--every 10]

All pictures with a few draws, every tenth with many; the bound of all is the first, and the mean of what many draws add. Picture
i is binarised, and z drawn, by a generator seeded with i, so that both bounds are of the same pixels.
"""

from __future__ import annotations

import argparse

import datasets
import torch
from torch import Tensor

from gen_pipelines import AutoPipeline, VAEPipeline
from gen_pipelines.likelihood.dequantization import to_levels

BATCH = 100


def bound(pipe: VAEPipeline, rows: datasets.Dataset, numbers: range, draws: int) -> Tensor:
    """Nats of each picture, float64 (N,)."""
    parts = []
    for first in range(0, len(numbers), BATCH):
        part = numbers[first : first + BATCH]
        levels = to_levels(list(rows.select(part)["image"]), pipe.vae.config.in_channels, (pipe.vae.config.sample_size,) * 2)
        own = [torch.Generator().manual_seed(i) for i in part]
        parts.append(pipe.log_likelihood(levels, kind="iwae", num_samples=draws, generator=own).nats)
    return torch.cat(parts).double()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="VAEs with Bernoulli pixels: folders, bundled:NAME or ids on the Hub")
    parser.add_argument("--data", required=True, help="a data set of the Hub or a folder, with the column image and a split test")
    parser.add_argument("--draws", type=int, default=5000)
    parser.add_argument("--few", type=int, default=50, help="draws for every picture")
    parser.add_argument("--every", type=int, default=10, help="each which picture has --draws")
    args = parser.parse_args()
    rows = datasets.load_dataset(args.data, split="test")
    for model in args.models:
        pipe = AutoPipeline.from_pretrained(model)
        few = bound(pipe, rows, range(len(rows)), args.few)
        some = range(0, len(rows), args.every)
        gain = bound(pipe, rows, some, args.draws) - few[some.start :: some.step]
        error = (few.var() / len(few) + gain.var() / len(gain)).sqrt()
        print(f"{model}: {few.mean() + gain.mean():.2f} +- {error:.2f} nats ({few.mean():.2f} with {args.few} draws)", flush=True)


if __name__ == "__main__":
    main()
