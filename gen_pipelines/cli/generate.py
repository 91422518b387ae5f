"""`gen-pipelines generate [PROMPT...]`: draw pictures of prompts, of classes or of nothing, write them, print their paths."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gen_pipelines import __version__
from gen_pipelines.cli import pictures
from gen_pipelines.cli.main import Parser

if TYPE_CHECKING:
    from PIL.Image import Image

DEFAULTS: dict[str, Any] = {
    "model": "bundled:emoji",
    "revision": None,
    "scheduler": None,  # the model's own
    "num_inference_steps": None,  # the model's own
    "guidance_scale": None,  # the model's own
    "temperature": None,  # the model's own
    "truncation": None,
    "seed": 0,
    "negative_prompt": None,
    "height": None,  # the model's own
    "width": None,
    "dtype": "float32",
}
DTYPES = ("float32", "bfloat16", "float16")
_MAX_SEED = 2**63 - 1


def build_parser() -> Parser:
    parser = Parser(
        prog="gen-pipelines generate",
        description="Draw pictures of prompts, or of classes. Prints the path of each picture on stdout; everything else goes to stderr.",
        epilog="examples:\n"
        '  gen-pipelines generate "a red apple"\n'
        '  gen-pipelines generate "a cat" "a dog" --num 4 --grid --out pets/\n'
        "  gen-pipelines generate --model runs/mnist-ddpm --num 16 --grid\n"
        "  gen-pipelines generate --model runs/mnist-ddpm --classes 0-9 --num 4 --grid\n"
        "  gen-pipelines generate --like a-red-apple-0.png --scheduler ddim\n"
        "  torchrun --nproc_per_node 2 -m gen_pipelines generate --prompts-file prompts.txt --out pictures/",
    )
    what = parser.add_argument_group("what to draw")
    what.add_argument("prompts", metavar="PROMPT", nargs="*", help="what the picture shows; several give several pictures")
    what.add_argument("--prompts-file", metavar="FILE", help="more prompts, one on a line; - reads stdin; empty lines are skipped")
    what.add_argument("--classes", metavar="LIST", help="for models of classes: 3, 0-9, 1,5-7, or their names: cat,white shark")
    what.add_argument("--negative", metavar="TEXT", dest="negative_prompt", help="what the picture must not show (needs guidance above 1)")
    # the long form is for torchrun, which takes --num for an abbreviation of an option of its own
    what.add_argument("--num", "--num-images", metavar="N", type=int, help="pictures of each prompt or class (default 1)")
    what.add_argument("--seed", metavar="N", type=int, help="the seed of the first picture; picture i is drawn with seed + i (default 0)")
    what.add_argument("--seeds", metavar="A-B", type=_seeds, help="--seed A and as many pictures as there are seeds from A to B")
    what.add_argument(
        "--size", metavar="HxW", type=parse_size, help="height x width in pixels, or one number for a square (default: the model's)"
    )
    what.add_argument("--like", metavar="PICTURE", help="take every setting not given here from a picture drawn before")

    how = add_sampling(parser)
    how.add_argument("--temperature", metavar="T", type=float, help="of models that have one (VAE, VQ-VAE, flows); below 1: less varied")
    how.add_argument("--truncation", metavar="PSI", type=float, help="of GANs: StyleGAN's psi (0.7: less varied), else the noise's limit")
    add_output(parser)
    return parser


def add_sampling(parser: Parser) -> Any:
    """The options of every verb that draws: the model and how it is sampled."""
    how = parser.add_argument_group("how to draw it")
    how.add_argument("--model", help="bundled:NAME, a folder, or an id on the Hub (default bundled:emoji)")
    how.add_argument("--revision", metavar="REV", help="branch, tag or commit of a model on the Hub")
    how.add_argument("--scheduler", metavar="NAME[:KEY=VALUE]", help="the sampler (default: the model's); a wrong name lists all")
    how.add_argument("--steps", metavar="N", type=int, dest="num_inference_steps", help="sampling steps (default: the model's)")
    how.add_argument("--guidance", metavar="S", type=float, dest="guidance_scale", help="guidance scale; 1 is none (default: the model's)")
    how.add_argument("--device", help="cpu, cuda, cuda:1, mps ... (default: an accelerator if there is one)")
    how.add_argument("--dtype", choices=DTYPES, help="precision of the networks (default float32)")
    how.add_argument("--batch-size", metavar="N", type=int, default=8, help="pictures drawn at once (default 8)")
    return how


def add_output(parser: Parser) -> None:
    """The options of every verb that writes pictures."""
    where = parser.add_argument_group("where it goes")
    where.add_argument(
        "--out", metavar="PATH", default=".", help="a folder, or a .png file for one picture or a grid (default: this folder)"
    )
    where.add_argument("--grid", action="store_true", help="one picture of all: beside the others in a folder, alone if --out is a file")


def parse_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:[xX×](\d+))?", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: write HxW in pixels, for example 64x64")
    height = int(match[1])
    return height, int(match[2] or height)


def _seeds(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)-(\d+)", text.strip())
    if match is None or int(match[2]) < int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} are no seeds: write the first and the last, for example 1-16")
    return int(match[1]), int(match[2]) - int(match[1]) + 1


@dataclass(frozen=True)
class Picture:
    """One picture to draw: its own prompt, or class, or neither, and its own seed."""

    prompt: str
    seed: int
    label: str | None = None

    @property
    def name(self) -> str:
        return pictures.picture_name(self.prompt if self.label is None else f"class {self.label}", self.seed)


def run(args: argparse.Namespace) -> int:
    """Check everything that can be checked without a model, load it, draw this process's share, write it."""
    known = pictures.read_settings(args.like) if args.like else {}
    if "edit" in known:
        raise ValueError(f"--like {args.like}: it was made by gen-pipelines edit --{known['edit']}, which makes it again")
    if "image" in known:
        raise ValueError(f"--like {args.like}: it was made of {known['image']} by gen-pipelines edit, which makes it again")
    if args.seeds is not None:
        if args.seed is not None or args.num is not None:
            raise ValueError("--seeds stands for --seed and --num; leave those out")
        args.seed, args.num = args.seeds
    settings = choose_settings(args, known)
    num = args.num if args.num is not None else known.get("num", 1)
    labels = read_classes(args, known)
    promptless = labels is not None or (not args.prompts and args.prompts_file is None and takes_no_prompt(settings, known))
    prompts = [""] if promptless else read_prompts(args, known)
    plan = plan_pictures(prompts, num, settings["seed"], labels)
    alone = check_target(args.out, len(plan), args.grid)
    settings |= pin(settings["model"], settings["revision"])

    if known.get("model") == settings["model"] and known.get("model_revision") != settings["model_revision"]:
        print(f"gen-pipelines: note: {args.like} was drawn by another revision of {settings['model']}", file=sys.stderr)

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    first, last = (math.ceil(len(plan) * r / world) for r in (rank, rank + 1))  # shares differ by one at most
    mine = plan[first:last]
    images: list[Image] = []
    if mine:
        pipe = load(settings, args.device, show_progress=rank == 0, promptless=promptless)
        settings |= describe(pipe, settings)
        for start in range(0, len(mine), args.batch_size):
            batch = mine[start : start + args.batch_size]
            drawn = draw(pipe, batch, settings)
            if not (args.grid and alone):
                for picture, image in zip(batch, drawn, strict=True):
                    own = {"prompt": picture.prompt, **settings, "seed": picture.seed, "height": image.height, "width": image.width}
                    own |= {} if picture.label is None else {"class_label": picture.label}
                    path = Path(args.out) if alone else Path(args.out) / picture.name
                    pictures.write_picture(image, path, own)
                    pictures.announce(path)
            images += drawn if args.grid else []
    if args.grid:
        images, settings = gather(images, settings, rank, world)
        if rank == 0:
            several = len(prompts) > 1 or (labels is not None and len(labels) > 1)
            grid = pictures.make_grid(images, columns=num if num > 1 and (several or not promptless) else None)
            path = Path(args.out) if alone else Path(args.out) / "grid.png"
            size = {"height": images[0].height, "width": images[0].width}
            classes = {} if labels is None else {"class_labels": labels}
            pictures.write_picture(grid, path, {"prompts": prompts, "num": num, **classes, **settings, **size})
            pictures.announce(path)
    return 0


def choose_settings(args: argparse.Namespace, known: dict[str, Any]) -> dict[str, Any]:
    """What was asked for, else what `--like`'s picture was drawn with, else the default; checked as far as no model is needed."""
    asked = vars(args) | dict(zip(("height", "width"), args.size or (None, None), strict=True))
    settings = {}
    for name, default in DEFAULTS.items():
        settings[name] = next((value for value in (asked[name], known.get(name)) if value is not None), default)
    if args.model is not None and args.revision is None:
        settings["revision"] = None  # the picture's revision is one of the picture's model

    steps, guidance, seed = settings["num_inference_steps"], settings["guidance_scale"], settings["seed"]
    if steps is not None and steps < 1:
        raise ValueError(f"--steps {steps}: at least 1 step is needed")
    if guidance is not None and not math.isfinite(guidance):
        raise ValueError(f"--guidance {guidance}: must be a finite number; 1 is no guidance")
    for name in ("temperature", "truncation"):
        if settings[name] is None:
            del settings[name]
    if not math.isfinite(settings.get("truncation", 0.0)):
        raise ValueError(f"--truncation {settings['truncation']}: must be a finite number; leave it out for none")
    if "temperature" in settings and not (math.isfinite(settings["temperature"]) and settings["temperature"] >= 0):
        raise ValueError(f"--temperature {settings['temperature']}: must be a number from 0 on; 1 is what the model was trained for")
    if args.num is not None and args.num < 1:
        raise ValueError(f"--num {args.num}: at least 1 picture of each prompt is needed")
    if args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size}: at least 1 picture must be drawn at once")
    if not 0 <= seed <= _MAX_SEED:
        raise ValueError(f"--seed {seed}: must lie between 0 and 2^63 - 1")
    if args.size and min(args.size) < 1:
        raise ValueError(f"--size {args.size[0]}x{args.size[1]}: both sides must be at least 1 pixel")
    return settings


def read_prompts(args: argparse.Namespace, known: dict[str, Any]) -> list[str]:
    prompts = list(args.prompts)
    if args.prompts_file is not None:
        try:
            text = sys.stdin.read() if args.prompts_file == "-" else Path(args.prompts_file).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"--prompts-file {args.prompts_file}: not a UTF-8 text file ({error.reason} at byte {error.start})") from error
        except OSError as error:
            raise type(error)(f"--prompts-file {args.prompts_file}: {error.strerror}") from error
        prompts += [line.strip() for line in text.splitlines() if line.strip()]
        if not prompts:
            raise ValueError(f"--prompts-file {args.prompts_file}: no prompt in it; write one on a line")
    if not prompts and known:
        prompts = known.get("prompts") or [known["prompt"]]
    if not prompts:
        raise ValueError('no prompt: say what the picture shows, for example gen-pipelines generate "a red apple", or give --prompts-file')
    return prompts


def read_classes(args: argparse.Namespace, known: dict[str, Any]) -> list[str] | None:
    """The classes asked for, ranges written out; those of `--like`'s picture where no prompt is given either."""
    if args.classes is None:
        if args.prompts or args.prompts_file is not None:
            return None
        return known.get("class_labels") or ([known["class_label"]] if "class_label" in known else None)
    if args.prompts or args.prompts_file is not None:
        raise ValueError("--classes and prompts: a model draws one or the other; leave one out")
    labels: list[str] = []
    for word in filter(None, (word.strip() for word in args.classes.split(","))):
        span = re.fullmatch(r"(\d+)-(\d+)", word)
        if span and int(span[1]) > int(span[2]):
            raise ValueError(f"--classes {args.classes}: {word} runs backwards; write {span[2]}-{span[1]}")
        labels += [str(i) for i in range(int(span[1]), int(span[2]) + 1)] if span else [word]
    if not labels:
        raise ValueError(f"--classes {args.classes!r}: no class in it; write for example 0-9, or 1,5,7")
    return labels


def takes_no_prompt(settings: dict[str, Any], known: dict[str, Any]) -> bool:
    """Whether the model draws without a prompt. It is looked for only when none was given."""
    if any(known.get("prompts") or [known.get("prompt")]) or settings["model"] == DEFAULTS["model"]:
        return False
    from gen_pipelines.cli.repository import Repository

    index = Repository.open(settings["model"], settings["revision"]).index()
    from gen_pipelines import AutoPipeline

    return AutoPipeline.takes_no_prompt(index)


def plan_pictures(prompts: list[str], num: int, seed: int, labels: list[str] | None = None) -> list[Picture]:
    """`num` pictures of each prompt, or of each class, in order; picture i has seed + i."""
    subjects = [(prompt, None) for prompt in prompts] if labels is None else [("", label) for label in labels]
    wanted = [subject for subject in subjects for _ in range(num)]
    if seed + len(wanted) - 1 > _MAX_SEED:
        raise ValueError(f"--seed {seed}: the last of {len(wanted)} pictures would have a seed above 2^63 - 1")
    return [Picture(prompt, seed + i, label) for i, (prompt, label) in enumerate(wanted)]


def check_target(out: str, count: int, grid: bool) -> bool:
    """Whether `--out` is one file; raises if it cannot take what will be written."""
    alone = pictures.is_file_name(out)
    if alone and count > 1 and not grid:
        raise ValueError(f"--out {out}: one file cannot take {count} pictures; name a folder, or add --grid for one picture of all")
    pictures.check_writable(Path(out).parent if alone else out)
    return alone


def pin(model: str, revision: str | None) -> dict[str, Any]:
    """Find the model, and say which revision of it this is: a commit of the Hub, which is then loaded, or a folder's fingerprint."""
    from gen_pipelines.cli.repository import HubRepository, Repository

    repository = Repository.open(model, revision)
    fingerprint = repository.fingerprint()
    return {"model_revision": fingerprint, "revision": fingerprint if isinstance(repository, HubRepository) else None}


def load(settings: dict[str, Any], device: str | None, show_progress: bool, promptless: bool = False) -> Any:
    """The pipeline, on its device, with the scheduler that was asked for."""
    import torch

    where = choose_device(device)
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from gen_pipelines import AutoPipeline
    from gen_pipelines.schedulers import choose_scheduler, parse_scheduler

    if settings["scheduler"] is not None:
        parse_scheduler(settings["scheduler"], "--scheduler")  # a wrong one is said before a model is fetched
    diffusers_logging.disable_progress_bar()  # those of loading; the bar over the steps stays
    transformers_logging.disable_progress_bar()
    revision = {"revision": settings["revision"]} if settings["revision"] is not None else {}
    pipe = AutoPipeline.from_pretrained(settings["model"], dtype=getattr(torch, settings["dtype"]), **revision)
    takes = _call_defaults(pipe)
    if not promptless and "prompt" not in takes:
        raise ValueError(f"--model {settings['model']} is a {type(pipe).__name__}, which takes no prompt; leave it out, or give --classes")
    if promptless and "batch_size" not in takes:
        raise ValueError(f"--model {settings['model']} is a {type(pipe).__name__}, which draws from prompts; give one")
    if promptless:
        check_promptless(pipe, settings)
    if settings["scheduler"] is not None:
        pipe.scheduler = choose_scheduler(pipe, settings["scheduler"], "--scheduler")
    pipe.set_progress_bar_config(disable=not show_progress, leave=False)
    return pipe.to(where)


def choose_device(device: str | None) -> Any:
    """The device asked for, else this process's accelerator, else the CPU."""
    import torch

    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # a wrong name; a build without it; a machine without it
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device}: cannot be used here ({reason})") from error
    return where


def describe(pipe: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """What the pipeline decided, and what made the picture: the rest of the settings that reproduce it."""
    import torch

    from gen_pipelines.schedulers import parse_scheduler, scheduler_name

    sampler = getattr(pipe, "scheduler", None)
    said = {} if settings["scheduler"] is None else parse_scheduler(settings["scheduler"])[1]  # the rest is the model's own
    decided = {name: settings[name] for name in ("num_inference_steps", "guidance_scale")}
    for name, value in decided.items():
        if value is None:  # ours say it in their config, diffusers' pipelines in the signature of the call
            decided[name] = pipe.config.get(f"default_{name}", _call_defaults(pipe).get(name))
    return {
        **decided,
        "scheduler": None if sampler is None else scheduler_name(sampler, said),
        "pipeline": type(pipe).__name__,
        "gen_pipelines_version": __version__,
        "torch_version": torch.__version__,
    }


def _call_defaults(pipe: Any) -> dict[str, Any]:
    import inspect

    return {name: parameter.default for name, parameter in inspect.signature(type(pipe).__call__).parameters.items()}


def draw(pipe: Any, batch: list[Picture], settings: dict[str, Any]) -> list[Image]:
    import torch

    # Drawn on the CPU: the same seed gives the same noise on every device.
    generators = [torch.Generator("cpu").manual_seed(picture.seed) for picture in batch]
    named = ("num_inference_steps", "guidance_scale", "temperature", "truncation", "height", "width")
    optional = {name: settings[name] for name in named if settings.get(name) is not None}
    if "prompt" not in _call_defaults(pipe):
        return draw_classes(pipe, batch, generators, optional)
    if refused := [name for name in ("temperature", "truncation") if name in optional and name not in _call_defaults(pipe)]:
        raise ValueError(f"--{refused[0]}: a {type(pipe).__name__} has none; leave it out")
    if settings["negative_prompt"] is not None:
        optional["negative_prompt"] = [settings["negative_prompt"]] * len(batch)
    return pipe(prompt=[picture.prompt for picture in batch], generator=generators, **optional).images


def draw_classes(pipe: Any, batch: list[Picture], generators: list[Any], optional: dict[str, Any]) -> list[Image]:
    """Pictures of classes, or of none, from a pipeline that takes no prompt."""
    takes = _call_defaults(pipe)
    if refused := [name for name in optional if name not in takes and name not in ("height", "width")]:
        option = {"num_inference_steps": "--steps", "guidance_scale": "--guidance"}.get(refused[0], f"--{refused[0]}")
        raise ValueError(f"{option}: a {type(pipe).__name__} has none; leave it out")
    options = {name: value for name, value in optional.items() if name in takes}
    if any(picture.label is not None for picture in batch):
        if "class_labels" not in takes:
            raise ValueError(f"--classes: a {type(pipe).__name__} has no classes; leave it out")
        options["class_labels"] = [int(p.label) if p.label.isdecimal() else p.label for p in batch]
    return pipe(batch_size=len(batch), generator=generators, **options).images


def check_promptless(pipe: Any, settings: dict[str, Any]) -> None:
    """Refuses what a pipeline that takes no prompt has no use for, before anything is drawn.

    Raises:
        ValueError: a size that is not the model's, or a negative prompt.
    """
    if settings.get("negative_prompt") is not None:
        raise ValueError(f"--negative: --model {settings['model']} is a {type(pipe).__name__}, which takes no prompt; leave it out")
    if (size := getattr(pipe, "picture_size", None)) is not None:
        if (wanted := (settings.get("height") or size[0], settings.get("width") or size[1])) != tuple(size):
            raise ValueError(f"--size {wanted[0]}x{wanted[1]}: this model draws {size[0]}x{size[1]}; leave it out")


def gather(images: list[Image], settings: dict[str, Any], rank: int, world: int) -> tuple[list[Image], dict[str, Any]]:
    """All pictures in order, and the settings of a process that drew some, on rank 0; other ranks get their own back."""
    if world == 1:
        return images, settings
    import torch.distributed as dist

    dist.init_process_group("gloo")  # pictures are host memory on every device
    try:
        shares: list[Any] | None = [None] * world if rank == 0 else None
        dist.gather_object((images, settings), shares, dst=0)
    finally:
        dist.destroy_process_group()
    if shares is None:
        return images, settings
    return [image for share, _ in shares for image in share], next(theirs for share, theirs in shares if share)
