"""The variational lower bound of a denoiser, on any grid of noise levels.

For ancestral sampling with the posterior's variance on lambda_0 > lambda_1 > ... > lambda_K,

    -log P(k) <= KL(q(z_K | x_0), N(0, I)) + sum_i (e^(2 lambda_i) - e^(2 lambda_(i+1))) / 2 E |x_0 - x_0(z_(i+1))|^2 - E log P(k | z_0)

Ho et al. 2020, eq. 5, https://arxiv.org/abs/2006.11239, in the form of Kingma et al. 2021, eq. 11 to 14, https://arxiv.org/abs/2107.00630,
whose decoder P(k | z_0) it has too: Ho et al.'s L_0, in which the network decodes, is `VariationalObjective`'s.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..processes import Parameterization
from ..processes.random import Generators, normal
from .denoiser import Denoiser, Network, levels_log_prob, unit_level
from .observation import own_generators
from .result import LikelihoodResult


@torch.no_grad()
def variational_bound(
    network: Network,
    parameterization: Parameterization,
    levels: Tensor,
    num_dims: int | None = None,
    num_samples: int | None = None,
    generator: Generators = None,
    steps: int = 100,
    lambda_range: tuple[float | None, float | None] = (None, None),
    num_bits: int = 8,
) -> LikelihoodResult:
    """A lower bound on log P of integer pictures, by `steps` evaluations of the network.

    Args:
        steps: steps of the ancestral sampler whose bound it is, uniform in lambda; more are tighter.
        the rest: as in `ode_log_likelihood`.
    Returns: kind "vlb", nothing dequantised: the decoder P(k | z_0) is a distribution over integers.
    Raises:
        ValueError: steps that are no whole number above 0, or a result that is not finite.
    """
    for name, value in (("steps", steps), ("num_samples", 1 if num_samples is None else num_samples)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is a whole number of at least 1, got {value!r}.")
    denoiser = Denoiser(network, parameterization)
    low, high = denoiser.lambda_range(*lambda_range)
    grid = [high + (low - high) * i / steps for i in range(steps + 1)]
    generators = own_generators(generator, len(levels))
    x_0 = levels.float() * (2 / (2**num_bits - 1)) - 1
    draws = []
    for _ in range(num_samples or 1):
        noise = normal(levels.shape, generators, levels.device)
        nats = levels_log_prob(levels, x_0 + math.exp(-high) * noise, math.exp(-high), num_bits)
        for before, here in zip(grid[:-1], grid[1:], strict=True):
            c, s = unit_level(here)
            noise = normal(levels.shape, generators, levels.device)
            guess, _ = denoiser(c * x_0 + s * noise, here)
            error = (x_0 - guess).square().flatten(1).sum(1)
            nats = nats - 0.5 * (math.exp(2 * before) - math.exp(2 * here)) * error
        draws.append(nats - _prior_divergence(x_0, low))
    dims = levels[0].numel() if num_dims is None else num_dims
    return LikelihoodResult.from_draws(torch.stack(draws), "vlb", dims, num_function_evaluations=steps * (num_samples or 1))


def _prior_divergence(x_0: Tensor, lambda_: float) -> Tensor:
    """KL(N(c x_0, s^2), N(0, I)), (B,)."""
    c, s = unit_level(lambda_)
    return 0.5 * (c**2 * x_0.square() + s**2 - 1 - 2 * math.log(s)).flatten(1).sum(1)
