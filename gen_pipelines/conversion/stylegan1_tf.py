"""StyleGAN's TensorFlow pickles, read without TensorFlow: the network at the end of its growth.

References: Karras et al. 2019, "A Style-Based Generator Architecture for Generative Adversarial Networks", https://arxiv.org/abs/1812.04948
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..models.gans.stylegan1 import StyleGAN1Generator
from ..pipelines.stylegan import StyleGANPipeline
from . import tf_network
from .base import Component, Format, Made, Plan
from .pickles import Record
from .reader import Checkpoint
from .tf_network import Variables, kernel, only

# From this size on, upsampling and convolution are one transposed convolution in their network ("fused"), which mirrors the kernel
# against the two operations one after another that it stands for.
_FUSED_FROM = 128

_FREE = {
    "truncation_psi", "truncation_cutoff", "truncation_psi_val", "truncation_cutoff_val", "dlatent_avg_beta", "style_mixing_prob",
    "is_training", "is_validation", "is_template_graph", "structure", "randomize_noise", "num_channels", "resolution", "label_size",
    "latent_size", "dlatent_size", "dlatent_broadcast", "mapping_layers", "mapping_fmaps", "fmap_base", "fmap_max", "force_clean_graph",
    "fused_scale", "blur_filter", "func_name", "name",
}  # fmt: skip


class StyleGAN1TF(Format):
    """Gs (or G) becomes the generator of a `StyleGANPipeline`. Its discriminator has no class here."""

    name = "stylegan1_tf"
    title = "NVIDIA's stylegan for TensorFlow"
    paper = "https://arxiv.org/abs/1812.04948"
    licence = tf_network.LICENCES
    licence_id = "other"
    extensions = (".pkl",)
    options = tf_network.OPTIONS

    def matches(self, checkpoint: Checkpoint) -> float:
        found = tf_network.networks(checkpoint)
        return 1.0 if "Gs" in found and "synthesis/4x4/Const/StyleMod/weight" in Variables(found["Gs"], "") else 0.0

    def plan(self, checkpoint: Checkpoint, options: Mapping[str, Any]) -> Plan:
        plan = Plan(self.name, StyleGANPipeline, {})
        name, record, prefix = tf_network.choose(checkpoint, options)
        config, state = generator(record, Variables(record, prefix), plan)
        plan.components["generator"] = Component(StyleGAN1Generator, config, lambda: state)
        tf_network.others(plan, checkpoint, {name})
        return plan


def generator(record: Record, variables: Variables, plan: Plan) -> tuple[dict[str, Any], dict[str, Tensor | Made]]:
    """(configuration, weights) of our generator.

    Their layers scale by He's gain of sqrt(2) before the bias; ours by one. So kernels are multiplied by it, and the biases of the
    mapping, whose activations we scale afterwards, are divided by it.

    Raises:
        ValueError: a setting or variable that is not covered, or a network that has not grown to its end.
    """
    given = dict(record.get("static_kwargs") or {})
    for setting, *allowed in (
        ("nonlinearity", "lrelu"), ("mapping_nonlinearity", "lrelu"), ("use_noise", True), ("use_styles", True),
        ("const_input_layer", True), ("use_wscale", True), ("use_pixel_norm", False), ("use_instance_norm", True),
        ("normalize_latents", True), ("fmap_decay", 1.0, 1), ("dtype", "float32"), ("mapping_lrmul", 0.01),
    ):  # fmt: skip
        only(given, setting, *allowed)
        given.pop(setting, None)
    if unknown := sorted(set(map(str, given)) - _FREE):
        raise ValueError(f"the network was built with {', '.join(unknown)}, which is not known; it is of another version.")
    if "mapping/LabelConcat/weight" in variables:
        raise ValueError("class-conditional networks of StyleGAN join label and noise in another way; they are not covered.")
    if "lod" in variables and float(variables.values["lod"]) != 0:
        raise ValueError(f"the network is still growing (lod = {float(variables.values['lod']):g}); convert one whose lod is 0.")
    state: dict[str, Tensor | Made] = {}

    def take(target: str, name: str) -> Tensor:
        state[target] = variables.take(name, f"generator.{target}", plan)
        return state[target]

    def scaled(target: str, tensor: Tensor, factor: float) -> None:
        state[target] = Made(lambda: tensor * factor, tuple(tensor.shape), tensor.dtype)

    take("mapping.w_avg", "dlatent_avg")
    layers = 0
    while f"mapping/Dense{layers}/weight" in variables:
        ours, theirs = f"mapping.fc{layers}", f"mapping/Dense{layers}"
        state[f"{ours}.weight"] = take(f"{ours}.weight", f"{theirs}/weight").T
        scaled(f"{ours}.bias", take(f"{ours}.bias", f"{theirs}/bias"), 1 / math.sqrt(2))
        layers += 1
    sizes = tf_network.sizes_in(variables, "/Conv0_up/weight")
    fused = given.get("fused_scale", "auto")
    if fused not in (True, False, "auto"):
        raise ValueError(f"fused_scale = {fused!r} is none of True, False, 'auto'.")
    channels = {}
    for i, size in enumerate(sizes):
        here, theirs = f"b{size}", f"synthesis/{size}x{size}"
        parts = ("Const", "Conv") if size == 4 else ("Conv0_up", "Conv1")
        if size == 4:
            state[f"{here}.const"] = take(f"{here}.const", f"{theirs}/Const/const")[0]
        for k, part in enumerate(parts):
            if part != "Const":
                weight = kernel(take(f"{here}.conv{k}.weight", f"{theirs}/{part}/weight"))
                if part == "Conv0_up" and (fused is True or (fused == "auto" and size >= _FUSED_FROM)):
                    weight = weight.flip((2, 3))
                scaled(f"{here}.conv{k}.weight", weight, math.sqrt(2))
            ours = f"{here}.epilogue{k}"
            channels[size] = take(f"{ours}.bias", f"{theirs}/{part}/bias").shape[0]
            take(f"{ours}.noise_strength", f"{theirs}/{part}/Noise/weight")
            state[f"{ours}.noise_const"] = take(f"{ours}.noise_const", f"synthesis/noise{2 * i + k}")[0, 0]
            state[f"{ours}.affine.weight"] = take(f"{ours}.affine.weight", f"{theirs}/{part}/StyleMod/weight").T
            take(f"{ours}.affine.bias", f"{theirs}/{part}/StyleMod/bias")
    colours = f"torgb{sizes[-1]}"
    state[f"{colours}.weight"] = kernel(take(f"{colours}.weight", "synthesis/ToRGB_lod0/weight"))
    take(f"{colours}.bias", "synthesis/ToRGB_lod0/bias")
    for lod in range(1, len(sizes)):
        for leaf in ("weight", "bias"):
            variables.drop(f"synthesis/ToRGB_lod{lod}/{leaf}", "colours of a size that the network has grown beyond", plan)
    for name in ("lod", "synthesis/lod"):
        variables.drop(name, "how far the network has grown: to its end", plan)
    variables.done()
    base, most = tf_network.channels_of(channels)
    config = {
        "sample_size": sizes[-1],
        "out_channels": state[f"{colours}.weight"].shape[0],
        "z_dim": state["mapping.fc0.weight"].shape[1],
        "w_dim": state["mapping.w_avg"].shape[0],
        "channel_base": base // 2,
        "channel_max": most,
        "num_mapping_layers": layers,
        "architecture": "orig",
        "resample_taps": tuple(float(t) for t in given.get("blur_filter") or (1, 2, 1)),
        "w_avg_beta": given.get("dlatent_avg_beta") or 0.995,
    }
    return config, state
