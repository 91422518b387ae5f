"""A minimax GAN finds modes and drops them again, WGAN-GP keeps them: the ring of eight and the grid of twenty-five Gaussians.

    python examples/toy_gan.py --out toy_gan.png          (six minutes on one CPU core, by estimate)

Both games are played by the same networks for as many generator updates. The figure shows what each generator draws at the end, how many
modes it had on the way, and the critic's estimate of the Wasserstein distance beside the true one (by optimal assignment of 512 points).

The game itself takes a weak penalty (0.1), so that the critic can be steep between modes that lie close together. Its value is then no
distance: for the curve a copy of the critic is trained on, against the generator as it stands, with a weight of 10.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gen_pipelines.training.objectives.adversarial import LOSSES, gradient_penalty


def ring(count: int, generator: torch.Generator) -> Tensor:
    """Eight Gaussians of deviation 0.02 on a circle of radius 2, (count, 2)."""
    angle = torch.randint(8, (count,), generator=generator) * (math.pi / 4)
    return 2 * torch.stack([angle.cos(), angle.sin()], 1) + 0.02 * torch.randn(count, 2, generator=generator)


def grid(count: int, generator: torch.Generator) -> Tensor:
    """Twenty-five Gaussians of deviation 0.05 on a grid from -2 to 2, (count, 2)."""
    place = torch.randint(5, (count, 2), generator=generator).float() - 2
    return place + 0.05 * torch.randn(count, 2, generator=generator)


DATA = {"ring of 8": (ring, 0.02), "grid of 25": (grid, 0.05)}  # name: (sampler, deviation of a mode)


def modes(name: str) -> Tensor:
    """The centres, (K, 2)."""
    if name.startswith("ring"):
        angle = torch.arange(8) * (math.pi / 4)
        return 2 * torch.stack([angle.cos(), angle.sin()], 1)
    return torch.cartesian_prod(torch.arange(5.0) - 2, torch.arange(5.0) - 2)


def found(points: Tensor, name: str) -> tuple[int, float]:
    """How many modes have at least a fifth of their share of the points within five deviations, and the share of points that lie so."""
    centres, deviation = modes(name), DATA[name][1]
    distance, nearest = torch.cdist(points, centres).min(1)
    near = distance < 5 * deviation
    counts = torch.bincount(nearest[near], minlength=len(centres))
    return int((counts >= len(points) / len(centres) / 5).sum()), near.float().mean().item()


def perceptron(inputs: int, outputs: int, width: int = 128) -> nn.Module:
    """Three hidden layers."""
    hidden = [layer for a in (inputs, width, width) for layer in (nn.Linear(a, width), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, outputs))


def distance(a: Tensor, b: Tensor) -> float:
    """The Wasserstein-1 distance of two samples of one size, by optimal assignment."""
    from scipy.optimize import linear_sum_assignment

    cost = torch.cdist(a, b)
    return cost[linear_sum_assignment(cost.numpy())].mean().item()


def improve(
    critic: nn.Module, optimizer: torch.optim.Optimizer, real: Tensor, fake: Tensor, weight: float, random: torch.Generator
) -> None:
    """One update of a Wasserstein critic with gradient penalty, on points (B, 2)."""
    judge = lambda x: critic(x).squeeze(1)
    score = LOSSES["wasserstein"].discriminator(judge(real), judge(fake)).mean()
    total = score + weight * gradient_penalty(judge, real, fake, torch.rand(len(real), generator=random)).mean()
    optimizer.zero_grad()
    total.backward()
    optimizer.step()


def estimate(
    critic: nn.Module, draw: Callable[[int], Tensor], sample: Callable[[int, torch.Generator], Tensor], updates: int = 150
) -> float:
    """The Wasserstein distance as a copy of the critic sees it after some more updates with a penalty of weight 10."""
    random = torch.Generator().manual_seed(0)
    critic = copy.deepcopy(critic)
    optimizer = torch.optim.Adam(critic.parameters(), 1e-3, (0.5, 0.9))
    for _ in range(updates):
        improve(critic, optimizer, sample(256, random), draw(256), 10.0, random)
    with torch.no_grad():
        return (critic(sample(4096, random)).mean() - critic(draw(4096)).mean()).item()


class Game(NamedTuple):
    """What a game left behind.

    Attributes:
        points: drawn at its end, (2048, 2).
        modes: (updates, modes that the generator had then), every 50 updates.
        distances: (updates, the critic's estimate, the true distance), for WGAN-GP.
    """

    points: Tensor
    modes: list[tuple[int, int]]
    distances: list[tuple[int, float, float]]


def play(name: str, loss: str, steps: int, seed: int = 0) -> Game:
    """One game of a generator and a critic, with learning rates that fall to nothing."""
    from tqdm.auto import trange

    torch.manual_seed(seed)
    generator, critic = perceptron(2, 2), perceptron(2, 1)
    random, looking = (torch.Generator().manual_seed(seed + i) for i in (1, 2))
    wasserstein = loss == "wasserstein"
    players = [torch.optim.Adam(network.parameters(), 1e-3, (0.5, 0.9) if wasserstein else (0.5, 0.999)) for network in (generator, critic)]
    fade = [torch.optim.lr_scheduler.LambdaLR(player, lambda step: 1 - step / steps) for player in players]
    sample, game = DATA[name][0], LOSSES[loss]
    had, curve = [], []
    looks = {0, *(round(20 * (steps / 20) ** (i / 9)) - 1 for i in range(10))}

    def draw(count: int, source: torch.Generator = random) -> Tensor:
        return generator(torch.randn(count, 2, generator=source))

    for step in trange(steps, desc=f"{name}, {loss}"):
        for _ in range(5 if wasserstein else 1):
            real, fake = sample(256, random), draw(256).detach()
            if wasserstein:
                improve(critic, players[1], real, fake, 0.1, random)
                continue
            players[1].zero_grad()
            game.discriminator(critic(real).squeeze(1), critic(fake).squeeze(1)).mean().backward()
            players[1].step()
        players[0].zero_grad()
        game.generator(critic(draw(256)).squeeze(1)).mean().backward()
        players[0].step()
        for schedule in fade:
            schedule.step()
        if wasserstein and step in looks:
            seen = lambda count: draw(count, looking).detach()
            curve.append((step + 1, estimate(critic, seen, sample), distance(sample(512, looking), seen(512))))
        if (step + 1) % 50 == 0:
            had.append((step + 1, found(draw(2048, looking).detach(), name)[0]))
    return Game(draw(2048, looking).detach(), had, curve)


def main() -> None:
    """Play four games and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="toy_gan.png")
    parser.add_argument("--steps", type=int, default=3000, help="generator updates on the grid; half as many on the ring")
    arguments = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(16, 8))
    for row, name in zip(axes, DATA, strict=True):
        for axis, loss in zip(row, ("minimax", "wasserstein"), strict=False):
            game = play(name, loss, arguments.steps // (2 if name.startswith("ring") else 1))
            count, share = found(game.points, name)
            lost = sum(max(before - after, 0) for (_, before), (_, after) in pairwise(game.modes))
            print(f"{name}, {loss}: {count} of {len(modes(name))} modes, {share:.0%} of the points near one, modes lost on the way: {lost}")
            label = "WGAN-GP" if loss == "wasserstein" else loss
            axis.scatter(*game.points.T, s=2, alpha=0.4)
            axis.scatter(*modes(name).T, s=30, marker="+", color="black")
            axis.set(title=f"{label}: {count} of {len(modes(name))} modes", xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
            row[2].plot(*zip(*game.modes, strict=True), label=label)
        for step, guess, true in game.distances:
            print(f"    after {step} updates: the critic's estimate {guess:.3f}, the distance {true:.3f}")
        steps, estimates, true = zip(*game.distances, strict=True)
        row[2].set(title=f"{name}: modes on the way", xlabel="generator updates")
        row[3].loglog(steps, estimates, "o-", label="critic's estimate")
        row[3].loglog(steps, true, "s-", label="true distance")
        row[3].set(title=f"{name}: Wasserstein distance", xlabel="generator updates")
        row[2].legend()
        row[3].legend()
    figure.tight_layout()
    figure.savefig(arguments.out, dpi=70)
    print(arguments.out)


if __name__ == "__main__":
    main()
