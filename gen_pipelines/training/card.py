"""What a model card says about a training run."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ..hub.card import CARD_NAME, is_untouched, read_text, stamped, with_evaluation_of, with_facts
from .config import to_dict

_PRECISION = {"no": "in float32", "bf16": "under bfloat16 autocast", "fp16": "under float16 autocast"}


def training_notes(recipe: Any, facts: dict[str, Any]) -> str:
    """The card's sections on data, training and measurements, in Markdown.

    Args:
        recipe: the run's `Recipe`; its `card` may give `about`, `data`, `limits`.
        facts: steps, seconds, hardware, and whatever was measured.
    """
    card = recipe.card
    minutes = facts["seconds"] / 60
    lines: list[str] = []
    if card.about:
        lines += [card.about.strip(), ""]
    lines += ["## Data", "", (card.data or f"`{recipe.data.name}`, split `{recipe.data.split}`.").strip(), ""]
    lines += [
        "## Training",
        "",
        f"{facts['steps']} steps of {recipe.loop.batch_size} samples in {minutes:.0f} minutes on {facts['hardware']}, "
        f"{_PRECISION[recipe.loop.mixed_precision]}, with the trainer of gen_pipelines.",
        "",
    ]
    measured = {key: value for key, value in facts.items() if key not in ("steps", "seconds", "hardware")}
    if measured:
        lines += ["## Measured", "", "| what | value |", "|---|---|", *(f"| {key} | {value} |" for key, value in measured.items()), ""]
    if card.limits:
        lines += ["## Limits", "", card.limits.strip(), ""]
    settings = {key: value for key, value in to_dict(recipe).items() if key != "card"}
    lines += ["## Recipe", "", "```yaml", yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).rstrip(), "```"]
    return "\n".join(lines)


def drop_outdated_card(folder: Path) -> None:
    """Removes the generated card of an earlier end of this run, whose steps and numbers are of other weights; an edited one stays."""
    file = folder / CARD_NAME
    if file.is_file() and is_untouched(read_text(file)):
        file.unlink()


def complete_card(folder: Path, recipe: Any) -> None:
    """Adds to a generated card what only the run knows: data set and base model by their Hub names, the newest sample grid, measurements.

    The grid is copied to `samples.png` in the folder. A card that a person wrote or edited stays as it is.
    """
    file = folder / CARD_NAME
    if not file.is_file() or not is_untouched(text := read_text(file)):
        return
    grids = sorted((folder / "samples").glob("step-*.png"))
    if grids:
        shutil.copyfile(grids[-1], folder / "samples.png")
    data = [recipe.data.name] if _on_the_hub(recipe.data.name) else []
    bases = [name for name in _sources(dict(recipe.model)) if _on_the_hub(name) and "/" in name]
    text = with_facts(text, datasets=data, base_model=bases[0] if bases else None, samples=["samples.png"] if grids else [])
    file.write_text(stamped(with_evaluation_of(text, folder)), encoding="utf-8")


def _sources(settings: Any) -> Iterator[str]:
    """Where the recipe's networks come from."""
    if isinstance(settings, dict):
        for key, value in settings.items():
            if key == "from" and isinstance(value, str):
                yield value
            else:
                yield from _sources(value)


def _on_the_hub(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not name.startswith(".") and not Path(name).exists()
