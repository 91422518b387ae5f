"""A pickle with the layout of StyleGAN2's TensorFlow networks, of networks of ours: the converter's map the other way round."""

import pickle

from conversion import fakes
from conversion.checkpoints.stylegan2_ada import network

from gen_pipelines import StyleGAN2Discriminator, StyleGAN2Generator

GENERATOR = {"sample_size": 16, "z_dim": 8, "w_dim": 12, "channel_base": 128, "channel_max": 16, "num_mapping_layers": 2,
             "w_avg_beta": 0.995}  # fmt: skip
DISCRIMINATOR = {"sample_size": 16, "channel_base": 64, "channel_max": 8, "mbstd_group_size": 4, "num_mapping_layers": 0}
OPTIONS = {"discriminator": True}


class Network:
    """What the foreign class pickles: its state, with source code in it that must never run."""

    def __init__(self, name, variables, components=None, **static_kwargs):
        self.__dict__ = {
            "version": 4, "name": name, "static_kwargs": static_kwargs, "components": components or {}, "build_module_src": fakes.HOSTILE,
            "build_func_name": "f", "variables": [(key, value) for key, value in variables.items()],
        }  # fmt: skip


def tf(tensor):
    """As TensorFlow has it: kernels (k, k, in, out), matrices (in, out), numbers without axes as numpy's numbers."""
    array = tensor.detach()
    array = array.permute(2, 3, 1, 0) if array.ndim == 4 else array.T if array.ndim == 2 else array
    return array.contiguous().numpy() if array.ndim else array.numpy()[()]


def waved(parts):
    """Other numbers in place: waves by the order of the names, those of the mapping's layers larger, as its small learning rate asks."""
    names = sorted(prefix + name for prefix, table in parts.items() for name in table if name != "lod")
    for prefix, table in parts.items():
        for name in table:
            if name != "lod":
                value = fakes.wave(table[name].shape, names.index(prefix + name))
                table[name] = (value * (100 if f"{prefix}{name}".startswith("mapping/Dense") else 1)).numpy()[()]


def networks(classes=None):
    changes = {} if classes is None else {"num_classes": classes, "cmap_dim": 6, "num_mapping_layers": 1}
    discriminator = network(StyleGAN2Discriminator, {**DISCRIMINATOR, **changes}, 1)
    return {"generator": network(StyleGAN2Generator, {**GENERATOR, "num_classes": classes}), "discriminator": discriminator}


def modulated(state, layer, name):
    yield f"{name}/weight", tf(state[f"{layer}.weight"].flip((2, 3)) if layer.endswith("conv0") else state[f"{layer}.weight"])
    yield f"{name}/bias", tf(state[f"{layer}.bias"])
    yield f"{name}/mod_weight", tf(state[f"{layer}.affine.weight"])
    yield f"{name}/mod_bias", tf(state[f"{layer}.affine.bias"] - 1)
    if f"{layer}.noise_strength" in state:
        yield f"{name}/noise_strength", tf(state[f"{layer}.noise_strength"])


def write(folder, protocol=4, waves=False, classes=None, **changes):
    """With `classes`, as StyleGAN2-ADA for TensorFlow writes it."""
    made = networks(classes)
    g, d = made["generator"].state_dict(), made["discriminator"].state_dict()
    synthesis = {"lod": tf(g["mapping.w_avg"][0] * 0), "4x4/Const/const": g["synthesis.b4.const"][None].numpy()}
    layers = [(4, "conv1", "Conv"), *((size, *names) for size in (8, 16) for names in (("conv0", "Conv0_up"), ("conv1", "Conv1")))]
    for i, (size, layer, name) in enumerate(layers):
        synthesis |= dict(modulated(g, f"synthesis.b{size}.{layer}", f"{size}x{size}/{name}"))
        synthesis[f"noise{i}"] = g[f"synthesis.b{size}.{layer}.noise_const"][None, None].numpy()
    for size in (4, 8, 16):
        synthesis |= dict(modulated(g, f"synthesis.b{size}.torgb", f"{size}x{size}/ToRGB"))
    mapping = {f"Dense{i}/{leaf}": tf(g[f"mapping.fc{i}.{leaf}"]) for i in range(2) for leaf in ("weight", "bias")}
    if classes is not None:
        mapping |= {f"LabelEmbed/{leaf}": tf(g[f"mapping.embed.{leaf}"]) for leaf in ("weight", "bias")}
    critic = {"lod": 0.0}
    places = {"b16.fromrgb": "16x16/FromRGB", "b4.conv": "4x4/Conv", "b4.fc": "4x4/Dense0", "b4.out": "Output",
              "mapping.embed": "LabelEmbed", "mapping.fc0": "Mapping0"}  # fmt: skip
    for size in (16, 8):
        places |= {f"b{size}.{k}": f"{size}x{size}/{v}" for k, v in (("conv0", "Conv0"), ("conv1", "Conv1_down"), ("skip", "Skip"))}
    for ours, theirs in places.items():
        critic |= {f"{theirs}/{leaf}": tf(d[f"{ours}.{leaf}"]) for leaf in ("weight", "bias") if f"{ours}.{leaf}" in d}
    own = {"lod": 0.0, "dlatent_avg": tf(g["mapping.w_avg"])}
    if waves:
        waved({"": own, "synthesis/": synthesis, "mapping/": mapping})
    with fakes.modules(dnnlib__tflib__network={"Network": Network}, **fakes.NVIDIA):
        parts = {"synthesis": Network("G_synthesis", synthesis, resolution=16), "mapping": Network("G_mapping", mapping)}
        gs = Network("Gs", own, parts, resolution=16, num_channels=3, label_size=0, fmap_base=64, truncation_psi=0.5, **changes)
        path = folder / "network.pkl"
        path.write_bytes(pickle.dumps((gs, Network("D", critic, resolution=16, architecture="resnet", label_size=0), gs), protocol))
    return path
