"""The evidence lower bound, with what keeps a posterior from collapsing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...models.layers.ranks import mean_over_ranks
from ..random import Generators
from .base import ObjectiveOutput


@dataclass(frozen=True)
class ELBOObjective:
    """loss = -E_q(z | x) [log p(x | z)] + beta sum_j max(free_bits, mean over the batch of KL_j), nats per picture.

    Sums run over the values of a picture and the dimensions of z, means over the batch only: another balance is another beta.

    Attributes:
        beta: weight of the divergence, 1 for the bound.
        warmup_steps: beta grows linearly from 0 over so many updates.
        free_bits: nats that every dimension may spend for nothing, counted on the mean over the batch (of all ranks), not per picture.
        num_samples: draws of z for each picture.

    delta-VAE's committed rate is a property of the posterior: `VAEModel(committed_rate=...)`.

    Metrics: `elbo` (nothing clamped or weighted), `kl`, `reconstruction` (nats), `active_dimensions` (of KL above 0.01 nats), `beta`.

    References: Kingma & Welling 2014, eq. 10, https://arxiv.org/abs/1312.6114; Higgins et al. 2017 (beta); Bowman et al. 2016, section 3.1,
    https://arxiv.org/abs/1511.06349 (warm-up); Kingma et al. 2016, appendix C.8, https://arxiv.org/abs/1606.04934 (free bits)
    """

    beta: float = 1.0
    warmup_steps: int = 0
    free_bits: float = 0.0
    num_samples: int = 1

    def __post_init__(self) -> None:
        if self.beta < 0 or self.warmup_steps < 0 or self.free_bits < 0 or self.num_samples < 1:
            raise ValueError(f"ELBOObjective: weights, steps and bits are 0 or more and num_samples 1 or more, got {self}.")

    def __call__(self, model: Any, x: Tensor, *, step: int = 0, generator: Generators = None) -> ObjectiveOutput:
        """model: a `VAEModel`. x: (B, C, H, W) in [-1, 1]. step: updates before this one. Returns: losses of shape (B,)."""
        output = model(x, num_samples=self.num_samples, generator=generator)
        reconstruction = output.distribution.log_prob(x).mean(0)                                       # (B,)
        kl = output.latent_dist.kl_per_dimension()                                                     # (B, d)
        spent = mean_over_ranks(kl.detach().mean(0))                                                   # (d,)
        # value and gradient of max(free_bits, mean): a dimension below it costs the constant and feels no pull
        charged = torch.where(spent > self.free_bits, kl, torch.full_like(kl, self.free_bits)) if self.free_bits else kl
        beta = self.beta * min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else self.beta
        per_sample = beta * charged.sum(1) - reconstruction
        metrics = {
            "elbo": (reconstruction - kl.sum(1)).detach(),
            "kl": kl.detach().sum(1),
            "reconstruction": reconstruction.detach(),
            "active_dimensions": (spent > 0.01).sum().float(),
            "beta": torch.tensor(beta),
        }
        return ObjectiveOutput(per_sample, metrics)
