"""rosinality's StyleGAN2 in PyTorch: training checkpoints, and weights converted from TensorFlow by its own script.

References: Karras et al. 2020, https://arxiv.org/abs/1912.04958
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..models.gans.mapping import MappingNetwork
from ..models.gans.stylegan2 import StyleGAN2Discriminator, StyleGAN2Generator
from ..pipelines.stylegan import StyleGANPipeline
from .base import Component, Format, Made, Plan
from .nvidia import flag
from .reader import Checkpoint
from .tf_network import channels_of

_AVERAGED = 4096  # noises whose mean style stands in for an average that the file lacks, as many as their sampling script takes
_TRAINING = "for training only"


class RosinalityStyleGAN2(Format):
    """g_ema (or g) becomes the generator of a `StyleGANPipeline`; d comes along when it is asked for."""

    name = "rosinality_stylegan2"
    title = "rosinality's stylegan2-pytorch"
    paper = "https://arxiv.org/abs/1912.04958"
    licence = "code MIT; weights as their author says, and NVIDIA's non-commercial licence where they were converted from NVIDIA's"
    extensions = (".pt",)
    options = {
        "network": "g_ema (default) or g: which generator to take",
        "discriminator": "true to take d along, so that a training can go on",
    }

    def matches(self, checkpoint: Checkpoint) -> float:
        tree = checkpoint.tree if isinstance(checkpoint.tree, dict) else {}
        state = next((tree[name] for name in ("g_ema", "g") if isinstance(tree.get(name), dict)), {})
        return 1.0 if {"input.input", "conv1.conv.weight", "to_rgb1.conv.weight", "style.1.weight"} <= set(state) else 0.0

    def plan(self, checkpoint: Checkpoint, options: Mapping[str, Any]) -> Plan:
        tree = checkpoint.tree
        name = options.get("network", "g_ema" if "g_ema" in tree else "g")
        if name not in ("g_ema", "g") or name not in tree:
            raise ValueError(f"option network = {name!r}: {checkpoint.path} has {', '.join(n for n in ('g_ema', 'g') if n in tree)}.")
        plan = Plan(self.name, StyleGANPipeline, {})
        config, state = generator(dict(tree[name]), tree.get("latent_avg"), f"{name}.", plan)
        plan.components["generator"] = Component(StyleGAN2Generator, config, lambda: state)
        taken = {name, "latent_avg"}
        if flag(options, "discriminator"):
            if not isinstance(tree.get("d"), dict):
                raise ValueError(f"{checkpoint.path} has no network d; leave discriminator=true out.")
            d_config, d_state = discriminator(dict(tree["d"]), "d.", plan)
            plan.components["discriminator"] = Component(StyleGAN2Discriminator, d_config, lambda: d_state)
            taken.add("d")
        reasons = {"g": "the moving average g_ema is taken", "g_ema": "g is asked for", "d": "option discriminator=true takes it"}
        for part in tree:
            if part not in taken:
                plan.dropped[part if isinstance(tree[part], Tensor) else f"{part}.*"] = reasons.get(part, _TRAINING)
        return plan


class _Taker:
    """Moves tensors from their names to ours, and remembers which were left."""

    def __init__(self, source: dict[str, Tensor], prefix: str, component: str, plan: Plan) -> None:
        self.source, self.prefix, self.component, self.plan = source, prefix, component, plan
        self.state: dict[str, Tensor | Made] = {}
        self.taps: list[Tensor] = []

    def take(self, target: str, name: str, *shape: int) -> Tensor:
        if name not in self.source or not isinstance(self.source[name], Tensor):
            raise ValueError(f"{self.prefix}{name} is missing; the checkpoint is of another version, or cut.")
        self.plan.used[f"{self.prefix}{name}"] = f"{self.component}.{target}"
        value = self.source.pop(name)
        self.state[target] = value.reshape(shape) if shape else value
        return self.state[target]

    def done(self) -> tuple[float, ...]:
        """Drops the filters, and returns their taps."""
        for name in [name for name in self.source if re.search(r"(upsample|blur|conv2\.0|skip\.0)\.kernel$", name)]:
            kernel = self.source.pop(name)
            self.plan.dropped[f"{self.prefix}{name}"] = "made from the configuration"
            self.taps.append(kernel.float() / kernel.float().sum())
        if self.source:
            raise ValueError(f"keys that are not known: {', '.join(sorted(self.source)[:8])}; the checkpoint is of another version.")
        if not self.taps:
            return (1.0, 3.0, 3.0, 1.0)
        row = self.taps[0].sum(0)
        if any(k.shape != (len(row),) * 2 or not torch.allclose(k, torch.outer(row, row), atol=1e-6) for k in self.taps):
            raise ValueError("its layers have different resampling filters, or one that is not separable; not covered.")
        row = row / row[row > 1e-9].min()
        return tuple(float(round(t)) if abs(t - round(t)) < 1e-4 else t for t in row.tolist())


def generator(source: dict[str, Tensor], average: Any, prefix: str, plan: Plan) -> tuple[dict[str, Any], dict[str, Tensor | Made]]:
    """(configuration, weights) of our generator."""
    taker = _Taker(source, prefix, "generator", plan)
    take, state = taker.take, taker.state
    layers = 0
    while f"style.{layers + 1}.weight" in source:
        take(f"mapping.fc{layers}.weight", f"style.{layers + 1}.weight")
        take(f"mapping.fc{layers}.bias", f"style.{layers + 1}.bias")
        layers += 1
    doublings = sum(1 for name in source if re.fullmatch(r"to_rgbs\.\d+\.conv\.weight", name))
    sizes = [4 * 2**i for i in range(doublings + 1)]
    state["synthesis.b4.const"] = take("synthesis.b4.const", "input.input")[0]
    channels = {}
    for i, size in enumerate(sizes):
        here = f"synthesis.b{size}"
        theirs = {"conv1": "conv1"} if i == 0 else {"conv0": f"convs.{2 * i - 2}", "conv1": f"convs.{2 * i - 1}"}
        for ours, name in theirs.items():
            layer, number = f"{here}.{ours}", 0 if i == 0 else 2 * i - (ours == "conv0")
            state[f"{layer}.weight"] = weight = take(f"{layer}.weight", f"{name}.conv.weight")[0]
            channels[size] = weight.shape[0]
            take(f"{layer}.bias", f"{name}.activate.bias")
            take(f"{layer}.noise_strength", f"{name}.noise.weight")
            state[f"{layer}.noise_strength"] = state[f"{layer}.noise_strength"].reshape(())
            if f"noises.noise_{number}" in source:
                state[f"{layer}.noise_const"] = take(f"{layer}.noise_const", f"noises.noise_{number}")[0, 0]
            else:
                state[f"{layer}.noise_const"] = torch.randn(size, size, generator=torch.Generator().manual_seed(number))
            take(f"{layer}.affine.weight", f"{name}.conv.modulation.weight")
            take(f"{layer}.affine.bias", f"{name}.conv.modulation.bias")
        colours, name = f"{here}.torgb", "to_rgb1" if i == 0 else f"to_rgbs.{i - 1}"
        state[f"{colours}.weight"] = take(f"{colours}.weight", f"{name}.conv.weight")[0]
        take(f"{colours}.bias", f"{name}.bias", -1)
        take(f"{colours}.affine.weight", f"{name}.conv.modulation.weight")
        take(f"{colours}.affine.bias", f"{name}.conv.modulation.bias")
    if not any(key.startswith(f"{prefix}noises.") for key in plan.used):
        plan.notes.append("The source stores no noise; the noise of its layers was drawn with the seeds 0, 1, ...")
    taps = taker.done()
    base, most = channels_of(channels)
    z_dim = state["mapping.fc0.weight"].shape[1]
    w_dim = state[f"mapping.fc{layers - 1}.weight"].shape[0]
    if isinstance(average, Tensor):
        state["mapping.w_avg"] = average.reshape(-1)
        plan.used["latent_avg"] = "generator.mapping.w_avg"
    else:
        weights = {key.removeprefix("mapping."): value for key, value in state.items() if key.startswith("mapping.")}
        state["mapping.w_avg"] = Made(lambda: average_style(weights, z_dim, w_dim, layers), (w_dim,), torch.float32)
        plan.notes.append(f"The source stores no average style; it was measured over {_AVERAGED} noises (seed 0).")
    config = {
        "sample_size": sizes[-1],
        "out_channels": 3,
        "z_dim": z_dim,
        "w_dim": w_dim,
        "channel_base": base,
        "channel_max": most,
        "num_mapping_layers": layers,
        "architecture": "skip",
        "resample_taps": taps,
    }
    return config, state


@torch.no_grad()
def average_style(weights: Mapping[str, Tensor], z_dim: int, w_dim: int, layers: int) -> Tensor:
    """The mean style of noises from a generator of its own, (w_dim,)."""
    network = MappingNetwork(z_dim, None, w_dim, layers, w_avg_beta=None)
    network.load_state_dict(dict(weights))
    z = torch.randn(_AVERAGED, z_dim, generator=torch.Generator().manual_seed(0))
    return network(z).mean(0)


def discriminator(source: dict[str, Tensor], prefix: str, plan: Plan) -> tuple[dict[str, Any], dict[str, Tensor | Made]]:
    """(configuration, weights) of our discriminator."""
    taker = _Taker(source, prefix, "discriminator", plan)
    take, state = taker.take, taker.state
    blocks = sum(1 for name in source if re.fullmatch(r"convs\.\d+\.conv1\.0\.weight", name))
    sizes = [4 * 2**i for i in range(blocks, 0, -1)]
    if not sizes:
        raise ValueError("d has no residual blocks; the checkpoint is of another version.")
    take(f"b{sizes[0]}.fromrgb.weight", "convs.0.0.weight")
    take(f"b{sizes[0]}.fromrgb.bias", "convs.0.1.bias")
    channels = {}
    for i, size in enumerate(sizes, start=1):
        channels[size] = take(f"b{size}.conv0.weight", f"convs.{i}.conv1.0.weight").shape[0]
        take(f"b{size}.conv0.bias", f"convs.{i}.conv1.1.bias")
        take(f"b{size}.conv1.weight", f"convs.{i}.conv2.1.weight")
        take(f"b{size}.conv1.bias", f"convs.{i}.conv2.2.bias")
        take(f"b{size}.skip.weight", f"convs.{i}.skip.1.weight")
    for ours, theirs in (("conv.weight", "final_conv.0.weight"), ("conv.bias", "final_conv.1.bias"), ("fc.weight", "final_linear.0.weight"),
                         ("fc.bias", "final_linear.0.bias"), ("out.weight", "final_linear.1.weight"), ("out.bias", "final_linear.1.bias")):
        take(f"b4.{ours}", theirs)  # fmt: skip
    channels[4] = state["b4.conv.weight"].shape[0]
    taps = taker.done()
    base, most = channels_of(channels)
    config = {
        "sample_size": sizes[0],
        "in_channels": state[f"b{sizes[0]}.fromrgb.weight"].shape[1],
        "channel_base": base,
        "channel_max": most,
        "architecture": "resnet",
        "resample_taps": taps,
    }
    return config, state
