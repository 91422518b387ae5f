"""From a foreign checkpoint to a folder of this library: the plan, the check that it is whole, and the writing.

A `Format` says whether a checkpoint is its own, and makes a `Plan`: which networks come out, with which configuration, and where every key
of the source went. `convert` checks the plan against the networks' own keys and shapes before anything is written.
"""

from __future__ import annotations

import fnmatch
import inspect
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..hub.card import CARD_NAME, model_card
from ..hub.loading import build_without_memory
from ..hub.push import strip_origin
from ..hub.saving import check_writable, written_at_once
from .reader import Checkpoint, read, read_text, tensors

__all__ = ["Component", "Format", "Plan", "check", "convert", "write_safetensors"]

PROVENANCE_NAME = "conversion.json"

# a tensor, or a function that makes it when it is written, with its shape and dtype, so that only one is in memory at a time
State = Mapping[str, "Tensor | Made"]


@dataclass(frozen=True)
class Made:
    """A tensor that is computed when it is written: `make()` has this shape and dtype."""

    make: Callable[[], Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass
class Component:
    """A network that comes out: its class (of this library, diffusers or transformers), configuration, and weights.

    `state` gives target key -> tensor or `Made`. Views of the source cost no memory: rename, slice and permute freely, and leave what
    computes to `Made` where it is large.
    """

    cls: type
    config: dict[str, Any]
    state: Callable[[], State]


@dataclass
class Plan:
    """What a conversion does.

    Args:
        format: name of the format.
        pipeline: the pipeline's class, None for components without one (the folder then holds one network, the only component).
        components: by name, which is the folder's too.
        objects: what else the pipeline is made of and can save itself: a scheduler, a tokenizer.
        init: further arguments of the pipeline's constructor, such as image_size.
        used: source key (as `tensors(checkpoint.tree)` has it) -> target, "component.key" (several, with a comma between them).
        dropped: source key, or a pattern with * at its end, -> why it is not needed.
        sources: further checkpoints that were read, by a name; their keys in `used` and `dropped` begin with "name:".
        notes: sentences for the card and the printed plan.
        licence: overrides the format's.
    """

    format: str
    pipeline: type | None
    components: dict[str, Component]
    objects: dict[str, Any] = field(default_factory=dict)
    init: dict[str, Any] = field(default_factory=dict)
    used: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    sources: dict[str, Checkpoint] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    licence: str | None = None

    def describe(self) -> str:
        """The plan as text: format, configuration, sizes, key map, what is dropped and why."""
        lines = [f"format: {self.format}", f"licence: {self.licence}"]
        lines += [f"pipeline: {self.pipeline.__name__}"] if self.pipeline is not None else []
        for name, component in self.components.items():
            state = component.state()
            count = sum(math.prod(t.shape) for t in state.values())
            size = sum(math.prod(t.shape) * t.dtype.itemsize for t in state.values())
            lines += [f"{name}: {component.cls.__name__}, {count} numbers, {size} bytes"]
            lines += [f"  {key}: {value!r}" for key, value in sorted(component.config.items())]
        lines += [f"{name}: {type(thing).__name__}" for name, thing in self.objects.items()]
        lines += [f"note: {note}" for note in self.notes]
        lines += ["keys:", *(f"  {source} -> {target}" for source, target in self.used.items())]
        lines += ["dropped:", *(f"  {source}: {why}" for source, why in self.dropped.items())] if self.dropped else []
        return "\n".join(lines)


class Format:
    """One foreign layout. A subclass per format, one file each; `conversion/__init__.py` lists them.

    Attributes:
        name, title: of the format; the title says whose it is.
        paper: a link.
        licence: of weights in this format as far as it is known, in words for the card.
        licence_id: its identifier on the Hub, "other" where it has none; None where every author chooses.
        extensions: of the files, for `--help`.
        options: option -> what it does; `--set option=value` gives them. `config` is a file's content, from `--config`.
    """

    name: str
    title: str
    paper: str = ""
    licence: str = "see the source"
    licence_id: str | None = None
    extensions: tuple[str, ...] = ()
    options: Mapping[str, str] = {}

    def matches(self, checkpoint: Checkpoint) -> float:
        """How sure it is, 0 to 1, that the checkpoint is of this format: by keys and shapes alone, and quickly."""
        raise NotImplementedError

    def plan(self, checkpoint: Checkpoint, options: Mapping[str, Any]) -> Plan:
        """What comes out.

        Raises:
            ValueError: the checkpoint does not say all that is needed (the message names the option that does), or does not fit.
        """
        raise NotImplementedError


def convert(
    source: str | Path,
    to: str | Path | None = None,
    format: str = "auto",
    options: Mapping[str, Any] | None = None,
    dry_run: bool = False,
    progress: bool = False,
    license: str | None = None,
) -> Plan:
    """Turn a foreign checkpoint into a pipeline's folder, which `AutoPipeline.from_pretrained` loads.

    Nothing in the source is run. Weights go from the mapped file to safetensors one tensor at a time. The same source and options give
    the same bytes.

    Args:
        source: a file, or a folder of files.
        to: the folder to write: one that does not exist, is empty, or holds an earlier conversion. Not needed for a dry run.
        format: the name of a format, or "auto" to tell it from the keys.
        options: of the format: `options["config"]` is the content of a configuration file, or its path.
        dry_run: only make and check the plan.
        progress: show a progress bar on stderr.
        license: an identifier of the Hub for the card, instead of what is known of the format.
    Returns: the plan that was carried out.
    Raises:
        ValueError: the file is unsafe, damaged, of no known layout, lacks a setting, or does not fit the network that it should be.
        OSError: there is no such file, or the folder cannot be written.
    """
    from . import FORMATS

    if format != "auto" and format not in FORMATS:
        raise ValueError(f"format {format!r} is none of {', '.join(FORMATS)}, auto.")
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist; give a checkpoint's file or folder.")
    if not dry_run:
        if to is None:
            raise ValueError("convert: no folder to write was given; give `to`, or dry_run=True.")
        to = Path(to)
        _check_target(to, source)
    with _bar(_size_of(source), f"reading {source.name}", progress) as step:
        checkpoint = read(source, step)
    chosen = FORMATS[format] if format != "auto" else detect(checkpoint)
    options = _checked_options(chosen, dict(options or {}))
    plan = chosen.plan(checkpoint, options)
    plan.licence = plan.licence or chosen.licence
    states = check(plan, checkpoint)
    if not dry_run:
        _write(plan, chosen, checkpoint, states, to, progress, license)
    return plan


def detect(checkpoint: Checkpoint) -> Format:
    """The format that is surest that a checkpoint is its own.

    Raises:
        ValueError: none is; the message has the keys seen and the closest format.
    """
    from . import FORMATS

    scores = {name: FORMATS[name].matches(checkpoint) for name in FORMATS}
    best = max(scores, key=scores.get)
    if scores[best] >= 0.5:
        return FORMATS[best]
    found = tensors(checkpoint.tree)
    seen = [f"{key} {tuple(found[key].shape)}" for key in itertools.islice(found, 8)]
    there = f"its first keys of {len(found)} are {', '.join(seen)}" if seen else "it holds no tensors"
    closest = f"the closest is {best}" if scores[best] > 0 else "none is close"
    raise ValueError(
        f"{checkpoint.path} is of no layout that is known ({there}); {closest}. Known are {', '.join(FORMATS)}; name one by format=."
    )


def _checked_options(chosen: Format, options: dict[str, Any]) -> dict[str, Any]:
    if unknown := sorted(set(options) - set(chosen.options)):
        known = "; ".join(f"{name}: {what}" for name, what in chosen.options.items()) or "it has none"
        raise ValueError(f"the format {chosen.name} has no option {', '.join(unknown)} ({known}).")
    if isinstance(options.get("config"), (str, Path)):
        options["config"] = read_text(options["config"])
    return options


def check(plan: Plan, checkpoint: Checkpoint) -> dict[str, State]:
    """That a plan is whole: every source key is used or dropped by name, every target key is there with its shape and kind of number.

    Returns: the weights of each component.
    Raises:
        ValueError: it is not; the message names the first keys.
    """
    found = {**tensors(checkpoint.tree), **{f"{name}:{key}": t for name, more in plan.sources.items()
                                            for key, t in tensors(more.tree).items()}}  # fmt: skip
    patterns = [p for p in plan.dropped if p.endswith("*")]
    left = [k for k in found if k not in plan.used and k not in plan.dropped and not any(fnmatch.fnmatchcase(k, p) for p in patterns)]
    where = f"{checkpoint.path} as {plan.format}"
    if left:
        raise ValueError(f"{where}: {len(left)} keys have no place in it: {_some(left)}; it is of another layout or version.")
    if missing := [key for key in plan.used if key not in found]:
        raise ValueError(f"{where}: the source has no {_some(missing)}.")
    states, targets = {}, set()
    for name, component in plan.components.items():
        try:
            model = build_without_memory(component.cls, _full_config(component), most_parameters=10 * len(found) + 1000)
        except Exception as error:
            reason = " ".join(str(error).split()) or "far more parameters than the source has tensors"
            raise ValueError(f"{where}: the configuration makes no {component.cls.__name__}: {reason[:500]}") from error
        wanted, state = model.state_dict(), component.state()
        for key in getattr(component.cls, "_tied_weights_keys", None) or ():  # copies that transformers neither stores nor reads
            if key not in state:
                wanted.pop(key, None)
        if missing := [key for key in wanted if key not in state]:
            raise ValueError(f"{where}: nothing fills {len(missing)} keys of {component.cls.__name__}: {_some(missing)}.")
        if extra := [key for key in state if key not in wanted]:
            raise ValueError(f"{where}: {component.cls.__name__} has no {_some(extra)}.")
        wrong = [f"{k} has shape {tuple(state[k].shape)} for {tuple(wanted[k].shape)}" for k in wanted if wanted[k].shape != state[k].shape]
        wrong += [f"{k} has dtype {state[k].dtype} for {wanted[k].dtype}" for k in wanted
                  if wanted[k].is_floating_point() != state[k].dtype.is_floating_point]  # fmt: skip
        if wrong:
            raise ValueError(f"{where}: {len(wrong)} weights of {component.cls.__name__} do not fit: {_some(wrong, 4)}.")
        states[name] = state
        targets |= {f"{name}.{key}" for key in state}
    if wrong := [t for value in plan.used.values() for t in value.split(", ") if t not in targets]:
        raise ValueError(f"{where}: keys are said to go to {_some(wrong)}, which nothing has.")
    return states


def _some(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _full_config(component: Component) -> dict[str, Any]:
    if not hasattr(component.cls, "from_config") or hasattr(component.cls, "config_class"):
        return dict(component.config)
    known = set(inspect.signature(component.cls.__init__).parameters) - {"self"}
    if unknown := sorted(set(component.config) - known):
        raise ValueError(f"it knows no {', '.join(unknown)}")
    return dict(component.config)


# ------------------------------------------------------------------------------------------------------------------------------ writing


def _check_target(to: Path, source: Path) -> None:
    if to.exists() and not to.is_dir():
        raise ValueError(f"cannot write into {to}: it is a file; give a folder.")
    if to.is_dir() and any(to.iterdir()) and not (to / PROVENANCE_NAME).is_file():
        raise ValueError(f"{to} is not empty and holds no earlier conversion; give another folder, or empty it.")
    if to.exists() and source.resolve() in (to.resolve(), *to.resolve().parents):
        raise ValueError(f"{to} is the source itself, or lies in it; give another folder.")
    check_writable(to)


def _write(
    plan: Plan, chosen: Format, checkpoint: Checkpoint, states: dict[str, State], to: Path, progress: bool, license: str | None
) -> None:
    total = sum(math.prod(t.shape) * t.dtype.itemsize for state in states.values() for t in state.values())
    if to.is_dir() and any(to.iterdir()):
        stale = {p.name for p in to.iterdir() if p.is_dir()} - {*plan.components, *plan.objects}
        if stale:
            raise ValueError(f"{to} holds folders of another conversion ({', '.join(sorted(stale))}); give another folder, or empty it.")
    with written_at_once(to) as side, _bar(total, f"writing {to.name}", progress) as step:
        models = {}
        for name, component in plan.components.items():
            folder = side / name if plan.pipeline is not None else side
            folder.mkdir(exist_ok=True)
            model = models[name] = build_without_memory(component.cls, _full_config(component), most_parameters=10**6)
            _save_config(model, folder)
            stem = "diffusion_pytorch_model" if hasattr(component.cls, "load_config") else "model"
            write_safetensors(folder / f"{stem}.safetensors", states[name], step)
        parts, example = {}, ""
        if plan.pipeline is not None:
            pipe = plan.pipeline(**models, **plan.objects, **plan.init)
            pipe.save_config(side)
            for name in plan.objects:
                getattr(pipe, name).save_pretrained(side / name)
            parts = {k: v for k, v in pipe.config.items() if isinstance(v, (list, tuple)) and len(v) == 2 and v[0] and k[0] != "_"}
            example = pipe.card_example
        strip_origin(side)
        facts = _facts(plan, chosen, checkpoint, states)
        (side / PROVENANCE_NAME).write_text(json.dumps(facts, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
        class_name = plan.pipeline.__name__ if plan.pipeline else next(iter(plan.components.values())).cls.__name__
        tag = getattr(plan.pipeline, "pipeline_tag", None)
        card = model_card(
            to.resolve().name, class_name, parts, tag, license or chosen.licence_id, example, notes=_notes(plan, chosen, facts)
        )
        (side / CARD_NAME).write_text(card, encoding="utf-8")


def _save_config(model: Any, folder: Path) -> None:
    if hasattr(model, "save_config"):
        model.save_config(folder)
    else:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)


def _facts(plan: Plan, chosen: Format, checkpoint: Checkpoint, states: dict[str, State]) -> dict[str, Any]:
    """What is written down of where the weights came from: no date, no path, so that a second run writes the same."""
    return {
        "format": chosen.name,
        "licence": plan.licence,
        "source": {"container": checkpoint.container, "sha256": checkpoint.sha256, "bytes": checkpoint.size},
        "further_sources": {name: {"sha256": more.sha256, "bytes": more.size} for name, more in plan.sources.items()},
        "components": {name: {"class": c.cls.__name__, "tensors": len(states[name])} for name, c in plan.components.items()},
        "dropped": dict(plan.dropped),
        "notes": list(plan.notes),
    }


def _notes(plan: Plan, chosen: Format, facts: dict[str, Any]) -> str:
    paper = f" ([paper]({chosen.paper}))" if chosen.paper else ""
    rows = [
        "## Conversion", "",
        f"Converted by gen_pipelines from a checkpoint of {chosen.title}{paper}, format `{chosen.name}`.", "",
        f"- SHA-256 of the source: `{facts['source']['sha256']}`",
        *(f"- SHA-256 of `{name}`: `{more['sha256']}`" for name, more in facts["further_sources"].items()),
        f"- Licence of the weights: {plan.licence}",
        *(f"- {note}" for note in plan.notes),
    ]  # fmt: skip
    return "\n".join(rows)


# names of dtypes in safetensors, in the order in which the library writes them: wide ones first
_NAMES = {torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.float8_e5m2: "F8_E5M2", torch.float8_e4m3fn: "F8_E4M3",
          torch.int16: "I16", torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32", torch.float32: "F32",
          torch.int64: "I64", torch.float64: "F64"}  # fmt: skip
_RANK = {dtype: rank for rank, dtype in enumerate(_NAMES)}


def write_safetensors(file: Path, state: State, step: Callable[[int], Any] | None = None) -> None:
    """The bytes that `safetensors.torch.save_file(state, file, {"format": "pt"})` writes, with one tensor in memory at a time.

    Args:
        step: is told how many bytes were written since the last call.
    """
    names = sorted(state, key=lambda name: (-_RANK[state[name].dtype], name.encode()))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in names:
        size = math.prod(state[name].shape) * state[name].dtype.itemsize
        header[name] = {"dtype": _NAMES[state[name].dtype], "shape": list(state[name].shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            value = state[name]
            tensor = value.make() if isinstance(value, Made) else value
            if tensor.shape != value.shape or tensor.dtype != value.dtype:
                raise AssertionError(f"{name}: {tensor.shape} {tensor.dtype} was made where {value.shape} {value.dtype} was promised")
            raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            stream.write(memoryview(raw))
            if step is not None:
                step(raw.nbytes)


def _size_of(source: Path) -> int:
    return sum(f.stat().st_size for f in source.iterdir() if f.is_file()) if source.is_dir() else source.stat().st_size


class _bar:
    """A progress bar in bytes, on stderr, or none."""

    def __init__(self, total: int, what: str, shown: bool) -> None:
        from tqdm.auto import tqdm

        self.bar = tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=not shown, leave=False)

    def __enter__(self) -> Callable[[int], Any]:
        return self.bar.update

    def __exit__(self, *_: Sequence[Any]) -> None:
        self.bar.close()


def rename(state: Mapping[str, Tensor], name: str, component: str, table: Mapping[str, str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """For a mapper that only renames: (target -> tensor, entries for `Plan.used`) of a table source key -> target key.

    Args:
        state: source key -> tensor, without the prefix `name`.
        name: the prefix of the keys in the checkpoint's tree, "" or ending in a dot.
        component: the component that the keys go to.
    Raises:
        ValueError: the source lacks a key of the table.
    """
    if missing := [key for key in table if key not in state]:
        raise ValueError(f"the source has no {_some(missing)}.")
    return {new: state[old] for old, new in table.items()}, {f"{name}{old}": f"{component}.{new}" for old, new in table.items()}


