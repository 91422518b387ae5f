"""Distils a finished text-to-image pipeline into one that draws in a few steps without guidance: a latent consistency model."""

from __future__ import annotations

import copy
import inspect
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ...models.calling import TextCondition, is_a, predict
from ...models.latent_space import scale_latents
from ...pipelines.conditioning import Captions, PictureSize
from ..card import training_notes
from ..data import LatentData, PictureData
from ..objectives.base import ObjectiveOutput, Phase
from ..objectives.latent_consistency import LatentConsistencyDistillation
from ..random import Generators, seed_of, uniform
from .autoencoder import encode_all, mode
from .base import grid, open_pictures, settings_of
from .denoising import rank_device
from .teacher import load_teacher

MODEL = {
    "teacher": None,
    "guidance_embedding": 0,
    "cache_latents": True,
    "save_dtype": "float32",
    "default_num_inference_steps": 4,
    "default_guidance_scale": None,
}
OBJECTIVE = {"num_nodes": 50, "huber": 0.001, "guidance": None, "guidance_max": None, "target_decay": 0.95}
SAMPLE = {"pictures": 32, "steps": 4}


class LatentConsistencyTask:
    """`model.teacher` is the folder or repository of a text-to-image pipeline; the student is a copy of its denoiser.

    The guidance is folded in (Luo et al. 2023, section 4.2): the teacher's step is guided by a scale that is `objective.guidance` (the
    teacher's default scale unless given), or with `guidance_max` drawn between the two for each sample. The student is told the scale if
    `model.guidance_embedding` gives it a width to hear it with (UNet2DConditionModel; diffusers' 256), from zero weights, so that it begins
    as the teacher; otherwise it learns the one scale. What is saved draws by `ConsistencyScheduler` with the rule of LCM.
    """

    def __init__(self, recipe: Any) -> None:
        model, objective = settings_of(recipe, "model", MODEL), settings_of(recipe, "objective", OBJECTIVE)
        self.sample = settings_of(recipe, "sample", SAMPLE)
        self.recipe, self.model = recipe, model
        _check(recipe, model, self.sample)
        self.teacher = load_teacher(model["teacher"], "model.teacher", "LatentTextToImagePipeline")
        if self.teacher.is_told_guidance:
            raise ValueError(f"model.teacher: {model['teacher']} is told its guidance, so it is distilled already; name its own teacher.")
        default = objective["guidance"] if objective["guidance"] is not None else self.teacher.config.default_guidance_scale
        highest = default if objective["guidance_max"] is None else objective["guidance_max"]
        self.guidance = float(default), float(highest)
        if not 0 <= self.guidance[0] <= self.guidance[1]:
            raise ValueError(f"objective.guidance: {self.guidance[0]} up to guidance_max {self.guidance[1]}; give the lower scale first.")
        if self.guidance[0] < self.guidance[1] and not model["guidance_embedding"]:
            raise ValueError("objective.guidance_max: a range is for a student that is told its scale; set model.guidance_embedding.")
        if not 0 <= objective["target_decay"] < 1:
            raise ValueError(f"objective.target_decay: from 0 (no average) to below 1, got {objective['target_decay']}.")
        self.target_decay = objective["target_decay"]
        self.objective = LatentConsistencyDistillation(
            self.teacher.parameterization, objective["num_nodes"], huber=objective["huber"]
        )

        pictures, self.held_out = open_pictures(recipe)
        self.captions = pictures.captions()
        size = recipe.data.resolution
        self.teacher.check_size(size, size)
        self.size = PictureSize(size, size)

        torch.manual_seed(recipe.seed)  # initial weights; a training run is the one place that seeds
        self.student = student_of(self.teacher.denoiser, model["guidance_embedding"])
        self.networks: dict[str, nn.Module] = {"denoiser": self.student}
        if self.target_decay:  # no phase trains it; it is moved by `after_update`, and kept in checkpoints
            self.networks["target"] = copy.deepcopy(self.student).requires_grad_(False)
        self.phases = (Phase("denoiser", ("denoiser",)),)
        self.data: Any = pictures
        if model["cache_latents"]:
            self.data = LatentData(self._latents_of(pictures), self.captions, pictures.indices, fingerprint=pictures.fingerprint)

    def _latents_of(self, pictures: PictureData) -> Any:
        vae = self.teacher.vae
        return lambda: scale_latents(vae.config, encode_all(vae.to(rank_device()), pictures, batch_size=64))

    @torch.no_grad()
    def after_update(self, networks: dict[str, nn.Module], phase: str) -> None:
        """Moves the average that the lower points are looked at with."""
        if "target" in networks:
            student = [parameter.detach() for parameter in networks["denoiser"].parameters()]
            torch._foreach_lerp_(list(networks["target"].parameters()), student, 1 - self.target_decay)

    def losses(self, networks: dict[str, nn.Module], batch: dict[str, Any], phase: str, generator: Generators) -> ObjectiveOutput:
        """Distances of a batch of latents (B, c, h, w), or of pictures that are encoded on the fly, with their captions."""
        with torch.no_grad():
            if "latents" in batch:
                x_0 = batch["latents"]
            else:
                vae = self.teacher.vae.to(batch["picture"].device)
                x_0 = scale_latents(vae.config, mode(vae, batch["picture"]))
            conditions = self.conditions(batch["text"], x_0.device)
        low, high = self.guidance
        scale = low + (high - low) * uniform((len(x_0), 1), generator, x_0.device)[:, 0] if low < high else torch.full((len(x_0),), low)
        scale = scale.to(x_0.device)
        told = replace(conditions["cond"], guidance=scale) if self.model["guidance_embedding"] else conditions["cond"]
        return self.objective(
            partial(predict, networks["denoiser"]),
            x_0,
            teacher=partial(self._ask_teacher, conditions=conditions, scale=scale),
            target=partial(predict, networks["target"]) if "target" in networks else None,
            condition=told,
            generator=generator,
        )

    def conditions(self, captions: list[str], device: torch.device) -> dict[str, TextCondition]:
        """What the teacher is told of the captions, and of none."""
        if self.teacher.device != device:
            self.teacher.to(device)
        return self.size.on(self.teacher.encode_captions(Captions(list(captions)), True, device), self.teacher.denoiser)

    def _ask_teacher(
        self, x: Tensor, t: Tensor, _: TextCondition, conditions: dict[str, TextCondition], scale: Tensor
    ) -> Tensor:
        """The teacher's guided output (B, C', h, w)."""
        both = TextCondition.cat([conditions["cond"], conditions["uncond"]])
        with_text, without = predict(self.teacher.denoiser, torch.cat([x, x]), torch.cat([t, t]), both).float().chunk(2)
        return without + scale.view(-1, 1, 1, 1) * (with_text - without)

    def pipeline(self, networks: dict[str, nn.Module]) -> Any:
        """The teacher's pipeline with the student in place of its denoiser."""
        from ...schedulers.consistency import ConsistencyScheduler

        cls, teacher = type(self.teacher), self.teacher
        scheduler = ConsistencyScheduler(
            rule="lcm", original_inference_steps=self.objective.num_nodes, timestep_scaling=self.objective.timestep_scaling
        ).bind(teacher.parameterization.with_(jumps=True))
        parts = {name: part for name, part in teacher.components.items() if name not in ("scheduler", "unet", "transformer")}
        name = "unet" if teacher.components.get("unet") is not None else "transformer"
        settings = {key: teacher.config[key] for key in inspect.signature(cls.__init__).parameters if key in teacher.config}
        settings = {key: value for key, value in settings.items() if key not in teacher.components}
        guidance = self.model["default_guidance_scale"]
        if guidance is None:  # told: the middle of what it learned; else it is inside
            guidance = sum(self.guidance) / 2 if self.model["guidance_embedding"] else 1.0
        settings |= {"default_num_inference_steps": self.model["default_num_inference_steps"], "default_guidance_scale": guidance}
        return cls(**parts, scheduler=scheduler, **{name: networks["denoiser"]}, **settings)

    def draw_samples(self, networks: dict[str, nn.Module]) -> Image.Image:
        """Held-out captions (training captions where none are held out), 16 to a row."""
        captions = (self.held_out.captions() if self.held_out else self.captions)[: self.sample["pictures"]]
        pipe = self.pipeline(networks)
        pipe.set_progress_bar_config(disable=True)
        drawn = pipe(
            captions,
            num_inference_steps=self.sample["steps"],
            generator=[torch.Generator().manual_seed(seed_of(self.recipe.seed, "sampling", i)) for i in range(len(captions))],
            output_type="pt",
        ).images.cpu()
        return grid(drawn * 2 - 1, columns=min(16, len(captions)))

    def save(self, networks: dict[str, nn.Module], folder: Path, facts: dict[str, Any]) -> None:
        """The whole pipeline in the Hub's layout, in `model.save_dtype`."""
        pipe = copy.deepcopy(self.pipeline(networks)).to("cpu", dtype=getattr(torch, self.model["save_dtype"]))
        pipe.save_pretrained(folder, license=self.recipe.card.license, notes=training_notes(self.recipe, facts))


def student_of(teacher: nn.Module, guidance_embedding: int) -> nn.Module:
    """A copy of the teacher's denoiser, which with `guidance_embedding` is told a guidance scale and does not listen yet.

    Raises:
        ValueError: a network that cannot be told one.
    """
    if not guidance_embedding:
        return copy.deepcopy(teacher).float().requires_grad_(True)
    if not is_a(teacher, "UNet2DConditionModel"):
        raise ValueError(
            f"model.guidance_embedding: a {type(teacher).__name__} has no input for the guidance scale; set it to 0, and the student "
            "learns one scale."
        )
    config = {key: value for key, value in teacher.config.items() if not key.startswith("_")}
    student = type(teacher).from_config({**config, "time_cond_proj_dim": guidance_embedding})
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    assert missing == ["time_embedding.cond_proj.weight"] and not unexpected, (missing, unexpected)
    nn.init.zeros_(student.time_embedding.cond_proj.weight)
    return student.float().requires_grad_(True)


def _check(recipe: Any, model: dict[str, Any], sample: dict[str, Any]) -> None:
    """Raises ValueError on settings that cannot work, before anything is loaded."""
    if model["teacher"] is None:
        raise ValueError("model.teacher is missing: give the folder or repository of a text-to-image pipeline.")
    if recipe.data.text_column is None:
        raise ValueError("data.text_column is missing: the task latent_consistency learns from captions.")
    if recipe.data.streaming:
        raise ValueError("data.streaming: the task latent_consistency keeps the captions in memory; use a data set on the disk.")
    if model["cache_latents"] and (recipe.data.horizontal_flip or recipe.data.shift):
        raise ValueError("model.cache_latents: cached latents cannot be augmented; set it to false, or flip and shift to 0.")
    if model["save_dtype"] not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"model.save_dtype: {model['save_dtype']!r} is none of float32, float16, bfloat16.")
    if sample["pictures"] < 1 or sample["steps"] < 1:
        raise ValueError(f"sample: at least 1 picture in 1 step, got {sample} (loop.sample_every=0 draws none).")
