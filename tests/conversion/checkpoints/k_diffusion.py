"""A training checkpoint with the layout of k-diffusion's image_v1, and its slim safetensors."""

import json

import torch
from conversion.foreign_unets import KImage, Weights
from safetensors.torch import save_file

SETTINGS = {"widths": (32, 64), "layers": (1, 2), "attention": (False, True)}
SIZE, OPTIONS = 8, {}
KERNEL = torch.outer(torch.tensor([1.0, 3, 3, 1]), torch.tensor([1.0, 3, 3, 1])) / 64


def foreign(seed=0, size=SIZE, **changes):
    """The network, its weights drawn: also those of levels that are skipped."""
    network = KImage(Weights(seed), **{**SETTINGS, **changes})
    skipped, network.skipped = network.skipped, 0
    if skipped:  # the levels that are left out were trained before, at other sizes
        network(torch.zeros(1, network.channels + network.given, 4 * size, 4 * size), torch.ones(1))
        for key in [key for key in network.w if key.startswith("proj_")]:
            del network.w[key]
    network.skipped = skipped
    network(torch.zeros(1, network.channels + network.given, size, size), torch.ones(1))
    return network


def configuration(network, size=SIZE, **changes):
    wrapped = network.vector >= 9
    model = {
        "type": "image_v1", "input_channels": network.channels, "input_size": [size, size], "patch_size": network.patch,
        "mapping_out": network.mapping, "depths": list(network.layers), "channels": list(network.widths),
        "self_attn_depths": list(network.attention), "has_variance": network.variance, "dropout_rate": 0.05, "augment_wrapper": wrapped,
        "mapping_cond_dim": network.vector - 9 * wrapped, "unet_cond_dim": network.given, "skip_stages": network.skipped,
        "sigma_data": 0.5, "sigma_min": 1e-2, "sigma_max": 80, **changes,
    }  # fmt: skip
    return {"model": model, "dataset": {"type": "mnist", "location": "data"}}


def state_of(network):
    """Its keys in the file: with the filters, and below what adds augmentations."""
    kernels = {}
    for i in range(network.skipped + 1, len(network.widths)):
        place = len(network.widths) - 1 - i
        last = max(int(key.split(".")[3]) for key in network.w if key.startswith(f"u_net.u_blocks.{place}."))
        kernels |= {f"u_net.d_blocks.{i}.0.kernel": KERNEL, f"u_net.u_blocks.{place}.{last + 1}.kernel": 4 * KERNEL}
    return {("inner_model." if network.vector >= 9 else "") + key: value for key, value in {**network.w, **kernels}.items()}


def write(folder, network=None, name="run_00000100.pth", said=None, slim=False):
    network = network or foreign()
    said, state = said or configuration(network), state_of(network)
    path = folder / name
    if slim:
        save_file({key: value.clone() for key, value in state.items()}, path, metadata={"config": json.dumps(said)})
        return path
    last = {key: value if key.endswith("kernel") else value + 1 for key, value in state.items()}
    content = {"config": said, "model": last, "model_ema": state, "step": 100, "epoch": 2, "gns_stats": None, "sched": {"last_epoch": 3},
               "opt": {"state": {0: {"exp_avg": torch.zeros(2)}}}, "demo_gen": torch.Generator().get_state()}  # fmt: skip
    torch.save(content, path)
    return path
