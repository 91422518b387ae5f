"""What the likelihoods of denoisers share: the network in coordinates of unit variance, its range of noise, and the step to integers.

With half log-SNR lambda, c = alpha / r and s = sigma / r, r^2 = alpha^2 + sigma^2, the state is z = x / r = c x_0 + s eps on every path:
c^2 is sigmoid(2 lambda), s^2 is sigmoid(-2 lambda). Nothing below depends on the path that the network was trained on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..processes import Parameterization

Network = Callable[[Tensor, Tensor], Tensor]

# where a path ends in pure noise (alpha = 0) or pure data, no further than this: beyond it exp(-2 |lambda|) is below float32
LOWEST, HIGHEST = -7.0, 7.0


@dataclass(frozen=True)
class Denoiser:
    """A network with its parameterization, as x_0(z, lambda) and eps(z, lambda).

    Attributes:
        network: (network's input (B, *event), network time, 0-d) -> raw output.
        parameterization: what that output means.
    """

    network: Network
    parameterization: Parameterization

    def lambda_range(self, low: float | None = None, high: float | None = None) -> tuple[float, float]:
        """(noise end, data end) of the half log-SNR: the trained range, cut to +-7 and to what is asked for.

        Raises:
            ValueError: nothing is left of the range.
        """
        trained = self.parameterization.trained_lambda_range
        first = max(trained[0], LOWEST if low is None else low)
        last = min(trained[1], HIGHEST if high is None else high)
        if not first < last:
            raise ValueError(f"lambda_range: ({low}, {high}) and the trained range {trained} have nothing in common.")
        return first, last

    def __call__(self, z: Tensor, lambda_: float) -> tuple[Tensor, Tensor]:
        """(x_0, eps) at the state z (B, *event), float32 or better. Gradients flow."""
        parameterization, path = self.parameterization, self.parameterization.path
        t = float(path.t_from_lambda(torch.tensor(lambda_, dtype=torch.float64)))
        level = path.level(t)
        r = math.hypot(level.alpha, level.sigma)
        x = z * r
        time = torch.tensor(float(parameterization.network_time(t)), device=z.device)
        output = self.network(parameterization.scale_model_input(x, t), time)
        # the level of t, whose rounding (an index of a table) the state follows
        return parameterization.denoise(output.to(torch.promote_types(output.dtype, torch.float32)), x, t)


def unit_level(lambda_: float) -> tuple[float, float]:
    """(c, s) of z = c x_0 + s eps at a half log-SNR."""
    return 1 / math.sqrt(1 + math.exp(-2 * lambda_)), 1 / math.sqrt(1 + math.exp(2 * lambda_))


def levels_log_prob(levels: Tensor, y: Tensor, deviation: float, num_bits: int = 8) -> Tensor:
    """log P(levels | y), (B,): each value on its own, P(k | y) proportional to N(y; x_k, deviation^2), x_k = 2 k / (n - 1) - 1.

    Only levels near y have a share, so they alone are summed: those within 12 deviations.

    Args:
        levels: integers from 0 to n - 1, n = 2^num_bits, (B, *event).
        y: noisy pictures x_0 + deviation eps, (B, *event).

    References: Kingma et al. 2021, "Variational Diffusion Models", section 3.3 and appendix, https://arxiv.org/abs/2107.00630
    """
    top = 2**num_bits - 1
    width = 2 / top
    reach = min(top, math.ceil(12 * deviation / width) + 1)
    place = (y + 1) / width                                                                            # in levels
    nearest = place.round().clamp(0, top)
    scale = -0.5 * (width / deviation) ** 2
    total = None
    for offset in range(-reach, reach + 1):
        k = nearest + offset
        term = scale * (place - k).square()
        term = term.masked_fill((k < 0) | (k > top), -math.inf)
        total = term if total is None else torch.logaddexp(total, term)
    own = scale * (place - levels.to(place.dtype)).square()
    return (own - total).flatten(1).sum(1)
