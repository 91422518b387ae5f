"""Reading pipeline folders safely: what is wrong with a folder or a weight file is said before anything is built from it."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

INDEX_NAME = "model_index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

# the stem of the weight file, by the library of the component
_WEIGHT_STEM = {"transformers": "model", "latent_diffusion": "model"}
_DEFAULT_STEM = "diffusion_pytorch_model"


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """A JSON object from a file, or a ValueError that names the file and the remedy."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; {remedy}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); {remedy}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__} where an object is expected; {remedy}")
    return value


def read_index(folder: str | Path) -> dict[str, Any]:
    """The `model_index.json` of a pipeline folder.

    Raises:
        ValueError: the folder does not exist or is no pipeline.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; pass the folder that save_pretrained(...) wrote, or a Hub id such as 'user/name'.")
    if not (folder / INDEX_NAME).is_file():
        content = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise ValueError(
            f"{folder} is no pipeline: it has no {INDEX_NAME} (it holds: {content}); pass the folder that save_pretrained(...) wrote."
        )
    index = read_json(folder / INDEX_NAME, "save or download the pipeline again.")
    if "_class_name" not in index:
        raise ValueError(f"{folder / INDEX_NAME} names no pipeline class (_class_name); save or download the pipeline again.")
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


def check_safetensors(path: Path) -> None:
    """Checks that a weight file is whole by its header alone; no tensor is read.

    Raises:
        ValueError: it is missing, cut short, a Git LFS pointer, or not safetensors; the message names the file and the remedy.
    """
    remedy = "download or save it again."
    if not path.is_file():
        raise ValueError(f"the weight file {path} is missing; {remedy}")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start.startswith(b"version "):
            raise ValueError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` in that folder.")
        if len(start) < 8:
            raise ValueError(f"the weight file {path} is cut short: {size} bytes; {remedy}")
        length = int.from_bytes(start, "little")
        if length > 100_000_000:
            raise ValueError(f"{path} is not a safetensors file; {remedy}")
        if size < 8 + length:
            raise ValueError(f"the weight file {path} is cut short: {size} bytes where its header alone takes {8 + length}; {remedy}")
        try:
            header = json.loads(file.read(length))
            end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError):
            raise ValueError(f"{path} is not a safetensors file: its header cannot be read; {remedy}") from None
    if size != 8 + length + end:
        state = "cut short" if size < 8 + length + end else "longer than its header says"
        raise ValueError(f"the weight file {path} is {state}: {size} bytes where its header promises {8 + length + end}; {remedy}")


def weight_files(folder: Path, library: str, variant: str | None = None) -> list[Path]:
    """The weight files of a component's folder, shards and their index included; the variant where it exists, else the plain ones.

    Raises:
        ValueError: there are none; the message says so if only pickles are there.
    """
    stem = _WEIGHT_STEM.get(library, _DEFAULT_STEM)
    for name in ([f"{stem}.{variant}"] if variant else []) + [stem]:
        single, sharded = folder / f"{name}.safetensors", folder / f"{stem}.safetensors.index{name[len(stem) :]}.json"
        if sharded.is_file():
            shards = read_json(sharded, "download or save the component again.").get("weight_map", {})
            return [folder / shard for shard in sorted(set(shards.values()))]
        if single.is_file():
            return [single]
    pickles = sorted(p.name for p in folder.glob("*") if p.suffix in PICKLES)
    if pickles:
        raise ValueError(
            f"{folder} holds pickled weights only ({', '.join(pickles)}), which may run code; convert them to safetensors first."
        )
    raise ValueError(f"the weight file {folder / (stem + '.safetensors')} is missing; download or save the component again.")


def component_class(library: str, name: str) -> type | None:
    """The class of a component of diffusers, transformers or this library; None where diffusers itself must find it."""
    if library == "latent_diffusion":  # a folder of diffusers.pipelines, where latent diffusion's BERT lives
        return getattr(importlib.import_module("diffusers.pipelines.latent_diffusion"), name, None)
    if library.split(".")[0] not in ("diffusers", "transformers", "gen_pipelines"):
        return None
    return getattr(importlib.import_module(library), name, None)


def load_module(folder: Path, library: str, cls: type, dtype: Any, variant: str | None = None, **kwargs: Any) -> Any:
    """Loads one network of a pipeline, strictly: safetensors only, every key there, every shape right.

    Args:
        folder: the component's folder.
        library, cls: what `model_index.json` records of it.
        dtype: the dtype of its parameters.
        variant: taken where the component has it.
        kwargs: passed to `cls.from_pretrained`.
    Raises:
        ValueError: a file or key is missing, cut short or of the wrong shape; the message names it and the remedy.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"the component folder {folder} has no config.json; download or save the pipeline again.")
    files = weight_files(folder, library, variant)
    for file in files:
        check_safetensors(file)
    stem = _WEIGHT_STEM.get(library, _DEFAULT_STEM)
    kwargs = {**kwargs, "variant": variant} if variant and f".{variant}" in files[0].name[len(stem) :] else kwargs
    kwargs = {"use_safetensors": True, "output_loading_info": True, "dtype": dtype, **kwargs}
    where = f"{folder} ({cls.__name__})"
    try:
        model, info = cls.from_pretrained(str(folder), **kwargs)
    except (ValueError, RuntimeError, OSError) as error:
        raise ValueError(
            f"{where} cannot be loaded: {_reason(folder, cls, kwargs, error)}; the weights do not fit its config.json."
        ) from error
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(f"{files[0]} has no weights for {', '.join(missing[:3])}{more} of {cls.__name__}; download or save it again.")
    return model


def _reason(folder: Path, cls: type, kwargs: dict[str, Any], error: Exception) -> str:
    """Why a network did not load; transformers prints the keys that do not fit and leaves them out of its error, so they are asked for."""
    if "ignore_mismatched_sizes" in str(error) and issubclass(cls, _pretrained_model()):
        _, info = cls.from_pretrained(str(folder), ignore_mismatched_sizes=True, **kwargs)
        if wrong := sorted(info["mismatched_keys"]):
            return "; ".join(
                f"{key} has shape {tuple(there)} in the file and {tuple(wanted)} in the model" for key, there, wanted in wrong[:3]
            )
    return str(error).split(" If you want to instead")[0].strip().rstrip(".")


def _pretrained_model() -> type:
    from transformers import PreTrainedModel

    return PreTrainedModel
