"""Trains a denoiser on pictures, with labels or without, in pixels or in the latents of a finished autoencoder."""

from __future__ import annotations

import copy
import random
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ...models.calling import ClassCondition, is_a, predict
from ...models.latent_space import scale_latents
from ...pipelines.guidance import as_guidance
from ...pipelines.pictures import pad
from ...processes import Parameterization
from ..card import training_notes
from ..config import coerce
from ..data import LatentData, PictureData, known_words_holdout, load_rows
from ..objectives.base import ObjectiveOutput, Phase
from ..objectives.coupling import MinibatchOTCoupling
from ..objectives.denoising import DenoisingObjective
from ..objectives.time_densities import TIME_DENSITIES
from ..objectives.variational import VariationalObjective
from ..random import Generators, seed_of
from .autoencoder import encode_all, mode
from .base import build_network, grid, latent_size, settings_of
from .denoising import build_scheduler, choose, choose_weighting, rank_device

MODEL = {
    "vae": None,
    "denoiser": None,
    "scheduler": {"class": "DDPMScheduler"},
    "cache_latents": True,
    "save_dtype": "float32",
    "default_num_inference_steps": 50,
    "default_guidance_scale": 1.0,
}
OBJECTIVE = {"time_density": "uniform", "weighting": "target", "drop_label": 0.1, "coupling": None, "simple": 1.0, "bound": None}
SAMPLE = {"pictures": 40, "steps": 50, "guidance": None}


class DiffusionImageTask:
    """A recipe's `model` names the denoiser (UNet2DModel or DiTTransformer2DModel), its scheduler and, for latents, the autoencoder.

    The network's parameterization is what its scheduler's config says; `objective` chooses the time density, the weighting, and how often a
    label is dropped, which trains the null class that guidance needs (Ho & Salimans 2022, https://arxiv.org/abs/2207.12598). Pictures that
    are smaller than the network's `sample_size` are framed in black. With `data.label_column` the denoiser's class table is made to fit:
    one row per class, and one for none where labels are dropped.
    """

    # what a recipe's groups may hold, with defaults; tasks that train the same networks otherwise change these and the methods below
    known_model, known_objective, known_sample = MODEL, OBJECTIVE, SAMPLE

    def __init__(self, recipe: Any) -> None:
        self.recipe = recipe
        self.model = settings_of(recipe, "model", self.known_model)
        settings = settings_of(recipe, "objective", self.known_objective)
        self.sample = settings_of(recipe, "sample", self.known_sample)
        _check(recipe, self.model, settings, self.sample)
        self.drop_label = settings["drop_label"]
        self.prepare()
        self.scheduler = self.build_scheduler()
        self.objective = self.build_objective(settings)
        self.data: Any = self.open_data()

        torch.manual_seed(recipe.seed)  # initial weights; a training run is the one place that seeds
        self.vae = self.build_vae()
        self.denoiser = self.build_denoiser()
        _leave_labels_alone(self.denoiser)
        self.null_class = self._null_class()
        self.image_size = self._check_sizes()
        if self.vae is not None and self.model["cache_latents"] and isinstance(self.data, PictureData):
            pictures = self.data
            self.data = LatentData(
                lambda: scale_latents(self.vae.config, encode_all(self.vae.to(rank_device()), pictures, batch_size=64)),
                None,
                pictures.indices,
                pictures.labels,
                pictures.fingerprint,
            )
        self.networks: dict[str, nn.Module] = {"denoiser": self.denoiser}
        self.phases = (Phase("denoiser", ("denoiser",)),)

    def prepare(self) -> None:
        """What must be there before everything else."""
        if self.model["denoiser"] is None:
            raise ValueError("model.denoiser is missing: give its class and arguments, such as {class: UNet2DModel, sample_size: 32, ...}.")

    def build_scheduler(self) -> Any:
        """The scheduler of the saved pipeline; its parameterization is the network's."""
        return build_scheduler(self.model["scheduler"])

    def build_objective(self, settings: dict[str, Any]) -> Any:
        """The objective from its group of the recipe."""
        return _objective(self.scheduler.parameterization, settings)

    def open_data(self) -> Any:
        """The training data; sets `pictures`, `held_out`, `classes` and `names`."""
        config, seed = self.recipe.data, self.recipe.seed
        rows = load_rows(config)
        train, held = known_words_holdout(None, len(rows), config.holdout, seed)
        self.pictures = PictureData(rows, config, train, seed)
        self.held_out = PictureData(rows, config, held, seed, augmented=False) if held else None
        self.classes, self.names = _classes(rows, config, self.pictures.labels)
        return self.pictures

    def build_vae(self) -> nn.Module | None:
        """The autoencoder in whose latents the denoiser works; None for pixels."""
        return build_network(self.model["vae"], "model.vae").eval().requires_grad_(False) if self.model["vae"] else None

    def build_denoiser(self) -> nn.Module:
        """The network that is trained, with its initial weights."""
        return build_network(self._with_classes(self.model["denoiser"]), "model.denoiser")

    def _with_classes(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The denoiser's settings with the size of its class table, where the recipe leaves that to the data."""
        if not isinstance(settings, dict) or "from" in settings:
            return settings
        if settings.get("class") == "DiTTransformer2DModel":  # its null class is one more row, whatever the recipe says
            return {"num_embeds_ada_norm": self.classes or 0, **settings}
        if self.classes is not None and settings.get("class") == "UNet2DModel":
            return {"num_class_embeds": self.classes + (self.drop_label > 0), **settings}
        return settings

    def _null_class(self) -> int | None:
        """The label that stands for a dropped one.

        Raises:
            ValueError: the class table does not fit the data.
        """
        config = self.denoiser.config
        if is_a(self.denoiser, "DiTTransformer2DModel"):
            if self.classes is not None and config.num_embeds_ada_norm < self.classes:
                raise ValueError(
                    f"model.denoiser.num_embeds_ada_norm: {config.num_embeds_ada_norm}, but there are {self.classes} classes."
                )
            return config.num_embeds_ada_norm
        table = config.get("num_class_embeds")
        if self.classes is None:
            if table is not None:
                raise ValueError("model.denoiser.num_class_embeds: the data has no classes; set data.label_column, or leave it out.")
            return None
        wanted = self.classes + (self.drop_label > 0)
        if table is None or table < wanted:
            also = ", and one more for none (objective.drop_label)" if self.drop_label else ""
            raise ValueError(
                f"model.denoiser.num_class_embeds: {table}, but there are {self.classes} classes{also}; set it to {wanted}."
            )
        return table - 1 if self.drop_label else None

    def _check_sizes(self) -> int | None:
        """The denoiser is made for what it will get. Returns: the pictures' size where they are framed, else None."""
        resolution, config = self.recipe.data.resolution, self.denoiser.config
        size = resolution if self.vae is None else latent_size(self.vae, resolution)
        channels = self.recipe.data.channels if self.vae is None else self.vae.config.get("latent_channels")
        there = config.get("sample_size")
        square = there[0] if isinstance(there, (list, tuple)) and len(set(there)) == 1 else there
        if not isinstance(square, int) or (size is not None and (square < size or (self.vae is not None and square != size))):
            what = "pictures" if self.vae is None else "latents"
            raise ValueError(f"model.denoiser.sample_size: {there}, but the {what} are {size} x {size}; set it to {size}.")
        if channels is not None and config.in_channels != channels:
            what = "pictures (data.channels)" if self.vae is None else "latents of model.vae"
            raise ValueError(f"model.denoiser.in_channels: {config.in_channels}, but the {what} have {channels} channels.")
        self._check_outputs(config)
        return size if self.vae is None and square > size else None

    def _check_outputs(self, config: Any) -> None:
        parts = 2 if self.scheduler.parameterization.learned_variance else 1
        if (given := config.get("out_channels") or config.in_channels) != parts * config.in_channels:
            also = ", the second half of them for the variance" if parts == 2 else ""
            raise ValueError(f"model.denoiser.out_channels: {given}, but the output has {parts * config.in_channels}{also}.")

    def losses(self, networks: dict[str, nn.Module], batch: dict[str, Any], phase: str, generator: Generators) -> ObjectiveOutput:
        """Denoising losses of a batch of pictures (B, C, H, W), framed or encoded on the fly, or of latents (B, c, h, w)."""
        if "latents" in batch:
            x_0 = batch["latents"]
        elif self.vae is not None:
            with torch.no_grad():
                x_0 = scale_latents(self.vae.config, mode(self.vae.to(batch["picture"].device), batch["picture"]))
        else:
            x_0 = pad(batch["picture"], (self.denoiser.config.sample_size,) * 2)
        return self.loss(networks, x_0, self._condition(batch, x_0), batch, generator)

    def loss(
        self, networks: dict[str, nn.Module], x_0: Tensor, condition: ClassCondition | None, batch: dict[str, Any], generator: Generators
    ) -> ObjectiveOutput:
        """The objective on clean data (B, C, h, w) with its labels."""
        return self.objective(partial(predict, networks["denoiser"]), x_0, condition=condition, generator=generator)

    def _condition(self, batch: dict[str, Any], x_0: Tensor) -> ClassCondition | None:
        """The labels of a batch with some of them dropped; each sample's fate hangs on its own seed."""
        if self.classes is None:
            return None if self.null_class is None else ClassCondition(torch.full((len(x_0),), self.null_class, device=x_0.device))
        labels = batch["label"].clone()
        for i, (row, draw) in enumerate(zip(batch["row"], batch["draw"], strict=True)):
            if random.Random(seed_of(self.recipe.seed, "augmentation", row, draw)).random() < self.drop_label:
                labels[i] = self.null_class
        return ClassCondition(labels.to(x_0.device))

    def pipeline(self, networks: dict[str, nn.Module]) -> Any:
        """The pipeline made of these networks and the task's other components."""
        from ...pipelines.diffusion_image import DiffusionImagePipeline

        denoiser = networks["denoiser"]
        is_unet = is_a(denoiser, "UNet2DModel")
        vae = {} if self.vae is None else {"vqvae" if type(self.vae).__name__ == "VQModel" else "vae": self.vae}
        return DiffusionImagePipeline(
            self.scheduler,
            **{"unet" if is_unet else "transformer": denoiser},
            **vae,
            image_size=self.image_size,
            null_class=self.null_class if is_unet else None,
            id2label=self.names,
            default_num_inference_steps=self.model["default_num_inference_steps"],
            default_guidance_scale=self.model["default_guidance_scale"],
        )

    def draw_samples(self, networks: dict[str, nn.Module]) -> Image.Image:
        """Drawn pictures, one column per class (up to 16), or eight to a row where there are none."""
        pipe, count = self.pipeline(networks), self.sample["pictures"]
        pipe.set_progress_bar_config(disable=True)
        columns = min(self.classes or 8, 16, count)
        options = {} if self.classes is None else {"class_labels": [i % columns for i in range(count)]}
        drawn = pipe(
            count if self.classes is None else None,
            num_inference_steps=self.sample["steps"],
            guidance_scale=self.sample["guidance"],
            generator=[torch.Generator().manual_seed(seed_of(self.recipe.seed, "sampling", i)) for i in range(count)],
            output_type="pt",
            **options,
        ).images.cpu()
        return grid(drawn * 2 - 1, columns=columns, upscale=max(1, 64 // drawn.shape[-1]))

    def save(self, networks: dict[str, nn.Module], folder: Path, facts: dict[str, Any]) -> None:
        """The whole pipeline in the Hub's layout, in `model.save_dtype`."""
        pipe = copy.deepcopy(self.pipeline(networks)).to("cpu")
        if self.model["save_dtype"] != "float32":  # diffusers warns of every cast of a network
            pipe = pipe.to(dtype=getattr(torch, self.model["save_dtype"]))
        pipe.save_pretrained(folder, license=self.recipe.card.license, notes=training_notes(self.recipe, facts))


def _objective(parameterization: Parameterization, settings: dict[str, Any]) -> Any:
    """Denoising, or DDPM's variational bound where `objective.bound` has a weight or a variance is learned."""
    bound = settings["bound"]
    if bound is None:
        bound = 1e-3 if parameterization.learned_variance else 0.0
    if bound := coerce(float, bound, "objective.bound"):
        left = {name: OBJECTIVE[name] for name in ("time_density", "weighting", "coupling")}
        if changed := [name for name, default in left.items() if settings[name] != default]:
            raise ValueError(f"objective.{changed[0]}: the variational bound (objective.bound) has its own; leave it out, or set bound=0.")
        return VariationalObjective(parameterization, settings["simple"], bound)
    if settings["simple"] != 1.0:
        raise ValueError(f"objective.simple: {settings['simple']} weighs the simple loss beside the bound; set objective.bound too.")
    return DenoisingObjective(
        parameterization,
        choose(TIME_DENSITIES, settings["time_density"], "objective.time_density"),
        choose_weighting(settings["weighting"]),
        None if settings["coupling"] is None else MinibatchOTCoupling(str(settings["coupling"])),
    )


def _check(recipe: Any, model: dict[str, Any], objective: dict[str, Any], sample: dict[str, Any]) -> None:
    """Raises ValueError on settings that cannot work, before anything is loaded."""
    if recipe.data.streaming:
        raise ValueError(f"data.streaming: the task {recipe.task} keeps the labels in memory; use a data set on the disk.")
    if model["vae"] and model["cache_latents"] and (recipe.data.horizontal_flip or recipe.data.shift):
        raise ValueError("model.cache_latents: cached latents cannot be augmented; set it to false, or flip and shift to 0.")
    if model["save_dtype"] not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"model.save_dtype: {model['save_dtype']!r} is none of float32, float16, bfloat16.")
    if not 0 <= objective["drop_label"] <= 1:
        raise ValueError(f"objective.drop_label: a probability is between 0 and 1, got {objective['drop_label']}.")
    if sample["pictures"] < 1 or sample["steps"] < 1:
        raise ValueError(f"sample: at least 1 picture in 1 step, got {sample} (loop.sample_every=0 draws none).")
    if sample["guidance"] is not None:
        sample["guidance"] = coerce(float, sample["guidance"], "sample.guidance")
        as_guidance(sample["guidance"])


def _classes(rows: Any, config: Any, labels: list[int] | None) -> tuple[int | None, dict[int, str] | None]:
    """(number of classes, their names where they have names), from the data set's features or from the labels themselves.

    Raises:
        ValueError: labels below 0.
    """
    if labels is None:
        return None, None
    if min(labels) < 0:
        raise ValueError(f"data.label_column: the column {config.label_column!r} of {config.name} holds {min(labels)}; labels start at 0.")
    names = getattr(rows.features[config.label_column], "names", None) if rows.features is not None else None
    if names is None:
        return max(labels) + 1, None
    named = {i: name.replace(",", " ") for i, name in enumerate(names)}
    return len(names), None if all(name == str(i) for i, name in named.items()) else named


def _leave_labels_alone(denoiser: nn.Module) -> None:
    """Turns off DiT's own dropping of labels: each of its blocks draws its own, from the global random state of the process."""
    for module in denoiser.modules():
        if type(module).__name__ == "LabelEmbedding":
            module.dropout_prob = 0.0
