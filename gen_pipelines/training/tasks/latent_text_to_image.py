"""Trains a text-conditional denoiser, and if asked the text encoder with it, in the latents of a finished autoencoder."""

from __future__ import annotations

import copy
import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ...models.calling import encode_text, predict
from ...models.latent_space import scale_latents
from ...pipelines.guidance import as_guidance
from ...processes import Parameterization
from ..card import training_notes
from ..config import coerce
from ..data import CaptionNoise, LatentData
from ..objectives.base import ObjectiveOutput, Phase
from ..objectives.denoising import DenoisingObjective
from ..objectives.time_densities import TIME_DENSITIES
from ..random import Generators, seed_of
from ..tokenizer import train_clip_tokenizer
from .autoencoder import encode_all, mode
from .base import build_network, grid, latent_size, open_pictures, settings_of
from .denoising import build_scheduler, choose, choose_weighting, rank_device

logger = logging.getLogger(__name__)

MODEL = {
    "vae": None,
    "tokenizer": None,
    "text_encoder": None,
    "train_text_encoder": True,
    "denoiser": None,
    "scheduler": {"class": "FlowMatchEulerScheduler"},
    "cache_latents": True,
    "save_dtype": "float32",
    "default_num_inference_steps": 50,
    "default_guidance_scale": 7.5,
}
OBJECTIVE = {"time_density": "uniform", "weighting": "target", "drop_caption": 0.1, "word_dropout": 0.0, "pseudo_word": 0.0, "article": 0.0}
SAMPLE = {"pictures": 32, "steps": 24, "guidance": None}


class LatentTextToImageTask:
    """A recipe's `model` names the autoencoder (a folder or repository), tokenizer, text encoder, denoiser and scheduler.

    The network's parameterization is what its scheduler's config says; `objective` chooses the time density and the weighting.
    """

    def __init__(self, recipe: Any) -> None:
        model = settings_of(recipe, "model", MODEL)
        objective = settings_of(recipe, "objective", OBJECTIVE)
        self.sample = settings_of(recipe, "sample", SAMPLE)
        for part in ("vae", "tokenizer", "text_encoder", "denoiser"):
            if model[part] is None:
                raise ValueError(f"model.{part} is missing: the task latent_text_to_image needs vae, tokenizer, text_encoder and denoiser.")
        if recipe.data.text_column is None:
            raise ValueError("data.text_column is missing: the task latent_text_to_image learns from captions.")
        if recipe.data.streaming:
            raise ValueError("data.streaming: the task latent_text_to_image keeps the captions in memory; use a data set on the disk.")
        augmented = recipe.data.horizontal_flip or recipe.data.shift
        if model["cache_latents"] and augmented:
            raise ValueError("model.cache_latents: cached latents cannot be augmented; set it to false, or flip and shift to 0.")
        if model["save_dtype"] not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"model.save_dtype: {model['save_dtype']!r} is none of float32, float16, bfloat16.")
        if self.sample["pictures"] < 1 or self.sample["steps"] < 1:
            raise ValueError(f"sample: at least 1 picture in 1 step, got {self.sample} (loop.sample_every=0 draws none).")
        if self.sample["guidance"] is not None:
            self.sample["guidance"] = coerce(float, self.sample["guidance"], "sample.guidance")
            as_guidance(self.sample["guidance"])
        self.recipe, self.model = recipe, model
        self.scheduler = build_scheduler(model["scheduler"])
        self.objective = DenoisingObjective(
            self.scheduler.parameterization or Parameterization.from_config(dict(self.scheduler.config)),
            choose(TIME_DENSITIES, objective["time_density"], "objective.time_density"),
            choose_weighting(objective["weighting"]),
        )

        pictures, self.held_out = open_pictures(recipe)
        self.captions = pictures.captions()

        torch.manual_seed(recipe.seed)  # initial weights; a training run is the one place that seeds
        self.vae = build_network(model["vae"], "model.vae")
        self.vae.eval().requires_grad_(False)
        self.tokenizer = build_tokenizer(model["tokenizer"], self.captions)
        self.text_encoder = build_text_encoder(model["text_encoder"], self.tokenizer)
        self.denoiser = build_network(model["denoiser"], "model.denoiser")
        self._check_sizes()
        self.noise = CaptionNoise(
            self.captions, objective["drop_caption"], objective["word_dropout"], objective["pseudo_word"], objective["article"]
        )
        self.data: Any = pictures
        if model["cache_latents"]:
            self.data = LatentData(
                lambda: self.normalise(encode_all(self.vae.to(rank_device()), pictures, batch_size=64)),
                self.captions,
                pictures.indices,
                fingerprint=pictures.fingerprint,
            )
        self.networks: dict[str, nn.Module] = {"denoiser": self.denoiser}
        if model["train_text_encoder"]:
            self.networks["text_encoder"] = self.text_encoder
        else:
            self.text_encoder.eval().requires_grad_(False)
        self.phases = (Phase("denoiser", tuple(self.networks)),)

    def _check_sizes(self) -> None:
        """The denoiser is made for the latents that it will get, so that the pipeline's default size is the one that was trained."""
        size, there = latent_size(self.vae, self.recipe.data.resolution), self.denoiser.config.get("sample_size")
        if size is not None and there not in (None, size, [size, size], (size, size)):
            raise ValueError(
                f"model.denoiser.sample_size: {there}, but pictures of {self.recipe.data.resolution} pixels (data.resolution) have latents "
                f"of {size} x {size}; set it to {size}."
            )
        channels, wanted = self.vae.config.get("latent_channels"), self.denoiser.config.get("in_channels")
        if channels is not None and wanted is not None and channels != wanted:
            raise ValueError(f"model.denoiser.in_channels: {wanted}, but the latents of model.vae have {channels} channels.")

    def normalise(self, latents: Tensor) -> Tensor:
        """Latents (B, c, h, w) as the denoiser sees them: mean 0, deviation 1; the inverse of the pipeline's `decode_latents`."""
        return scale_latents(self.vae.config, latents)

    def losses(self, networks: dict[str, nn.Module], batch: dict[str, Any], phase: str, generator: Generators) -> ObjectiveOutput:
        """Denoising losses of a batch of latents (B, c, h, w), or of pictures that are encoded on the fly, with their captions."""
        if "latents" in batch:
            x_0 = batch["latents"]
        else:
            with torch.no_grad():
                x_0 = self.normalise(mode(self.vae.to(batch["picture"].device), batch["picture"]))
        seeds = [seed_of(self.recipe.seed, "augmentation", row, draw) for row, draw in zip(batch["row"], batch["draw"], strict=True)]
        captions = [self.noise(caption, seed) for caption, seed in zip(batch["text"], seeds, strict=True)]
        text_encoder = networks.get("text_encoder", self.text_encoder.to(x_0.device))
        condition = encode_text(self.tokenizer, text_encoder, captions, device=x_0.device, warn=False)
        return self.objective(partial(predict, networks["denoiser"]), x_0, condition=condition, generator=generator)

    def pipeline(self, networks: dict[str, nn.Module]) -> Any:
        """The pipeline made of these networks and the task's other components."""
        from ...pipelines.latent_text_to_image import LatentTextToImagePipeline

        denoiser = networks["denoiser"]
        name = "unet" if type(denoiser).__name__.startswith("UNet") else "transformer"
        return LatentTextToImagePipeline(
            vae=self.vae,
            text_encoder=networks.get("text_encoder", self.text_encoder),
            tokenizer=self.tokenizer,
            scheduler=self.scheduler,
            default_num_inference_steps=self.model["default_num_inference_steps"],
            default_guidance_scale=self.model["default_guidance_scale"],
            **{name: denoiser},
        )

    def draw_samples(self, networks: dict[str, nn.Module]) -> Image.Image:
        """Held-out captions (training captions where none are held out): the real pictures in one row, drawn ones below, 16 to a row."""
        source = self.held_out
        captions = (source.captions() if source else self.captions)[: self.sample["pictures"]]
        pipe = self.pipeline(networks)
        pipe.set_progress_bar_config(disable=True)
        drawn = pipe(
            captions,
            num_inference_steps=self.sample["steps"],
            guidance_scale=self.sample["guidance"],
            generator=[torch.Generator().manual_seed(seed_of(self.recipe.seed, "sampling", i)) for i in range(len(captions))],
            output_type="pt",
        ).images.cpu()
        rows = []
        for start in range(0, len(captions), 16):
            if source:
                rows.append(torch.stack([source.picture(i) for i in range(start, min(start + 16, len(captions)))]).float() / 127.5 - 1)
            rows.append(drawn[start : start + 16] * 2 - 1)
        return grid(torch.cat(rows), columns=min(16, len(captions)))

    def save(self, networks: dict[str, nn.Module], folder: Path, facts: dict[str, Any]) -> None:
        """The whole pipeline in the Hub's layout, in `model.save_dtype`."""
        pipe = copy.deepcopy(self.pipeline(networks)).to("cpu", dtype=getattr(torch, self.model["save_dtype"]))
        pipe.save_pretrained(folder, license=self.recipe.card.license, notes=training_notes(self.recipe, facts))


def build_tokenizer(settings: dict[str, Any], captions: list[str]) -> Any:
    """`{from: FOLDER_OR_REPO, subfolder: ...}`, or `{vocab_size: ..., max_length: ...}` to learn one from the captions."""
    if "from" in settings:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(settings["from"], subfolder=settings.get("subfolder", ""), trust_remote_code=False)
    unknown = set(settings) - {"vocab_size", "max_length"}
    if unknown or len(settings) < 2:
        raise ValueError(f"model.tokenizer: give `from`, or vocab_size and max_length; got {settings}.")
    return train_clip_tokenizer(captions, settings["vocab_size"], settings["max_length"])


def build_text_encoder(settings: dict[str, Any], tokenizer: Any) -> nn.Module:
    """A text encoder whose vocabulary and special tokens are the tokenizer's, unless `from` names a finished one."""
    if "from" not in settings:
        tokens = {
            "vocab_size": len(tokenizer),
            "max_position_embeddings": tokenizer.model_max_length,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        settings = {**tokens, **settings}
    return build_network({"class": "CLIPTextModel", **settings}, "model.text_encoder")
