"""Reconstruction and quantisation of a VQ-VAE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..random import Generators
from .base import ObjectiveOutput

RECONSTRUCTIONS = ("likelihood", "squared_error")


@dataclass(frozen=True)
class VQObjective:
    """loss = -log p(x | codes) / D + weight * quantisation, means over the D values of a picture and over positions and dimensions of z.

    The quantisation term is beta |z - sg[e]|^2, and |sg[z] - e|^2 where the codebook is learned by its loss: see `VectorQuantizer`. Both
    terms belong to the sample, so neither changes its weight with the size of the batch.

    Attributes:
        reconstruction: "likelihood" (of the decoder, in nats per value), or "squared_error" (of its mean; divided by `variance`).
        variance: of the squared error, about that of the data; 1 for none.
        weight: of the quantisation term.

    Metrics: `nats_per_dim`, `quantization`, and for every level from the top down `perplexity_L` and `used_L` of the epoch so far.

    References: van den Oord et al. 2017, eq. 3, https://arxiv.org/abs/1711.00937
    """

    reconstruction: str = "likelihood"
    variance: float = 1.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.reconstruction not in RECONSTRUCTIONS:
            raise ValueError(f"VQObjective: reconstruction {self.reconstruction!r} is none of {', '.join(RECONSTRUCTIONS)}.")
        if self.variance <= 0 or self.weight < 0:
            raise ValueError(f"VQObjective: variance is positive and weight 0 or more, got {self.variance} and {self.weight}.")

    def __call__(self, model: Any, x: Tensor, *, generator: Generators = None) -> ObjectiveOutput:
        """model: a `VQVAEModel`. x: (B, C, H, W) in [-1, 1]. Returns: losses of shape (B,)."""
        output = model(x)
        nats = -output.distribution.log_prob(x) / x[0].numel()                                         # (B,)
        if self.reconstruction == "likelihood":
            error = nats
        else:
            error = (x - output.distribution.mean).square().flatten(1).mean(1) / self.variance         # (B,)
        metrics = {"nats_per_dim": nats.detach(), "quantization": output.loss.detach()}
        for number, quantizer in enumerate(reversed(model.quantizers)):
            metrics[f"perplexity_{number}"], metrics[f"used_{number}"] = quantizer.epoch_perplexity(), quantizer.epoch_used()
        return ObjectiveOutput(error + self.weight * output.loss, metrics)
