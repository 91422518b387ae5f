"""Updates that more than one scheduler uses: pure functions of both ends of a step."""

import math

import torch
from torch import Tensor

from ..processes.level import Level

__all__ = ["ancestral_update", "first_order_update", "posterior_coefficients", "raise_level"]


def first_order_update(x_0: Tensor, eps: Tensor, there: Level) -> Tensor:
    """x_there = alpha x_0 + sigma eps: one Euler step of the probability-flow ODE, exact where x_0 and eps do not change on the way.

    The same numbers are DDIM at eta = 0, Euler in sigma / alpha and Euler in flow time.

    Args:
        x_0, eps: the network's two estimates, shape (B, *event).
        there: where the step lands.
    Returns: shape (B, *event).
    References: Song et al. 2021, eq. 13, https://arxiv.org/abs/2010.02502; Salimans & Ho 2022, eq. 8, https://arxiv.org/abs/2202.00512
    """
    return torch.add(there.alpha * x_0, eps, alpha=there.sigma)


def ancestral_update(x_0: Tensor, eps: Tensor, here: Level, there: Level, eta: float = 0.0, noise: Tensor | None = None) -> Tensor:
    """One DDIM update from a level to a less noisy one, on any Gaussian path.

    Args:
        x_0, eps: the network's two estimates at `here`, shape (B, *event).
        here, there: (alpha, sigma) of both ends.
        eta: 0 is deterministic, 1 has the variance of q(x_there | x_here, x_0).
        noise: standard normal, same shape; required where eta > 0 and there.sigma > 0.
    Returns: x at `there`, shape (B, *event).
    References: Song et al. 2021, eqs. 12 and 16, https://arxiv.org/abs/2010.02502, with alpha and sigma free.
    """
    std = eta * posterior_std(here, there)
    x = torch.add(there.alpha * x_0, eps, alpha=math.sqrt(max(there.sigma**2 - std**2, 0.0)))
    return x if std == 0.0 else x.add_(noise, alpha=std)


def transition_variance(here: Level, there: Level) -> float:
    """Variance of q(x_here | x_there): sigma_here^2 - (alpha_here / alpha_there)^2 sigma_there^2. Kingma et al. 2021, eq. 20,
    https://arxiv.org/abs/2107.00630"""
    return max(here.sigma**2 - (here.alpha / there.alpha * there.sigma) ** 2, 0.0)


def posterior_std(here: Level, there: Level) -> float:
    """Standard deviation of q(x_there | x_here, x_0). Kingma et al. 2021, eq. 27, https://arxiv.org/abs/2107.00630"""
    return there.sigma / here.sigma * math.sqrt(transition_variance(here, there))


def posterior_coefficients(here: Level, there: Level) -> tuple[float, float]:
    """(c_0, c_x): the mean of q(x_there | x_here, x_0) is c_0 x_0 + c_x x_here.

    References: Ho et al. 2020, eq. 7, https://arxiv.org/abs/2006.11239, and Kingma et al. 2021, eq. 28, with alpha and sigma free.
    """
    c_x = here.alpha / there.alpha * (there.sigma / here.sigma) ** 2
    return there.alpha * transition_variance(here, there) / here.sigma**2, c_x


def raise_level(x: Tensor, here: Level, raised: Level, noise: Tensor, noise_scale: float = 1.0) -> Tensor:
    """Add noise to go from a level to a noisier one: x (alpha' / alpha) + std noise, std^2 = sigma'^2 - (alpha' / alpha)^2 sigma^2.

    References: Karras et al. 2022, algorithm 2, line 6, https://arxiv.org/abs/2206.00364, in the coordinates of any path.
    """
    ratio = raised.alpha / here.alpha
    std = math.sqrt(max(raised.sigma**2 - (ratio * here.sigma) ** 2, 0.0))
    return torch.add(ratio * x, noise, alpha=std * noise_scale)
