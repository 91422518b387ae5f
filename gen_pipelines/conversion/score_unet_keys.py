"""The key layout of score_sde_pytorch: its modules lie in one numbered list, in the order in which the network runs them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["PREFIX", "Part", "config_from", "converted", "key_map", "layout", "parts_of", "rename"]

PREFIX = "all_modules."


@dataclass(frozen=True)
class Part:
    """One module of the list.

    `kind`: fourier, linear, conv, norm, block, attention, or wrapped (a convolution inside a module that resamples or combines).
    """

    kind: str
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def channels(self) -> tuple[int, int]:
        """(in, out) of a block or a convolution."""
        shape = next(shape for name, shape in self.shapes.items() if name.endswith("weight") and len(shape) == 4)
        return shape[1], shape[0]

    @property
    def kernel(self) -> int:
        """Of a convolution."""
        return next(shape for name, shape in self.shapes.items() if name.endswith("weight") and len(shape) == 4)[-1]

    @property
    def resamples(self) -> bool:
        """Whether a block of BigGAN's kind changes the size: only then has it a shortcut between equal channels."""
        return self.kind == "block" and "Conv_2.weight" in self.shapes and self.channels[0] == self.channels[1]


def _kind(shapes: Mapping[str, tuple[int, ...]]) -> str:
    if "W" in shapes:
        return "fourier"
    if "Dense_0.weight" in shapes and "Conv_0.weight" in shapes:
        return "block"
    if "NIN_3.W" in shapes:
        return "attention"
    if set(shapes) == {"weight", "bias"}:
        kind = {1: "norm", 2: "linear", 4: "conv"}.get(len(shapes["weight"]))
        if kind is not None:
            return kind
    if set(shapes) in ({"Conv_0.weight", "Conv_0.bias"}, {"Conv2d_0.weight", "Conv2d_0.bias"}):
        return "wrapped"
    raise ValueError(f"no module of NCSN++, DDPM++ or DDPM has {', '.join(sorted(shapes))}.")


def parts_of(state: Mapping[str, Tensor]) -> list[Part]:
    """The modules of a state dict with keys `all_modules.K.…`, in order.

    Raises:
        ValueError: there are none, numbers are missing, or one is not known.
    """
    found: dict[int, dict[str, tuple[int, ...]]] = {}
    for key, value in state.items():
        if not key.startswith(PREFIX):
            continue
        number, _, name = key[len(PREFIX) :].partition(".")
        if not number.isdecimal() or not name:
            raise ValueError(f"the key {key!r} is not of the form all_modules.<number>.<name>.")
        found.setdefault(int(number), {})[name] = tuple(value.shape)
    if not found or sorted(found) != list(range(len(found))):
        gap = next((i for i in range(len(found) + 1) if i not in found), 0)
        raise ValueError(f"the list of modules is not whole: all_modules.{gap} is missing.")
    parts = []
    for number in range(len(found)):
        try:
            parts.append(Part(_kind(found[number]), found[number]))
        except ValueError as error:
            raise ValueError(f"all_modules.{number}: {error}") from None
    return parts


def config_from(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the shapes say of a `ScoreUNetModel`: everything but the size of the pictures, what the time is, and what has no weights.

    Args:
        state: keys `all_modules.K.…`.
    Returns: arguments of the class; `attention_levels` instead of `attention_resolutions`, and `filtered` (True, False, or None where the
        shapes do not say) instead of `resample_taps`.
    Raises:
        ValueError: the list is not that of such a network.
    """
    parts = parts_of(state)
    kinds = [part.kind for part in parts]
    fourier = kinds[0] == "fourier"
    start = 1 if fourier else 0
    if kinds[start : start + 3] != ["linear", "linear", "conv"]:
        raise ValueError(
            f"the list begins with {', '.join(kinds[: start + 3])}; networks without an embedding of the time (conditional=False) "
            "and other architectures are not converted."
        )
    first, second = parts[start].shapes["weight"], parts[start + 1].shapes["weight"]
    image_channels, base = parts[start + 2].channels
    rest = parts[start + 3 :]
    blocks = [part for part in rest if part.kind == "block" and not part.resamples]
    resamplers = [part for part in rest if part.resamples]
    bare = [part for part in rest if part.kind == "wrapped" and part.kernel == 3]
    combines = [part for part in rest if part.kind == "wrapped" and part.kernel == 1]
    heads = [rest[i + 1] for i, part in enumerate(rest[:-1]) if part.kind == "norm" and rest[i + 1].kind == "conv"]
    if not heads or not blocks:
        raise ValueError("the list has no blocks, or no output.")

    # the pyramids, then how often the size is halved
    if len(heads) == 1:
        output = "none"
    else:
        output = "output_skip" if heads[0].channels[1] == image_channels else "residual"
    carried = bool(bare) and bare[0].channels[0] == image_channels  # the blocks never see so few channels
    if not resamplers and len(bare) > 1 and bare[1].channels[0] == image_channels:
        carried = True
    input_ = "input_skip" if combines else "residual" if carried else "none"
    plain = not resamplers and (bool(bare) or any("NIN_0.W" in part.shapes for part in blocks))
    if plain:
        per_level = 2 + (input_ == "residual") + (output == "residual")
        halvings, over = divmod(len(bare), per_level)
    else:
        halvings, over = divmod(len(resamplers), 2)
    levels = halvings + 1
    layers, more = divmod(len(blocks) - levels - 2, 2 * levels)
    if over or more or layers < 1:
        raise ValueError(f"{len(blocks)} blocks and {len(resamplers) or len(bare)} changes of size fit no U-Net of {levels} resolutions.")

    # widths and attention, along the encoder
    widths = [blocks[i * layers].channels[1] for i in range(levels)]
    attention, seen = set(), 0
    for part in rest:
        if part.kind == "attention" and 0 < seen <= levels * layers:
            attention.add((seen - 1) // layers)
        seen += part.kind == "block" and not part.resamples
    combine = "sum"
    if combines and levels > 1 and blocks[layers].channels[0] == 2 * combines[0].channels[1]:
        combine = "cat"
    filtered = any("Conv2d_0.weight" in part.shapes for part in bare)
    return {
        "in_channels": image_channels,
        "out_channels": image_channels,
        "base_channels": base,
        "block_out_channels": tuple(widths),
        "layers_per_block": layers,
        "attention_levels": tuple(sorted(attention)),
        "block_type": "ddpm" if plain else "biggan",
        "input_pyramid": input_,
        "combine": combine,
        "output_pyramid": output,
        "time_embedding": "fourier" if fourier else "positional",
        "time_channels": first[1],
        "embedding_mult": second[0] // base,
        "filtered": True if filtered else False if plain or input_ == "residual" else None,
    }


_BLOCK = {
    "GroupNorm_0": "norm_0", "Conv_0": "conv_0", "Dense_0": "time", "GroupNorm_1": "norm_1", "Conv_1": "conv_1", "Conv_2": "shortcut",
    "NIN_0": "shortcut",
}  # fmt: skip
_ATTENTION = {"GroupNorm_0": "norm", "NIN_0": "to_q", "NIN_1": "to_k", "NIN_2": "to_v", "NIN_3": "to_out"}


def layout(config: Mapping[str, Any]) -> Iterator[str]:
    """Where the modules of the list lie in a `ScoreUNetModel`, in order.

    Args:
        config: of the network, with `attention_levels`.
    """
    levels, layers, plain = len(config["block_out_channels"]), config["layers_per_block"], config["block_type"] == "ddpm"
    if config["time_embedding"] == "fourier":
        yield "frequencies"
    yield from ("time_0", "time_1", "conv_in")
    for i in range(levels):
        for j in range(layers):
            yield f"encoder.{i}.blocks.{j}"
            if i in config["attention_levels"]:
                yield f"encoder.{i}.attentions.{j}"
        if i + 1 < levels:
            yield f"encoder.{i}.down.conv" if plain else f"encoder.{i}.down"
            if config["input_pyramid"] == "input_skip":
                yield f"encoder.{i}.pyramid"
            elif config["input_pyramid"] == "residual":
                yield f"encoder.{i}.pyramid_down.conv"
    yield from ("middle_0", "middle_attention", "middle_1")
    for j, i in enumerate(reversed(range(levels))):
        yield from (f"decoder.{j}.blocks.{k}" for k in range(layers + 1))
        if i in config["attention_levels"]:
            yield f"decoder.{j}.attention"
        if config["output_pyramid"] == "output_skip" or (config["output_pyramid"] == "residual" and j == 0):
            yield from (f"decoder.{j}.norm", f"decoder.{j}.conv")
        elif config["output_pyramid"] == "residual":
            yield f"decoder.{j}.pyramid_up.conv"
        if i > 0:
            yield f"decoder.{j}.up.conv" if plain else f"decoder.{j}.up"
    if config["output_pyramid"] != "output_skip":
        yield from ("norm_out", "conv_out")


def key_map(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, str]:
    """Source key -> target key, for keys `all_modules.K.…`.

    Raises:
        ValueError: the list is longer or shorter than the configuration's.
    """
    parts, places = parts_of(state), list(layout(config))
    if len(parts) != len(places):
        raise ValueError(f"the checkpoint has {len(parts)} modules, and the network of these settings {len(places)}.")
    found = {}
    for number, (part, place) in enumerate(zip(parts, places, strict=True)):
        for name in part.shapes:
            head, _, tail = name.rpartition(".")
            tail = {"W": "weight", "b": "bias"}.get(tail, tail)
            if part.kind == "fourier":
                target = place
            elif part.kind in ("block", "attention"):
                target = f"{place}.{(_BLOCK if part.kind == 'block' else _ATTENTION).get(head, head)}.{tail}"
            else:
                target = f"{place}.{tail}"
            found[f"{PREFIX}{number}.{name}"] = target
    return found


def converted(source: str, target: str, value: Tensor) -> Tensor:
    """One tensor in the shape that the target has it: pointwise layers are stored transposed, frequencies without 2 pi."""
    if target == "frequencies":
        return value.double().mul(2 * torch.pi).to(value.dtype)
    if source.endswith(".W"):
        value = value.t()
        return value[:, :, None, None] if target.endswith("shortcut.weight") else value
    return value


def rename(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of a `ScoreUNetModel` from keys `all_modules.K.…`; `config` with `attention_levels`."""
    return {target: converted(source, target, state[source]) for source, target in key_map(state, config).items()}
