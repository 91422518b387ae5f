"""The numbers of `gen-pipelines evaluate` in the words of a model card."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .loading import INDEX_NAME, components_of, read_index, weight_files

TITLES = {
    "frechet_distance": "Fréchet distance",
    "frechet_distance_over_real": "Fréchet distance over that of real pictures",
    "kernel_distance": "kernel distance",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "class_entropy_over_data": "entropy of the classes over the data's",
    "class_accuracy": "pictures recognised as the class asked for",
    "near_copies": "pictures nearer to a training picture than 99 % of real ones are",
    "bits_per_dim": "bits per dimension",
    "straightness": "straightness (0 is straight)",
    "transport_cost": "transport cost",
}


def title(name: str, extractor: str) -> str:
    """What a metric is called; a distance never without whose features it is of."""
    if extractor == "inception":
        return {"frechet_distance": "FID", "kernel_distance": "KID"}.get(name, TITLES[name])
    return f"{TITLES[name]} ({extractor} features)" if name in ("frechet_distance", "kernel_distance") else TITLES[name]


def is_evaluation(content: Mapping[str, Any]) -> bool:
    """Whether an `evaluation.json` was written by `gen-pipelines evaluate`: it may also be anybody's table of numbers."""
    return all(isinstance(content.get(part), Mapping) for part in ("metrics", "protocol", "sampling", "counts")) and "format" in content


def is_of_weights(evaluation: Mapping[str, Any], folder: str | Path) -> bool:
    """Whether an evaluation is of the weights that lie in a pipeline's folder; one that does not say whose it is, is taken to be.

    The files are hashed; the pipeline is loaded only if they are not, as they lie there, what the evaluation records.
    """
    folder, recorded = Path(folder), evaluation.get("weights")
    if not isinstance(recorded, str) or not (folder / INDEX_NAME).is_file():
        return True
    if recorded in (_hash_of_files(folder), _hash_of_files(folder, as_float=True)):  # half precision is loaded as float32
        return True
    import gen_pipelines

    try:  # older layouts name their tensors otherwise than the network that they are loaded into, and tied ones are stored once
        return weights_hash(gen_pipelines.AutoPipeline.from_pretrained(str(folder))) == recorded
    except (ImportError, OSError, ValueError):
        return False


def networks_of(pipe: Any) -> dict[str, Any]:
    """The pipeline's networks by name."""
    from torch import nn

    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def weights_hash(pipe: Any) -> str:
    """SHA-256 over every tensor of every network, by name: what tells these weights from any others, wherever they were loaded from."""
    networks = sorted(networks_of(pipe).items())
    return _tensors_hash((f"{name}.{key}", value) for name, network in networks for key, value in sorted(network.state_dict().items()))


def _tensors_hash(tensors: Iterable[tuple[str, Any]]) -> str:
    """SHA-256 over named tensors, in the order that they come in."""
    import torch

    whole = hashlib.sha256()
    for name, value in tensors:
        whole.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        whole.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return f"sha256:{whole.hexdigest()}"


def _hash_of_files(folder: Path, as_float: bool = False) -> str:
    """The hash that an evaluation records, of a folder's weight files, one tensor in memory at a time."""
    from safetensors import safe_open

    def tensors() -> Iterable[tuple[str, Any]]:
        for name, (library, _) in sorted(components_of(read_index(folder)).items()):
            if not any((folder / name).glob("*.safetensors")):
                continue  # a scheduler, a tokenizer
            files = [safe_open(file, framework="pt") for file in weight_files(folder / name, library)]
            holders = {key: file for file in files for key in file.keys()}
            for key in sorted(holders):
                value = holders[key].get_tensor(key)
                yield f"{name}.{key}", value.float() if as_float and value.is_floating_point() else value

    return _tensors_hash(tensors())


def for_card(result: Mapping[str, Any]) -> dict[str, Any]:
    """The evaluation with the names, and as many digits, as a card has."""
    extractor = result["protocol"]["extractor"]
    known = {name: result["metrics"][name] for name in TITLES if result["metrics"].get(name) is not None}
    metrics = {title(name, extractor): float(f"{value:.4g}") for name, value in known.items()}
    if (kind := (result.get("likelihood") or {}).get("kind")) and TITLES["bits_per_dim"] in metrics:
        metrics[f"{TITLES['bits_per_dim']} ({kind})"] = metrics.pop(TITLES["bits_per_dim"])
    if metrics and result["counts"]["not_finite"]:
        metrics["pictures that are not finite"] = result["counts"]["not_finite"]
    shown = ("extractor", "split", "num", "seed", "held_out")
    settings = {name: value for name, value in result["sampling"].items() if value is not None and name != "pipeline"}
    protocol = settings | {name: result["protocol"][name] for name in shown}
    return {"metrics": metrics, "protocol": protocol, "dataset": result["dataset"], "split": result["split"], "model": result["model"]}
