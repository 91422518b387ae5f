"""Adversarial losses and their regularisers, each of them a part that can be combined with the others."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.gans.stylegan3 import StyleGAN3Generator
from ...models.layers.ranks import mean_over_ranks
from ..random import Generators, normal, uniform
from .base import ObjectiveOutput


@dataclass(frozen=True)
class Loss:
    """A game: what the discriminator minimises, (real logits, fake logits) -> (B,), and what the generator does, fake logits -> (B,)."""

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]


# name: Loss. Logits are before any sigmoid, so nothing is ever the logarithm of zero.
LOSSES = {
    # Goodfellow et al. 2014, eq. 1: the generator descends log(1 - D), whose gradient vanishes where the discriminator wins
    "minimax": Loss(lambda real, fake: F.softplus(-real) + F.softplus(fake), lambda fake: -F.softplus(fake)),
    # the same paper, section 3: it ascends log D instead
    "non_saturating": Loss(lambda real, fake: F.softplus(-real) + F.softplus(fake), lambda fake: F.softplus(-fake)),
    # Lim & Ye 2017, https://arxiv.org/abs/1705.02894; Miyato et al. 2018, eq. 16 and 17
    "hinge": Loss(lambda real, fake: F.relu(1 - real) + F.relu(1 + fake), lambda fake: -fake),
    # Mao et al. 2017, eq. 2 with a = 0, b = c = 1, https://arxiv.org/abs/1611.04076
    "least_squares": Loss(lambda real, fake: ((real - 1).square() + fake.square()) / 2, lambda fake: (fake - 1).square() / 2),
    # Arjovsky et al. 2017, eq. 2, https://arxiv.org/abs/1701.07875
    "wasserstein": Loss(lambda real, fake: fake - real, lambda fake: -fake),
}


@contextlib.contextmanager
def twice_differentiable() -> Any:
    """Attention by plain matrix products: the fused kernels have no second derivative; and no autocast, which would round the penalty."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH), torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
        yield


def gradient_penalty(critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
    """(|grad D| - 1)^2 on lines between real and fake pictures, (B,); `mix` (B,) says where on its line each sample is looked at.

    References: Gulrajani et al. 2017, eq. 3, https://arxiv.org/abs/1704.00028
    """
    mix = mix.view(-1, *[1] * (real.ndim - 1))
    x = torch.lerp(fake.detach().float(), real.float(), mix).requires_grad_(True)
    with torch.enable_grad(), twice_differentiable():
        (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return (gradient.flatten(1).square().sum(1) + 1e-12).sqrt().sub(1).square()


def r1_penalty(discriminator: Callable[[Tensor], Tensor], real: Tensor) -> Tensor:
    """|grad D|^2 at real pictures, (B,).

    References: Mescheder et al. 2018, eq. 9, https://arxiv.org/abs/1801.04406
    """
    x = real.detach().float().requires_grad_(True)
    with torch.enable_grad(), twice_differentiable():
        logits = discriminator(x)
        (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    # a bias at the end has no part in the gradient: several processes wait for each other's gradients of every parameter
    return gradient.flatten(1).square().sum(1) + 0 * logits


def path_lengths(pictures: Tensor, styles: Tensor, noise: Tensor) -> Tensor:
    """|J^T y| of the map from styles (B, L, D) to pictures (B, C, H, W) with y = `noise` / sqrt(H W), (B,).

    The square is averaged over layers, so that the length does not grow with their number.

    References: Karras et al. 2020, eq. 4 and appendix B, https://arxiv.org/abs/1912.04958
    """
    weighted = (pictures * noise).sum() / math.sqrt(pictures.shape[2] * pictures.shape[3])
    (gradient,) = torch.autograd.grad(weighted, styles, create_graph=True)
    return gradient.float().square().sum(2).mean(1).sqrt()


def latent_dim(generator: nn.Module) -> int:
    """The dimension of the noise that a generator takes."""
    return generator.config.get("z_dim") or generator.config["latent_dim"]


@dataclass(frozen=True)
class AdversarialObjective:
    """A game between a generator and a discriminator, and what keeps it stable.

    Attributes:
        loss: a name in `LOSSES`.
        gradient_penalty: weight of the penalty of WGAN-GP (10 in the paper).
        r1: gamma of R1, gamma / 2 |grad D(real)|^2.
        path_length: weight of StyleGAN2's path length regulariser (2).
        path_decay: how fast the mean path length is followed.
        path_batch: part of a batch that the path length is measured on.
        style_mixing: probability that a styled generator's picture mixes the styles of two noises from a random layer on
            (Karras et al. 2019, section 3.1).

    Every method draws sample i's numbers from generator i, in a fixed order, so batches and ranks do not change them.
    """

    loss: str = "non_saturating"
    gradient_penalty: float = 0.0
    r1: float = 0.0
    path_length: float = 0.0
    path_decay: float = 0.01
    path_batch: float = 0.5
    style_mixing: float = 0.0

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"AdversarialObjective: loss {self.loss!r} is none of {', '.join(LOSSES)}.")
        for name in ("gradient_penalty", "r1", "path_length"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"AdversarialObjective: {name} = {getattr(self, name)}; give a weight, 0 or more.")
        for name in ("path_decay", "path_batch", "style_mixing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"AdversarialObjective: {name} = {getattr(self, name)}; give a number from 0 to 1.")

    # ------------------------------------------------------------------------------------------------------------ the two players

    def discriminator(
        self,
        generator: nn.Module,
        discriminator: Callable[[Tensor, Tensor | None], Tensor],
        real: Tensor,
        labels: Tensor | None = None,
        random: Generators = None,
    ) -> ObjectiveOutput:
        """What the discriminator minimises on real pictures (B, C, H, W) and as many drawn ones.

        Args:
            discriminator: (pictures, labels) -> logits (B,).
        Returns: losses (B,); metrics `accuracy` (half of real above 0 and drawn below), the logits' means, for a Wasserstein loss the
            estimate of the distance, and the penalty.
        """
        with torch.no_grad():
            fake = self.draw(generator, len(real), labels, random, real.device, follow=True)[0]
        real_logits, fake_logits = discriminator(real, labels).float(), discriminator(fake, labels).float()
        losses = LOSSES[self.loss].discriminator(real_logits, fake_logits)
        metrics = {"real_logits": real_logits.detach(), "fake_logits": fake_logits.detach()}
        if self.loss == "wasserstein":
            metrics["distance"] = (real_logits - fake_logits).detach()
        else:
            metrics["accuracy"] = ((real_logits > 0).float() + (fake_logits < 0).float()).detach() / 2
        if self.gradient_penalty:
            mix = uniform((len(real), 1), random, real.device)[:, 0]
            penalty = gradient_penalty(lambda x: discriminator(x, labels), real, fake, mix)
            losses, metrics["penalty"] = losses + self.gradient_penalty * penalty, penalty.detach()
        return ObjectiveOutput(losses, metrics)

    def generator(
        self,
        generator: nn.Module,
        discriminator: Callable[[Tensor, Tensor | None], Tensor],
        batch: int,
        labels: Tensor | None = None,
        random: Generators = None,
        device: torch.device | str = "cpu",
    ) -> ObjectiveOutput:
        """What the generator minimises: losses (B,)."""
        fake = self.draw(generator, batch, labels, random, device)[0]
        return ObjectiveOutput(LOSSES[self.loss].generator(discriminator(fake, labels).float()))

    # ------------------------------------------------------------------------------------------------------------ lazy regularisers

    def regularise_discriminator(
        self, discriminator: Callable[[Tensor, Tensor | None], Tensor], real: Tensor, labels: Tensor | None = None, interval: int = 1
    ) -> ObjectiveOutput:
        """R1, (B,); computed in every `interval`-th step it weighs as much more (Karras et al. 2020, section 3.1)."""
        penalty = r1_penalty(lambda x: discriminator(x, labels), real)
        return ObjectiveOutput(penalty * (self.r1 / 2 * interval), {"r1": penalty.detach()})

    def regularise_generator(
        self, generator: nn.Module, mean_length: Tensor, batch: int, labels: Tensor | None, random: Generators, interval: int = 1
    ) -> ObjectiveOutput:
        """(|J^T y| - a)^2 with the mean length `a`, a buffer that is moved in place (by the mean over all processes), (B',)."""
        count = max(1, math.ceil(batch * self.path_batch))
        random = random if random is None or isinstance(random, torch.Generator) else list(random)[:count]
        labels = None if labels is None else labels[:count]
        with twice_differentiable():
            fake, styles = self.draw(generator, count, labels, random, mean_length.device)
            lengths = path_lengths(fake, styles, normal(fake.shape, random, fake.device))
        mean = mean_over_ranks(lengths.detach().mean())
        mean_length.lerp_(mean.to(mean_length), self.path_decay)
        penalty = (lengths - mean_length.clone()).square() + 0 * fake.flatten(1).sum(1)  # for the parameters without a part in it
        return ObjectiveOutput(penalty * (self.path_length * interval), {"path_length": lengths.detach()})

    # ------------------------------------------------------------------------------------------------------------------- drawing

    def draw(
        self, generator: nn.Module, batch: int, labels: Tensor | None, random: Generators, device: torch.device | str, follow: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Pictures (B, C, H, W), and the styles (B, L, D) that made them where the generator has styles.

        Args:
            follow: move the average style, and StyleGAN3's averages of its layers' power, which one pass per step does.
        """
        z = normal((batch, latent_dim(generator)), random, device)
        labels = labels if generator.config.get("num_classes") is not None else None
        if not hasattr(generator, "mapping"):
            return generator(z, labels).sample, None
        w = generator.mapping(z, labels, update_average=follow)
        ws = w[:, None].expand(-1, generator.num_ws, -1)                                               # (B, L, D)
        if self.style_mixing:
            other = generator.mapping(normal(z.shape, random, device), labels)
            chosen = uniform((batch, 2), random, device)
            first = 1 + (chosen[:, 0] * (generator.num_ws - 1)).long()                                 # the first layer of the other styles
            first = torch.where(chosen[:, 1] < self.style_mixing, first, generator.num_ws)
            layers = torch.arange(generator.num_ws, device=first.device)
            ws = torch.where((layers >= first[:, None])[:, :, None], other[:, None], ws)
        noise = list(random) if isinstance(random, (list, tuple)) else random
        averages = {"update_average": follow} if isinstance(generator, StyleGAN3Generator) else {}
        return generator.synthesize(ws, "random", noise, **averages), ws
