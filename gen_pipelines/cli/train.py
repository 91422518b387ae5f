"""`gen-pipelines train CONFIG [key=value ...]`: train a model from a recipe, on this process or on those of torchrun or accelerate."""

import argparse
import contextlib
import logging
import os
from collections.abc import Iterator

from gen_pipelines.cli.main import Parser


def build_parser() -> Parser:
    parser = Parser(
        prog="gen-pipelines train",
        description="Train a model from a recipe, and save it as a pipeline that loads with from_pretrained.",
        epilog="several processes:\n"
        "  accelerate launch -m gen_pipelines train CONFIG --output-dir DIR\n"
        "  ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 -m gen_pipelines train CONFIG --output-dir DIR",
    )
    parser.add_argument(
        "config", metavar="CONFIG", help="the recipe, a YAML file; configs/ in the repository has those of the bundled pipelines"
    )
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", help="change a setting of the recipe; dots go into sections, values are YAML"
    )
    parser.add_argument(
        "--output-dir", metavar="DIR", required=True, help="the folder for checkpoints, sample grids and the finished pipeline"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in DIR, bit for bit as if nothing had stopped"
    )
    parser.add_argument(
        "--inexact-resume", action="store_true", help="resume even where that cannot be exact: a streamed data set, another machine"
    )
    parser.add_argument(
        "--push-to-hub", metavar="REPO", help="push the finished model to this repository (user/name) of the Hub; see `hf auth login`"
    )
    parser.add_argument("--private", action="store_true", help="make that repository private, if it is made now")
    parser.add_argument(
        "--push-checkpoints", action="store_true", help="push every checkpoint too, while the training runs, to the branch `checkpoints`"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Train, and print the folder of the finished pipeline."""
    for word in args.overrides:
        if not word.partition("=")[0] or "=" not in word:
            raise ValueError(f"{word!r} is not a setting: write key=value, for example loop.steps=100")
    from gen_pipelines.training.run import train

    with logs_on_stderr():
        folder = train(
            args.config,
            args.overrides,
            args.output_dir,
            resume=args.resume,
            inexact_resume=args.inexact_resume,
            push_to_hub=args.push_to_hub,
            private=args.private,
            push_checkpoints=args.push_checkpoints,
        )
    if os.environ.get("RANK", "0") == "0":
        print(folder)
    return 0


@contextlib.contextmanager
def logs_on_stderr() -> Iterator[None]:
    """Show what the library logs. Only a program may do this; as a library it logs and leaves the handlers to the user's program."""
    logger, handler = logging.getLogger("gen_pipelines"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
