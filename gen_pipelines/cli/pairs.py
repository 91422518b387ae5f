"""`gen-pipelines pairs MODEL --out DIR`: draw pairs of noise and picture, the data of reflow."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from gen_pipelines.cli.main import Parser


def build_parser() -> Parser:
    parser = Parser(
        prog="gen-pipelines pairs",
        description="Draw pairs of noise and what a model makes of it, as a data set that the task reflow trains on. A run that was "
        "stopped goes on where it was when the command is given again; --num may grow.",
        epilog="examples:\n"
        "  gen-pipelines pairs runs/mnist-flow --out runs/mnist-flow-pairs --num 20000 --steps 50\n"
        "  gen-pipelines train configs/mnist/reflow.yaml --output-dir runs/mnist-reflow data.name=runs/mnist-flow-pairs\n"
        "  torchrun --nproc_per_node 2 -m gen_pipelines pairs runs/mnist-flow --out runs/mnist-flow-pairs --num 20000",
    )
    parser.add_argument("model", metavar="MODEL", help="bundled:NAME, a folder, or an id on the Hub, of a DiffusionImagePipeline")
    parser.add_argument("--out", metavar="DIR", required=True, help="the folder of the data set")
    # the long form is for torchrun, which takes --num for an abbreviation of an option of its own
    parser.add_argument("--num", "--num-pairs", metavar="N", type=int, default=10_000, help="pairs in all (default 10000)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="pair i is drawn with seed + i (default 0)")
    parser.add_argument("--scheduler", metavar="NAME[:KEY=VALUE]", help="the sampler (default: the model's); a wrong name lists all")
    parser.add_argument("--steps", metavar="N", type=int, dest="num_inference_steps", help="sampling steps (default: the model's)")
    parser.add_argument("--guidance", metavar="S", type=float, dest="guidance_scale", help="guidance scale (default: the model's)")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a model on the Hub")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="in which samples are stored")
    parser.add_argument("--batch-size", metavar="N", type=int, default=64, help="pairs drawn at once (default 64)")
    parser.add_argument("--shard-size", metavar="N", type=int, default=4096, help="pairs in a file (default 4096)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps ... (default: an accelerator if there is one)")
    return parser


def run(args: argparse.Namespace) -> int:
    """Check, load, draw this process's shards, print the folder."""
    if args.num_inference_steps is not None and args.num_inference_steps < 1:
        raise ValueError(f"--steps {args.num_inference_steps}: at least 1 step is needed")
    if args.num < 1 or args.batch_size < 1 or args.shard_size < 1:
        raise ValueError("--num, --batch-size and --shard-size: each at least 1")
    from gen_pipelines.cli.generate import load, pin
    from gen_pipelines.cli.train import logs_on_stderr
    from gen_pipelines.schedulers import parse_scheduler
    from gen_pipelines.training.pairs import draw_pairs

    if args.scheduler is not None:
        parse_scheduler(args.scheduler, "--scheduler")
    known = pin(args.model, args.revision)
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    settings = {"model": args.model, "revision": known["revision"], "scheduler": args.scheduler, "dtype": "float32"}
    pipe = load(settings, args.device, show_progress=False, promptless=True)
    name = args.model if not Path(args.model).exists() else Path(args.model).resolve().name
    with logs_on_stderr():
        draw_pairs(
            pipe,
            args.out,
            args.num,
            args.seed,
            args.num_inference_steps,
            args.guidance_scale,
            args.batch_size,
            args.shard_size,
            args.dtype,
            about={"model": name, "model_revision": known["model_revision"]},
            rank=rank,
            ranks=ranks,
        )
    if rank == 0:
        print(args.out)
    return 0
