"""Log-densities by the probability-flow ODE: any network, any parameterization, any path.

In coordinates of unit variance, z = c x_0 + s eps, and in the half log-SNR lambda as time, the flow is

    dz / dlambda = s c (s x_0(z) - c eps(z)),      d log p(z) / dlambda = -div(dz / dlambda)

(the derivative of c and s; Song et al. 2021, eq. 13 and 39, https://arxiv.org/abs/2011.13456, in other coordinates). At the data's end
x = z / c, which adds D log c; at the noise's end z is standard normal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..processes import Parameterization
from ..processes.random import Generators, normal, uniform
from .denoiser import Denoiser, Network, levels_log_prob, unit_level
from .dequantization import dequantize
from .observation import own_generators
from .result import LikelihoodResult

SOLVERS = {"rk4": 4, "heun": 2, "euler": 1, "dopri5": 0}  # evaluations in a step; 0 for adaptive
CLOSINGS = ("uniform", "decoder")
EVALUATIONS_PER_LAMBDA = 6.8  # with RK4 within 0.01 bits per dimension of dopri5 at 1e-5 (benchmarks/likelihood.py)


@torch.no_grad()
def ode_log_likelihood(
    network: Network,
    parameterization: Parameterization,
    levels: Tensor,
    num_dims: int | None = None,
    num_samples: int | None = None,
    generator: Generators = None,
    steps: int | None = None,
    solver: str = "rk4",
    tolerance: float = 1e-5,
    trace: str = "hutchinson",
    closing: str = "uniform",
    lambda_range: tuple[float | None, float | None] = (None, None),
    num_bits: int = 8,
) -> LikelihoodResult:
    """log P of integer pictures under the probability flow of a denoiser.

    Args:
        network: (network's input (B, *event), network time, 0-d) -> raw output; its conditions are inside it.
        parameterization: what the output means.
        levels: integers from 0 to 2^num_bits - 1, (B, *event).
        num_dims: values of the user's picture, if `levels` were padded: what padding costs is counted in the nats.
        num_samples: draws of noise and probe, averaged; 1 by default.
        generator: one, or one per picture: then the result does not depend on the batch (with a fixed grid).
        steps, solver: a fixed grid uniform in lambda ("rk4", "heun", "euler"), or "dopri5", adaptive at `tolerance` (torchdiffeq). The
            default takes 6.8 evaluations per unit of lambda: of RK4 24 steps over the whole range, 16 over that of a DDPM.
        trace: "hutchinson" (one random sign vector per trajectory, unbiased) or "exact" (one vector-Jacobian product per dimension).
        closing: what happens below the largest lambda. "uniform": the model is the density at the end of the range, and pictures are
            dequantised uniformly. "decoder": pictures are noised to the end of the range and decoded by P(k | y): a bound too, which is
            tight where the network has learned that its data are integers, and loose for a density that is smooth between them.
        lambda_range: (lowest, highest) half log-SNR; the trained range, at most +-7, by default.
    Returns: kind "ode"; `dequantization` is "uniform" or "gaussian" (the decoder's).
    Raises:
        ValueError: an unknown solver, trace or closing, or a result that is not finite.
    """
    _check(solver, trace, closing, steps)
    count = 1 if num_samples is None else num_samples
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"num_samples is a whole number of at least 1, got {num_samples!r}.")
    denoiser = Denoiser(network, parameterization)
    low, high = denoiser.lambda_range(*lambda_range)
    generators = own_generators(generator, len(levels))
    draws, evaluations = [], 0
    for _ in range(count):
        if closing == "uniform":
            x, weight = dequantize(levels, num_bits, generators)
        else:
            deviation = math.exp(-high)
            clean = levels.float() * (2 / (2**num_bits - 1)) - 1
            noise = normal(levels.shape, generators, levels.device)
            x = clean + deviation * noise
            entropy = 0.5 * noise.square().flatten(1).sum(1) + noise[0].numel() * math.log(deviation * math.sqrt(2 * math.pi))
            weight = levels_log_prob(levels, x, deviation, num_bits) + entropy
        log_p, evaluations = ode_log_density(denoiser, x, low, high, generators, steps, solver, tolerance, trace)
        draws.append(log_p + weight.to(log_p))
    return LikelihoodResult.from_draws(
        torch.stack(draws),
        "ode",
        levels[0].numel() if num_dims is None else num_dims,
        num_function_evaluations=evaluations * count,
        dequantization="uniform" if closing == "uniform" else "gaussian",
    )


def ode_log_density(
    denoiser: Denoiser,
    x: Tensor,
    low: float,
    high: float,
    generator: Generators = None,
    steps: int | None = None,
    solver: str = "rk4",
    tolerance: float = 1e-5,
    trace: str = "hutchinson",
) -> tuple[Tensor, int]:
    """log p(x) of real-valued x (B, *event), the density at half log-SNR `high` of x_0 + exp(-high) eps, in nats (B,).

    Returns: the log-densities, float32 or better, and the evaluations of the network.
    """
    evaluations = 0
    if steps is None:
        steps = default_steps(solver, low, high)
    probe = uniform(x.shape, generator, x.device).sub(0.5).sign().to(x.dtype) if trace == "hutchinson" else None

    def slope(lambda_: float, z: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal evaluations
        evaluations += 1
        c, s = unit_level(lambda_)
        with torch.enable_grad():
            z = z.detach().requires_grad_(True)
            x_0, eps = denoiser(z, lambda_)
            velocity = s * c * (s * x_0 - c * eps)
            divergence = _divergence(velocity, z, probe)
        return velocity.detach(), divergence

    c, _ = unit_level(high)
    z = c * x
    change, z_end = torch.zeros(len(x), dtype=x.dtype, device=x.device), z
    if solver == "dopri5":
        z_end, change = _adaptive(slope, z, low, high, tolerance)
    else:
        step = (low - high) / steps
        for i in range(steps):
            z_end, change = _TABLEAUS[solver](slope, high + i * step, step, z_end, change)
    # along the flow d log p = -div dlambda, so log p(data) = log p(noise) + the integral of div from data to noise
    log_noise = -0.5 * (z_end.square() + math.log(2 * math.pi)).flatten(1).sum(1)
    return log_noise + change + x[0].numel() * math.log(c), evaluations


def _divergence(velocity: Tensor, z: Tensor, probe: Tensor | None) -> Tensor:
    """tr(d velocity / d z), (B,): the estimate of one probe, or exactly, a product for each dimension."""
    if probe is not None:
        (product,) = torch.autograd.grad(velocity, z, probe.to(velocity.dtype))
        return (product * probe).flatten(1).sum(1)
    flat = velocity.flatten(1)
    total = torch.zeros(len(z), dtype=velocity.dtype, device=z.device)
    for i in range(flat.shape[1]):
        (gradient,) = torch.autograd.grad(flat[:, i].sum(), z, retain_graph=i + 1 < flat.shape[1])
        total = total + gradient.flatten(1)[:, i]
    return total


def default_steps(solver: str, low: float, high: float) -> int:
    """Steps of a fixed grid from half log-SNR `high` to `low`, by evaluations per unit of it; 1 for the adaptive solver, which has none."""
    return max(1, math.ceil(EVALUATIONS_PER_LAMBDA * (high - low) / SOLVERS[solver] - 1e-6)) if SOLVERS[solver] else 1


Slope = Callable[[float, Tensor], tuple[Tensor, Tensor]]


def _euler(slope: Slope, at: float, step: float, z: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    v, d = slope(at, z)
    return z + step * v, total + step * d


def _heun(slope: Slope, at: float, step: float, z: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    v1, d1 = slope(at, z)
    v2, d2 = slope(at + step, z + step * v1)
    return z + step / 2 * (v1 + v2), total + step / 2 * (d1 + d2)


def _rk4(slope: Slope, at: float, step: float, z: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    v1, d1 = slope(at, z)
    v2, d2 = slope(at + step / 2, z + step / 2 * v1)
    v3, d3 = slope(at + step / 2, z + step / 2 * v2)
    v4, d4 = slope(at + step, z + step * v3)
    return z + step / 6 * (v1 + 2 * v2 + 2 * v3 + v4), total + step / 6 * (d1 + 2 * d2 + 2 * d3 + d4)


_TABLEAUS = {"euler": _euler, "heun": _heun, "rk4": _rk4}


def _adaptive(slope: Slope, z: Tensor, low: float, high: float, tolerance: float) -> tuple[Tensor, Tensor]:
    """The ends of z and of the divergence's integral, by torchdiffeq's dopri5."""
    from torchdiffeq import odeint

    def field(lambda_: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return slope(float(lambda_), state[0])

    ends: Any = torch.tensor([high, low], dtype=torch.float64)
    start = (z, torch.zeros(len(z), dtype=z.dtype, device=z.device))
    z_path, total_path = odeint(field, start, ends, rtol=tolerance, atol=tolerance, method="dopri5")
    return z_path[-1], total_path[-1]


def _check(solver: str, trace: str, closing: str, steps: int | None) -> None:
    for name, value, known in (
        ("solver", solver, tuple(SOLVERS)), ("trace", trace, ("hutchinson", "exact")), ("closing", closing, CLOSINGS),
    ):  # fmt: skip
        if value not in known:
            raise ValueError(f"{name} {value!r} is none of {', '.join(known)}.")
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise ValueError(f"steps is a whole number of at least 1, or None, got {steps!r}.")
