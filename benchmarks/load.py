"""What loading a pipeline costs: its peak of memory, in units of its weights, and its time, beside diffusers on the same folder.

    python benchmarks/load.py [--folder PIPELINE] [--runs 3]

Each load runs in a process of its own, after the imports. The peak is that of the resident set (VmHWM, reset before the load; Linux), so
pages of the weight file that are mapped count as well as copies. Without `--folder` a Stable Diffusion of about 100 million parameters with
random weights is made, in float32, in float16 and in shards. The bound is 1.2 times the weights as they are in memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

BOUND = 1.2

CHILD = """
import gc, json, re, sys, time
kind, folder, dtype = sys.argv[1:]
import torch, transformers, diffusers, accelerate
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer
import gen_pipelines
from gen_pipelines import AutoPipeline, LatentTextToImagePipeline
diffusers.utils.logging.set_verbosity_error(); transformers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar(); transformers.utils.logging.disable_progress_bar()
memory = lambda key: int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
gc.collect()
open("/proc/self/clear_refs", "w").write("5")  # forget the peak of the imports
before, start = memory("VmRSS"), time.perf_counter()
if kind == "ours":
    pipe = AutoPipeline.from_pretrained(folder, dtype=dtype)
else:
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=getattr(torch, dtype), use_safetensors=True)
seconds = time.perf_counter() - start
tensors = [t for c in pipe.components.values() if isinstance(c, torch.nn.Module) for t in [*c.parameters(), *c.buffers()]]
for tensor in tensors:
    tensor.view(-1)[:: 256].sum()  # a mapped file is in memory once its pages are touched
peak, weights = memory("VmHWM") - before, sum(t.numel() * t.element_size() for t in tensors)
print(json.dumps({"seconds": seconds, "peak": peak, "weights": weights}))
"""


def make_folders(root: Path) -> dict[str, tuple[Path, str]]:
    """name -> (folder, dtype to load in)."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    with torch.device("meta"):
        unet = UNet2DConditionModel(block_out_channels=(96, 192, 384, 384), cross_attention_dim=512, norm_num_groups=32, sample_size=64)
        vae = AutoencoderKL(
            block_out_channels=(64, 128, 256), down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=2,
        )  # fmt: skip
    text = CLIPTextModel(CLIPTextConfig(vocab_size=514, hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8,
                                        bos_token_id=512, eos_token_id=513))  # fmt: skip
    for network in (unet, vae):
        network.to_empty(device="cpu")
        for tensor in [*network.parameters(), *network.buffers()]:
            torch.nn.init.uniform_(tensor, -0.05, 0.05)
    letters = [chr(byte) for byte in [*range(33, 127), *range(161, 173), *range(174, 256)]] + [chr(256 + i) for i in range(68)]
    words = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    pipe = StableDiffusionPipeline(
        vae=vae, unet=unet, text_encoder=text, tokenizer=CLIPTokenizer({w: i for i, w in enumerate(words)}, merges=[], model_max_length=77),
        scheduler=DDIMScheduler(clip_sample=False), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(root / "float32")
    pipe.save_pretrained(root / "shards", max_shard_size="100MB")
    pipe.to(torch.float16).save_pretrained(root / "float16")
    return {
        "float32 as float32": (root / "float32", "float32"),
        "shards of float32 as float32": (root / "shards", "float32"),
        "float16 as float16": (root / "float16", "float16"),
        "float16 as float32": (root / "float16", "float32"),
    }


def measure(kind: str, folder: Path, dtype: str, runs: int) -> dict[str, float]:
    """The median time and the largest peak of several processes."""
    results = []
    for _ in range(runs):
        done = subprocess.run([sys.executable, "-c", CHILD, kind, str(folder), dtype], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        results.append(json.loads(done.stdout.splitlines()[-1]))
    peak = max(result["peak"] / result["weights"] for result in results)
    return {"seconds": statistics.median(r["seconds"] for r in results), "peak": peak, "megabytes": results[0]["weights"] / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="a pipeline that diffusers loads too")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as side:
        folders = {args.folder.name: (args.folder, args.dtype)} if args.folder else make_folders(Path(side))
        print(f"| folder | weights, MB | peak / weights: ours (bound {BOUND}) | diffusers | seconds: ours | diffusers |")
        print("|---|---|---|---|---|---|")
        failed = []
        for name, (folder, dtype) in folders.items():
            ours, theirs = (measure(kind, folder, dtype, args.runs) for kind in ("ours", "theirs"))
            print(f"| {name} | {ours['megabytes']:.0f} | {ours['peak']:.2f} | {theirs['peak']:.2f} | {ours['seconds']:.2f} "
                  f"| {theirs['seconds']:.2f} |", flush=True)  # fmt: skip
            failed += [name] if ours["peak"] > BOUND else []
    if failed:
        raise SystemExit(f"more than {BOUND} times the weights: {', '.join(failed)}")


if __name__ == "__main__":
    main()
