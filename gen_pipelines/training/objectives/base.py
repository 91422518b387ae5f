"""What an objective is: a callable from (networks, batch) to one loss per sample. It knows no devices, optimisers or logs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class ObjectiveOutput:
    """What one batch gives.

    Attributes:
        per_sample: the losses, shape (B,).
        metrics: detached numbers to watch, scalars or one per sample (B,). The trainer averages each over the samples of a step, those that
            are NaN left out: NaN says that a sample has no such number (the loss at high noise of a sample that got little).
    """

    per_sample: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Phase:
    """One kind of update of an objective; phases run in their order, each on fresh batches.

    Attributes:
        name: what the phase is called in logs and checkpoints.
        networks: names of the networks whose parameters it updates.
        interval: it runs in every `interval`-th step (lazy regularisation).
        repeats: how often it runs in such a step (n_critic).
        optimizer: the phase before it whose optimiser, moments included, it shares; one of its own by default.
        settings: what differs from the recipe's `optimizer` for the optimiser of this phase, by the keys of `OptimizerConfig`.
    """

    name: str
    networks: tuple[str, ...]
    interval: int = 1
    repeats: int = 1
    optimizer: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
