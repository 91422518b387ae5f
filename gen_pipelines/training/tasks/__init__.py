"""What can be trained: one file per task, named in a recipe's `task:`.

A task builds the networks, data and losses of a recipe, draws sample pictures while it trains, and saves the result in the Hub's layout.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import Task

TASKS = {
    "autoencoder": ".autoencoder:AutoencoderTask",
    "classifier": ".classifier:ClassifierTask",
    "flow": ".flow:FlowTask",
    "vae": ".vae:VAETask",
    "vq_vae": ".vq_vae:VQVAETask",
    "prior": ".prior:PriorTask",
    "gan": ".gan:GANTask",
    "diffusion_image": ".diffusion_image:DiffusionImageTask",
    "consistency": ".consistency:ConsistencyTask",
    "reflow": ".reflow:ReflowTask",
    "latent_text_to_image": ".latent_text_to_image:LatentTextToImageTask",
    "latent_consistency": ".latent_consistency:LatentConsistencyTask",
}


def make_task(recipe: Any) -> Task:
    """The task of a recipe, its data opened and its networks built.

    Raises:
        ValueError: an unknown task, or settings that the task does not take.
    """
    if recipe.task not in TASKS:
        raise ValueError(f"task: {recipe.task!r} is none of {', '.join(TASKS)}.")
    module, name = TASKS[recipe.task].split(":")
    return getattr(importlib.import_module(module, __name__), name)(recipe)
