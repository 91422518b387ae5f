"""The curves of one or several training runs, from the log.jsonl that every run writes.

    python examples/training_curves.py runs/mnist-vae --out curves.png
    python examples/training_curves.py ELBO=runs/a IWAE=runs/b --keys elbo,iwae --together --limits -130,-85 --out curves.png

A panel for each key with all runs in it, or one panel for all keys (--together). Faint: each logged value; strong: the running mean of a
twentieth of them.
Values that are not finite are counted in the legend, since a plot leaves them out.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path

Curve = tuple[list[float], list[float]]


def read(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's log, oldest first.

    Raises:
        ValueError: there is no log.
    """
    path = folder / "log.jsonl"
    if not path.is_file():
        raise ValueError(f"{folder} has no log.jsonl; give the output folder of a training.")
    return [json.loads(line) for line in path.read_text().splitlines()]


def curve(rows: list[dict[str, float]], key: str, against: str) -> Curve:
    """(places, values) of a key, without the rows that lack it."""
    points = [(row[against], row[key]) for row in rows if isinstance(row.get(key), (int, float))]
    return [place for place, _ in points], [value for _, value in points]


def smooth(values: list[float], width: int) -> list[float]:
    """The running mean over `width` neighbours, which is as long as the values."""
    half = width // 2
    return [statistics.fmean(values[max(i - half, 0) : i + half + 1]) for i in range(len(values))]


def draw(runs: dict[str, list[dict[str, float]]], keys: list[str], against: str, together: bool, limits: tuple[float, float] | None):
    """The figure."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = 1 if together else len(keys)
    figure, axes = plt.subplots(1, panels, figsize=(5.5 * panels, 3.6), squeeze=False, layout="constrained")
    for number, key in enumerate(keys):
        axis = axes[0][0 if together else number]
        for name, rows in runs.items():
            places, values = curve(rows, key, against)
            if not values:
                continue
            finite = [(place, value) for place, value in zip(places, values) if math.isfinite(value)]
            lost = len(values) - len(finite)
            places, values = [place for place, _ in finite], [value for _, value in finite]
            label = name + (f" ({lost} not finite)" if lost else "")
            (line,) = axis.plot(places, smooth(values, max(len(values) // 20, 1)), label=label, linewidth=1.6)
            axis.plot(places, values, color=line.get_color(), alpha=0.2, linewidth=0.7)
        axis.set_xlabel(against)
        axis.set_ylabel(", ".join(keys) if together else key)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if limits:
            axis.set_ylim(*limits)
        if axis.lines:
            axis.legend(frameon=False)
    return figure


def main() -> None:
    """Read, draw, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="[NAME=]FOLDER")
    parser.add_argument("--keys", help="names in the log, with commas; loss by default")
    parser.add_argument("--against", choices=("step", "seconds"), default="step")
    parser.add_argument("--together", action="store_true", help="one panel for all keys")
    parser.add_argument("--limits", help="LOW,HIGH of the vertical axis")
    parser.add_argument("--out", default="curves.png")
    arguments = parser.parse_args()
    keys = arguments.keys.split(",") if arguments.keys else ["loss"]
    try:
        named = [text.split("=", 1) if "=" in text else (Path(text).name, text) for text in arguments.runs]
        runs = {name: read(Path(folder)) for name, folder in named}
        known = sorted({key for rows in runs.values() for row in rows for key in row} - {"step", "seconds"})
        if unknown := [key for key in keys if key not in known]:
            raise ValueError(f"--keys: no run logged {unknown[0]}; there are {', '.join(known)}.")
        limits = tuple(float(end) for end in arguments.limits.split(",")) if arguments.limits else None
        if limits and (len(limits) != 2 or not limits[0] < limits[1]):
            raise ValueError(f"--limits: {arguments.limits} is not LOW,HIGH.")
    except ValueError as error:
        parser.error(str(error))
    draw(runs, keys, arguments.against, arguments.together, limits).savefig(arguments.out, dpi=130)
    print(arguments.out)


if __name__ == "__main__":
    main()
