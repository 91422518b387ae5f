"""What a training step costs here beside a bare torch loop, and beside diffusers' own.

    python benchmarks/training.py [--threads 2] [--steps 6] [--rounds 5] [--batch 32] [--only unet|dit]

Pictures are 1 x 32 x 32 and lie in memory. "bare" is the least that trains the network: draw times and noise, forward, backward, fused
AdamW. "diffusers" is the step of its script for unconditional training: its DDPMScheduler's `add_noise`, forward, loss, backward,
clipping, AdamW, schedule, EMAModel. "ours, plain" is the trainer without clipping and averages, as the bare loop; "ours" has
what a recipe has: clipping, schedule, an average, checks of the loss, a generator per sample. The DiT is trained in float32 by
diffusers' step, and with bf16 autocast and plain matrix products for attention by ours.

One process, interleaved rounds of `--steps` steps, the median of the rounds; only ratios mean anything. With one thread the process's
processor time, with more wall time: then nothing else may run.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from gen_pipelines import DDPMScheduler
from gen_pipelines.models.calling import predict
from gen_pipelines.training.config import DataConfig, EMAConfig, LoopConfig, OptimizerConfig, Recipe
from gen_pipelines.training.objectives.base import Phase
from gen_pipelines.training.objectives.denoising import DenoisingObjective
from gen_pipelines.training.trainer import Trainer

SIZE, ROWS = 32, 4096


class Pictures(torch.utils.data.Dataset):
    """Noise as pictures, in memory."""

    def __init__(self) -> None:
        self.pictures = torch.randint(0, 256, (ROWS, 1, SIZE, SIZE), dtype=torch.uint8)

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any]:
        item, draw = place
        return {"picture": self.pictures[item], "row": item, "draw": draw}


def unet() -> nn.Module:
    """2.6 million parameters."""
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=SIZE, in_channels=1, out_channels=1, block_out_channels=(32, 64, 96), layers_per_block=2,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=32, norm_num_groups=8,
    )  # fmt: skip


def dit() -> nn.Module:
    """4.6 million parameters: 6 layers of width 192, patches of 4."""
    torch.manual_seed(0)
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=3, attention_head_dim=64, in_channels=1, out_channels=1, num_layers=6, sample_size=SIZE, patch_size=4,
        num_embeds_ada_norm=10,
    )  # fmt: skip


def call(network: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    """The output of either network, which a DiT is given the class 0 for."""
    if isinstance(network, diffusers.DiTTransformer2DModel):
        return network(x, timestep=t, class_labels=torch.zeros(len(x), dtype=torch.long)).sample
    return network(x, t).sample


def bare(network: nn.Module, batch: int) -> Callable[[int], float]:
    """The least that trains: `run(steps)` gives the time of one."""
    path = DDPMScheduler().parameterization.path
    alphas, sigmas = (path.alpha(torch.arange(1000.0)).float(), path.sigma(torch.arange(1000.0)).float())
    optimizer, data = torch.optim.AdamW(network.parameters(), 1e-4, fused=True), Pictures()

    def run(steps: int) -> float:
        times = []
        for _ in range(steps):
            begun = CLOCK()
            x_0 = data.pictures[torch.randint(ROWS, (batch,))].float() / 127.5 - 1
            t, eps = torch.randint(1000, (batch,)), torch.randn_like(x_0)
            x_t = alphas[t].view(-1, 1, 1, 1) * x_0 + sigmas[t].view(-1, 1, 1, 1) * eps
            loss = (call(network, x_t, t) - eps).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            times.append(CLOCK() - begun)
        return statistics.median(times)

    return run


def theirs(network: nn.Module, batch: int) -> Callable[[int], float]:
    """The step of diffusers' script for unconditional training."""
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    noise_scheduler, data = diffusers.DDPMScheduler(), Pictures()
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=10, num_training_steps=10_000)
    average = EMAModel(network.parameters(), decay=0.999, use_ema_warmup=True)

    def run(steps: int) -> float:
        times = []
        for _ in range(steps):
            begun = CLOCK()
            x_0 = data.pictures[torch.randint(ROWS, (batch,))].float() / 127.5 - 1
            noise, t = torch.randn_like(x_0), torch.randint(0, 1000, (batch,)).long()
            output = call(network, noise_scheduler.add_noise(x_0, noise, t), t)
            nn.functional.mse_loss(output.float(), noise.float()).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            average.step(network.parameters())
            times.append(CLOCK() - begun)
        return statistics.median(times)

    return run


def ours(network: nn.Module, batch: int, plain: bool = False, **loop: Any) -> Callable[[int], float]:
    """The trainer, timed from update to update."""
    objective = DenoisingObjective(DDPMScheduler().parameterization)
    recipe = Recipe(
        task="diffusion_image",
        data=DataConfig(name="memory", resolution=SIZE, channels=1),
        loop=LoopConfig(steps=1, batch_size=batch, checkpoint_every=0, log_every=0, max_grad_norm=None if plain else 1.0, **loop),
        ema=None if plain else EMAConfig(),
        optimizer=OptimizerConfig(schedule="constant" if plain else "cosine"),
    )

    def losses(networks: dict[str, nn.Module], data: dict[str, Any], phase: str, generator: Any) -> Any:
        model = networks["denoiser"]
        if isinstance(network, diffusers.UNet2DModel):
            return objective(partial(predict, model), data["picture"], generator=generator)
        return objective(lambda x, t, condition: call(model, x, t), data["picture"], generator=generator)

    marks: list[float] = []
    folder = tempfile.TemporaryDirectory()
    trainer = Trainer(
        recipe, {"denoiser": network}, losses, (Phase("denoiser", ("denoiser",)),), Pictures(), folder.name,
        after_update=lambda networks, phase: marks.append(CLOCK()),
    )  # fmt: skip

    def run(steps: int, kept: Any = folder) -> float:  # the folder goes when nobody has it
        marks.clear()
        trainer.loop = replace(trainer.loop, steps=trainer.step + steps + 1)
        trainer.train()
        return statistics.median(later - earlier for earlier, later in zip(marks[:-1], marks[1:], strict=True))

    return run


def compare(title: str, runs: dict[str, Callable[[int], float]], steps: int, rounds: int, batch: int) -> None:
    """Prints each run's images per second, and its time over the first one's."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(2)
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(run(steps))
    print(f"\n{title}, batch {batch}\n| | images per second | time of a step over {next(iter(runs))} |\n|---|---|---|")
    first = next(iter(times.values()))
    for name, own in times.items():
        ratio = statistics.median(a / b for a, b in zip(own, first, strict=True))
        print(f"| {name} | {batch / statistics.median(own):.1f} | {ratio:.3f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--only", choices=("unet", "dit"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    global CLOCK
    CLOCK = time.process_time if args.threads == 1 else time.perf_counter
    if args.only != "dit":
        runs = {"bare": bare(unet(), args.batch), "ours, plain": ours(unet(), args.batch, plain=True)}
        compare("U-Net, 2.6 M parameters", runs, args.steps, args.rounds, args.batch)
        runs = {"diffusers": theirs(unet(), args.batch), "ours": ours(unet(), args.batch)}
        compare("U-Net, 2.6 M parameters", runs, args.steps, args.rounds, args.batch)
    if args.only != "unet":
        for name, precision in {"ours, float32": "no", "ours, bf16": "bf16"}.items():  # one after the other: accelerate has one precision
            mine = ours(dit(), args.batch, mixed_precision=precision, attention="math")
            runs = {"diffusers, float32": theirs(dit(), args.batch), name: mine}
            compare("DiT 6 x 192, 4.6 M parameters", runs, args.steps, args.rounds, args.batch)


CLOCK: Callable[[], float] = time.process_time

if __name__ == "__main__":
    main()
