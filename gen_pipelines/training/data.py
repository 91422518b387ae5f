"""Data sets as streams of batches whose order and augmentation depend on (seed, row, draw) alone.

A place in the data is one number, how many micro-batches of the whole run came before: nothing else has to be saved to resume
exactly, and any number of ranks sees the batches that one process would see.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps
from torch import Tensor

from .config import DataConfig
from .random import sample_generators, seed_of

_MEMORY_FOR_PICTURES = 2 * 1024**3  # bytes of decoded pictures that are kept, when they are decoded in the training process
_FINGERPRINTED = 64  # pictures whose files a data set is known by
_PICTURE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # of files that are cut off or no pictures
# how a recipe calls the settings of its data, in errors; `evaluate` has options of other names
RECIPE_NAMES = {name: f"data.{name}" for name in ("name", "image_column", "text_column", "label_column")}


class BadRowError(ValueError):
    """A row of a data set cannot be used; the message names it."""


class NoSuchSplitError(ValueError):
    """A data set, or its split, cannot be read."""


def open_split(config: DataConfig, names: Mapping[str, str] = RECIPE_NAMES) -> Any:
    """The split of the data set that a recipe names, whatever its columns: a `datasets.Dataset`, or `IterableDataset` when streaming.

    Raises:
        ImportError: the package datasets is missing.
        NoSuchSplitError: no such data set or split.
    """
    try:
        import datasets
    except ImportError:
        raise ImportError("training reads data with the package datasets: pip install 'gen-pipelines[train]'.") from None

    folder = Path(config.name).expanduser()
    if config.name.startswith((".", "/", "~")) and not folder.is_dir():
        raise ValueError(
            f"{names['name']}: the folder {config.name} does not exist; name one of parquet files or pictures, or a Hub data set."
        )
    try:
        if folder.is_dir() and (folder / "dataset_info.json").is_file():
            rows = datasets.load_from_disk(str(folder))
        elif folder.is_dir() and (folder / "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(str(folder))[config.split]
        else:
            rows = datasets.load_dataset(str(folder) if folder.is_dir() else config.name, split=config.split, streaming=config.streaming)
    except (FileNotFoundError, ConnectionError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise NoSuchSplitError(f"{names['name']}: cannot read the split {config.split!r} of {config.name!r}: {reason}") from None
    if config.streaming and isinstance(rows, datasets.Dataset):  # written by save_to_disk
        rows = rows.to_iterable_dataset()
    return rows


def load_rows(config: DataConfig, names: Mapping[str, str] = RECIPE_NAMES) -> Any:
    """`open_split`, with the columns that the recipe names.

    Args:
        names: what errors call the settings.
    Raises:
        ImportError, NoSuchSplitError: as there.
        ValueError: no such column, or no pictures in it; the message lists what there is.
    """
    rows = open_split(config, names)
    columns = list(rows.column_names or rows.features or [])
    for setting in ("image_column", "text_column", "label_column"):
        column = getattr(config, setting)
        if column is not None and column not in columns:
            optional = setting != "image_column" and names is RECIPE_NAMES
            rest = f" {names[setting]}=null does without, where the task can." if optional else ""
            raise ValueError(
                f"{names[setting]}: {config.name} ({config.split}) has no column {column!r}; its columns: {', '.join(columns)}.{rest}"
            )
    if rows.features is not None and not holds_pictures(kind := rows.features[config.image_column]):
        raise ValueError(f"{names['image_column']}: the column {config.image_column!r} of {config.name} holds {kind}, not pictures.")
    return rows


def holds_pictures(kind: Any) -> bool:
    """Whether a feature of a data set is a picture."""
    import datasets

    return isinstance(kind, datasets.Image)


def prepare_picture(picture: Image.Image, resolution: int, channels: int = 3, background: str = "white") -> Tensor:
    """A picture as a uint8 tensor of shape (channels, resolution, resolution).

    A camera's rotation is applied; 16-bit grey becomes 8-bit; transparency is laid on `background`; the shorter side is resized to
    `resolution` (Lanczos, antialiased), then the centre is cropped.

    Raises:
        ValueError: grey values that are neither 8-bit nor 16-bit, or may be either: their white is not known.
    """
    if picture is None:
        raise ValueError("there is no picture")
    picture = ImageOps.exif_transpose(picture)
    if picture.mode == "F" or picture.mode.startswith("I"):  # Pillow's own conversion cuts every value above 255 to white
        values = np.asarray(picture)
        # 32-bit values below 256 are an 8-bit picture in a wide type, or a nearly black one of 16 bits: taken for the wrong one, it is
        # black or overexposed. Mode I;16 says which.
        ambiguous = picture.mode == "I" and 0 < values.max() <= 255
        if picture.mode == "F" or values.min() < 0 or values.max() > 65535 or ambiguous:
            raise ValueError(
                f"a picture of mode {picture.mode} with values {values.min()} to {values.max()}, whose white is not known: save it with 8 "
                "or 16 bits (mode L or I;16)."
            )
        picture = Image.fromarray(np.round(values / 257).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        canvas = Image.new("RGBA", picture.size, (*ImageColor.getrgb(background)[:3], 255))
        picture = Image.alpha_composite(canvas, picture)
    picture = picture.convert("RGB" if channels == 3 else "L")
    scale = resolution / min(picture.size)
    if scale != 1:
        picture = picture.resize([max(resolution, round(side * scale)) for side in picture.size], Image.Resampling.LANCZOS)
    left, top = (picture.width - resolution) // 2, (picture.height - resolution) // 2
    picture = picture.crop((left, top, left + resolution, top + resolution))
    array = np.array(picture, dtype=np.uint8)
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())


def captions_of(rows: Any, config: DataConfig) -> list[str]:
    """The captions of a map-style data set; a row without one (null) has the empty caption.

    Raises:
        ValueError: the column holds something else than text.
    """
    return [_caption(text, config) for text in rows[config.text_column]]


def _caption(text: Any, config: DataConfig) -> str:
    if text is not None and not isinstance(text, str):
        raise ValueError(f"data.text_column: the column {config.text_column!r} of {config.name} holds a {type(text).__name__}, not text.")
    return text or ""


def _label(value: Any, row: int, config: DataConfig, names: Mapping[str, str] = RECIPE_NAMES) -> int:
    try:
        if isinstance(value, str) or int(value) == value:  # int alone cuts 0.5 to 0
            return int(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise BadRowError(
        f"{names['label_column']}: the column {config.label_column!r} of {config.name} ({config.split}) has {value!r} in row {row}; labels "
        "are whole numbers. Number the classes, or name another column."
    )


def _bad_picture(row: int, config: DataConfig, error: Exception, file: str | None = None) -> BadRowError:
    where = f" ({file})" if file else ""
    reason = " ".join(str(error).split()).rstrip(".")
    return BadRowError(f"row {row} of {config.name} ({config.split}){where}: {reason}. Mend the picture, or take the row out.")


def augment(picture: Tensor, horizontal_flip: float, shift: int, generator: torch.Generator) -> Tensor:
    """Mirror with a probability and move by at most `shift` pixels (edges repeated). Shape (C, H, W), dtype kept."""
    if horizontal_flip and torch.rand((), generator=generator).item() < horizontal_flip:
        picture = picture.flip(-1)
    if shift:
        down, right = (int(torch.randint(0, 2 * shift + 1, (), generator=generator)) for _ in range(2))
        height, width = picture.shape[-2:]
        padded = torch.nn.functional.pad(picture[None].float(), (shift,) * 4, mode="replicate")[0].to(picture.dtype)
        picture = padded[:, down : down + height, right : right + width]
    return picture


def caption_groups(captions: Sequence[str], pattern: str) -> list[list[int]]:
    """Positions of the captions that are equal once what the regular expression `pattern` matches is cut out, one list per group."""
    groups: dict[str, list[int]] = {}
    for position, caption in enumerate(captions):
        groups.setdefault(" ".join(re.sub(pattern, " ", caption).split()), []).append(position)
    return list(groups.values())


def known_words_holdout(captions: Sequence[str] | None, rows: int, count: int, seed: int) -> tuple[list[int], list[int]]:
    """Split row numbers into (training, validation) with `count` rows in the second.

    With captions, a row is held out only if every one of its words is left in at least one other training row, so that validation
    measures new combinations rather than unknown words.
    """
    if count and count >= rows:
        raise ValueError(f"data.holdout: {count} of {rows} rows would leave none to train on; give a smaller number, or 0.")
    order = np.random.default_rng(seed_of(seed, "permutation", 0)).permutation(rows).tolist()
    if captions is None:
        return sorted(order[count:]), sorted(order[:count])
    words = [set(re.findall(r"\w+", caption.lower())) for caption in captions]
    left = Counter(word for one in words for word in one)
    held: list[int] = []
    for row in order:
        if len(held) < count and words[row] and all(left[word] > 1 for word in words[row]):
            held.append(row)
            left.subtract(words[row])
    if len(held) < count:
        raise ValueError(f"data.holdout: only {len(held)} of {rows} captions have words that others have too; {count} were asked for.")
    return sorted(set(order) - set(held)), sorted(held)


class PictureData(torch.utils.data.Dataset):
    """Map-style pictures. An item is asked for by (row, draw) and holds `picture` uint8 (C, H, W), `text`, `label`, `row`, `draw`."""

    def __init__(
        self,
        rows: Any,
        config: DataConfig,
        indices: Sequence[int] | None = None,
        seed: int = 0,
        augmented: bool = True,
        names: Mapping[str, str] = RECIPE_NAMES,
    ) -> None:
        self.rows, self.config, self.seed, self.augmented = rows, config, seed, augmented
        self.indices = list(range(len(rows))) if indices is None else list(indices)
        self.texts = captions_of(rows.select(self.indices), config) if config.text_column else None
        self.labels = None
        if config.label_column:
            labels = rows.select(self.indices)[config.label_column]
            self.labels = [_label(label, row, config, names) for label, row in zip(labels, self.indices, strict=True)]
        self._kept: dict[int, Tensor] = {}
        size = len(self.indices) * config.channels * config.resolution**2
        self._keeps = config.workers == 0 and size <= _MEMORY_FOR_PICTURES  # each worker would keep its own

    def __len__(self) -> int:
        return len(self.indices)

    def captions(self) -> list[str] | None:
        """Every caption, or None where the recipe names no text column."""
        return self.texts

    def fingerprint(self) -> str:
        """SHA-256 over captions, labels, row numbers and the files of a few pictures: it tells data sets apart without reading all of one.

        A file is hashed as it is: what a picture decodes to depends on versions, and what `datasets` calls a set on its folder's dates.
        """
        import datasets

        whole = hashlib.sha256(json.dumps([self.texts, self.labels, self.indices]).encode())
        column = self.config.image_column
        files = self.rows.cast_column(column, datasets.Image(decode=False))
        # at random: rows often come in a pattern, of which every n-th would be the same part
        some = np.random.default_rng(0).permutation(len(self.indices))[:_FINGERPRINTED]
        for item in some.tolist():
            stored = files[self.indices[item]][column] or {}
            whole.update(stored.get("bytes") or (Path(stored["path"]).read_bytes() if stored.get("path") else b""))
        return f"sha256:{whole.hexdigest()}"

    def picture(self, item: int) -> Tensor:
        """The prepared picture before augmentation, uint8 (C, H, W)."""
        if item not in self._kept:
            row = self.indices[item]
            try:
                picture = self.rows[row][self.config.image_column]  # decodes it
                prepared = prepare_picture(picture, self.config.resolution, self.config.channels, self.config.background)
            except _PICTURE_ERRORS as error:
                raise _bad_picture(row, self.config, error, self._file_of(row)) from error
            if not self._keeps:
                return prepared
            self._kept[item] = prepared
        return self._kept[item]

    def _file_of(self, row: int) -> str | None:
        """Where a row's picture lies, if it is a file of its own."""
        import datasets

        column = self.config.image_column
        stored = self.rows.select([row]).cast_column(column, datasets.Image(decode=False))[0][column]
        return stored["path"] if stored else None

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any]:
        item, draw = place
        picture = self.picture(item)
        if self.augmented and (self.config.horizontal_flip or self.config.shift):
            generator = sample_generators(self.seed, "augmentation", [self.indices[item]], [draw])[0]
            picture = augment(picture, self.config.horizontal_flip, self.config.shift, generator)
        example = {"picture": picture, "item": item, "row": self.indices[item], "draw": draw}
        if self.texts is not None:
            example["text"] = self.texts[item]
        if self.labels is not None:
            example["label"] = self.labels[item]
        return example


class LatentData(torch.utils.data.Dataset):
    """Cached latents with captions or labels, asked for by (row, draw): `latents` float32, `text`, `label`, `row`, `draw`.

    `latents`, (N, c, h, w), may be a function that makes them; `prepare` calls it, once everything about the run is known to be right.
    `fingerprint` is that of the pictures.
    """

    def __init__(
        self,
        latents: Tensor | Callable[[], Tensor],
        texts: Sequence[str] | None,
        rows: Sequence[int],
        labels: Sequence[int] | None = None,
        fingerprint: Callable[[], str] | None = None,
    ) -> None:
        self.latents, self.texts, self.labels, self.indices = latents, texts, labels, list(rows)
        if fingerprint is not None:
            self.fingerprint = fingerprint

    def prepare(self) -> None:
        """Make the latents; the trainer calls it before the first batch."""
        if not isinstance(self.latents, Tensor):
            self.latents = self.latents()

    def __len__(self) -> int:
        return len(self.indices)

    def captions(self) -> list[str] | None:
        """Every caption, or None where there are none."""
        return None if self.texts is None else list(self.texts)

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any]:
        item, draw = place
        example = {"latents": self.latents[item], "item": item, "row": self.indices[item], "draw": draw}
        if self.texts is not None:
            example["text"] = self.texts[item]
        if self.labels is not None:
            example["label"] = self.labels[item]
        return example


def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Tensors are stacked, pictures become float in [-1, 1], everything else stays a list."""
    batch: dict[str, Any] = {}
    for key in examples[0]:
        values = [example[key] for example in examples]
        batch[key] = torch.stack(values) if isinstance(values[0], Tensor) else values
    if "picture" in batch:
        batch["picture"] = batch["picture"].float().div_(127.5).sub_(1.0)                            # (B, C, H, W)
    if "label" in batch:
        batch["label"] = torch.tensor(batch["label"])                                                # (B,)
    return batch


class EndlessBatches(torch.utils.data.Sampler):
    """The batches of one rank, from micro-batch `start` on, without end: every epoch is a new permutation without its last partial batch.

    A micro-batch of the whole run has `batch_size * ranks` samples; rank r takes every `ranks`-th of them.

    Args:
        groups: items that are drawn as one (see `caption_groups`): an epoch has one of each group, chosen at random.
    """

    def __init__(
        self,
        rows: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        start: int = 0,
        groups: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.groups = [np.asarray(group) for group in groups] if groups is not None else None
        rows = rows if self.groups is None else len(self.groups)
        if batch_size * ranks > rows:
            what = "a data set" if self.groups is None else "groups (data.group_captions)"
            raise ValueError(f"a batch of {batch_size * ranks} samples from {what} of {rows}: lower loop.batch_size.")
        self.rows, self.size, self.seed, self.rank, self.ranks, self.start = rows, batch_size, seed, rank, ranks, start

    @property
    def per_epoch(self) -> int:
        """Micro-batches in one pass over the data."""
        return self.rows // (self.size * self.ranks)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        place = self.start
        while True:
            epoch, first = divmod(place, self.per_epoch)
            generator = np.random.default_rng(seed_of(self.seed, "permutation", 1, epoch))
            order = generator.permutation(self.rows)
            if self.groups is not None:
                order = np.array([generator.choice(self.groups[number]) for number in order])
            for batch in range(first, self.per_epoch):
                whole = order[batch * self.size * self.ranks : (batch + 1) * self.size * self.ranks]
                yield [(int(item), epoch) for item in whole[self.rank :: self.ranks]]
                place += 1


class CaptionNoise:
    """Spoils captions a little in training, so that an unknown or missing word degrades the picture gracefully.

    With probability `word_dropout` some words are left out: any number of them short of all, so that "smiling face with
    sunglasses" also teaches "sunglasses". With probability `pseudo_word` one word is replaced by an invented one made of pieces of two
    others: a network that has seen invented words learns that they say nothing, and draws something that fits the rest.
    With probability `article` the caption begins with "a", "an" or "the", as people write who ask for one, where captions of data do not.
    With probability `drop` the caption is emptied, which trains the unconditional branch of classifier-free guidance
    (Ho & Salimans 2022, https://arxiv.org/abs/2207.12598).
    """

    def __init__(
        self, vocabulary: Sequence[str], drop: float = 0.1, word_dropout: float = 0.0, pseudo_word: float = 0.0, article: float = 0.0
    ) -> None:
        for name, value in (("drop", drop), ("word_dropout", word_dropout), ("pseudo_word", pseudo_word), ("article", article)):
            if not 0 <= value <= 1:
                raise ValueError(f"caption {name}: a probability is between 0 and 1, got {value}.")
        self.vocabulary = sorted({word for caption in vocabulary for word in caption.split() if len(word) > 2})
        self.drop, self.word_dropout, self.pseudo_word, self.article = drop, word_dropout, pseudo_word, article

    def __call__(self, caption: str, seed: int) -> str:
        source = random.Random(seed)
        if source.random() < self.drop:
            return ""
        words = caption.split()
        if len(words) > 1 and source.random() < self.word_dropout:
            kept = source.sample(range(len(words)), source.randint(1, len(words) - 1))
            words = [words[place] for place in sorted(kept)]
        if words and self.vocabulary and source.random() < self.pseudo_word:
            one, other = source.choice(self.vocabulary), source.choice(self.vocabulary)
            words[source.randrange(len(words))] = one[: math.ceil(len(one) / 2)][::-1] + other[len(other) // 2 :]
        if words and self.article and source.random() < self.article:
            words.insert(0, source.choice(("an" if words[0][0] in "aeiou" else "a", "the")))
        return " ".join(words)


def stream_batches(rows: Any, config: DataConfig, batch_size: int, seed: int, rank: int, ranks: int) -> Iterator[list[dict[str, Any]]]:
    """Batches from a streamed data set: a shuffled buffer, every `ranks`-th row to each rank. The order cannot be resumed exactly."""
    epoch, draws = 0, 0
    while True:
        examples: list[dict[str, Any]] = []
        for number, row in enumerate(rows.shuffle(seed=seed_of(seed, "permutation", 1, epoch) % 2**31, buffer_size=1000)):
            if number % ranks != rank:
                continue
            try:
                picture = prepare_picture(row[config.image_column], config.resolution, config.channels, config.background)
            except _PICTURE_ERRORS as error:
                raise _bad_picture(number, config, error) from error
            generator = sample_generators(seed, "augmentation", [number], [epoch])[0]
            picture = augment(picture, config.horizontal_flip, config.shift, generator)
            example = {"picture": picture, "item": number, "row": number, "draw": epoch}
            if config.text_column:
                example["text"] = _caption(row[config.text_column], config)
            if config.label_column:
                example["label"] = _label(row[config.label_column], number, config)
            examples.append(example)
            if len(examples) == batch_size:
                yield examples
                examples, draws = [], draws + 1
        if not draws:
            raise ValueError(f"data.name: the stream of {config.name} has fewer rows than one batch of {batch_size * ranks}.")
        epoch += 1
