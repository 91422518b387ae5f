"""`gen-pipelines VERB ...`: finds the verb's module, runs it, and turns errors into one line and an exit status."""

import argparse
import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from gen_pipelines import __version__

# verb -> (module, what --help says of it)
VERBS: dict[str, tuple[str, str]] = {
    "generate": ("gen_pipelines.cli.generate", "draw pictures of prompts"),
    "edit": ("gen_pipelines.cli.edit", "redraw pictures or parts of them; mix, walk and project styles of a GAN"),
    "train": ("gen_pipelines.cli.train", "train a model from a recipe"),
    "pairs": ("gen_pipelines.cli.pairs", "draw pairs of noise and picture, the data of reflow"),
    "evaluate": ("gen_pipelines.cli.evaluate", "measure what a model draws against a data set"),
    "compare": ("gen_pipelines.cli.compare", "put evaluations side by side, as a table and a page"),
    "convert": ("gen_pipelines.cli.convert", "turn a checkpoint of another project into a pipeline"),
    "push": ("gen_pipelines.cli.push", "upload a model to the Hub"),
    "info": ("gen_pipelines.cli.info", "say what a model, or a picture that we drew, is made of"),
}

# Exit statuses: 0 done, 2 the input cannot be used, 1 anything else, 130 interrupted (as shells have it).
BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130

# Errors of these packages that are neither ValueError nor OSError, and still speak of what the user gave: an unknown revision or
# file on the Hub, a weight file that is cut short, a recipe that is not YAML.
_INPUT_LIBRARIES = ("huggingface_hub", "safetensors", "safetensors_rust", "yaml")


class Parser(argparse.ArgumentParser):
    """argparse, with wrong usage raised as ValueError, so that all errors leave through one door as one line."""

    def __init__(self, **kwargs) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            wrong = message.removeprefix("unrecognized arguments: ").split()[0].split("=")[0]
            near = difflib.get_close_matches(wrong, self._option_string_actions, n=1) if wrong.startswith("-") else []
            message += f", did you mean {near[0]}?" if near else ""
        raise ValueError(f"{message} (see {self.prog} --help)")


def usage() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:{width}}  {help_}" for verb, (_, help_) in VERBS.items())
    return (
        "usage: gen-pipelines VERB ...\n\n"
        "Generative models as pipelines: load, generate, train, push.\n\n"
        f"verbs:\n{verbs}\n\n"
        "options:\n  --help     this text; gen-pipelines VERB --help for the options of a verb\n  --version  the version of the library\n\n"
        'example:\n  gen-pipelines generate "a red apple"'
    )


def is_bad_input(error: BaseException) -> bool:
    """Whether an error speaks of what the user gave (exit status 2), rather than of a failed run or of a defect (1)."""
    expected = ValueError | TypeError | OSError | ImportError | NotImplementedError
    return isinstance(error, expected) or type(error).__module__.split(".")[0] in _INPUT_LIBRARIES


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if is_bad_input(error) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after `gen-pipelines`; None takes those of the process.
    Returns: the exit status: 0, or 2 for bad input, 1 for a failed run, 130 when interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if len(words) == 2 and words[0] in ("-h", "--help", "help"):
        words = [words[1], "--help"]
    if words in (["-h"], ["--help"], ["help"]):
        print(usage())
        return 0
    if words == ["--version"]:
        print(f"gen-pipelines {__version__}")
        return 0
    try:
        return dispatch(words)
    except SystemExit as stop:  # argparse's --help
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        print("gen-pipelines: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `gen-pipelines ... | head`: nobody reads on, and the interpreter must not complain when it flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if "--debug" in words:
            traceback.print_exc()
        rank = f" (rank {os.environ['RANK']})" if os.environ.get("RANK", "0") != "0" else ""
        hint = "" if is_bad_input(error) or "--debug" in words else "; run again with --debug for the traceback"
        text = one_line(error).removesuffix(".") if hint else one_line(error)
        print(f"gen-pipelines: error{rank}: {text}{hint}", file=sys.stderr)
        return BAD_INPUT if is_bad_input(error) else FAILED


def dispatch(words: list[str]) -> int:
    verbs = ", ".join(VERBS)
    if not words or words[0].startswith("-"):
        raise ValueError(f"a verb comes first, one of {verbs} (see gen-pipelines --help)")
    verb, rest = words[0], words[1:]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        raise ValueError(f"unknown verb {verb!r}{f', did you mean {near[0]!r}' if near else ''}; there are {verbs}")
    module = importlib.import_module(VERBS[verb][0])
    # intermixed: options may stand between the words of a list (`train recipe.yaml --output-dir runs/a optimizer.lr=1e-4`)
    return module.run(module.build_parser().parse_intermixed_args(rest))
