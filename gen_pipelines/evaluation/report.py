"""An evaluation in the words of a model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..hub.card import CARD_NAME, is_untouched, stamped, with_evaluation

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


def for_card(result: Mapping[str, Any]) -> dict[str, Any]:
    """The evaluation with the names, and as many digits, as a card has."""
    extractor = result["protocol"]["extractor"]
    known = {name: result["metrics"][name] for name in TITLES if result["metrics"].get(name) is not None}
    metrics = {title(name, extractor): float(f"{value:.4g}") for name, value in known.items()}
    if metrics and result["counts"]["not_finite"]:
        metrics["pictures that are not finite"] = result["counts"]["not_finite"]
    shown = ("extractor", "split", "num", "seed", "held_out")
    settings = {name: value for name, value in result["sampling"].items() if value is not None and name != "pipeline"}
    protocol = settings | {name: result["protocol"][name] for name in shown}
    return {"metrics": metrics, "protocol": protocol, "dataset": result["dataset"], "split": result["split"], "model": result["model"]}


def write_card(folder: Path, result: Mapping[str, Any]) -> str:
    """Puts an evaluation into the card of a folder: a table in the text, the Hub's model-index in the metadata.

    What a person wrote stays as it is beside it. Returns: the card's path.
    Raises:
        FileNotFoundError: the folder has no card.
    """
    file = folder / CARD_NAME
    if not file.is_file():
        raise FileNotFoundError(f"{file}: there is no model card; save the pipeline with save_pretrained, or push it, and one is written.")
    text = file.read_text(encoding="utf-8")
    told = with_evaluation(text, for_card(result))
    file.write_text(stamped(told) if is_untouched(text) else told, encoding="utf-8")
    return str(file)
