"""A minimax GAN drops modes that WGAN-GP finds: the ring of eight and the grid of twenty-five Gaussians.

    python examples/toy_gan.py --out toy_gan.png          (some minutes on one CPU core)

Both games are played by the same networks for as many generator updates. The figure shows what each generator draws, and the critic's
estimate of the Wasserstein distance beside the true one (by optimal assignment of 512 points) as WGAN-GP learns.
"""

from __future__ import annotations

import argparse
import math

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


def perceptron(inputs: int, outputs: int, width: int = 192) -> nn.Module:
    """Three hidden layers."""
    hidden = [layer for a in (inputs, width, width) for layer in (nn.Linear(a, width), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, outputs))


def distance(a: Tensor, b: Tensor) -> float:
    """The Wasserstein-1 distance of two samples of one size, by optimal assignment."""
    from scipy.optimize import linear_sum_assignment

    cost = torch.cdist(a, b)
    return cost[linear_sum_assignment(cost.numpy())].mean().item()


def play(name: str, loss: str, steps: int, seed: int = 0) -> tuple[Tensor, list[tuple[int, float, float]]]:
    """2,048 drawn points, and (step, the critic's estimate, the true distance) along the way."""
    from tqdm.auto import trange

    torch.manual_seed(seed)
    generator, critic = perceptron(2, 2), perceptron(2, 1)
    random = torch.Generator().manual_seed(seed + 1)
    wasserstein = loss == "wasserstein"
    rate, betas = (5e-4, (0.5, 0.9)) if wasserstein else (1e-3, (0.5, 0.999))
    players = [torch.optim.Adam(network.parameters(), rate, betas) for network in (generator, critic)]
    sample, game, curve = DATA[name][0], LOSSES[loss], []

    def judge(x: Tensor) -> Tensor:
        return critic(x).squeeze(1)

    for step in trange(steps, desc=f"{name}, {loss}"):
        for _ in range(5 if wasserstein else 1):
            real, fake = sample(256, random), generator(torch.randn(256, 2, generator=random)).detach()
            score = game.discriminator(judge(real), judge(fake)).mean()
            if wasserstein:
                penalty = gradient_penalty(judge, real, fake, torch.rand(256, generator=random)).mean()
            total = score + (0.1 * penalty if wasserstein else 0)  # points lie close together: a weight of 10 would only flatten the critic
            players[1].zero_grad()
            total.backward()
            players[1].step()
        drawn = game.generator(judge(generator(torch.randn(256, 2, generator=random)))).mean()
        players[0].zero_grad()
        drawn.backward()
        players[0].step()
        if wasserstein and step % max(steps // 30, 1) == 0:
            with torch.no_grad():
                real, fake = sample(512, random), generator(torch.randn(512, 2, generator=random))
                curve.append((step, -score.item(), distance(real, fake)))
    with torch.no_grad():
        return generator(torch.randn(2048, 2, generator=random)), curve


def main() -> None:
    """Play four games and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="toy_gan.png")
    parser.add_argument("--steps", type=int, default=6000)
    arguments = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12, 8))
    for row, name in zip(axes, DATA, strict=True):
        for axis, loss in zip(row, ("minimax", "wasserstein"), strict=False):
            points, curve = play(name, loss, arguments.steps)
            count, share = found(points, name)
            print(f"{name}, {loss}: {count} of {len(modes(name))} modes, {share:.0%} of the points near one")
            axis.scatter(*points.T, s=2, alpha=0.4)
            axis.scatter(*modes(name).T, s=30, marker="+", color="black")
            label = "WGAN-GP" if loss == "wasserstein" else loss
            axis.set(title=f"{label}: {count} of {len(modes(name))} modes", xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
        steps, estimates, true = zip(*curve, strict=True)
        row[2].plot(steps, estimates, label="critic's estimate")
        row[2].plot(steps, true, label="true distance")
        row[2].set(title=f"{name}: Wasserstein distance", xlabel="generator updates")
        row[2].set_ylim(bottom=0)
        row[2].legend()
    figure.tight_layout()
    figure.savefig(arguments.out, dpi=90)
    print(arguments.out)


if __name__ == "__main__":
    main()
