"""`gen-pipelines edit` on a GAN: style mixing, walks, projection and principal directions, each as one picture."""

from __future__ import annotations

import argparse
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gen_pipelines.cli import generate, pictures

if TYPE_CHECKING:
    from PIL.Image import Image

MODES = ("style_mix", "walk", "project", "directions")
NAMES = {"style_mix": "mixed.png", "walk": "walk.png", "project": "projected.png", "directions": "directions.png"}
# what belongs to redrawing pictures after a prompt alone: (attribute, what it is when it was not given)
_OTHERS = {
    "prompt": None, "negative_prompt": None, "mask": [], "expand": None, "strength": None, "num": None, "size": None, "resample": None,
    "scheduler": None, "guidance_scale": None,
}  # fmt: skip
_USED = {  # mode: which options it takes beside the model, --class and --truncation
    "style_mix": ("rows", "columns"),
    "walk": ("stops", "grid"),
    "project": ("seed", "num_inference_steps"),
    "directions": ("seed", "num_inference_steps", "layers", "reach"),
}
_WORDS = {"num_inference_steps": "--steps", "negative_prompt": "--negative", "guidance_scale": "--guidance", "label": "--class"}
STEPS = 300  # of a projection


def add_options(parser: Any) -> None:
    """The options of this module, as a group of `edit`'s."""
    styles = parser.add_argument_group("styles of a GAN (--model), each of which gives one picture")
    styles.add_argument(
        "--style-mix", metavar="LAYERS", nargs="?", const="all", choices=("all", "coarse", "middle", "fine"),
        help="a table of seeds by seeds: rows with the coarse, middle or fine styles of columns; all three when no LAYERS are given",
    )  # fmt: skip
    styles.add_argument("--rows", metavar="A-B", type=_span, help="with --style-mix: the seeds of the rows (default 0-3)")
    styles.add_argument("--columns", metavar="A-B", type=_span, help="with --style-mix: the seeds of the columns (default 10-15)")
    styles.add_argument("--walk", metavar="N", type=int, help="N pictures on a closed walk, as an animated PNG; with --grid as a strip")
    styles.add_argument("--stops", metavar="A-B", type=_span, help="with --walk: the seeds that it passes (default 0-3)")
    styles.add_argument(
        "--project", metavar="SPACE", choices=("w", "w+"), help="find the styles of IMAGE: w (one for all layers) or w+ (one for each)"
    )
    styles.add_argument(
        "--directions", metavar="K", type=int, help="K principal directions, a row each, of IMAGE (found by --project), or of --seed"
    )
    styles.add_argument("--layers", choices=("coarse", "middle", "fine"), help="with --directions: the layers that are moved (default all)")
    styles.add_argument("--reach", metavar="X", type=float, help="with --directions: from -X to X deviations, in 7 columns (default 3)")
    styles.add_argument("--class", metavar="C", dest="label", type=int, help="of a model with classes; default: drawn by each seed")
    styles.add_argument("--truncation", metavar="PSI", type=float, help="as in generate")


def _span(text: str) -> list[int]:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if match is None or int(match[2] or match[1]) < int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} are no seeds: write the first and the last, for example 1-4")
    return list(range(int(match[1]), int(match[2] or match[1]) + 1))


def mode(args: argparse.Namespace) -> str | None:
    """Which of the modes was asked for: "directions" may come with "project"; None for an edit after a prompt."""
    asked = [name for name in MODES if getattr(args, name) is not None]
    if asked == ["project", "directions"]:
        asked = ["directions"]
    if len(asked) > 1:
        words = " and ".join("--" + name.replace("_", "-") for name in asked)
        raise ValueError(f"{words}: one at a time (but --project goes with --directions)")
    own = {name for names in _USED.values() for name in names} - {"seed", "num_inference_steps", "grid"} | {"label", "truncation"}
    used = {"label", "truncation", *_USED[asked[0]]} if asked else {"num_inference_steps", "seed", "grid"}
    for name in sorted(own | {"seed", "num_inference_steps", "grid"} | (set(_OTHERS) if asked else set())):
        if name not in used and getattr(args, name) not in (None, False, []):
            word = _WORDS.get(name, "--" + name)
            what = f"with --{asked[0].replace('_', '-')}" if asked else "without --style-mix, --walk, --project or --directions"
            raise ValueError(f"{word}: has no meaning {what}; leave it out")
    return asked[0] if asked else None


def run(args: argparse.Namespace, which: str) -> int:
    """Check what can be checked without the model, load it, draw one picture, write it."""
    if int(os.environ.get("RANK", 0)):
        return 0  # there is one picture to draw
    from gen_pipelines.cli.edit import open_picture

    settings = generate.choose_settings(args, {})
    paths = [*args.images, *args.image]
    if which in ("style_mix", "walk") and paths:
        raise ValueError(f"{paths[0]}: --{which.replace('_', '-')} draws from seeds and takes no picture; leave it out")
    if which == "project" and len(paths) != 1 or which == "directions" and len(paths) > 1:
        raise ValueError(f"--{which}: {len(paths)} pictures; name one")
    if which == "walk" and (args.walk < 2 or len(args.stops or [0, 0]) < 2):
        raise ValueError("--walk: at least 2 pictures and 2 --stops make a walk")
    if args.reach is not None and not math.isfinite(args.reach):
        raise ValueError(f"--reach {args.reach}: must be a finite number of deviations")
    if which == "directions" and args.directions < 1:
        raise ValueError(f"--directions {args.directions}: at least 1")
    picture = open_picture(paths[0]) if paths else None
    path = Path(args.out) if generate.check_target(args.out, 1, True) else Path(args.out) / NAMES[which]
    if picture is not None and path.resolve() == Path(paths[0]).resolve():
        raise ValueError(f"--out {args.out}: {path} is the picture to edit, which is never overwritten; name another file or folder")
    settings |= generate.pin(settings["model"], settings["revision"])
    pipe = load(settings, args.device, which)
    image, how, options = {"style_mix": mix, "walk": walk, "project": project, "directions": directions}[which](pipe, args, picture)
    how |= {"truncation": args.truncation, "class_label": None if args.label is None else str(args.label), "edit": which.replace("_", "-")}
    if paths:
        from gen_pipelines.cli.edit import _sha256

        how |= {"image": paths[0], "image_sha256": _sha256(paths[0])}
    settings |= generate.describe(pipe, settings) | {name: value for name, value in how.items() if value is not None}
    pictures.write_picture(image, path, {"prompt": "", **settings, "height": image.height, "width": image.width}, **options)
    pictures.announce(path)
    return 0


def load(settings: dict[str, Any], device: str | None, which: str) -> Any:
    """The pipeline, which must be one of a GAN, and of a StyleGAN for all but a walk."""
    from gen_pipelines import AutoPipeline, GANPipeline, StyleGANPipeline
    from gen_pipelines.cli.repository import Repository

    needed = GANPipeline if which == "walk" else StyleGANPipeline
    index = Repository.open(settings["model"], settings["revision"]).index()
    if AutoPipeline.takes_no_prompt(index):
        pipe = generate.load(settings, device, show_progress=False, promptless=True)
        if isinstance(pipe, needed):
            return pipe
    name = str(index.get("_class_name") or "folder without model_index.json")
    raise ValueError(f"--{which.replace('_', '-')}: --model {settings['model']} is a {name}; it needs a {needed.__name__}")


def seeded(seeds: list[int]) -> list[Any]:
    """A generator for each seed, on the CPU: the same seed gives the same noise on every device."""
    import torch

    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def styles_of(pipe: Any, args: argparse.Namespace, seeds: list[int]) -> Any:
    """(B, num_ws, w_dim): the styles of the pictures that `generate` draws with these seeds."""
    labels = None if args.label is None else [args.label] * len(seeds)
    return pipe(len(seeds), labels, generator=seeded(seeds), truncation=args.truncation, output_type="latent").images


Drawn = tuple["Image", dict[str, Any], dict[str, Any]]


def mix(pipe: Any, args: argparse.Namespace, picture: Image | None) -> Drawn:
    """The table of mixtures."""
    rows, columns = args.rows or list(range(4)), args.columns or list(range(10, 16))
    table = pipe.mix(styles_of(pipe, args, rows), styles_of(pipe, args, columns), args.style_mix)
    return table, {"rows": rows, "columns": columns, "layers": args.style_mix}, {}


def walk(pipe: Any, args: argparse.Namespace, picture: Image | None) -> Drawn:
    """The frames, as an animation or as a strip."""
    from gen_pipelines.pipelines.sequences import animation_options, strip

    stops = args.stops or list(range(4))
    frames = pipe.walk(args.walk, len(stops), seeded(stops), args.label, args.truncation)
    how = {"stops": stops, "frames": len(frames)}
    return (strip(frames), how, {}) if args.grid else (frames[0], how, animation_options(frames, 20.0))


def found_styles(pipe: Any, args: argparse.Namespace, picture: Image) -> tuple[Any, Image, dict[str, Any]]:
    """The styles of a picture, the picture at the model's size, and how they were found."""
    channels, (height, width) = pipe.generator.config.out_channels, pipe.picture_size
    if picture.mode in ("RGBA", "LA", "PA", "P"):
        from PIL import Image as Pillow

        laid = picture.convert("RGBA")
        picture = Pillow.alpha_composite(Pillow.new("RGBA", laid.size, "white"), laid)
    picture = picture.convert("L" if channels == 1 else "RGB")
    picture = picture if picture.size == (width, height) else picture.resize((width, height))
    steps, space = args.num_inference_steps or STEPS, args.project or "w"
    random = seeded([args.seed or 0])[0]
    styles = pipe.project(picture, steps=steps, space=space, generator=random)
    return styles, picture, {"space": space, "num_inference_steps": steps}


def project(pipe: Any, args: argparse.Namespace, picture: Image) -> Drawn:
    """The picture, and beside it what its styles draw."""
    from gen_pipelines.pipelines.sequences import strip

    styles, picture, how = found_styles(pipe, args, picture)
    return strip([picture, pipe(styles=styles).images[0]], gap=2), how, {}


def directions(pipe: Any, args: argparse.Namespace, picture: Image | None) -> Drawn:
    """A row for each direction, a column for each strength."""
    from gen_pipelines.pipelines.sequences import strip

    styles, how = styles_of(pipe, args, [args.seed or 0]), {}
    if picture is not None:
        styles, _, how = found_styles(pipe, args, picture)
    found = pipe.directions(args.directions, samples=max(4096, args.directions + 1), generator=seeded([0])[0])
    strengths = [(3.0 if args.reach is None else args.reach) * i / 3 for i in range(-3, 4)]
    images: list[Image] = []
    for vector, deviation in zip(found.vectors, found.deviations.tolist(), strict=True):
        images += pipe.edit(styles, vector, [strength * deviation for strength in strengths], args.layers)
    how |= {"directions": args.directions, "strengths": strengths} | ({} if args.layers is None else {"layers": args.layers})
    return strip(images, columns=len(strengths), gap=2), how, {}
