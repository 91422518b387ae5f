"""The records of NVIDIA's TensorFlow networks (StyleGAN 1 and 2): variables by name, and what both formats share.

A pickle holds (G, D, Gs): `dnnlib.tflib.network.Network` records, with their variables as arrays, the networks inside them, and the source
code that their own loader runs, which is not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .base import Plan
from .pickles import Record
from .reader import Checkpoint

LICENCES = "NVIDIA: non-commercial use only (StyleGAN: CC BY-NC 4.0; StyleGAN2: NVIDIA Source Code License-NC)"
OPTIONS = {"network": "Gs (default, the moving average) or G: which generator to take"}
NAMES = ("G", "D", "Gs")


def networks(checkpoint: Checkpoint) -> dict[str, Record]:
    """The networks of a pickle (G, D, Gs), or of one with a single network."""
    tree = checkpoint.tree
    rows = tree if isinstance(tree, (tuple, list)) else (tree,)
    found = [value for value in rows if isinstance(value, Record) and value.module == "dnnlib.tflib.network"]
    if len(found) != len(rows) or not all(isinstance(value.state, dict) for value in found):
        return {}
    return dict(zip(NAMES, found, strict=False)) if len(found) == 3 else ({"Gs": found[0]} if len(found) == 1 else {})


class Variables:
    """The variables of a network and of those inside it, "mapping/Dense0/weight", and which of them were taken."""

    def __init__(self, record: Record, path: str) -> None:
        self.values: dict[str, Tensor] = {}
        self.keys: dict[str, str] = {}
        self.left: set[str] = set()
        self._collect(record, path, "", 0)

    def _collect(self, record: Record, path: str, prefix: str, depth: int) -> None:
        for i, entry in enumerate(record.get("variables") or ()):
            if not isinstance(entry, (tuple, list)) or len(entry) != 2 or not isinstance(entry[0], str):
                raise ValueError("a variable of the network is no pair of a name and a value; the file is damaged.")
            name, value = entry
            if isinstance(value, Tensor):
                self.keys[prefix + name] = f"{path}variables.{i}.1"
            elif isinstance(value, (int, float)):
                value = torch.tensor(float(value))  # an array without axes was pickled as a number
            else:
                raise ValueError(f"the variable {name[:80]} holds no numbers; the file is damaged.")
            self.values[prefix + name] = value
            self.left.add(prefix + name)
        inner = record.get("components") or {}
        for name, part in inner.items() if isinstance(inner, dict) and depth < 3 else ():
            if isinstance(part, Record):
                self._collect(part, f"{path}components.{name}.", f"{prefix}{name}/", depth + 1)

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def take(self, name: str, target: str, plan: Plan) -> Tensor:
        """The value, recorded in the plan as going to `target` ("component.key")."""
        if name not in self.values:
            raise ValueError(f"the network has no variable {name}; it is of another version.")
        self.left.discard(name)
        if name in self.keys:
            plan.used[self.keys[name]] = target
        return self.values[name]

    def drop(self, name: str, why: str, plan: Plan) -> None:
        self.left.discard(name)
        if name in self.keys:
            plan.dropped[self.keys[name]] = why

    def done(self) -> None:
        if self.left:
            raise ValueError(f"the network has variables that are not known: {', '.join(sorted(self.left)[:8])}; it is of another version.")


def kernel(weight: Tensor) -> Tensor:
    """TensorFlow's (k, k, in, out) as (out, in, k, k), a view."""
    if weight.ndim != 4:
        raise ValueError(f"a convolution's weight has shape {tuple(weight.shape)}; four axes are expected.")
    return weight.permute(3, 2, 0, 1)


def only(given: Mapping[str, Any], name: str, *allowed: Any) -> None:
    """A setting that our network has no other value for; the first is the default."""
    value = given.get(name)
    if value is not None and value not in allowed:
        raise ValueError(f"{name} = {value!r} is not covered; only {' or '.join(map(repr, allowed))} is.")


def channels_of(channels: Mapping[int, int]) -> tuple[int, int]:
    """(channel_base, channel_max) with channels = min(channel_base // size, channel_max) at every size.

    Raises:
        ValueError: there are none.
    """
    most = max(channels.values())
    below = [size * count for size, count in channels.items() if count < most]
    base = below[0] if below else most * max(channels)
    if wrong := [size for size, count in channels.items() if min(base // size, most) != count]:
        raise ValueError(
            f"{channels[wrong[0]]} channels at size {wrong[0]} do not follow channel_base / size up to channel_max; not covered."
        )
    return base, most


def others(plan: Plan, checkpoint: Checkpoint, taken: set[str]) -> None:
    """The networks that are not needed, by name."""
    reasons = {"G": "the moving average Gs is taken", "Gs": "G is asked for", "D": "for training only"}
    found = networks(checkpoint)
    for i, name in enumerate(found):
        if name not in taken:
            plan.dropped[f"{i}.*"] = reasons[name]


def choose(checkpoint: Checkpoint, options: Mapping[str, Any]) -> tuple[str, Record, str]:
    """(name, record, prefix of its keys) of the generator that is asked for."""
    found = networks(checkpoint)
    name = options.get("network", "Gs")
    if name not in ("G", "Gs") or name not in found:
        raise ValueError(f"option network = {name!r}: there are {', '.join(n for n in found if n != 'D')}.")
    prefix = f"{list(found).index(name)}." if isinstance(checkpoint.tree, (tuple, list)) else ""
    return name, found[name], prefix


def sizes_in(variables: Variables, leaf: str) -> list[int]:
    """The resolutions that the synthesis network has a layer `leaf` at, 8 and up, with 4 before them.

    Raises:
        ValueError: they are not 4, 8, 16, ... without a gap.
    """
    found = sorted(int(n.split("/")[1].partition("x")[0]) for n in variables.values if n.startswith("synthesis/") and n.endswith(leaf))
    sizes = [4, *found]
    if sizes != [4 * 2**i for i in range(len(sizes))] or len(sizes) < 2:
        raise ValueError(f"the synthesis network has layers at the sizes {sizes}; 4, 8, 16, ... are expected.")
    return sizes
