"""Trains priors over the codes of a finished VQ-VAE, all levels in one run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ...likelihood.elbo import code_elbo
from ...likelihood.observation import observe
from ...pipelines.autoencoding import picture_grid
from ...pipelines.vq_vae import VQVAEPipeline
from ..card import training_notes
from ..data import PictureData
from ..objectives.base import ObjectiveOutput, Phase
from ..objectives.prior import PriorObjective
from ..random import Generators
from .base import build_network, open_pictures, settings_of

logger = logging.getLogger(__name__)

NAMES = ("prior", "prior_2", "prior_3")
MODEL = {"vqvae": None, "prior": None, "prior_2": None, "prior_3": None, "class_conditional": False}


class PriorTask:
    """A recipe's `model.vqvae` names the folder of a run of the task vq_vae, `model.prior`, `prior_2`, `prior_3` the priors, top down.

    A prior is given by its class and size; the number of codes, their shapes and classes are filled in. The codes of the training set are
    computed once, before the first step.
    """

    def __init__(self, recipe: Any) -> None:
        model = settings_of(recipe, "model", MODEL)
        self.objective = PriorObjective(**settings_of(recipe, "objective", {"drop_label": 0.0}))
        self.sample = settings_of(recipe, "sample", {"pictures": 32, "temperature": 1.0})
        if model["vqvae"] is None:
            raise ValueError("model.vqvae is missing: give {from: FOLDER}, the folder that a run of the task vq_vae wrote.")
        if self.sample["pictures"] < 1 or self.sample["temperature"] < 0:
            raise ValueError(f"sample: at least 1 picture at a temperature from 0 on, got {self.sample} (loop.sample_every=0 draws none).")
        if recipe.data.streaming or recipe.data.horizontal_flip or recipe.data.shift:
            raise ValueError("data: the task prior computes the codes once; it takes no streaming, horizontal_flip or shift.")
        if model["class_conditional"] and recipe.data.label_column is None:
            raise ValueError("data.label_column is missing: model.class_conditional needs it.")
        if self.objective.drop_label and not model["class_conditional"]:
            raise ValueError("objective.drop_label: there is no label to drop without model.class_conditional.")
        self.conditional = model["class_conditional"]
        pictures, self.held_out = open_pictures(recipe)
        source = {"subfolder": "vqvae", **model["vqvae"]} if isinstance(model["vqvae"], dict) else model["vqvae"]
        self.vqvae = build_network(source, "model.vqvae").eval().requires_grad_(False)
        shapes = self.vqvae.code_shapes
        given = [name for name in NAMES if model[name] is not None]
        if given != list(NAMES[: len(shapes)]):
            raise ValueError(f"model: the VQ-VAE has {len(shapes)} levels of codes; give {', '.join(NAMES[: len(shapes)])}, got {given}.")
        classes = max(pictures.labels) + 1 if self.conditional else None
        torch.manual_seed(recipe.seed)  # initial weights; a training run is the one place that seeds
        self.networks: dict[str, nn.Module] = {}
        for number, name in enumerate(given):
            filled = {
                "num_codes": self.vqvae.config.num_embeddings,
                "shape": list(shapes[number]),
                "num_classes": classes,
                "condition_shapes": [list(shape) for shape in shapes[:number]],
            }
            self.networks[name] = build_network({**filled, **model[name]}, f"model.{name}")
        self.phases = (Phase("prior", tuple(given)),)
        self.data = CodeData(lambda: encode_pictures(self.vqvae.to(_device()), pictures), pictures.labels, pictures.indices)
        self.recipe = recipe

    def losses(self, networks: dict[str, nn.Module], batch: dict[str, Any], phase: str, generator: Generators) -> ObjectiveOutput:
        """Cross-entropy of a batch of codes, (B, h, w) of every level."""
        codes = [batch[f"codes_{number}"] for number in range(len(networks))]
        labels = batch["label"] if self.conditional else None
        return self.objective(list(networks.values()), codes, labels=labels, generator=generator)

    def draw_samples(self, networks: dict[str, nn.Module]) -> Image.Image:
        """Drawn pictures; with classes one after the other."""
        count = self.sample["pictures"]
        labels = None
        if self.conditional:
            labels = torch.arange(count, device=_device()) % networks["prior"].config.num_classes
        codes: list[Tensor] = []
        for prior in networks.values():
            codes.append(prior.sample(count, labels, codes, torch.Generator().manual_seed(0), self.sample["temperature"]))
        return picture_grid(self.vqvae.to(codes[0].device).decode_codes(codes).sample, columns=min(count, 8))

    def save(self, networks: dict[str, nn.Module], folder: Path, facts: dict[str, Any]) -> None:
        """A whole `VQVAEPipeline`, with the bound on held-out pictures in its card."""
        priors = [network.eval() for network in networks.values()]
        measured: dict[str, Any] = {}
        if self.held_out is not None:
            levels = torch.stack([self.held_out.picture(item) for item in range(len(self.held_out))])
            levels = levels >> (8 - self.vqvae.config.num_bits)
            result = code_elbo(self.vqvae.to(_device()), priors, levels, None, torch.Generator().manual_seed(0))
            measured[f"held-out elbo, {len(levels)} pictures (nats)"] = round(result.nats.mean().item(), 2)
            if result.bits_per_dim is not None:
                measured[f"held-out elbo, {len(levels)} pictures (bits/dim)"] = round(result.bits_per_dim.mean().item(), 4)
            for name, value in measured.items():
                logger.info("%s: %s", name, value)
        notes = training_notes(self.recipe, {**facts, **measured})
        VQVAEPipeline(self.vqvae, *priors).save_pretrained(folder, license=self.recipe.card.license, notes=notes)


class CodeData(torch.utils.data.Dataset):
    """Codes with labels. An item is asked for by (row, draw) and holds `codes_L` (h, w) of every level, `label`, `row`, `draw`."""

    def __init__(self, codes: Callable[[], list[Tensor]], labels: list[int] | None, rows: list[int]) -> None:
        self._make, self.codes, self.labels, self.indices = codes, None, labels, rows

    def prepare(self) -> None:
        """Compute the codes; the trainer calls it before the first batch."""
        if self.codes is None:
            self.codes = self._make()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any]:
        item, draw = place
        example = {"item": item, "row": self.indices[item], "draw": draw}
        example |= {f"codes_{number}": level[item] for number, level in enumerate(self.codes)}
        return example if self.labels is None else {**example, "label": self.labels[item]}


@torch.no_grad()
def encode_pictures(vqvae: nn.Module, pictures: PictureData, batch_size: int = 256) -> list[Tensor]:
    """The codes of a whole data set, (N, h, w) of every level from the top down, on the CPU.

    A level that uses hardly any of its codes is warned of: its prior learns in no time, and its samples are noise.
    """
    config, found = vqvae.config, []
    for start in range(0, len(pictures), batch_size):
        items = range(start, min(start + batch_size, len(pictures)))
        levels = torch.stack([pictures.picture(item) for item in items]).to(vqvae.device) >> (8 - config.num_bits)
        generator = torch.Generator().manual_seed(start)  # for a model of black and white; the same in a run that is resumed
        found.append([codes.cpu() for codes in vqvae.encode(observe(levels, config.likelihood, config.num_bits, generator).x).codes])
    whole = [torch.cat(level) for level in zip(*found, strict=True)]
    for number, codes in enumerate(whole):
        used = len(codes.unique())
        if used < 0.1 * config.num_embeddings:
            logger.warning(
                "level %d of the codes uses %d of %d: train the VQ-VAE again, with revive_below above 0 or fewer num_embeddings.",
                number,
                used,
                config.num_embeddings,
            )
    return whole


def _device() -> torch.device:
    """The accelerator of this rank, as the trainer will find it."""
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available() and not torch.backends.mps.is_available()).device
