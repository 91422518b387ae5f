"""The numbers of `gen-pipelines evaluate` in the words of a model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
