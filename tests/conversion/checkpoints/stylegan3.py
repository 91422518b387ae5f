"""A pickle with the layout of NVIDIA's StyleGAN3, of a network of ours."""

import pickle

from conversion import fakes
from conversion.checkpoints import stylegan2_ada

from gen_pipelines import StyleGAN3Generator

GENERATOR = {"sample_size": 16, "z_dim": 8, "w_dim": 12, "num_classes": None, "variant": "r", "channel_base": 128, "channel_max": 8,
             "num_layers": 4, "margin_size": 4, "conv_clamp": 256}  # fmt: skip
KWARGS = {
    "z_dim": 8, "c_dim": 0, "w_dim": 12, "img_resolution": 16, "img_channels": 3, "mapping_kwargs": {"num_layers": 2},
    "channel_base": 256, "channel_max": 16, "num_layers": 4, "margin_size": 4, "conv_kernel": 1, "use_radial_filters": True,
    "magnitude_ema_beta": 0.99,
}  # fmt: skip
OPTIONS = {}


def networks():
    model = stylegan2_ada.network(StyleGAN3Generator, GENERATOR)
    for name, tensor in model.state_dict().items():
        if name.endswith("magnitude_ema"):
            tensor.abs_().add_(0.5)
    return {"generator": model}


def write(folder, protocol=4, changes=()):
    model = networks()["generator"]
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with fakes.modules(**fakes.NVIDIA):
        g = fakes.module_record(state, "Generator", {**KWARGS, **dict(changes)}, {"mapping": {"w_avg_beta": 0.998}})
        path = folder / "network.pkl"
        path.write_bytes(pickle.dumps({"G": g, "D": None, "G_ema": g, "training_set_kwargs": {}, "augment_pipe": None}, protocol))
    return path
