"""How much each noise level counts, as a weight w(snr) on the squared error of eps, snr = (alpha / sigma)^2.

Whatever a network predicts, its squared error is a known multiple of the error of eps, so a weighting is written once, for eps, and
`DenoisingObjective` converts it. "target" is the plain loss: weight one on the error of whatever the network predicts.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Weighting = Callable[[Tensor], Tensor]


def epsilon(snr: Tensor) -> Tensor:
    """One: the simple loss of DDPM. Ho et al. 2020, eq. 14, https://arxiv.org/abs/2006.11239"""
    return torch.ones_like(snr)


def sample(snr: Tensor) -> Tensor:
    """1 / snr: weight one on the error of x_0."""
    return 1 / snr


def truncated_snr(snr: Tensor) -> Tensor:
    """max(snr, 1) / snr. Salimans & Ho 2022, section 4, https://arxiv.org/abs/2202.00512"""
    return (1 / snr).clamp_min(1)


def min_snr(snr: Tensor, gamma: float = 5.0) -> Tensor:
    """min(snr, gamma) / snr. Hang et al. 2023, section 3.4, https://arxiv.org/abs/2303.09556"""
    return (gamma / snr).clamp_max(1)


def soft_min_snr(snr: Tensor, gamma: float = 5.0) -> Tensor:
    """gamma / (snr + gamma), the smooth form of `min_snr`. Crowson et al. 2024, section 3.3, https://arxiv.org/abs/2401.11605"""
    return gamma / (snr + gamma)


def p2(snr: Tensor, gamma: float = 1.0, k: float = 1.0) -> Tensor:
    """1 / (k + snr)^gamma. Choi et al. 2022, eq. 8, https://arxiv.org/abs/2204.00227"""
    return 1 / (k + snr) ** gamma


def sigmoid(snr: Tensor, bias: float = 2.0) -> Tensor:
    """sigmoid(bias - log snr). Kingma & Gao 2023, section 4, https://arxiv.org/abs/2303.00848, who weight per unit of log snr.

    The loss is theirs under the time density `uniform_lambda`; under another, times are drawn more often where that density is higher.
    """
    return torch.sigmoid(bias - snr.log())


WEIGHTINGS: dict[str, Weighting | None] = {
    "target": None,
    "epsilon": epsilon,
    "sample": sample,
    "truncated_snr": truncated_snr,
    "min_snr": min_snr,
    "soft_min_snr": soft_min_snr,
    "p2": p2,
    "sigmoid": sigmoid,
}
