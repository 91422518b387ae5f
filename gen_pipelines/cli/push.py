"""`gen-pipelines push FOLDER REPO`: a pipeline, network or scheduler on this machine becomes a repository of the Hub."""

import argparse
import shutil
import tempfile
from pathlib import Path

from gen_pipelines.cli.main import Parser


def build_parser() -> Parser:
    parser = Parser(
        prog="gen-pipelines push",
        description="Upload a folder that save_pretrained(...) or a training wrote. Checkpoints, logs and pickles in it stay here; a card "
        "(README.md) on the Hub that a person has edited stays as it is.",
        epilog="Log in first with `hf auth login`, or set HF_TOKEN.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="the folder, or bundled:NAME")
    parser.add_argument("repo", metavar="REPO", help="user/name, or name for the user that is logged in; made if need be")
    parser.add_argument("--private", action="store_true", help="make the repository private (if it is made now)")
    parser.add_argument("--commit-message", metavar="TEXT", help="what the commit says")
    parser.add_argument("--revision", metavar="BRANCH", help="the branch to push to; made if need be")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request in place of a commit")
    return parser


def run(args: argparse.Namespace) -> int:
    """Push, and print the page of the commit."""
    from gen_pipelines.hub.push import check_folder, full_name, push_folder, refresh_card

    with tempfile.TemporaryDirectory() as side:
        folder = Path(args.folder)
        if args.folder.startswith("bundled:"):
            from gen_pipelines import bundled_path

            name = args.folder.removeprefix("bundled:")
            folder = Path(shutil.copytree(bundled_path(name), Path(side, name)))  # the card will name the repository
        check_folder(folder)
        repo = full_name(args.repo)
        refresh_card(folder, repo)
        commit = push_folder(
            folder,
            repo,
            private=args.private or None,
            commit_message=args.commit_message,
            revision=args.revision,
            create_pr=args.create_pr,
        )
    print(commit.pr_url or commit.commit_url)
    return 0
