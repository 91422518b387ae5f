"""`gen-pipelines compare A B C ...`: evaluations side by side, as a table, a CSV and one page."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from gen_pipelines.cli.main import Parser


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
    parser.add_argument("--dataset", metavar="NAME", help="evaluate models that have no evaluation yet, on this data set")
    parser.add_argument("--num", metavar="N", type=int, default=5000, help="pictures of such an evaluation (default 5000)")
    parser.add_argument("--likelihood", metavar="N", type=int, default=256, help="held-out pictures for its likelihood (default 256)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="its seed (default 0)")
    return parser


def run(args: argparse.Namespace) -> int:
    """Evaluate what is not, compare, print the files and the table."""
    from gen_pipelines.evaluation.compare import compare, markdown

    given = [evaluated(one, args) for one in args.evaluations] if args.dataset else args.evaluations
    if os.environ.get("RANK", "0") != "0":
        return 0
    groups = compare(given, args.out, args.title)
    print(markdown(groups), file=sys.stderr)
    for file in ("compare.md", "compare.csv", "compare.html"):
        print(Path(args.out) / file)
    return 0


def evaluated(given: str, args: argparse.Namespace) -> str:
    """An argument of `compare` for a model: its evaluation in the output folder, made now if it is not there; others as they are."""
    from gen_pipelines.bundled import BUNDLED
    from gen_pipelines.cli.main import main

    name, separator, model = given.partition("=")
    if not separator:
        name, model = "", given
    is_model = model.startswith(BUNDLED) or (Path(model) / "model_index.json").is_file()
    if not is_model and (Path(model).exists() or model.endswith(".json")):
        return given
    target = Path(args.out) / f"evaluation-{Path(model.removeprefix(BUNDLED)).name}.json"
    if not target.is_file():
        words = ["evaluate", model, "--dataset", args.dataset, "--num", str(args.num), "--likelihood", str(args.likelihood)]
        if main([*words, "--seed", str(args.seed), "--out", str(target)]):
            raise ValueError(f"{model}: its evaluation failed; see above.")
    return f"{name}={target}" if name else str(target)
