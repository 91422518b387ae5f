"""A pickle with the layout of StyleGAN's TensorFlow networks, of a network of ours: the map of the converter, written the other way round.

The factor of sqrt(2) is rounded twice on the way, so the weights come back within a few units in the last place and not to the bit.
"""

import math
import pickle

import numpy as np
from conversion import fakes
from conversion.checkpoints.stylegan2_ada import network
from conversion.checkpoints.stylegan2_tf import Network, tf, waved

from gen_pipelines import StyleGAN1Generator

GENERATOR = {"sample_size": 16, "z_dim": 8, "w_dim": 12, "channel_base": 64, "channel_max": 16, "num_mapping_layers": 2,
             "architecture": "orig", "w_avg_beta": 0.995}  # fmt: skip
OPTIONS = {}
TOLERANCE = 1e-6


def networks():
    return {"generator": network(StyleGAN1Generator, GENERATOR)}


def write(folder, protocol=4, lod=0.0, waves=False, **changes):
    g = networks()["generator"].state_dict()
    synthesis = {"lod": np.float32(lod), "4x4/Const/const": g["b4.const"][None].numpy()}
    for i, (size, k, name) in enumerate([(4, 0, "Const"), (4, 1, "Conv"), (8, 0, "Conv0_up"), (8, 1, "Conv1"), (16, 0, "Conv0_up"),
                                         (16, 1, "Conv1")]):  # fmt: skip
        ours, theirs = f"b{size}.epilogue{k}", f"{size}x{size}/{name}"
        if name != "Const":
            synthesis[f"{theirs}/weight"] = tf(g[f"b{size}.conv{k}.weight"] / math.sqrt(2))
        synthesis[f"{theirs}/bias"] = tf(g[f"{ours}.bias"])
        synthesis[f"{theirs}/Noise/weight"] = tf(g[f"{ours}.noise_strength"])
        synthesis[f"{theirs}/StyleMod/weight"] = tf(g[f"{ours}.affine.weight"])
        synthesis[f"{theirs}/StyleMod/bias"] = tf(g[f"{ours}.affine.bias"])
        synthesis[f"noise{i}"] = g[f"{ours}.noise_const"][None, None].numpy()
    for lod_, channels in enumerate((8, 16, 16)):
        synthesis[f"ToRGB_lod{lod_}/weight"] = tf(g["torgb16.weight"].repeat(1, channels // 8, 1, 1))
        synthesis[f"ToRGB_lod{lod_}/bias"] = tf(g["torgb16.bias"])
    mapping = {f"Dense{i}/weight": tf(g[f"mapping.fc{i}.weight"]) for i in range(2)}
    mapping |= {f"Dense{i}/bias": tf(g[f"mapping.fc{i}.bias"] * math.sqrt(2)) for i in range(2)}
    own = {"lod": np.float32(lod), "dlatent_avg": tf(g["mapping.w_avg"])}
    if waves:
        waved({"": own, "synthesis/": synthesis, "mapping/": mapping})
    with fakes.modules(dnnlib__tflib__network={"Network": Network}, **fakes.NVIDIA):
        parts = {"synthesis": Network("G_synthesis", synthesis, resolution=16), "mapping": Network("G_mapping", mapping)}
        gs = Network("Gs", own, parts, resolution=16, label_size=0, blur_filter=[1, 2, 1], **changes)
        path = folder / "network.pkl"
        path.write_bytes(pickle.dumps((gs, Network("D", {"lod": 0.0, "4x4/Dense0/weight": np.ones((2, 2), np.float32)}), gs), protocol))
    return path
