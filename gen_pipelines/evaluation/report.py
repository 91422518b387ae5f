"""An evaluation in a model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..hub.card import CARD_NAME, is_untouched, read_text, stamped, with_evaluation


def write_card(folder: Path, result: Mapping[str, Any]) -> str:
    """Puts an evaluation into the card of a folder: a table in the text, the Hub's model-index in the metadata.

    What a person wrote stays as it is beside it. Returns: the card's path.
    Raises:
        FileNotFoundError: the folder has no card.
    """
    file = folder / CARD_NAME
    if not file.is_file():
        raise FileNotFoundError(f"{file}: there is no model card; save the pipeline with save_pretrained, or push it, and one is written.")
    text = read_text(file)
    told = with_evaluation(text, result)
    file.write_text(stamped(told) if is_untouched(text) else told, encoding="utf-8")
    return str(file)
