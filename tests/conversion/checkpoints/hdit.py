"""A training checkpoint with the layout of k-diffusion's image_transformer_v2, and its slim safetensors."""

import json

import torch
from conversion.foreign_unets import HourglassTransformer, Weights
from safetensors.torch import save_file

SETTINGS = {"widths": (16, 32), "layers": (1, 2), "attention": (("neighborhood", 3, 16), ("global", None, 16))}
SIZE, OPTIONS = 8, {}
_SIZES = {"neighborhood": "kernel_size", "shifted-window": "window_size"}


def foreign(seed=0, size=SIZE, **changes):
    """The network, its weights drawn."""
    network = HourglassTransformer(Weights(seed), **{**SETTINGS, **changes})
    network(torch.zeros(1, network.channels, size, size), torch.ones(1))
    return network


def configuration(network, size=SIZE, dataset=None, **changes):
    attention = [{"type": kind, **({} if kind == "none" else {"d_head": head}), **({_SIZES[kind]: side} if kind in _SIZES else {})}
                 for kind, side, head in network.attention]  # fmt: skip
    model = {
        "type": "image_transformer_v2", "input_channels": network.channels, "input_size": [size, size], "patch_size": [network.patch] * 2,
        "depths": list(network.layers), "widths": list(network.widths), "d_ffs": [2 * width for width in network.widths],
        "self_attns": attention, "mapping_width": network.mapping, "mapping_depth": network.mapping_layers,
        "mapping_d_ff": 2 * network.mapping, "mapping_cond_dim": network.condition, "dropout_rate": [0.1] * len(network.widths),
        "loss_config": "karras", "loss_weighting": "soft-min-snr", "sigma_data": 0.5, "sigma_min": 1e-2, "sigma_max": 160, **changes,
    }  # fmt: skip
    return {"model": model, "dataset": {"type": "imagefolder", "num_classes": network.classes, **(dataset or {})}}


def write(folder, network=None, name="run_00000100.pth", said=None, slim=False):
    network = network or foreign()
    said, state = said or configuration(network), dict(network.w)
    path = folder / name
    if slim:
        save_file({key: value.clone() for key, value in state.items()}, path, metadata={"config": json.dumps(said)})
        return path
    content = {"config": said, "model": {key: value + 1 for key, value in state.items()}, "model_ema": state, "step": 100, "epoch": 2,
               "gns_stats": None, "sched": {"last_epoch": 3}, "opt": {"state": {0: {"exp_avg": torch.zeros(2)}}},
               "demo_gen": torch.Generator().get_state()}  # fmt: skip
    torch.save(content, path)
    return path
