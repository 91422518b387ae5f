"""How straight a flow draws, and how far: the two numbers that say what few steps will cost."""

from __future__ import annotations

from typing import Any

import torch

from ..pipelines.diffusion_image import DiffusionImagePipeline
from ..schedulers.rectified_flow import RectifiedFlowScheduler
from ..training.random import normal, sample_generators
from .sampling import Sampler


def is_flow(pipe: Any) -> bool:
    """Whether the pipeline follows straight interpolations between noise and data, of classes or of none."""
    if not isinstance(pipe, DiffusionImagePipeline):
        return False
    return pipe.parameterization.path.name == "linear" and pipe.parameterization.has_path


@torch.no_grad()
def straightness(
    sampler: Sampler, numbers: list[int], labels: list[int] | None, steps: int = 50
) -> tuple[torch.Tensor, torch.Tensor]:
    """How far the trajectories of these numbers bend, and how far they go; both per value of what is drawn.

    Args:
        sampler: of a flow (`is_flow`); its scheduler is put back.
        numbers: of pictures.
        labels: their classes, for a network with classes.
        steps: of Euler.
    Returns: mean over time of |v - (x_0 - eps)|^2 and the transport cost |x_0 - eps|^2, each divided by the number of values, (B,).

    References: Liu et al. 2022, eqs. 3 and 4, https://arxiv.org/abs/2209.03003
    """
    pipe, own = sampler.pipe, sampler.pipe.scheduler
    shape = pipe.latents_shape(len(numbers))
    eps = normal(shape, sample_generators(sampler.seed, "sampling", numbers, [0] * len(numbers)))
    condition = {"batch_size": len(numbers)} if labels is None else {"class_labels": labels}
    guidance = {key: value for key, value in sampler.options.items() if key == "guidance_scale"}
    pipe.scheduler = RectifiedFlowScheduler()
    try:
        x_0 = pipe(latents=eps, num_inference_steps=steps, output_type="latent", **condition, **guidance).images
        bent = pipe.scheduler.straightness
    finally:
        pipe.scheduler = own
    values = eps[0].numel()
    return bent.double().cpu() / values, (x_0.cpu().double() - eps.double()).square().flatten(1).sum(1) / values
