"""A model's folder, here or on the Hub, read without loading its weights."""

from __future__ import annotations

import hashlib
import json
import math
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from gen_pipelines.hub.card import read_text
from gen_pipelines.hub.loading import check_safetensors, hub_reason
from gen_pipelines.hub.push import is_connection_error

Shapes = dict[str, list[int]]


class Repository(ABC):
    """The files of one model."""

    @staticmethod
    def open(model: str, revision: str | None = None) -> Repository:
        """Find a model, by the same rules as `AutoPipeline.from_pretrained`.

        Args:
            model: `bundled:NAME`, a folder, or an id on the Hub.
            revision: branch, tag or commit of a model on the Hub.
        Raises:
            ValueError: no such bundled pipeline, or a revision of what is not on the Hub.
            FileNotFoundError: neither a folder nor an id.
        """
        from gen_pipelines import bundled_path

        local = model.startswith("bundled:") or Path(model).is_dir()
        if local and revision is not None:
            raise ValueError(f"--revision {revision}: {model} is on this machine and has no revisions; they are for models on the Hub")
        if local:
            return Folder(Path(bundled_path(model.removeprefix("bundled:")) if model.startswith("bundled:") else model))
        if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not model.startswith((".", "~")):
            return HubRepository(model, revision)
        raise FileNotFoundError(f"{model}: no such folder, and not an id on the Hub (user/name) or a bundled pipeline (bundled:NAME)")

    @abstractmethod
    def files(self) -> list[str]:
        """Paths of all files, relative, with forward slashes, sorted."""

    @abstractmethod
    def text(self, file: str) -> str | None:
        """What a text file says, None if there is none of that name."""

    @abstractmethod
    def shapes(self, file: str) -> Shapes:
        """Names and shapes of the tensors in a safetensors file."""

    @abstractmethod
    def fingerprint(self) -> str:
        """What tells this revision of the model from any other."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The folder, or the id on the Hub."""

    def index(self) -> dict[str, Any]:
        """`model_index.json`.

        Raises:
            ValueError: there is none that says which pipeline this is.
        """
        index = self.json("model_index.json")
        if index is None or "_class_name" not in index:
            what = "it has no model_index.json" if index is None else "its model_index.json has no _class_name"
            raise ValueError(f"{self.name} is no pipeline: {what}; name a folder written by save_pretrained")
        return index

    def json(self, file: str) -> dict[str, Any] | None:
        text = self.text(file)
        if text is None:
            return None
        try:
            table = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is not JSON ({error}); the folder is damaged: save or download it again") from error
        if not isinstance(table, dict):
            raise ValueError(f"{file} is not a table of settings; the folder is damaged: save or download it again")
        return table


class Folder(Repository):
    """A model on this machine."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        return str(self.path)

    def files(self) -> list[str]:
        return sorted(file.relative_to(self.path).as_posix() for file in self.path.rglob("*") if file.is_file())

    def text(self, file: str) -> str | None:
        path = self.path / file
        return read_text(path) if path.is_file() else None

    def shapes(self, file: str) -> Shapes:
        return read_shapes(self.path / file)

    def fingerprint(self) -> str:
        """SHA-256 over what decides the pictures: every config, tokenizer and weight file (no card, evaluation or hidden file)."""
        whole = hashlib.sha256()
        for file in self.files():
            if re.fullmatch(r"evaluation[^/]*\.json", file):
                continue
            if file.endswith((".json", ".safetensors", ".txt", ".model")) and not any(part.startswith(".") for part in file.split("/")):
                with open(self.path / file, "rb") as stream:
                    whole.update(f"{file}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
        return f"sha256:{whole.hexdigest()[:32]}"


class HubRepository(Repository):
    """A model on the Hub, at one commit; only small files, and the headers of the weights, are fetched."""

    def __init__(self, repo: str, revision: str | None) -> None:
        from huggingface_hub import HfApi

        self.repo = repo
        self.api = HfApi(library_name="gen_pipelines")
        self._revision = revision
        self._files: list[str] | None = None

    @property
    def name(self) -> str:
        return self.repo

    def fingerprint(self) -> str:
        return self.commit

    @property
    def commit(self) -> str:
        self.files()
        return self._commit

    def files(self) -> list[str]:
        if self._files is None:
            try:
                info = self.api.model_info(self.repo, revision=self._revision)
                self._commit, self._files = info.sha, sorted(sibling.rfilename for sibling in info.siblings)
            except Exception as error:  # no network, or offline mode: what is in the cache will do
                if not isinstance(error, OSError) and not is_connection_error(error):
                    raise
                from huggingface_hub import snapshot_download
                from huggingface_hub.errors import LocalEntryNotFoundError

                try:
                    cached = Path(snapshot_download(self.repo, revision=self._revision, local_files_only=True))
                except LocalEntryNotFoundError:
                    raise FileNotFoundError(f"{self.repo}: no such folder, and the Hub does not give it: {hub_reason(error)}") from error
                self._commit, self._files = cached.name, Folder(cached).files()
        return self._files

    def text(self, file: str) -> str | None:
        if file not in self.files():
            return None
        return read_text(Path(self.api.hf_hub_download(self.repo, file, revision=self.commit)))

    def shapes(self, file: str) -> Shapes:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(self.repo, file, revision=self.commit)
        if isinstance(cached, str):
            return read_shapes(Path(cached))
        metadata = self.api.parse_safetensors_file_metadata(self.repo, file, revision=self.commit)
        return {name: tensor.shape for name, tensor in metadata.tensors.items()}


def read_shapes(path: Path) -> Shapes:
    """Names and shapes of the tensors in a safetensors file, from its header alone.

    The format: 8 bytes, the length of the header as a little-endian integer; the header, JSON; the tensors.
    Raises:
        ValueError: the file is cut short, or is not safetensors.
    """
    check_safetensors(path)
    with open(path, "rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return {name: list(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__"}


def count_parameters(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())
