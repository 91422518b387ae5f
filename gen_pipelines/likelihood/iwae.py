"""The importance-weighted bound of latent-variable models."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..models.layers.distributions import standard_normal_log_prob
from ..processes.random import Generators, normal
from .observation import observe, own_generators
from .result import LikelihoodResult

ROWS = 4096  # decoded at once: bounds the memory, whatever the number of draws


def log_mean_exp(x: Tensor, dim: int = 0) -> Tensor:
    """log of the mean of exp(x)."""
    return torch.logsumexp(x, dim) - math.log(x.shape[dim])


@torch.no_grad()
def draw_log_weights(model: Any, x: Tensor, num_samples: int, generator: Generators = None, analytic: bool = False) -> Tensor:
    """Log importance weights of many draws, in chunks; (K, B), float32 or better.

    Args:
        model: a `VAEModel`.
        x: (B, C, H, W).
        num_samples: K.
        generator: one, or one per picture.
        analytic: with the KL divergence in closed form instead of the two densities of z (the ELBO's draws, of less variance).
    """
    posterior, chunks = model.encode(x).latent_dist, []
    kl = posterior.kl_per_dimension().sum(-1)
    # all of a picture's noise at once: drawn in parts, it would depend on how many pictures there are beside it
    noise = normal((len(x), num_samples, posterior.mean.shape[-1]), generator, x.device, posterior.mean.dtype).transpose(0, 1)
    for part in noise.split(max(ROWS // len(x), 1)):
        z = posterior.sample(part)                                                                     # (k, B, d)
        conditional = model.decode(z).distribution.log_prob(x)                                         # (k, B)
        chunks.append(conditional - kl if analytic else conditional + standard_normal_log_prob(z) - posterior.log_prob(z))
    return torch.cat(chunks)


@torch.no_grad()
def iwae(model: Any, levels: Tensor, num_samples: int = 64, generator: Generators = None, batch_size: int = 64) -> LikelihoodResult:
    """E log 1/K sum_k p(x, z_k) / q(z_k | x), z_k ~ q(z | x): a bound that rises with K and whose limit is log p(x).

    Args:
        model: a `VAEModel` in evaluation mode.
        levels: pictures as integers, (N, C, H, W), as many levels as the model has.
        num_samples: K.
        generator: one, or one per picture; with either the result does not depend on `batch_size`.
    Returns: kind "iwae"; `stderr` is that of the mean of the weights, to first order.

    References: Burda et al. 2016, eq. 8, https://arxiv.org/abs/1509.00519
    """
    generators = own_generators(generator, len(levels))
    nats, stderr, seen = [], [], None
    for start in range(0, len(levels), batch_size):
        part = slice(start, start + batch_size)
        own = None if generators is None else generators[part]
        seen = observe(levels[part].to(model.device), model.config.likelihood, model.config.num_bits, own)
        weights = draw_log_weights(model, seen.x, num_samples, own)
        nats.append((log_mean_exp(weights) + seen.weight).cpu())
        relative = torch.exp(weights - weights.max(0).values)
        stderr.append((relative.std(0) / relative.mean(0) / math.sqrt(num_samples)).cpu() if num_samples > 1 else None)
    return LikelihoodResult.from_nats(
        torch.cat(nats),
        "iwae",
        seen.num_dims,
        stderr=torch.cat(stderr) if num_samples > 1 else None,
        num_function_evaluations=num_samples,
        dequantization=seen.dequantization,
    )
