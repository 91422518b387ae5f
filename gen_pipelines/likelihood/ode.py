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
from numpy.polynomial.legendre import leggauss
from torch import Tensor

from ..processes import Parameterization
from ..processes.random import Generators, normal, uniform
from .denoiser import Denoiser, Network, levels_log_prob, unit_level
from .dequantization import dequantize
from .observation import own_generators
from .result import LikelihoodResult

SOLVERS = ("adams", "rk4", "heun", "euler", "dopri5")
CLOSINGS = ("uniform", "decoder")
STEPS = {"adams": 48, "rk4": 24, "heun": 48, "euler": 96}  # within 0.01 bits of dopri5 at 1e-5 with the first (benchmarks/likelihood.py)
# a fixed grid is uniform in asinh((lambda - CENTRE) / WIDTH): dense where the flow of pictures bends, sparse where all is data or noise
CENTRE, WIDTH = 2.0, 3.0


@torch.no_grad()
def ode_log_likelihood(
    network: Network,
    parameterization: Parameterization,
    levels: Tensor,
    num_dims: int | None = None,
    num_samples: int | None = None,
    generator: Generators = None,
    steps: int | None = None,
    solver: str = "adams",
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
        steps, solver: a fixed grid in lambda, densest about 2, or "dopri5", adaptive at `tolerance` (torchdiffeq). "adams" has one
            evaluation for each step and one to begin, 48 steps by default; "rk4", "heun" and "euler" have four, two and one in a step, and
            take 96 evaluations by default.
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
    solver: str = "adams",
    tolerance: float = 1e-5,
    trace: str = "hutchinson",
) -> tuple[Tensor, int]:
    """log p(x) of real-valued x (B, *event), the density at half log-SNR `high` of x_0 + exp(-high) eps, in nats (B,).

    Returns: the log-densities, float32 or better, and the evaluations of the network.
    """
    evaluations = 0
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if steps is None:
        steps = STEPS.get(solver, 1)
    probe = uniform(x.shape, generator, x.device).sub(0.5).sign().to(x.dtype) if trace == "hutchinson" else None

    def estimate(lambda_: float, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x_0, dz / dlambda and its divergence."""
        nonlocal evaluations
        evaluations += 1
        c, s = unit_level(lambda_)
        with torch.enable_grad():
            z = z.detach().requires_grad_(True)
            x_0, eps = denoiser(z, lambda_)
            velocity = s * c * (s * x_0 - c * eps)
            divergence = _divergence(velocity, z, probe)
        return x_0.detach(), velocity.detach(), divergence

    c, _ = unit_level(high)
    start = (c * x, torch.zeros(len(x), dtype=x.dtype, device=x.device))
    if solver == "dopri5":
        z_end, change = _adaptive(estimate, start, low, high, tolerance)
    elif solver == "adams":
        z_end, change = _adams(estimate, start, Stretched(low, high, steps))
    else:
        z_end, change = _runge_kutta(_TABLEAUS[solver], estimate, start, Stretched(low, high, steps))
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


State = tuple[Tensor, Tensor]  # z (B, *event) and the integral of the divergence (B,), or their derivatives
Estimate = Callable[[float, Tensor], tuple[Tensor, Tensor, Tensor]]


class Stretched:
    """A grid of `steps` from half log-SNR `high` to `low`, uniform in a stretched coordinate u, which is i at node i."""

    def __init__(self, low: float, high: float, steps: int) -> None:
        self.low, self.high, self.steps = low, high, steps
        self._first = math.asinh((high - CENTRE) / WIDTH)
        self._scale = (math.asinh((low - CENTRE) / WIDTH) - self._first) / steps

    def lambda_(self, u: float) -> float:
        """The half log-SNR at u; never beyond the ends, where a trained range may end."""
        return min(max(CENTRE + WIDTH * math.sinh(self._first + self._scale * u), self.low), self.high)

    def rate(self, u: float) -> float:
        """d lambda / du."""
        return self._scale * WIDTH * math.cosh(self._first + self._scale * u)

    def weights(self, i: int, nodes: range, weight: Callable[[float], float]) -> list[float]:
        """The integral over step i of weight(lambda) dlambda times the polynomial in u through values at some nodes, as their weights."""
        found = [0.0] * len(nodes)
        for x, w in zip(*_GAUSS, strict=True):
            u = i + 0.5 * (1 + x)
            here = 0.5 * w * self.rate(u) * weight(self.lambda_(u))
            for k, node in enumerate(nodes):
                found[k] += here * math.prod((u - other) / (node - other) for other in nodes if other != node)
        return found


_GAUSS = [values.tolist() for values in leggauss(6)]


def _adams(estimate: Estimate, start: State, grid: Stretched) -> State:
    """Exponential Adams: Bashforth predicts, the network is evaluated there, Moulton corrects with what it said (PEC).

    With z / s as the unknown the flow is d(z / s) = e^lambda x_0 dlambda, without the linear part along which noise grows on its way from
    the data, and with it whatever a formula for z has wrong in its first steps. x_0 is the cubic through the last estimates. For the
    divergence the weights are Gregory's, equal but for the ends: a network that was given its time as fast sines trembles with it, which
    equal weights average out and those of Runge-Kutta steps (1, 4, 2, 4, ...) do not.
    """
    z, total = start
    x_0, _, divergence = estimate(grid.lambda_(0), z)
    estimates, divergences = [x_0], [divergence]  # of nodes in order, the last four at most
    for i in range(grid.steps):
        here, there = (unit_level(grid.lambda_(node))[1] for node in (i, i + 1))
        noise = lambda lambda_, s=there: s * math.exp(lambda_)
        moved = there / here * z
        known = range(i + 1 - min(len(estimates), 3), i + 1)
        guess = moved + _sum(grid.weights(i, known, noise), estimates[-len(known) :])
        x_0, _, divergence = estimate(grid.lambda_(i + 1), guess)
        estimates, divergences = [*estimates, x_0][-4:], [*divergences, divergence][-4:]
        known = range(i + 2 - len(estimates), i + 2)
        z = moved + _sum(grid.weights(i, known, noise), estimates)
        total = total + _sum(grid.weights(i, known, lambda _: 1.0), divergences)
    return z, total


def _sum(weights: list[float], values: list[Tensor]) -> Tensor:
    return sum((weight * value for weight, value in zip(weights[1:], values[1:], strict=True)), weights[0] * values[0])


Slope = Callable[[float, Tensor], State]


def _runge_kutta(step: Callable[[Slope, float, State], State], estimate: Estimate, start: State, grid: Stretched) -> State:
    """A one-step method on the whole grid."""

    def slope(u: float, z: Tensor) -> State:
        _, velocity, divergence = estimate(grid.lambda_(u), z)
        return grid.rate(u) * velocity, grid.rate(u) * divergence

    state = start
    for i in range(grid.steps):
        state = step(slope, i, state)
    return state


def _euler(slope: Slope, u: float, state: State) -> State:
    return _along(state, 1.0, slope(u, state[0]))


def _heun(slope: Slope, u: float, state: State) -> State:
    first = slope(u, state[0])
    second = slope(u + 1, state[0] + first[0])
    return _along(_along(state, 0.5, first), 0.5, second)


def _rk4(slope: Slope, u: float, state: State) -> State:
    z = state[0]
    first = slope(u, z)
    second = slope(u + 0.5, z + 0.5 * first[0])
    third = slope(u + 0.5, z + 0.5 * second[0])
    fourth = slope(u + 1, z + third[0])
    for weight, derivative in ((1 / 6, first), (1 / 3, second), (1 / 3, third), (1 / 6, fourth)):
        state = _along(state, weight, derivative)
    return state


def _along(state: State, step: float, derivative: State) -> State:
    return state[0] + step * derivative[0], state[1] + step * derivative[1]


_TABLEAUS = {"euler": _euler, "heun": _heun, "rk4": _rk4}


def _adaptive(estimate: Estimate, start: State, low: float, high: float, tolerance: float) -> State:
    """The ends of z and of the divergence's integral, by torchdiffeq's dopri5."""
    from torchdiffeq import odeint

    def field(lambda_: Tensor, state: State) -> State:
        return estimate(min(max(float(lambda_), low), high), state[0])[1:]  # a stage at the end is asked for an ulp beside it

    ends: Any = torch.tensor([high, low], dtype=torch.float64, device=start[0].device)
    at_the_end = {"step_t": ends[1:]}  # or it would step beyond the trained range and interpolate
    z_path, total_path = odeint(field, start, ends, rtol=tolerance, atol=tolerance, method="dopri5", options=at_the_end)
    return z_path[-1], total_path[-1]


def _check(solver: str, trace: str, closing: str, steps: int | None) -> None:
    for name, value, known in (
        ("solver", solver, SOLVERS), ("trace", trace, ("hutchinson", "exact")), ("closing", closing, CLOSINGS),
    ):  # fmt: skip
        if value not in known:
            raise ValueError(f"{name} {value!r} is none of {', '.join(known)}.")
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise ValueError(f"steps is a whole number of at least 1, or None, got {steps!r}.")
