"""StyleGAN2's synthesis beside the limit of its convolutions alone, and modulated convolution beside a plain one.

    python benchmarks/stylegan.py [--threads 1] [--repeats 20]

Ratios of medians of interleaved repeats in one run, on the CPU. The limit of a synthesis network runs the same convolutions, transposed
ones included, on activations of the same shapes, and nothing else: no modulation, noise, bias, non-linearity or filter.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_pipelines import StyleGAN2Generator
from gen_pipelines.models.layers.modulated_conv import modulated_conv2d


def compare(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each function; they take turns, so that what disturbs one disturbs all."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 2):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if repeat >= 2:  # the first are for caches and allocators
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def convolution(batch: int, channels: int, size: int, repeats: int) -> None:
    """Forward and backward of one layer."""
    x = torch.randn(batch, channels, size, size, requires_grad=True)
    weight = torch.randn(channels, channels, 3, 3, requires_grad=True)
    style = torch.randn(batch, channels, requires_grad=True)
    grad = torch.randn(batch, channels, size, size)

    def run(forward: Callable[[], Tensor]) -> Callable[[], None]:
        def both() -> None:
            for tensor in (x, weight, style):
                tensor.grad = None
            forward().backward(grad)

        return both

    seconds = compare(
        {"plain": run(lambda: F.conv2d(x, weight, padding=1)), "modulated": run(lambda: modulated_conv2d(x, weight, style))}, repeats
    )
    ratio = seconds["modulated"] / seconds["plain"]
    print(f"modulated convolution, forward and backward, ({batch}, {channels}, {size}, {size}): {ratio:.2f} of a plain one (goal 1.1)")


@torch.no_grad()
def synthesis(size: int, batch: int, repeats: int, goal: float) -> None:
    """A whole picture beside its convolutions."""
    torch.manual_seed(0)
    network = StyleGAN2Generator(size, 3, 512, 512, channel_base=16384, channel_max=256).eval()
    ws = torch.randn(batch, network.num_ws, 512)
    work: list[tuple[Tensor, Tensor, int]] = []
    for resolution in network.synthesis.sizes:
        block = getattr(network.synthesis, f"b{resolution}")
        for name in ("conv0", "conv1", "torgb"):
            if (layer := getattr(block, name, None)) is not None:
                up = getattr(layer, "up", 1)
                x = torch.randn(batch, layer.weight.shape[1], resolution // up, resolution // up)
                x = x.contiguous(memory_format=torch.channels_last)  # the faster layout, so that this is a limit
                work.append((x, layer.weight.detach(), up))

    def limit() -> None:
        for x, weight, up in work:
            if up == 1:
                F.conv2d(x, weight, padding=weight.shape[-1] // 2)
            else:
                F.conv_transpose2d(x, weight.transpose(0, 1), stride=up)

    seconds = compare({"limit": limit, "synthesis": lambda: network.synthesize(ws, "const")}, repeats)
    ratio = seconds["synthesis"] / seconds["limit"]
    print(f"synthesis of {batch} at {size} x {size}: {1000 * seconds['synthesis']:.0f} ms, {ratio:.2f} of its convolutions (goal {goal})")


def main() -> None:
    """Print every ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    convolution(16, 256, 16, arguments.repeats)
    convolution(16, 128, 32, arguments.repeats)
    synthesis(32, 8, arguments.repeats, 1.4)
    synthesis(64, 8, arguments.repeats, 1.25)


if __name__ == "__main__":
    main()
