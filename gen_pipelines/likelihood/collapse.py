"""What the latents of a variational autoencoder carry: diagnostics against posterior collapse."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.layers.distributions import DiagonalGaussian
from ..processes.random import Generators, normal

ACTIVE = 0.01  # Burda et al. 2016, section 4.1: variance of the posterior's mean over the data


@dataclass(frozen=True)
class LatentDiagnostics:
    """Numbers of one model on one set of pictures.

    Attributes:
        kl_per_dimension: mean over the pictures, nats, (d,); a dimension near 0 has collapsed.
        active_units: how many dimensions have Var_x E_q[z] > 0.01.
        mutual_information: of x and z under q, nats: E KL(q(z | x), p) - KL(q(z), p), estimated with q(z) the mixture of all pictures'
            posteriors. It cannot exceed log N.
        max_mutual_information: log N, what the estimate can show at most.
        elbo: mean over the pictures, nats, of one draw each, with nothing clamped or weighted.
    """

    kl_per_dimension: Tensor
    active_units: int
    mutual_information: float
    max_mutual_information: float
    elbo: float


@torch.no_grad()
def latent_diagnostics(model: Any, batches: Iterable[Tensor], generator: Generators = None) -> LatentDiagnostics:
    """Diagnoses a `VAEModel` in evaluation mode.

    Args:
        batches: pictures as the model takes them, (B, C, H, W) each, some thousands in all.
        generator: for the draws of z.

    References: Burda et al. 2016, section 4.1, https://arxiv.org/abs/1509.00519 (active units); Hoffman & Johnson 2016, "ELBO surgery",
    eq. 6 (mutual information)
    """
    means, log_variances, draws, elbos = [], [], [], []
    for x in batches:
        x = x.to(model.device)
        q = model.encode(x).latent_dist
        z = q.sample(normal(q.mean.shape, generator, x.device, q.mean.dtype))
        elbos.append((model.decode(z).distribution.log_prob(x) - q.kl_per_dimension().sum(-1)).cpu())
        means.append(q.mean.cpu())
        log_variances.append(q.log_variance.cpu())
        draws.append(z.cpu())
    q = DiagonalGaussian(torch.cat(means), torch.cat(log_variances))
    z = torch.cat(draws)
    count = len(z)
    if count < 2:
        raise ValueError(f"latent_diagnostics: {count} picture; a variance over pictures needs at least 2, and some thousands to be good.")
    aggregate = []
    for part in z.split(256):  # log of the mean of every posterior's density at each draw
        density = DiagonalGaussian(q.mean[None], q.log_variance[None]).log_prob(part[:, None])         # (n, N)
        aggregate.append(torch.logsumexp(density, 1) - math.log(count))
    information = (q.log_prob(z) - torch.cat(aggregate)).mean().item()
    return LatentDiagnostics(
        kl_per_dimension=q.kl_per_dimension().mean(0),
        active_units=int((q.mean.var(0) > ACTIVE).sum()),
        mutual_information=information,
        max_mutual_information=math.log(count),
        elbo=torch.cat(elbos).mean().item(),
    )
