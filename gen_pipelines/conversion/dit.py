"""DiT and SiT, every size and patch: a flat state dict, or {model, ema, opt, args} as their training scripts write it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..processes.cosine import CosinePath
from ..processes.discrete_vp import DiscreteVPPath
from ..processes.linear import LinearPath
from ..processes.parameterization import Parameterization
from ..processes.vp_sde import VPSDEPath
from .base import Component, Format, Made, Plan
from .reader import Checkpoint, tensors

__all__ = ["DiT", "config_from", "looks_like_dit", "parameterization_of", "table_of"]

_LAYERS = {
    "x_embedder.proj": "embed",
    "t_embedder.mlp.0": "time_embedding.linear_1",
    "t_embedder.mlp.2": "time_embedding.linear_2",
    "final_layer.adaLN_modulation.1": "condition_out",
    "final_layer.linear": "linear_out",
}
_BLOCK_LAYERS = {
    "attn.qkv": "qkv",
    "attn.proj": "out",
    "mlp.fc1": "linear_1",
    "mlp.fc2": "linear_2",
    "adaLN_modulation.1": "condition",
}
_NEEDED = ("x_embedder.proj.weight", "t_embedder.mlp.0.weight", "y_embedder.embedding_table.weight", "final_layer.linear.weight",
           "pos_embed", "blocks.0.attn.qkv.weight", "blocks.0.adaLN_modulation.1.weight")  # fmt: skip
SIT_PATHS = {"Linear": LinearPath(), "GVP": CosinePath(), "VP": VPSDEPath(beta_min=0.1, beta_max=20.0)}
_SIT_PREDICTIONS = {"velocity": "flow_prediction", "score": "score", "noise": "epsilon"}


def looks_like_dit(keys: Any) -> bool:
    """Whether these are the keys of a DiT or a SiT."""
    return all(key in keys for key in _NEEDED)


def table_of(depth: int) -> dict[str, str]:
    """source key -> key of `DiTModel`."""
    layers = dict(_LAYERS)
    for i in range(depth):
        layers |= {f"blocks.{i}.{theirs}": f"blocks.{i}.{ours}" for theirs, ours in _BLOCK_LAYERS.items()}
    table = {f"{theirs}.{part}": f"{ours}.{part}" for theirs, ours in layers.items() for part in ("weight", "bias")}
    return table | {"y_embedder.embedding_table.weight": "class_embedding.weight", "pos_embed": "position"}


def config_from(state: Mapping[str, Tensor], num_heads: int | None = None, class_dropout_prob: float = 0.1) -> dict[str, Any]:
    """Constructor arguments of `DiTModel`, from shapes.

    Args:
        num_heads: heads, which shapes do not say; None takes those of the published size of this depth and width.
        class_dropout_prob: of the training; above 0 the last row of the class table means "no class".
    Raises:
        ValueError: no published size has this depth and width and num_heads is not given; shapes contradict each other.
    """
    from ..models.denoisers.dit import DIT_SIZES

    depth = 1 + max(int(m[1]) for key in state if (m := re.match(r"blocks\.(\d+)\.", key)))
    width, channels, patch, _ = state["x_embedder.proj.weight"].shape
    known = {(d, w): heads for d, w, heads in DIT_SIZES.values()}
    if num_heads is None and (num_heads := known.get((depth, width))) is None:
        raise ValueError(
            f"a DiT of {depth} blocks of width {width} is none of {', '.join(DIT_SIZES)}; how many heads it has is in no file: give "
            "--set num_heads=N."
        )
    tokens, outputs = state["pos_embed"].shape[1], state["final_layer.linear.weight"].shape[0]
    side = math.isqrt(tokens)
    if side**2 != tokens or outputs % patch**2:
        raise ValueError(f"DiT: {tokens} positions are no square, or {outputs} outputs no patches of {patch} x {patch}.")
    rows = state["y_embedder.embedding_table.weight"].shape[0]
    return {
        "sample_size": side * patch,
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": outputs // patch**2,
        "width": width,
        "depth": depth,
        "num_attention_heads": num_heads,
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "num_embeds_ada_norm": rows - (class_dropout_prob > 0),
        "has_null_class": class_dropout_prob > 0,
    }


def first_half(tensor: Tensor, patch: int) -> Tensor:
    """The last layer's rows, ordered as (patch, patch, channel), without the second half of the channels."""
    pieces = tensor.unflatten(0, (patch**2, -1))
    return pieces[:, : pieces.shape[1] // 2].flatten(0, 1)


def parameterization_of(codebase: str, learned_variance: bool, path_type: str = "Linear", prediction: str = "velocity") -> Parameterization:
    """What a DiT (eps at an index, linear betas) or a SiT (at the time that is 1 for data) was trained to do.

    Raises:
        ValueError: an unknown path or prediction.

    References: Peebles & Xie 2023, section 4; Ma et al. 2024, section 2 and table 1, https://arxiv.org/abs/2401.08740
    """
    if codebase == "dit":
        return Parameterization(DiscreteVPPath(), variance="learned_range" if learned_variance else "fixed_large")
    if path_type not in SIT_PATHS or prediction not in _SIT_PREDICTIONS:
        raise ValueError(
            f"SiT: path_type {path_type!r} with prediction {prediction!r}; paths are {', '.join(SIT_PATHS)}, predictions "
            f"{', '.join(_SIT_PREDICTIONS)}."
        )
    name = _SIT_PREDICTIONS[prediction]
    path = SIT_PATHS[path_type]
    options: dict[str, Any] = {}
    if name != "flow_prediction" and path_type != "VP":  # these two say nothing about data at pure noise, so that end is left out
        t_max = 1 - 1e-3
        options["lambda_range"] = (path.level(t_max).lambda_, path.level(path.t_min).lambda_)
    return Parameterization(path, name, time_input="1 - t", sign=-1 if name == "flow_prediction" else 1, **options)


# --------------------------------------------------------------------------------------------------------------------------- the format


def _weights(checkpoint: Checkpoint, which: str = "ema") -> tuple[dict[str, Tensor], str, dict[str, str]] | None:
    """(state dict, prefix of its keys in the file, what is dropped and why), or None."""
    found = tensors(checkpoint.tree)
    if looks_like_dit(found):
        return found, "", {}
    tree = checkpoint.tree if isinstance(checkpoint.tree, dict) else {}
    if not {"model", "ema"} <= set(tree):
        return None
    prefix, other = ("ema.", "model") if which == "ema" else ("model.", "ema")
    state = {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}
    dropped = {f"{other}.*": "the weights of the last step" if which == "ema" else "the averaged weights"}
    dropped |= {f"{name}.*": "state of the training" for name in tree if name not in ("model", "ema")}
    dropped = {pattern: why for pattern, why in dropped.items() if any(key.startswith(pattern[:-1]) for key in found)}
    return (state, prefix, dropped) if looks_like_dit(state) else None


class DiT(Format):
    """DiT and SiT become a `DiTModel` in a `DiffusionImagePipeline`, with the autoencoder whose latents they draw."""

    name = "dit"
    title = "DiT and SiT"
    paper = "https://arxiv.org/abs/2212.09748"
    licence = "CC BY-NC 4.0 for DiT's published weights, MIT for SiT's; others: see the source"
    extensions = (".pt", ".pth")
    options = {
        "codebase": "dit or sit, where the file's name and content do not say it",
        "vae": "the autoencoder's folder in diffusers' layout (published networks draw latents of stabilityai/sd-vae-ft-ema), or none",
        "num_heads": "heads, for a depth and width that is not published",
        "class_dropout_prob": "as in the training (0.1 by default); 0: there is no null class",
        "weights": "ema (default) or model, where the file has both",
        "path_type": f"of SiT: {', '.join(SIT_PATHS)}",
        "prediction": f"of SiT: {', '.join(_SIT_PREDICTIONS)}",
    }

    def matches(self, checkpoint: Checkpoint) -> float:
        return 0.95 if _weights(checkpoint) is not None else 0.0

    def plan(self, checkpoint: Checkpoint, options: Mapping[str, Any]) -> Plan:
        from ..models.denoisers.dit import DiTModel
        from ..pipelines.diffusion_image import DiffusionImagePipeline
        from ..schedulers import DDPMScheduler
        from .autoencoders import read_autoencoder
        from .openai_unet import equal_steps

        which = str(options.get("weights", "ema"))
        if which not in ("ema", "model"):
            raise ValueError(f"weights = {which!r} is none of ema, model.")
        if (found := _weights(checkpoint, which)) is None:
            raise ValueError(f"{checkpoint.path.name} holds no DiT or SiT.")
        state, prefix, dropped = found
        arguments = _arguments(checkpoint)
        codebase = _codebase(checkpoint, arguments, options)
        heads, dropout = _number(options, "num_heads", int, None), _number(options, "class_dropout_prob", float, 0.1)
        config = config_from(state, heads, dropout)
        patch, doubled = config["patch_size"], config["out_channels"] == 2 * config["in_channels"]
        if config["out_channels"] != config["in_channels"] and not doubled:
            raise ValueError(f"{config['in_channels']} channels go in and {config['out_channels']} come out: no denoiser.")
        if codebase == "sit" and doubled:  # its forward throws the second half away
            config["out_channels"] //= 2
        path_type, prediction = _transport(checkpoint, arguments, options) if codebase == "sit" else ("Linear", "velocity")
        network = parameterization_of(codebase, doubled, path_type, prediction)

        table = table_of(config["depth"])
        if missing := [key for key in table if key not in state]:
            raise ValueError(f"{checkpoint.path.name} as {codebase}: the source has no {', '.join(missing[:5])}.")

        def weights() -> dict[str, Tensor | Made]:
            made: dict[str, Tensor | Made] = {new: state[old] for old, new in table.items()}
            made["position"] = state["pos_embed"][0]
            if codebase == "sit" and doubled:
                for part in ("linear_out.weight", "linear_out.bias"):
                    whole = made[part]
                    shape = (whole.shape[0] // 2, *whole.shape[1:])
                    made[part] = Made(lambda whole=whole: first_half(whole, patch), tuple(shape), whole.dtype)
            return made

        plan = Plan(self.name, DiffusionImagePipeline, {"transformer": Component(DiTModel, config, weights)})
        plan.used = {f"{prefix}{old}": f"transformer.{new}" for old, new in table.items()}
        plan.dropped = dropped
        plan.notes.append(f"codebase {codebase}" + (f", path {path_type}, prediction {prediction}" if codebase == "sit" else ""))
        if codebase == "sit" and doubled:
            plan.notes.append("the second half of the output's channels, which SiT throws away, is left out of the last layer")
        plan.licence = {"dit": "CC BY-NC 4.0 for published weights; others: see the source",
                        "sit": "MIT for published weights; others: see the source"}[codebase]  # fmt: skip
        dit = codebase == "dit"
        plan.objects["scheduler"] = DDPMScheduler(timestep_spacing="linspace").bind(network) if dit else equal_steps(network)
        plan.init |= {"default_num_inference_steps": 250, "default_guidance_scale": 4.0 if config["has_null_class"] else 1.0}
        read_autoencoder(plan, options.get("vae"), config["in_channels"], "stabilityai/sd-vae-ft-ema")
        return plan


def _number(options: Mapping[str, Any], name: str, kind: type, usual: Any) -> Any:
    """An option that is a number."""
    value = options.get(name)
    try:
        return usual if value is None else kind(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} = {value!r} is not a number.") from None


def _arguments(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The training's arguments, if the file has them."""
    given = checkpoint.tree.get("args") if isinstance(checkpoint.tree, dict) else None
    state = getattr(given, "state", given)
    return state if isinstance(state, dict) else {}


def _codebase(checkpoint: Checkpoint, arguments: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    given = options.get("codebase")
    if given not in (None, "dit", "sit"):
        raise ValueError(f"codebase {given!r} is none of dit, sit.")
    named = checkpoint.path.stem.lower()
    model = str(arguments.get("model", "")).lower()
    known = [name for name in ("dit", "sit") if model.startswith(f"{name}-") or named.startswith(f"{name}-")]
    if given is None and len(known) != 1:
        raise ValueError(f"{checkpoint.path.name} is a DiT or a SiT, which have the same keys: give --set codebase=dit or codebase=sit.")
    return given or known[0]


def _transport(checkpoint: Checkpoint, arguments: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[str, str]:
    """SiT's path and prediction: asked for, of the training's arguments, or of the published file of this name."""
    published = checkpoint.path.stem in ("SiT-XL-2-256x256", "SiT-XL-2-256")
    found = []
    for name, usual in (("path_type", "Linear"), ("prediction", "velocity")):
        value = options.get(name, arguments.get(name, usual if published else None))
        if value is None:
            raise ValueError(f"{checkpoint.path.name}: a SiT's file does not say its {name}: give --set {name}=... ({usual} by default).")
        found.append(str(value))
    return found[0], found[1]
