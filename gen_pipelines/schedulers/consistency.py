"""Consistency sampling: one step, several, Latent Consistency Models' rule and TCD's gamma."""

import math
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..processes.discrete_vp import DiscreteVPPath
from ..processes.grids import Grid, GridOptions, check_steps
from ..processes.level import Level
from ..processes.ve import VEPath
from .base import VP_NETWORK, GaussianScheduler, SchedulerMixin, SchedulerOutput, Stage, combine, owned
from .updates import first_order_update, raise_level

__all__ = ["RULES", "ConsistencyScheduler", "lcm_scalings", "renoise"]

RULES = ("consistency", "lcm", "tcd")
_CLASSES = {"LCMScheduler": "lcm", "TCDScheduler": "tcd", "CMStochasticIterativeScheduler": "consistency"}


def renoise(x_0: Tensor, there: Level, noise: Tensor | None, boundary_ratio: float = 0.0, noise_scale: float = 1.0) -> Tensor:
    """Noise a clean sample to a level: alpha x_0 + sqrt(sigma^2 - (alpha eps)^2) z.

    Args:
        x_0: the consistency function's value, shape (B, *event): data with the noise of the boundary left in it.
        there: the level to reach.
        noise: standard normal, same shape; required where `there` is noisier than the boundary.
        boundary_ratio: sigma / alpha at the boundary (the paper's eps).
        noise_scale: multiplies the noise (diffusers' s_noise).
    Returns: shape (B, *event).
    References: Song et al. 2023, algorithm 1, https://arxiv.org/abs/2303.01469
    """
    variance = there.sigma**2 - (there.alpha * boundary_ratio) ** 2
    if variance <= 0.0:
        return combine(there.alpha, x_0, 0.0, x_0)
    return torch.add(x_0 * there.alpha, noise, alpha=noise_scale * math.sqrt(variance))


def lcm_scalings(index: float, timestep_scaling: float = 10.0, sigma_data: float = 0.5) -> tuple[float, float]:
    """(c_skip, c_out) of a Latent Consistency Model at a training index: the consistency function is c_skip x + c_out x_0.

    References: Luo et al. 2023, eq. 9 and appendix, https://arxiv.org/abs/2310.04378
    """
    scaled = index * timestep_scaling
    return sigma_data**2 / (scaled**2 + sigma_data**2), scaled / math.hypot(scaled, sigma_data)


class ConsistencyScheduler(GaussianScheduler, SchedulerMixin):
    """Jump to data, noise the result to the next node, jump again: for networks that were trained or distilled to jump.

    On a diffusion network the jump is E[x_0 | x], and what comes out has another distribution than the data: allowed, with one warning.

    Args:
        rule: `consistency` (the network's x_0 is the jump), `lcm` (with Latent Consistency Models' boundary scalings), `tcd` (a DDIM move
            to a cleaner level, then noise up to the node), or None: `consistency`, with a warning where the network does not predict
            `consistency`. LCM's and TCD's networks look like any epsilon network but for `jumps` in their parameterization; configs of
            diffusers' classes set both by their `_class_name`.
        original_inference_steps: with `lcm` and `tcd` on discrete paths, the grid that the network was distilled on; the nodes are chosen
            from it.
        timestep_scaling: with `lcm`, of the index in the boundary scalings.
        s_noise: scale of the noise.

    References: Song et al. 2023, algorithm 1, https://arxiv.org/abs/2303.01469; Luo et al. 2023, https://arxiv.org/abs/2310.04378;
    Zheng et al. 2024, algorithm 2, https://arxiv.org/abs/2402.19159
    """

    solver_defaults: ClassVar[dict[str, Any]] = {
        "rule": None,
        "original_inference_steps": 50,
        "timestep_scaling": 10.0,
        "s_noise": 1.0,
    }
    grid_defaults: ClassVar[dict[str, Any]] = {"timestep_spacing": "trailing"}
    network_defaults: ClassVar[dict[str, Any]] = {
        **VP_NETWORK,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
    }
    round_timesteps = True
    jumps = True

    @classmethod
    def from_config(cls, config: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in `GaussianScheduler.from_config`; the rule comes from diffusers' class name.

        Raises:
            ValueError: as there; and a config with LCM's and TCD's keys that says neither the class nor the rule (in memory diffusers' have
                no class name).
        """
        if isinstance(config, dict) and "rule" not in config and "rule" not in kwargs:
            name = config.get("_class_name")
            if name in _CLASSES:
                kwargs["rule"] = _CLASSES[name]
            elif name is None and "original_inference_steps" in config:
                raise ValueError(
                    f"{cls.__name__}.from_config: the config fits LCMScheduler and TCDScheduler and says neither; pass rule='lcm' or "
                    "rule='tcd'."
                )
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def _rule(self) -> str:
        rule = self.config["rule"]
        if rule is not None and rule not in RULES:
            raise ValueError(f"{type(self).__name__}: rule {rule!r} is not known; use None or one of {', '.join(RULES)}.")
        if rule == "lcm" and isinstance(self.parameterization.path, VEPath):
            raise ValueError(f"{type(self).__name__}: rule 'lcm' needs a training index, which a VE network has not; use 'consistency'.")
        return rule or "consistency"

    def grid_options(self) -> GridOptions:
        """The grid that the config asks for; on the linear path equal steps, of which the last ends in data."""
        options, p = super().grid_options(), self.parameterization
        if p.path.name != "linear" or p.lambda_range is not None or self.config.get("timestep_spacing") is not None:
            return options
        return GridOptions(**{**options.__dict__, "timestep_spacing": "trailing"})

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
        mu: float | None = None,
    ) -> None:
        """Lay the grid and compute every coefficient on it; arguments and errors as in `GaussianScheduler.set_timesteps`.

        Raises:
            ValueError: also more steps than `original_inference_steps` with `lcm` and `tcd` on a discrete path.
        """
        p, rule = self.parameterization, self._rule()
        if self.config["rule"] is None and p.has_path and not self.__dict__.get("_warned"):
            self._warned = True
            warnings.warn(
                f"{type(self).__name__} on a network that predicts {p.prediction}: the consistency rule is for networks trained to jump to "
                "data in one evaluation; on this one it gives samples of another distribution (means of x_0 in place of draws). Use an ODE "
                "solver, or say rule='lcm' or 'tcd' if the network was distilled so.",
                stacklevel=2,
            )
        check_steps(num_inference_steps)
        if num_inference_steps is not None and timesteps is None and sigmas is None:
            n = int(num_inference_steps)
            if rule != "consistency" and isinstance(p.path, DiscreteVPPath):
                timesteps = self._distilled_nodes(n)
            elif isinstance(p.path, VEPath):  # Karras et al.'s eq. 5 with the end left out: there the function is the identity
                low, high, rho = *p.trained_t_range, self.grid_options().rho
                sigmas = [(high ** (1 / rho) + i / n * (low ** (1 / rho) - high ** (1 / rho))) ** rho for i in range(n)] + [0.0]
        super().set_timesteps(num_inference_steps, device, timesteps, sigmas, mu)

    def _distilled_nodes(self, n: int) -> list[float]:
        p, original = self.parameterization, self.config["original_inference_steps"]
        count = p.path.num_train_timesteps
        if not n <= original <= count:
            raise ValueError(
                f"{type(self).__name__}.set_timesteps: {n} steps of original_inference_steps = {original} and {count} training steps; each "
                "must be at most the next."
            )
        index = np.arange(1, original + 1)[::-1] * (count // original) - 1
        chosen = index[np.floor(np.linspace(0, original, n, endpoint=False)).astype(int)]
        return [float(p.network_time(float(i))) for i in chosen]

    def plan(self, grid: Grid) -> list[Stage]:
        """One stage per node; `data` is LCM's (c_skip, c_out). TCD ends at index 0 of a discrete path, as it was trained."""
        stages, p, rule = super().plan(grid), self.parameterization, self._rule()
        if rule == "lcm":
            unit = 1.0 if isinstance(p.path, DiscreteVPPath) else 1000 / p.path.t_max
            for stage in stages:
                stage.data = lcm_scalings(stage.t * unit, self.config["timestep_scaling"])
        if rule == "tcd" and isinstance(p.path, DiscreteVPPath):
            stages[-1].there = p.path.level(0.0)
        self._kind, self._cleaner = rule, {}
        self._boundary = p.boundary_sigma if p.prediction == "consistency" else 0.0
        return stages

    def _cleaner_levels(self, gamma: float) -> list[Level]:
        """TCD's level s = (1 - gamma) t of every stage, rounded down on discrete paths."""
        if gamma not in self._cleaner:
            if not 0.0 <= gamma <= 1.0:
                raise ValueError(f"{type(self).__name__}.step: eta (TCD's gamma) = {gamma}; give a number from 0 to 1.")
            path, times = self._network.path, [s.t for s in self._stages[1:]]
            discrete = isinstance(path, DiscreteVPPath)
            targets = [math.floor((1 - gamma) * t) if discrete else max((1 - gamma) * t, path.t_min) for t in times]
            self._cleaner[gamma] = [*(path.level(float(t)) for t in targets), self._stages[-1].there]
        return self._cleaner[gamma]

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        eta: float = 0.3,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """One step.

        Args:
            model_output: the network's output, shape (B, C, *), or (B, 2 C, *) with a learned variance.
            timestep: the element of `timesteps` that the network was given.
            sample: the state, shape (B, C, *).
            eta: TCD's gamma: 0 is deterministic, 1 draws the whole noise anew; the other rules draw it anew always.
            generator: one, or one per sample.
            return_dict: False gives the tuple (prev_sample, pred_original_sample).
        """
        i = self._begin(timestep)
        stage, last = self._stages[i], i == len(self._stages) - 1
        if self._kind == "tcd":
            x_0, eps = self._predict(model_output, sample, i, consistent=False)
            cleaner = self._cleaner_levels(eta)[i]
            prev = first_order_update(x_0, eps, cleaner) if cleaner.sigma > 0.0 else owned(x_0, model_output)
            if eta > 0.0 and not last:
                prev = raise_level(prev, cleaner, stage.there, self._noise(prev, generator), self.config["s_noise"])
            return self._end(prev, x_0, sample, i, return_dict)
        output, x, _ = self._split(model_output, sample)
        x_0 = self._x_0(output, x, i)
        if self._kind == "lcm":
            c_skip, c_out = stage.data
            x_0 = combine(c_skip, x, c_out, x_0)
        if last:
            return self._end(owned(x_0, model_output), x_0, sample, i, return_dict)
        prev = renoise(x_0, stage.there, self._noise(x_0, generator), self._boundary, self.config["s_noise"])
        return self._end(prev, x_0, sample, i, return_dict)
