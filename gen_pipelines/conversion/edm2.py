"""EDM2's `.pkl`: the magnitude-preserving U-Net, for pictures or for the latents of an autoencoder that lies elsewhere.

References: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", https://arxiv.org/abs/2312.02696
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..models.denoisers.edm2_unet import EDM2UNetModel
from ..pipelines.diffusion_image import DiffusionImagePipeline
from . import edm, edm_keys, nvidia
from .autoencoders import read_autoencoder
from .base import Component, Format, Made, Plan
from .pickles import Record
from .reader import Checkpoint, tensors


class EDM2(Format):
    """The network becomes the `unet` of a `DiffusionImagePipeline` with Heun's method; with latents, an autoencoder its `vae`."""

    name = "edm2"
    title = "NVIDIA's EDM2"
    paper = "https://arxiv.org/abs/2312.02696"
    licence = edm.LICENCE
    licence_id = "cc-by-nc-sa-4.0"
    extensions = (".pkl",)
    options = {
        "network": "ema (default), or another of the pickle's networks",
        "vae": "for networks of latents: the folder of the AutoencoderKL (stabilityai/sd-vae-ft-mse for NVIDIA's own), or none",
    }

    def matches(self, checkpoint: Checkpoint) -> float:
        found = nvidia.records(checkpoint)
        return max((1.0 for record in found.values() if record.name == "Precond" and "unet.out_gain" in tensors(record)), default=0.0)

    def plan(self, checkpoint: Checkpoint, options: Mapping[str, Any]) -> Plan:
        source, record = edm.chosen(checkpoint, options, ("Precond",))
        given = nvidia.arguments(record, ("img_resolution", "img_channels", "label_dim"))
        sigma_data = given.pop("sigma_data", 0.5)
        given.pop("use_fp16", None)
        given["in_channels"] = given["out_channels"] = given.pop("img_channels", None)
        state = tensors(record)
        config, found = edm_keys.edm2_config(given), edm_keys.edm2_map(given, state)
        plan = Plan(self.name, DiffusionImagePipeline, {})
        plan.components["unet"] = Component(EDM2UNetModel, config, lambda: edm_keys.lazily(found, state))
        edm_keys.account(plan, found, f"{source}.", "unet")
        plan.objects["scheduler"] = edm.scheduler_for(edm.parameterization_of("EDMPrecond", {"sigma_data": sigma_data}))
        plan.init["default_num_inference_steps"] = 32
        encoder = checkpoint.tree.get("encoder")
        if isinstance(encoder, Record) and encoder.name == "StabilityVAEEncoder":
            add_autoencoder(plan, encoder, options.get("vae"))
        elif isinstance(encoder, Record) and encoder.name != "StandardRGBEncoder":
            raise ValueError(f"{checkpoint.path}: the encoder {encoder.name} is neither StandardRGBEncoder nor StabilityVAEEncoder.")
        elif options.get("vae"):
            raise ValueError(f"{checkpoint.path}: this network draws pictures; leave vae= out.")
        edm.rest_of(plan, checkpoint, source)
        return plan


def add_autoencoder(plan: Plan, encoder: Record, where: Any) -> None:
    """The autoencoder named by the option, with the scaling of latents that the pickle records, as a component.

    EDM2 gives it pictures in [0, 1] and takes such from it, and pipelines give and take [-1, 1]: its first and last convolution are changed
    to that, exactly for the decoder; the encoder's differs in the outermost pixels, where a convolution pads with zeros.
    """
    name = encoder.get("vae_name") or (encoder.get("_init_kwargs") or {}).get("vae_name", "stabilityai/sd-vae-ft-mse")
    scale, bias = (torch.as_tensor(encoder.get(part)).double().flatten() for part in ("scale", "bias"))
    plan.dropped |= {f"encoder.{part}": "in the autoencoder's configuration" for part in ("scale", "bias")}
    read_autoencoder(plan, where, len(scale), name)
    if "vae" not in plan.components:
        return
    component = plan.components["vae"]
    state = component.state
    component.config |= {
        "latents_mean": (-bias / scale).tolist(), "latents_std": (1 / scale).tolist(), "scaling_factor": 1.0, "shift_factor": None,
    }  # fmt: skip
    component.state = lambda: _of_symmetric_pictures(dict(state()))
    plan.notes.append(f"Latents of {name}; its first and last convolution were changed from pictures in [0, 1] to [-1, 1].")


def _of_symmetric_pictures(state: dict[str, Tensor]) -> dict[str, Tensor | Made]:
    def made(key: str, function: Any) -> Made:
        return Made(function, tuple(state[key].shape), state[key].dtype)

    first, last = state["encoder.conv_in.weight"], state["decoder.conv_out.weight"]
    return {
        **state,
        "encoder.conv_in.weight": made("encoder.conv_in.weight", lambda: first / 2),
        "encoder.conv_in.bias": made("encoder.conv_in.bias", lambda: state["encoder.conv_in.bias"] + first.sum((1, 2, 3)) / 2),
        "decoder.conv_out.weight": made("decoder.conv_out.weight", lambda: last * 2),
        "decoder.conv_out.bias": made("decoder.conv_out.bias", lambda: state["decoder.conv_out.bias"] * 2 - 1),
    }


__all__ = ["EDM2", "add_autoencoder"]
