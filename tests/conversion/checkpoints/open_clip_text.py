"""Weights with the layout of open_clip's, and what their text tower computes, written down from CLIP's description."""

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

OPTIONS = {"quick_gelu": False}
WIDTH, LAYERS, LENGTH, WORDS, EMBED = 64, 2, 8, 30, 12


def state(seed=0):
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.2)
    found = {
        "token_embedding.weight": rand(WORDS, WIDTH),
        "positional_embedding": rand(LENGTH, WIDTH),
        "text_projection": rand(WIDTH, EMBED),
        "ln_final.weight": 1 + rand(WIDTH),
        "ln_final.bias": rand(WIDTH),
        "logit_scale": torch.tensor(4.6),
        "visual.conv1.weight": rand(4, 3, 2, 2),
    }
    for layer in range(LAYERS):
        name = f"transformer.resblocks.{layer}."
        for part, shape in (("attn.in_proj_", (3 * WIDTH, WIDTH)), ("attn.out_proj.", (WIDTH, WIDTH)), ("mlp.c_fc.", (4 * WIDTH, WIDTH)),
                            ("mlp.c_proj.", (WIDTH, 4 * WIDTH))):  # fmt: skip
            found[f"{name}{part}weight"], found[f"{name}{part}bias"] = rand(*shape), rand(shape[0])
        for part in ("ln_1", "ln_2"):
            found[f"{name}{part}.weight"], found[f"{name}{part}.bias"] = 1 + rand(WIDTH), rand(WIDTH)
    return found


def encode(s, ids, quick_gelu, heads=1):
    """The last layer after its norm, (B, L, width), and the captions' vectors, (B, embed)."""
    norm = lambda name, x: F.layer_norm(x, (WIDTH,), s[f"{name}.weight"], s[f"{name}.bias"])
    linear = lambda name, x: F.linear(x, s[f"{name}weight"], s[f"{name}bias"])
    x = s["token_embedding.weight"][ids] + s["positional_embedding"][: ids.shape[1]]
    ahead = torch.ones(ids.shape[1], ids.shape[1]).triu(1).bool()
    for layer in range(LAYERS):
        name = f"transformer.resblocks.{layer}."
        q, k, v = (
            part.unflatten(2, (heads, -1)).transpose(1, 2) for part in linear(f"{name}attn.in_proj_", norm(f"{name}ln_1", x)).chunk(3, 2)
        )
        share = torch.softmax((q @ k.mT * q.shape[3] ** -0.5).masked_fill(ahead, -torch.inf), 3)
        x = x + linear(f"{name}attn.out_proj.", (share @ v).transpose(1, 2).flatten(2))
        h = linear(f"{name}mlp.c_fc.", norm(f"{name}ln_2", x))
        x = x + linear(f"{name}mlp.c_proj.", h * torch.sigmoid(1.702 * h) if quick_gelu else F.gelu(h))
    x = norm("ln_final", x)
    return x, x[torch.arange(len(ids)), ids.argmax(1)] @ s["text_projection"]


def write(folder):
    save_file(state(), folder / "open_clip_model.safetensors")
    return folder / "open_clip_model.safetensors"
