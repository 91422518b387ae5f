"""Latent consistency distillation: a guided teacher's flow, learned as a jump to its end on a coarse grid of times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...processes import Parameterization
from ..random import Generators, normal, uniform
from .base import ObjectiveOutput
from .consistency import pseudo_huber, same_dropout

Network = Callable[[Tensor, Tensor, Any], Tensor]


@dataclass(frozen=True)
class LatentConsistencyDistillation:
    """d(f(x_(t_n), t_n), f'(x', t_(n-1))), x' where the teacher's guided flow leads from t_n; f(x, t) = c_skip(t) x + c_out(t) x_0(x, t).

    Student and teacher predict the same thing on the same path, so the student begins as the teacher; f(x, 0) = x by its coefficients. The
    grid has `num_nodes` times, so that a pair is one DDIM step of 1000 / num_nodes training steps (the paper's skipping interval).

    Attributes:
        parameterization: of both networks; a discrete path, or one whose time ends at 1.
        num_nodes: times of the grid; the scheduler's `original_inference_steps`.
        timestep_scaling, sigma_data: of the coefficients, c_skip = sd^2 / ((scaling i)^2 + sd^2), i an index out of 1000.
        huber: c of the pseudo-Huber distance.

    References: Luo et al. 2023, algorithm 1 and eqs. 9, 13 and 16, https://arxiv.org/abs/2310.04378
    """

    parameterization: Parameterization
    num_nodes: int = 50
    timestep_scaling: float = 10.0
    sigma_data: float = 0.5
    huber: float = 0.001

    def __post_init__(self) -> None:
        p = self.parameterization
        if p.path.name in ("ve", "edm") or p.prediction == "consistency":
            raise ValueError(
                f"LatentConsistencyDistillation: a denoiser with a training index or a time up to 1; got {p.prediction!r} on "
                f"{p.path.name!r}. ConsistencyDistillation takes the others."
            )
        most = int(p.path.t_max) + 1 if p.path.name == "discrete_vp" else 1000
        if not 2 <= self.num_nodes <= most:
            raise ValueError(f"LatentConsistencyDistillation: num_nodes {self.num_nodes}; give 2 to {most}.")

    def times(self) -> tuple[Tensor, Tensor]:
        """(t_n, t_(n-1)) of every pair, ascending, each (num_nodes,) float64 in the path's native time."""
        path, number = self.parameterization.path, torch.arange(1, self.num_nodes + 1, dtype=torch.float64)
        if path.name == "discrete_vp":
            skip = path.num_train_timesteps // self.num_nodes
            upper, step = number * skip - 1, float(skip)
        else:
            step = path.t_max / self.num_nodes
            upper = number * step
        high = self.parameterization.trained_t_range[1]
        return upper.clamp(max=high), (upper - step).clamp_min(0.0 if path.name == "discrete_vp" else path.t_min)

    def boundary(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(c_skip, c_out) at native times, (B,): eq. 9's coefficients."""
        path = self.parameterization.path
        scaled = t * self.timestep_scaling * (1.0 if path.name == "discrete_vp" else 1000 / path.t_max)
        return self.sigma_data**2 / (scaled**2 + self.sigma_data**2), scaled / (scaled**2 + self.sigma_data**2).sqrt()

    def jump(self, network: Network, x: Tensor, t: Tensor, condition: Any) -> Tensor:
        """f(x, t): where the flow through x (B, *event) at native times t (B,) begins."""
        p = self.parameterization.with_(clip_sample=False, thresholding=False)
        x_0, _ = self._predict(network, p, x, t, condition)
        c_skip, c_out = (_expand(c, x).to(x_0.dtype) for c in self.boundary(t))
        return c_skip * x + c_out * x_0

    def step(self, teacher: Network, x: Tensor, t: Tensor, there: Tensor, condition: Any) -> Tensor:
        """The teacher's DDIM step from times t to `there`, each (B,)."""
        path = self.parameterization.path
        x_0, eps = self._predict(teacher, self.parameterization, x, t, condition)
        alpha, sigma = (_expand(value, x).to(x_0.dtype) for value in (path.alpha(there), path.sigma(there)))
        return alpha * x_0 + sigma * eps

    @staticmethod
    def _predict(network: Network, p: Parameterization, x: Tensor, t: Tensor, condition: Any) -> tuple[Tensor, Tensor]:
        output = network(x, p.network_time(t).to(x.dtype), condition)
        return p.denoise(output.to(torch.promote_types(output.dtype, torch.float32)), x, t)

    def __call__(
        self,
        model: Network,
        x_0: Tensor,
        *,
        teacher: Network,
        target: Network | None = None,
        condition: Any = None,
        generator: Generators = None,
    ) -> ObjectiveOutput:
        """Losses (B,).

        Args:
            model: (network's input, network's time (B,), condition) -> raw output: the student.
            x_0: clean latents (B, *event).
            teacher: called like `model`; guidance is inside it.
            target: a moving average of `model`, for the lower point; `model` itself by default.
            condition: passed through to all of them.
            generator: one, or one per sample; a sample draws its node first, then its noise.
        """
        path = self.parameterization.path
        u = uniform((len(x_0), 1), generator, x_0.device)[:, 0]                                       # (B,)
        noise = normal(x_0.shape, generator, x_0.device)                                              # (B, *event)
        node = (u.double() * self.num_nodes).long().clamp(max=self.num_nodes - 1)
        upper, lower = (times.to(x_0.device)[node] for times in self.times())
        alpha, sigma = (_expand(value, x_0).to(x_0.dtype) for value in (path.alpha(upper), path.sigma(upper)))
        x = alpha * x_0 + sigma * noise
        with torch.no_grad():
            before = self.step(teacher, x, upper, lower, condition)
        replay = same_dropout(x_0.device)
        f = self.jump(model, x, upper, condition)
        with torch.no_grad(), replay():
            aim = self.jump(target or model, before, lower, condition)
        distance = pseudo_huber(f - aim, self.huber)
        return ObjectiveOutput(distance, {"distance": (f - aim).detach().square().flatten(1).mean(1)})


def _expand(value: Tensor, like: Tensor) -> Tensor:
    return value.reshape(len(value), *[1] * (like.ndim - 1)).to(like.device)
