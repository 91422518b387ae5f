"""Trains a normalizing flow by maximum likelihood and measures its bits per dimension."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ...likelihood.change_of_variables import flow_log_likelihood
from ...likelihood.dequantization import dequantize, from_levels, nearest_levels, to_levels
from ...models.flows.base import NormalizingFlowModel
from ...pipelines.glow import GlowPipeline
from ..card import training_notes
from ..data import PictureData, collate, known_words_holdout, load_rows, prepare_picture
from ..objectives.base import ObjectiveOutput, Phase
from ..objectives.likelihood import LikelihoodObjective
from ..random import Generators, sample_generators
from .base import build_network, grid, settings_of

logger = logging.getLogger(__name__)

SAMPLE = {"pictures": 64, "temperature": 0.7, "test_split": None, "test_pictures": 10000}


class FlowTask:
    """A recipe's `model.flow` is the network: `{class: GlowModel, ...}` or `{class: RealNVPModel, ...}`.

    `model.init_pictures` pictures set the activation normalisations before the first step, over all ranks together. With
    `sample.test_split` the card gives the bits per dimension of that split (its first `sample.test_pictures`).
    """

    def __init__(self, recipe: Any) -> None:
        self.model = settings_of(recipe, "model", {"flow": None, "init_pictures": 256})
        settings_of(recipe, "objective", {})
        self.sample = settings_of(recipe, "sample", SAMPLE)
        if self.model["flow"] is None:
            raise ValueError("model.flow is missing: give its class and arguments, such as {class: GlowModel, num_steps: 8, ...}.")
        for group, name, least in ((self.model, "model.init_pictures", 2), (self.sample, "sample.pictures", 1)):
            if group[name.split(".")[1]] < least:
                raise ValueError(f"{name}: {group[name.split('.')[1]]} is not allowed; give {least} or more.")
        if self.sample["temperature"] < 0:
            raise ValueError(f"sample.temperature: {self.sample['temperature']} is not allowed; give 0 or more.")
        self.objective = LikelihoodObjective()
        torch.manual_seed(recipe.seed)  # initial weights; a training run is the one place that seeds
        self.flow = build_network(self.model["flow"], "model.flow")
        if not isinstance(self.flow, NormalizingFlowModel):
            raise ValueError(f"model.flow: {type(self.flow).__name__} is no normalizing flow; GlowModel and RealNVPModel are.")
        wanted, given = (self.flow.config.in_channels, *self.flow.size), (recipe.data.channels, *[recipe.data.resolution] * 2)
        if wanted != given:
            raise ValueError(f"model.flow takes {wanted}, data gives {given} (channels, height, width); make them the same.")
        self.conditional = self.flow.config.num_class_labels is not None
        if self.conditional and recipe.data.label_column is None:
            raise ValueError("model.flow has classes: name their column in data.label_column.")
        rows = load_rows(recipe.data)
        if recipe.data.streaming:
            self.data, self.held_out = rows, None
        else:
            train, held = known_words_holdout(None, len(rows), recipe.data.holdout, recipe.seed)
            self.data = PictureData(rows, recipe.data, train, recipe.seed)
            self.held_out = PictureData(rows, recipe.data, held, recipe.seed, augmented=False) if held else None
        self.test = self._open_test(recipe)
        self.networks: dict[str, nn.Module] = {"flow": self.flow}
        self.phases = (Phase("flow", ("flow",)),)
        self.recipe = recipe

    def _open_test(self, recipe: Any) -> PictureData | None:
        """The split that is measured at the end, opened before any compute."""
        if self.sample["test_split"] is None:
            return self.held_out
        config = replace(recipe.data, split=self.sample["test_split"], streaming=False, holdout=0)
        rows = load_rows(config)
        return PictureData(rows, config, range(min(self.sample["test_pictures"], len(rows))), recipe.seed, augmented=False)

    def initialize(self, networks: dict[str, nn.Module]) -> None:
        """Data-dependent initialisation; every rank takes its share of the same pictures, and statistics are those of all."""
        from accelerate import PartialState

        state = PartialState()
        count = self.model["init_pictures"]
        rank, ranks = state.process_index, state.num_processes
        if self.recipe.data.streaming:
            examples = [self._example(number, row) for number, row in enumerate(islice(self.data, count))][rank::ranks]
        else:
            items = torch.linspace(0, len(self.data) - 1, min(count, len(self.data))).long().unique().tolist()
            examples = [self.data[(item, 0)] for item in items[rank::ranks]]
        batch = collate(examples)
        flow = networks["flow"]
        generators = sample_generators(self.recipe.seed, "caching", batch["row"], batch["draw"])
        levels = to_levels(batch["picture"], num_bits=flow.config.num_bits).to(flow.device)
        x, _ = dequantize(levels, flow.config.num_bits, generators)
        flow.initialize_from_batch(x, batch["label"].to(flow.device) if self.conditional else None)

    def _example(self, number: int, row: dict[str, Any]) -> dict[str, Any]:
        """A row of a stream, as `PictureData` gives rows of a data set."""
        data = self.recipe.data
        example = {"picture": prepare_picture(row[data.image_column], data.resolution, data.channels, data.background)}
        label = {"label": int(row[data.label_column])} if data.label_column else {}
        return {**example, **label, "row": number, "draw": 0}

    def losses(self, networks: dict[str, nn.Module], batch: dict[str, Any], phase: str, generator: Generators) -> ObjectiveOutput:
        """Bits per dimension of a batch of pictures (B, C, H, W)."""
        labels = batch["label"] if self.conditional else None
        return self.objective(networks["flow"], batch["picture"], labels, generator=generator)

    @torch.no_grad()
    def draw_samples(self, networks: dict[str, nn.Module]) -> Image.Image:
        """A grid of pictures at the recipe's temperature."""
        flow, count = networks["flow"], self.sample["pictures"]
        generators = sample_generators(self.recipe.seed, "sampling", range(count), [0] * count)
        classes = flow.config.num_class_labels
        labels = torch.arange(count, device=flow.device) % classes if self.conditional else None
        x, _ = flow.sample(count, labels, self.sample["temperature"], generators)
        bits = flow.config.num_bits
        return grid(from_levels(nearest_levels(x, bits), bits), columns=max(1, round(count**0.5)))

    def measure(self, flow: nn.Module) -> dict[str, Any]:
        """Mean bits per dimension of the test pictures, with its standard error over pictures."""
        if self.test is None:
            return {}
        values = []
        for start in range(0, len(self.test), 256):
            items = range(start, min(start + 256, len(self.test)))
            pictures = torch.stack([self.test.picture(item) for item in items])
            labels = torch.tensor([self.test.labels[item] for item in items]) if self.conditional else None
            generators = sample_generators(self.recipe.seed, "sampling", list(items), [1] * len(items))
            values.append(flow_log_likelihood(flow, pictures, labels, generator=generators).bits_per_dim.double().cpu())
        bits: Tensor = torch.cat(values)
        split = self.sample["test_split"] or "held-out"
        error = f" ± {bits.std().item() / len(bits) ** 0.5:.4f}" if len(bits) > 1 else ""
        kind = f"{flow.config.num_bits}-bit, {flow.config.dequantization} dequantisation, {len(bits)} pictures"
        logger.info("%s: %.4f bits per dimension", split, bits.mean().item())
        return {f"{split}, bits per dimension ({kind})": f"{bits.mean().item():.4f}{error}"}

    def save(self, networks: dict[str, nn.Module], folder: Path, facts: dict[str, Any]) -> None:
        """The pipeline in the Hub's layout, with what it measures on the test split in its card."""
        notes = training_notes(self.recipe, {**facts, **self.measure(networks["flow"])})
        flow = copy.deepcopy(networks["flow"]).to("cpu").eval()
        pipe = GlowPipeline(flow, default_temperature=self.sample["temperature"])
        pipe.save_pretrained(folder, license=self.recipe.card.license, notes=notes)
