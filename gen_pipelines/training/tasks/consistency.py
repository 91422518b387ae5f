"""Trains a consistency model on pictures: from scratch, or from a finished denoiser of any kind."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...models.calling import ClassCondition, predict
from ...pipelines.guidance import as_guidance
from ...processes import Parameterization
from ..config import coerce
from ..objectives.base import ObjectiveOutput
from ..objectives.consistency import ConsistencyDistillation, ConsistencyTraining
from ..objectives.latent_consistency import LatentConsistencyDistillation
from ..random import Generators
from .diffusion_image import MODEL, SAMPLE, DiffusionImageTask
from .teacher import load_teacher

# of consistency training (Song & Dhariwal 2023); a teacher needs few intervals and none of the weights (Song et al. 2023)
TRAINING = {"start": 10, "end": 1280, "density": "log_normal", "weighting": "inverse_step"}
DISTILLATION = {"start": 18, "end": 18, "density": "uniform", "weighting": "uniform"}
OBJECTIVE = {
    **dict.fromkeys(TRAINING),  # as above, by whether there is a teacher
    "p_mean": -1.1,
    "p_std": 2.0,
    "huber": None,
    "solver": "heun",
    "teacher_guidance": 1.0,
    "target_decay": 0.0,
    "drop_label": 0.1,
    "rule": "consistency",
    "num_nodes": 50,
}
RANGE = 0.002, 80.0  # of sigma / alpha: EDM's


class ConsistencyTask(DiffusionImageTask):
    """With `model.teacher`, a folder or repository of a `DiffusionImagePipeline`, its denoiser is distilled; without, none is needed.

    The student is a copy of the teacher's network unless `model.denoiser` says otherwise, and lives on the teacher's path, with the
    teacher's time: whatever the teacher predicts, its step is taken in (x_0, eps). `objective.teacher_guidance` folds guidance into it.
    `objective.target_decay` takes a moving average of the student for the lower point of each pair (Song et al. 2023); 0, the student
    itself, is Song & Dhariwal's choice.

    `objective.rule: lcm` lets the student predict what the teacher predicts, with the boundary of latent consistency models on a grid of
    `num_nodes` times: it then begins as the teacher. That suits velocities; an x_0 that is read off a predicted eps is mostly error in
    nearly pure noise. Everything else is as in the task diffusion_image.
    """

    known_model = {**MODEL, "teacher": None, "scheduler": None, "default_num_inference_steps": 2}
    known_objective, known_sample = OBJECTIVE, {**SAMPLE, "steps": 2}

    def prepare(self) -> None:
        """Loads the teacher."""
        self.rule = self.recipe.objective.get("rule", OBJECTIVE["rule"])
        if self.rule not in ("consistency", "lcm"):
            raise ValueError(f"objective.rule: {self.rule!r} is none of consistency, lcm.")
        if self.model["teacher"] is None:
            if self.rule == "lcm":
                raise ValueError("objective.rule: lcm is a way to distil; give model.teacher.")
            self.teacher = None
            super().prepare()
            return
        self.teacher = load_teacher(self.model["teacher"], "model.teacher")
        if not self.teacher.parameterization.has_path:
            raise ValueError(f"model.teacher: {self.model['teacher']} is a consistency model itself; name a denoiser.")
        if self.teacher.autoencoder is not None and self.model["vae"] is not None:
            raise ValueError("model.vae: the teacher has an autoencoder, in whose latents the student works; leave it out.")
        data = self.recipe.data
        if self.teacher.autoencoder is not None and self.model["cache_latents"] and (data.horizontal_flip or data.shift):
            raise ValueError("model.cache_latents: cached latents cannot be augmented; set it to false, or flip and shift to 0.")

    def build_scheduler(self) -> Any:
        """`model.scheduler`, or a `ConsistencyScheduler` for the teacher's path; without a teacher for EDM's."""
        from ...schedulers.consistency import ConsistencyScheduler

        if self.rule == "lcm":
            if self.model["scheduler"] is not None or self.model["denoiser"] is not None:
                raise ValueError("model: with objective.rule lcm the student has the teacher's network and path; give no other.")
            nodes = coerce(int, self.recipe.objective.get("num_nodes", OBJECTIVE["num_nodes"]), "objective.num_nodes")
            return ConsistencyScheduler(rule="lcm", original_inference_steps=nodes).bind(self.teacher.parameterization.with_(jumps=True))
        if self.model["scheduler"] is not None:
            return super().build_scheduler()
        in_pixels = self.model["vae"] is None and (self.teacher is None or self.teacher.autoencoder is None)
        if self.teacher is None:
            low, high = RANGE
            return ConsistencyScheduler(sigma_min=low, sigma_max=high, sigma_data=0.5, clip_denoised=in_pixels)
        student = consistency_parameterization(self.teacher.parameterization, clip=in_pixels)
        return ConsistencyScheduler().bind(student)

    def build_objective(self, settings: dict[str, Any]) -> Any:
        """Consistency training, or distillation of the teacher."""
        defaults = TRAINING if self.teacher is None else DISTILLATION
        chosen = {
            name: default if settings[name] is None else coerce(type(default), settings[name], f"objective.{name}")
            for name, default in defaults.items()
        }
        chosen |= {"p_mean": settings["p_mean"], "p_std": settings["p_std"]}
        chosen["huber"] = None if settings["huber"] is None else coerce(float, settings["huber"], "objective.huber")
        self.guidance = settings["teacher_guidance"]
        self.target_decay = settings["target_decay"]
        as_guidance(self.guidance)
        if not 0 <= self.target_decay < 1:
            raise ValueError(f"objective.target_decay: from 0 (no average) to below 1, got {self.target_decay}.")
        if self.teacher is None:
            if self.guidance != 1.0 or settings["solver"] != "heun":
                raise ValueError("objective: solver and teacher_guidance are of a teacher; give model.teacher.")
            return ConsistencyTraining(self.scheduler.parameterization, **chosen)
        if self.guidance != 1.0 and self.teacher.null_class is None:
            raise ValueError(f"objective.teacher_guidance: {self.model['teacher']} has no null class to guide away from; set it to 1.")
        own = self.teacher.parameterization
        if self.rule == "lcm":
            if given := [name for name in TRAINING if settings[name] is not None]:
                raise ValueError(f"objective.{given[0]}: with rule lcm the pairs are neighbours on the grid of num_nodes; leave it out.")
            huber = 0.001 if chosen["huber"] is None else chosen["huber"]
            return LatentConsistencyDistillation(own, settings["num_nodes"], huber=huber)
        return ConsistencyDistillation(
            self.scheduler.parameterization, **chosen, teacher_parameterization=own.with_(variance=None), solver=settings["solver"]
        )

    def open_data(self) -> Any:
        """As in diffusion_image; classes are asked of both.

        Raises:
            ValueError: the teacher knows no classes and the data has them, or the other way.
        """
        data = super().open_data()
        if self.teacher is not None:
            known = self.teacher.num_classes
            if self.classes is not None and (known or 0) < self.classes:
                raise ValueError(f"data.label_column: {self.classes} classes, but the teacher knows {known or 'none'}.")
            if self.classes is None and known is not None and self.teacher.null_class is None:
                raise ValueError(f"data.label_column is missing: the teacher must be told one of its {known} classes.")
        return data

    def build_vae(self) -> nn.Module | None:
        """The teacher's, or the recipe's."""
        if self.teacher is not None and self.teacher.autoencoder is not None:
            return self.teacher.autoencoder.eval().requires_grad_(False)
        return super().build_vae()

    def build_denoiser(self) -> nn.Module:
        """The student: a copy of the teacher's network, or the recipe's."""
        if self.model["denoiser"] is not None:
            return super().build_denoiser()
        if self.teacher.parameterization.learned_variance:
            raise ValueError("model.denoiser is missing: the teacher learned a variance; give a network with as many channels out as in.")
        return copy.deepcopy(self.teacher.denoiser).requires_grad_(True)

    def _null_class(self) -> int | None:
        if self.teacher is not None and self.model["denoiser"] is None:
            if self.drop_label and self.classes is not None and self.teacher.null_class is None:
                raise ValueError("objective.drop_label: the teacher has no null class, and its copy neither; set it to 0.")
            return self.teacher.null_class
        return super()._null_class()

    def __init__(self, recipe: Any) -> None:
        super().__init__(recipe)
        if self.target_decay:  # no phase trains it; it is moved by `after_update`, and kept in checkpoints
            self.networks["target"] = copy.deepcopy(self.denoiser).requires_grad_(False)

    @torch.no_grad()
    def after_update(self, networks: dict[str, nn.Module], phase: str) -> None:
        """Moves the average that the lower points are looked at with."""
        if "target" in networks:
            student = [parameter.detach() for parameter in networks["denoiser"].parameters()]
            torch._foreach_lerp_(list(networks["target"].parameters()), student, 1 - self.target_decay)

    def loss(
        self, networks: dict[str, nn.Module], x_0: Tensor, condition: ClassCondition | None, batch: dict[str, Any], generator: Generators
    ) -> ObjectiveOutput:
        """Pairs of neighbouring levels of a batch (B, C, h, w)."""
        student = partial(predict, networks["denoiser"])
        options = {"condition": condition, "generator": generator}
        if self.rule != "lcm":
            options["progress"] = batch["step"] / self.recipe.loop.steps
        if self.teacher is None:
            return self.objective(student, x_0, **options)
        target = partial(predict, networks["target"]) if "target" in networks else None
        return self.objective(student, x_0, teacher=self._ask_teacher, target=target, **options)

    def _ask_teacher(self, x: Tensor, t: Tensor, condition: ClassCondition | None) -> Tensor:
        """The teacher's output (B, C, h, w), guided as the recipe says."""
        network = self.teacher.denoiser.to(x.device)
        channels = x.shape[1]
        if self.guidance == 1.0 or condition is None:
            return predict(network, x, t, condition)[:, :channels]
        null = torch.full_like(condition.labels, self.teacher.null_class)
        both = ClassCondition(torch.cat([condition.labels, null]))
        with_class, without = predict(network, torch.cat([x, x]), torch.cat([t, t]), both)[:, :channels].chunk(2)
        return without + self.guidance * (with_class - without)


def consistency_parameterization(teacher: Parameterization, clip: bool, sigma_data: float = 0.5) -> Parameterization:
    """What a student on the teacher's path predicts: at the same times and levels, with sigma / alpha from 0.002 on, and up to 80 where the
    teacher begins in pure noise (alpha = 0)."""
    low, high = teacher.trained_lambda_range
    cut = low if math.isfinite(low) else -math.log(RANGE[1]), min(high, -math.log(RANGE[0]))
    return teacher.with_(
        prediction="consistency",
        time_input=teacher.time_input,
        sigma_data=teacher.sigma_data or sigma_data,
        sign=1,
        lambda_range=None if cut == (low, high) else cut,
        variance=None,
        clip_sample=clip,
        thresholding=False,
    )

