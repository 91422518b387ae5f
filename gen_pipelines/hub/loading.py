"""Reading folders from elsewhere safely: what is wrong with a folder, a config or a weight file is said before anything is built from it.

A folder is data. Nothing in it is run, no class outside diffusers, transformers and this library is looked up, no path in it leads out of
it, and no number in it makes the program take more time or memory than its weights are worth.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import itertools
import json
import math
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

INDEX_NAME = "model_index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

# the stem of the weight file, by the library of the component
_WEIGHT_STEM = {"transformers": "model", "latent_diffusion": "model"}
_DEFAULT_STEM = "diffusion_pytorch_model"

KNOWN_LIBRARIES = ("diffusers", "transformers", "gen_pipelines")

# names that releases before transformers 5 recorded
_RENAMED = {"CLIPFeatureExtractor": "CLIPImageProcessor"}

# bits of each dtype of the safetensors format
_DTYPE_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
               "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
               "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}  # fmt: skip

# No config or header of a real model comes near these: a 12-billion-parameter transformer has a header of 0.2 MB.
_MAX_JSON = 32 * 2**20
_MAX_HEADER = 16 * 2**20
_MAX_DEPTH = 32
_MAX_INTEGER = 2**31
_MAX_SCHEDULER_INTEGER = 10**6
_FREE_NUMBERS = 2**24  # what a network may hold beyond its file: position tables, and keys that a later error names


class LoadingError(ValueError):
    """A folder, a config or a weight file cannot be loaded; the message names it, what is wrong, and what to do."""


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """A JSON object from a file, or a LoadingError that names the file and the remedy."""
    try:
        if (size := path.stat().st_size) > _MAX_JSON:
            raise LoadingError(f"{path} has {size} bytes, and no configuration is that long; {remedy}")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LoadingError(f"{path} does not exist; {remedy}") from None
    except OSError as error:
        raise LoadingError(f"{path} cannot be read ({error.strerror}); {remedy}") from None
    except LoadingError:
        raise
    except (ValueError, RecursionError) as error:
        raise LoadingError(f"{path} is not valid JSON ({_line(error)}); {remedy}") from None
    if not isinstance(value, dict):
        raise LoadingError(f"{path} holds a {type(value).__name__} where an object is expected; {remedy}")
    return value


# ------------------------------------------------------------------------------------------------------------------------- the index


def read_index(folder: str | Path) -> dict[str, Any]:
    """The `model_index.json` of a pipeline folder.

    Raises:
        LoadingError: the folder does not exist, is no pipeline, or names components by what is no name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise LoadingError(f"{folder} is not a folder; pass the folder that save_pretrained(...) wrote, or a Hub id such as 'user/name'.")
    if not (folder / INDEX_NAME).is_file():
        content = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise LoadingError(
            f"{folder} is no pipeline: it has no {INDEX_NAME} (it holds: {content}); pass the folder that save_pretrained(...) wrote."
        )
    index = read_json(folder / INDEX_NAME, "save or download the pipeline again.")
    where = folder / INDEX_NAME
    if not isinstance(index.get("_class_name"), (str, list)):
        raise LoadingError(f"{where} names no pipeline class (_class_name); save or download the pipeline again.")
    check_numbers(index, where)
    for name, value in index.items():
        pair = isinstance(value, list) and len(value) == 2 and any(part is None or isinstance(part, str) for part in value)
        if name.startswith("_") or not pair:
            continue  # an option of the pipeline, which its class checks
        if not (value == [None, None] or all(isinstance(part, str) for part in value)):
            raise LoadingError(f"{where}: {name!r} is {_short(value)} where [library, class] is expected; save or download it again.")
        if not name.isidentifier():
            raise LoadingError(f"{where}: {name!r} is no name of a component; save or download the pipeline again.")
        if value[0] is not None and not all(re.fullmatch(r"[A-Za-z_][\w.]*", part) for part in value):
            raise LoadingError(f"{where}: component {name!r} is {_short(value)}, which names no class of a library; do not trust it.")
    return index


def components_of(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """name -> (library, class) of the components that are there."""
    return {
        name: (value[0], value[1])
        for name, value in index.items()
        if not name.startswith("_")
        and isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], str)
        and isinstance(value[1], str)
    }


def component_class(library: str, name: str) -> type:
    """The class of a component, of diffusers, transformers or this library.

    Raises:
        LoadingError: another library, no such class there, or a class that is no component of a pipeline.
    """
    import diffusers.pipelines

    top = library.split(".")[0]
    if top == "gen_pipelines" or library in KNOWN_LIBRARIES:
        module = importlib.import_module(top)
    elif library.isidentifier() and inspect.ismodule(getattr(diffusers.pipelines, library, None)):
        module = importlib.import_module(f"diffusers.pipelines.{library}")  # a folder of diffusers that has networks of its own
    else:
        raise LoadingError(
            f"the component class {_short(f'{library}.{name}')} is outside {', '.join(KNOWN_LIBRARIES)}: code from elsewhere is never run; "
            "if you trust it, load the component yourself and pass it by its name to from_pretrained."
        )
    try:
        found = getattr(module, _RENAMED.get(name, name), None)
    except (ImportError, RuntimeError) as error:  # lazy modules import here; an extra may be missing
        raise LoadingError(f"the component class {library}.{name} cannot be imported: {_line(error)}") from error
    if not isinstance(found, type) or not issubclass(found, _component_bases()):
        raise LoadingError(f"{library} has no component class {name!r}; update {top}, or download the model again.")
    return found


def _component_bases() -> tuple[type, ...]:
    from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
    from transformers import FeatureExtractionMixin, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
    from transformers.image_processing_base import ImageProcessingMixin

    return (ModelMixin, SchedulerMixin, DiffusionPipeline, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin,
            FeatureExtractionMixin, ImageProcessingMixin)  # fmt: skip


# -------------------------------------------------------------------------------------------------------------------------- configs


def check_numbers(config: Any, where: Any, largest: int = _MAX_INTEGER) -> None:
    """Finds numbers that no model has and nesting that no config needs.

    Raises:
        LoadingError: an integer beyond `largest`, or lists in lists in lists.
    """
    todo: list[tuple[Any, str, int]] = [(config, "", 0)]
    while todo:
        value, path, depth = todo.pop()
        if depth > _MAX_DEPTH:
            raise LoadingError(f"{where}: {_short(path)} is nested too deeply; download it again, or do not trust it.")
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) > largest:
            raise LoadingError(f"{where}: {_short(path)} is {_short(value)}, and no model has that; download it again, or do not trust it.")
        if isinstance(value, dict):
            todo += [(inner, f"{path}.{key}" if path else str(key), depth + 1) for key, inner in value.items()]
        elif isinstance(value, list):
            todo += [(inner, f"{path}[{i}]", depth + 1) for i, inner in enumerate(value)]


def check_network_config(config: Mapping[str, Any], where: Path, cls: type) -> None:
    """What a network's config may not say: other code, other files, or (of our own classes) what their constructor does not know.

    Raises:
        LoadingError: it says so.
    """
    check_numbers(config, where)
    for path, value in _walk(config):
        key = path.rsplit(".", 1)[-1]
        if "attn_implementation" in key and isinstance(value, str) and re.search(r"[/:@\\]", value):
            raise LoadingError(f"{where}: {path} is {_short(value)}, code from the Hub, which is never run; remove the key.")
        if key == "transformers_weights":
            raise LoadingError(f"{where}: {path} names another weight file ({_short(value)}); remove the key.")
    if _is_ours(cls):
        known = set(inspect.signature(cls.__init__).parameters) - {"self"}
        unknown = sorted(key for key in config if not key.startswith("_") and key not in known)
        if unknown:
            what = ", ".join(map(_short, unknown[:5]))
            raise LoadingError(f"{where}: {cls.__name__} knows no {what}; it knows {', '.join(sorted(known))}.")
        named = config.get("_class_name", cls.__name__)
        if named != cls.__name__:
            raise LoadingError(f"{where} is of a {_short(named)}, not of a {cls.__name__}; load it as what it is.")


def _walk(config: Any) -> Iterator[tuple[str, Any]]:
    todo: list[tuple[str, Any]] = [("", config)]
    while todo:
        path, value = todo.pop()
        yield path, value
        if isinstance(value, Mapping):
            todo += [(f"{path}.{key}" if path else str(key), inner) for key, inner in value.items()]
        elif isinstance(value, list):
            todo += [(f"{path}[{i}]", inner) for i, inner in enumerate(value)]


def _is_ours(cls: type) -> bool:
    return any(base.__name__ == "GenerativeModel" for base in cls.__mro__)


# --------------------------------------------------------------------------------------------------------------------------- weights


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """The header of a safetensors file: name -> dtype, shape, data_offsets; the file is whole if this returns. No tensor is read.

    The format: 8 bytes, the length of the header as a little-endian integer; the header, JSON; the tensors, one after the other.

    Raises:
        LoadingError: it is missing, cut short, a Git LFS pointer, or not safetensors; the message names the file and the remedy.
    """
    remedy = "download or save it again."
    if not path.is_file():
        raise LoadingError(f"the weight file {path} is missing; {remedy}")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if start.startswith(b"version "):
                raise LoadingError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` in that folder.")
            if len(start) < 8:
                raise LoadingError(f"the weight file {path} is cut short: {size} bytes; {remedy}")
            length = int.from_bytes(start, "little")
            if length > _MAX_HEADER:
                raise LoadingError(f"{path} is not a safetensors file: its header would take {length} bytes; {remedy}")
            if size < 8 + length:
                raise LoadingError(f"the weight file {path} is cut short: {size} bytes where its header alone takes {8 + length}; {remedy}")
            text = file.read(length)
    except OSError as error:
        raise LoadingError(f"{path} cannot be read ({error.strerror}); {remedy}") from None
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = [(name, *_entry(entry)) for name, entry in header.items()]
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        raise LoadingError(f"{path} is not a safetensors file: its header cannot be read; {remedy}") from None
    end = 0
    for name, first, last, bits in sorted(entries, key=lambda entry: entry[1:3]):
        if bits != 8 * (last - first):
            raise LoadingError(f"{path}: tensor {_short(name)} claims {bits // 8} bytes and has {last - first}; {remedy}")
        if first != end:
            raise LoadingError(f"{path}: tensor {_short(name)} begins at byte {first} where {end} is expected; {remedy}")
        end = last
    if size != 8 + length + end:
        state = "cut short" if size < 8 + length + end else "longer than its header says"
        raise LoadingError(f"the weight file {path} is {state}: {size} bytes where its header promises {8 + length + end}; {remedy}")
    return header


def check_safetensors(path: Path) -> None:
    """Checks that a weight file is whole, by its header alone (see `read_header`)."""
    read_header(path)


def _entry(entry: Mapping[str, Any]) -> tuple[int, int, int]:
    """Where a tensor's bytes begin and end, and how many bits its dtype and shape ask for; what is not a number raises."""
    first, last = entry["data_offsets"]
    shape = entry["shape"]
    if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in (first, last, *shape)):
        raise ValueError(entry)
    return first, last, math.prod(shape) * _DTYPE_BITS[entry["dtype"]]


def weight_files(folder: Path, library: str, variant: str | None = None, class_name: str = "") -> list[Path]:
    """The weight files of a component's folder, shards included; the variant where it exists, else the plain ones.

    Raises:
        LoadingError: there are none, only pickles (the message has the command that converts them), or an index leads out of the folder.
    """
    stem = _WEIGHT_STEM.get(library, _DEFAULT_STEM)
    if variant is not None and not re.fullmatch(r"[\w.-]+", str(variant)):
        raise LoadingError(f"variant {_short(variant)} is no part of a file's name; give one such as 'fp16'.")
    for name in ([f"{stem}.{variant}"] if variant else []) + [stem]:
        single, sharded = folder / f"{name}.safetensors", folder / f"{stem}.safetensors.index{name[len(stem) :]}.json"
        if sharded.is_file():
            return shards_of(sharded)
        if single.is_file():
            return [single]
    pickles = sorted(p.name for p in folder.glob("*") if p.suffix in PICKLES)
    if pickles:
        raise LoadingError(
            f"{folder} holds pickled weights only ({', '.join(pickles[:3])}), which may run code and are not loaded"
            + (f"; convert them once, if you trust their author: {_convert_command(folder, library, class_name)}" if class_name else
               "; convert them to safetensors first.")
        )  # fmt: skip
    others = sorted({p.name.split(".")[1] for p in folder.glob(f"{stem}.*.safetensors")})
    remedy = f"pass variant={others[0]!r}, which is there" if others else "download or save the component again"
    raise LoadingError(f"the weight file {folder / (stem + '.safetensors')} is missing; {remedy}.")


def _convert_command(folder: Path, library: str, class_name: str) -> str:
    where = repr(str(folder))
    code = f"from {library} import {class_name} as C; C.from_pretrained({where}, use_safetensors=False).save_pretrained({where})"
    return f'python -c "{code}"'


def shards_of(index: Path) -> list[Path]:
    """The weight files that an index of shards names.

    Raises:
        LoadingError: it names none, or what is no safetensors file of its folder.
    """
    table = read_json(index, "download or save the component again.").get("weight_map")
    names = list(table.values()) if isinstance(table, dict) else None
    if not names or not all(isinstance(name, str) for name in names):
        raise LoadingError(f"{index} names no weight files; download or save the component again.")
    for name in names:
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise LoadingError(f"{index} names {_short(name)}, which is no safetensors file of its folder; do not trust it.")
    return [index.parent / name for name in sorted(set(names))]


# ------------------------------------------------------------------------------------------------------------------------ components


def load_component(folder: Path, library: str, class_name: str, dtype: Any = None, variant: str | None = None, **kwargs: Any) -> Any:
    """Loads one component of a pipeline: a network, a scheduler, or a tokenizer or processor.

    Args:
        folder: the component's folder.
        library, class_name: what `model_index.json` records of it.
        dtype, variant, kwargs: for networks, as in `load_module`.
    Raises:
        LoadingError: whatever is wrong with it; the message names the file and the remedy.
    """
    from diffusers import SchedulerMixin
    from torch import nn

    cls = component_class(library, class_name)
    if not folder.is_dir():
        raise LoadingError(f"the component folder {folder} is missing; download or save the pipeline again.")
    if issubclass(cls, nn.Module):
        return load_module(folder, library, cls, dtype, variant, **kwargs)
    remedy = "download or save it again."
    if issubclass(cls, SchedulerMixin):
        name = "scheduler_config.json"
        if not (folder / name).is_file() and (folder / "config.json").is_file():
            name = "config.json"
        config = read_json(folder / name, remedy)
        check_numbers(config, folder / name, _MAX_SCHEDULER_INTEGER)
        with as_loading_error(f"the scheduler in {folder} ({cls.__name__})"):
            return cls.from_pretrained(str(folder))
    for name in ("tokenizer_config.json", "special_tokens_map.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            check_numbers(read_json(folder / name, remedy), folder / name, 10**40)  # "no limit" is written as 10^30
    with as_loading_error(f"{folder} ({cls.__name__})"):
        loaded = cls.from_pretrained(str(folder), local_files_only=True)
    length = getattr(loaded, "model_max_length", 1)
    if isinstance(length, bool) or not isinstance(length, (int, float)) or not length >= 1:
        raise LoadingError(f"{folder / 'tokenizer_config.json'}: model_max_length is {_short(length)}, not a number of tokens; {remedy}")
    return loaded


def load_module(folder: Path, library: str, cls: type, dtype: Any, variant: str | None = None, **kwargs: Any) -> Any:
    """Loads one network of a pipeline, strictly: safetensors only, every key there, every shape right.

    Args:
        folder: the component's folder.
        library, cls: what `model_index.json` records of it.
        dtype: the dtype of its parameters.
        variant: taken where the component has it.
        kwargs: passed to `cls.from_pretrained`.
    Raises:
        LoadingError: a file or key is missing, cut short or of the wrong shape; the message names it and the remedy.
    """
    files, model = _checked(folder, library, cls, variant)
    plain = kwargs.get("low_cpu_mem_usage", True) and not set(kwargs) - {"low_cpu_mem_usage"}
    if model is not None and plain and _can_be_filled(model, folder, files, dtype):
        return _filled(model, folder, files, dtype)
    stem = _WEIGHT_STEM.get(library, _DEFAULT_STEM)
    kwargs = {**kwargs, "variant": variant} if variant and f".{variant}" in files[0].name[len(stem) :] else kwargs
    kwargs = {"use_safetensors": True, "output_loading_info": True, "dtype": dtype, **kwargs}
    try:
        with as_loading_error(f"{folder} ({cls.__name__})"):
            # a network of ours checks what it is given itself; here that has been done
            loader = getattr(cls, "_from_checked_folder", cls.from_pretrained)
            model, info = loader(str(folder), **kwargs)
    except LoadingError as error:
        if "ignore_mismatched_sizes" in str(error.__cause__) and issubclass(cls, _pretrained_model()):
            raise LoadingError(f"{folder} ({cls.__name__}) cannot be loaded: {_mismatches(folder, cls, kwargs)}; the weights do not fit "
                               "its config.json.") from error  # fmt: skip
        raise
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise LoadingError(f"{files[0]} has no weights for {', '.join(missing[:3])}{more} of {cls.__name__}; download or save it again.")
    return model


def check_module(folder: Path, library: str, cls: type, variant: str | None = None) -> list[Path]:
    """Checks a network's folder before the network is built for good; returns its weight files.

    The config is read, the headers of the weight files too, and the network is built once without memory (on the meta device), with a
    limit: it may have no more parameters than the files have tensors to fill them, nor tables that dwarf them. So a config costs no more
    time and memory than the weights that came with it.

    Raises:
        LoadingError: as `load_module`.
    """
    return _checked(folder, library, cls, variant)[0]


def _checked(folder: Path, library: str, cls: type, variant: str | None) -> tuple[list[Path], Any]:
    """The weight files, and the network on the meta device, or None where it cannot be laid out there."""
    if not (folder / "config.json").is_file():
        raise LoadingError(f"the component folder {folder} has no config.json; download or save the pipeline again.")
    config = read_json(folder / "config.json", "download or save the component again.")
    check_network_config(config, folder / "config.json", cls)
    if (folder / "adapter_config.json").is_file():
        raise LoadingError(f"{folder} holds adapter_config.json, which asks for another model's weights; merge the adapter and save again.")
    files = weight_files(folder, library, variant, cls.__name__)
    stored: dict[str, dict[str, Any]] = {}
    for file in files:
        stored |= read_header(file)
    return files, None if config.get("quantization_config") else _check_fit(folder, cls, config, files[0], stored)


def _check_fit(folder: Path, cls: type, config: Mapping[str, Any], file: Path, stored: Mapping[str, Mapping[str, Any]]) -> Any:
    numbers = sum(math.prod(entry["shape"]) for entry in stored.values())
    allowed = max(numbers, _FREE_NUMBERS)
    try:
        model = build_without_memory(cls, config, most_parameters=4 * len(stored) + 1000)
    except _TooLarge:
        raise LoadingError(
            f"{folder / 'config.json'} describes a {cls.__name__} of far more parameters than the {len(stored)} tensors in {file.name}; "
            "download it again, or do not trust it."
        ) from None
    except Exception:  # also a constructor that reads values, which the meta device has none of: loading says what is wrong, if anything is
        return None
    state = model.state_dict()
    own = dict(itertools.chain(model.named_parameters(), model.named_buffers()))
    for kind, names in (("parameters", [n for n in own if n in state]), ("tables", [n for n in own if n not in state])):
        if (total := sum(own[name].numel() for name in names)) > allowed + (_FREE_NUMBERS if kind == "parameters" else 0):
            misfit = next((n for n in sorted(names) if n not in stored or list(own[n].shape) != list(stored[n]["shape"])), names[0])
            there = f"{stored[misfit]['shape']} in {file.name}" if misfit in stored else f"not in {file.name}"
            raise LoadingError(
                f"{folder / 'config.json'} describes a {cls.__name__} with {total} numbers in its {kind}, and the weights have {numbers} "
                f"({_short(misfit)} has shape {list(own[misfit].shape)} and is {there}); download it again, or do not trust it."
            )
    for name, tensor in state.items():
        if name in stored and tensor.is_floating_point() != stored[name]["dtype"].startswith(("F", "BF")) and not tensor.is_complex():
            wanted = "floating point numbers" if tensor.is_floating_point() else "integers"
            raise LoadingError(f"{file}: {name} has dtype {stored[name]['dtype']} where {wanted} are expected; download or save it again.")
    return model


def _can_be_filled(model: Any, folder: Path, files: Sequence[Path], dtype: Any) -> bool:
    """Whether a network on the meta device needs nothing but the tensors of its files to be whole.

    That is so for a class of diffusers whose files hold exactly its state and which keeps no other tensors: it need not be built twice. Of
    transformers' classes it is known for CLIP's text towers, whose one other tensor counts the positions.
    """
    import torch

    cls = type(model)
    theirs = cls.__module__.startswith("diffusers.")
    if not theirs and cls.__name__ not in _COUNTERS or not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        return False
    if getattr(cls, "_keep_in_fp32_modules", None) and dtype != torch.float32:
        return False
    config = read_json(folder / "config.json", "download or save the component again.")
    if theirs and any(not key.startswith("_") and key not in inspect.signature(cls.__init__).parameters for key in config):
        return False  # diffusers has a word to say about such keys
    state = model.state_dict()
    stored = {name: entry for file in files for name, entry in read_header(file).items()}
    if any(entry["dtype"].startswith(("F8", "F6", "F4")) for entry in stored.values()):
        return False
    shapes = {name: entry["shape"] for name, entry in stored.items()}
    if {name: list(tensor.shape) for name, tensor in state.items()} != shapes:
        return False
    others = [name for name, _ in itertools.chain(model.named_parameters(), model.named_buffers()) if name not in state]
    if others != ([] if theirs else _COUNTERS[cls.__name__]):
        return False  # a buffer that is not stored was computed by the constructor
    return not any(_holds_tensor(value) for module in model.modules() for key, value in vars(module).items() if key not in _TABLES)


# the buffers of transformers' text towers that are not stored: 0, 1, 2, ... of shape (1, positions)
_COUNTERS = {"CLIPTextModel": ["embeddings.position_ids"], "CLIPTextModelWithProjection": ["text_model.embeddings.position_ids"]}

# where a module keeps what `named_parameters`, `named_buffers` and `modules` go through
_TABLES = ("_parameters", "_buffers", "_modules")


def _holds_tensor(value: Any) -> bool:
    import torch

    if type(value) is dict:
        return any(map(_holds_tensor, value.values()))
    return any(map(_holds_tensor, value)) if type(value) in (list, tuple) else isinstance(value, torch.Tensor)


def _filled(model: Any, folder: Path, files: Sequence[Path], dtype: Any) -> Any:
    """The network with the tensors of its files: mapped where they have its dtype, else read and converted one by one.

    A tensor that is mapped and then converted would be in memory twice until the file is closed; one that is read is not.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    kinds = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    state = {}
    for file in files:
        try:
            header = read_header(file)
            with safe_open(file, framework="pt") as mapped, file.open("rb") as stream:
                start = 8 + int.from_bytes(stream.read(8), "little")
                for name, entry in header.items():
                    kind = kinds.get(entry["dtype"])
                    first, last = entry["data_offsets"]
                    if kind is None or kind == dtype or first == last:
                        state[name] = mapped.get_tensor(name)
                    else:
                        stream.seek(start + first)
                        raw = bytearray(stream.read(last - first))
                        state[name] = torch.frombuffer(raw, dtype=kind).view(entry["shape"]).to(dtype)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise LoadingError(f"the weight file {file} cannot be read: {_line(error)}; download or save it again.") from error
    model.load_state_dict(state, strict=True, assign=True)
    if type(model).__name__ in _COUNTERS:
        for name in _COUNTERS[type(model).__name__]:
            module, _, buffer = name.rpartition(".")
            owner = model.get_submodule(module)
            counter = torch.arange(getattr(owner, buffer).shape[-1]).expand((1, -1))
            owner.register_buffer(buffer, counter, persistent=False)
        model.config.dtype = dtype
    else:
        model.register_to_config(_name_or_path=str(folder))
    return model.eval()


class _TooLarge(Exception):
    pass


def build_without_memory(cls: type, config: Mapping[str, Any], most_parameters: int) -> Any:
    """The network on the meta device: names and shapes, no numbers. `_TooLarge` as soon as it has more parameters than allowed."""
    import torch
    from torch.overrides import TorchFunctionMode

    fillers = {getattr(owner, name) for owner in (torch.Tensor, torch.nn.init) for name in _FILLERS if hasattr(owner, name)}

    class NoNumbers(TorchFunctionMode):
        """Leaves out what would fill tensors that have no memory, which is most of the time of a constructor."""

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if function in fillers and (args or "tensor" in kwargs):
                return args[0] if args else kwargs["tensor"]
            return function(*args, **kwargs)

    with torch.device("meta"), NoNumbers(), _quiet(), _limited(most_parameters):
        if hasattr(cls, "from_config"):
            return cls.from_config({key: value for key, value in config.items() if key != "_name_or_path"})
        return cls(cls.config_class.from_dict(dict(config)))


# functions that fill their first argument and return it
_FILLERS = ("uniform_", "normal_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "xavier_normal_", "zeros_",
            "ones_", "constant_", "zero_", "fill_")  # fmt: skip


@contextlib.contextmanager
def _limited(most_parameters: int) -> Iterator[None]:
    """`_TooLarge` as soon as this thread has given its networks more parameters than allowed."""
    from torch.nn.modules.module import register_module_parameter_registration_hook

    thread, count = threading.get_ident(), itertools.count(1)

    def limit(module: Any, name: str, parameter: Any) -> None:
        if threading.get_ident() == thread and parameter is not None and next(count) > most_parameters:
            raise _TooLarge("far more parameters than the files have tensors")

    hook = register_module_parameter_registration_hook(limit)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What the libraries log or warn of while a network is built is said when it is built for good."""
    import warnings

    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = [(library, library.get_verbosity()) for library in (diffusers_logging, transformers_logging)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for library, _ in before:
                library.set_verbosity(library.CRITICAL)
            yield
        finally:
            for library, verbosity in before:
                library.set_verbosity(verbosity)


@contextlib.contextmanager
def as_loading_error(what: str) -> Iterator[None]:
    """Whatever another library raises on a bad file becomes a LoadingError; what is not about files passes."""
    try:
        yield
    except (LoadingError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except ImportError as error:  # a package is missing, and the message says which
        raise LoadingError(f"{what} cannot be loaded: {_line(error)}.") from error
    except Exception as error:
        raise LoadingError(f"{what} cannot be loaded: {_line(error)}; its files do not fit: download or save it again.") from error
    except BaseException as error:  # a panic of a Rust extension
        if type(error).__name__ != "PanicException":
            raise
        raise LoadingError(f"{what} cannot be loaded: {_line(error)}; download or save it again.") from error


def _mismatches(folder: Path, cls: type, kwargs: dict[str, Any]) -> str:
    """The keys that do not fit; transformers prints them and leaves them out of its error, so they are asked for."""
    _, info = cls.from_pretrained(str(folder), ignore_mismatched_sizes=True, **kwargs)
    wrong = sorted(info["mismatched_keys"])
    return "; ".join(f"{key} has shape {tuple(there)} in the file and {tuple(wanted)} in the model" for key, there, wanted in wrong[:3])


def _pretrained_model() -> type:
    from transformers import PreTrainedModel

    return PreTrainedModel


def fetch_component(
    repo: str, subfolder: str = "", variant: str | None = None, weights: Sequence[str] = (_DEFAULT_STEM,), **hub: Any
) -> Path:
    """Fetches one network of a Hub repository into the cache and returns its folder: one commit, safetensors and configs only.

    Args:
        repo: a Hub id.
        subfolder: where in it.
        variant: fetched where it is there.
        weights: stems of weight files.
        hub: revision, token, cache_dir, force_download, local_files_only.
    Raises:
        OSError: the Hub cannot be reached or has no such repository.
    """
    from huggingface_hub import resolve_revision, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RevisionResolutionError

    where = {name: hub[name] for name in ("cache_dir", "local_files_only", "token") if hub.get(name) is not None}
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    kinds = [f".{variant}", ""] if variant else [""]
    patterns = [f"{prefix}config.json", *(f"{prefix}{stem}{kind}{end}" for stem in weights for kind in kinds for end in
                                          (".safetensors", "-*-of-*.safetensors")),
                *(f"{prefix}{stem}.safetensors.index{kind}.json" for stem in weights for kind in kinds)]  # fmt: skip
    try:
        revision = resolve_revision(repo, revision=hub.get("revision"), **where)
        options = {**where, "force_download": bool(hub.get("force_download"))}
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, **options), subfolder)
    except HFValidationError as error:
        raise LoadingError(f"{repo!r} is neither a folder that exists nor a Hub id such as 'user/name'.") from error
    except (HfHubHTTPError, OfflineModeIsEnabled, RevisionResolutionError, OSError) as error:
        at = f" at revision {hub['revision']!r}" if hub.get("revision") else ""
        raise OSError(f"{repo!r} is not a folder here and could not be fetched from the Hub{at}: {hub_reason(error)}") from error


def hub_reason(error: BaseException) -> str:
    """Why the Hub does not give a repository, in one line: of one that there is not it says "401 Client Error" to who is not logged in."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):  # before the class that it is derived from
        return "its authors ask for an agreement: accept it on the repository's page, and log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, or it is private and this token may not see it (`hf auth login`)"
    if isinstance(error, RevisionNotFoundError):
        return "the repository has no such branch, tag or commit"
    return _line(error)


def _line(error: BaseException) -> str:
    """An error's message as one line of bounded length."""
    text = " ".join(str(error).split(" If you want to instead")[0].split()).rstrip(".")
    return _short(text, 400) if text else type(error).__name__


def _short(value: Any, most: int = 120) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= most else f"{text[:most]}..."
