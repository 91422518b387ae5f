"""A checkpoint with the layout of score_sde_pytorch's: numbered modules under DataParallel, and the moving average as a list."""

import math

import torch
from conversion.foreign_unets import Song, Weights

SETTINGS = {"base": 16, "widths": (16, 32), "layers": 1, "attention": (0,), "size": 16, "taps": (1, 3, 3, 1), "fourier": True,
            "input": "residual"}  # fmt: skip
OPTIONS = {"preset": "ve/cifar10_ncsnpp_continuous", "image_size": 16}
SIGMAS = torch.exp(torch.linspace(math.log(50), math.log(0.01), 1000))


def foreign(seed=0, **changes):
    network = Song(Weights(seed), numbered=True, **{**SETTINGS, **changes})
    network(torch.zeros(1, network.channels, network.size, network.size), torch.ones(1))
    return network


def write(folder, name="checkpoint_9.pth", average=True, wrapped="module.", **changes):
    network = foreign(**changes)
    model = {f"{wrapped}sigmas": SIGMAS, **{f"{wrapped}{key}": value + 1 for key, value in network.w.items()}}
    fourier = "all_modules.0.W"
    model |= {f"{wrapped}{fourier}": network.w[fourier]} if network.fourier else {}
    shadow = [value for key, value in network.w.items() if not (network.fourier and key == fourier)]
    moments = {number: {"step": 5, "exp_avg": torch.zeros(2)} for number in range(2)}
    content = {"optimizer": {"state": moments, "param_groups": [{"lr": 2e-4, "params": [0, 1]}]}, "model": model, "step": 7}
    if average:
        content["ema"] = {"decay": 0.999, "num_updates": 7, "shadow_params": shadow}
    path = folder / name
    torch.save(content, path)
    return path
