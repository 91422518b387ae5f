"""Trains a generator against a discriminator: every adversarial family, from the minimax GAN to StyleGAN with augmentation."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..augmentation import AdaptiveAugmentation
from ..card import training_notes
from ..collapse import SMALLEST, ClassifierFeatures, CollapseAlarm, CollapseWatch
from ..data import PictureData, load_rows
from ..objectives.adversarial import AdversarialObjective, latent_dim
from ..objectives.base import ObjectiveOutput, Phase
from ..random import Generators, normal, sample_generators
from ..seen import Seen
from .base import build_network, grid, settings_of

logger = logging.getLogger(__name__)

MODEL = {"generator": None, "discriminator": None, "augmentation": None, "save_dtype": "float32"}
OBJECTIVE = {
    "loss": "non_saturating",
    "n_critic": 1,
    "weight_clip": None,
    "gradient_penalty": 0.0,
    "r1": 0.0,
    "r1_interval": 16,
    "path_length": 0.0,
    "path_interval": 4,
    "path_decay": 0.01,
    "path_batch": 0.5,
    "style_mixing": 0.0,
    "discriminator_learning_rate": None,
}
SAMPLE = {"pictures": 64, "columns": 8, "noise_seed": 0, "watch": 500, "classifier": None}


class Statistics(nn.Module):
    """What a game remembers beside its networks: mean path length, the augmentation with its strength, the best that was reached."""

    def __init__(self, augmentation: AdaptiveAugmentation | None) -> None:
        super().__init__()
        self.register_buffer("path_length", torch.zeros([]))
        self.augmentation = augmentation
        self.alarm = CollapseAlarm()


class GANTask:
    """A recipe's `model` names generator and discriminator, `objective` the parts of `AdversarialObjective`.

    Pictures that are smaller than the networks' `sample_size` (28 in 32) are padded with their border on the way in, and the pipeline crops
    what it draws. With `data.label_column` both networks may have `num_classes`.

    `sample.watch` pictures are compared with as many of the data whenever samples are drawn, and a warning says when modes were lost: see
    `training/collapse.py`. `sample.classifier` names the network that sees them (`mnist-classifier`, or a folder that the task `classifier`
    wrote); without one they are compared pixel by pixel.
    """

    def __init__(self, recipe: Any) -> None:
        model = settings_of(recipe, "model", MODEL)
        settings = settings_of(recipe, "objective", OBJECTIVE)
        self.sample = settings_of(recipe, "sample", SAMPLE)
        for part in ("generator", "discriminator"):
            if model[part] is None:
                raise ValueError(f"model.{part} is missing: give its class and arguments, as in {{class: DCGANGenerator, ...}}.")
        if recipe.data.streaming:
            raise ValueError("data.streaming: the task gan draws fresh pictures for every phase; use a data set on the disk.")
        for name in ("n_critic", "r1_interval", "path_interval"):
            if settings[name] < 1:
                raise ValueError(f"objective.{name}: {settings[name]} is not allowed; give 1 or more.")
        if model["save_dtype"] not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"model.save_dtype: {model['save_dtype']!r} is none of float32, float16, bfloat16.")
        own = ("n_critic", "weight_clip", "r1_interval", "path_interval", "discriminator_learning_rate")
        self.objective = AdversarialObjective(**{key: value for key, value in settings.items() if key not in own})
        self.weight_clip = settings["weight_clip"] and float(settings["weight_clip"])
        self.recipe, self.settings, self.save_dtype = recipe, settings, getattr(torch, model["save_dtype"])

        rows = load_rows(recipe.data)
        self.data = PictureData(rows, recipe.data, None, recipe.seed)
        torch.manual_seed(recipe.seed)  # initial weights; a training run is the one place that seeds
        generator = build_network(model["generator"], "model.generator")
        discriminator = build_network(model["discriminator"], "model.discriminator")
        augmentation = None if model["augmentation"] is None else AdaptiveAugmentation(**model["augmentation"])
        self.networks: dict[str, nn.Module] = {
            "generator": generator, "discriminator": discriminator, "statistics": Statistics(augmentation),
        }  # fmt: skip
        self._check(generator, discriminator)
        self.phases = self._phases()
        self.conditional = generator.config.get("num_classes") is not None
        self._fixed: dict[str, tuple[Tensor, Tensor | None]] = {}
        self._watch = self._prepare_watch()

    def _prepare_watch(self) -> CollapseWatch | None:
        """The pictures of the data that samples are compared with: `sample.watch` of them, from all over the data set."""
        count = min(self.sample["watch"], len(self.data))
        if count < SMALLEST:
            return None
        extractor = None
        if self.sample["classifier"] is not None:
            extractor = ClassifierFeatures(self.sample["classifier"], self.recipe.data.channels, self.recipe.data.resolution)
        places = [place * len(self.data) // count for place in range(count)]
        labels = None if self.data.labels is None else torch.tensor([self.data.labels[place] for place in places])
        return CollapseWatch(torch.stack([self.data.picture(place) for place in places]), labels, extractor)

    def _check(self, generator: nn.Module, discriminator: nn.Module) -> None:
        size, data = generator.config.sample_size, self.recipe.data
        if discriminator.config.sample_size != size or size < data.resolution or (size - data.resolution) % 2:
            raise ValueError(
                f"sizes: the generator draws {size}, the discriminator reads {discriminator.config.sample_size}, data.resolution is "
                f"{data.resolution}; the networks must agree, and be equal to the data's size or larger by an even number."
            )
        if not generator.config.out_channels == discriminator.config.in_channels == data.channels:
            raise ValueError(
                f"channels: model.generator.out_channels {generator.config.out_channels}, model.discriminator.in_channels "
                f"{discriminator.config.in_channels} and data.channels {data.channels} must agree."
            )
        for name, network in (("generator", generator), ("discriminator", discriminator)):
            count = network.config.get("num_classes")
            if count is not None and self.data.labels is None:
                raise ValueError(f"model.{name}.num_classes: {count} classes need data.label_column.")
            if count is not None and max(self.data.labels) >= count:
                raise ValueError(f"model.{name}.num_classes: {count}, but the data has a class {max(self.data.labels)}.")
        if self.objective.path_length and not hasattr(generator, "mapping"):
            raise ValueError(f"objective.path_length: {type(generator).__name__} has no styles; it is for the StyleGAN generators.")
        if self.objective.gradient_penalty and any(isinstance(m, nn.BatchNorm2d) for m in discriminator.modules()):
            raise ValueError("objective.gradient_penalty: it is per picture, batch norm is not; use norm: layer or none.")

    def _phases(self) -> tuple[Phase, ...]:
        """The two players in turns, and their lazy regularisers on the players' own optimisers (Karras et al. 2020, section 3.1)."""
        settings, optimizer, objective = self.settings, self.recipe.optimizer, self.objective
        rate = float(settings["discriminator_learning_rate"] or optimizer.learning_rate)

        def corrected(rate: float, interval: int, lazy: bool) -> dict[str, Any]:
            # one more update in every `interval`: steps and memory as long as without it
            share = interval / (interval + 1) if lazy else 1.0
            return {"learning_rate": rate * share, "betas": tuple(beta**share for beta in optimizer.betas)}

        judge = corrected(rate, settings["r1_interval"], objective.r1 > 0)
        draw = corrected(optimizer.learning_rate, settings["path_interval"], objective.path_length > 0)
        phases = [Phase("discriminator", ("discriminator",), repeats=settings["n_critic"], settings=judge)]
        if objective.r1:
            phases.append(Phase("r1", ("discriminator",), interval=settings["r1_interval"], optimizer="discriminator"))
        phases.append(Phase("generator", ("generator",), settings=draw))
        if objective.path_length:
            phases.append(Phase("path_length", ("generator",), interval=settings["path_interval"], optimizer="generator"))
        return tuple(phases)

    # ------------------------------------------------------------------------------------------------------------------- the game

    def losses(self, networks: dict[str, nn.Module], batch: dict[str, Any], phase: str, random: Generators) -> ObjectiveOutput:
        """The losses of one phase on a batch of pictures (B, C, h, w)."""
        generator, statistics, objective = networks["generator"], networks["statistics"], self.objective
        real, labels = self.padded(batch["picture"]), batch.get("label") if self.conditional else None
        count, augmentation = len(real), statistics.augmentation

        def judge(pictures: Tensor, classes: Tensor | None) -> Tensor:
            pictures = pictures if augmentation is None else augmentation(pictures, random)
            judged = classes if networks["discriminator"].config.get("num_classes") is not None else None
            return networks["discriminator"](pictures, judged).logits

        if phase == "discriminator":
            output = objective.discriminator(generator, judge, real, labels, random)
            if augmentation is not None:
                augmentation.watch(output.metrics["real_logits"])
                output.metrics["augmentation"] = augmentation.strength.detach().clone()
            return output
        if phase == "r1":
            return objective.regularise_discriminator(judge, real, labels, self.settings["r1_interval"])
        if phase == "path_length":
            interval = self.settings["path_interval"]
            return objective.regularise_generator(generator, statistics.path_length, count, labels, random, interval)
        return objective.generator(generator, judge, count, labels, random, real.device)

    def after_update(self, networks: dict[str, nn.Module], phase: str) -> None:
        """Clips a Wasserstein critic's weights; moves the augmentation's strength."""
        if phase != "discriminator":
            return
        if self.weight_clip:
            with torch.no_grad():
                for parameter in networks["discriminator"].parameters():
                    parameter.clamp_(-self.weight_clip, self.weight_clip)
        if networks["statistics"].augmentation is not None:
            networks["statistics"].augmentation.adjust()

    def padded(self, pictures: Tensor) -> Tensor:
        """Pictures at the networks' size, (B, C, H, W)."""
        margin = (self.networks["generator"].config.sample_size - pictures.shape[-1]) // 2
        return F.pad(pictures, (margin,) * 4, mode="replicate") if margin else pictures

    # -------------------------------------------------------------------------------------------------------------- what is seen

    @torch.no_grad()
    def draw_samples(self, networks: dict[str, nn.Module]) -> Seen:
        """Pictures of the same noise at every time, by the averaged generator; numbers of some hundred others, and warnings about them."""
        count, columns = self.sample["pictures"], self.sample["columns"]
        classes = networks["generator"].config.get("num_classes") or 1
        pictures = self._draw(networks["generator"], "seen", torch.arange(count) % columns % classes)
        metrics: dict[str, float] = {}
        if self._watch is not None:
            asked = self._watch.labels if self.conditional else torch.zeros(len(self._watch.real), dtype=torch.long)
            drawn = self._draw(networks["generator"], "watched", asked)
            levels = ((drawn.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
            metrics = self._watch.look(levels, asked if self.conditional else None)
            metrics["collapse"] = float(len(networks["statistics"].alarm.hear(metrics)))
            logger.info("samples beside the data: %s", ", ".join(f"{name} {value:.2f}" for name, value in metrics.items()))
        metrics = {f"samples/{name}": value for name, value in metrics.items()}
        return Seen(grid(pictures, columns), grid(pictures[:columns], columns), metrics)

    def _draw(self, generator: nn.Module, what: str, classes: Tensor) -> Tensor:
        """Pictures of fixed noise, one for each class of `classes` (B,), at the data's size; `what` names the noise."""
        count = len(classes)
        if what not in self._fixed:
            kind = 0 if what == "seen" else 1
            draws = sample_generators(self.recipe.seed + self.sample["noise_seed"], "sampling", range(count), [kind] * count)
            self._fixed[what] = normal((count, latent_dim(generator)), draws), classes if self.conditional else None
        device = next(generator.parameters()).device
        options = {"noise": "const"} if hasattr(generator, "mapping") else {}
        noise, labels = self._fixed[what]
        drawn: list[Tensor] = []
        for first in range(0, count, 100):
            some = slice(first, first + 100)
            drawn.append(generator(noise[some].to(device), None if labels is None else labels[some].to(device), **options).sample)
        return self.cropped(torch.cat(drawn))

    def cropped(self, pictures: Tensor) -> Tensor:
        """Drawn pictures at the data's size."""
        margin = (pictures.shape[-1] - self.recipe.data.resolution) // 2
        return pictures[..., margin : pictures.shape[-1] - margin, margin : pictures.shape[-1] - margin]

    def save(self, networks: dict[str, nn.Module], folder: Path, facts: dict[str, Any]) -> None:
        """The pipeline's folder: the averaged generator, and the discriminator that it was trained against."""
        from ...pipelines.gan import GANPipeline
        from ...pipelines.stylegan import StyleGANPipeline

        cls = StyleGANPipeline if hasattr(networks["generator"], "mapping") else GANPipeline
        pipe = cls(networks["generator"], networks["discriminator"], image_size=self.recipe.data.resolution)
        if self.save_dtype != torch.float32:  # as trained
            pipe.to(self.save_dtype)
        pipe.save_pretrained(folder, license=self.recipe.card.license, notes=training_notes(self.recipe, facts))
