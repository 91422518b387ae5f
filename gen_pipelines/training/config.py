"""Recipes: one YAML file per training run, read strictly, changed by `key=value` on the command line."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import ImageColor

_LARGEST_SEED = 2**32 - 1  # NumPy's global generator takes no larger one


@dataclass(frozen=True)
class DataConfig:
    """Where the pictures come from and how they are prepared.

    Attributes:
        name: a Hub dataset, or a folder (parquet, arrow, or pictures in folders).
        split, image_column, text_column, label_column: how the rows are read.
        resolution: height and width in pixels; pictures are resized with antialiasing, the shorter side first, then centre-cropped.
        channels: 3 for colour, 1 for grey.
        background: the colour under transparent pixels.
        horizontal_flip: probability of mirroring a picture.
        shift: largest random translation, in pixels (the border colour is repeated).
        holdout: rows kept out of training, for validation; captions among them hold no word that training lacks.
        group_captions: a regular expression. Rows whose captions are equal once what it matches is cut out are one group, and an epoch has
            one row of each group: variants of one thing (skin tones, say) then do not crowd out what has a single caption.
        workers: processes that decode pictures; 0 decodes in the training process and keeps the decoded pictures.
        streaming: read the data set as a stream (too large for the disk).
    """

    name: str
    split: str = "train"
    image_column: str = "image"
    text_column: str | None = None
    label_column: str | None = None
    resolution: int = 64
    channels: int = 3
    background: str = "white"
    horizontal_flip: float = 0.0
    shift: int = 0
    holdout: int = 0
    group_captions: str | None = None
    workers: int = 0
    streaming: bool = False

    def __post_init__(self) -> None:
        _require(self.channels in (1, 3), "data.channels", self.channels, "3 (colour) or 1 (grey)")
        _require(self.resolution >= 1, "data.resolution", self.resolution, "at least 1 pixel")
        _require(0 <= self.horizontal_flip <= 1, "data.horizontal_flip", self.horizontal_flip, "a probability, 0 to 1")
        for name in ("shift", "holdout", "workers"):
            _require(getattr(self, name) >= 0, f"data.{name}", getattr(self, name), "0 or more")
        if self.group_captions is not None:
            _require(self.text_column is not None, "data.group_captions", self.group_captions, "given together with data.text_column")
            _require(not self.streaming, "data.group_captions", self.group_captions, "left out for a streamed data set")
            try:
                re.compile(self.group_captions)
            except re.error as error:
                raise ValueError(f"data.group_captions: {self.group_captions!r} is no regular expression: {error}.") from None
        try:
            ImageColor.getrgb(self.background)
        except ValueError:
            _require(False, "data.background", self.background, "a colour: a name such as white, or #rrggbb")
        _require(not (self.streaming and self.holdout), "data.holdout", self.holdout, "0 for a streamed data set")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019) and its schedule ("constant", "linear" or "cosine" to zero), after a linear warm-up."""

    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    schedule: str = "constant"
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        positive = math.isfinite(self.learning_rate) and self.learning_rate > 0
        _require(positive, "optimizer.learning_rate", self.learning_rate, "a positive number")
        _require(all(0 <= beta < 1 for beta in self.betas), "optimizer.betas", list(self.betas), "two numbers from 0 to below 1")
        for name in ("eps", "weight_decay", "warmup_steps"):
            _require(getattr(self, name) >= 0, f"optimizer.{name}", getattr(self, name), "0 or more")


@dataclass(frozen=True)
class EMAConfig:
    """Exponential moving average of the weights: decay at step s is min(decay, 1 - (1 + s)^-power).

    Attributes:
        decay: of the average that is sampled from and saved. Half of it is from the last ln 2 / (1 - decay) steps.
        power: how soon the first weights are forgotten.
        also: decays of averages that are kept beside it, so that the length is chosen when the run is over: what each of them gives is
            saved in `averages/DECAY`.
    """

    decay: float = 0.999
    power: float = 0.75
    also: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _require(0 <= self.decay < 1, "ema.decay", self.decay, "from 0 to below 1; ema=null turns averaging off")
        every = (self.decay, *self.also)
        _require(
            all(0 <= decay < 1 for decay in self.also) and len(set(every)) == len(every),
            "ema.also",
            list(self.also),
            "decays from 0 to below 1, each another one",
        )
        _require(self.power > 0, "ema.power", self.power, "a positive number")


@dataclass(frozen=True)
class LoopConfig:
    """The loop. `batch_size` is the number of samples in one optimiser step over all ranks and accumulated micro-batches.

    Attributes:
        mixed_precision: "no", "bf16" or "fp16".
        checkpoint_every, sample_every, log_every: in optimiser steps; 0 turns the thing off, but for the last checkpoint.
        keep_checkpoints: how many of the newest stay, at least one.
        log_with: a tracker of accelerate's ("tensorboard", "wandb", ...).
        channels_last, gradient_checkpointing: memory layout of convolutional networks; recompute activations instead of keeping them.
        attention: "auto" leaves the kernel to torch; "math" takes plain matrix products, whose backward is several times faster on a CPU
            for short sequences.
        find_unused_parameters: with several processes, look in every step for parameters that the loss did not reach (a network with a
            branch that some batches skip). Costs a walk over the graph.
    """

    steps: int
    batch_size: int
    gradient_accumulation_steps: int = 1
    mixed_precision: str = "no"
    max_grad_norm: float | None = 1.0
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    sample_every: int = 0
    log_every: int = 10
    log_with: str | None = None
    channels_last: bool = False
    gradient_checkpointing: bool = False
    attention: str = "auto"
    find_unused_parameters: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation_steps", "keep_checkpoints"):
            _require(getattr(self, name) >= 1, f"loop.{name}", getattr(self, name), "at least 1")
        for name in ("checkpoint_every", "sample_every", "log_every"):
            _require(getattr(self, name) >= 0, f"loop.{name}", getattr(self, name), "0 or more")
        _require(self.max_grad_norm is None or self.max_grad_norm > 0, "loop.max_grad_norm", self.max_grad_norm, "positive, or null")


@dataclass(frozen=True)
class CardConfig:
    """What the model card says beside what the run knows: an identifier of the Hub's list such as "apache-2.0", and Markdown.

    Attributes:
        license: of the weights.
        about, data, limits: what the model is, what it was trained on, and what it cannot do.
    """

    license: str | None = None
    about: str | None = None
    data: str | None = None
    limits: str | None = None


@dataclass(frozen=True)
class Recipe:
    """One training run: what `gen-pipelines train RECIPE` reads.

    Attributes:
        task: what is trained, a name in `gen_pipelines.training.tasks.TASKS`.
        model, objective, sample: the task's own settings; it names those that it takes.
        card: what only a person can say in the model card.
    """

    task: str
    data: DataConfig
    loop: LoopConfig
    seed: int = 0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EMAConfig | None = field(default_factory=EMAConfig)
    model: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, Any] = field(default_factory=dict)
    sample: dict[str, Any] = field(default_factory=dict)
    card: CardConfig = field(default_factory=CardConfig)

    def __post_init__(self) -> None:
        _require(0 <= self.seed <= _LARGEST_SEED, "seed", self.seed, f"0 to {_LARGEST_SEED}")


def load_recipe(path: str | Path, overrides: typing.Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `key=value` overrides (dotted keys, values in YAML: `loop.steps=100 optimizer.betas=[0.9,0.99]`).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, an unknown or missing key, a value of the wrong type; the message names the key and those that exist.
    """
    import yaml

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recipe; a recipe is a YAML file such as those in configs/.")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        if not isinstance(settings, dict):
            raise ValueError(f"{path}: a recipe is a mapping of settings, this is a {type(settings).__name__}.")
        before = copy.deepcopy(settings)
        for override in overrides:
            key, separator, value = override.partition("=")
            if not separator or not key:
                raise ValueError(f"override {override!r}: write it as key=value, for example loop.steps=100.")
            _set(settings, key.split("."), yaml.safe_load(value))
        _drop_other_card(settings, before, {override.partition("=")[0] for override in overrides})
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    return build(Recipe, settings, str(path))


def _drop_other_card(settings: dict[str, Any], before: dict[str, Any], overridden: set[str]) -> None:
    """Takes away what the recipe's author wrote in `card` where the data are others: it is of another model, its licence and limits too."""
    name = lambda of: of["data"].get("name") if isinstance(of.get("data"), dict) else None
    if name(settings) != name(before) and isinstance(settings.get("card"), dict) and "card" not in overridden:
        settings["card"] = {key: value for key, value in settings["card"].items() if f"card.{key}" in overridden}


def build(cls: type, settings: dict[str, Any], where: str) -> Any:
    """Make the dataclass `cls` from a mapping, nested dataclasses included; unknown keys and wrong types are errors that name `where`."""
    if not isinstance(settings, dict):
        raise ValueError(f"{where}: expected a mapping with {', '.join(f.name for f in dataclasses.fields(cls))}; got {settings!r}.")
    hints, fields = typing.get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls) if f.init}
    for key in settings:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"{where}: unknown key {key!r}{hint}; known keys: {', '.join(fields)}.")
    for name, one in fields.items():
        if name not in settings and one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where}: the key {name!r} is missing.")
    return cls(**{key: coerce(hints[key], value, f"{where}: {key}") for key, value in settings.items()})


def to_dict(recipe: Any) -> dict[str, Any]:
    """The recipe as plain values: what is stored in a checkpoint and beside the weights."""
    return dataclasses.asdict(recipe)


def coerce(hint: Any, value: Any, where: str) -> Any:
    """A value of a recipe as the type that a setting has; an error that says `where` if it is another."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for option in options:
        if option is type(None) and value is None:
            return None
        if dataclasses.is_dataclass(option) and value is not None:
            return build(option, value, where)
        if typing.get_origin(option) is tuple and isinstance(value, (list, tuple)):
            kinds = typing.get_args(option)
            if kinds[1:] == (Ellipsis,):
                kinds = kinds[:1] * len(value)
            if len(kinds) == len(value):
                return tuple(coerce(kind, one, where) for kind, one in zip(kinds, value, strict=True))
        if option is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:  # YAML 1.1 reads 1e-4 as text
                return float(value)
            except ValueError:
                continue
        if option is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if option in (str, bool) and isinstance(value, option):
            return value
        if (typing.get_origin(option) or option) is dict and isinstance(value, dict):
            return value
    allowed = " or ".join("null" if o is type(None) else getattr(o, "__name__", str(o)) for o in options)
    raise ValueError(f"{where}: expected {allowed}, got {value!r}.")


def _require(holds: bool, key: str, value: Any, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{key}: {value!r} is not allowed; give {allowed}.")


def _set(settings: dict[str, Any], keys: list[str], value: Any) -> None:
    for depth, key in enumerate(keys[:-1]):
        inner = settings.setdefault(key, {})
        if not isinstance(inner, dict):
            raise ValueError(f"override {'.'.join(keys)}: {'.'.join(keys[: depth + 1])} is {inner!r}, not a group of settings.")
        settings = inner
    settings[keys[-1]] = value
