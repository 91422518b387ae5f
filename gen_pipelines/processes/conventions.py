"""The conventions of the networks in use, by name, and which class of diffusers follows which.

What a network is given for the time and which way its velocity points is written nowhere in a checkpoint: codebases have it in their
sampling loops, diffusers in its pipelines. It is collected here, so that a network can be named (`Parameterization.named("sit")`) or found
from its class (`Parameterization.from_config(scheduler_config, model=transformer)`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .discrete_vp import DiscreteVPPath
from .edm import EDMPath
from .linear import LinearPath
from .parameterization import Parameterization
from .sub_vp import SubVPPath
from .ve import VEPath
from .vp_sde import VPSDEPath

__all__ = ["CONVENTIONS", "Convention", "convention_named", "fields_from_model"]


@dataclass(frozen=True)
class Convention:
    """What the networks of one codebase are.

    Args:
        parameterization: with the settings of its best-known network; a checkpoint may have other betas or another range.
        about: what the network is given and gives, in words.
        models: classes of diffusers that follow it. Those on the linear path follow it whatever the scheduler config says of the time.
    """

    parameterization: Parameterization
    about: str
    models: tuple[str, ...] = ()


_LINEAR = LinearPath()


def _flow(time_input: str, sign: int = 1) -> Parameterization:
    return Parameterization(_LINEAR, "flow_prediction", time_input=time_input, sign=sign)


CONVENTIONS: dict[str, Convention] = {
    "sd": Convention(
        Parameterization(DiscreteVPPath(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")),
        "Stable Diffusion 1 and XL: eps at an index 0 ... 999; 2.1 predicts v",
        ("UNet2DConditionModel", "HunyuanDiT2DModel", "PixArtTransformer2DModel"),
    ),
    "ldm": Convention(
        Parameterization(DiscreteVPPath(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear")),
        "latent diffusion on ImageNet: eps at an index",
    ),
    "ddpm": Convention(Parameterization(DiscreteVPPath()), "DDPM: eps at an index, linear betas", ("UNet2DModel",)),
    "guided_diffusion": Convention(
        Parameterization(DiscreteVPPath(), variance="learned_range"),
        "guided diffusion: eps and a learned variance in twice the channels, at an index (index_scaled with rescale_timesteps)",
    ),
    "dit": Convention(
        Parameterization(DiscreteVPPath(), variance="learned_range"),
        "DiT: eps and a learned variance in twice the channels, at an index",
        ("DiTTransformer2DModel",),
    ),
    "sd3": Convention(
        _flow("1000 t"),
        "Stable Diffusion 3: eps - x_0 at 1000 t",
        ("SD3Transformer2DModel", "WanTransformer3DModel", "CogView4Transformer2DModel", "HunyuanVideoTransformer3DModel",
         "LTXVideoTransformer3DModel"),
    ),
    "flux": Convention(
        _flow("t"),
        "Flux: eps - x_0 at t",
        ("FluxTransformer2DModel", "Flux2Transformer2DModel", "QwenImageTransformer2DModel", "ChromaTransformer2DModel",
         "AuraFlowTransformer2DModel", "Krea2Transformer2DModel"),
    ),
    "lumina": Convention(
        _flow("1 - t", -1),
        "Lumina and Z-Image: x_0 - eps at 1 - t",
        ("LuminaNextDiT2DModel", "Lumina2Transformer2DModel", "ZImageTransformer2DModel"),
    ),
    "hidream": Convention(_flow("1000 t", -1), "HiDream: x_0 - eps at 1000 t", ("HiDreamImageTransformer2DModel",)),
    "nucleus": Convention(_flow("t", -1), "Nucleus: x_0 - eps at t", ("NucleusMoEImageTransformer2DModel",)),
    "sana": Convention(_flow("1000 t"), "Sana: eps - x_0 at 1000 t timestep_scale, of the model's config", ("SanaTransformer2DModel",)),
    "mochi": Convention(_flow("1000 (1 - t)", -1), "Mochi: x_0 - eps at 1000 (1 - t)", ("MochiTransformer3DModel",)),
    "svd": Convention(
        Parameterization(EDMPath(0.002, 700.0), "edm", sigma_data=1.0, sign=-1),
        "Stable Video Diffusion: v of a variance-preserving state, which is -F of EDM at sigma_data 1, at log(sigma)/4",
        ("UNetSpatioTemporalConditionModel",),
    ),
    "edm": Convention(Parameterization(EDMPath(), "edm", sigma_data=0.5), "EDM: F at log(sigma)/4, of c_in x"),
    "edm2": Convention(Parameterization(EDMPath(), "edm", sigma_data=0.5), "EDM2: as EDM, sigma_data 0.5 (of its scaled latents)"),
    "consistency": Convention(
        Parameterization(EDMPath(), "consistency", sigma_data=0.5, clip_sample=True),
        "consistency models: F of the boundary form at 250 log(sigma), x_0 clipped to [-1, 1]",
    ),
    "torchcfm": Convention(_flow("1 - t", -1), "torchcfm, and flow_matching's linear path: x_0 - eps at the time that is 1 for data"),
    "sit": Convention(_flow("1 - t", -1), "SiT, linear path: x_0 - eps at the time that is 1 for data"),
    "rectified_flow": Convention(_flow("999 (1 - t)", -1), "rectified flow: x_0 - eps at 999 times the time that is 1 for data"),
    "score_sde_vp": Convention(Parameterization(VPSDEPath(), time_input="999 t"), "score_sde, VP: eps at 999 t"),
    "score_sde_sub_vp": Convention(Parameterization(SubVPPath(), time_input="999 t"), "score_sde, sub-VP: eps at 999 t"),
    "score_sde_ve": Convention(
        Parameterization(VEPath(), "score", time_input="sigma"), "score_sde, VE: the score at sigma (the network itself divides by sigma)"
    ),
}  # fmt: skip

_FLOW_MODELS = {model: name for name, c in CONVENTIONS.items() if c.parameterization.path == _LINEAR for model in c.models}
# what this library trains as a flow: the network is given the scheduler's own time
_ANY_PATH = frozenset(
    ("UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel", "PixArtTransformer2DModel", "HunyuanDiT2DModel", "Transformer2DModel",
     "ScoreUNetModel", "EDM2UNetModel", "KDiffusionUNetModel", "HDiTModel", "ADMUNet2DModel")
)  # fmt: skip
_REFUSED = {
    "CosmosTransformer3DModel": "its pipeline preconditions on the linear path (c_in = c_skip = 1 - t, c_out = -t)",
    "CogVideoXTransformer3DModel": "its schedule is shifted in SNR, which its scheduler config does not say in full",
}


def convention_named(name: str) -> Convention:
    """The entry of `CONVENTIONS`; capitals, hyphens and spaces do not matter.

    Raises:
        ValueError: there is none of that name.
    """
    key = name.lower().replace("-", "_").replace(" ", "_")
    if key not in CONVENTIONS:
        raise ValueError(f"Parameterization.named: {name!r} is not known; use one of {', '.join(CONVENTIONS)}.")
    return CONVENTIONS[key]


def _class_and_config(model: Any) -> tuple[str, Mapping[str, Any]]:
    if isinstance(model, str):
        return model, {}
    if isinstance(model, type):
        return model.__name__, {}
    config = model if isinstance(model, Mapping) else getattr(model, "config", None)
    if not isinstance(config, Mapping):
        raise TypeError(
            f"Parameterization.from_config: model is a {type(model).__name__}; give a network of diffusers, its class, the name of that, "
            "or its config."
        )
    name = config.get("_class_name") if isinstance(model, Mapping) else type(model).__name__
    if not isinstance(name, str):
        raise ValueError("Parameterization.from_config: the model's config has no '_class_name'; give its class as well, as the model.")
    return name, config


def fields_from_model(model: Any, fields: Mapping[str, Any], count: int, said: frozenset[str]) -> dict[str, Any]:
    """What a network's class and config add to what its scheduler config says.

    Args:
        model: the network, its class, the name of that, or its config.
        fields: of the `Parameterization` that the scheduler config describes.
        count: the scheduler's number of training steps.
        said: the fields that the caller or a `parameterization` key has given: those stay.

    Returns: the fields that change: time_input and sign on the linear path, variance where the network has twice the channels.

    Raises:
        ValueError: a class whose convention is not known, or contradicts the scheduler config.
    """
    name, config = _class_and_config(model)
    if name in _REFUSED:
        raise ValueError(f"from_config: {name} cannot be described by its scheduler config: {_REFUSED[name]}.")
    found: dict[str, Any] = {}
    if isinstance(fields["path"], LinearPath):
        found = _flow_fields(name, config, count, said)
        if fields.get("sign") == -1 and "time_input" in fields and fields["time_input"] == "1000 (1 - t)":
            found = {}  # invert_sigmas says it
    elif name in _FLOW_MODELS:
        raise ValueError(
            f"from_config: {name} predicts a velocity on the linear path, but the scheduler config describes a network on the "
            f"{fields['path'].name} path; give the scheduler config that the repository came with."
        )
    channels_in, channels_out = config.get("in_channels"), config.get("out_channels")
    doubled = isinstance(channels_in, int) and channels_out == 2 * channels_in
    usual = name == "DiTTransformer2DModel" and not config  # every published one; harmless if this one did not learn it
    if (doubled or usual) and isinstance(fields["path"], DiscreteVPPath) and fields.get("variance") not in ("learned", "learned_range"):
        found["variance"] = "learned_range"
    return {k: v for k, v in found.items() if k not in said}


def _flow_fields(name: str, config: Mapping[str, Any], count: int, said: frozenset[str]) -> dict[str, Any]:
    if name in _ANY_PATH:
        return {}
    if name not in _FLOW_MODELS:
        if {"time_input", "sign"} <= said:
            return {}
        raise ValueError(
            f"from_config: it is not known what {name} is given for the time and which way its velocity points; a flow's scheduler config "
            f"does not say. Give time_input=... and sign=1 or -1. Known are {', '.join(sorted(_FLOW_MODELS))}."
        )
    p = CONVENTIONS[_FLOW_MODELS[name]].parameterization
    time_input = p.time_input
    scale = config.get("timestep_scale") if name == "SanaTransformer2DModel" else None
    if time_input == "1000 t":
        steps = count * (1.0 if scale is None else float(scale))
        if abs(steps - round(steps)) > 1e-6 or round(steps) < 1:
            raise ValueError(f"from_config: timestep_scale {scale} times {count} training steps is not a whole number; give time_input=...")
        time_input = "t" if round(steps) == 1 else f"{round(steps)} t"
    return {"time_input": time_input, "sign": p.sign}
