"""A pickle with the layout of EDM's, of an NCSN++ with classes whose forward pass is said again in `foreign_unets`."""

import math
import pickle
from collections import OrderedDict

import torch
from conversion import fakes
from conversion.foreign_unets import Song, Weights

CLASSES = 3
SETTINGS = {"base": 16, "widths": (16, 32), "layers": 1, "attention": (1,), "size": 8, "taps": (1, 3, 3, 1), "fourier": True,
            "input": "residual", "classes": CLASSES}  # fmt: skip
OPTIONS = {}
# attributes of the preconditionings, as their records hold them
ATTRIBUTES = {
    "EDMPrecond": {"sigma_min": 0, "sigma_max": math.inf, "sigma_data": 0.5},
    "VPPrecond": {"beta_d": 19.9, "beta_min": 0.1, "M": 1000, "epsilon_t": 1e-5},
    "VEPrecond": {"sigma_min": 0.02, "sigma_max": 100},
    "iDDPMPrecond": {"C_1": 0.001, "C_2": 0.008, "M": 1000},
}
FILTER = (1, 1, 4, 4)
EXTRA = {"map_augment.weight": (32, 9), "enc.4x4_down.conv0.resample_filter": FILTER, "enc.4x4_aux_residual.resample_filter": FILTER}


def foreign(seed=0, **changes):
    """The network, its weights drawn."""
    weights = Weights(seed)
    network = Song(weights, numbered=False, **{**SETTINGS, **changes})
    network(torch.zeros(1, 3, network.size, network.size), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    return network


def arguments(network):
    """What the constructor was given."""
    return {
        "img_resolution": network.size, "in_channels": 3, "out_channels": 3, "label_dim": network.classes, "augment_dim": 9,
        "model_channels": network.base, "channel_mult": [width // network.base for width in network.widths], "num_blocks": network.layers,
        "attn_resolutions": [network.size >> i for i in network.attention], "dropout": 0.1,
        "embedding_type": "fourier" if network.fourier else "positional", "channel_mult_noise": 2 if network.fourier else 1,
        "encoder_type": {"none": "standard", "residual": "residual", "input_skip": "skip"}[network.input],
        "decoder_type": {"none": "standard", "output_skip": "skip"}[network.output], "resample_filter": list(network.taps),
    }  # fmt: skip


def parameters(weights):
    return {key: torch.nn.Parameter(value, requires_grad=False) for key, value in weights.items() if key != "map_noise.freqs"}


def record(network, precond="EDMPrecond", class_name="SongUNet", given=None):
    """The network inside its preconditioning."""
    extra = {key: torch.ones(shape) for key, shape in EXTRA.items()}
    buffers = {key: value for key, value in network.w.items() if key == "map_noise.freqs"}
    state = {**parameters(network.w), **buffers, **{key: value for key, value in extra.items() if class_name == "SongUNet"}}
    inner = fakes.module_record(state, class_name, given or arguments(network))
    outer = {"_parameters": OrderedDict(), "_buffers": OrderedDict(), "_modules": OrderedDict(model=inner), "training": False,
             "_non_persistent_buffers_set": set(), "_init_args": (), "_init_kwargs": fakes.EasyDict(), **ATTRIBUTES[precond]}  # fmt: skip
    if precond == "iDDPMPrecond":
        outer["_buffers"]["u"] = torch.zeros(1001)
    return fakes.Persistent(precond, outer)


def write(folder, name="network.pkl", **changes):
    with fakes.modules(**fakes.NVIDIA):
        content = {"ema": record(foreign(), **changes), "loss_fn": fakes.Persistent("EDMLoss", {"P_mean": -1.2}), "augment_pipe": None,
                   "dataset_kwargs": fakes.EasyDict(path="somewhere")}  # fmt: skip
        path = folder / name
        path.write_bytes(pickle.dumps(content))
    return path
