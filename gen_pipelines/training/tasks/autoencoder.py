"""Trains the autoencoder of latent diffusion (diffusers' AutoencoderKL or VQModel) and measures its latents' scale."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ...hub.card import model_card
from ...hub.saving import written_at_once
from ..card import training_notes
from ..data import PictureData, collate
from ..objectives.autoencoder import AutoencoderObjective, pyramid_distance
from ..objectives.base import ObjectiveOutput, Phase
from ..random import Generators
from .base import build_network, grid, latent_size, open_pictures, settings_of

logger = logging.getLogger(__name__)

OBJECTIVE = {"l1": 1.0, "l2": 0.0, "kl": 1e-6, "vq": 1.0, "perceptual": None, "perceptual_weight": 1.0}
PERCEPTUAL = {None: None, "pyramid": pyramid_distance}


class AutoencoderTask:
    """A recipe's `model.vae` is the network, `objective` the weights of `AutoencoderObjective`.

    `model.train: decoder` trains the decoder of a finished autoencoder alone: its latents stay what they are, so that a denoiser that was
    trained in them keeps working and only the pictures get sharper.
    """

    def __init__(self, recipe: Any) -> None:
        model = settings_of(recipe, "model", {"vae": None, "train": "all"})
        if model["train"] not in ("all", "decoder"):
            raise ValueError(f"model.train: {model['train']!r} is none of all, decoder.")
        settings = settings_of(recipe, "objective", OBJECTIVE)
        self.sample = settings_of(recipe, "sample", {"pictures": 16})
        if self.sample["pictures"] < 1:
            raise ValueError(f"sample.pictures: {self.sample['pictures']} is not allowed; give 1 or more (loop.sample_every=0: none).")
        if model["vae"] is None:
            raise ValueError("model.vae is missing: give its class and arguments, such as {class: AutoencoderKL, latent_channels: 8, ...}.")
        if settings["perceptual"] not in PERCEPTUAL:
            raise ValueError(f"objective.perceptual: {settings['perceptual']!r} is none of {', '.join(map(str, PERCEPTUAL))}.")
        self.objective = AutoencoderObjective(**settings | {"perceptual": PERCEPTUAL[settings["perceptual"]]})
        self.data, self.held_out = open_pictures(recipe)
        self._first_of_stream: PictureData | None = None
        torch.manual_seed(recipe.seed)  # initial weights; a training run is the one place that seeds
        self.vae = build_network(model["vae"], "model.vae")
        latent_size(self.vae, recipe.data.resolution)
        self.networks: dict[str, nn.Module] = {"vae": self.vae} if model["train"] == "all" else {"decoder": self.vae.decoder}
        if model["train"] == "decoder":
            self.vae.requires_grad_(False)
            self.vae.decoder.requires_grad_(True)
        self.phases = (Phase("vae", tuple(self.networks)),)
        self.recipe = recipe

    def losses(self, networks: dict[str, nn.Module], batch: dict[str, Any], phase: str, generator: Generators) -> ObjectiveOutput:
        """Reconstruction and regularisation of a batch of pictures (B, C, H, W)."""
        vae = self.vae.to(batch["picture"].device)
        return self.objective(vae if "vae" in networks else _DecoderOnly(vae), batch["picture"], generator=generator)

    @torch.no_grad()
    def draw_samples(self, networks: dict[str, nn.Module]) -> Image.Image:
        """Pictures (held-out ones where there are any) above their reconstructions."""
        source = self.held_out or self._pictures()
        count = min(self.sample["pictures"], len(source))
        pictures = collate([source[(item, 0)] for item in range(count)])["picture"].to(self.vae.device)
        return grid(torch.cat([pictures, reconstruct(self.vae, pictures)]), columns=count)

    def _pictures(self) -> Any:
        """The pictures that the latents' scale is measured on: all of them, or the first 512 of a stream."""
        if not self.recipe.data.streaming:
            return self.data
        if self._first_of_stream is None:
            config = replace(self.recipe.data, text_column=None, label_column=None)
            self._first_of_stream = PictureData(list(self.data.take(512)), config, augmented=False)
        return self._first_of_stream

    def save(self, networks: dict[str, nn.Module], folder: Path, facts: dict[str, Any]) -> None:
        """The autoencoder's folder, with `scaling_factor` and `shift_factor` set so that new latents have mean 0 and deviation 1."""
        vae = self.vae.eval()
        if "vae" in networks:
            latents = encode_all(vae, self._pictures(), batch_size=64)
            values = {"scaling_factor": round(1 / latents.std().item(), 5)}
            if "shift_factor" in vae.config:
                values["shift_factor"] = round(latents.mean().item(), 5)
            vae.register_to_config(**values)
        metrics = {}
        if self.held_out is not None:
            metrics["held-out PSNR (dB)"] = round(psnr(vae, self.held_out), 2)
            logger.info("held-out PSNR %.2f dB", metrics["held-out PSNR (dB)"])
        with written_at_once(folder) as side:
            vae.save_pretrained(side, safe_serialization=True)
            if not (folder / "README.md").exists():
                notes = training_notes(self.recipe, {**facts, **metrics})
                (side / "README.md").write_text(
                    model_card(
                        folder.resolve().name,
                        type(vae).__name__,
                        {},
                        license=self.recipe.card.license,
                        notes=notes,
                        library=type(vae).__module__.split(".")[0],
                    ),
                    encoding="utf-8",
                )


class _DecoderOnly:
    """An autoencoder whose encoder is left out of the graph."""

    def __init__(self, vae: nn.Module) -> None:
        self.vae, self.decode = vae, vae.decode

    @torch.no_grad()
    def encode(self, x: Tensor) -> Any:
        return self.vae.encode(x)


def mode(vae: nn.Module, pictures: Tensor) -> Tensor:
    """The latents of pictures (B, C, H, W): the posterior's mode, or the vectors before quantisation; (B, c, h, w), unscaled, float32."""
    encoded = vae.encode(pictures)
    return (encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents).float()


def reconstruct(vae: nn.Module, pictures: Tensor) -> Tensor:
    """decode(encode(x)), at the mode of the posterior. Shapes (B, C, H, W)."""
    return vae.decode(mode(vae, pictures)).sample


@torch.no_grad()
def encode_all(vae: nn.Module, data: PictureData, batch_size: int) -> Tensor:
    """The latents (posterior modes) of a whole data set without augmentation, shape (N, c, h, w), unscaled, float32."""
    latents = []
    for start in range(0, len(data), batch_size):
        pictures = torch.stack([data.picture(item) for item in range(start, min(start + batch_size, len(data)))])
        latents.append(mode(vae, pictures.to(vae.device).float() / 127.5 - 1).cpu())
    return torch.cat(latents)


@torch.no_grad()
def psnr(vae: nn.Module, data: PictureData, batch_size: int = 64) -> float:
    """Mean over pictures of 10 log10(peak^2 / MSE), in dB, on 8-bit reconstructions (clipped and rounded)."""
    values = []
    for start in range(0, len(data), batch_size):
        pictures = torch.stack([data.picture(item) for item in range(start, min(start + batch_size, len(data)))]).to(vae.device).float()
        decoded = ((reconstruct(vae, pictures / 127.5 - 1).float().clamp(-1, 1) + 1) * 127.5).round()
        values.append(10 * torch.log10(255**2 / (decoded - pictures).square().flatten(1).mean(1).clamp_min(1e-12)))
    return torch.cat(values).mean().item()
