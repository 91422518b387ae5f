"""Trains a variational autoencoder by the evidence lower bound or the importance-weighted one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from ...likelihood.collapse import latent_diagnostics
from ...likelihood.elbo import elbo
from ...likelihood.iwae import iwae
from ...likelihood.observation import observe
from ...pipelines.autoencoding import picture_grid
from ...pipelines.vae import VAEPipeline
from ..card import training_notes
from ..data import collate
from ..objectives.base import ObjectiveOutput, Phase
from ..objectives.elbo import ELBOObjective
from ..objectives.iwae import IWAEObjective
from ..random import Generators, normal
from .base import build_network, check_size, levels_of, open_pictures, settings_of

logger = logging.getLogger(__name__)

OBJECTIVES = {"elbo": ELBOObjective, "iwae": IWAEObjective}
OBJECTIVE = {"name": "elbo", "beta": 1.0, "warmup_steps": 0, "free_bits": 0.0, "num_samples": 1, "estimator": "standard"}
OF_ELBO = ("beta", "warmup_steps", "free_bits", "num_samples")
OF_IWAE = ("num_samples", "estimator")


class VAETask:
    """A recipe's `model.vae` is the network, `objective.name` the bound: elbo or iwae, with the settings of its class.

    Pictures become what the model's likelihood is over: levels, points in their bins, or black and white drawn anew each time.
    """

    def __init__(self, recipe: Any) -> None:
        model = settings_of(recipe, "model", {"vae": None})
        settings = settings_of(recipe, "objective", OBJECTIVE)
        self.sample = settings_of(recipe, "sample", {"pictures": 16, "importance_samples": 64})
        if model["vae"] is None:
            raise ValueError("model.vae is missing: give its class and arguments, such as {class: VAEModel, latent_dim: 32, ...}.")
        if self.sample["pictures"] < 1 or self.sample["importance_samples"] < 1:
            raise ValueError(f"sample: at least 1 picture and 1 importance sample, got {self.sample} (loop.sample_every=0 draws none).")
        self.objective = make_objective(settings, set(recipe.objective))
        self.data, self.held_out = open_pictures(recipe)
        torch.manual_seed(recipe.seed)  # initial weights; a training run is the one place that seeds
        self.vae = build_network(model["vae"], "model.vae")
        check_size(self.vae, recipe, "model.vae")
        self.networks: dict[str, nn.Module] = {"vae": self.vae}
        self.phases = (Phase("vae", ("vae",)),)
        self.recipe = recipe

    def losses(self, networks: dict[str, nn.Module], batch: dict[str, Any], phase: str, generator: Generators) -> ObjectiveOutput:
        """The bound of a batch of pictures (B, C, H, W)."""
        config = self.vae.config
        x = observe(levels_of(batch["picture"], config.num_bits), config.likelihood, config.num_bits, generator).x
        return self.objective(networks["vae"], x, step=batch["step"], generator=generator)

    @torch.no_grad()
    def draw_samples(self, networks: dict[str, nn.Module]) -> Image.Image:
        """Drawn pictures; below them pictures (held-out ones where there are any) and their reconstructions."""
        count, vae = self.sample["pictures"], networks["vae"]
        z = normal((count, vae.config.latent_dim), torch.Generator().manual_seed(0), vae.device)
        rows = [vae.decode(z).sample]
        source = self.held_out or (None if self.recipe.data.streaming else self.data)
        if source is not None and len(source) >= count:
            pictures = collate([source[(item, 0)] for item in range(count)])["picture"].to(vae.device)
            rows += [pictures, vae.decode(vae.encode(pictures).latent_dist.mean).sample]
        return picture_grid(torch.cat(rows), columns=count)

    def save(self, networks: dict[str, nn.Module], folder: Path, facts: dict[str, Any]) -> None:
        """A `VAEPipeline`, with what was measured on the held-out pictures in its card."""
        vae = networks["vae"].eval()
        notes = training_notes(self.recipe, {**facts, **self.measure(vae)})
        VAEPipeline(vae).save_pretrained(folder, license=self.recipe.card.license, notes=notes)

    @torch.no_grad()
    def measure(self, vae: nn.Module) -> dict[str, Any]:
        """Bounds and diagnostics on the held-out pictures."""
        if self.held_out is None:
            return {}
        pictures = torch.stack([self.held_out.picture(item) for item in range(len(self.held_out))])
        levels, draws = pictures >> (8 - vae.config.num_bits), self.sample["importance_samples"]
        results = [elbo(vae, levels, 16, torch.Generator().manual_seed(0)), iwae(vae, levels, draws, torch.Generator().manual_seed(0))]
        measured = {}
        for result, draw in zip(results, (16, draws), strict=True):
            name = f"held-out {result.kind}, {draw} draws, {len(levels)} pictures"
            measured[f"{name} (nats)"] = round(result.nats.mean().item(), 2)
            if result.bits_per_dim is not None:
                measured[f"{name} (bits/dim)"] = round(result.bits_per_dim.mean().item(), 4)
        generator = torch.Generator().manual_seed(0)
        seen = [observe(part, vae.config.likelihood, vae.config.num_bits, generator).x for part in levels.split(256)]
        found = latent_diagnostics(vae, seen, generator)
        measured["active units"] = f"{found.active_units} of {vae.config.latent_dim}"
        measured["KL (nats)"] = round(found.kl_per_dimension.sum().item(), 2)
        measured["mutual information (nats)"] = f"{found.mutual_information:.2f} (of at most {found.max_mutual_information:.2f} seen)"
        for name, value in measured.items():
            logger.info("%s: %s", name, value)
        return measured


def make_objective(settings: dict[str, Any], given: set[str]) -> ELBOObjective | IWAEObjective:
    """The objective that `objective.name` names.

    Raises:
        ValueError: no such objective, or a setting that it does not take.
    """
    name = settings["name"]
    if name not in OBJECTIVES:
        raise ValueError(f"objective.name: {name!r} is none of {', '.join(OBJECTIVES)}.")
    takes = OF_ELBO if name == "elbo" else OF_IWAE
    if unknown := sorted(given - {"name", *takes}):
        raise ValueError(f"objective.{unknown[0]}: the objective {name!r} does not take it; it takes {', '.join(takes)}.")
    return OBJECTIVES[name](**{key: settings[key] for key in takes})
