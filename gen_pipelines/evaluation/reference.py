"""The real pictures that a model is measured against, and those that stand beside it: real ones that it is not measured against."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..training.config import DataConfig
from ..training.data import NoSuchSplitError, PictureData, holds_pictures, load_rows, open_split
from ..training.random import seed_of
from .extractors import Extractor
from .parts import Parts

logger = logging.getLogger(__name__)

THUMBNAIL = 32  # pixels a side in which pictures are compared with each other; larger ones are averaged down to at most this
# what a user of `evaluate` calls the settings of the data
NAMES = {"name": "--dataset", "image_column": "--image-column", "text_column": "--text-column", "label_column": "--label-column"}


@dataclasses.dataclass
class Measured:
    """What is kept of N pictures.

    Attributes:
        features: (N, D), float32.
        thumbnails: uint8 (N, C, h, w), at most 32 x 32.
        classes: what the extractor takes them for, (N,); None where it is no classifier.
    """

    features: Tensor
    thumbnails: Tensor
    classes: Tensor | None

    def tensors(self, name: str) -> dict[str, Tensor]:
        """As a table of tensors, each key beginning with `name`."""
        fields = {"features": self.features, "thumbnails": self.thumbnails, "classes": self.classes}
        return {f"{name}.{key}": value for key, value in fields.items() if value is not None}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], name: str) -> Measured:
        """What `tensors` gave."""
        return cls(tensors[f"{name}.features"], tensors[f"{name}.thumbnails"], tensors.get(f"{name}.classes"))


@dataclasses.dataclass
class Reference:
    """Two disjoint sets of real pictures of a data set, opened but not yet measured.

    Attributes:
        name, split: what was opened; of a folder its last part.
        reference: the pictures that a model is measured against.
        held_out: real pictures beside it: what distance real pictures have, and what likelihoods are of.
        held_out_name: which they are.
        classes: the labels that both are restricted to; None for all.
    """

    name: str
    split: str
    reference: PictureData
    held_out: PictureData
    held_out_name: str
    classes: tuple[int, ...] | None
    _measured: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    @classmethod
    def open(
        cls,
        name: str,
        split: str = "train",
        held_out_split: str | None = None,
        *,
        resolution: int,
        channels: int,
        image_column: str | None = None,
        label_column: str | None = None,
        text_column: str | None = None,
        background: str = "white",
        classes: Sequence[int] | None = None,
    ) -> Reference:
        """Opens a data set.

        Args:
            name: a Hub data set or a folder, as in a recipe's `data.name`.
            split: the pictures to measure against.
            held_out_split: other real pictures. None: the split "test" (or "validation") where there is one besides `split`; else a sixth
                of `split`, at most 10,000 rows, chosen at random and not measured against.
            resolution, channels: as the model draws them; larger pictures are resized with antialiasing and cropped.
            image_column: None: "image", or else the only column of pictures.
            label_column: None: "label", where there is such a column of whole numbers.
            text_column: captions, for models that draw from prompts.
            background: the colour under transparent pixels.
            classes: only pictures of these labels.
        Raises:
            ValueError: no such data set, split or column, or no picture of a class; the message lists what there is.
        """
        image_column = image_column or _first_column(name, split)
        if label_column is None and _is_number(load_rows(DataConfig(name, split, image_column), NAMES), "label"):
            label_column = "label"
        config = DataConfig(
            name, split, image_column, text_column, label_column, resolution=resolution, channels=channels, background=background
        )
        if classes is not None and label_column is None:
            raise ValueError(f"classes: {name} has no column of labels; name it (--label-column).")
        rows = load_rows(config, NAMES)
        others = None
        if held_out_split is not None:
            if held_out_split == split:
                raise ValueError(f"held_out_split: it is the split {split!r} itself; real pictures beside it must be others.")
            others = load_rows(dataclasses.replace(config, split=held_out_split), NAMES)
        else:
            for candidate in ("test", "validation", "train"):
                if candidate != split and (others := _try(dataclasses.replace(config, split=candidate))) is not None:
                    held_out_split = candidate
                    break
        if others is None:
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
            count = min(10_000, max(1, len(rows) // 6))
            held, kept = sorted(order[:count]), sorted(order[count:])
            held_rows, held_name = rows, f"{count} rows of {split}"
        else:
            held, kept, held_rows, held_name = list(range(len(others))), list(range(len(rows))), others, held_out_split
        if classes is not None:
            kept, held = _of_classes(rows, label_column, kept, classes), _of_classes(held_rows, label_column, held, classes)
        make = lambda source, indices, part: PictureData(
            source, dataclasses.replace(config, split=part), indices, augmented=False, names=NAMES
        )
        reference, held_out = make(rows, kept, split), make(held_rows, held, held_out_split or split)
        short = Path(name).expanduser().resolve().name if Path(name).expanduser().is_dir() else name
        return cls(short, split, reference, held_out, str(held_name), None if classes is None else tuple(sorted(set(classes))))

    def labels(self, count: int, seed: int) -> list[int] | None:
        """Labels in the proportions of the reference pictures, each as that of a random row; None where there is no column of labels."""
        if self.reference.labels is None:
            return None
        generator = torch.Generator().manual_seed(seed_of(seed, "sampling", 1))
        rows = torch.randint(len(self.reference), (count,), generator=generator).tolist()
        return [self.reference.labels[row] for row in rows]

    def captions(self, count: int) -> list[str] | None:
        """The captions of the held-out pictures, from the first, repeated if there are not enough; None without a text column."""
        texts = self.held_out.texts
        return None if texts is None else [texts[i % len(texts)] for i in range(count)]

    def held_out_rows(self, count: int, seed: int) -> list[int]:
        """`count` of the held-out pictures at random, or all of them."""
        generator = torch.Generator().manual_seed(seed_of(seed, "sampling", 2))
        return torch.randperm(len(self.held_out), generator=generator)[:count].tolist()

    def measure(self, extractor: Extractor, progress: Callable[[int], Any] = lambda count: None) -> tuple[Measured, Measured, str]:
        """What is kept of the reference and of the held-out pictures, and the SHA-256 of the reference's pixels.

        It is computed once per extractor and data set, and kept in `GEN_PIPELINES_CACHE` (by default ~/.cache/gen_pipelines).

        Args:
            progress: told how many pictures have been done since it was told last.
        """
        if extractor.hash not in self._measured:
            kept = Parts(cache_folder() / "references", self._settings(extractor))
            if not kept.has("real"):
                digest = hashlib.sha256()
                reference = measure_pictures(self.reference, extractor, progress, digest.update)
                held_out = measure_pictures(self.held_out, extractor, progress)
                self._measured[extractor.hash] = found = (reference, held_out, f"sha256:{digest.hexdigest()}")
                try:
                    kept.prepare()
                    kept.write("real", {"hash": found[2]}, {**reference.tensors("reference"), **held_out.tensors("held_out")})
                except OSError as error:  # a cache that cannot be written costs time, no more
                    logger.info("the features of the data are not kept for the next evaluation: %s", error)
            else:
                facts, tensors = kept.read("real")
                parts = [Measured.from_tensors(tensors, name) for name in ("reference", "held_out")]
                self._measured[extractor.hash] = (*parts, facts["hash"])
        return self._measured[extractor.hash]

    def _settings(self, extractor: Extractor) -> dict[str, Any]:
        """Everything that the kept features depend on."""
        sets = [[data.rows._fingerprint, data.config.split, data.indices, str(data.config)] for data in (self.reference, self.held_out)]
        return {"extractor": extractor.hash, "resizer": extractor.resizer, "sets": sets, "thumbnail": THUMBNAIL, "torch": torch.__version__}

    def __len__(self) -> int:
        return len(self.reference) + len(self.held_out)


def measure_pictures(
    data: PictureData,
    extractor: Extractor,
    progress: Callable[[int], Any] = lambda count: None,
    on_bytes: Callable[[bytes], Any] = lambda data: None,
    batch_size: int = 250,
) -> Measured:
    """Features and the rest of every picture of a data set, in batches."""
    parts: list[Measured] = []
    for first in range(0, len(data), batch_size):
        pictures = torch.stack([data.picture(item) for item in range(first, min(first + batch_size, len(data)))])
        on_bytes(pictures.numpy().tobytes())
        parts.append(keep(pictures, extractor))
        progress(len(pictures))
    classes = None if parts[0].classes is None else torch.cat([part.classes for part in parts])
    return Measured(torch.cat([part.features for part in parts]), torch.cat([part.thumbnails for part in parts]), classes)


def keep(pictures: Tensor, extractor: Extractor) -> Measured:
    """What is kept of uint8 pictures (B, C, H, W)."""
    features, logits = extractor(pictures)
    return Measured(features, thumbnails(pictures), None if logits is None else logits.argmax(1))


def thumbnails(pictures: Tensor) -> Tensor:
    """uint8 pictures averaged down to at most 32 x 32; smaller ones as they are."""
    if max(pictures.shape[2:]) <= THUMBNAIL:
        return pictures
    size = [min(THUMBNAIL, side) for side in pictures.shape[2:]]
    return torch.nn.functional.interpolate(pictures.float(), size=size, mode="area").round().to(torch.uint8)


def cache_folder() -> Path:
    """Where what is costly to compute, and the same each time, is kept."""
    return Path(os.environ.get("GEN_PIPELINES_CACHE", "~/.cache/gen_pipelines")).expanduser()


def _first_column(name: str, split: str) -> str:
    """"image", or the first column that holds pictures."""
    rows = open_split(DataConfig(name, split), NAMES)
    pictures = [column for column, kind in (rows.features or {}).items() if holds_pictures(kind)]
    return "image" if "image" in (rows.column_names or ()) or not pictures else pictures[0]


def _is_number(rows: Any, column: str) -> bool:
    """Whether a column holds whole numbers, as labels are."""
    kind = (rows.features or {}).get(column)
    return str(getattr(kind, "dtype", "")).startswith(("int", "uint"))


def _try(config: DataConfig) -> Any:
    """A split's rows, None where there is no such split."""
    try:
        return load_rows(config, NAMES)
    except NoSuchSplitError:
        return None


def _of_classes(rows: Any, column: str | None, indices: list[int], classes: Sequence[int]) -> list[int]:
    labels = rows[column]
    found = [row for row in indices if labels[row] in set(classes)]
    if missing := sorted(set(classes) - {labels[row] for row in found}):
        raise ValueError(f"classes: no picture has the label {missing[0]}; there are {', '.join(map(str, sorted(set(labels))))}.")
    return found
