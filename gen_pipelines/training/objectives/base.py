"""What an objective is: a callable from (networks, batch) to one loss per sample. It knows no devices, optimisers or logs."""

from dataclasses import dataclass, field

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
    """One optimiser of an objective.

    Attributes:
        name: what the phase is called in logs and checkpoints.
        networks: names of the networks whose parameters it updates.
        interval: it runs in every `interval`-th step (lazy regularisation).
        repeats: how often it runs in such a step, on fresh batches (n_critic).
    """

    name: str
    networks: tuple[str, ...]
    interval: int = 1
    repeats: int = 1
