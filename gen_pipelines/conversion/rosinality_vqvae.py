"""rosinality's VQ-VAE-2 and its PixelSNAIL priors: the state dicts of its two trainings, to a `VQVAEPipeline`.

What differs, and where it goes:

- codebooks are (d, K) there and (K, d) here;
- what is above a level comes first in a concatenation there and last here: input channels of two convolutions change places;
- its convolutions carry a weight norm, w = g v / |v|, which is multiplied out; where one is masked, the masked entries of v count as zeros
  before the norm is taken, as they do there;
- a masked k x k convolution is two here, one over the rows above and one over what is to the left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .base import Component, Format, Made, Plan
from .keys import below, get, numbered
from .reader import Checkpoint, plain, read, tensors


class RosinalityVQVAE(Format):
    """`vqvae_N.pt`, `pixelsnail_top_N.pt` and `pixelsnail_bottom_N.pt` of https://github.com/rosinality/vq-vae-2-pytorch.

    The source is the VQ-VAE (the priors are named by options), a folder with all three, or one prior alone.
    """

    name = "rosinality_vqvae"
    title = "rosinality's vq-vae-2-pytorch"
    paper = "https://arxiv.org/abs/1906.00446"
    extensions = (".pt",)
    options: Mapping[str, str] = {
        "top": "the file of the prior over the top level's codes",
        "bottom": "the file of the prior over the bottom level's codes",
        "sample_size": "height and width of the pictures it was trained on (--size there, 256 by default), where no prior says it",
        "inplace_relu": "true for weights from before January 2021, whose residual blocks overwrote their input by its positive part",
    }

    def matches(self, checkpoint: Checkpoint) -> float:
        """By the names of both networks' first layers."""
        found = tensors(checkpoint.tree)
        return 1.0 if _prefix(found, _VQVAE_KEY) is not None or _prefix(found, _PRIOR_KEY) is not None else 0.0

    def plan(self, checkpoint: Checkpoint, options: Mapping[str, Any]) -> Plan:
        """`vqvae` with `prior` (top) and `prior_2` (bottom) where they are given; a prior alone is one network without a pipeline."""
        from ..models.autoencoders.vq_vae import VQVAEModel
        from ..models.priors.pixel_snail import PixelSNAILPrior
        from ..pipelines.vq_vae import VQVAEPipeline

        plan = Plan(self.name, VQVAEPipeline, {})
        files = _files(checkpoint, options, plan)
        if "vqvae" not in files:
            if len(files) > 1:
                raise ValueError(f"{checkpoint.path} has two priors and no VQ-VAE; give one of them, or the VQ-VAE too.")
            ((_, (found, prefix, tree)),) = files.items()
            plan.pipeline = None
            plan.components["prior"] = _prior(plan, "prior", found, prefix, tree, PixelSNAILPrior)
            return plan
        if ("top" in files) != ("bottom" in files):
            raise ValueError("one prior and two levels of codes: give both priors (--set top=FILE --set bottom=FILE), or none.")
        priors = {}
        for name, kind in (("prior", "top"), ("prior_2", "bottom")):
            if kind in files:
                priors[name] = _prior(plan, name, *files[kind], PixelSNAILPrior)
        found, prefix, _ = files["vqvae"]
        state = below(found, prefix)
        shape = priors["prior_2"].config["shape"] if priors else None
        config = vqvae_config(state, options, shape)
        used = vqvae_used(state)
        plan.components["vqvae"] = Component(VQVAEModel, config, lambda: rename_vqvae(state, config))
        plan.components |= priors
        plan.used |= {prefix + key: ", ".join(f"vqvae.{one}" for one in value) for key, value in used.items()}
        plan.notes.append("trained with a squared error: likelihoods of pixels are those of a Gaussian of deviation 1 in [-1, 1]")
        return plan


_VQVAE_KEY, _PRIOR_KEY = "quantize_t.embed", "horizontal.conv.conv.weight_v"


def _files(checkpoint: Checkpoint, options: Mapping[str, Any], plan: Plan) -> dict[str, tuple[dict[str, Tensor], str, Any]]:
    """The networks by their kind (vqvae, top, bottom): all tensors by the plan's names, the prefix of its own, and its file's tree."""
    parts: list[tuple[str, Any]] = []
    if checkpoint.container == "folder":
        parts += [(f"{name}.", tree) for name, tree in checkpoint.tree.items()]
    else:
        parts.append(("", checkpoint.tree))
    for kind in ("top", "bottom"):
        if options.get(kind) is not None:
            path = Path(str(options[kind]))
            if not path.is_file():
                raise ValueError(f"{kind}: {path} is no file; give the prior's checkpoint, --set {kind}=FILE.")
            plan.sources[kind] = read(path)
            parts.append((f"{kind}:", plan.sources[kind].tree))
    files: dict[str, tuple[dict[str, Tensor], str, Any]] = {}
    for place, tree in parts:
        found = {place + key: value for key, value in tensors(tree).items()}
        for kind_key in (_VQVAE_KEY, _PRIOR_KEY):
            prefix = _prefix(found, kind_key)
            if prefix is None:
                continue
            kind = "vqvae" if kind_key == _VQVAE_KEY else "bottom" if f"{prefix}cond_resnet.blocks.0.conv.weight_v" in found else "top"
            if kind in files:
                raise ValueError(f"{checkpoint.path}: there are two checkpoints of the {kind} network; give a folder with one of each.")
            if place.rstrip(":") in ("top", "bottom") and kind != place.rstrip(":"):
                raise ValueError(f"{place.rstrip(':')}: the file holds the {kind} network.")
            files[kind] = found, prefix, tree
    return files


def _prior(plan: Plan, name: str, found: Mapping[str, Tensor], prefix: str, tree: Any, cls: type) -> Component:
    state = below(found, prefix)
    settings = plain(tree.get("args")) if isinstance(tree, dict) else None
    dropout = settings.get("dropout", 0.1) if isinstance(settings, dict) else 0.1
    config = prior_config(state, dropout)
    filled, used = rename_prior(state, config)
    plan.used |= {prefix + key: ", ".join(f"{name}.{one}" for one in value) for key, value in used.items()}
    plan.dropped[f"{prefix}background"] = "the coordinates of the positions"
    return Component(cls, config, lambda: filled)


# ------------------------------------------------------------------------------------------------------------------------ the VQ-VAE


def vqvae_config(state: Mapping[str, Tensor], options: Mapping[str, Any], bottom: list[int] | None = None) -> dict[str, Any]:
    """The configuration of `VQVAEModel`; `bottom` is the height and width of the lower codes, where a prior says it.

    Raises:
        ValueError: the size of the pictures is unknown, or contradicts the priors.
    """
    size = options.get("sample_size")
    known = None if bottom is None else [4 * side for side in bottom]
    if size is None and known is None:
        raise ValueError("the file does not say how large the pictures are: give --set sample_size=256, or what --size was in training.")
    sides = known if size is None else [size, size] if isinstance(size, int) else list(size)
    if known is not None and sides != known:
        raise ValueError(f"sample_size {size}: the prior over the lower codes is for pictures of {known[0]} x {known[1]}.")
    if len(sides) != 2 or any(not isinstance(side, int) or side < 8 or side % 8 for side in sides):
        raise ValueError(f"sample_size: a multiple of 8 is needed, got {size!r}.")
    first = get(state, "enc_b.blocks.0.weight")
    residual = numbered(state, r"enc_b\.blocks\.(\d+)\.conv\.1\.weight")
    dim, count = get(state, _VQVAE_KEY).shape
    return {
        "sample_size": sides[0] if sides[0] == sides[1] else sides,
        "in_channels": first.shape[1],
        "downsample_factors": [4, 2],
        "network": "compact",
        "hidden_channels": get(state, "enc_b.blocks.2.weight").shape[0],
        "layers_per_block": len(residual),
        "residual_channels": get(state, f"enc_b.blocks.{residual[0]}.conv.1.weight").shape[0] if residual else 32,
        "rectified_skip": bool(options.get("inplace_relu", False)),
        "num_embeddings": count,
        "embedding_dim": dim,
        "codebook_update": "ema",
        "likelihood": "gaussian",
        "scale": "shared",
    }


def rename_vqvae(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of `VQVAEModel`."""
    dim, found = config["embedding_dim"], {}
    for key, (target, *_) in vqvae_used(state).items():
        value = state[key]
        if key.rpartition(".")[2] in ("embed", "embed_avg"):
            value = value.t()
        elif key in ("quantize_conv_b.weight", "dec.blocks.0.weight"):  # what is above comes last here
            value = torch.cat([value[:, dim:], value[:, :dim]], 1)
        found[target] = value
    count = config["num_embeddings"]
    for level in (0, 1):
        place = f"quantizers.{level}."
        found |= {f"{place}usage": torch.zeros(count), f"{place}initialized": torch.tensor(True)}
        found |= {f"{place}{name}": torch.zeros((), dtype=torch.long) for name in ("epoch", "updates")}
    return found | {"log_scale": torch.zeros(config["in_channels"], 1, 1)}


def vqvae_used(state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Their key -> ours, of all that is known."""
    table: dict[str, str] = {
        "quantize_conv_b": "before_codes.0", "quantize_conv_t": "before_codes.1", "upsample_t": "to_bottom.0",
        **_encoder(state, "enc_b", "encoders.0", 2), **_encoder(state, "enc_t", "encoders.1", 1),
        **_decoder(state, "dec_t", "upsamplers.0", 1), **_decoder(state, "dec", "decoder", 2),
    }  # fmt: skip
    used = {f"{theirs}.{kind}": [f"{ours}.{kind}"] for theirs, ours in table.items() for kind in ("weight", "bias")}
    for theirs, ours in (("quantize_b", "quantizers.0"), ("quantize_t", "quantizers.1")):
        for a, b in (("embed", "codebook"), ("cluster_size", "cluster_size"), ("embed_avg", "cluster_sum")):
            used[f"{theirs}.{a}"] = [f"{ours}.{b}"]
    for key in used:
        get(state, key)
    return used


def _encoder(state: Mapping[str, Tensor], theirs: str, ours: str, halvings: int) -> dict[str, str]:
    """Convolutions at every second place of a sequence, the last one without a stride, then the residual blocks."""
    table = {f"{theirs}.blocks.{2 * n}": f"{ours}.halve.{n}" for n in range(halvings)}
    return table | {f"{theirs}.blocks.{2 * halvings}": f"{ours}.conv"} | _residual(state, theirs, ours)


def _decoder(state: Mapping[str, Tensor], theirs: str, ours: str, doublings: int) -> dict[str, str]:
    """A convolution, residual blocks, an activation, then transposed convolutions at every second place."""
    first = len(numbered(state, rf"{theirs}\.blocks\.(\d+)\.conv\.1\.weight")) + 2
    table = {f"{theirs}.blocks.0": f"{ours}.conv"} | _residual(state, theirs, ours)
    return table | {f"{theirs}.blocks.{first + 2 * n}": f"{ours}.grow.{n}" for n in range(doublings)}


def _residual(state: Mapping[str, Tensor], theirs: str, ours: str) -> dict[str, str]:
    table = {}
    for number, place in enumerate(numbered(state, rf"{theirs}\.blocks\.(\d+)\.conv\.1\.weight")):
        table[f"{theirs}.blocks.{place}.conv.1"] = f"{ours}.blocks.{number}.conv_in"
        table[f"{theirs}.blocks.{place}.conv.3"] = f"{ours}.blocks.{number}.conv_out"
    return table


# ------------------------------------------------------------------------------------------------------------------------- the prior


def prior_config(state: Mapping[str, Tensor], dropout: float = 0.1) -> dict[str, Any]:
    """The configuration of `PixelSNAILPrior`.

    Raises:
        ValueError: an even size of kernels, which ours does not have.
    """
    width, codes = get(state, _PRIOR_KEY).shape[:2]
    shape = list(get(state, "background").shape[2:])
    blocks = len(numbered(state, r"blocks\.(\d+)\.resblocks\."))
    inner = get(state, "blocks.0.resblocks.0.conv1.conv.conv.weight_v")
    if inner.shape[2] % 2 == 0:
        raise ValueError(f"kernels of {inner.shape[2]} x {inner.shape[2]}: PixelSNAILPrior has odd ones.")
    config = {
        "num_codes": codes,
        "shape": shape,
        "width": width,
        "residual_channels": inner.shape[0],
        "kernel_size": inner.shape[2],
        "num_blocks": blocks,
        "layers_per_block": len(numbered(state, r"blocks\.0\.resblocks\.(\d+)\.")),
        "attention": "blocks.0.causal_attention.query.weight_v" in state,
        "out_layers": len(numbered(state, r"out\.(\d+)\.conv1\.")),
        "dropout": dropout,
    }
    above = state.get("cond_resnet.blocks.0.conv.weight_v")
    if above is not None:
        config["condition_shapes"] = [[side // 2 for side in shape]]
        config["condition_channels"] = above.shape[0]
        config["condition_layers"] = len(numbered(state, r"cond_resnet\.blocks\.(\d+)\.conv1\."))
    return config


def rename_prior(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[dict[str, Tensor | Made], dict[str, list[str]]]:
    """The weights of `PixelSNAILPrior`, and where each of their keys went."""
    filled: dict[str, Tensor | Made] = {}
    used: dict[str, list[str]] = {}

    def whole(theirs: str, ours: str) -> None:
        """A layer with a weight norm."""
        _norm(state, theirs, f"{ours}.weight", filled, used)
        if f"{theirs}.bias" in state:
            filled[f"{ours}.bias"], used[f"{theirs}.bias"] = state[f"{theirs}.bias"], [f"{ours}.bias"]

    def causal(theirs: str, ours: str) -> None:
        reach = config["kernel_size"] // 2
        _norm(state, theirs, f"{ours}.above.weight", filled, used, reach, lambda w: w[:, :, :-1])
        _norm(state, theirs, f"{ours}.left.weight", filled, used, reach, lambda w: w[:, :, -1:, :reach])
        filled[f"{ours}.above.bias"], used[f"{theirs}.bias"] = get(state, f"{theirs}.bias"), [f"{ours}.above.bias"]

    def gated(theirs: str, ours: str) -> None:
        whole(f"{theirs}.conv1.conv", f"{ours}.conv_in")
        whole(f"{theirs}.conv2.conv", f"{ours}.conv_out")

    whole("horizontal.conv.conv", "above")
    whole("vertical.conv.conv", "left")
    for number in range(config["num_blocks"]):
        theirs, ours = f"blocks.{number}", f"blocks.{number}"
        for layer in range(config["layers_per_block"]):
            causal(f"{theirs}.resblocks.{layer}.conv1.conv.conv", f"{ours}.layers.{layer}.conv_in")
            causal(f"{theirs}.resblocks.{layer}.conv2.conv.conv", f"{ours}.layers.{layer}.conv_out")
            if "condition_shapes" in config:
                whole(f"{theirs}.resblocks.{layer}.condition.conv", f"{ours}.layers.{layer}.condition")
        if config["attention"]:
            gated(f"{theirs}.key_resblock", f"{ours}.key")
            gated(f"{theirs}.query_resblock", f"{ours}.query")
            for a, b in (("query", "to_q"), ("key", "to_k"), ("value", "to_v")):
                whole(f"{theirs}.causal_attention.{a}", f"{ours}.attention.{b}")
            gated(f"{theirs}.out_resblock", f"{ours}.mix")
            whole(f"{theirs}.out_resblock.aux_conv.conv", f"{ours}.mix.auxiliary")
        else:
            whole(f"{theirs}.out.conv", f"{ours}.mix")
    if "condition_shapes" in config:
        whole("cond_resnet.blocks.0.conv", "of_codes.0.first")
        for layer in range(config["condition_layers"]):
            gated(f"cond_resnet.blocks.{layer + 1}", f"of_codes.0.layers.{layer}")
    for layer in range(config["out_layers"]):
        gated(f"out.{layer}", f"out.{layer}")
    whole(f"out.{config['out_layers'] + 1}.conv", "head")
    return filled, used


def _norm(
    state: Mapping[str, Tensor],
    theirs: str,
    ours: str,
    filled: dict[str, Tensor | Made],
    used: dict[str, list[str]],
    masked_from: int | None = None,
    part: Callable[[Tensor], Tensor] = lambda w: w,
) -> None:
    """Enter a part of w = g v / |v|, the norm over all but the first dimension; `masked_from`: that column of v's last row on is zero."""
    g, v = get(state, f"{theirs}.weight_g"), get(state, f"{theirs}.weight_v")

    def make() -> Tensor:
        direction = v
        if masked_from is not None:
            direction = v.clone()
            direction[:, :, -1, masked_from:] = 0
        return part(direction * (g / direction.flatten(1).norm(dim=1).view(g.shape))).contiguous()

    filled[ours] = Made(make, tuple(part(v.to("meta")).shape), v.dtype)
    for key in (f"{theirs}.weight_g", f"{theirs}.weight_v"):
        used.setdefault(key, []).append(ours)


# ------------------------------------------------------------------------------------------------------------------------------- keys


def _prefix(found: Mapping[str, Tensor], key: str) -> str | None:
    """What stands before a key of a network, None where it is not there."""
    return next((name.removesuffix(key) for name in found if name == key or name.endswith((f".{key}", f":{key}"))), None)
