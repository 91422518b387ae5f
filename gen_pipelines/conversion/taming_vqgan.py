"""taming-transformers' VQGAN, and latent diffusion's autoencoders by themselves: a Lightning checkpoint, to diffusers' class for it.

The quantiser's commitment weight sits on the other term there unless it says `legacy=False`; weights and codes are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import Component, Format, Plan
from .keys import below, covered
from .ldm_autoencoder import autoencoder_recipe, looks_like_autoencoder
from .reader import Checkpoint, tensors

_DROPPED = {
    "loss.*": "the discriminator and the perceptual loss, which only training needs",
    "colorize": "colours for pictures of segmentations",
    "quantize.used": "a renumbering of the codes that are in use; the vectors keep their own numbers",
}
_TRAINING = {
    "optimizer_states.*": "the optimiser's state",
    "lr_schedulers.*": "the learning rate's state",
    "callbacks.*": "records of the training",
}


class TamingVQGAN(Format):
    """`last.ckpt` of https://github.com/CompVis/taming-transformers, with its project's yaml as `config` where there is one."""

    name = "taming_vqgan"
    title = "CompVis' taming-transformers"
    paper = "https://arxiv.org/abs/2012.09841"
    extensions = (".ckpt", ".pt")
    options: Mapping[str, str] = {
        "config": "the yaml of the training (configs/*-project.yaml); the weights say all but the size of the pictures",
        "sample_size": "height and width of the pictures, where there is no yaml; 256 by default, and only written down",
    }

    def matches(self, checkpoint: Checkpoint) -> float:
        """By the names of the first layers on both sides."""
        return 0.9 if _prefix(tensors(checkpoint.tree)) is not None else 0.0

    def plan(self, checkpoint: Checkpoint, options: Mapping[str, Any]) -> Plan:
        """One `VQModel`, or `AutoencoderKL` where there are moments and no codebook; without a pipeline."""
        import diffusers

        found = tensors(checkpoint.tree)
        prefix = _prefix(found)
        if prefix is None:
            raise ValueError(f"{checkpoint.path.name} holds no autoencoder of this layout.")
        state = below(found, prefix)
        name, config, recipe = autoencoder_recipe(state, options.get("sample_size", 256))
        config["scaling_factor"] = 1.0  # what latents are multiplied with is the diffusion model's to say
        if options.get("config") is not None:
            config["sample_size"] = _agree(config, options["config"])
        known = options.get("config") or options.get("sample_size")
        return Plan(
            self.name,
            None,
            {"vqvae": Component(getattr(diffusers, name), config, lambda: recipe.state(state))},
            used=recipe.used("vqvae", {key: prefix + key for key in state}),
            dropped=covered(_DROPPED, found, prefix) | (covered(_TRAINING, found) if prefix else {}),
            notes=[] if known else ["sample_size 256 is taken; nothing but the training's yaml holds it"],
        )


def _agree(config: Mapping[str, Any], given: Any) -> int:
    """The size of the pictures that a yaml names; ValueError where it is another model's."""
    try:
        params = given["model"]["params"]
        inner = params["ddconfig"]
        said = {
            "num_vq_embeddings": params.get("n_embed"), "vq_embed_dim": params["embed_dim"], "latent_channels": inner["z_channels"],
            "block_out_channels": [inner["ch"] * factor for factor in inner["ch_mult"]], "layers_per_block": inner["num_res_blocks"],
            "in_channels": inner["in_channels"], "out_channels": inner["out_ch"],
        }  # fmt: skip
        resolution = int(inner["resolution"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"config: no yaml of a VQGAN, it lacks {error}; give the one of the training (model.params.ddconfig).") from None
    wrong = [f"{name} {value} where the weights have {config[name]}" for name, value in said.items() if config.get(name, value) != value]
    if wrong:
        raise ValueError(f"config: another model's: {', '.join(wrong)}.")
    return resolution


def _prefix(found: Mapping[str, Any]) -> str | None:
    return next((prefix for prefix in ("state_dict.", "model.", "") if looks_like_autoencoder(below(found, prefix))), None)
