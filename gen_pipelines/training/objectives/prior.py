"""Cross-entropy of priors over codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..random import Generators, uniform
from .base import ObjectiveOutput


@dataclass(frozen=True)
class PriorObjective:
    """loss = -sum over levels of log p(codes | codes above, class) / (codes in all levels): nats per code.

    Attributes:
        drop_label: probability that a sample's class is replaced by the one that says nothing, so that the prior also knows the codes of
            no class in particular.

    Metrics: `nats_L` per code of each level, from the top down.

    References: van den Oord et al. 2017, section 3.3, https://arxiv.org/abs/1711.00937; Razavi et al. 2019, section 3.2,
    https://arxiv.org/abs/1906.00446
    """

    drop_label: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.drop_label <= 1:
            raise ValueError(f"PriorObjective: drop_label {self.drop_label} is not a probability, 0 to 1.")

    def __call__(
        self, priors: Sequence[Any], codes: Sequence[Tensor], *, labels: Tensor | None = None, generator: Generators = None
    ) -> ObjectiveOutput:
        """priors, codes: one for each level from the top down, codes (B, h, w). labels: (B,). Returns: losses of shape (B,)."""
        if labels is not None and self.drop_label:
            dropped = uniform((len(labels), 1), generator, labels.device)[:, 0] < self.drop_label
            labels = torch.where(dropped, torch.full_like(labels, priors[0].config.num_classes), labels)
        total, places, metrics = 0.0, 0, {}
        for number, (prior, level) in enumerate(zip(priors, codes, strict=True)):
            nats = -prior.log_prob(level, labels, codes[:number])                                      # (B,)
            total, places = total + nats, places + level[0].numel()
            metrics[f"nats_{number}"] = nats.detach() / level[0].numel()
        return ObjectiveOutput(total / places, metrics)
