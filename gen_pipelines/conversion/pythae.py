"""pythae's folders: a VAE or a VQ-VAE with the networks that pythae makes by itself.

Networks of the user's own lie in such a folder as pickled code (`encoder.pkl`, `decoder.pkl`), which is never loaded here; only the names
of their weights are in `model.pt`, and they do not say what the network computes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .base import Component, Format, Plan
from .keys import below, covered, get
from .reader import Checkpoint, tensors

# models whose networks are those of the plain one: only their training differs
_VAES, _VQVAES = ("VAE", "BetaVAE", "IWAE"), ("VQVAE",)
_FILE, _CONFIG, _STATE = "model.pt", "model_config.json", "model_state_dict"
_OTHERS = {
    "optimizer.pt.*": "the optimiser's state",
    "scheduler.pt.*": "the learning rate's state",
    "info_checkpoint.pt.*": "where the training stood",
}


class Pythae(Format):
    """A folder that `model.save` of https://github.com/clementchadebec/benchmark_VAE wrote, or its `model.pt` with a `config`."""

    name = "pythae"
    title = "pythae"
    paper = "https://arxiv.org/abs/2206.08309"
    extensions = (".pt", "a folder")
    options: Mapping[str, str] = {"config": "model_config.json, where the source is model.pt alone"}

    def matches(self, checkpoint: Checkpoint) -> float:
        """By `model_state_dict` beside a configuration with a name, or with the default networks' keys."""
        tree = checkpoint.tree
        if not isinstance(tree, dict):
            return 0.0
        inner = tree.get(_FILE, tree)
        if not isinstance(inner, dict) or not isinstance(inner.get(_STATE), dict):
            return 0.0
        config = tree.get(_CONFIG)
        if isinstance(config, dict) and str(config.get("name", "")).endswith("Config"):
            return 1.0
        return 1.0 if {"encoder.layers.0.0.weight", "decoder.layers.0.0.weight"} <= set(inner[_STATE]) else 0.2

    def plan(self, checkpoint: Checkpoint, options: Mapping[str, Any]) -> Plan:
        """`vae` in a `VAEPipeline`, or `vqvae` in a `VQVAEPipeline` without priors."""
        from ..models.autoencoders.vae import VAEModel
        from ..models.autoencoders.vq_vae import VQVAEModel
        from ..pipelines.vae import VAEPipeline
        from ..pipelines.vq_vae import VQVAEPipeline

        tree, found = checkpoint.tree, tensors(checkpoint.tree)
        prefix = f"{_FILE}.{_STATE}." if isinstance(tree, dict) and _FILE in tree else f"{_STATE}."
        settings = options.get("config") or (tree.get(_CONFIG) if isinstance(tree, dict) else None)
        if not isinstance(settings, dict):
            raise ValueError(f"the configuration is missing: give the folder, or --config {_CONFIG} beside {_FILE}.")
        state = below(found, prefix)
        kind = checked_kind(settings)
        if kind in _VAES:
            name, cls, pipeline = "vae", VAEModel, VAEPipeline
            config, filled, used = vae_config(settings), rename_vae(state, settings), _VAE_KEYS
        else:
            name, cls, pipeline = "vqvae", VQVAEModel, VQVAEPipeline
            config, filled, used = vqvae_config(settings, state), rename_vqvae(state, settings), _vqvae_keys(settings)
        plan = Plan(self.name, pipeline, {name: Component(cls, config, lambda: filled)})
        plan.used = {prefix + theirs: ", ".join(f"{name}.{one}" for one in ours.split(", ")) for theirs, ours in used.items()}
        plan.dropped = covered(_OTHERS, found)
        if kind != "VAE" and kind in _VAES:
            plan.notes.append(f"trained as a {kind}; the networks are those of a VAE")
        if config["likelihood"] == "gaussian":
            plan.notes.append("trained with a squared error: its Gaussian's deviation is the one whose log-likelihood that is")
        return plan


def checked_kind(settings: Mapping[str, Any]) -> str:
    """The model's name; ValueError for another than those that are covered, and for networks of the user's own."""
    kind = str(settings.get("name", "")).removesuffix("Config").removesuffix("_")
    if kind not in _VAES + _VQVAES:
        raise ValueError(
            f"a {kind or 'model without a name'} of pythae: converted are {', '.join(_VAES + _VQVAES)}; the others have further networks "
            "or another prior, which no model here has."
        )
    own = [side for side in ("encoder", "decoder") if not settings.get(f"uses_default_{side}", True)]
    if own:
        files = " and ".join(f"{side}.pkl" for side in own)
        raise ValueError(
            f"its {' and '.join(own)} is not pythae's own: {files} holds code, which is not run. Load it with pythae, where you trust its "
            "author, and build the same network here."
        )
    picture_shape(settings)
    return kind


def picture_shape(settings: Mapping[str, Any]) -> tuple[int, int, int]:
    """Channels, height and width."""
    shape = settings.get("input_dim")
    if not isinstance(shape, (list, tuple)) or len(shape) not in (2, 3) or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(f"input_dim {shape!r}: pictures of (channels, height, width) or (height, width) are needed.")
    return (1, *shape) if len(shape) == 2 else tuple(shape)


def vae_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of `VAEModel`: one hidden layer of 512 on both sides, grey values from a sigmoid."""
    channels, height, width = picture_shape(settings)
    binary = settings.get("reconstruction_loss", "mse") == "bce"
    return {
        "sample_size": [height, width],
        "in_channels": channels,
        "latent_dim": settings.get("latent_dim", 10),
        "encoder_type": "mlp",
        "decoder_type": "mlp",
        "hidden_sizes": [512],
        "activation": "relu",
        "likelihood": "bernoulli" if binary else "gaussian",
        "scale": "shared",
        "bounded_mean": not binary,
    }


_VAE_KEYS = {
    f"{theirs}.{kind}": f"{ours}.{kind}"
    for theirs, ours in (
        ("encoder.layers.0.0", "encoder.0"),
        ("encoder.embedding", "to_moments"),
        ("encoder.log_var", "to_moments"),
        ("decoder.layers.0.0", "from_latents.0"),
        ("decoder.layers.1.0", "decoder"),
    )
    for kind in ("weight", "bias")
}


def rename_vae(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of `VAEModel`: mean and log-variance come from one layer here."""
    found = {}
    for theirs, ours in _VAE_KEYS.items():
        if ours.startswith("to_moments"):
            if theirs.startswith("encoder.embedding"):
                found[ours] = torch.cat([get(state, theirs), get(state, theirs.replace("embedding", "log_var"))])
        else:
            found[ours] = get(state, theirs)
    config = vae_config(settings)
    if config["likelihood"] == "gaussian":  # half the squared error in [0, 1]: deviation 1 there, 2 in [-1, 1]
        found["log_scale"] = torch.full((config["in_channels"], 1, 1), math.log(2))
    return found


def vqvae_config(settings: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The configuration of `VQVAEModel`: pythae's default network quantises each latent number by itself, with vectors of one dimension."""
    channels, height, width = picture_shape(settings)
    book = get(state, _book(settings))
    return {
        "sample_size": [height, width],
        "in_channels": channels,
        "network": "mlp",
        "hidden_sizes": [512],
        "num_positions": settings.get("latent_dim", 10),
        "num_embeddings": book.shape[0],
        "embedding_dim": book.shape[1],
        "codebook_update": "ema" if settings.get("use_ema", False) else "loss",
        "decay": settings.get("decay", 0.99),
        "beta": settings.get("commitment_loss_factor", 0.25),
        "likelihood": "gaussian",
        "scale": "shared",
        "bounded_mean": True,
    }


def _book(settings: Mapping[str, Any]) -> str:
    return "quantizer.embeddings" if settings.get("use_ema", False) else "quantizer.embeddings.weight"


def _vqvae_keys(settings: Mapping[str, Any]) -> dict[str, str]:
    table = {
        f"{theirs}.{kind}": f"{ours}.{kind}"
        for theirs, ours in (
            ("encoder.layers.0.0", "encoders.0.0"),
            ("encoder.embedding", "before_codes.0"),
            ("decoder.layers.0.0", "from_codes.0"),
            ("decoder.layers.1.0", "decoder"),
        )
        for kind in ("weight", "bias")
    }
    table[_book(settings)] = "quantizers.0.codebook"
    if settings.get("use_ema", False):
        table |= {"quantizer.cluster_size": "quantizers.0.cluster_size", "quantizer.ema_embed": "quantizers.0.cluster_sum"}
    return table


def rename_vqvae(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of `VQVAEModel`."""
    found = {ours: get(state, theirs) for theirs, ours in _vqvae_keys(settings).items()}
    book = found["quantizers.0.codebook"]
    place = "quantizers.0."
    found.setdefault(f"{place}cluster_size", torch.ones(len(book)))
    found.setdefault(f"{place}cluster_sum", book)
    found |= {f"{place}usage": torch.zeros(len(book)), f"{place}initialized": torch.tensor(True)}
    found |= {f"{place}{name}": torch.zeros((), dtype=torch.long) for name in ("epoch", "updates")}
    # the whole squared error in [0, 1]: a variance of 1/2 there, 2 in [-1, 1]
    return found | {"log_scale": torch.full((picture_shape(settings)[0], 1, 1), 0.5 * math.log(2))}
