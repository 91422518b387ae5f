"""Guidance: which predictions a step needs, and how they become one.

A guidance is an object with `branches` and `combine`; a number is `ClassifierFreeGuidance`, and the guiders of diffusers are adapted.

Linear rules (classifier-free guidance) give the same whichever quantity they are applied to: at one x and one level, epsilon, x_0, v and
the velocity are affine in each other. Rules with a norm, a projection or a zero in them are not linear, so the quantity belongs to the
rule: adaptive projected guidance is defined on x_0, CFG-Zero* on the velocity. `Evaluation` converts, with the level and the coefficients
of the scheduler's own position, so a result depends on (x, lambda) and not on what the network outputs or on which scheduler asks.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from numbers import Real
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ..processes.level import Level
    from ..processes.parameterization import Affine, Parameterization

QUANTITIES = ("output", "epsilon", "sample", "velocity")


class Guidance(Protocol):
    """What a pipeline asks of a guidance. All branches of a step are evaluated in one batch.

    A guidance that depends on the level, or that acts on x_0, epsilon or the velocity, has `branches_at(at)` and `combine_at(outputs, at)`
    instead, where `at` is an `Evaluation`; each is asked for in place of its simpler form where it is there.
    """

    def branches(self, step: int, num_steps: int, timestep: Tensor) -> tuple[str, ...]:
        """The predictions that this step needs, each "cond" (the prompt) or "uncond" (the negative prompt)."""
        ...

    def combine(self, outputs: Sequence[Tensor]) -> Tensor:
        """One prediction from those of the branches, in their order, each (B, C, H, W), float32."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the network, as a guidance sees it.

    Args:
        x: the state in the coordinates of the network's path, (B, C, H, W), float32.
        timestep: the element of `scheduler.timesteps`, which is what the network is given.
        step, num_steps: the position among those of this call.
        level: (alpha, sigma) of x = alpha x_0 + sigma eps.
        affine: x_0 and eps as linear maps of x and the network's output.
        parameterization: what the network was trained to do.
    """

    x: Tensor
    timestep: Tensor
    step: int
    num_steps: int
    level: Level
    affine: Affine
    parameterization: Parameterization

    def _coefficients(self, quantity: str) -> tuple[float, float]:
        """(a, b) of quantity = a x + b output."""
        a = self.affine
        if quantity == "output":
            return 0.0, 1.0
        if quantity == "sample":
            return a.x_0_from_x, a.x_0_from_output
        if quantity == "epsilon" and self.level.alpha != 0.0:
            return a.eps_from_x, a.eps_from_output
        # at pure noise (alpha = 0) epsilon is x whatever the network says; the velocity takes its place there
        return a.eps_from_x - a.x_0_from_x, a.eps_from_output - a.x_0_from_output

    def read(self, output: Tensor, quantity: str) -> Tensor:
        """The network's output as "epsilon", "sample" (x_0) or "velocity" (eps - x_0); float32, (B, C, H, W)."""
        from_x, from_output = self._coefficients(quantity)
        return output if quantity == "output" else torch.add(from_x * self.x, output, alpha=from_output)

    def write(self, value: Tensor, quantity: str) -> Tensor:
        """The network's output that would have said so: the inverse of `read`."""
        from_x, from_output = self._coefficients(quantity)
        return value if quantity == "output" else torch.add(value, self.x, alpha=-from_x) / from_output


def evaluation(scheduler: Any, x: Tensor, timestep: Tensor, step: int, num_steps: int) -> Evaluation:
    """The evaluation at an element of `scheduler.timesteps`; it reads no tensor."""
    return Evaluation(x, timestep, step, num_steps, *scheduler.at(timestep), scheduler.parameterization)


def needed_branches(guidance: Guidance, at: Evaluation) -> tuple[str, ...]:
    """The branches that a guidance wants evaluated."""
    if hasattr(guidance, "branches_at"):
        return guidance.branches_at(at)
    return guidance.branches(at.step, at.num_steps, at.timestep)


def guided(guidance: Guidance, outputs: Sequence[Tensor], branches: Sequence[str], at: Evaluation) -> Tensor:
    """The guided output, (B, C', H, W), float32.

    Args:
        outputs: of the branches, in their order, each (B, C', H, W); C' = 2 C with a learned variance, which is not guided: that of the
            conditional branch is kept.
    """
    channels = at.x.shape[1]
    learned = outputs[0].shape[1] != channels
    predictions = [output[:, :channels] for output in outputs] if learned else outputs
    combined = guidance.combine_at(predictions, at) if hasattr(guidance, "combine_at") else guidance.combine(predictions)
    if not learned:
        return combined
    kept = outputs[list(branches).index("cond") if "cond" in branches else 0]
    return torch.cat([combined, kept[:, channels:]], dim=1)


@dataclass(frozen=True)
class ClassifierFreeGuidance:
    """uncond + scale (cond - uncond), where the papers' w is scale - 1. At 1 and at 0 only the branch that counts is evaluated.

    Args:
        scale: s.
        channels: how many channels, the first ones, are guided; the others are those of the conditional prediction. None for all. Published
            samples of DiT guide three of the four channels of their latents.
    Raises:
        ValueError: there would be no channel to guide.

    References: Ho & Salimans 2022, eq. 6, https://arxiv.org/abs/2207.12598; Peebles & Xie 2023, appendix A (three channels),
    https://arxiv.org/abs/2212.09748
    """

    scale: float = 7.5
    channels: int | None = None

    def __post_init__(self) -> None:
        if self.channels is not None and (not isinstance(self.channels, int) or self.channels < 1):
            raise ValueError(f"ClassifierFreeGuidance: channels={self.channels!r}; give how many channels are guided, or None for all.")

    def branches(self, step: int, num_steps: int, timestep: Tensor) -> tuple[str, ...]:
        if self.scale == 1.0:
            return ("cond",)
        return ("uncond",) if self.scale == 0.0 and self.channels is None else ("uncond", "cond")

    def combine(self, outputs: Sequence[Tensor]) -> Tensor:
        if len(outputs) == 1:
            return outputs[0]
        uncond, cond = outputs
        combined = torch.add(uncond, cond - uncond, alpha=self.scale)
        return combined if self.channels is None else torch.cat([combined[:, : self.channels], cond[:, self.channels :]], dim=1)


# ------------------------------------------------------------------------------------------------------------- guidance made of another


class _Around:
    """A guidance that passes on to another one what it does not change."""

    guidance: Any

    @property
    def hooks_network(self) -> bool:
        return getattr(self.guidance, "hooks_network", False)

    def around(self, denoiser: nn.Module) -> Any:
        return self.guidance.around(denoiser) if self.hooks_network else nullcontext()


@dataclass(frozen=True)
class GuidanceInterval(_Around):
    """Another guidance where low < sigma / alpha <= high, and the conditional prediction alone elsewhere.

    The bounds are noise levels, so the interval is the same under every scheduler and number of steps (the `start` and `stop` of diffusers'
    guiders count steps, here from the interval's first). On the linear path sigma / alpha is t / (1 - t).

    References: Kynkaanniemi et al. 2024, eq. 5, https://arxiv.org/abs/2404.07724

    Args:
        guidance: a number, a guidance or a guider of diffusers.
        low, high: of sigma / alpha.
    Raises:
        ValueError: the interval is empty.
    """

    guidance: Any = 7.5
    low: float = 0.0
    high: float = math.inf

    def __post_init__(self) -> None:
        object.__setattr__(self, "guidance", as_guidance(self.guidance))
        object.__setattr__(self, "_first", None)
        if not 0.0 <= self.low < self.high:
            raise ValueError(f"GuidanceInterval: 0 <= low < high must hold for sigma / alpha, got low={self.low}, high={self.high}.")

    def _inside(self, at: Evaluation) -> bool:
        ratio = math.inf if at.level.alpha == 0.0 else at.level.sigma / at.level.alpha
        return self.low < ratio <= self.high

    def _counted(self, at: Evaluation) -> Evaluation:
        """`at` with steps counted from the first inside: guiders with a memory clear it at their step 0."""
        return replace(at, step=at.step - self._first)

    def branches_at(self, at: Evaluation) -> tuple[str, ...]:
        inside = self._inside(at)
        object.__setattr__(self, "_asked", inside)
        if at.step == 0 or self._first is None:
            object.__setattr__(self, "_first", at.step if inside else None)
        return needed_branches(self.guidance, self._counted(at)) if inside else ("cond",)

    def combine_at(self, outputs: Sequence[Tensor], at: Evaluation) -> Tensor:
        return _combine(self.guidance, outputs, self._counted(at)) if self._inside(at) else outputs[0]

    def around(self, denoiser: nn.Module) -> Any:
        return super().around(denoiser) if self._asked else nullcontext()  # elsewhere the guider has nothing to hook


@dataclass(frozen=True)
class ClassifierGuidance(_Around):
    """Guidance by the gradient of a classifier on noisy data: eps - scale sigma grad_x log p(y | x_t, t), on any path.

    References: Dhariwal & Nichol 2021, algorithm 2 and eq. 14, https://arxiv.org/abs/2105.05233

    Args:
        log_prob: f(x_t, t) -> (B,), the log-probability of what is wanted, differentiable in x_t. x_t is (B, C, H, W), float32, in the
            coordinates of the network's path (latents for a latent pipeline); t is what the network is given, (B,).
        scale: of the gradient.
        guidance: what the gradient is added to: a number, a guidance or a guider of diffusers. 1 is the conditional prediction.
        parameterization: what the classifier was trained with where that is not what the network was: x_t and t are then its own at the
            same signal-to-noise ratio.
    Raises:
        TypeError: log_prob cannot be called.
        ValueError: in a call, log_prob did not return one differentiable number per picture.
    """

    log_prob: Callable[[Tensor, Tensor], Tensor]
    scale: float = 1.0
    guidance: Any = 1.0
    parameterization: Parameterization | None = None

    def __post_init__(self) -> None:
        if not callable(self.log_prob):
            raise TypeError(f"ClassifierGuidance: log_prob must be a function of (x_t, t), got a {type(self.log_prob).__name__}.")
        if not math.isfinite(self.scale):
            raise ValueError(f"ClassifierGuidance: scale must be finite, got {self.scale}.")
        object.__setattr__(self, "guidance", as_guidance(self.guidance))

    def branches_at(self, at: Evaluation) -> tuple[str, ...]:
        return needed_branches(self.guidance, at)

    def gradient(self, at: Evaluation) -> Tensor:
        """grad_x log p(y | x_t, t) with respect to the state, (B, C, H, W)."""
        theirs = self.parameterization
        with torch.enable_grad():
            x = at.x.detach().requires_grad_()
            if theirs is None:
                seen, t = x, at.timestep
            else:
                low, high = theirs.trained_lambda_range
                time = theirs.path.t_from_lambda(min(max(at.level.lambda_, low), high))
                seen, t = x * (theirs.path.level(float(time)).sigma / at.level.sigma), theirs.network_time(float(time))
            t = torch.as_tensor(t, device=x.device).reshape(-1).expand(len(x))
            log_p = self.log_prob(seen, t)
            if not isinstance(log_p, Tensor) or tuple(log_p.shape) != (len(x),) or not log_p.requires_grad:
                got = f"shape {tuple(log_p.shape)}" if isinstance(log_p, Tensor) else f"a {type(log_p).__name__}"
                got += " without a gradient" if isinstance(log_p, Tensor) and not log_p.requires_grad else ""
                raise ValueError(f"ClassifierGuidance: log_prob must return ({len(x)},), one number per picture, from x_t; got {got}.")
            return torch.autograd.grad(log_p.sum(), x)[0]

    def combine_at(self, outputs: Sequence[Tensor], at: Evaluation) -> Tensor:
        output = _combine(self.guidance, outputs, at)
        if self.scale == 0.0 or at.level.alpha == 0.0:  # pure noise says nothing about y: its gradient is zero
            return output
        return torch.add(output, self.gradient(at), alpha=-self.scale * at.level.sigma / at.affine.eps_from_output)


def _combine(guidance: Guidance, outputs: Sequence[Tensor], at: Evaluation) -> Tensor:
    return guidance.combine_at(outputs, at) if hasattr(guidance, "combine_at") else guidance.combine(outputs)


# ---------------------------------------------------------------------------------------------------------------- guiders of diffusers

# what a nonlinear rule is defined on in its paper; linear ones are the same on any
_DEFINED_ON = {
    "AdaptiveProjectedGuidance": "sample",  # Sadat et al. 2024, section 4, https://arxiv.org/abs/2410.02416
    "AdaptiveProjectedMixGuidance": "sample",
    "FrequencyDecoupledGuidance": "sample",  # Sadat et al. 2025, https://arxiv.org/abs/2506.19713
    "ClassifierFreeZeroStarGuidance": "velocity",  # Fan et al. 2025, https://arxiv.org/abs/2503.18886
    "MagnitudeAwareGuidance": "velocity",  # Zhu et al. 2025, https://arxiv.org/abs/2508.03442
    "TangentialClassifierFreeGuidance": "epsilon",  # a multiple of the score: Kwon et al. 2025, https://arxiv.org/abs/2503.18137
}

# whose norm over all dimensions of a picture is one that torch takes over a single dimension only
_FLAT = ("MagnitudeAwareGuidance",)

_REFUSED = {
    "LTX2Guidance": "its further passes are switched by arguments of one video network's forward; use ClassifierFreeGuidance",
    "BaseGuidance": "it is only the base of the others",
}


class DiffusersGuidance:
    """A guider of diffusers (`diffusers.guiders`): classifier-free, adaptive projected, zero-star, tangential, skip-layer, ...

    A guider that hooks the network (`prepare_models`) is given one forward pass per branch instead of one batch.

    Args:
        guider: it is copied; the copy keeps the state of a run.
        on: what the guider's rule acts on: "sample" (x_0), "epsilon", "velocity" (eps - x_0), or "output", the network's output as it is,
            which is what diffusers' own pipelines do. By default what the rule's paper defines it on; "output" for the linear rules and for
            `guidance_rescale` (Lin et al. 2023, section 3.4, https://arxiv.org/abs/2305.08891).
    Raises:
        ValueError: this guider cannot work here, with the reason.
    """

    def __init__(self, guider: Any, on: str | None = None) -> None:
        name = type(guider).__name__
        if name in _REFUSED:
            raise ValueError(f"{name} of diffusers cannot guide here: {_REFUSED[name]}.")
        if on is not None and on not in QUANTITIES:
            raise ValueError(f"DiffusersGuidance: on must be one of {', '.join(QUANTITIES)}, got {on!r}.")
        self._guider = copy.deepcopy(guider)
        self.on = on or next((_DEFINED_ON[c.__name__] for c in type(guider).__mro__ if c.__name__ in _DEFINED_ON), "output")
        self._batches: list[Any] = []
        self._next = 0

    @property
    def hooks_network(self) -> bool:
        from diffusers.guiders.guider_utils import BaseGuidance

        return type(self._guider).prepare_models is not BaseGuidance.prepare_models

    def branches(self, step: int, num_steps: int, timestep: Tensor) -> tuple[str, ...]:
        self._guider.set_state(step=step, num_inference_steps=num_steps, timestep=timestep)
        self._batches = self._guider.prepare_inputs({"branch": ("cond", "uncond")})
        self._next = 0
        return tuple(batch.branch for batch in self._batches)

    @contextmanager
    def around(self, denoiser: nn.Module) -> Iterator[None]:
        """Entered once per branch, in order."""
        # The guiders know a pass by counting the calls of `prepare_models`: 1 is the conditional, 2 the unconditional, 3 the perturbed one.
        # Two passes without the unconditional one are miscounted there, and SmoothedEnergyGuidance does not count at all.
        batch = self._batches[self._next]
        number = {"pred_cond": 1, "pred_uncond": 2}.get(getattr(batch, self._guider._identifier_key), 3)
        self._next += 1
        self._guider._count_prepared = number - 1
        self._guider.prepare_models(denoiser)
        if self._guider._count_prepared != number:
            self._guider._count_prepared = number
            self._guider.prepare_models(denoiser)
        try:
            yield
        finally:
            self._guider._count_prepared = number
            self._guider.cleanup_models(denoiser)

    def combine(self, outputs: Sequence[Tensor]) -> Tensor:
        flat = any(c.__name__ in _FLAT for c in type(self._guider).__mro__)
        for batch, output in zip(self._batches, outputs, strict=True):
            batch.noise_pred = output.flatten(1) if flat else output
        return self._guider(self._batches).pred.reshape(outputs[0].shape)

    def combine_at(self, outputs: Sequence[Tensor], at: Evaluation) -> Tensor:
        if self.on == "output" or (len(outputs) == 1 and self.on != "velocity"):
            return self.combine(outputs)  # one branch is passed on as it is, but for the zeros of CFG-Zero*
        return at.write(self.combine([at.read(output, self.on) for output in outputs]), self.on)


def as_guidance(guidance: Any) -> Guidance:
    """A guidance from a number, one of our objects, or a guider of diffusers.

    At 1 there is no guidance, nor at 0, which diffusers' users write for it; between them the formula holds as above 1 (diffusers: no
    guidance up to 1). For the formula at 0, which is the negative prompt alone, pass ClassifierFreeGuidance(0.0).

    Raises:
        ValueError: the number is not finite or negative; the guider cannot work here.
        TypeError: it is none of these.
    """
    if isinstance(guidance, Real) and not isinstance(guidance, bool):
        if not math.isfinite(guidance) or guidance < 0:
            raise ValueError(f"guidance_scale must be a finite number of at least 0 (1 and 0: no guidance), got {guidance}.")
        return ClassifierFreeGuidance(float(guidance) or 1.0)
    if all(any(hasattr(guidance, name + suffix) for suffix in ("", "_at")) for name in ("branches", "combine")):
        return guidance
    if hasattr(guidance, "prepare_inputs") and hasattr(guidance, "set_state"):
        return DiffusersGuidance(guidance)
    raise TypeError(
        f"guidance_scale must be a number, an object with branches(...) and combine(...), or a guider of diffusers; "
        f"got a {type(guidance).__name__}."
    )
