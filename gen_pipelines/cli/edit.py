"""`gen-pipelines edit IMAGE... --prompt TEXT`: redraw pictures, a masked part of them, or what lies beyond their frame.

What it does with the styles of a GAN is in `styles.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gen_pipelines.cli import generate, pictures, styles
from gen_pipelines.cli.main import Parser

if TYPE_CHECKING:
    from PIL.Image import Image

REDRAWN, DRAWN = 0.8, 1.0  # default strengths: of a whole picture, of a masked part


def build_parser() -> Parser:
    parser = Parser(
        prog="gen-pipelines edit",
        description="Redraw pictures after a prompt: whole, where a mask is white, or beyond their frame. Prints the path of each picture "
        "on stdout; everything else goes to stderr. The pictures that come in are not changed.",
        epilog="examples:\n"
        '  gen-pipelines edit apple.png --prompt "a green apple" --strength 0.6\n'
        '  gen-pipelines edit apple.png --prompt "a red apple with a leaf" --mask leaf.png --num 4 --grid\n'
        '  gen-pipelines edit apple.png --prompt "a red apple" --expand 16 --size 64\n'
        "  gen-pipelines edit a.png b.png --out redrawn/\n"
        "  gen-pipelines edit --model runs/stylegan2 --style-mix --rows 1-4 --columns 5-10 --truncation 0.7 --out mixed.png\n"
        "  gen-pipelines edit face.png --model runs/stylegan2 --project w+ --directions 5",
    )
    what = parser.add_argument_group("what to draw")
    what.add_argument("images", metavar="IMAGE", nargs="*", help="the pictures to edit; transparency becomes white")
    what.add_argument("--image", metavar="FILE", action="append", default=[], help="a picture to edit, the same as IMAGE; may be repeated")
    what.add_argument("--prompt", metavar="TEXT", help="what the result shows (default: the prompt that the picture was drawn with)")
    what.add_argument("--negative", metavar="TEXT", dest="negative_prompt", help="what it must not show (needs guidance above 1)")
    what.add_argument("--mask", metavar="FILE", action="append", default=[], help="draw where it is white; one for all, or one per picture")
    what.add_argument("--expand", metavar="N", type=_border, help="draw N pixels beyond the frame; or LEFT,TOP,RIGHT,BOTTOM")
    what.add_argument(
        "--strength", metavar="S", type=float, help=f"from 0, the picture, to 1, from noise (default {REDRAWN}; {DRAWN} with a mask)"
    )
    what.add_argument("--num", "--num-images", metavar="N", type=int, help="results of each picture (default 1)")
    what.add_argument("--seed", metavar="N", type=int, help="the seed of the first result; result i is drawn with seed + i (default 0)")
    what.add_argument(
        "--size", metavar="HxW", type=generate.parse_size, help="of the result in pixels (default: the picture's and what is expanded)"
    )
    generate.add_sampling(parser).add_argument(
        "--resample", metavar="R[xJ]", type=_resampling, help="with a mask or --expand: run stretches of J steps R times (RePaint; J 10)"
    )
    styles.add_options(parser)
    generate.add_output(parser)
    parser.set_defaults(temperature=None)  # of models that draw and do not edit
    return parser


def _border(text: str) -> tuple[int, int, int, int]:
    numbers = text.split(",")
    if len(numbers) not in (1, 4) or not all(n.strip().isdecimal() for n in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is not a border: write pixels, for example 16, or LEFT,TOP,RIGHT,BOTTOM: 0,0,64,0")
    sides = [int(n) for n in numbers]
    return tuple(sides * 4 if len(sides) == 1 else sides)


def _resampling(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:[xX×](\d+))?", text.strip())
    if match is None or not int(match[1]) or not int(match[2] or 1):
        raise argparse.ArgumentTypeError(f"{text!r} is not a resampling: write how often, for example 5, and the steps of a stretch: 5x4")
    return int(match[1]), int(match[2] or 10)


@dataclass(frozen=True)
class Edit:
    """One result: of which picture, after which prompt, with which seed."""

    path: str
    image: Image
    mask_path: str | None
    mask: Image | None
    prompt: str
    seed: int

    @property
    def name(self) -> str:
        return pictures.picture_name(f"{Path(self.path).stem} {self.prompt}", self.seed)

    @property
    def settings(self) -> dict[str, Any]:
        own = {"image": self.path, "image_sha256": _sha256(self.path)}
        return own if self.mask_path is None else own | {"mask": self.mask_path, "mask_sha256": _sha256(self.mask_path)}


def run(args: argparse.Namespace) -> int:
    """Check everything that can be checked without a model, load it, draw this process's share, write it."""
    if (which := styles.mode(args)) is not None:
        return styles.run(args, which)
    settings = generate.choose_settings(args, {})
    edits = plan(args, settings["seed"])
    how = choose_edit(args)
    alone = generate.check_target(args.out, len(edits), args.grid)
    check_overwrites(args.out, alone, edits)
    settings |= generate.pin(settings["model"], settings["revision"])

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    first, last = (math.ceil(len(edits) * r / world) for r in (rank, rank + 1))  # shares differ by one at most
    images: list[Image] = []
    if mine := edits[first:last]:
        pipe = load(settings, args.device, rank == 0, inpaints="mask" in how)
        settings |= generate.describe(pipe, settings)
        for batch in batches(mine, args.batch_size):
            drawn = draw(pipe, batch, settings, how)
            if not (args.grid and alone):
                for edit, image in zip(batch, drawn, strict=True):
                    own = {"prompt": edit.prompt, **settings, **_plain(how), **edit.settings, "seed": edit.seed}
                    path = Path(args.out) if alone else Path(args.out) / edit.name
                    pictures.write_picture(image, path, own | {"height": image.height, "width": image.width})
                    pictures.announce(path)
            images += drawn if args.grid else []
    if args.grid:
        images, settings = generate.gather(images, settings, rank, world)
        if rank == 0:
            check_one_size(images)
            path = Path(args.out) if alone else Path(args.out) / "grid.png"
            own = {"prompts": list(dict.fromkeys(edit.prompt for edit in edits)), "num": args.num or 1, **settings, **_plain(how)}
            own |= {"image": ", ".join(dict.fromkeys(edit.path for edit in edits)), "height": images[0].height, "width": images[0].width}
            pictures.write_picture(pictures.make_grid(images, columns=args.num if (args.num or 1) > 1 else None), path, own)
            pictures.announce(path)
    return 0


def choose_edit(args: argparse.Namespace) -> dict[str, Any]:
    """What is done to the pictures: their strength, and for a masked part or a border what the pipeline must know."""
    masked = bool(args.mask) or args.expand is not None
    strength = args.strength if args.strength is not None else DRAWN if masked else REDRAWN
    if not 0.0 <= strength <= 1.0:
        raise ValueError(f"--strength {strength}: must lie between 0 (the picture itself) and 1 (drawn from noise)")
    if args.resample is not None and not masked:
        raise ValueError("--resample: needs --mask or --expand; a picture that is redrawn as a whole has nothing to fit to")
    how: dict[str, Any] = {"strength": strength}
    if masked:
        how |= {"mask": True, "expand": args.expand, "resampling": args.resample}
    return how


def _plain(how: dict[str, Any]) -> dict[str, Any]:
    """The same for the settings inside the picture."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in how.items() if name != "mask" and value is not None}


def plan(args: argparse.Namespace, seed: int) -> list[Edit]:
    """`num` results of each picture, the pictures in order; result i has seed + i. Everything is read before anything is drawn."""
    paths = [*args.images, *args.image]
    if not paths:
        raise ValueError('no picture: name one, for example gen-pipelines edit apple.png --prompt "a green apple"')
    if args.mask and len(args.mask) not in (1, len(paths)):
        raise ValueError(f"--mask: {len(args.mask)} masks for {len(paths)} pictures; give one for all, or one for each")
    masks = args.mask * len(paths) if len(args.mask) == 1 else args.mask or [None] * len(paths)
    if seed + len(paths) * (args.num or 1) > 2**63:
        raise ValueError(f"--seed {seed}: the last of {len(paths) * (args.num or 1)} pictures would have a seed above 2^63 - 1")
    edits: list[Edit] = []
    for path, mask_path in zip(paths, masks, strict=True):
        image, mask = open_picture(path), None if mask_path is None else open_picture(mask_path, "--mask ")
        prompt = args.prompt if args.prompt is not None else known_prompt(path)
        edits += [Edit(path, image, mask_path, mask, prompt, seed + len(edits) + i) for i in range(args.num or 1)]
    return edits


def open_picture(path: str, what: str = "") -> Image:
    """A picture in memory.

    Raises:
        OSError: the file is missing or cut short.
        ValueError: it is no picture, or so large that it may be an attack.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            image.load()
            return image
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{what}{path}: no such picture") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{what}{path} is not a picture") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{what}{path}: too many pixels ({error})") from error
    except OSError as error:
        raise type(error)(f"{what}{path} cannot be read: {error.strerror or error}") from error


def known_prompt(path: str) -> str:
    """The prompt that a picture of ours was drawn with."""
    try:
        if (prompt := pictures.read_settings(path).get("prompt")) is not None:
            return prompt
    except ValueError:
        pass
    raise ValueError(f"no prompt: say what the result shows with --prompt; {path} does not hold one that it was drawn with")


def check_overwrites(out: str, alone: bool, edits: list[Edit]) -> None:
    """Raises ValueError if a result would take the place of a picture that came in."""
    sources = {Path(p).resolve() for edit in edits for p in (edit.path, edit.mask_path) if p is not None}
    for target in [Path(out)] if alone else [Path(out) / edit.name for edit in edits] + [Path(out) / "grid.png"]:
        if target.resolve() in sources:
            raise ValueError(f"--out {out}: {target} is a picture to edit, which is never overwritten; name another file or folder")


def load(settings: dict[str, Any], device: str | None, show_progress: bool, inpaints: bool) -> Any:
    """The editing pipeline with the components of the model."""
    drawing = generate.load(settings, device, show_progress)
    from gen_pipelines import LatentImageToImagePipeline, LatentInpaintPipeline
    from gen_pipelines.pipelines.latent_base import LatentPipeline

    if not isinstance(drawing, LatentPipeline):
        raise ValueError(f"--model {settings['model']} is a {type(drawing).__name__}; edit needs a text-to-image model in latents of ours")
    pipe = (LatentInpaintPipeline if inpaints else LatentImageToImagePipeline).from_pipe(drawing)
    pipe.set_progress_bar_config(disable=not show_progress, leave=False)
    return pipe


def batches(edits: list[Edit], size: int) -> list[list[Edit]]:
    """Neighbours of one size, at most `size` of them."""
    groups: list[list[Edit]] = []
    for edit in edits:
        alike = groups and len(groups[-1]) < size and groups[-1][0].image.size == edit.image.size
        alike = alike and (edit.mask is None or groups[-1][0].mask.size == edit.mask.size)
        if alike:
            groups[-1].append(edit)
        else:
            groups.append([edit])
    return groups


def choose_size(pipe: Any, edit: Edit, settings: dict[str, Any], border: tuple[int, ...]) -> dict[str, int]:
    """What was asked for; nothing, where the pipeline takes the picture's own size; less, where that is far more than the model draws."""
    asked = {name: settings[name] for name in ("height", "width") if settings[name] is not None}
    own, model = edit.image.height * edit.image.width, math.prod(pipe.default_size)
    if asked or own <= 2 * model:
        return asked
    scale = math.sqrt(model / own)
    left, top, right, bottom = border
    multiple = pipe.size_multiple
    fit = lambda side, more: max(multiple, round((side * scale + more) / multiple) * multiple)
    height, width = fit(edit.image.height, top + bottom), fit(edit.image.width, left + right)
    print(
        f"gen-pipelines: note: {edit.path} has {edit.image.height}x{edit.image.width} pixels and the model draws about "
        f"{pipe.default_size[0]}x{pipe.default_size[1]}; the result has {height}x{width}, --size chooses another",
        file=sys.stderr,
    )
    return {"height": height, "width": width}


def draw(pipe: Any, batch: list[Edit], settings: dict[str, Any], how: dict[str, Any]) -> list[Image]:
    import torch

    from gen_pipelines import RePaint

    # Drawn on the CPU: the same seed gives the same noise on every device.
    generators = [torch.Generator("cpu").manual_seed(edit.seed) for edit in batch]
    optional = {name: settings[name] for name in ("num_inference_steps", "guidance_scale") if settings[name] is not None}
    optional |= choose_size(pipe, batch[0], settings, how.get("expand") or (0,) * 4)
    if settings["negative_prompt"] is not None:
        optional["negative_prompt"] = [settings["negative_prompt"]] * len(batch)
    if "mask" in how:
        optional |= {"mask_image": None if batch[0].mask is None else [edit.mask for edit in batch], "expand": how["expand"]}
        optional |= {"resampling": None if how["resampling"] is None else RePaint(*how["resampling"])}
    prompts, images = [edit.prompt for edit in batch], [edit.image for edit in batch]
    return pipe(prompt=prompts, image=images, strength=how["strength"], generator=generators, **optional).images


def check_one_size(images: list[Image]) -> None:
    """Raises ValueError for pictures that a grid cannot take."""
    if len(sizes := {image.size for image in images}) > 1:
        raise ValueError(f"--grid: the results have {len(sizes)} sizes; give --size, or leave --grid out")


def _sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
