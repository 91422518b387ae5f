"""Every conversion between what networks predict, one function each.

With x = alpha x_0 + sigma eps. All of it is done in float32, or in float64 where an input is; alpha, sigma and their derivatives by time
are Python floats, or tensors that broadcast against x. Each is affine in its first argument and x, so a solver may read its coefficients
off by feeding it ones and zeros.
"""

import math
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = [
    "consistency_coefficients", "consistency_to_x_0", "edm_input_scale", "edm_to_x_0", "eps_to_score", "eps_to_x_0", "flow_to_eps",
    "flow_to_x_0", "noise_data", "score_to_eps", "score_to_x_0", "v_to_eps", "v_to_x_0", "x_0_eps_to_flow", "x_0_eps_to_v",
    "x_0_to_consistency", "x_0_to_edm", "x_0_to_eps",
]  # fmt: skip

Number: TypeAlias = float | Tensor


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    if not isinstance(tensors[0], Tensor):  # Python floats, to read off a solver's coefficients, are wide enough
        return tensors
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(tensor.to(dtype) for tensor in tensors)


def _sqrt(value: Number) -> Number:
    return value.sqrt() if isinstance(value, Tensor) else math.sqrt(value)


def noise_data(x_0: Tensor, eps: Tensor, alpha: Number, sigma: Number) -> Tensor:
    """x = alpha x_0 + sigma eps."""
    x_0, eps = _wide(x_0, eps)
    return alpha * x_0 + sigma * eps


def eps_to_x_0(eps: Tensor, x: Tensor, alpha: Number, sigma: Number) -> Tensor:
    """x_0 = (x - sigma eps) / alpha; needs alpha > 0. Ho et al. 2020, eq. 15, https://arxiv.org/abs/2006.11239"""
    eps, x = _wide(eps, x)
    return (x - sigma * eps) / alpha


def x_0_to_eps(x_0: Tensor, x: Tensor, alpha: Number, sigma: Number) -> Tensor:
    """eps = (x - alpha x_0) / sigma; needs sigma > 0."""
    x_0, x = _wide(x_0, x)
    return (x - alpha * x_0) / sigma


def v_to_x_0(v: Tensor, x: Tensor, alpha: Number, sigma: Number) -> Tensor:
    """x_0 = (alpha x - sigma r v) / r^2, r^2 = alpha^2 + sigma^2 (1 on variance-preserving paths).

    Salimans & Ho 2022, appendix D, https://arxiv.org/abs/2202.00512, with r free.
    """
    v, x = _wide(v, x)
    r2 = alpha**2 + sigma**2
    return (alpha / r2) * x - (sigma / _sqrt(r2)) * v


def v_to_eps(v: Tensor, x: Tensor, alpha: Number, sigma: Number) -> Tensor:
    """eps = (sigma x + alpha r v) / r^2, r^2 = alpha^2 + sigma^2."""
    v, x = _wide(v, x)
    r2 = alpha**2 + sigma**2
    return (sigma / r2) * x + (alpha / _sqrt(r2)) * v


def x_0_eps_to_v(x_0: Tensor, eps: Tensor, alpha: Number, sigma: Number) -> Tensor:
    """v = (alpha eps - sigma x_0) / r, r^2 = alpha^2 + sigma^2."""
    x_0, eps = _wide(x_0, eps)
    r = _sqrt(alpha**2 + sigma**2)
    return (alpha / r) * eps - (sigma / r) * x_0


def score_to_eps(score: Tensor, sigma: Number) -> Tensor:
    """eps = -sigma score. Song et al. 2021, https://arxiv.org/abs/2011.13456"""
    (score,) = _wide(score)
    return -sigma * score


def eps_to_score(eps: Tensor, sigma: Number) -> Tensor:
    """score = -eps / sigma; needs sigma > 0."""
    (eps,) = _wide(eps)
    return -eps / sigma


def score_to_x_0(score: Tensor, x: Tensor, alpha: Number, sigma: Number) -> Tensor:
    """Tweedie: x_0 = (x + sigma^2 score) / alpha; needs alpha > 0."""
    score, x = _wide(score, x)
    return (x + sigma**2 * score) / alpha


def flow_to_x_0(flow: Tensor, x: Tensor, alpha: Number, sigma: Number, alpha_dot: Number, sigma_dot: Number) -> Tensor:
    """x_0 = (sigma' x - sigma u) / (alpha sigma' - sigma alpha') for u = alpha' x_0 + sigma' eps; on the linear path x_0 = x - t u."""
    flow, x = _wide(flow, x)
    d = alpha * sigma_dot - sigma * alpha_dot
    return (sigma_dot / d) * x - (sigma / d) * flow


def flow_to_eps(flow: Tensor, x: Tensor, alpha: Number, sigma: Number, alpha_dot: Number, sigma_dot: Number) -> Tensor:
    """eps = (alpha u - alpha' x) / (alpha sigma' - sigma alpha') for u = alpha' x_0 + sigma' eps; linear path: eps = x + (1 - t) u."""
    flow, x = _wide(flow, x)
    d = alpha * sigma_dot - sigma * alpha_dot
    return (alpha / d) * flow - (alpha_dot / d) * x


def x_0_eps_to_flow(x_0: Tensor, eps: Tensor, alpha_dot: Number, sigma_dot: Number) -> Tensor:
    """u = alpha' x_0 + sigma' eps, the velocity of x along the path; eps - x_0 on the linear path."""
    x_0, eps = _wide(x_0, eps)
    return alpha_dot * x_0 + sigma_dot * eps


def edm_input_scale(alpha: Number, sigma: Number, sigma_data: float) -> Number:
    """c_in = 1 / sqrt(sigma^2 + alpha^2 sigma_data^2): a network input of unit variance. Karras et al. 2022, table 1."""
    return 1 / _sqrt(sigma**2 + (alpha * sigma_data) ** 2)


def edm_to_x_0(raw: Tensor, x: Tensor, alpha: Number, sigma: Number, sigma_data: float) -> Tensor:
    """x_0 = c_skip x + c_out F with c_skip = alpha sigma_data^2 c_in^2 and c_out = sigma sigma_data c_in.

    Karras et al. 2022, eq. 7 and table 1, https://arxiv.org/abs/2206.00364, at alpha = 1; elsewhere the same in x / alpha, sigma / alpha.
    """
    raw, x = _wide(raw, x)
    c_in = edm_input_scale(alpha, sigma, sigma_data)
    return (alpha * sigma_data**2 * c_in**2) * x + (sigma * sigma_data * c_in) * raw


def x_0_to_edm(x_0: Tensor, x: Tensor, alpha: Number, sigma: Number, sigma_data: float) -> Tensor:
    """F = (x_0 - c_skip x) / c_out, the inverse of `edm_to_x_0`; needs sigma > 0."""
    x_0, x = _wide(x_0, x)
    c_in = edm_input_scale(alpha, sigma, sigma_data)
    return (x_0 - (alpha * sigma_data**2 * c_in**2) * x) / (sigma * sigma_data * c_in)


def consistency_coefficients(sigma: Number, sigma_data: float, sigma_min: float) -> tuple[Number, Number]:
    """(c_skip, c_out) = (sd^2 / ((sigma - sigma_min)^2 + sd^2), (sigma - sigma_min) sd / sqrt(sigma^2 + sd^2)): (1, 0) at sigma_min.

    Song et al. 2023, appendix C, https://arxiv.org/abs/2303.01469
    """
    gap = sigma - sigma_min
    return sigma_data**2 / (gap**2 + sigma_data**2), gap * sigma_data / _sqrt(sigma**2 + sigma_data**2)


def consistency_to_x_0(raw: Tensor, x: Tensor, alpha: Number, sigma: Number, sigma_data: float, sigma_min: float) -> Tensor:
    """x_0 = c_skip x / alpha + c_out F with the coefficients at sigma / alpha; needs alpha > 0."""
    raw, x = _wide(raw, x)
    c_skip, c_out = consistency_coefficients(sigma / alpha, sigma_data, sigma_min)
    return (c_skip / alpha) * x + c_out * raw


def x_0_to_consistency(x_0: Tensor, x: Tensor, alpha: Number, sigma: Number, sigma_data: float, sigma_min: float) -> Tensor:
    """F = (x_0 - c_skip x / alpha) / c_out, the inverse of `consistency_to_x_0`; needs sigma / alpha > sigma_min."""
    x_0, x = _wide(x_0, x)
    c_skip, c_out = consistency_coefficients(sigma / alpha, sigma_data, sigma_min)
    return (x_0 - (c_skip / alpha) * x) / c_out
