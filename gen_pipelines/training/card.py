"""What a model card says about a training run."""

from __future__ import annotations

from typing import Any

import yaml

from .config import to_dict


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
        f"precision {recipe.loop.mixed_precision}, with the trainer of gen_pipelines.",
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
