"""EDM's `.pkl`: DDPM++, NCSN++ and ADM under EDM's, the VP, the VE or improved DDPM's preconditioning.

References: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", https://arxiv.org/abs/2206.00364
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..models.denoisers.score_unet import ScoreUNetModel
from ..pipelines.diffusion_image import DiffusionImagePipeline
from ..processes.discrete_vp import DiscreteVPPath
from ..processes.edm import EDMPath
from ..processes.parameterization import Parameterization
from ..processes.ve import VEPath
from ..processes.vp_sde import VPSDEPath
from ..schedulers.heun import HeunScheduler
from . import edm_keys, nvidia
from .base import Component, Format, Plan
from .pickles import Record
from .reader import Checkpoint, tensors

LICENCE = "CC BY-NC-SA 4.0 for NVIDIA's own networks: non-commercial use, and converted weights stay under it"
PRECONDITIONINGS = ("EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond")
_NETWORKS = ("SongUNet", "DhariwalUNet")
_SAMPLED = (0.002, 80.0)  # the range of EDM's sampler, where the network names no narrower one
_SETTINGS = ("sigma_min", "sigma_max", "sigma_data", "beta_d", "beta_min", "M", "epsilon_t", "C_1", "C_2")


class EDM(Format):
    """The network becomes the `unet` of a `DiffusionImagePipeline` with Heun's method: `ScoreUNetModel`, or `UNet2DModel` for ADM."""

    name = "edm"
    title = "NVIDIA's EDM"
    paper = "https://arxiv.org/abs/2206.00364"
    licence = LICENCE
    licence_id = "cc-by-nc-sa-4.0"
    extensions = (".pkl",)
    options = {"network": "ema (default), or another of the pickle's networks"}

    def matches(self, checkpoint: Checkpoint) -> float:
        found = nvidia.records(checkpoint)
        return max((1.0 for record in found.values() if record.name in PRECONDITIONINGS and inner(record) is not None), default=0.0)

    def plan(self, checkpoint: Checkpoint, options: Mapping[str, Any]) -> Plan:
        source, record = chosen(checkpoint, options, PRECONDITIONINGS)
        network = inner(record)
        if network is None:
            raise ValueError(f"{checkpoint.path}: its network is none of {', '.join(_NETWORKS)}.")
        settings = {name: record.get(name) for name in _SETTINGS if record.get(name) is not None}
        parameterization = parameterization_of(record.name, settings)
        state = {key.removeprefix("model."): value for key, value in tensors(record).items() if key.startswith("model.")}
        given = nvidia.arguments(network, ("img_resolution", "in_channels", "out_channels"))
        if network.name == "SongUNet":
            cls, config, found = ScoreUNetModel, edm_keys.score_unet_config(given), edm_keys.score_unet_map(given, state)
        else:
            from diffusers import UNet2DModel

            cls, config, found = UNet2DModel, edm_keys.adm_config(given), edm_keys.adm_map(given, state)
        classes, null = given.get("label_dim", 0), bool(given.get("label_dropout", 0))
        plan = Plan(self.name, DiffusionImagePipeline, {})
        plan.components["unet"] = Component(cls, config, lambda: edm_keys.lazily(found, state))
        edm_keys.account(plan, found, f"{source}.model.", "unet")
        if record.name == "iDDPMPrecond":
            plan.dropped[f"{source}.u"] = "the noise levels, which the schedule's betas give"
        rest_of(plan, checkpoint, source)
        plan.objects["scheduler"] = scheduler_for(parameterization)
        plan.init["default_num_inference_steps"] = 18 if config["sample_size"] <= 32 else 40
        if classes and null:
            plan.init["null_class"] = classes
        plan.notes.append(f"{network.name} under {record.name}: {parameterization.prediction} on the {parameterization.path.name} path, "
                          f"at {parameterization.time_input}")  # fmt: skip
        return plan


def parameterization_of(name: str, settings: Mapping[str, Any]) -> Parameterization:
    """What a network predicts under one of EDM's preconditionings, and at what time.

    Args:
        name: of the class, one of `PRECONDITIONINGS`.
        settings: its attributes: sigma_min, sigma_max, sigma_data; beta_d, beta_min, M, epsilon_t; C_1, C_2.
    Raises:
        ValueError: the name is not known, or a setting cannot be expressed.

    References: Karras et al. 2022, table 1 and appendix C, https://arxiv.org/abs/2206.00364
    """
    if name == "EDMPrecond":
        low, high = max(settings.get("sigma_min", 0.0), _SAMPLED[0]), min(settings.get("sigma_max", math.inf), _SAMPLED[1])
        return Parameterization(EDMPath(low, high), "edm", sigma_data=float(settings.get("sigma_data", 0.5)))
    if name == "VPPrecond":  # c_in x is the state of the VP path, and F is eps there
        low = float(settings.get("beta_min", 0.1))
        path = VPSDEPath(low, low + float(settings.get("beta_d", 19.9)), float(settings.get("epsilon_t", 1e-5)))
        return Parameterization(path, "epsilon", time_input=f"{int(settings.get('M', 1000)) - 1} t")
    if name == "VEPrecond":  # x_0 = x + sigma F, so F is -eps
        path = VEPath(float(settings.get("sigma_min", 0.02)), float(settings.get("sigma_max", 100.0)))
        return Parameterization(path, "epsilon", "log(sigma/2)", sign=-1)
    if name == "iDDPMPrecond":
        constants = (settings.get("C_1", 0.001), settings.get("C_2", 0.008))
        if constants != (0.001, 0.008):
            raise ValueError(f"iDDPMPrecond: C_1 = {constants[0]} and C_2 = {constants[1]}; the cosine schedule has 0.001 and 0.008.")
        path = DiscreteVPPath(int(settings.get("M", 1000)), beta_schedule="squaredcos_cap_v2")
        return Parameterization(path, "epsilon", variance="learned_range")
    raise ValueError(f"the preconditioning {name!r} is not known; known are {', '.join(PRECONDITIONINGS)}.")


def scheduler_for(parameterization: Parameterization) -> HeunScheduler:
    """Heun's method on Karras' grid, for any of the networks, as in EDM's own sampler."""
    if isinstance(parameterization.path, VEPath):  # EDM's among them; the ends of the grid are the network's
        grid = {} if isinstance(parameterization.path, EDMPath) else {"use_karras_sigmas": True}
    else:
        grid = {"use_karras_sigmas": True, "sigma_min": _SAMPLED[0], "sigma_max": _SAMPLED[1]}
    return HeunScheduler(**grid).bind(parameterization)


def inner(record: Record) -> Record | None:
    """The network inside a preconditioning."""
    network = (record.get("_modules") or {}).get("model")
    return network if isinstance(network, Record) and network.name in _NETWORKS else None


def chosen(checkpoint: Checkpoint, options: Mapping[str, Any], kinds: tuple[str, ...]) -> tuple[str, Record]:
    """The network that is asked for, and its name in the pickle.

    Raises:
        ValueError: there is none of that name, or it is no network.
    """
    found = {name: record for name, record in nvidia.records(checkpoint).items() if record.name in kinds}
    name = options.get("network", "ema" if "ema" in found else next(iter(found), "ema"))
    if name not in found:
        raise ValueError(f"{checkpoint.path} has no network {name!r} (it has {', '.join(found) or 'none'}); choose another by network=.")
    return name, found[name]


def rest_of(plan: Plan, checkpoint: Checkpoint, source: str) -> None:
    """What the pickle holds besides its network, by name."""
    for name in checkpoint.tree:
        if name != source and not any(key.startswith(f"{name}.") for key in plan.dropped):
            plan.dropped[f"{name}.*"] = "for training only"


__all__ = ["EDM", "PRECONDITIONINGS", "parameterization_of"]
