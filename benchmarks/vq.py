"""Quantise and update the codebook in training: ours beside vector-quantize-pytorch, 8192 vectors of 64 dimensions.

    pip install vector-quantize-pytorch
    python benchmarks/vq.py [--threads 1] [--repeats 15]

Both are timed in one process in turns, as processor time, medians; `product` is the matrix product alone, which nobody can do without.
The last column is the largest tensor that ours makes.
"""

import argparse
import statistics
import time
from functools import partial

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gen_pipelines.models.layers.codebook import VectorQuantizer

N, D = 8192, 64


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that an operation returned, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for one in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(one, torch.Tensor):
                self.bytes = max(self.bytes, one.numel() * one.element_size())
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    try:
        from vector_quantize_pytorch import VectorQuantize
    except ImportError:
        VectorQuantize = None
        print("vector-quantize-pytorch is not installed: ours alone")
    print(f"| K | product (ms) | ours (ms) | vector-quantize-pytorch (ms) | times faster | largest tensor (MB) |\n{'|---' * 6}|")
    for size in (512, 8192):
        z = torch.randn(8, N // 8, D)
        ours = VectorQuantizer(size, D).train()
        ours.initialize(z)
        flat, weight = z.reshape(-1, D), torch.randn(D, size)

        def step(ours: VectorQuantizer = ours, z: torch.Tensor = z) -> None:
            ours(z.requires_grad_())
            ours.after_update()

        runs = {"product": partial(torch.matmul, flat, weight), "ours": step}
        if VectorQuantize is not None:
            theirs = VectorQuantize(dim=D, codebook_size=size, decay=0.99).train()
            runs["theirs"] = partial(theirs, z.requires_grad_())
        spent = {name: [] for name in runs}
        for repeat in range(args.repeats + 2):
            for name, run in runs.items():
                begun = time.process_time()
                run()
                if repeat >= 2:
                    spent[name].append(1e3 * (time.process_time() - begun))
        median = {name: statistics.median(times) for name, times in spent.items()}
        with Largest() as largest:
            step()
        their_time, ratio = (f"{median['theirs']:.1f}", f"{median['theirs'] / median['ours']:.1f}") if "theirs" in median else ("-", "-")
        print(f"| {size} | {median['product']:.1f} | {median['ours']:.1f} | {their_time} | {ratio} | {largest.bytes / 1e6:.1f} |")


if __name__ == "__main__":
    main()
