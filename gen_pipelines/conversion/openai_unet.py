"""OpenAI's U-Net: improved diffusion, guided diffusion and consistency models, and torchcfm and flow_matching, which took the network over.

Keys and shapes say how large the network is. The number of heads, the order of q, k and v, the noise schedule and the size of the pictures
are in no file: they were flags of the training command, so they are given as such, and what of them shapes do say is compared.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..processes.cosine import CosinePath
from ..processes.discrete_vp import DiscreteVPPath
from ..processes.edm import EDMPath
from ..processes.linear import LinearPath
from ..processes.parameterization import Parameterization
from .base import Component, Format, Plan
from .reader import Checkpoint, tensors
from .unet_layout import Layout, layout_of, looks_like_unet, to_adm, to_unet_2d

__all__ = ["CODEBASES", "PRESETS", "OpenAIUNet", "adm_config", "fits_unet_2d", "flags_of", "parameterization_of", "settings_of",
           "unet_2d_config"]

CODEBASES = ("guided_diffusion", "improved_diffusion", "consistency_models", "torchcfm", "flow_matching")

# what the scripts of each codebase take where a command leaves a flag out
_DEFAULTS: dict[str, dict[str, Any]] = {
    "guided_diffusion": {"num_heads": 4, "num_head_channels": -1, "num_heads_upsample": -1, "use_new_attention_order": False,
                         "diffusion_steps": 1000, "noise_schedule": "linear", "rescale_timesteps": False, "predict_xstart": False,
                         "sigma_small": False, "class_cond": False, "learn_sigma": False, "use_scale_shift_norm": True,
                         "resblock_updown": False},
    "improved_diffusion": {"num_heads": 4, "num_heads_upsample": -1, "diffusion_steps": 1000, "noise_schedule": "linear",
                           "rescale_timesteps": True, "predict_xstart": False, "sigma_small": False, "class_cond": False,
                           "learn_sigma": False, "use_scale_shift_norm": True},
    "consistency_models": {"num_heads": 4, "num_head_channels": -1, "num_heads_upsample": -1, "sigma_min": 0.002, "sigma_max": 80.0,
                           "class_cond": False, "learn_sigma": False, "use_scale_shift_norm": True, "resblock_updown": False},
    "torchcfm": {"num_heads": 1, "num_head_channels": -1, "num_heads_upsample": -1, "use_new_attention_order": False},
    "flow_matching": {"num_heads": 1, "num_head_channels": -1, "num_heads_upsample": -1, "use_new_attention_order": True},
}  # fmt: skip
# what must be known, by codebase; heads are asked for apart
_NEEDED: dict[str, tuple[str, ...]] = {
    "guided_diffusion": ("image_size", "use_new_attention_order", "diffusion_steps", "noise_schedule"),
    "improved_diffusion": ("image_size", "diffusion_steps", "noise_schedule", "rescale_timesteps"),
    "consistency_models": ("image_size", "training_mode"),
    "torchcfm": ("image_size", "use_new_attention_order", "model"),
    "flow_matching": ("image_size", "use_new_attention_order"),
}
_KINDS: dict[str, type] = {
    **dict.fromkeys(("image_size", "large_size", "small_size", "num_channels", "num_res_blocks", "num_heads", "num_head_channels",
                     "num_heads_upsample", "diffusion_steps"), int),
    **dict.fromkeys(("use_new_attention_order", "rescale_timesteps", "predict_xstart", "sigma_small", "class_cond", "learn_sigma",
                     "use_scale_shift_norm", "resblock_updown"), bool),
    **dict.fromkeys(("sigma_min", "sigma_max"), float),
    **dict.fromkeys(("noise_schedule", "training_mode", "attention_resolutions", "channel_mult", "model", "codebase"), str),
}  # fmt: skip
# flags of the same commands that say nothing about the network or its path
_IGNORED = frozenset(
    """dropout use_fp16 use_checkpoint timestep_respacing use_ddim batch_size microbatch lr lr_anneal_steps weight_decay ema_rate
    log_interval save_interval resume_checkpoint fp16_scale_growth schedule_sampler data_dir use_kl rescale_learned_sigmas model_path
    classifier_path classifier_scale num_samples clip_denoised base_samples weight_schedule sampler steps s_churn s_tmin s_tmax s_noise
    generator ts seed teacher_model_path teacher_dropout target_ema_mode scale_mode total_training_steps start_ema start_scales end_scales
    distill_steps_per_iter loss_norm global_batch_size classifier_depth""".split()
)

_GUIDED = "--attention_resolutions 32,16,8 --diffusion_steps 1000 --learn_sigma True --num_res_blocks 2 --resblock_updown True " \
          "--use_scale_shift_norm True --noise_schedule linear"  # fmt: skip
_IMPROVED = "--learn_sigma True --diffusion_steps 4000 --noise_schedule cosine"
_LSUN_2021 = "--image_size 256 --num_channels 128 --num_res_blocks 2 --num_heads 1 --learn_sigma True --use_scale_shift_norm False " \
             "--attention_resolutions 16 --diffusion_steps 1000 --noise_schedule linear --rescale_timesteps False"  # fmt: skip
_CM_64 = "--attention_resolutions 32,16,8 --class_cond True --image_size 64 --num_channels 192 --num_head_channels 64 --num_res_blocks 3 " \
         "--resblock_updown True --use_scale_shift_norm True"  # fmt: skip
_CM_256 = "--attention_resolutions 32,16,8 --class_cond False --image_size 256 --num_channels 256 --num_head_channels 64 " \
          "--num_res_blocks 2 --resblock_updown True --use_scale_shift_norm False"  # fmt: skip
_SMALL = "--num_res_blocks 3 --num_channels 128"

# the published checkpoints, by the stem of their file's name: the commands that their authors give for them
PRESETS: dict[str, tuple[str, str]] = {
    "64x64_diffusion": (
        "guided_diffusion",
        "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --image_size 64 --learn_sigma True "
        "--noise_schedule cosine --num_channels 192 --num_head_channels 64 --num_res_blocks 3 --resblock_updown True "
        "--use_new_attention_order True "
        "--use_scale_shift_norm True",
    ),
    "128x128_diffusion": ("guided_diffusion", f"{_GUIDED} --class_cond True --image_size 128 --num_channels 256 --num_heads 4"),
    "256x256_diffusion": ("guided_diffusion", f"{_GUIDED} --class_cond True --image_size 256 --num_channels 256 --num_head_channels 64"),
    "256x256_diffusion_uncond": (
        "guided_diffusion", f"{_GUIDED} --class_cond False --image_size 256 --num_channels 256 --num_head_channels 64"
    ),
    "512x512_diffusion": ("guided_diffusion", f"{_GUIDED} --class_cond True --image_size 512 --num_channels 256 --num_head_channels 64"),
    "64_256_upsampler": (
        "guided_diffusion", f"{_GUIDED} --class_cond True --large_size 256 --small_size 64 --num_channels 192 --num_heads 4"
    ),
    "128_512_upsampler": (
        "guided_diffusion",
        f"{_GUIDED.replace('32,16,8', '32,16')} --class_cond True --large_size 512 --small_size 128 --num_channels 192 "
        "--num_head_channels 64",
    ),
    **dict.fromkeys(
        ("lsun_bedroom", "lsun_cat", "lsun_horse", "lsun_horse_nodropout"),
        ("guided_diffusion", f"{_GUIDED} --class_cond False --image_size 256 --num_channels 256 --num_head_channels 64"),
    ),
    **{
        name: ("improved_diffusion", f"{_IMPROVED} {_SMALL} --image_size {size}")
        for name, size in (("imagenet64_uncond_100M_1500K", 64), ("imagenet64_uncond_vlb_100M_1500K", 64),
                           ("cifar10_uncond_50M_500K", 32), ("cifar10_uncond_vlb_50M_500K", 32))
    },
    "imagenet64_cond_270M_250K": (
        "improved_diffusion",
        f"{_IMPROVED} --image_size 64 --num_channels 192 --num_res_blocks 3 --class_cond True --rescale_timesteps False",
    ),
    "upsample_cond_500K": (
        "improved_diffusion",
        "--large_size 256 --small_size 64 --num_channels 192 --num_res_blocks 2 --learn_sigma True --class_cond True "
        "--diffusion_steps 4000 --noise_schedule linear --rescale_timesteps False",
    ),
    "lsun_uncond_100M_1200K_bs128": ("improved_diffusion", _LSUN_2021),
    "lsun_uncond_100M_2400K_bs64": ("improved_diffusion", _LSUN_2021),
    **{f"{kind}_imagenet64{norm}{ema}": ("consistency_models", f"{_CM_64} --training_mode {mode}")
       for kind, norm, ema, mode in (("edm", "", "_ema", "edm"), ("cd", "_l2", "", "consistency_distillation"),
                                     ("cd", "_lpips", "", "consistency_distillation"), ("ct", "", "", "consistency_training"))},
    **{f"{kind}_{data}256{norm}{ema}": ("consistency_models", f"{_CM_256} --training_mode {mode}")
       for data in ("bedroom", "cat")
       for kind, norm, ema, mode in (("edm", "", "_ema", "edm"), ("cd", "_l2", "", "consistency_distillation"),
                                     ("cd", "_lpips", "", "consistency_distillation"), ("ct", "", "", "consistency_training"))},
    "torchcfm_cifar10": (
        "torchcfm", "--image_size 32 --num_channels 128 --num_res_blocks 2 --channel_mult 1,2,2,2 --num_heads 4 --num_head_channels 64"
    ),
    "flow_matching_cifar10": (
        "flow_matching", "--image_size 32 --num_channels 128 --num_res_blocks 4 --channel_mult 2,2,2 --num_heads 1"
    ),
    "flow_matching_imagenet": (
        "flow_matching",
        "--image_size 64 --num_channels 192 --num_res_blocks 3 --channel_mult 1,2,3,4 --num_head_channels 64 --resblock_updown True",
    ),
}  # fmt: skip

_TRAINING_MODES = ("edm", "consistency_distillation", "consistency_training", "progdist")


def flags_of(command: str) -> dict[str, Any]:
    """The flags of a training command, `--image_size 64 --class_cond True`, as values.

    Raises:
        ValueError: a flag that no script of these codebases has, or a value that cannot be read.
    """
    words = shlex.split(command.replace("=", " "))
    flags: dict[str, Any] = {}
    names = iter(words)
    for word in names:
        name = word.removeprefix("--")
        if not word.startswith("--") or (name not in _KINDS and name not in _IGNORED):
            raise ValueError(f"flags: {word!r} is no flag that is known; known are {', '.join(sorted(_KINDS))}.")
        value = next(names, None)
        if value is None:
            raise ValueError(f"flags: {word} has no value.")
        if name in _KINDS:
            flags[name] = _read(name, value)
    return flags


def _read(name: str, value: Any) -> Any:
    kind = _KINDS[name]
    try:
        if kind is bool and not isinstance(value, bool):
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[str(value).lower()]
        if kind is str and isinstance(value, (list, tuple)):
            return ",".join(map(str, value))
        return kind(value)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{name} = {value!r} is not {'True or False' if kind is bool else 'a number'}.") from None


def settings_of(codebase: str, options: Mapping[str, Any], preset: str | None = None) -> dict[str, Any]:
    """What the training was told, from a preset, a whole command (`flags`) and single flags, the later over the former.

    A preset and a command leave out what they had at its default; with single flags alone nothing is assumed.

    Raises:
        ValueError: an unknown option, preset or value, or what is missing, all of it in one message with the flags' names.
    """
    options = dict(options)
    command, preset = options.pop("flags", None), options.pop("preset", preset)
    settings: dict[str, Any] = dict(_DEFAULTS[codebase]) if command or preset else {}
    if preset is not None:
        if preset not in PRESETS:
            raise ValueError(f"preset {preset!r} is not known; known are {', '.join(PRESETS)}.")
        if PRESETS[preset][0] != codebase:
            raise ValueError(f"preset {preset!r} is of {PRESETS[preset][0]}, but the checkpoint is of {codebase}.")
        settings |= flags_of(PRESETS[preset][1])
    if command:
        settings |= flags_of(command)
    if unknown := sorted(set(options) - set(_KINDS)):
        raise ValueError(f"option {unknown[0]!r} is not known for {codebase}; known are preset, flags, {', '.join(sorted(_KINDS))}.")
    settings |= {name: _read(name, value) for name, value in options.items()}
    settings.pop("codebase", None)
    if "large_size" in settings:
        settings.setdefault("image_size", settings["large_size"])
    missing = [name for name in _NEEDED[codebase] if name not in settings]
    if settings.get("num_heads", -1) < 1 and settings.get("num_head_channels", -1) < 1:
        missing.append("num_heads (or num_head_channels)")
    if missing:
        raise ValueError(
            f"{codebase}: the file does not say {', '.join(missing)}. Give each as in the training command (--set "
            f"{missing[0].split()[0]}=...), or the whole command (--set flags=\"--image_size 64 ...\"), or a published checkpoint's name "
            f"(--set preset=NAME, one of {', '.join(name for name, (base, _) in PRESETS.items() if base == codebase)})."
        )
    if settings.get("noise_schedule", "linear") not in ("linear", "cosine"):
        raise ValueError(f"noise_schedule {settings['noise_schedule']!r} is none of linear, cosine.")
    if settings.get("training_mode", "edm") not in _TRAINING_MODES:
        raise ValueError(f"training_mode {settings['training_mode']!r} is none of {', '.join(_TRAINING_MODES)}.")
    return settings


def check_settings(layout: Layout, settings: Mapping[str, Any], pictures: int) -> None:
    """Compares what was said with what shapes say.

    Args:
        layout: of the checkpoint.
        settings: of `settings_of`.
        pictures: channels of a picture.
    Raises:
        ValueError: they differ; the message has both.
    """
    first = layout.widths[0] / layout.time_channels
    found: dict[str, Any] = {
        "num_channels": layout.time_channels,
        "num_res_blocks": layout.layers_per_block,
        "use_scale_shift_norm": layout.scale_shift,
        "class_cond": layout.num_class_embeds is not None,
        "learn_sigma": layout.out_channels == 2 * pictures,
    }
    if len(layout.widths) > 1:
        found["resblock_updown"] = layout.resample == "residual"
    if settings.get("channel_mult"):
        found["channel_mult"] = ",".join(f"{width / layout.time_channels:g}" for width in layout.widths)
    if settings.get("attention_resolutions"):
        size = settings["image_size"]
        rates = [2**level for level, has in enumerate(layout.attention_levels) if has]
        said = {size // int(value) for value in settings["attention_resolutions"].split(",")}
        if sorted(said & {2**level for level in range(len(layout.widths))}) != rates:
            raise ValueError(
                f"attention_resolutions {settings['attention_resolutions']} at image_size {size} do not fit the checkpoint, which has "
                f"attention at {', '.join(str(size // rate) for rate in rates) or 'no size'}."
            )
    for name, value in found.items():
        if name in settings and settings[name] != value:
            raise ValueError(f"{name} = {settings[name]}, but the checkpoint has {value} (its first level is {first:g} times as wide).")


def heads_of(settings: Mapping[str, Any], up: bool = False) -> Callable[[int], int]:
    """channels -> number of heads; `up` on the way up.

    Raises:
        ValueError: from the function: channels that cannot be dealt out to the heads.
    """
    per_head, count = settings.get("num_head_channels", -1), settings.get("num_heads", -1)
    if up and settings.get("num_heads_upsample", -1) > 0:
        count = settings["num_heads_upsample"]

    def heads(channels: int) -> int:
        number = channels // per_head if per_head > 0 else count
        if number < 1 or channels % number or (per_head > 0 and channels % per_head):
            what = f"num_head_channels = {per_head}" if per_head > 0 else f"num_heads = {count}"
            raise ValueError(f"{what} does not fit an attention over {channels} channels.")
        return number

    return heads


def fits_unet_2d(layout: Layout, heads: Callable[[int], int], up_heads: Callable[[int], int]) -> bool:
    """Whether diffusers' `UNet2DModel` computes the same: one width of all heads, convolutions or residual blocks for changes of size."""
    widths = layout.attention_widths()
    per_head = {width // count(width) for width in widths for count in (heads, up_heads)}
    return len(per_head) == 1 and layout.resample != "pool" and layout.time_channels == layout.widths[0]


def unet_2d_config(layout: Layout, heads: Callable[[int], int], image_size: int) -> dict[str, Any]:
    """Constructor arguments of `UNet2DModel`."""
    residual = layout.resample == "residual"
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if residual else ("DownBlock2D", "UpBlock2D")
    config: dict[str, Any] = {
        "sample_size": image_size,
        "in_channels": layout.in_channels,
        "out_channels": layout.out_channels,
        "block_out_channels": list(layout.widths),
        "layers_per_block": layout.layers_per_block,
        "down_block_types": ["AttnDownBlock2D" if has else plain[0] for has in layout.attention_levels],
        "up_block_types": ["AttnUpBlock2D" if has else plain[1] for has in reversed(layout.attention_levels)],
        "attention_head_dim": layout.widths[-1] // heads(layout.widths[-1]),
        "downsample_type": "resnet" if residual else "conv",
        "upsample_type": "resnet" if residual else "conv",
        "resnet_time_scale_shift": "scale_shift" if layout.scale_shift else "default",
        "attn_norm_num_groups": 32,
        "norm_eps": 1e-5,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
    }
    if layout.num_class_embeds is not None:
        config["num_class_embeds"] = layout.num_class_embeds
    return config


def adm_config(layout: Layout, settings: Mapping[str, Any], image_size: int) -> dict[str, Any]:
    """Constructor arguments of `ADMUNet2DModel`."""
    per_head = settings.get("num_head_channels", -1)
    up = settings.get("num_heads_upsample", -1)
    return {
        "sample_size": image_size,
        "in_channels": layout.in_channels,
        "out_channels": layout.out_channels,
        "block_out_channels": list(layout.widths),
        "layers_per_block": layout.layers_per_block,
        "attention_levels": list(layout.attention_levels),
        "attention_head_dim": per_head if per_head > 0 else None,
        "num_attention_heads": None if per_head > 0 else settings["num_heads"],
        "up_num_attention_heads": up if up > 0 and per_head < 1 else None,
        "resample_type": layout.resample,
        "time_scale_shift": layout.scale_shift,
        "time_channels": layout.time_channels,
        "num_class_embeds": layout.num_class_embeds,
    }


def by_head(codebase: str, settings: Mapping[str, Any]) -> bool:
    """Whether the rows of q, k and v are ordered head by head (consistency_models' code never does that, improved diffusion's always)."""
    if codebase == "consistency_models":
        return False
    return codebase == "improved_diffusion" or not settings["use_new_attention_order"]


def parameterization_of(codebase: str, settings: Mapping[str, Any], learned_variance: bool) -> Parameterization:
    """What a network of one of the codebases was trained to do.

    References: Nichol & Dhariwal 2021, eqs. 15 and 17, https://arxiv.org/abs/2102.09672; Song et al. 2023, appendix C,
    https://arxiv.org/abs/2303.01469
    """
    if codebase in ("torchcfm", "flow_matching"):
        path = CosinePath() if settings.get("model") == "si" else LinearPath()
        return Parameterization(path, "flow_prediction", time_input="1 - t", sign=-1)
    if codebase == "consistency_models":
        return Parameterization(
            EDMPath(settings.get("sigma_min", 0.002), settings.get("sigma_max", 80.0)),
            "edm" if settings["training_mode"] in ("edm", "progdist") else "consistency",
            time_input="250 log(sigma)",
            sigma_data=0.5,
            clip_sample=True,
        )
    steps = settings["diffusion_steps"]
    path = DiscreteVPPath(
        num_train_timesteps=steps,
        beta_start=0.0001 * 1000 / steps,
        beta_end=0.02 * 1000 / steps,
        beta_schedule="linear" if settings["noise_schedule"] == "linear" else "squaredcos_cap_v2",
    )
    return Parameterization(
        path,
        "sample" if settings.get("predict_xstart") else "epsilon",
        time_input="index_scaled" if settings.get("rescale_timesteps") else "index",
        variance="learned_range" if learned_variance else "fixed_small" if settings.get("sigma_small") else "fixed_large",
        clip_sample=True,
    )


# ------------------------------------------------------------------------------------------------------------------------ the containers


class _Found:
    """The network's weights in a checkpoint: `state` by their own names, `origin` by the file's; what else is there, and why it goes."""

    def __init__(self, state: dict[str, Tensor], origin: dict[str, str], codebase: str | None, dropped: dict[str, str]) -> None:
        self.state, self.origin, self.codebase, self.dropped = state, origin, codebase, dropped


def _under(found: Mapping[str, Tensor], prefix: str) -> dict[str, str]:
    """own key -> key of the file, of what stands under a prefix, with or without DataParallel's `module.`."""
    keys = {key[len(prefix):]: key for key in found if key.startswith(prefix)}
    return {key.removeprefix("module."): old for key, old in keys.items()} if all(k.startswith("module.") for k in keys) else keys


def _find(checkpoint: Checkpoint, weights: str = "ema") -> _Found | None:
    """The U-Net's weights, by the container: a flat state dict, torchcfm's, or flow_matching's."""
    found = tensors(checkpoint.tree)
    tree = checkpoint.tree if isinstance(checkpoint.tree, dict) else {}
    origin, codebase, dropped = _under(found, ""), None, {}
    if {"net_model", "ema_model"} <= set(tree):
        chosen, other = ("ema_model", "net_model") if weights == "ema" else ("net_model", "ema_model")
        origin, codebase = _under(found, f"{chosen}."), "torchcfm"
        dropped[f"{other}.*"] = "the weights of the last step" if weights == "ema" else "the averaged weights"
        dropped |= {f"{name}.*": "state of the training" for name in tree if name not in (chosen, other)}
    elif isinstance(tree.get("model"), dict) and {"optimizer", "lr_schedule"} & set(tree):
        origin, codebase = _under(found, "model."), "flow_matching"
        dropped = {f"{name}.*": "state of the training" for name in tree if name != "model"}
        shadows = [key for key in origin if key.startswith("shadow_params.")]
        if shadows:  # the average is a list in the order of the parameters
            names = [key for key in origin if key.startswith("model.")]
            fits = len(names) == len(shadows) and all(
                found[origin[f"shadow_params.{i}"]].shape == found[origin[name]].shape for i, name in enumerate(names)
            )
            if not fits:
                return None
            inner = {name.removeprefix("model."): origin[name] for name in names}
            average = {name.removeprefix("model."): origin[f"shadow_params.{i}"] for i, name in enumerate(names)}
            kept, other = (average, inner) if weights == "ema" else (inner, average)
            dropped |= dict.fromkeys(other.values(), "the weights of the last step" if weights == "ema" else "the averaged weights")
            dropped |= {old: "state of the training" for key, old in origin.items() if key == "num_updates"}
            origin = kept
    state = {key: found[old] for key, old in origin.items()}
    dropped = {pattern: why for pattern, why in dropped.items() if pattern in found or any(k.startswith(pattern[:-1]) for k in found)}
    return _Found(state, origin, codebase, dropped) if looks_like_unet(state) else None


def _codebase_of(checkpoint: Checkpoint, found: _Found, layout: Layout, options: Mapping[str, Any], preset: str | None) -> str:
    given = options.get("codebase")
    if given is not None and given not in CODEBASES:
        raise ValueError(f"codebase {given!r} is none of {', '.join(CODEBASES)}.")
    known = found.codebase or (PRESETS[preset][0] if preset in PRESETS else None)
    known = known or ("consistency_models" if layout.attention_as_2d else None)
    if known is not None and given not in (None, known):
        raise ValueError(f"codebase {given!r}, but {checkpoint.path.name} is of {known}.")
    if (known or given) is None:
        raise ValueError(
            f"{checkpoint.path.name} is of guided_diffusion or of improved_diffusion, which write the same keys: give --set "
            f"codebase=NAME, one of {', '.join(CODEBASES)}, or the name of a published checkpoint, --set preset=NAME."
        )
    return known or given


def _preset_of(checkpoint: Checkpoint, found: _Found, options: Mapping[str, Any]) -> str | None:
    """The preset that is asked for, or that of a published file's name, unless the command is given."""
    if "preset" in options:
        return options["preset"]
    if "flags" in options:
        return None
    if found.codebase == "torchcfm" and "_cifar10_weights_step_" in checkpoint.path.stem:
        return "torchcfm_cifar10"
    if found.codebase == "flow_matching":
        arguments = checkpoint.tree.get("args")
        name = f"flow_matching_{arguments.get('dataset')}" if hasattr(arguments, "get") else None
        return name if name in PRESETS else None
    return checkpoint.path.stem if found.codebase is None and checkpoint.path.stem in PRESETS else None


class OpenAIUNet(Format):
    """Networks on pixels: class-conditional or not, with a learned variance or not, and the upsamplers (as a network alone)."""

    name = "openai_unet"
    title = "OpenAI's U-Net (guided diffusion, improved diffusion, consistency models, torchcfm, flow_matching)"
    paper = "https://arxiv.org/abs/2105.05233"
    licence = "MIT for OpenAI's published weights; CC BY-NC 4.0 for flow_matching's; others: see the source"
    extensions = (".pt", ".pth")
    options = {
        "codebase": f"whose training it was: {', '.join(CODEBASES)}",
        "preset": "a published checkpoint, whose flags are known (taken from the file's name where that is one)",
        "flags": "the whole training command, as one string",
        "weights": "ema (default) or model, where the file has both",
        **{name: "as in the training command" for name in _KINDS if name != "codebase"},
        "training_mode": f"of consistency models: {', '.join(_TRAINING_MODES)}",
        "model": "of torchcfm: otcfm, icfm, fm or si",
    }

    def matches(self, checkpoint: Checkpoint) -> float:
        return 0.9 if _find(checkpoint) is not None else 0.0

    def plan(self, checkpoint: Checkpoint, options: Mapping[str, Any]) -> Plan:
        from diffusers import UNet2DModel

        from ..models.denoisers.adm_unet import ADMUNet2DModel
        from ..pipelines.diffusion_image import DiffusionImagePipeline

        options = dict(options)
        weights = options.pop("weights", "ema")
        if weights not in ("ema", "model"):
            raise ValueError(f"weights = {weights!r} is none of ema, model.")
        if (found := _find(checkpoint, weights)) is None:
            raise ValueError(f"{checkpoint.path.name} holds no whole U-Net of OpenAI's layout (an encoder alone, or a discrete flow?).")
        layout = layout_of(found.state)
        preset = _preset_of(checkpoint, found, options)
        codebase = _codebase_of(checkpoint, found, layout, options, preset)
        named = checkpoint.path.stem.split("_")[0]
        if codebase == "torchcfm" and "model" not in options and named in ("otcfm", "icfm", "fm", "si"):
            options["model"] = named
        options.pop("codebase", None)
        settings = settings_of(codebase, options, preset)
        upsampler = "small_size" in settings or layout.in_channels in (2 * layout.out_channels, 6)
        pictures = layout.in_channels // 2 if upsampler else layout.in_channels
        if layout.out_channels not in (pictures, 2 * pictures):
            raise ValueError(f"{layout.in_channels} channels go in and {layout.out_channels} come out: no denoiser of pictures.")
        check_settings(layout, settings, pictures)
        heads, up_heads = heads_of(settings), heads_of(settings, up=True)
        head_by_head, size = by_head(codebase, settings), settings["image_size"]
        if fits_unet_2d(layout, heads, up_heads):
            cls, config = UNet2DModel, unet_2d_config(layout, heads, size)
            recipe = to_unet_2d(layout, found.state, heads, head_by_head)
        else:
            cls, config = ADMUNet2DModel, adm_config(layout, settings, size)
            recipe = to_adm(layout, found.state, heads, head_by_head, up_heads)
        plan = Plan(self.name, DiffusionImagePipeline, {"unet": Component(cls, config, lambda: recipe.state(found.state))})
        plan.used, plan.dropped = recipe.used("unet", found.origin), found.dropped
        if codebase == "flow_matching":
            plan.licence = "CC BY-NC 4.0 for published weights of flow_matching; others: see the source"
        plan.notes.append(f"codebase {codebase}" + (f", preset {preset}" if preset else ""))
        network = parameterization_of(codebase, settings, layout.out_channels == 2 * pictures)
        if upsampler:
            plan.pipeline = None
            plan.notes.append(
                f"an upsampler: its input is the noisy picture and then the small one, enlarged bilinearly, {pictures} channels each; "
                f"what it was trained to do: {network}"
            )
            return plan
        scheduler, steps = scheduler_of(network)
        plan.objects["scheduler"] = scheduler
        plan.init["default_num_inference_steps"] = steps
        if codebase == "flow_matching" and layout.num_class_embeds is not None:
            plan.init["null_class"] = layout.num_class_embeds - 1
        return plan


def scheduler_of(network: Parameterization) -> tuple[Any, int]:
    """The sampler that the codebases use by default for such a network, and how many steps."""
    from ..schedulers import ConsistencyScheduler, DDPMScheduler, HeunScheduler

    if network.prediction == "consistency":
        return ConsistencyScheduler().bind(network), 1
    if network.prediction == "edm":
        return HeunScheduler().bind(network), 40
    if network.time_input == "1 - t":
        return equal_steps(network), 100
    return DDPMScheduler(timestep_spacing="linspace").bind(network), 250


def equal_steps(network: Parameterization) -> Any:
    """Euler steps of one length from noise to data, as the codebases of flows take them."""
    from ..schedulers import FlowMatchEulerScheduler, RectifiedFlowScheduler

    if network.path.name == "linear" and network.lambda_range is None:
        return RectifiedFlowScheduler().bind(network)
    return FlowMatchEulerScheduler(timestep_spacing="trailing").bind(network)
