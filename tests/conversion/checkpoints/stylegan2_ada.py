"""A pickle with the layout of NVIDIA's StyleGAN2-ADA, of a network of ours."""

import pickle

import torch
from conversion import fakes

from gen_pipelines import StyleGAN2Discriminator, StyleGAN2Generator
from gen_pipelines.models.layers.upfirdn import fir_filter

GENERATOR = {"sample_size": 16, "z_dim": 8, "w_dim": 12, "num_classes": 3, "channel_base": 128, "channel_max": 16, "num_mapping_layers": 2,
             "conv_clamp": 2.0, "w_avg_beta": 0.995}  # fmt: skip
DISCRIMINATOR = {"sample_size": 16, "num_classes": 3, "channel_base": 64, "channel_max": 8, "num_mapping_layers": 1, "mbstd_group_size": 2,
                 "cmap_dim": 6, "conv_clamp": 2.0}  # fmt: skip
KWARGS = {
    "z_dim": 8, "c_dim": 3, "w_dim": 12, "img_resolution": 16, "img_channels": 3, "mapping_kwargs": {"num_layers": 2},
    "synthesis_kwargs": {"channel_base": 128, "channel_max": 16, "num_fp16_res": 2, "conv_clamp": 2.0},
}  # fmt: skip
D_KWARGS = {
    "c_dim": 3, "img_resolution": 16, "img_channels": 3, "channel_base": 64, "channel_max": 8, "num_fp16_res": 2, "conv_clamp": 2.0,
    "cmap_dim": 6, "block_kwargs": {"freeze_layers": 0}, "mapping_kwargs": {"num_layers": 1}, "epilogue_kwargs": {"mbstd_group_size": 2},
}  # fmt: skip
OPTIONS = {"discriminator": True}


def network(cls, config, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(**config).eval().requires_grad_(False)
        for tensor in model.state_dict().values():
            tensor.add_(torch.randn_like(tensor), alpha=0.2)
    return model


def with_filters(model):
    """The state dict with the filters that the foreign network stores, parameters as parameters."""
    state = dict(model.named_parameters()) | {k: v for k, v in model.state_dict().items() if k not in dict(model.named_parameters())}
    for name in list(state):
        layer, _, leaf = name.rpartition(".")
        if leaf == "noise_const" or (leaf == "weight" and layer.rpartition(".")[2] in ("conv0", "conv1", "skip")):
            state[f"{layer}.resample_filter"] = fir_filter()
        if layer.startswith("synthesis.b") and layer.count(".") == 2:
            state[f"{layer.rpartition('.')[0]}.resample_filter"] = fir_filter()
    return state


def networks():
    return {"generator": network(StyleGAN2Generator, GENERATOR), "discriminator": network(StyleGAN2Discriminator, DISCRIMINATOR, 1)}


def write(folder, protocol=4, changes=()):
    """`changes` are merged into the arguments that the generator is said to be built with."""
    made = networks()
    clamp = {"conv_clamp": 2.0}
    attributes = {"mapping": {"w_avg_beta": 0.995}, "synthesis.b4.conv1": clamp}
    with fakes.modules(**fakes.NVIDIA):
        g = fakes.module_record(with_filters(made["generator"]), "Generator", {**KWARGS, **dict(changes)}, attributes)
        d = fakes.module_record(with_filters(made["discriminator"]), "Discriminator", D_KWARGS, {"b4.conv": clamp})
        content = {"G": g, "D": d, "G_ema": g, "augment_pipe": None, "training_set_kwargs": fakes.EasyDict(class_name="x")}
        path = folder / "network.pkl"
        path.write_bytes(pickle.dumps(content, protocol))
    return path
