"""Maximum likelihood of normalizing flows, in bits per dimension."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...likelihood.dequantization import dequantize, to_levels
from ...likelihood.result import bits_per_dim
from ...models.flows.base import NormalizingFlowModel
from ..random import Generators
from .base import ObjectiveOutput


@dataclass(frozen=True)
class LikelihoodObjective:
    """-(log p(x) + weight) / (D ln 2): the negative log-likelihood of dequantised pictures, in bits per dimension.

    The noise is the model's own: uniform, or drawn by its variational dequantiser, whose entropy is then part of the loss. Densities,
    log-determinants and the loss are in float32 or better under mixed precision; only the networks inside the couplings are not.

    References: Dinh et al. 2017, eq. 3, https://arxiv.org/abs/1605.08803; Kingma and Dhariwal 2018, eqs. 1 and 2
    """

    def __call__(
        self, model: NormalizingFlowModel, x: Tensor, labels: Tensor | None = None, *, generator: Generators = None
    ) -> ObjectiveOutput:
        """x: pictures (B, C, H, W) that were 8-bit, uint8 or float in [-1, 1]; labels: (B,). Returns: losses of shape (B,)."""
        bits = model.config.num_bits
        levels = to_levels(x, num_bits=bits)
        dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
        y, weight = dequantize(levels, bits, generator, model.dequantizer, dtype)                     # (B, C, H, W), (B,)
        nats = model(y, labels).log_prob + weight                                                     # (B,)
        return ObjectiveOutput(per_sample=bits_per_dim(nats, levels[0].numel()), metrics={"nats": nats.detach()})
