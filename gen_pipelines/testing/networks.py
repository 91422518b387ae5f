"""The kinds of network that a scheduler is tried on, as this library and as diffusers describe them."""

from typing import Any, NamedTuple

from ..processes.cosine import CosinePath
from ..processes.discrete_vp import DiscreteVPPath
from ..processes.edm import EDMPath
from ..processes.linear import LinearPath
from ..processes.parameterization import Parameterization
from ..processes.sub_vp import SubVPPath
from ..processes.ve import VEPath
from ..processes.vp_sde import VPSDEPath

__all__ = ["CONSISTENCY_NETWORKS", "GRIDS", "NETWORKS", "OTHER_NETWORKS", "SEVEN", "Network", "diffusers_scheduler", "grids_for"]


class Network(NamedTuple):
    """A kind of network: what it was trained to do, and the grid keys of the scheduler config it comes with."""

    parameterization: Parameterization
    grid: dict[str, Any]


_SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

# the kinds of network in use
NETWORKS: dict[str, Network] = {
    "sd_eps": Network(Parameterization(DiscreteVPPath(**_SD)), {"timestep_spacing": "leading", "steps_offset": 1}),
    "ddpm_eps": Network(Parameterization(DiscreteVPPath()), {}),
    "cosine_x_0": Network(Parameterization(DiscreteVPPath(beta_schedule="squaredcos_cap_v2"), "sample"), {}),
    "zero_snr_v": Network(
        Parameterization(DiscreteVPPath(**_SD, rescale_betas_zero_snr=True), "v_prediction"), {"timestep_spacing": "trailing"}
    ),
    "sd3_flow": Network(Parameterization(LinearPath(), "flow_prediction"), {"shift": 3.0}),
    "plain_flow": Network(Parameterization(LinearPath(), "flow_prediction", time_input="t"), {}),
    "edm": Network(Parameterization(EDMPath(), "edm", sigma_data=0.5), {}),
    "vp_cosine_v": Network(Parameterization(CosinePath(), "v_prediction"), {}),
}
SEVEN = tuple(name for name in NETWORKS if name != "vp_cosine_v")  # those that diffusers has a scheduler for

# the rest of the paths and predictions, each prediction at least once
OTHER_NETWORKS: dict[str, Network] = {
    "vp_sde_eps": Network(Parameterization(VPSDEPath()), {}),
    "sub_vp_score": Network(Parameterization(SubVPPath(), "score", time_input="t"), {}),
    "ve_score": Network(Parameterization(VEPath(), "score"), {}),
    "edm_eps": Network(Parameterization(EDMPath(), "epsilon"), {}),
    "linear_eps": Network(Parameterization(LinearPath(), "epsilon", lambda_range=(-5.0, 7.0)), {}),
    "data_at_1": Network(Parameterization(LinearPath(), "flow_prediction", time_input="1 - t", sign=-1), {}),
    "ddpm_flow": Network(Parameterization(DiscreteVPPath(), "flow_prediction"), {}),
    "ddpm_edm": Network(Parameterization(DiscreteVPPath(), "edm", sigma_data=0.3), {}),
}

# networks that jump to data in one evaluation, with the constructor's arguments of `ConsistencyScheduler`
CONSISTENCY_NETWORKS: dict[str, Network] = {
    "consistency": Network(Parameterization(EDMPath(), "consistency", sigma_data=0.5), {}),
    "distilled_flow": Network(Parameterization(LinearPath(), "flow_prediction"), {"rule": "consistency"}),
    "distilled_v": Network(Parameterization(DiscreteVPPath(rescale_betas_zero_snr=True), "v_prediction"), {"rule": "lcm"}),
}

# as a repository of diffusers stores them: class and arguments
_NATIVE: dict[str, tuple[str, dict[str, Any]]] = {
    "sd_eps": ("PNDMScheduler", {**_SD, "steps_offset": 1, "skip_prk_steps": True, "set_alpha_to_one": False}),
    "ddpm_eps": ("DDPMScheduler", {"clip_sample": False}),
    "cosine_x_0": ("DDPMScheduler", {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample", "clip_sample": False}),
    "zero_snr_v": (
        "DDIMScheduler",
        {**_SD, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False},
    ),
    "sd3_flow": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "plain_flow": ("FlowMatchEulerDiscreteScheduler", {}),
    "edm": ("EDMEulerScheduler", {}),
    "consistency": ("CMStochasticIterativeScheduler", {"clip_denoised": False}),
}


def diffusers_scheduler(network: str) -> Any:
    """The scheduler that a repository of diffusers has for a kind of network.

    Raises:
        ValueError: diffusers has none for it.
    """
    import diffusers

    if network not in _NATIVE:
        raise ValueError(f"diffusers_scheduler: diffusers has no scheduler for {network!r}; it has for {', '.join(_NATIVE)}.")
    name, arguments = _NATIVE[network]
    return getattr(diffusers, name)(**arguments)


# name -> grid keys of a scheduler config, for n steps
GRIDS: dict[str, dict[str, Any]] = {
    "leading": {"timestep_spacing": "leading"},
    "trailing": {"timestep_spacing": "trailing"},
    "linspace": {"timestep_spacing": "linspace"},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "lambda": {"use_lu_lambdas": True},
    "shift": {"shift": 3.0},
}
_FITTING = {
    "discrete_vp": ("leading", "trailing", "linspace", "karras", "exponential", "lambda"),
    "linear": ("trailing", "linspace", "karras", "lambda", "shift"),
    "cosine": ("trailing", "linspace", "karras", "lambda"),
    "vp_sde": ("trailing", "linspace", "karras", "lambda"),
    "sub_vp": ("trailing", "linspace", "karras", "lambda"),
    "ve": ("karras", "lambda"),
    "edm": ("karras", "lambda"),
}


def grids_for(network: Network) -> tuple[str, ...]:
    """The entries of `GRIDS` that are of use on a network's path: equal steps in the sigma of EDM, say, are not."""
    return _FITTING[network.parameterization.path.name]
