"""Finished pipelines that a training starts from or learns from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def load_teacher(source: Any, where: str, kind: str = "DiffusionImagePipeline") -> Any:
    """A pipeline from a folder, a repository of the Hub or a bundled name, frozen, in float32.

    Raises:
        ValueError: there is none, or one of another kind than `kind`.
        OSError: neither a folder nor a repository of the Hub.
    """
    import gen_pipelines

    if not isinstance(source, str):
        raise ValueError(f"{where}: give a folder, a repository of the Hub or bundled:NAME; got {source!r}.")
    try:
        pipe = gen_pipelines.AutoPipeline.from_pretrained(source, dtype=torch.float32)
    except (OSError, ValueError) as error:
        if Path(source).exists():
            raise ValueError(f"{where}: {error}") from error
        raise FileNotFoundError(f"{where}: {_made_by(source) or error}") from error
    if type(pipe).__name__ != kind:
        raise ValueError(f"{where}: {source} is a {type(pipe).__name__}; this task learns from a {kind}.")
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _made_by(source: str) -> str | None:
    """The command that makes a folder of a recipe in configs/, by how those are named: runs/mnist-flow is of configs/mnist/flow.yaml."""
    family, _, name = Path(source).name.partition("-")
    if Path(source).parent.name != "runs" or not name:
        return None
    command = f"gen-pipelines train configs/{family}/{name}.yaml --output-dir {source}"
    return f"there is no folder {source}; make it with `{command}`, or name another model."
