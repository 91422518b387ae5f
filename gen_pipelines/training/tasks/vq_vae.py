"""Trains a VQ-VAE or VQ-VAE-2: the codes and the decoder, without priors."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ...likelihood.observation import observe
from ...pipelines.autoencoding import picture_grid
from ...pipelines.vq_vae import VQVAEPipeline
from ..card import training_notes
from ..data import collate
from ..objectives.base import ObjectiveOutput, Phase
from ..objectives.vq import VQObjective
from ..random import Generators, seed_of
from .base import build_network, check_size, levels_of, open_pictures, settings_of

logger = logging.getLogger(__name__)

FIRST_PICTURES = 256  # whose vectors the codebooks start from


class VQVAETask:
    """A recipe's `model.vqvae` is the network, `objective` the settings of `VQObjective`."""

    def __init__(self, recipe: Any) -> None:
        model = settings_of(recipe, "model", {"vqvae": None})
        objective = settings_of(recipe, "objective", {"reconstruction": "likelihood", "variance": 1.0, "weight": 1.0})
        self.sample = settings_of(recipe, "sample", {"pictures": 16})
        if model["vqvae"] is None:
            raise ValueError("model.vqvae is missing: give its class and arguments, such as {class: VQVAEModel, num_embeddings: 256, ...}.")
        if self.sample["pictures"] < 1:
            raise ValueError(f"sample.pictures: {self.sample['pictures']} is not allowed; give 1 or more (loop.sample_every=0: none).")
        if recipe.data.streaming:
            raise ValueError("data.streaming: the task vq_vae starts its codebooks from the data's first pictures; use a set on the disk.")
        self.objective = VQObjective(**objective)
        self.data, self.held_out = open_pictures(recipe)
        torch.manual_seed(recipe.seed)  # initial weights; a training run is the one place that seeds
        self.vqvae = build_network(model["vqvae"], "model.vqvae")
        check_size(self.vqvae, recipe, "model.vqvae")
        self.networks: dict[str, nn.Module] = {"vqvae": self.vqvae}
        self.phases = (Phase("vqvae", ("vqvae",)),)
        self.recipe = recipe

    def initialize(self, networks: dict[str, nn.Module]) -> None:
        """Codebooks start at vectors of pictures drawn from the data, the same on every rank."""
        order = np.random.default_rng(seed_of(self.recipe.seed, "caching", 0)).permutation(len(self.data))
        pictures = collate([self.data[(int(item), 0)] for item in order[:FIRST_PICTURES]])["picture"]
        networks["vqvae"].initialize_from_batch(self._observed(pictures.to(networks["vqvae"].device), None))

    def losses(self, networks: dict[str, nn.Module], batch: dict[str, Any], phase: str, generator: Generators) -> ObjectiveOutput:
        """Reconstruction and quantisation of a batch of pictures (B, C, H, W)."""
        for quantizer in networks["vqvae"].quantizers:
            quantizer.start_epoch(max(batch["draw"]))
        return self.objective(networks["vqvae"], self._observed(batch["picture"], generator), generator=generator)

    def _observed(self, pictures: Tensor, generator: Generators) -> Tensor:
        config = self.vqvae.config
        if generator is None:
            generator = torch.Generator().manual_seed(self.recipe.seed)
        return observe(levels_of(pictures, config.num_bits), config.likelihood, config.num_bits, generator).x

    @torch.no_grad()
    def draw_samples(self, networks: dict[str, nn.Module]) -> Image.Image:
        """Pictures (held-out ones where there are any) above their reconstructions."""
        source = self.held_out or self.data
        count = min(self.sample["pictures"], len(source))
        pictures = collate([source[(item, 0)] for item in range(count)])["picture"].to(networks["vqvae"].device)
        return picture_grid(torch.cat([pictures, networks["vqvae"](self._observed(pictures, None)).distribution.mean]), columns=count)

    def save(self, networks: dict[str, nn.Module], folder: Path, facts: dict[str, Any]) -> None:
        """A `VQVAEPipeline` without priors, with what was measured on the held-out pictures in its card."""
        vqvae = networks["vqvae"].eval()
        notes = training_notes(self.recipe, {**facts, **self.measure(vqvae)})
        VQVAEPipeline(vqvae).save_pretrained(folder, license=self.recipe.card.license, notes=notes)

    @torch.no_grad()
    def measure(self, vqvae: nn.Module) -> dict[str, Any]:
        """Reconstruction and use of the codebooks, on the held-out pictures."""
        if self.held_out is None:
            return {}
        nats, used = [], [torch.zeros(vqvae.config.num_embeddings) for _ in vqvae.code_shapes]
        for start in range(0, len(self.held_out), 64):
            items = range(start, min(start + 64, len(self.held_out)))
            x = self._observed(collate([self.held_out[(item, 0)] for item in items])["picture"].to(vqvae.device), None)
            output = vqvae(x)
            nats.append(-output.distribution.log_prob(x).cpu() / x[0].numel())
            for count, codes in zip(used, output.codes, strict=True):
                count += torch.bincount(codes.flatten().cpu(), minlength=len(count))
        measured: dict[str, Any] = {"held-out -log p(x | codes) (nats/dim)": round(torch.cat(nats).mean().item(), 4)}
        for number, count in enumerate(used):
            name = f"codebook {number + 1} of {len(used)}, from the top" if len(used) > 1 else "codebook"
            measured[f"{name}: codes in use on held-out pictures"] = f"{int((count > 0).sum())} of {len(count)}"
            share = count / count.sum()
            measured[f"{name}: perplexity"] = round(torch.exp(-torch.special.xlogy(share, share).sum()).item(), 1)
        for name, value in measured.items():
            logger.info("%s: %s", name, value)
        return measured
