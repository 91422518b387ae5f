"""Small pipelines trained by this project and shipped in the wheel."""

from pathlib import Path

BUNDLED = "bundled:"  # what a name begins with where a folder or a Hub id may stand

_ROOT = Path(__file__).parent


def bundled_names() -> list[str]:
    """The names that `bundled_path` and `from_pretrained("bundled:NAME")` take."""
    return sorted(index.parent.name for index in _ROOT.glob("*/model_index.json"))


def bundled_networks() -> list[str]:
    """The names of single networks that `bundled_path` takes beside those of pipelines."""
    return sorted(config.parent.name for config in _ROOT.glob("*/config.json"))


def bundled_path(name: str) -> str:
    """The folder of a pipeline, or of a single network, that is shipped in this package.

    Args:
        name: one of `bundled_names()`, for example "emoji"; or "mnist-classifier", the network whose features evaluations use.
    Returns: an absolute path in the Hub's layout, for any `from_pretrained`.
    Raises:
        ValueError: no such pipeline or network; the message lists the pipelines that exist.
    """
    if name not in bundled_names() and name not in bundled_networks():
        raise ValueError(f"bundled_path: no bundled pipeline {name!r}; this version has {', '.join(bundled_names()) or 'none'}.")
    return str(_ROOT / name)
