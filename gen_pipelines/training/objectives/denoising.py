"""Every objective of the diffusion and flow-matching family: one formula, four free choices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...processes import Parameterization
from ..random import Generators, normal, uniform
from .base import ObjectiveOutput
from .time_densities import Uniform, UniformLambda

_LIKELIHOOD = "likelihood"
_TINY = 1e-12


@dataclass(frozen=True)
class DenoisingObjective:
    """E_t E_eps w(t) |network(x_t, t) - target(x_0, eps, t)|^2, x_t = alpha(t) x_0 + sigma(t) eps, mean over the event.

    | method | path | prediction | time density | weighting |
    |---|---|---|---|---|
    | DDPM's simple loss (Ho et al. 2020, eq. 14) | discrete VP | epsilon | uniform | target |
    | v (Salimans & Ho 2022) | cosine | v_prediction | uniform | target |
    | score matching (Song et al. 2021, eq. 7) | VE, VP-SDE, sub-VP | score or epsilon | uniform | epsilon |
    | maximum likelihood (Song et al. 2021b, eq. 7; Kingma et al. 2021, eq. 17) | any | any | uniform | likelihood |
    | EDM (Karras et al. 2022, eq. 8) | EDM | edm | log-normal sigma | target |
    | flow matching (Lipman et al. 2023, eq. 23) | linear | flow_prediction | uniform | target |
    | Stable Diffusion 3 (Esser et al. 2024, eq. 19) | linear | flow_prediction | logit-normal | target |

    Attributes:
        parameterization: path, prediction, time input and preconditioning of the network.
        time_density: maps u in [0, 1) to a time (`time_densities.py`).
        weighting: None for weight one on the error of what the network predicts; a function of the SNR for the error of eps
            (`weightings.py`), which is converted; or "likelihood", the continuous-time variational bound's -1/2 dlog(snr)/dt (nats per
            dimension, up to terms without parameters; on a continuous path, with times uniform, or uniform in lambda: the same mean with
            much less variance, Song et al. 2021b, section 4.2).
        coupling: (x_0, eps, labels, uniform numbers) -> eps in another order (`MinibatchOTCoupling`): straighter flows; for velocities
            only, since noise that goes with its picture is no longer the noise that a score is about.
    """

    parameterization: Parameterization
    time_density: Callable[[Tensor, Parameterization], Tensor] = field(default_factory=Uniform)
    weighting: Callable[[Tensor], Tensor] | str | None = None
    coupling: Callable[..., Tensor] | None = None

    def __post_init__(self) -> None:
        if not self.parameterization.has_path:
            raise ValueError("DenoisingObjective: a network that jumps learns by distillation or consistency training, not by denoising.")
        if self.coupling is not None and self.parameterization.prediction != "flow_prediction":
            raise ValueError(f"DenoisingObjective: a coupling needs flow_prediction, got {self.parameterization.prediction!r}.")
        if self.parameterization.learned_variance:
            raise ValueError("DenoisingObjective trains no variance: that is what VariationalObjective is for.")
        if self.weighting == _LIKELIHOOD:
            if not isinstance(self.time_density, Uniform | UniformLambda) or self.parameterization.path.name == "discrete_vp":
                raise ValueError(
                    "DenoisingObjective: weighting 'likelihood' takes a continuous path, and times that are uniform or uniform_lambda."
                )
        elif isinstance(self.weighting, str):
            raise ValueError(f"DenoisingObjective: weighting is a function of the SNR, None or 'likelihood'; got {self.weighting!r}.")

    def __call__(
        self,
        model: Callable[[Tensor, Tensor, Any], Tensor],
        x_0: Tensor,
        *,
        condition: Any = None,
        generator: Generators = None,
    ) -> ObjectiveOutput:
        """One loss per sample.

        Args:
            model: (network's input, network's time (B,), condition) -> raw output, shape (B, *event).
            x_0: clean data, shape (B, *event).
            condition: passed through to `model`.
            generator: one, or one per sample; a sample draws its time first, then its noise.
        Returns: losses of shape (B,); metrics `loss_low_noise` and `loss_high_noise` split them at lambda = 0, NaN on the other side.
        """
        parameterization, path = self.parameterization, self.parameterization.path
        u = uniform((len(x_0), 1), generator, x_0.device)[:, 0]                                       # (B,)
        eps = normal(x_0.shape, generator, x_0.device)                                                # (B, *event)
        if self.coupling is not None:
            eps = self.coupling(x_0, eps, getattr(condition, "labels", None), uniform((len(x_0), 1), generator)[:, 0])
        t = self.time_density(u, parameterization)                                                    # (B,) float64, native time
        alpha, sigma = (_expand(value.to(x_0.dtype), x_0) for value in (path.alpha(t), path.sigma(t)))
        x_t = alpha * x_0 + sigma * eps
        network_time = parameterization.network_time(t).to(x_0.dtype)
        output = model(parameterization.scale_model_input(x_t, t), network_time, condition)
        target = parameterization.target(x_0, eps, t)
        error = (output.float() - target.float()).square().flatten(1).mean(1)                         # (B,)
        weight = self.weight(t)
        per_sample = error if weight is None else error * weight.to(error.dtype)
        noisy = (path.lambda_(t) < 0).to(error.device)
        detached = per_sample.detach()
        metrics = {
            "loss_low_noise": detached.masked_fill(noisy, torch.nan),
            "loss_high_noise": detached.masked_fill(~noisy, torch.nan),
        }
        return ObjectiveOutput(per_sample, metrics)

    def weight(self, t: Tensor) -> Tensor | None:
        """The weight on the squared error of the network's own target at native times `t`, shape (B,) float64; None is one everywhere."""
        if self.weighting is None:
            return None
        t, path = t.double(), self.parameterization.path
        # at the ends, snr 0 or infinity: the product of weight and factor has a limit there, inf / inf has none
        alpha, sigma = path.alpha(t).clamp_min(_TINY), path.sigma(t).clamp_min(_TINY)
        weight = self._bound_weight(t) if self.weighting == _LIKELIHOOD else self.weighting((alpha / sigma) ** 2)
        return weight / self._factor(t, alpha, sigma).square()

    def _bound_weight(self, t: Tensor) -> Tensor:
        """-1/2 dlog(snr)/dt over the density of t: the fall of lambda in all, where times are uniform in lambda."""
        path = self.parameterization.path
        if isinstance(self.time_density, UniformLambda):
            least, most = self.parameterization.trained_lambda_range
            return torch.full_like(t, most - least)
        low, high = self.parameterization.trained_t_range
        span = (torch.log(torch.tensor(high / low)) * t) if path.name in ("ve", "edm") else high - low  # 1 / density of t
        return (path.sigma_dot(t) / path.sigma(t).clamp_min(_TINY) - path.alpha_dot(t) / path.alpha(t).clamp_min(_TINY)) * span

    def _factor(self, t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """What an error of one in eps is in the target: at fixed x_t it is one of -sigma / alpha in x_0, and targets are linear."""
        return self.parameterization.target(-sigma / alpha, torch.ones_like(t), t)


def _expand(value: Tensor, like: Tensor) -> Tensor:
    return value.reshape(len(value), *[1] * (like.ndim - 1)).to(like.device)
