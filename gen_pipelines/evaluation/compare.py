"""Evaluations side by side: a table in Markdown, a CSV, and one HTML page. Different protocols are never ranked together."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bundled import BUNDLED, bundled_path
from .evaluate import FORMAT

# what two evaluations must share for their numbers to be ranked together; the seed may differ
COMPARABLE = (
    "extractor_hash", "resizer", "features", "reference_hash", "classes", "resolution", "channels", "num", "kernel", "neighbours",
    "held_out_pictures", "held_out_sets",
)  # fmt: skip
SAMPLING = ("scheduler", "steps", "guidance", "temperature", "truncation")


@dataclass(frozen=True)
class Column:
    """A column of the table: where its number is, what it is called, and which way is better ("" where neither is)."""

    group: str
    key: str
    title: str
    better: str
    scale: float = 1.0

    def of(self, result: Mapping[str, Any]) -> float | None:
        """The number of an evaluation, None where it has none."""
        value = (result.get(self.group) or {}).get(self.key)
        return None if value is None or not math.isfinite(value) else value * self.scale


COLUMNS = (
    Column("metrics", "frechet_distance", "Fréchet", "low"),
    Column("metrics", "frechet_distance_over_real", "× real", "low"),
    Column("metrics", "kernel_distance", "kernel", "low"),
    Column("metrics", "precision", "precision", "high"),
    Column("metrics", "recall", "recall", "high"),
    Column("metrics", "density", "density", ""),
    Column("metrics", "coverage", "coverage", "high"),
    Column("metrics", "class_entropy_over_data", "class entropy", ""),
    Column("metrics", "class_accuracy", "class accuracy", ""),
    Column("metrics", "near_copies", "near copies", ""),
    Column("metrics", "bits_per_dim", "bits/dim", ""),
    Column("cost", "evaluations_per_picture", "evaluations", ""),
    Column("cost", "seconds_per_picture", "ms/picture", "", scale=1000.0),
    Column("cost", "parameters", "parameters", "", scale=1e-6),
)


@dataclass
class Row:
    """Evaluations of one model under one way of sampling: one, or several of different seeds or trainings.

    Attributes:
        name: of the model.
        sampling: how it draws, in words; empty where it has one way.
        results: the evaluations, of one protocol.
        folders: where each was read, for its pictures; None for one that is in memory.
    """

    name: str
    sampling: str
    results: list[dict[str, Any]]
    folders: list[Path | None]

    def values(self, column: Column) -> list[float]:
        """The numbers of a column, of those evaluations that have one."""
        return [value for result in self.results if (value := column.of(result)) is not None]

    def mean(self, column: Column) -> float | None:
        """Their mean, None where there is none."""
        values = self.values(column)
        return statistics.fmean(values) if values else None

    @property
    def not_finite(self) -> int:
        """Pictures that are not finite, in all evaluations."""
        return sum(result["counts"]["not_finite"] for result in self.results)

    @property
    def is_ranked(self) -> bool:
        """Whether its numbers may be called best: all pictures finite, and measured."""
        return not self.not_finite and all(result["metrics"] for result in self.results)

    @property
    def title(self) -> str:
        """Name and sampling."""
        return f"{self.name}, {self.sampling}" if self.sampling else self.name


@dataclass
class Group:
    """Rows of one protocol, which may be ranked; best first by the Fréchet distance, rows that cannot be ranked last."""

    protocol: dict[str, Any]
    rows: list[Row]

    @property
    def best(self) -> dict[str, set[float]]:
        """For each column that has a better way, the best mean; none where all are equal."""
        found = {}
        for column in COLUMNS:
            values = [mean for row in self.rows if row.is_ranked and (mean := row.mean(column)) is not None]
            if column.better and len(set(values)) > 1:
                found[column.key] = {min(values) if column.better == "low" else max(values)}
        return found

    @property
    def real(self) -> dict[str, Any]:
        """The numbers of held-out real pictures."""
        return self.rows[0].results[0]["real"]


def compare(
    evaluations: Sequence[str | Path | Mapping[str, Any]], out: str | Path | None = None, title: str = "Families compared"
) -> list[Group]:
    """Puts evaluations side by side.

    Args:
        evaluations: files that `evaluate` wrote, folders of them (`evaluation*.json`), `bundled:NAME`, or results themselves;
            "NAME=file" gives a name. Evaluations of one name and one way of sampling are one row: mean and deviation over seeds.
        out: a folder for compare.md, compare.csv and compare.html; None writes nothing.
        title: of the page.
    Returns: groups of one protocol each, which are ranked within and never with each other.
    Raises:
        ValueError: nothing to compare, or a file that is no evaluation.
        FileNotFoundError: no such file.
    """
    read = [one for given in evaluations for one in read_evaluations(given)]
    if not read:
        raise ValueError("compare: no evaluations; give files that `gen-pipelines evaluate` wrote.")
    groups: dict[str, dict[tuple[str, str], Row]] = {}
    for name, result, folder in read:
        key = json.dumps([result["protocol"].get(part) for part in COMPARABLE])
        name, how = name or result["model"], sampling_of(result)
        row = groups.setdefault(key, {}).setdefault((name, how), Row(name, how, [], []))
        row.results.append(result)
        row.folders.append(folder)
    order = lambda row: (not row.is_ranked, row.mean(COLUMNS[0]) if row.mean(COLUMNS[0]) is not None else math.inf)
    found = [Group(next(iter(rows.values())).results[0]["protocol"], sorted(rows.values(), key=order)) for rows in groups.values()]
    if out is not None:
        from .page import page

        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in (("compare.md", markdown(found)), ("compare.csv", table_csv(found)), ("compare.html", page(found, title))):
            unfinished = folder / f".{file}.tmp"
            unfinished.write_text(text, encoding="utf-8")
            os.replace(unfinished, folder / file)
    return found


def read_evaluations(given: Any) -> list[tuple[str | None, dict[str, Any], Path | None]]:
    """(name or None, evaluation, folder or None) of everything that an argument of `compare` stands for."""
    if isinstance(given, Mapping):
        return [(None, check(dict(given), "this result"), None)]
    name, separator, rest = str(given).partition("=")
    name, path = (name, rest) if separator and not Path(str(given)).exists() else (None, str(given))
    place = Path(bundled_path(path.removeprefix(BUNDLED)) if path.startswith(BUNDLED) else path)
    if place.is_dir():
        files = sorted(place.glob("evaluation*.json"))
        if not files:
            raise FileNotFoundError(f"{path}: no evaluation*.json in this folder; run gen-pipelines evaluate, or give --dataset.")
    elif place.is_file():
        files = [place]
    else:
        raise FileNotFoundError(f"{path}: no such file; give what gen-pipelines evaluate wrote, or a folder of it.")
    found = []
    for file in files:
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file}: not JSON ({error}); evaluate again.") from None
        found.append((name, check(result, str(file)), file.parent))
    return found


def check(result: Any, where: str) -> dict[str, Any]:
    """An evaluation of this version's format.

    Raises:
        ValueError: it is something else.
    """
    parts = ("metrics", "real", "protocol", "sampling", "counts", "cost")
    if not isinstance(result, dict) or result.get("format") != FORMAT or any(not isinstance(result.get(part), dict) for part in parts):
        raise ValueError(f"{where}: no evaluation of this version (format {FORMAT}); run gen-pipelines evaluate for it.")
    return result


def sampling_of(result: Mapping[str, Any]) -> str:
    """How an evaluation drew, in words: "ddim, 20 steps"."""
    sampling = result["sampling"]
    words = [sampling["scheduler"]] if sampling.get("scheduler") else []
    words += [f"{sampling['steps']} step{'s' if sampling['steps'] != 1 else ''}"] if sampling.get("steps") is not None else []
    for key, usual in (("guidance", 1.0), ("temperature", 1.0), ("truncation", None)):
        value = sampling.get(key)
        if value is not None and value != usual:
            words.append(f"{key} {value:g}" if isinstance(value, int | float) else f"{key} {value}")
    return ", ".join(map(str, words))


def cell(row: Row, column: Column) -> str:
    """A number as the table has it, with its deviation where there are several; a likelihood with what kind it is."""
    values = row.values(column)
    if not values:
        return ""
    text = written(statistics.fmean(values))
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.1g}"
    if column.key == "bits_per_dim":
        measured = [result["likelihood"] for result in row.results if result.get("likelihood")]  # of some seeds there may be none
        kinds = {likelihood["kind"] for likelihood in measured if likelihood.get("kind")}
        error = measured[0].get("bits_per_dim_error") if measured else None
        text = f"{statistics.fmean(values):.3f}"
        text += f" ± {error:.3f}" if error is not None else ""
        text += f" ({', '.join(sorted(kinds))})"
    return text


def written(value: float) -> str:
    """Three digits, never with an exponent in between: 0.0123, 4.56, 789, 12,300."""
    return f"{float(f'{value:.3g}'):,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def shown_columns(group: Group) -> list[Column]:
    """The columns in which some row of a group has a number."""
    return [column for column in COLUMNS if any(row.values(column) for row in group.rows)]


def told(protocol: Mapping[str, Any]) -> str:
    """A protocol in a sentence."""
    return (
        f"{protocol['num']:,} pictures against {protocol['reference_pictures']:,} of {protocol['dataset']} ({protocol['split']}), "
        f"classes {protocol['classes']}, features of {protocol['extractor']} ({protocol['extractor_hash'].removeprefix('sha256:')[:12]}, "
        f"{protocol['features']}), resizer {protocol['resizer']}, "
        f"{protocol['resolution']} x {protocol['resolution']} x {protocol['channels']}"
    )


def differences(groups: Sequence[Group]) -> list[str]:
    """What the protocols of several groups do not share."""
    return [part for part in COMPARABLE if len({json.dumps(group.protocol.get(part)) for group in groups}) > 1]


def real_cell(group: Group, column: Column) -> str:
    """A column's number of real pictures."""
    known = {"frechet_distance_over_real": 1.0, "near_copies": 0.01}  # by what they are
    value = known.get(column.key, column.of({"metrics": group.real}))
    return "" if value is None else written(value)


def markdown(groups: Sequence[Group]) -> str:
    """One table per protocol; the best of a column is bold."""
    lines = []
    if len(groups) > 1:
        differing = ", ".join(differences(groups))
        lines += [f"These are {len(groups)} protocols, which differ in {differing}: their numbers are not comparable.", ""]
    for group in groups:
        columns, best = shown_columns(group), group.best
        arrow = {"low": " ↓", "high": " ↑", "": ""}
        lines += [
            f"{told(group.protocol)}.",
            "",
            f"| model | sampler | {' | '.join(column.title + arrow[column.better] for column in columns)} |",
            f"|---|---|{'---:|' * len(columns)}",
        ]
        for row in group.rows:
            cells = []
            for column in columns:
                text = cell(row, column)
                is_best = row.is_ranked and text and row.mean(column) in best.get(column.key, set())
                cells.append(f"**{text}**" if is_best else text)
            mark = f" (not ranked: {row.not_finite} pictures not finite)" if row.not_finite else ""
            lines.append(f"| {clean(row.name)}{mark} | {clean(row.sampling)} | {' | '.join(cells)} |")
        real = " | ".join(real_cell(group, column) for column in columns)
        lines += [f"| real pictures ({group.protocol['held_out']}) | | {real} |", ""]
    return "\n".join(lines)


def clean(text: str) -> str:
    """Text that cannot leave its cell of a Markdown table."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def table_csv(groups: Sequence[Group]) -> str:
    """Every evaluation as a line, with every number and the protocol; lines of different `group` are not comparable."""
    lines = []
    for index, group in enumerate(groups):
        for row in group.rows:
            for result in row.results:
                flat = {"group": index, "model": row.name, "sampling": row.sampling, "weights": result["weights"]}
                for part in ("metrics", "cost", "counts", "protocol"):
                    flat |= {f"{part}.{key}": value for key, value in result[part].items() if isinstance(value, str | int | float)}
                likelihood = result.get("likelihood") or {}
                flat |= {f"likelihood.{key}": value for key, value in likelihood.items() if isinstance(value, str | int | float)}
                lines.append(flat)
    names = list(dict.fromkeys(key for line in lines for key in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
