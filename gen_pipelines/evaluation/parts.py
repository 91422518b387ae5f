"""Results of single batches on the disk: what a killed evaluation goes on from, and how several processes hand theirs in."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


class Parts:
    """A folder of named results; each is written at once or not at all.

    Args:
        folder: beside the result, one per `settings`: those of other settings are never read.
        settings: everything that the results depend on, in plain values.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.key = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
        self.root, self.folder = folder, folder / self.key[:16]

    def prepare(self) -> None:
        """Makes the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)

    def has(self, name: str) -> bool:
        """Whether there is a result of this name."""
        return (self.folder / name).is_file()

    def write(self, name: str, facts: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> None:
        """A result: plain values, and tensors."""
        file, unfinished = self.folder / name, self.folder / f".{name}.{os.getpid()}"
        own = {key: value.clone(memory_format=torch.contiguous_format) for key, value in (tensors or {}).items()}
        save_file(own, unfinished, metadata={"facts": json.dumps(facts)})
        os.replace(unfinished, file)

    def read(self, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What `write` was given."""
        with safe_open(self.folder / name, "pt") as file:
            return json.loads(file.metadata()["facts"]), {key: file.get_tensor(key) for key in file.keys()}

    def remove(self) -> None:
        """Removes these results, and the folder if no others are in it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.root.is_dir() and not any(self.root.iterdir()):
            self.root.rmdir()
