"""The importance-weighted bound as a loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...likelihood.iwae import log_mean_exp
from ...models.layers.distributions import standard_normal_log_prob
from ..random import Generators
from .base import ObjectiveOutput

ESTIMATORS = ("standard", "stl", "dreg")


@dataclass(frozen=True)
class IWAEObjective:
    """loss = -log 1/K sum_k w_k, w_k = p(x, z_k) / q(z_k | x), z_k ~ q(z | x): nats per picture.

    Attributes:
        num_samples: K.
        estimator: of the encoder's gradient, whose signal drowns in noise as K grows: "standard"; "stl" (the score of q is left out:
            biased for K > 1, without noise where q is exact); "dreg" (doubly reparameterised: unbiased, its signal grows with K). All
            three have the same value and the same gradient of the decoder.

    Metrics: `iwae` (the bound), `effective_samples` (1 / sum of the squared normalised weights, at most K).

    References: Burda et al. 2016, eqs. 8 and 13, https://arxiv.org/abs/1509.00519; Roeder et al. 2017, https://arxiv.org/abs/1703.09194
    (STL); Tucker et al. 2019, eq. 8, https://arxiv.org/abs/1810.04152 (DReG)
    """

    num_samples: int = 50
    estimator: str = "standard"

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"IWAEObjective: num_samples {self.num_samples} is not allowed; give 1 or more.")
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"IWAEObjective: estimator {self.estimator!r} is none of {', '.join(ESTIMATORS)}.")

    def __call__(self, model: Any, x: Tensor, *, step: int = 0, generator: Generators = None) -> ObjectiveOutput:
        """model: a `VAEModel`. x: (B, C, H, W) in [-1, 1]. Returns: losses of shape (B,)."""
        output = model(x, num_samples=self.num_samples, generator=generator)
        z, q = output.latents, output.latent_dist
        if self.estimator != "standard":
            q = q.detach()
        log_w = output.distribution.log_prob(x) + standard_normal_log_prob(z) - q.log_prob(z)          # (K, B)
        normalised = torch.softmax(log_w.detach(), 0)
        if self.estimator == "dreg" and z.requires_grad:
            # what reaches z carries the weight once; the doubly reparameterised gradient carries its square
            z.register_hook(lambda gradient: gradient * normalised.unsqueeze(-1))
        bound = log_mean_exp(log_w)                                                                    # (B,)
        metrics = {"iwae": bound.detach(), "effective_samples": 1 / normalised.square().sum(0)}
        return ObjectiveOutput(-bound, metrics)
