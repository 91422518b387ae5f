"""StyleGAN's mapping network, from noise and class to the styles w, and the average style that truncation pulls to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.equalized import EqualizedLinear
from ..layers.ranks import mean_over_ranks
from .base import check_labels


def normalize_second_moment(x: Tensor) -> Tensor:
    """x / sqrt(mean x^2) over the last axis."""
    return x * (x.square().mean(dim=-1, keepdim=True) + 1e-8).rsqrt()


class MappingNetwork(nn.Module):
    """(B, z_dim) noise, (B,) labels -> (B, w_dim) styles.

    Args:
        num_layers: fully connected layers (8 in StyleGAN 1 and 2, 2 in StyleGAN3).
        lr_multiplier: the learning rate of these layers relative to the rest (0.01).
        w_avg_beta: decay of the average style; None for no average (a discriminator's mapping of classes).

    References: Karras et al. 2019, section 2, https://arxiv.org/abs/1812.04948; truncation: section 2 and appendix B
    """

    def __init__(
        self,
        z_dim: int,
        num_classes: int | None,
        w_dim: int,
        num_layers: int = 8,
        lr_multiplier: float = 0.01,
        w_avg_beta: float | None = 0.998,
    ) -> None:
        super().__init__()
        self.z_dim, self.num_classes, self.num_layers, self.w_avg_beta = z_dim, num_classes, num_layers, w_avg_beta
        if num_classes is not None:
            self.embed = EqualizedLinear(num_classes, w_dim)
        features = [z_dim + (0 if num_classes is None else w_dim)] + [w_dim] * num_layers
        for i, (a, b) in enumerate(zip(features[:-1], features[1:], strict=True)):
            setattr(self, f"fc{i}", EqualizedLinear(a, b, activation="lrelu", lr_multiplier=lr_multiplier))
        if w_avg_beta is not None:
            self.register_buffer("w_avg", torch.zeros(w_dim))

    def forward(self, z: Tensor | None, labels: Tensor | None = None, update_average: bool = False) -> Tensor:
        """z: (B, z_dim), or None for a mapping of classes alone; `update_average` moves `w_avg`, by the styles of all processes."""
        batch = len(labels) if z is None else len(z)
        labels = check_labels("MappingNetwork", labels, self.num_classes, batch, next(self.parameters()).device)
        parts = [] if z is None else [normalize_second_moment(z.float())]
        if labels is not None:
            parts.append(normalize_second_moment(self.embed(F.one_hot(labels, self.num_classes).float())))
        x = torch.cat(parts, dim=1)                                                                    # (B, z_dim + w_dim)
        for i in range(self.num_layers):
            x = getattr(self, f"fc{i}")(x)                                                             # (B, w_dim)
        if update_average and self.w_avg_beta is not None:
            mean = mean_over_ranks(x.detach().mean(0))
            self.w_avg.lerp_(mean.to(self.w_avg), 1 - self.w_avg_beta)
        return x

    def truncate(self, w: Tensor, psi: float | Tensor, cutoff: int | None = None) -> Tensor:
        """w (B, num_ws, w_dim) pulled towards the average: w_avg + psi (w - w_avg), in the first `cutoff` layers or in all."""
        if isinstance(psi, float) and psi == 1.0:
            return w
        truncated = self.w_avg.lerp(w, torch.as_tensor(psi, dtype=w.dtype, device=w.device))
        return truncated if cutoff is None else torch.cat([truncated[:, :cutoff], w[:, cutoff:]], dim=1)
