"""A pickle with the layout of EDM2's, of latents, with the record of an encoder and no autoencoder."""

import pickle

import numpy as np
import torch
from conversion import fakes
from conversion.foreign_unets import Magnitude, Weights

CLASSES = 3
SETTINGS = {"base": 16, "mults": (1, 2), "layers": 1, "attention": (1,), "size": 8, "head": 16, "classes": CLASSES}
OPTIONS = {"vae": "none"}
BUFFERS = ("freqs", "phases")
MEAN, STD = np.float32([5.81, 3.25, 0.12, -2.15]), np.float32([4.17, 4.62, 3.71, 3.28])


def foreign(seed=0, **changes):
    weights = Weights(seed)
    network = Magnitude(weights, **{**SETTINGS, **changes})
    t = torch.zeros(1)
    network(torch.zeros(1, network.channels, network.size, network.size), t, torch.zeros(1, dtype=torch.long))
    network.uncertainty(t)
    return network


def arguments(network):
    return {
        "img_resolution": network.size, "img_channels": network.channels, "label_dim": network.classes, "use_fp16": True, "sigma_data": 0.5,
        "model_channels": network.base, "channel_mult": list(network.mults), "num_blocks": network.layers,
        "attn_resolutions": [network.size >> i for i in network.attention], "channels_per_head": network.head, "dropout": 0.0,
    }  # fmt: skip


def write(folder, name="network.pkl", encoder="StabilityVAEEncoder", dtype=torch.float32, **changes):
    network = foreign(**changes)
    state = {key: value.to(dtype) if key.endswith(BUFFERS) else torch.nn.Parameter(value.to(dtype), requires_grad=False)
             for key, value in network.w.items()}  # fmt: skip
    scale = np.float32(0.5) / STD
    said = {"vae_name": "stabilityai/sd-vae-ft-mse", "scale": scale, "bias": -MEAN * scale, "batch_size": 8, "_vae": None}
    with fakes.modules(**fakes.NVIDIA):
        content = {
            "ema": fakes.module_record(state, "Precond", arguments(network)),
            "encoder": fakes.Persistent(encoder, {"_init_args": (), "_init_kwargs": {}, **(said if "VAE" in encoder else {})}),
            "dataset_kwargs": fakes.EasyDict(path="somewhere"),
            "loss_fn": fakes.Persistent("EDM2Loss", {"P_mean": -0.4}),
        }
        path = folder / name
        path.write_bytes(pickle.dumps(content))
    return path
