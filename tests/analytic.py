"""Problems with a closed-form answer: Gaussian data, for which the ideal network of every parameterization is known."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gen_pipelines.processes import CosinePath, DiscreteVPPath, EDMPath, LinearPath, Parameterization

__all__ = ["GAUSSIAN", "NETWORKS", "GaussianData", "sample"]


@dataclass(frozen=True)
class GaussianData:
    """x_0 ~ N(mean, std^2) in every coordinate, independently."""

    mean: float = 0.5
    std: float = 0.3

    def x_0(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """E[x_0 | x] at x = alpha x_0 + sigma eps."""
        gain = alpha * self.std**2 / ((alpha * self.std) ** 2 + sigma**2)
        return self.mean + gain * (x - alpha * self.mean)

    def network(self, p: Parameterization):
        """The ideal network: (scaled input, network time) -> output."""

        def predict(scaled: Tensor, network_time: Tensor | float) -> Tensor:
            t = float(p.path_time(float(network_time)))
            t = min(max(t, p.path.t_min), p.path.t_max)  # float32 network times may round over the end
            level = p.path.level(t)
            x = scaled / p.input_scale(level)
            x_0 = self.x_0(x, *level)
            eps = (x - level.alpha * x_0) / level.sigma
            return p.target(x_0, eps, t)

        return predict

    def ode(self, x: Tensor, here, there) -> Tensor:
        """The probability-flow ODE's solution: quantiles are kept."""
        spread = [math.sqrt((level.alpha * self.std) ** 2 + level.sigma**2) for level in (here, there)]
        return there.alpha * self.mean + (x - here.alpha * self.mean) * spread[1] / spread[0]


GAUSSIAN = GaussianData()

# the kinds of network in use, each with the scheduler config keys of its grid
NETWORKS: dict[str, tuple[Parameterization, dict]] = {
    "sd_eps": (
        Parameterization(DiscreteVPPath(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")),
        {"timestep_spacing": "leading", "steps_offset": 1},
    ),
    "ddpm_eps": (Parameterization(DiscreteVPPath()), {}),
    "cosine_x_0": (Parameterization(DiscreteVPPath(beta_schedule="squaredcos_cap_v2"), "sample"), {}),
    "zero_snr_v": (
        Parameterization(
            DiscreteVPPath(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True), "v_prediction"
        ),
        {"timestep_spacing": "trailing"},
    ),
    "sd3_flow": (Parameterization(LinearPath(), "flow_prediction"), {"shift": 3.0}),
    "plain_flow": (Parameterization(LinearPath(), "flow_prediction", time_input="t"), {}),
    "edm": (Parameterization(EDMPath(), "edm", sigma_data=0.5), {}),
    "vp_cosine_v": (Parameterization(CosinePath(), "v_prediction"), {}),
}


def sample(scheduler, network, shape=(4096,), steps: int | None = 100, generator=None, x=None, dtype=torch.float64, **kwargs) -> Tensor:
    """The one loop that serves every scheduler; the state starts from noise, or from `x`."""
    if steps is not None:
        scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    if x is None:
        x = torch.randn(shape, generator=generator, dtype=dtype) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x, generator=generator, **kwargs).prev_sample
    return x
