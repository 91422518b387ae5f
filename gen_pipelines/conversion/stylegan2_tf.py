"""StyleGAN2's TensorFlow pickles (configurations E and F, StyleGAN2-ADA for TensorFlow), read without TensorFlow.

References: Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN", https://arxiv.org/abs/1912.04958
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..models.gans.stylegan2 import StyleGAN2Discriminator, StyleGAN2Generator
from ..pipelines.stylegan import StyleGANPipeline
from . import tf_network
from .base import Component, Format, Plan
from .nvidia import flag
from .pickles import Record
from .reader import Checkpoint
from .tf_network import Variables, kernel, only

# of the arguments that a network was built with, those without an effect on what it computes
_FREE = {
    "truncation_psi", "truncation_cutoff", "truncation_psi_val", "truncation_cutoff_val", "style_mixing_prob", "structure",
    "randomize_noise", "dlatent_avg_beta", "w_avg_beta", "fused_modconv", "num_fp16_res", "conv_clamp", "func_name", "name",
    "is_training", "is_validation", "is_template_graph", "dlatent_broadcast", "num_channels", "resolution", "label_size", "latent_size",
    "dlatent_size", "mapping_layers", "fmap_base", "fmap_max", "fmap_min", "freeze_layers", "architecture", "mbstd_group_size",
    "mbstd_num_features", "resample_kernel", "style_mixing_prob_val", "label_fmaps", "mapping_fmaps", "input_shape", "impl",
}  # fmt: skip


class StyleGAN2TF(Format):
    """Gs (or G) becomes the generator of a `StyleGANPipeline`; D comes along when it is asked for."""

    name = "stylegan2_tf"
    title = "NVIDIA's stylegan2 and stylegan2-ada for TensorFlow"
    paper = "https://arxiv.org/abs/1912.04958"
    licence = tf_network.LICENCES
    licence_id = "other"
    extensions = (".pkl",)
    options = {**tf_network.OPTIONS, "discriminator": "true to take D along, so that a training can go on"}

    def matches(self, checkpoint: Checkpoint) -> float:
        found = tf_network.networks(checkpoint)
        return 1.0 if "Gs" in found and "synthesis/4x4/Conv/mod_weight" in Variables(found["Gs"], "") else 0.0

    def plan(self, checkpoint: Checkpoint, options: Mapping[str, Any]) -> Plan:
        plan = Plan(self.name, StyleGANPipeline, {})
        name, record, prefix = tf_network.choose(checkpoint, options)
        config, state = generator(record, Variables(record, prefix), plan)
        plan.components["generator"] = Component(StyleGAN2Generator, config, lambda: state)
        taken = {name}
        if flag(options, "discriminator"):
            found = tf_network.networks(checkpoint)
            if "D" not in found:
                raise ValueError(f"{checkpoint.path} has no network D; leave discriminator=true out.")
            d_config, d_state = discriminator(found["D"], Variables(found["D"], "1."), plan)
            plan.components["discriminator"] = Component(StyleGAN2Discriminator, d_config, lambda: d_state)
            taken.add("D")
        tf_network.others(plan, checkpoint, taken)
        return plan


def settings(record: Record) -> dict[str, Any]:
    """The arguments that a network was built with, where they are known and change nothing that the weights do not show.

    Raises:
        ValueError: one is not known, or has a value that is not covered.
    """
    given = dict(record.get("static_kwargs") or {})
    only(given, "nonlinearity", "lrelu")
    only(given, "mapping_nonlinearity", "lrelu")
    only(given, "use_noise", True)
    only(given, "normalize_latents", True)
    only(given, "use_wscale", True)
    only(given, "fmap_decay", 1.0, 1)
    only(given, "dtype", "float32")
    only(given, "synthesis_func", "G_synthesis_stylegan2", "G_synthesis")
    only(given, "mapping_func", "G_mapping")
    covered = {"nonlinearity", "mapping_nonlinearity", "use_noise", "normalize_latents", "use_wscale", "fmap_decay", "dtype",
               "mapping_lrmul", "synthesis_func", "mapping_func"}  # fmt: skip
    if unknown := sorted(set(map(str, given)) - covered - _FREE):
        raise ValueError(f"the network was built with {', '.join(unknown)}, which is not known; it is of another version.")
    return given


def generator(record: Record, variables: Variables, plan: Plan) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, weights) of our generator."""
    given = settings(record)
    only(given, "mapping_lrmul", 0.01)
    if "mapping/LabelConcat/weight" in variables:
        raise ValueError("class-conditional networks of StyleGAN2 before ADA join label and noise in another way; they are not covered.")
    state: dict[str, Tensor] = {}

    def take(target: str, name: str) -> Tensor:
        state[target] = variables.take(name, f"generator.{target}", plan)
        return state[target]

    take("mapping.w_avg", "dlatent_avg")
    layers = mapping(variables, take, state, "mapping/Dense{}", "mapping/LabelEmbed")
    sizes = tf_network.sizes_in(variables, "/Conv0_up/weight")
    channels, skip = {}, "synthesis/4x4/ToRGB/weight" in variables
    resnet = f"synthesis/{sizes[-1]}x{sizes[-1]}/Skip/weight" in variables
    for size in sizes:
        here, theirs = f"synthesis.b{size}", f"synthesis/{size}x{size}"
        names = {"conv1": "Conv" if size == 4 else "Conv1", **({} if size == 4 else {"conv0": "Conv0_up"})}
        if size == 4:
            state[f"{here}.const"] = take(f"{here}.const", f"{theirs}/Const/const")[0]
        for ours, name in names.items():
            layer, number = f"{here}.{ours}", 0 if size == 4 else 2 * (size.bit_length() - 1) - (5 if ours == "conv0" else 4)
            weight = kernel(take(f"{layer}.weight", f"{theirs}/{name}/weight"))
            state[f"{layer}.weight"] = weight.flip((2, 3)) if ours == "conv0" else weight  # their upsampling convolution mirrors it
            channels[size] = weight.shape[0]
            take(f"{layer}.bias", f"{theirs}/{name}/bias")
            state[f"{layer}.noise_const"] = take(f"{layer}.noise_const", f"synthesis/noise{number}")[0, 0]
            state[f"{layer}.noise_strength"] = take(f"{layer}.noise_strength", f"{theirs}/{name}/noise_strength").reshape(())
            modulation(take, state, layer, f"{theirs}/{name}")
        lod = f"synthesis/ToRGB_lod{len(sizes) - 1 - sizes.index(size)}"  # of the networks that grew
        colours = f"{theirs}/ToRGB" if f"{theirs}/ToRGB/weight" in variables else lod
        if size == sizes[-1] or skip:
            state[f"{here}.torgb.weight"] = kernel(take(f"{here}.torgb.weight", f"{colours}/weight"))
            take(f"{here}.torgb.bias", f"{colours}/bias")
            modulation(take, state, f"{here}.torgb", colours)
        if resnet and size > 4:
            state[f"{here}.skip.weight"] = kernel(take(f"{here}.skip.weight", f"{theirs}/Skip/weight")).flip((2, 3))
    for name in ("lod", "synthesis/lod"):
        variables.drop(name, "how far the network has grown, which this kind does not", plan)
    variables.done()
    base, most = tf_network.channels_of(channels)
    config = {
        "sample_size": sizes[-1],
        "out_channels": state[f"synthesis.b{sizes[-1]}.torgb.weight"].shape[0],
        "z_dim": state["mapping.fc0.weight"].shape[1] - (state["mapping.embed.weight"].shape[0] if "mapping.embed.weight" in state else 0),
        "w_dim": state["mapping.w_avg"].shape[0],
        "num_classes": state["mapping.embed.weight"].shape[1] if "mapping.embed.weight" in state else None,
        "channel_base": base,
        "channel_max": most,
        "num_mapping_layers": layers,
        "architecture": "resnet" if resnet else "skip" if skip else "orig",
        "resample_taps": tuple(float(t) for t in given.get("resample_kernel") or (1, 3, 3, 1)),
        "conv_clamp": given.get("conv_clamp"),
        "w_avg_beta": given.get("w_avg_beta") or given.get("dlatent_avg_beta") or 0.995,
    }
    return config, state


def mapping(variables: Variables, take: Any, state: dict[str, Tensor], dense: str, embed: str) -> int:
    """Takes the mapping network; returns its number of layers."""
    if f"{embed}/weight" in variables:
        state["mapping.embed.weight"] = take("mapping.embed.weight", f"{embed}/weight").T
        take("mapping.embed.bias", f"{embed}/bias")
    layers = 0
    while f"{dense.format(layers)}/weight" in variables:
        state[f"mapping.fc{layers}.weight"] = take(f"mapping.fc{layers}.weight", f"{dense.format(layers)}/weight").T
        take(f"mapping.fc{layers}.bias", f"{dense.format(layers)}/bias")
        layers += 1
    return layers


def modulation(take: Any, state: dict[str, Tensor], layer: str, theirs: str) -> None:
    state[f"{layer}.affine.weight"] = take(f"{layer}.affine.weight", f"{theirs}/mod_weight").T
    state[f"{layer}.affine.bias"] = take(f"{layer}.affine.bias", f"{theirs}/mod_bias") + 1  # theirs is added to one


def discriminator(record: Record, variables: Variables, plan: Plan) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, weights) of our discriminator."""
    given = settings(record)
    state: dict[str, Tensor] = {}

    def take(target: str, name: str) -> Tensor:
        state[target] = variables.take(name, f"discriminator.{target}", plan)
        return state[target]

    sizes = sorted(int(name.partition("x")[0]) for name in variables.values if name.endswith("/Conv0/weight"))[::-1]
    if not sizes or sizes != [8 * 2**i for i in range(len(sizes))][::-1]:
        raise ValueError(f"the discriminator has layers at the sizes {sizes}; 8, 16, ... are expected.")
    channels = {}
    resnet, skip = f"{sizes[0]}x{sizes[0]}/Skip/weight" in variables, len(sizes) > 0 and "4x4/FromRGB/weight" in variables
    for size in [*sizes, 4]:
        here, theirs = f"b{size}", f"{size}x{size}"
        lod = f"FromRGB_lod{sizes[0].bit_length() - size.bit_length()}"
        colours = f"{theirs}/FromRGB" if f"{theirs}/FromRGB/weight" in variables else lod
        if size == sizes[0] or skip:
            state[f"{here}.fromrgb.weight"] = kernel(take(f"{here}.fromrgb.weight", f"{colours}/weight"))
            take(f"{here}.fromrgb.bias", f"{colours}/bias")
        if size == 4:
            break
        for ours, name in (("conv0", "Conv0"), ("conv1", "Conv1_down")):
            state[f"{here}.{ours}.weight"] = kernel(take(f"{here}.{ours}.weight", f"{theirs}/{name}/weight"))
            take(f"{here}.{ours}.bias", f"{theirs}/{name}/bias")
        channels[size] = state[f"{here}.conv0.weight"].shape[0]
        if resnet:
            state[f"{here}.skip.weight"] = kernel(take(f"{here}.skip.weight", f"{theirs}/Skip/weight"))
    state["b4.conv.weight"] = kernel(take("b4.conv.weight", "4x4/Conv/weight"))
    take("b4.conv.bias", "4x4/Conv/bias")
    for ours, name in (("fc", "4x4/Dense0"), ("out", "Output")):
        state[f"b4.{ours}.weight"] = take(f"b4.{ours}.weight", f"{name}/weight").T
        take(f"b4.{ours}.bias", f"{name}/bias")
    layers = mapping(variables, take, state, "Mapping{}", "LabelEmbed")
    variables.drop("lod", "how far the network has grown, which this kind does not", plan)
    variables.done()
    channels[4] = state["b4.conv.weight"].shape[0]
    base, most = tf_network.channels_of(channels)
    classes = state["mapping.embed.weight"].shape[1] if "mapping.embed.weight" in state else None
    if classes is None and state["b4.out.weight"].shape[0] != 1:
        raise ValueError("class-conditional discriminators of StyleGAN2 before ADA pick an output by the label; they are not covered.")
    factor = (given.get("mapping_lrmul") or 0.1) / 0.01  # ours is 0.01, and scales what is stored
    for i in range(layers):
        for key in (f"mapping.fc{i}.weight", f"mapping.fc{i}.bias"):
            state[key] = state[key] * factor
    config = {
        "sample_size": sizes[0],
        "in_channels": state[f"b{sizes[0]}.fromrgb.weight"].shape[1],
        "num_classes": classes,
        "channel_base": base,
        "channel_max": most,
        "architecture": "resnet" if resnet else "skip" if skip else "orig",
        "mbstd_group_size": given.get("mbstd_group_size", 4),
        "mbstd_num_channels": state["b4.conv.weight"].shape[1] - channels[4],
        "cmap_dim": None if classes is None else state["b4.out.weight"].shape[0],
        "num_mapping_layers": layers,
        "resample_taps": tuple(float(t) for t in given.get("resample_kernel") or (1, 3, 3, 1)),
        "conv_clamp": given.get("conv_clamp"),
    }
    return config, state
