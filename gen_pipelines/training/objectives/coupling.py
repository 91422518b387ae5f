"""Which noise goes with which picture of a batch: paired so that the paths between them are short, and so nearly straight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MinibatchOTCoupling:
    """Optimal transport between the pictures and the noises of a batch: the noises are handed out anew.

    Attributes:
        method: "exact" (the assignment of least squared distance; SciPy) or "sinkhorn" (a draw from the plan with entropy, on any device).
        regularization: of Sinkhorn's plan, in units of the mean squared distance.
        iterations: of Sinkhorn.
        within_labels: pair only within a class: with a conditional network, pairs across classes would tell it what its condition does not
            (the noise of a class would no longer be normal).

    A batch is one process's: more processes pair in smaller groups.

    References: Pooladian et al. 2023, section 3, https://arxiv.org/abs/2304.14772; Tong et al. 2024, section 3.2.4,
    https://arxiv.org/abs/2302.00482
    """

    method: str = "exact"
    regularization: float = 0.05
    iterations: int = 100
    within_labels: bool = True

    def __post_init__(self) -> None:
        if self.method not in ("exact", "sinkhorn"):
            raise ValueError(f"MinibatchOTCoupling: method {self.method!r} is none of exact, sinkhorn.")
        if not self.regularization > 0 or self.iterations < 1:
            raise ValueError(f"MinibatchOTCoupling: regularization {self.regularization} and iterations {self.iterations} must be above 0.")

    @torch.no_grad()
    def __call__(self, x_0: Tensor, eps: Tensor, labels: Tensor | None = None, draws: Tensor | None = None) -> Tensor:
        """The noises (B, *event) in the order of their pictures (B, *event).

        Args:
            labels: classes, (B,); used with `within_labels`.
            draws: uniform numbers (B,), from which Sinkhorn's plan chooses; 0.5 by default.
        """
        order = torch.arange(len(x_0), device=x_0.device)
        draws = torch.full((len(x_0),), 0.5) if draws is None else draws
        groups = [order.clone()]
        if labels is not None and self.within_labels:
            groups = [(labels == label).nonzero()[:, 0] for label in labels.unique()]
        for group in groups:
            cost = torch.cdist(x_0[group].flatten(1).double(), eps[group].flatten(1).double()).square()
            order[group] = group[self._assign(cost, draws.to(cost)[group])]
        return eps[order]

    def _assign(self, cost: Tensor, draws: Tensor) -> Tensor:
        """Column of each row, (n,)."""
        if self.method == "exact":
            from scipy.optimize import linear_sum_assignment

            return torch.as_tensor(linear_sum_assignment(cost.cpu().numpy())[1], device=cost.device)
        kernel = -cost / (self.regularization * cost.mean().clamp_min(1e-12))
        rows, columns = torch.zeros(len(cost), dtype=cost.dtype, device=cost.device), torch.zeros_like(kernel[0])
        for _ in range(self.iterations):
            rows = -(kernel + columns).logsumexp(1)
            columns = -(kernel + rows[:, None]).logsumexp(0)
        plan = (kernel + rows[:, None] + columns).softmax(1)
        return torch.searchsorted(plan.cumsum(1), draws[:, None].clamp(max=1 - 1e-9)).clamp(max=len(cost) - 1)[:, 0]
