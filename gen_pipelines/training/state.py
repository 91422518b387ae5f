"""Checkpoints that a kill cannot spoil and that resume bit for bit.

A checkpoint is a folder `step-00001000` of safetensors (networks, moving averages), optimiser states and random states (tensors and
plain values, read with `weights_only=True`) and `checkpoint.json`. It is written to a side folder and renamed when it is whole.
"""

from __future__ import annotations

import json
import os
import platform
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..hub.saving import readable_as_usual

_PREFIX = "step-"


def environment(ranks: int) -> dict[str, Any]:
    """What bit-for-bit equality depends on; stored in a checkpoint and compared when it is resumed."""
    import accelerate
    import diffusers
    import transformers

    versions = {module.__name__: module.__version__ for module in (torch, diffusers, transformers, accelerate)}
    versions["numpy"] = np.__version__
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {**versions, "ranks": ranks, "threads": torch.get_num_threads(), "machine": machine, "python": platform.python_version()}


def random_state() -> dict[str, Any]:
    """The global random states of this process and its device: dropout inside networks draws from them."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    words = torch.from_numpy(keys.astype(np.int64))
    state = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": (kind, words, position, has_gauss, cached)}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()  # of this rank's device
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """The inverse of `random_state`."""
    torch.set_rng_state(state["torch"])
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if (path / "checkpoint.json").is_file())


def save_checkpoint(
    folder: Path,
    step: int,
    networks: dict[str, Tensor],
    averages: dict[str, Tensor],
    optimizers: dict[str, Any],
    about: dict[str, Any],
    keep: int,
    rank_states: list[dict[str, Any]],
) -> Path:
    """Write one checkpoint and remove the oldest beyond `keep`. Called on the main process only.

    Args:
        folder: where checkpoints lie; made if need be.
        networks, averages: flat tables of tensors.
        optimizers: state dicts of optimisers and of the loss scaler, by name.
        about: plain values (recipe, environment, counters).
        rank_states: `random_state()` of every rank, in order.
    Returns: the checkpoint's folder.
    """
    final = folder / f"{_PREFIX}{step:08d}"
    side = folder / f".writing-{final.name}"
    shutil.rmtree(side, ignore_errors=True)
    side.mkdir(parents=True)
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in networks.items()}, side / "networks.safetensors")
    if averages:
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in averages.items()}, side / "averages.safetensors")
    torch.save({"optimizers": optimizers, "ranks": rank_states}, side / "state.pt")
    (side / "checkpoint.json").write_text(json.dumps({"step": step, **about}, indent=2) + "\n")
    readable_as_usual(side)
    for path in side.iterdir():  # on the disk before the name says that it is whole
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    if final.exists():
        shutil.rmtree(final)
    os.replace(side, final)
    for old in checkpoints(folder)[: -max(keep, 1)]:
        shutil.rmtree(old)
    return final


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """Read what `save_checkpoint` wrote: networks, averages, optimizers, rank states, about.

    Raises:
        ValueError: a file is missing or damaged; the message names it.
    """
    try:
        about = json.loads((path / "checkpoint.json").read_text())
        networks = load_file(path / "networks.safetensors")
        averages = load_file(path / "averages.safetensors") if (path / "averages.safetensors").is_file() else {}
        # on the CPU: every rank reads the file, and the device that wrote it may not exist here; loading a state moves it to its parameter
        rest = torch.load(path / "state.pt", weights_only=True, map_location="cpu")
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: damaged checkpoint ({reason}); remove the folder to resume from an older one.") from None
    return networks, averages, rest["optimizers"], rest["ranks"], about
