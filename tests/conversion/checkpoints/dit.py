"""A small DiT as its training writes it: weights, their average, the optimiser's state, and the arguments."""

import argparse
import math
from pathlib import Path

import torch

OPTIONS = {"num_heads": 4, "vae": "none"}


def random_state(width=32, depth=2, patch=2, channels=4, out_channels=8, side=8, classes=11, seed=0):
    """A state dict of the layout with random weights; the positions are not those of the formula, so that they count."""
    generator = torch.Generator().manual_seed(seed)
    state = {"pos_embed": torch.randn(1, (side // patch) ** 2, width, generator=generator)}

    def layer(name, *shape):
        state[f"{name}.weight"] = torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))
        state[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=generator)

    layer("x_embedder.proj", width, channels, patch, patch)
    layer("t_embedder.mlp.0", width, 256)
    layer("t_embedder.mlp.2", width, width)
    state["y_embedder.embedding_table.weight"] = torch.randn(classes, width, generator=generator)
    for i in range(depth):
        layer(f"blocks.{i}.attn.qkv", 3 * width, width)
        layer(f"blocks.{i}.attn.proj", width, width)
        layer(f"blocks.{i}.mlp.fc1", 4 * width, width)
        layer(f"blocks.{i}.mlp.fc2", width, 4 * width)
        layer(f"blocks.{i}.adaLN_modulation.1", 6 * width, width)
    layer("final_layer.linear", patch * patch * out_channels, width)
    layer("final_layer.adaLN_modulation.1", 2 * width, width)
    return state


def container(model="DiT-S/2", **arguments):
    ema = random_state(seed=0)
    opt = {"state": {0: {"exp_avg": torch.zeros(3), "step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-4}]}
    return {"model": random_state(seed=1), "ema": ema, "opt": opt, "args": argparse.Namespace(model=model, **arguments)}


def write(folder: Path) -> Path:
    torch.save(container(), folder / "0050000.pt")
    return folder / "0050000.pt"
