"""A classifier of guided diffusion with attention pooling."""

from pathlib import Path

import torch
from openai_layout import random_state

OPTIONS = {"num_head_channels": 32}


def classifier_state(pooling="attention", classes=5, **layout):
    """The way down of a random U-Net, and a random pooling."""
    layout = {"widths": (32, 64), "attention": (False, True), "resample": "residual", "layers": 2, **layout}
    state = {key: value for key, value in random_state(**layout).items() if not key.startswith(("out", "label"))}
    generator = torch.Generator().manual_seed(8)
    random = lambda *shape: torch.randn(shape, generator=generator) / (shape[-1] ** 0.5 if len(shape) > 1 else 1)
    width = layout["widths"][-1]
    seen = [layout["widths"][0]] + [w for w in layout["widths"] for _ in range(layout["layers"] + 1)]  # no change of size after the last
    if pooling in ("attention", "mean"):
        state |= {"out.0.weight": random(width), "out.0.bias": random(width)}
    if pooling == "attention":
        state |= {"out.2.positional_embedding": random(width, 17), "out.2.qkv_proj.weight": random(3 * width, width)[..., None],
                  "out.2.qkv_proj.bias": random(3 * width), "out.2.c_proj.weight": random(classes, width)[..., None],
                  "out.2.c_proj.bias": random(classes)}  # fmt: skip
    elif pooling == "mean":
        state |= {"out.3.weight": random(classes, width)[..., None, None], "out.3.bias": random(classes)}
    else:
        state |= {"out.0.weight": random(2048, sum(seen)), "out.0.bias": random(2048)}
        if pooling == "normed_levels":
            state |= {"out.1.weight": random(2048), "out.1.bias": random(2048)}
        last = "out.3" if pooling == "normed_levels" else "out.2"
        state |= {f"{last}.weight": random(classes, 2048), f"{last}.bias": random(classes)}
    return state


def write(folder: Path) -> Path:
    torch.save(classifier_state(), folder / "64x64_classifier.pt")
    return folder / "64x64_classifier.pt"
