"""Finished pipelines that a training starts from or learns from."""

from __future__ import annotations

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
    pipe = gen_pipelines.AutoPipeline.from_pretrained(source, dtype=torch.float32)
    if type(pipe).__name__ != kind:
        raise ValueError(f"{where}: {source} is a {type(pipe).__name__}; this task learns from a {kind}.")
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe
