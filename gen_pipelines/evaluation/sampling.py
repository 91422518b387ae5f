"""Pictures of a pipeline by their number: picture i depends on the seed and on i, not on batches, processes or interruptions."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..schedulers import choose_scheduler, parse_scheduler, scheduler_name, scheduler_settings
from ..training.random import sample_generators

# an option of an evaluation -> the argument of a pipeline's call
ARGUMENTS = {"steps": "num_inference_steps", "guidance": "guidance_scale", "temperature": "temperature", "truncation": "truncation"}


@dataclass
class Drawn:
    """One batch: pictures (B, C, H, W), float in [0, 1] or not finite; seconds for all; network evaluations for each."""

    pictures: Tensor
    seconds: float
    evaluations: float


class Sampler:
    """A pipeline with the settings that it is evaluated with.

    Args:
        pipe: any pipeline that draws with `batch_size`, with classes or from prompts.
        seed: of the whole evaluation.
        scheduler: as `choose_scheduler` takes it ("ddim", "score_sde:correct_steps=1"), or None for the pipeline's own.
        options: steps, guidance, temperature, truncation; None where the pipeline decides.
    Raises:
        ValueError: a setting that the pipeline does not have.
    """

    def __init__(self, pipe: Any, seed: int, scheduler: str | None = None, **options: Any) -> None:
        self.pipe, self.seed = pipe, seed
        self.takes = inspect.signature(type(pipe).__call__).parameters
        kind = type(pipe).__name__
        if not {"batch_size", "prompt"} & set(self.takes):
            raise ValueError(f"evaluate: a {kind} draws neither batch_size pictures nor prompts, so it cannot be evaluated.")
        self._said: dict[str, Any] = {}
        if scheduler is not None:
            pipe.scheduler = choose_scheduler(pipe, scheduler)
            self._said = parse_scheduler(scheduler)[1]
        self.options = {}
        for name, value in options.items():
            if value is None:
                continue
            if name not in ARGUMENTS or ARGUMENTS[name] not in self.takes:
                raise ValueError(f"{name}: a {kind} has no {name}; leave it out.")
            self.options[ARGUMENTS[name]] = value

    @property
    def num_classes(self) -> int | None:
        """Classes that the pipeline can be asked for."""
        if "class_labels" not in self.takes:
            return None
        if (count := getattr(self.pipe, "num_classes", None)) is not None:
            return count
        generator = getattr(self.pipe, "generator", None)
        return generator.config.get("num_classes") if generator is not None else None

    @property
    def takes_prompts(self) -> bool:
        """Whether it draws from captions."""
        return "prompt" in self.takes

    def draw(self, numbers: Sequence[int], labels: Sequence[int] | None = None, captions: Sequence[str] | None = None) -> Drawn:
        """The pictures of these numbers.

        Args:
            labels, captions: one per picture, where the pipeline takes them.
        """
        options = dict(self.options)
        if self.takes_prompts:
            options["prompt"] = list(captions or [])
        elif labels is not None:
            options["class_labels"] = list(labels)
        else:
            options["batch_size"] = len(numbers)
        generators = sample_generators(self.seed, "sampling", numbers, [0] * len(numbers))
        with CountRows(denoiser_of(self.pipe)) as counted:
            synchronise(self.pipe.device)
            start = time.perf_counter()
            pictures = self.pipe(generator=generators, output_type="pt", **options).images
            synchronise(self.pipe.device)
            seconds = time.perf_counter() - start
        evaluations = counted.rows / len(numbers) if counted.rows else float(codes_of(self.pipe))
        return Drawn(pictures.detach().float().cpu(), seconds, evaluations)

    def probe(self, captions: Sequence[str] | None = None) -> tuple[int, int, int]:
        """(C, H, W) of the pictures, by drawing one in as few steps as the pipeline allows."""
        kept = dict(self.options)
        if "num_inference_steps" in self.takes:
            self.options["num_inference_steps"] = min(2, kept.get("num_inference_steps", 2))
        try:
            return tuple(self.draw([0], [0] if self.num_classes else None, ["a"] if self.takes_prompts else None).pictures.shape[1:])
        finally:
            self.options = kept

    def describe(self) -> dict[str, Any]:
        """The settings as they are in effect, for the result."""
        described: dict[str, Any] = {"pipeline": type(self.pipe).__name__}
        if (own := getattr(self.pipe, "scheduler", None)) is not None:
            # what was asked for is said even where it is a default: the model's own may be another
            described["scheduler"] = scheduler_name(own, {**scheduler_settings(own), **self._said})
        for name, argument in ARGUMENTS.items():
            if argument in self.takes:
                default = self.pipe.config.get(f"default_{argument}", self.takes[argument].default)
                described[name] = self.options.get(argument, default)
        return described


class CountRows:
    """Counts how many samples a network is called with, while this context is open."""

    def __init__(self, network: nn.Module | None) -> None:
        self.network, self.rows = network, 0

    def __enter__(self) -> CountRows:
        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim > 1)
            self.rows += len(first)

        self._handle = None if self.network is None else self.network.register_forward_pre_hook(count, with_kwargs=True)
        return self

    def __exit__(self, *error: Any) -> None:
        if self._handle is not None:
            self._handle.remove()


def denoiser_of(pipe: Any) -> nn.Module | None:
    """The network that a scheduler calls; None for a pipeline that draws without steps."""
    if getattr(pipe, "scheduler", None) is None:
        return None
    return next((network for name in ("unet", "transformer", "denoiser") if (network := getattr(pipe, name, None)) is not None), None)


def codes_of(pipe: Any) -> int:
    """Evaluations of the network of a pipeline without a scheduler: one for each code that a prior draws in turn, else one."""
    priors = getattr(pipe, "priors", None)
    return sum(height * width for height, width in (tuple(prior.config.shape) for prior in priors)) if priors else 1


def synchronise(device: torch.device) -> None:
    """Waits for an accelerator, so that a clock reads the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
