"""Trains a classifier of pictures: the features that evaluations use, or a guide of diffusion models."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ...hub.card import model_card
from ..card import training_notes
from ..data import PictureData, collate, load_rows
from ..objectives.base import ObjectiveOutput, Phase
from ..random import Generators
from .base import build_network, grid, open_pictures, settings_of

logger = logging.getLogger(__name__)


class ClassifierTask:
    """A recipe's `model.classifier` is a network whose output has `.logits`; the loss is the cross-entropy of `data.label_column`.

    `objective.label_smoothing` takes that share of a label's probability to all classes alike. `sample.test_split` names the split on which
    the finished network is measured (null: the rows that `data.holdout` keeps out of the training).
    """

    def __init__(self, recipe: Any) -> None:
        model = settings_of(recipe, "model", {"classifier": None, "save_dtype": "float32"})
        self.objective = settings_of(recipe, "objective", {"label_smoothing": 0.0})
        self.sample = settings_of(recipe, "sample", {"pictures": 64, "columns": 8, "test_split": None})
        if model["classifier"] is None:
            raise ValueError("model.classifier is missing: give its class and arguments, such as {class: ConvClassifier, sample_size: 28}.")
        if recipe.data.label_column is None or recipe.data.streaming:
            raise ValueError("data: the task classifier needs data.label_column, and a data set on the disk (streaming: false).")
        if not 0 <= self.objective["label_smoothing"] < 1:
            raise ValueError(f"objective.label_smoothing: {self.objective['label_smoothing']} is not allowed; give 0 up to below 1.")
        if model["save_dtype"] not in ("float32", "float16"):
            raise ValueError(f"model.save_dtype: {model['save_dtype']!r} is none of float32, float16.")
        self.data, self.held_out = open_pictures(recipe)
        if (split := self.sample["test_split"]) is not None:
            test = dataclasses.replace(recipe.data, split=split, holdout=0)
            self.held_out = PictureData(load_rows(test), test, None, recipe.seed, augmented=False)
        torch.manual_seed(recipe.seed)  # initial weights; a training run is the one place that seeds
        self.classifier = build_network(model["classifier"], "model.classifier")
        if max(self.data.labels) >= (count := self.classifier.config.num_classes):
            raise ValueError(f"model.classifier.num_classes: {count}, but the data has a class {max(self.data.labels)}.")
        self.networks: dict[str, nn.Module] = {"classifier": self.classifier}
        self.phases = (Phase("classifier", ("classifier",)),)
        self.recipe, self.save_dtype = recipe, getattr(torch, model["save_dtype"])

    def losses(self, networks: dict[str, nn.Module], batch: dict[str, Any], phase: str, generator: Generators) -> ObjectiveOutput:
        """The cross-entropy of a batch of pictures (B, C, H, W) and labels (B,)."""
        logits = networks["classifier"](batch["picture"]).logits.float()                               # (B, K)
        loss = F.cross_entropy(logits, batch["label"], reduction="none", label_smoothing=self.objective["label_smoothing"])
        return ObjectiveOutput(per_sample=loss, metrics={"accuracy": (logits.argmax(1) == batch["label"]).float().detach()})

    @torch.no_grad()
    def draw_samples(self, networks: dict[str, nn.Module]) -> Image.Image:
        """The pictures that are hardest: those whose own class is the least probable, the hardest first."""
        source = self.held_out or self.data
        logits, labels = self.judge(networks["classifier"], source, range(min(len(source), 2000)))
        hardest = F.cross_entropy(logits, labels, reduction="none").argsort(descending=True)[: self.sample["pictures"]]
        return grid(collate([source[(int(item), 0)] for item in hardest])["picture"], self.sample["columns"])

    def judge(self, classifier: nn.Module, source: PictureData, items: range) -> tuple[Tensor, Tensor]:
        """Logits (N, K) and labels (N,) of pictures, on the CPU."""
        training, device = classifier.training, next(classifier.parameters()).device
        classifier.eval()
        try:
            batches = [collate([source[(item, 0)] for item in items[first : first + 256]]) for first in range(0, len(items), 256)]
            logits = [classifier(batch["picture"].to(device)).logits.float().cpu() for batch in batches]
        finally:
            classifier.train(training)
        return torch.cat(logits), torch.cat([batch["label"] for batch in batches])

    @torch.no_grad()
    def save(self, networks: dict[str, nn.Module], folder: Path, facts: dict[str, Any]) -> None:
        """The network's folder and its card, with the accuracy on held-out pictures, measured on the weights as they are stored."""
        classifier = networks["classifier"].eval()
        stored = {name: value.to(self.save_dtype).to(value.dtype) for name, value in classifier.state_dict().items()}
        classifier.load_state_dict(stored)
        if self.held_out is not None:
            logits, labels = self.judge(classifier, self.held_out, range(len(self.held_out)))
            accuracy = (logits.argmax(1) == labels).double().mean().item()
            facts = {**facts, f"accuracy on {len(labels)} held-out pictures": f"{accuracy:.2%}"}
            logger.info("accuracy on %d held-out pictures: %.2f %%", len(labels), 100 * accuracy)
        classifier.to(self.save_dtype).save_pretrained(folder)
        card = model_card(
            folder.resolve().name, type(classifier).__name__, {}, "image-classification", self.recipe.card.license,
            example="features = model(pictures).features", notes=training_notes(self.recipe, facts),
        )  # fmt: skip
        (folder / "README.md").write_text(card, encoding="utf-8")
