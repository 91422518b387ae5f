"""Glow beside the flow libraries, on a CPU: a training step, a likelihood, samples, and the memory of training.

    pip install --no-deps normflows nflows FrEIA            # only this file needs them
    python benchmarks/flows.py [--steps 16] [--hidden 128] [--repeats 7] [--threads 2] [--memory]

3 x 32 x 32, 3 levels, batch 32. Every library's Glow as it builds it: actnorm, 1 x 1 convolution (LU where it has it), affine coupling
with a 3-1-3 convolutional network of the same width. nflows ships no Glow, it is put together from its parts; FrEIA's AllInOneBlock has a
fixed soft permutation in place of a learned convolution. "networks" are the coupling networks alone, forward, backward and Adam: what no
flow can go below. The process's CPU time with one thread, wall time with more; interleaved, medians; only ratios mean anything. `--memory`
measures the growth of the process's peak memory by one forward and backward pass, each in a process of its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

SIZE, CHANNELS, LEVELS = 32, 3, 3


def convolutions(inputs: int, outputs: int, hidden: int) -> nn.Sequential:
    """The coupling network: 3 x 3, 1 x 1, 3 x 3, the last from zero."""
    last = nn.Conv2d(hidden, outputs, 3, padding=1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(
        nn.Conv2d(inputs, hidden, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(hidden, hidden, 1), nn.ReLU(inplace=True), last
    )


def widths() -> list[tuple[int, int]]:
    """(channels, side) at each level."""
    return [(CHANNELS * 2 ** (level + 2), SIZE >> (level + 1)) for level in range(LEVELS)]


class Networks(nn.Module):
    """The coupling networks of all steps and nothing else."""

    def __init__(self, steps: int, hidden: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.ModuleList(convolutions(c // 2, c, hidden) for _ in range(steps)) for c, _ in widths())

    def loss(self, x: Tensor) -> Tensor:
        total = 0.0
        for number, level in enumerate(self.levels):
            x = nn.functional.pixel_unshuffle(x, 2)
            for network in level:
                total = total + network(x.chunk(2, 1)[0]).sum()
            if number + 1 < len(self.levels):
                x = x.chunk(2, 1)[0]
        return total

    def draw(self, count: int) -> None:
        self.loss(torch.zeros(count, CHANNELS, SIZE, SIZE))


class Ours(nn.Module):
    def __init__(self, steps: int, hidden: int, reversible: bool = False) -> None:
        super().__init__()
        from gen_pipelines import GlowModel

        self.flow = GlowModel(num_levels=LEVELS, num_steps=steps, hidden_channels=hidden, reversible=reversible)
        self.to(memory_format=torch.channels_last)

    def loss(self, x: Tensor) -> Tensor:
        return -self.flow.log_prob(x).mean()

    def draw(self, count: int) -> None:
        self.flow.sample(count)


class NormFlows(nn.Module):
    def __init__(self, steps: int, hidden: int) -> None:
        super().__init__()
        import normflows as nf

        bases, flows, merges = [], [], []
        for number, (channels, side) in enumerate(reversed(widths())):
            flows.append([*(nf.flows.GlowBlock(channels, hidden) for _ in range(steps)), nf.flows.Squeeze()])
            merges += [nf.flows.Merge()] if number else []
            bases.append(nf.distributions.DiagGaussian((channels // 2 if number else channels, side, side)))
        self.flow = nf.MultiscaleFlow(bases, flows, merges, class_cond=False)

    def loss(self, x: Tensor) -> Tensor:
        return self.flow.forward_kld(x)

    def draw(self, count: int) -> None:
        self.flow.sample(count)


class NFlows(nn.Module):
    def __init__(self, steps: int, hidden: int) -> None:
        super().__init__()
        from nflows import distributions, flows, transforms

        class Subnet(nn.Module):
            def __init__(self, inputs: int, outputs: int) -> None:
                super().__init__()
                self.network = convolutions(inputs, outputs, hidden)

            def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
                return self.network(x)

        scales = transforms.MultiscaleCompositeTransform(num_transforms=LEVELS)
        for channels, side in widths():
            mask = (torch.arange(channels) >= channels // 2).int()
            parts = [transforms.SqueezeTransform()]
            for _ in range(steps):
                coupling = transforms.AffineCouplingTransform(mask=mask, transform_net_create_fn=Subnet)
                parts += [transforms.ActNorm(channels), transforms.OneByOneConvolution(channels), coupling]
            scales.add_transform(transforms.CompositeTransform(parts), (channels, side, side))
        self.flow = flows.Flow(scales, distributions.StandardNormal([CHANNELS * SIZE * SIZE]))

    def loss(self, x: Tensor) -> Tensor:
        return -self.flow.log_prob(x).mean()

    def draw(self, count: int) -> None:
        self.flow.sample(count)


class FrEIA(nn.Module):
    def __init__(self, steps: int, hidden: int) -> None:
        super().__init__()
        from FrEIA.modules import AllInOneBlock

        network = lambda inputs, outputs: convolutions(inputs, outputs, hidden)
        block = lambda c, side: AllInOneBlock([(c, side, side)], subnet_constructor=network, permute_soft=True)
        self.levels = nn.ModuleList(nn.ModuleList(block(c, side) for _ in range(steps)) for c, side in widths())

    def loss(self, x: Tensor) -> Tensor:
        total = 0.0
        for number, level in enumerate(self.levels):
            x = nn.functional.pixel_unshuffle(x, 2)
            for block in level:
                (x,), log_det = block([x])
                total = total + log_det
            if number + 1 < len(self.levels):
                x, z = x.chunk(2, 1)
                total = total - 0.5 * z.square().flatten(1).sum(1)
        return -(total - 0.5 * x.square().flatten(1).sum(1)).mean()

    def draw(self, count: int) -> None:
        channels, side = widths()[-1]
        x = torch.randn(count, channels, side, side)
        for number, level in reversed(list(enumerate(self.levels))):
            if number + 1 < len(self.levels):
                x = torch.cat([x, torch.randn_like(x)], 1)
            for block in reversed(level):
                (x,), _ = block([x], rev=True)
            x = nn.functional.pixel_shuffle(x, 2)


BUILDERS: dict[str, tuple[str | None, Callable[[int, int], nn.Module]]] = {
    "networks": (None, Networks),
    "ours": (None, Ours),
    "ours, reversible": (None, lambda steps, hidden: Ours(steps, hidden, reversible=True)),
    "nflows": ("nflows", NFlows),
    "normflows": ("normflows", NormFlows),
    "FrEIA": ("FrEIA", FrEIA),
}


def available() -> dict[str, Callable[[int, int], nn.Module]]:
    found = {}
    for name, (package, builder) in BUILDERS.items():
        if package is None or importlib.util.find_spec(package):
            found[name] = builder
        else:
            print(f"{name}: not installed, left out")
    return found


def times(tasks: dict[str, Callable[[], None]], repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds of each task; they take turns, so that a busy moment hits all of them."""
    spent: dict[str, list[float]] = {name: [] for name in tasks}
    for repeat in range(repeats + 1):
        for name, task in tasks.items():
            begun = clock()
            task()
            if repeat:  # the first is warm-up
                spent[name].append(clock() - begun)
    return {name: statistics.median(values) for name, values in spent.items()}


def speed(steps: int, hidden: int, repeats: int, threads: int) -> None:
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    torch.manual_seed(0)
    models = {name: builder(steps, hidden) for name, builder in available().items()}
    x = torch.rand(32, CHANNELS, SIZE, SIZE) * 2 - 1
    optimizers = {name: torch.optim.Adam(model.parameters(), 1e-5, fused=True) for name, model in models.items()}

    def train(name: str) -> None:
        optimizers[name].zero_grad()
        models[name].loss(x).backward()
        optimizers[name].step()

    @torch.no_grad()
    def likelihood(name: str) -> None:
        models[name].loss(x)

    @torch.no_grad()
    def draw(name: str, count: int) -> None:
        models[name].draw(count)

    for name in models:
        train(name)  # actnorms are set by their first batch in other libraries
    rows: dict[str, dict[str, float]] = {}
    for title, task in (
        ("training step", train),
        ("likelihood of 32", likelihood),
        ("32 pictures", lambda name: draw(name, 32)),
        ("1 picture", lambda name: draw(name, 1)),
    ):
        for model in models.values():
            model.train(title == "training step")
        several = repeats * (4 if title == "1 picture" else 1)
        names = [name for name in models if title == "training step" or "reversible" not in name]
        rows[title] = times({name: (lambda n=name, t=task: t(n)) for name in names}, several, clock)
    print(f"3 x 32 x 32, L {LEVELS}, K {steps}, hidden {hidden}, {threads} thread(s); ms, and ours as a multiple")
    for title, row in rows.items():
        print(f"\n{title}")
        for name, seconds in row.items():
            print(f"  {name:18s} {1e3 * seconds:9.1f} ms   ours / it {row['ours'] / seconds:5.2f}")
    print(f"\nreversible / plain training step: {rows['training step']['ours, reversible'] / rows['training step']['ours']:.2f}")


def one_pass(name: str, steps: int, hidden: int) -> None:
    """In a process of its own: how much the peak memory grows by one forward and backward pass, in MB."""
    from gen_pipelines.evaluation.evaluate import peak_memory

    torch.set_num_threads(1)
    model = BUILDERS[name][1](steps, hidden)
    x = torch.rand(32, CHANNELS, SIZE, SIZE) * 2 - 1
    model.loss(x[:2]).backward()  # buffers of the libraries, gradients
    before = peak_memory(x.device)
    model.loss(x).backward()
    print(peak_memory(x.device) - before)


def memory(hidden: int) -> None:
    peaks: dict[tuple[str, int], float] = {}
    print("\npeak memory of one forward and backward pass, MB (beyond weights and gradients)")
    for name in available():
        if name == "networks":
            continue
        for steps in (8, 32):
            command = [sys.executable, __file__, "--one-pass", name, "--steps", str(steps), "--hidden", str(hidden)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peaks[name, steps] = float(done.stdout.strip().splitlines()[-1])
        print(f"  {name:18s} K 8 {peaks[name, 8]:7.0f}   K 32 {peaks[name, 32]:7.0f}   growth {peaks[name, 32] / peaks[name, 8]:5.2f}")
    if ("FrEIA", 32) in peaks:
        print(f"reversible / FrEIA at K 32: {peaks['ours, reversible', 32] / peaks['FrEIA', 32]:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--one-pass", choices=list(BUILDERS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one_pass:
        one_pass(arguments.one_pass, arguments.steps, arguments.hidden)
        return
    speed(arguments.steps, arguments.hidden, arguments.repeats, arguments.threads)
    if arguments.memory:
        memory(arguments.hidden)


if __name__ == "__main__":
    main()
