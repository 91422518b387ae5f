"""What `log_likelihood` returns, and the one place where nats become bits per dimension."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = {
    "exact": "the log-density itself (flows); with dequantised data a bound on the discrete log-probability",
    "ode": "the probability-flow equation, unbiased in its probes",
    "elbo": "a lower bound",
    "iwae": "the importance-weighted lower bound",
    "vlb": "the variational lower bound of a diffusion model",
    "autoregressive": "the exact sum of conditionals",
}


def bits_per_dim(nats: Tensor, num_dims: int) -> Tensor:
    """-nats / (num_dims ln 2): bits per value of the user's picture.

    Args:
        nats: log-probabilities of discrete pictures, any shape.
        num_dims: values in the user's picture (784 for MNIST, whatever a network pads it to).
    """
    return -nats / (num_dims * math.log(2))


@dataclass(frozen=True)
class LikelihoodResult:
    """Log-likelihoods of B pictures. Make one with `from_nats` or `from_draws`, which count the bits.

    Attributes:
        nats: log-probability of each picture, (B,); larger is better.
        bits_per_dim: the same in bits per value, (B,), smaller is better; None for models of binarised data, whose unit is nats.
        kind: one of `KINDS`: an exact number, or which bound.
        stderr: standard error of `nats` over the random draws, (B,); None where there was one draw, zero where nothing is random.
        num_function_evaluations: evaluations of the network for each picture.
        dequantization: how integers became real numbers: "uniform" and "variational" make the number a bound on the discrete
            log-probability; "none" for discrete models.
    """

    nats: Tensor
    bits_per_dim: Tensor | None
    kind: str
    stderr: Tensor | None
    num_function_evaluations: int
    dequantization: str

    @classmethod
    def from_nats(
        cls,
        nats: Tensor,
        kind: str,
        num_dims: int | None,
        *,
        stderr: Tensor | None = None,
        num_function_evaluations: int = 1,
        dequantization: str = "none",
    ) -> LikelihoodResult:
        """A result from log-probabilities of shape (B,).

        Args:
            num_dims: values in the user's picture; None for binarised data, which is not counted in bits per dimension.
        Raises:
            ValueError: an unknown kind, a wrong shape, or a number that is not finite (it would vanish in a mean over pictures).
        """
        if kind not in KINDS:
            raise ValueError(f"LikelihoodResult: kind {kind!r} is none of {', '.join(KINDS)}.")
        if nats.ndim != 1 or (stderr is not None and stderr.shape != nats.shape):
            raise ValueError(
                f"LikelihoodResult: nats and stderr have one number per picture, shape (B,); got {tuple(nats.shape)}"
                f"{'' if stderr is None else f' and {tuple(stderr.shape)}'}."
            )
        if num_dims is not None and num_dims < 1:
            raise ValueError(f"LikelihoodResult: num_dims is the number of values in a picture, at least 1; got {num_dims}.")
        bad = (~torch.isfinite(nats)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"LikelihoodResult: {len(bad)} of {len(nats)} log-likelihoods are not finite (pictures {bad[:8]}: {nats[bad[0]].item()}); "
                "use float32 or float64 weights, and check the model (from a diverged training?)."
            )
        bits = None if num_dims is None else bits_per_dim(nats, num_dims)
        return cls(nats, bits, kind, stderr, num_function_evaluations, dequantization)

    @classmethod
    def cat(cls, parts: Sequence[LikelihoodResult]) -> LikelihoodResult:
        """One result from those of several batches, which have the same kind, unit and dequantisation."""
        first = parts[0]
        bits = None if first.bits_per_dim is None else torch.cat([part.bits_per_dim for part in parts])
        stderr = None if first.stderr is None else torch.cat([part.stderr for part in parts])
        nats, evaluations = torch.cat([part.nats for part in parts]), max(part.num_function_evaluations for part in parts)
        return cls(nats, bits, first.kind, stderr, evaluations, first.dequantization)

    @classmethod
    def from_draws(cls, draws: Tensor, kind: str, num_dims: int | None, **settings: object) -> LikelihoodResult:
        """A result from K random draws of each picture's log-probability (or bound), shape (K, B): their mean and its standard error."""
        if draws.ndim != 2 or not len(draws):
            raise ValueError(f"LikelihoodResult: draws have the shape (number of draws, pictures); got {tuple(draws.shape)}.")
        stderr = draws.std(0) / math.sqrt(len(draws)) if len(draws) > 1 else None
        return cls.from_nats(draws.mean(0), kind, num_dims, stderr=stderr, **settings)
