"""`gen-pipelines convert SOURCE --to FOLDER`: a foreign checkpoint becomes a pipeline; nothing in it is run."""

import argparse
import sys

from gen_pipelines.cli.main import Parser


def build_parser() -> Parser:
    from gen_pipelines.conversion import FORMATS

    parser = Parser(
        prog="gen-pipelines convert",
        description="Turn a checkpoint of another project into a pipeline of this library. The file is read as data: nothing in it is run.",
        epilog=f"formats: {', '.join(FORMATS)}\n\n"
        "examples:\n  gen-pipelines convert network.pkl --to cats\n  gen-pipelines convert network.pkl --dry-run",
    )
    parser.add_argument("source", metavar="SOURCE", help="the checkpoint: a file, or a folder of files")
    parser.add_argument("--to", metavar="FOLDER", help="the folder to write: a new or empty one, or one of an earlier conversion")
    parser.add_argument("--format", metavar="NAME", default="auto", help="the checkpoint's format; auto tells it from the keys (default)")
    parser.add_argument("--config", metavar="FILE", help="the configuration, JSON or YAML, for formats whose weights do not say it all")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="an option of the format; may be given again")
    parser.add_argument("--license", metavar="ID", help="the licence for the card, by its identifier on the Hub")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done: format, configuration, sizes, keys; write nothing")
    parser.add_argument("--push", metavar="REPO", help="push the folder to this repository (user/name) of the Hub; see `hf auth login`")
    parser.add_argument("--private", action="store_true", help="make that repository private, if it is made now")
    return parser


def run(args: argparse.Namespace) -> int:
    """Convert, and print the folder, or the plan of a dry run."""
    import yaml

    options = {}
    for word in args.set:
        key, equals, value = word.partition("=")
        if not key or not equals:
            raise ValueError(f"{word!r} is no option: write --set key=value")
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            options[key] = value
    if args.config is not None:
        options["config"] = args.config
    if args.to is None and not args.dry_run:
        raise ValueError("--to FOLDER is needed, or --dry-run (see gen-pipelines convert --help)")
    if args.dry_run and args.push:
        raise ValueError("--dry-run writes nothing that --push could push; leave one of them out")

    from gen_pipelines.conversion import convert

    plan = convert(args.source, args.to, args.format, options, args.dry_run, progress=sys.stderr.isatty(), license=args.license)
    if args.dry_run:
        print(plan.describe())
        return 0
    print(args.to)
    if args.push:
        push(args.to, args.push, args.private)
    return 0


def push(folder: str, repo: str, private: bool) -> None:
    from pathlib import Path

    from gen_pipelines.hub.push import check_folder, full_name, push_folder, refresh_card

    check_folder(Path(folder))
    repo = full_name(repo)
    refresh_card(Path(folder), repo)
    print(push_folder(folder, repo, private=private or None).commit_url)
