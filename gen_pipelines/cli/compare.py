"""`gen-pipelines compare A B C ...`: evaluations side by side, as a table, a CSV and one page."""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from gen_pipelines.cli.main import Parser
from gen_pipelines.cli.train import logs_on_stderr

logger = logging.getLogger(__name__)


def build_parser() -> Parser:
    parser = Parser(
        prog="gen-pipelines compare",
        description="Put evaluations side by side: compare.md, compare.csv and compare.html, one page without anything beside it.\n"
        "Rows that were measured under different protocols are never ranked together.",
        epilog="examples:\n"
        "  gen-pipelines compare vae/evaluation.json ddpm/ GAN=gan-0.json GAN=gan-1.json --out families/\n"
        "  gen-pipelines compare bundled:mnist-vae bundled:mnist-vqvae --dataset ylecun/mnist --num 2000 --out families/",
    )
    parser.add_argument(
        "evaluations", metavar="[NAME=]FILE", nargs="+",
        help="what evaluate wrote, or a folder of evaluation*.json; equal names are one row, mean and deviation; with --dataset a model",
    )  # fmt: skip
    parser.add_argument("--out", metavar="DIR", default="compare", help="the folder for the three files (default compare)")
    parser.add_argument("--title", default="Families compared", help="of the page")
    parser.add_argument(
        "--dataset", metavar="NAME", help="evaluate models that have no evaluation on this data set, of these settings and present weights"
    )  # fmt: skip
    parser.add_argument("--num", metavar="N", type=int, default=5000, help="pictures of such an evaluation (default 5000)")
    parser.add_argument("--likelihood", metavar="N", type=int, default=256, help="held-out pictures for its likelihood (default 256)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="its seed (default 0)")
    return parser


def run(args: argparse.Namespace) -> int:
    """Evaluate what is not, compare, print the files and the table."""
    from gen_pipelines.evaluation.compare import compare, markdown

    given = evaluated(args) if args.dataset else args.evaluations
    if os.environ.get("RANK", "0") != "0":
        return 0
    groups = compare(given, args.out, args.title)
    print(markdown(groups), file=sys.stderr)
    for file in ("compare.md", "compare.csv", "compare.html"):
        print(Path(args.out) / file)
    return 0


def evaluated(args: argparse.Namespace) -> list[str]:
    """The arguments with an evaluation for each model among them: one that is there and is of this protocol, or one made now."""
    from gen_pipelines.bundled import BUNDLED

    given: list[tuple[str, str, bool]] = []
    for one in args.evaluations:
        name, separator, model = one.partition("=")
        if not separator:
            name, model = "", one
        is_model = model.startswith(BUNDLED) or (Path(model) / "model_index.json").is_file()
        given.append((name, model, is_model or not (Path(model).exists() or model.endswith(".json"))))
    places = {model: place_of(model) for _, model, is_model in given if is_model}
    shared = Counter(short_name(place) for place in set(places.values()))
    references: dict[Any, Any] = {}
    found = []
    for one, (name, model, is_model) in zip(args.evaluations, given, strict=True):
        if is_model:
            file = short_name(places[model])
            if shared[file] > 1:  # runs/a/final and runs/b/final: neither a file nor a row may be of both
                file, name = f"{file}-{hashlib.sha256(places[model].encode()).hexdigest()[:8]}", name or model
            target = evaluation_of(model, Path(args.out) / f"evaluation-{file}.json", args, references)
            one = f"{name}={target}" if name else str(target)
        found.append(one)
    return found


def place_of(model: str) -> str:
    """A folder as its full path; a bundled pipeline or an id on the Hub as it is."""
    return str(Path(model).expanduser().resolve()) if Path(model).expanduser().is_dir() else model


def short_name(place: str) -> str:
    from gen_pipelines.bundled import BUNDLED

    return Path(place.removeprefix(BUNDLED)).name


def evaluation_of(model: str, target: Path, args: argparse.Namespace, references: dict[Any, Any]) -> Path:
    """The file of a model's evaluation under the protocol asked for: `target` or the model's own if they are that, else `target` made now.

    Args:
        references: data sets that are open, by the size of the pictures.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from gen_pipelines.bundled import BUNDLED, bundled_path
    from gen_pipelines.cli.evaluate import summary
    from gen_pipelines.evaluation.evaluate import evaluate, is_current, load_pipeline
    from gen_pipelines.evaluation.reference import Reference
    from gen_pipelines.evaluation.sampling import Sampler
    from gen_pipelines.hub.card import EVALUATION_NAME

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    with logs_on_stderr():
        called, pipe = load_pipeline(model, None)
        pipe.set_progress_bar_config(disable=True)
        channels, resolution, _ = Sampler(pipe, args.seed).probe()
        if (channels, resolution) not in references:
            references[channels, resolution] = Reference.open(args.dataset, resolution=resolution, channels=channels)
        reference = references[channels, resolution]
        options = {"num": args.num, "seed": args.seed, "likelihood": args.likelihood}
        own = Path(bundled_path(model.removeprefix(BUNDLED)) if model.startswith(BUNDLED) else model) / EVALUATION_NAME
        others = [file for file in (target, own) if file.is_file()]
        for file in others:
            if is_current(file, pipe, reference, **options):
                return file
        if others:
            logger.info("%s: %s is of other weights or another protocol; evaluating again.", model, " and ".join(map(str, others)))
        result = evaluate(pipe, reference, name=called, out=target, **options)
        if os.environ.get("RANK", "0") == "0":
            print(target, flush=True)
            print(summary(result), file=sys.stderr)
    return target
