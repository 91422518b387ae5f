"""A file with the layout of rosinality's StyleGAN2 checkpoints, of networks of ours: the converter's map the other way round."""

import argparse

import torch
from conversion.checkpoints.stylegan2_ada import network

from gen_pipelines import StyleGAN2Discriminator, StyleGAN2Generator
from gen_pipelines.models.layers.upfirdn import fir_filter

GENERATOR = {"sample_size": 16, "z_dim": 12, "w_dim": 12, "channel_base": 128, "channel_max": 16, "num_mapping_layers": 2}
DISCRIMINATOR = {"sample_size": 16, "channel_base": 64, "channel_max": 8}
OPTIONS = {"discriminator": True}


def networks():
    discriminator = network(StyleGAN2Discriminator, DISCRIMINATOR, 1)
    return {"generator": network(StyleGAN2Generator, GENERATOR), "discriminator": discriminator}


def generator_state(g, noises=True):
    state = {f"style.{i + 1}.{leaf}": g[f"mapping.fc{i}.{leaf}"] for i in range(2) for leaf in ("weight", "bias")}
    state["input.input"] = g["synthesis.b4.const"][None]
    layers = {"conv1": "b4.conv1", "convs.0": "b8.conv0", "convs.1": "b8.conv1", "convs.2": "b16.conv0", "convs.3": "b16.conv1"}
    for i, (name, layer) in enumerate(layers.items()):
        ours = f"synthesis.{layer}"
        state[f"{name}.conv.weight"] = g[f"{ours}.weight"][None]
        state[f"{name}.conv.modulation.weight"] = g[f"{ours}.affine.weight"]
        state[f"{name}.conv.modulation.bias"] = g[f"{ours}.affine.bias"]
        state[f"{name}.noise.weight"] = g[f"{ours}.noise_strength"].reshape(1)
        state[f"{name}.activate.bias"] = g[f"{ours}.bias"]
        if layer.endswith("conv0"):
            state[f"{name}.conv.blur.kernel"] = 4 * fir_filter()
        if noises:
            state[f"noises.noise_{i}"] = g[f"{ours}.noise_const"][None, None]
    for name, size in {"to_rgb1": 4, "to_rgbs.0": 8, "to_rgbs.1": 16}.items():
        ours = f"synthesis.b{size}.torgb"
        state[f"{name}.conv.weight"] = g[f"{ours}.weight"][None]
        state[f"{name}.conv.modulation.weight"] = g[f"{ours}.affine.weight"]
        state[f"{name}.conv.modulation.bias"] = g[f"{ours}.affine.bias"]
        state[f"{name}.bias"] = g[f"{ours}.bias"].view(1, 3, 1, 1)
        if size > 4:
            state[f"{name}.upsample.kernel"] = 4 * fir_filter()
    return state


def discriminator_state(d):
    state = {}
    for ours, theirs in {"b16.fromrgb": "convs.0.{}", "b16.conv0": "convs.1.conv1.{}", "b8.conv0": "convs.2.conv1.{}"}.items():
        state |= {theirs.format("0.weight"): d[f"{ours}.weight"], theirs.format("1.bias"): d[f"{ours}.bias"]}
    for i, size in ((1, 16), (2, 8)):
        state |= {f"convs.{i}.conv2.0.kernel": fir_filter(), f"convs.{i}.conv2.1.weight": d[f"b{size}.conv1.weight"],
                  f"convs.{i}.conv2.2.bias": d[f"b{size}.conv1.bias"], f"convs.{i}.skip.0.kernel": fir_filter(),
                  f"convs.{i}.skip.1.weight": d[f"b{size}.skip.weight"]}  # fmt: skip
    state |= {"final_conv.0.weight": d["b4.conv.weight"], "final_conv.1.bias": d["b4.conv.bias"]}
    for i, ours in enumerate(("fc", "out")):
        state |= {f"final_linear.{i}.{leaf}": d[f"b4.{ours}.{leaf}"] for leaf in ("weight", "bias")}
    return state


def write(folder, average=True, noises=True):
    made = networks()
    g, d = made["generator"].state_dict(), made["discriminator"].state_dict()
    content = {"g_ema": generator_state(g, noises), "g": generator_state(g, noises), "d": discriminator_state(d)}
    content |= {"latent_avg": g["mapping.w_avg"][None]} if average else {}
    content |= {"args": argparse.Namespace(size=16), "ada_aug_p": 0.1, "g_optim": {"state": {0: {"exp_avg": torch.ones(2)}}}}
    path = folder / "000100.pt"
    torch.save(content, path)
    return path
