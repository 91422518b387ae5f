"""`gen-pipelines evaluate MODEL --dataset ...`: measure what a model draws against a data set."""

from __future__ import annotations

import argparse
import itertools
import os
import re
import sys
from pathlib import Path
from typing import Any

from gen_pipelines.cli.main import Parser
from gen_pipelines.cli.train import logs_on_stderr


def build_parser() -> Parser:
    parser = Parser(
        prog="gen-pipelines evaluate",
        description="Draw pictures and measure them against a data set: distances, coverage, classes, copies, likelihood, cost.\n"
        "An evaluation that was interrupted goes on where it stopped when the command is given again.",
        epilog="examples:\n"
        "  gen-pipelines evaluate bundled:mnist-vae --dataset ylecun/mnist --out vae/evaluation.json\n"
        "  gen-pipelines evaluate runs/mnist-ddpm --dataset ylecun/mnist --scheduler ddim,heun --steps 10,20,50 --out ddpm/\n"
        "  torchrun --nproc_per_node 2 -m gen_pipelines evaluate runs/mnist-ddpm --dataset ylecun/mnist --out evaluation.json",
    )
    parser.add_argument("model", metavar="MODEL", help="bundled:NAME, a folder, or an id on the Hub")
    against = parser.add_argument_group("what it is measured against")
    against.add_argument("--dataset", metavar="NAME", required=True, help="a data set of the Hub, or a folder of parquet or pictures")
    against.add_argument("--split", metavar="NAME", default="train", help="its real pictures (default train)")
    against.add_argument("--held-out-split", metavar="NAME", help="real pictures that stand beside it (default: test, or part of --split)")
    against.add_argument("--image-column", metavar="NAME", help="default: image, or the only column of pictures")
    against.add_argument("--label-column", metavar="NAME", help="default: label, where there is one")
    against.add_argument("--text-column", metavar="NAME", help="captions, for models that draw from prompts")
    against.add_argument("--extractor", metavar="NAME", help="mnist-classifier, inception, or a classifier's folder (default: by the size)")
    against.add_argument("--inception-weights", metavar="FILE", help="torch-fidelity's file, if it is not where torch.hub keeps it")

    how = parser.add_argument_group("how it draws")
    # the long form is for torchrun, which takes --num for an abbreviation of an option of its own
    how.add_argument("--num", "--num-images", metavar="N", type=int, default=5000, help="pictures (default 5000)")
    how.add_argument("--seed", metavar="N", type=int, default=0, help="picture i depends on the seed and on i alone (default 0)")
    how.add_argument("--scheduler", metavar="NAME[:KEY=VALUE]", type=_names, default=[None],
                     help="the sampler (default: its own); a,b runs several")  # fmt: skip
    how.add_argument("--steps", metavar="N", type=_numbers, default=[None], help="sampling steps (default: its own); 10,20 runs several")
    how.add_argument("--guidance", metavar="S", type=float, help="guidance scale; 1 is none (default: the model's)")
    how.add_argument("--temperature", metavar="T", type=float, help="of models that have one (default: the model's)")
    how.add_argument("--truncation", metavar="PSI", type=float, help="of GANs")
    how.add_argument("--classes", metavar="LIST", type=_classes, default="data",
                     help="data: classes in the data's proportions (default); own: the model's choice; 0-4,7: these alone")  # fmt: skip
    how.add_argument("--likelihood", metavar="N", type=int, default=256, help="held-out pictures for the likelihood (default 256; 0: none)")
    how.add_argument("--batch-size", metavar="N", type=int, default=100, help="pictures drawn at once (default 100)")
    how.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: an accelerator if there is one)")

    where = parser.add_argument_group("where it goes")
    where.add_argument("--out", metavar="FILE", default="evaluation.json", help="the result (default evaluation.json), or a folder")
    where.add_argument("--card", action="store_true", help="write the numbers into the model card (README.md) of the folder MODEL, too")
    return parser


def _names(text: str) -> list[str]:
    return [name.strip() for name in re.split(r",(?![^\[]*\])", text) if name.strip()]  # a setting may be a list in brackets


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} are no numbers: write 20, or 10,20,50") from None


def _classes(text: str) -> Any:
    if text in ("data", "own"):
        return text
    try:
        ranges = [part.split("-") for part in text.split(",")]
        return [label for first, *last in ranges for label in range(int(first), int(last[0] if last else first) + 1)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} are no classes: write data, own, or numbers such as 0-4,7") from None


def run(args: argparse.Namespace) -> int:
    """Evaluate, and print the path of each result."""
    several = list(itertools.product(args.scheduler, args.steps))
    out = Path(args.out)
    if len(several) > 1 and out.suffix == ".json":
        raise ValueError(f"--out {out}: {len(several)} evaluations need a folder; write --out {out.with_suffix('')}/")
    targets = [out if out.suffix == ".json" else out / file_name(*one) for one in several]
    if args.card and (len(several) > 1 or not Path(args.model).is_dir()):
        raise ValueError("--card: one evaluation of a model in a folder of yours goes into its card")

    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from gen_pipelines.evaluation.evaluate import evaluate, load_pipeline
    from gen_pipelines.evaluation.reference import Reference
    from gen_pipelines.evaluation.sampling import Sampler
    from gen_pipelines.schedulers import parse_scheduler

    for scheduler in filter(None, args.scheduler):
        parse_scheduler(scheduler, "--scheduler")  # the last one's slip is said before the first is drawn
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    with logs_on_stderr():
        name, pipe = load_pipeline(args.model, args.device)
        pipe.set_progress_bar_config(disable=True)
        channels, resolution, _ = Sampler(pipe, args.seed).probe()
        reference = Reference.open(
            args.dataset, args.split, args.held_out_split, resolution=resolution, channels=channels, image_column=args.image_column,
            label_column=args.label_column, text_column=args.text_column, classes=args.classes if isinstance(args.classes, list) else None,
        )  # fmt: skip
        for (scheduler, steps), target in zip(several, targets, strict=True):
            result = evaluate(
                pipe, reference, name=name, out=target, num=args.num, scheduler=scheduler, steps=steps, guidance=args.guidance,
                temperature=args.temperature, truncation=args.truncation, ask_for_classes=args.classes != "own",
                extractor=args.extractor, inception_weights=args.inception_weights, seed=args.seed, likelihood=args.likelihood,
                batch_size=args.batch_size,
            )  # fmt: skip
            if os.environ.get("RANK", "0") == "0":
                print(target, flush=True)
                print(summary(result), file=sys.stderr)
                if args.card:
                    from gen_pipelines.evaluation.report import write_card

                    print(write_card(Path(args.model), result), file=sys.stderr)
    return 0


def file_name(scheduler: str | None, steps: int | None) -> str:
    """evaluation-ddim-20.json; of a scheduler's settings what a file's name may hold on every system."""
    words = "-".join(str(part) for part in ("evaluation", scheduler, steps) if part is not None)
    return re.sub(r"[^\w.+-]+", "-", words) + ".json"


def summary(result: dict[str, Any]) -> str:
    """The most telling numbers on a line."""
    metrics, real = result["metrics"], result["real"]
    told = []
    if "frechet_distance" in metrics:
        extractor, distance, natural = result["protocol"]["extractor"], metrics["frechet_distance"], real["frechet_distance"]
        told.append(f"Fréchet distance {distance:.4g} ({extractor}; real pictures {natural:.4g})")
        told += [f"{name} {metrics[name]:.3f}" for name in ("precision", "recall", "coverage")]
    if metrics.get("bits_per_dim") is not None:
        told.append(f"{metrics['bits_per_dim']:.3f} bits/dim ({result['likelihood']['kind']})")
    cost = result["cost"]
    told.append(f"{1000 * cost['seconds_per_picture']:.3g} ms and {cost['evaluations_per_picture']:.4g} evaluations a picture")
    if result["counts"]["not_finite"]:
        told.append(f"{result['counts']['not_finite']} of {result['counts']['drawn']} NOT FINITE")
    return ", ".join(told)
