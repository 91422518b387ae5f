"""Reading and writing what a network is as a scheduler config of diffusers.

diffusers' keys stay the source of truth and are always written; the key `parameterization` holds what they cannot say.
"""

import math
from dataclasses import replace
from typing import Any

from .discrete_vp import DiscreteVPPath
from .edm import EDMPath
from .linear import LinearPath
from .parameterization import FIELD_NAMES, PREDICTIONS, Parameterization
from .path import Path
from .paths import path_from_config
from .ve import VEPath

__all__ = ["DIFFUSERS_KEYS", "NETWORK_KEYS", "OUR_KEYS", "check_config_keys", "parameterization_from_config", "parameterization_to_config"]

# every constructor argument of every scheduler of diffusers up to 0.42.1 (a test compares), and two that old files on the Hub still have
DIFFUSERS_KEYS = frozenset(
    """algorithm_type alpha_cum_end alpha_cum_start base_image_seq_len base_shift beta_end beta_schedule beta_start block_length
    clip_denoised clip_sample clip_sample_range correct_steps corrector_k corrector_order corrector_selection corrector_selection_tau
    corrector_steps disable_corrector dynamic_thresholding_ratio editing_threshold entropy_bound eps eta euler_at_final final_sigmas_type
    final_step_size_scale flow_shift gamma gamma_cum_end gamma_cum_start interpolation_type invert_sigmas lambda_min_clipped
    lower_order_final mask_token_id masking_schedule max_image_seq_len max_shift minimal_topk n_grid noise_mode noise_sampler_seed
    num_inference_steps num_policy_substeps num_train_timesteps num_vec_classes original_inference_steps predict_x0 prediction_type
    predictor_order rescale_betas_zero_snr rho s s_noise sample_max_value sampling_eps scale_factors scaler schedule_mode scheduler_type
    set_alpha_to_one shift shift_terminal sigma_data sigma_max sigma_min sigma_schedule skip_prk_steps snr snr_shift_scale solver_order
    solver_p solver_type stage_range stages steps_offset stochastic_sampling t_lim_ode t_lim_ode_below t_max t_min tail_step_multiplier
    tail_steps tau_func threshold thresholding time_shift_type timestep_scaling timestep_spacing timestep_type trained_betas tsr_k tsr_sigma
    upscale_mode use_beta_sigmas use_dynamic_shifting use_exponential_sigmas use_flow_sigmas use_karras_sigmas use_lu_lambdas variance_type
    beta_max beta_min s_churn s_max s_min predict_epsilon tensor_format""".split()
)
# keys of this library's schedulers that diffusers has not; a scheduler class adds its own when it is defined
OUR_KEYS: set[str] = {"parameterization"}

_VP_KEYS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
_LIMIT_KEYS = ("clip_sample", "clip_sample_range", "thresholding", "dynamic_thresholding_ratio", "sample_max_value")
# the keys that describe the network, as against the grid and the solver
NETWORK_KEYS = frozenset(
    (*_VP_KEYS, *_LIMIT_KEYS, "prediction_type", "variance_type", "use_flow_sigmas", "sigma_data", "sigma_schedule", "clip_denoised")
    + ("invert_sigmas", "timestep_type", "snr_shift_scale", "sampling_eps", "predict_epsilon", "parameterization")
)

_FLOW = frozenset(
    """FlowMatchEulerDiscreteScheduler FlowMatchHeunDiscreteScheduler FlowMatchLCMScheduler LTXEulerAncestralRFScheduler
    FlowMapEulerDiscreteScheduler""".split()
)
# ours, which may be bound to any network: they mean a flow only where the keys do not say
_OUR_FLOW = frozenset(("FlowMatchEulerScheduler", "FlowMatchHeunScheduler", "RectifiedFlowScheduler"))
_EDM = frozenset(("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CosineDPMSolverMultistepScheduler"))
_UNREADABLE = frozenset(
    """AmusedScheduler BlockRefinementScheduler ConsistencyDecoderScheduler DDPMWuerstchenScheduler DiscreteDDIMScheduler
    EntropyBoundScheduler HeliosScheduler HeliosDMDScheduler IPNDMScheduler KarrasVeScheduler MiniMaxH3Scheduler PiflowScheduler
    RFD4ProteinaScheduler SCMScheduler ScoreSdeVpScheduler VQDiffusionScheduler""".split()
)
# defaults of diffusers' classes that differ from beta 0.0001 to 0.02, linear, no clipping; they matter for files that leave keys out
_SD_BETAS = frozenset(
    """HeunDiscreteScheduler KDPM2DiscreteScheduler KDPM2AncestralDiscreteScheduler DPMSolverSDEScheduler LCMScheduler TCDScheduler
    CogVideoXDDIMScheduler CogVideoXDPMScheduler""".split()
)
_SCALED_LINEAR = frozenset(("LCMScheduler", "TCDScheduler", "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"))
_JUMPING = frozenset(("LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler"))
_CLIPPING = frozenset(
    """DDPMScheduler DDIMScheduler DDPMParallelScheduler DDIMParallelScheduler DDIMInverseScheduler CogVideoXDDIMScheduler
    CogVideoXDPMScheduler RePaintScheduler UnCLIPScheduler""".split()
)


def check_config_keys(config: dict[str, Any], who: str = "from_config") -> None:
    """Raise ValueError for a key that neither this library nor any scheduler of diffusers knows (keys that begin with `_` are records)."""
    if unknown := sorted(k for k in config if not k.startswith("_") and k not in DIFFUSERS_KEYS and k not in OUR_KEYS):
        raise ValueError(
            f"{who}: unknown config key{'s' if len(unknown) > 1 else ''} {', '.join(map(repr, unknown))}; no scheduler of gen_pipelines or "
            "diffusers has such an argument. Check the spelling, or delete it from the config."
        )


def _family(config: dict[str, Any]) -> str:
    """vp, flow, edm, svd (EulerDiscrete's continuous v-prediction), consistency or ve."""
    name = config.get("_class_name")
    name = name if isinstance(name, str) else None
    if name in _UNREADABLE:
        raise ValueError(
            f"from_config: {name} does not describe a Gaussian path with a prediction on it; give a Parameterization yourself."
        )
    if config.get("prediction_type") == "flow_prediction" or config.get("use_flow_sigmas"):
        return "flow"
    if name in _FLOW:
        return "flow"
    if name in _EDM:
        return "edm"
    if name == "CMStochasticIterativeScheduler":
        return "consistency"
    if name == "ScoreSdeVeScheduler":
        return "ve"
    has = config.keys()
    betas = "beta_start" in has or "beta_schedule" in has or config.get("trained_betas") is not None
    if betas and config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction":
        return "svd"
    found = [
        family
        for family, here in (
            ("flow", "shift" in has and "sigma_data" not in has),  # a preconditioned network may be sampled on a shifted grid
            ("edm", "sigma_data" in has and "sigma_schedule" in has),
            ("consistency", "sigma_data" in has and "clip_denoised" in has),
            ("ve", "sampling_eps" in has),
            ("vp", betas),
        )
        if here
    ]
    if name is not None and (betas or not found):  # any other class of diffusers has betas, its defaults where it leaves them out
        found = ["vp"] if betas or name not in _OUR_FLOW else ["flow"]
    if len(found) == 1:
        return found[0]
    keys = ", ".join(sorted(k for k in has if not k.startswith("_"))) or "no keys"
    problem = f"fits {' and '.join(found)}" if found else "does not say what the network was trained to do"
    raise ValueError(
        f"from_config: the config ({keys}) {problem}; add `_class_name` (the diffusers scheduler it comes from), or "
        "prediction_type='flow_prediction' for a flow, or a `parameterization` key."
    )


def _prediction(config: dict[str, Any]) -> str:
    if config.get("predict_epsilon") is not None:  # files from 2022
        return "epsilon" if config["predict_epsilon"] else "sample"
    prediction = config.get("prediction_type") or "epsilon"
    prediction = "sample" if prediction == "original_sample" else prediction
    if prediction not in PREDICTIONS:
        raise ValueError(f"from_config: prediction_type {prediction!r} is not known; use one of {', '.join(PREDICTIONS)}.")
    return prediction


def _limits(config: dict[str, Any], clip: bool) -> dict[str, Any]:
    defaults = {
        "clip_sample": clip,
        "clip_sample_range": 1.0,
        "thresholding": False,
        "dynamic_thresholding_ratio": 0.995,
        "sample_max_value": 1.0,
    }
    return {k: default if config.get(k) is None else config[k] for k, default in defaults.items()}


def _only_jumping_ones_have(config: dict[str, Any]) -> bool:
    """Whether there are keys of LCM's, TCD's and FlowMatchLCM's schedulers alone: in memory diffusers' configs name no class."""
    return ("original_inference_steps" in config and "rule" not in config) or "scale_factors" in config


def _need(config: dict[str, Any], key: str, family: str) -> Any:
    if config.get(key) is None:
        raise ValueError(f"from_config: a config of the {family} family needs {key!r}; it is missing or null.")
    return config[key]


def _vp_path(config: dict[str, Any], name: str | None) -> DiscreteVPPath:
    defaults = {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085 if name in _SD_BETAS else 0.0001,
        "beta_end": 0.012 if name in _SD_BETAS else 0.02,
        "beta_schedule": "squaredcos_cap_v2" if name == "UnCLIPScheduler" else "scaled_linear" if name in _SCALED_LINEAR else "linear",
        "trained_betas": None,
        "rescale_betas_zero_snr": False,
    }
    values = {k: default if config.get(k) is None else config[k] for k, default in defaults.items()}
    if values["trained_betas"] is not None:
        values["trained_betas"] = tuple(float(b) for b in values["trained_betas"])
    if config.get("snr_shift_scale") not in (None, 1.0):
        raise ValueError(
            f"from_config: snr_shift_scale = {config['snr_shift_scale']} (CogVideoX) is not supported; pass the shifted schedule as "
            "trained_betas."
        )
    return DiscreteVPPath(**values)


def _from_diffusers(config: dict[str, Any]) -> dict[str, Any]:
    """The fields that diffusers' keys determine."""
    name = config.get("_class_name") if isinstance(config.get("_class_name"), str) else None
    family = _family(config)
    common = {**_limits(config, clip=family == "vp" and name in _CLIPPING), "variance": config.get("variance_type")}
    common["jumps"] = name in _JUMPING or (name is None and _only_jumping_ones_have(config))
    if family == "vp":
        return {**common, "path": _vp_path(config, name), "prediction": _prediction(config)}
    if family == "flow":
        prediction = "flow_prediction" if config.get("prediction_type") is None or name in _FLOW else _prediction(config)
        count = config.get("num_train_timesteps") or 1000
        fields = {**common, "path": LinearPath(), "prediction": prediction, "time_input": f"{count} t"}
        if config.get("invert_sigmas"):  # Mochi: the network is given 1 - t and its velocity points at the data
            fields |= {"time_input": "1000 (1 - t)", "sign": -1}
        return fields
    if family == "svd":
        low, high = _need(config, "sigma_min", "continuous v-prediction"), _need(config, "sigma_max", "continuous v-prediction")
        return {**common, "path": EDMPath(low, high), "prediction": "edm", "sigma_data": 1.0, "sign": -1, "time_input": "log(sigma)/4"}
    if family == "ve":
        return {
            **common,
            "path": VEPath(_need(config, "sigma_min", "VE"), _need(config, "sigma_max", "VE")),
            "prediction": "score",
            "time_input": "sigma",
        }
    path = EDMPath(_need(config, "sigma_min", family), _need(config, "sigma_max", family))
    if family == "consistency":
        common["clip_sample"] = bool(config.get("clip_denoised", True))
        return {**common, "path": path, "prediction": "consistency", "sigma_data": _need(config, "sigma_data", family)}
    sign = {"epsilon": 1, "edm": 1, "v_prediction": -1}.get(config.get("prediction_type") or "epsilon")
    if sign is None:
        raise ValueError(
            f"from_config: prediction_type {config['prediction_type']!r} is not one of EDM's; use 'epsilon' (F) or 'v_prediction' (-F)."
        )
    return {**common, "path": path, "prediction": "edm", "sign": sign, "sigma_data": _need(config, "sigma_data", family)}


def parameterization_from_config(config: dict[str, Any], overrides: dict[str, Any], model: Any = None) -> Parameterization:
    """`Parameterization.from_config`; see there."""
    config, own = dict(config), {}
    for key, value in overrides.items():
        if key in DIFFUSERS_KEYS:
            config[key] = value
        elif key in FIELD_NAMES:
            own[key] = value
        else:
            check_config_keys({key: value}, "Parameterization.from_config")
    check_config_keys(config, "Parameterization.from_config")
    stored = dict(config.get("parameterization") or {})
    if unknown := sorted(set(stored) - set(FIELD_NAMES)):
        raise ValueError(f"from_config: the parameterization key has {', '.join(unknown)}; it may have {', '.join(FIELD_NAMES)}.")
    if isinstance(stored.get("path"), dict):
        path = {**stored["path"], **{k: v for k, v in overrides.items() if k in stored["path"]}}
        stored["path"] = path_from_config(path)
    if overrides.get("prediction_type") is not None:
        stored.pop("prediction", None)
    stored = {k: v for k, v in stored.items() if k not in overrides}
    if "path" in stored or "path" in own:  # diffusers' keys may say nothing about the path, or only part of the rest
        fields: dict[str, Any] = {**_limits(config, clip=False), "variance": config.get("variance_type")}
        if "prediction" not in stored and "prediction" not in own:
            fields["prediction"] = _prediction(config)
        if config.get("sigma_data") is not None and {**fields, **stored, **own}["prediction"] in ("edm", "consistency"):
            fields["sigma_data"] = config["sigma_data"]
    else:
        fields = _from_diffusers(config)
    if model is not None:
        from .conventions import fields_from_model

        count = int(config.get("num_train_timesteps") or 1000)
        fields |= fields_from_model(model, {**fields, **stored, **own}, count, frozenset((*stored, *own)))
    if "prediction" in own and own["prediction"] != fields.get("prediction"):
        fields.pop("sigma_data", None)
        fields.pop("time_input", None)
    return Parameterization(**{**fields, **stored, **own})


def _stored(value: Any) -> Any:
    return value.to_config() if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


def parameterization_to_config(p: Parameterization) -> dict[str, Any]:
    """`Parameterization.to_config`; see there."""
    limits = {k: getattr(p, k) for k in _LIMIT_KEYS}
    default = replace(
        p, clip_sample=False, clip_sample_range=1.0, thresholding=False, dynamic_thresholding_ratio=0.995, sample_max_value=1.0
    )
    changed = {k: v for k, v in limits.items() if v != getattr(default, k)}
    config: dict[str, Any] = {} if p.variance is None else {"variance_type": p.variance}
    if isinstance(p.path, DiscreteVPPath):
        config |= {k: _stored(getattr(p.path, k)) for k in _VP_KEYS} | {"prediction_type": p.prediction} | limits
    elif isinstance(p.path, LinearPath):
        words = p.time_input.split()
        count = int(words[0]) if len(words) == 2 and words[0].isdigit() else 1000
        config |= {"num_train_timesteps": count, "prediction_type": p.prediction, "use_flow_sigmas": True} | changed
        if p.time_input == "1000 (1 - t)" and p.sign == -1:
            config["invert_sigmas"] = True
    elif isinstance(p.path, EDMPath) and p.prediction == "consistency":
        config |= {
            "sigma_min": p.path.sigma_min,
            "sigma_max": p.path.sigma_max,
            "sigma_data": p.sigma_data,
            "clip_denoised": p.clip_sample,
        } | changed
        config.pop("clip_sample", None)
    elif isinstance(p.path, EDMPath) and p.prediction == "edm":
        config |= {
            "sigma_min": p.path.sigma_min,
            "sigma_max": p.path.sigma_max,
            "sigma_data": p.sigma_data,
            "sigma_schedule": "karras",
        } | changed
        config["prediction_type"] = "epsilon" if p.sign == 1 else "v_prediction"
    else:
        config |= {"prediction_type": p.prediction} | changed
    try:
        said = parameterization_from_config(config, {})
    except ValueError:  # these keys alone describe no network
        said = None
    if said is None:
        rest = {f: getattr(p, f) for f in FIELD_NAMES if f not in (*_LIMIT_KEYS, "variance") and (f != "jumps" or p.jumps)}
    else:
        rest = {f: getattr(p, f) for f in FIELD_NAMES if getattr(p, f) != getattr(said, f)}
        if "path" in rest:  # with a path of its own the key is read without diffusers' families, so it must say the rest as well
            rest |= {f: getattr(p, f) for f in ("time_input", "sign", "sigma_data")}
    rest = {f: _stored(v) for f, v in rest.items() if v is not None}
    if rest:
        config["parameterization"] = rest
    if not math.isfinite(p.clip_sample_range):
        raise ValueError(
            f"Parameterization.to_config: clip_sample_range = {p.clip_sample_range} cannot be written as JSON; give a finite number."
        )
    return config
