"""The comparison as one HTML page: no scripts, no files beside it, no request to anywhere; for a phone as for a desk."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from .compare import Column, Group, Row, cell, differences, real_cell, sampling_of, shown_columns, told
from .plots import Axis, Series, colour_of, mark, scatter

STYLE = """
:root { --ink: #1d2430; --soft: #5b6472; --faint: #dfe3e8; --paper: #ffffff; --card: #f6f7f9; --accent: #0b6bcb; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaee; --soft: #a2abb8; --faint: #333b47; --paper: #14181e; --card: #1c222b; --accent: #6db3ff; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 1.2rem 1rem 3rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0.4rem 0; }
h2 { font-size: 1.2rem; margin: 2rem 0 0.4rem; }
p { margin: 0.4rem 0; max-width: 75ch; }
.soft, figcaption { color: var(--soft); font-size: 0.9rem; }
.warn { border-left: 4px solid #d55e00; padding: 0.3rem 0.8rem; background: var(--card); }
.legend { display: flex; flex-wrap: wrap; gap: 0.3rem 1rem; padding: 0.6rem 0; margin: 0; list-style: none; }
.legend li { display: flex; align-items: center; gap: 0.35rem; }
.legend svg { width: 18px; height: 18px; }
.scroll { overflow-x: auto; border: 1px solid var(--faint); border-radius: 8px; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: 0.3rem 0.6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--faint); }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: min(15rem, 42vw); }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--paper); }
thead th { color: var(--soft); font-weight: 600; }
tr.real td { color: var(--soft); font-style: italic; }
td.best { font-weight: 700; color: var(--accent); }
td small { color: var(--soft); }
.plots, .grids { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); gap: 1rem; margin-top: 0.6rem; }
.grids { grid-template-columns: repeat(auto-fill, minmax(min(46%, 190px), 1fr)); }
figure { margin: 0; padding: 0.7rem; background: var(--card); border-radius: 10px; }
figure h3 { margin: 0 0 0.3rem; font-size: 1rem; }
figure svg { width: 100%; height: auto; display: block; }
figure img { width: 100%; image-rendering: pixelated; border-radius: 4px; display: block; }
svg text { fill: var(--soft); font-size: 13px; font-family: inherit; }
svg text.label { fill: var(--ink); }
svg .grid { stroke: var(--faint); stroke-width: 1; }
svg line.mark { stroke: var(--ink); stroke-dasharray: 5 4; opacity: 0.7; }
svg text.mark { fill: var(--ink); }
svg text.name { paint-order: stroke; stroke: var(--card); stroke-width: 3px; }
"""

QUALITY = Column("metrics", "frechet_distance_over_real", "", "low")
EVALUATIONS = Column("cost", "evaluations_per_picture", "", "")
MILLISECONDS = Column("cost", "seconds_per_picture", "", "", scale=1000.0)
BITS = Column("metrics", "bits_per_dim", "", "low")
DENSITY, COVERAGE = Column("metrics", "density", "", ""), Column("metrics", "coverage", "", "high")
PRECISION, RECALL = Column("metrics", "precision", "", "high"), Column("metrics", "recall", "", "high")

DISTANCE = "Fréchet distance, multiples of real pictures'"


def page(groups: Sequence[Group], title: str) -> str:
    """The whole page."""
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main><h1>{escape(title)}</h1>",
    ]
    if len(groups) > 1:
        differing = escape(", ".join(differences(groups)))
        parts.append(
            f'<p class="warn">These are {len(groups)} protocols, which differ in {differing}. Their numbers are not comparable: each has '
            "its own table and plots, and nothing is ranked across them.</p>"
        )
    for index, group in enumerate(groups):
        if len(groups) > 1:
            parts.append(f"<h2>Protocol {index + 1}</h2>")
        parts += section(group)
    return "".join([*parts, "</main></body></html>\n"])


def section(group: Group) -> list[str]:
    """Everything of one protocol."""
    styles = {name: style for style, name in enumerate(dict.fromkeys(row.name for row in group.rows))}
    parts = [f'<p class="soft">{escape(told(group.protocol))}.</p>']
    if lost := [row for row in group.rows if not row.is_ranked]:
        names = escape("; ".join(f"{row.title}: {row.not_finite} pictures are not finite" for row in lost))
        parts.append(f'<p class="warn">Not ranked, and in no plot: {names}.</p>')
    drawn = {row.name for row in group.rows if row.is_ranked}
    key = lambda style, name: f'<li><svg viewBox="0 0 18 18">{mark(style, 9, 9)}</svg>{escape(name)}</li>'
    keys = "".join(key(style, name) for name, style in styles.items() if name in drawn)
    star = key(-1, "real pictures")
    plots = draw_plots(group, styles)
    if plots:
        parts += [f'<ul class="legend">{keys}{star}</ul>', f'<div class="plots">{"".join(plots)}</div>']
    if grids := draw_grids(group, styles):
        parts += ["<h2>Side by side</h2>", '<p class="soft">The first pictures of each, as they came.</p>']
        parts.append(f'<div class="grids">{"".join(grids)}</div>')
    return [*parts, "<h2>Numbers</h2>", table(group), f'<p class="soft">{NOTE}</p>']


NOTE = (
    "Fréchet and kernel distances, 0 is best: × real is the distance over that of as many real pictures that the model is not measured "
    "against. Precision: drawn pictures that look real; recall and coverage: real pictures that are drawn. Density above 1: in the crowded "
    "middle. Class entropy over the data's, 1: every class as often as in the data. Near copies: nearer to a training picture than 99 % of "
    "real ones are; 0.01 is what real ones have. Bits per dimension are of different kinds, which are named: bounds (elbo, iwae, vlb) are "
    "above the true number. Parameters in millions. The best of a column is coloured."
)


def table(group: Group) -> str:
    """The table, the first column of which stays while the rest is scrolled."""
    columns, best = shown_columns(group), group.best
    arrow = {"low": " ↓", "high": " ↑", "": ""}
    head = "".join(f"<th>{escape(column.title)}{arrow[column.better]}</th>" for column in columns)
    rows = []
    for row in group.rows:
        cells = []
        for column in columns:
            text = cell(row, column)
            is_best = row.is_ranked and text and row.mean(column) in best.get(column.key, set())
            number, _, rest = text.partition(" ")
            small = f" <small>{escape(rest)}</small>" if rest else ""
            cells.append(f"<td{' class=best' if is_best else ''}>{escape(number)}{small}</td>")
        name = f"{escape(row.name)} <small>{escape(row.sampling)}</small>" if row.sampling else escape(row.name)
        rows.append(f"<tr><td>{name}</td>{''.join(cells)}</tr>")
    real = "".join(f"<td>{escape(real_cell(group, column))}</td>" for column in columns)
    rows.append(f'<tr class="real"><td>real pictures ({escape(group.protocol["held_out"])})</td>{real}</tr>')
    return f'<div class="scroll"><table><thead><tr><th>model</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def draw_plots(group: Group, styles: dict[str, int]) -> list[str]:
    """The plots for which there are numbers."""
    rows = [row for row in group.rows if row.is_ranked]
    log = lambda label: Axis(label, log=True)
    real = [(1.0, "real pictures")]
    figures = [
        figure(
            "Quality against evaluations", "Lower and further left is better. A line is one sampler with more and more steps.",
            lines_of(rows, styles, EVALUATIONS, QUALITY), log("network evaluations per picture"), log(DISTANCE), real,
        ),
        figure(
            "Quality against time", "On the machine that each was evaluated on; lower and further left is better.",
            lines_of(rows, styles, MILLISECONDS, QUALITY), log("milliseconds per picture"), log(DISTANCE), real,
        ),
        figure(
            "Likelihood against quality", "Two different virtues: a model may have one without the other. Lower and left is better.",
            lines_of(rows, styles, BITS, QUALITY, joined=False), Axis("bits per dimension (kinds differ: see the table)"),
            log(DISTANCE), real,
        ),
        figure(
            "Coverage against fidelity", "Right: what is drawn looks real. Up: what is real is drawn. The star is real pictures.",
            [*lines_of(rows, styles, PRECISION, COVERAGE, joined=False), star(group, PRECISION, COVERAGE)],
            Axis("precision", low=0.0, high=1.04), Axis("coverage", low=0.0, high=1.04), [],
        ),
    ]  # fmt: skip
    return [one for one in figures if one]


def lines_of(rows: Sequence[Row], styles: dict[str, int], x: Column, y: Column, joined: bool = True) -> list[Series]:
    """Rows as points; those of one model that differ in their steps alone are joined in the order of x."""
    found: dict[tuple[str, str], list[tuple[float, float, str]]] = {}
    for row in rows:
        px, py = row.mean(x), row.mean(y)
        if px is not None and py is not None:
            sampling = row.results[0]["sampling"]
            sampler = sampling_of({"sampling": {**sampling, "steps": None}}) if joined and sampling.get("steps") else row.sampling
            found.setdefault((row.name, sampler), []).append((px, py, f"{row.sampling or 'one way'}: {px:.3g}, {py:.3g}"))
    told = {key: key[1] if len(points) > 1 else "" for key, points in found.items()}  # a line says whose it is
    if not joined:  # a point each
        return [Series(key[0], [point], styles[key[0]]) for key, points in found.items() for point in points]
    return [Series(key[0], sorted(points), styles[key[0]], told[key]) for key, points in found.items()]


def star(group: Group, x: Column, y: Column) -> Series:
    """The point of real pictures."""
    px, py = group.real[x.key], group.real[y.key]
    return Series("real pictures", [(px, py, f"{px:.3g}, {py:.3g}")], -1)


def figure(title: str, caption: str, series: Sequence[Series], x: Axis, y: Axis, lines: Sequence[tuple[float, str]]) -> str:
    """One plot with its title and what to look for; empty where there is nothing to draw."""
    if not any(one.style >= 0 for one in series):
        return ""
    drawn = scatter(series, x, y, lines, title)
    return f"<figure><h3>{escape(title)}</h3>{drawn}<figcaption>{escape(caption)}</figcaption></figure>"


def draw_grids(group: Group, styles: dict[str, int]) -> list[str]:
    """Grids of pictures, the data's first; those whose file is not beside its evaluation are left out."""
    shown, found = set(), []
    for row in group.rows:
        for result, folder in zip(row.results, row.folders, strict=True):
            names = result.get("pictures") or {}
            if "data" not in shown and (data := inline(folder, names.get("data"))):
                shown.add("data")
                found.insert(0, grid_figure(data, "the data", group.protocol["split"], "var(--ink)"))
            if row.title not in shown and (drawn := inline(folder, names.get("drawn"))):
                shown.add(row.title)
                found.append(grid_figure(drawn, row.name, row.sampling, colour_of(styles[row.name])))
    return found


def grid_figure(data: str, name: str, below: str, colour: str) -> str:
    """One grid and whose it is."""
    return (
        f'<figure style="border-top: 4px solid {colour}"><img src="{data}" alt="pictures of {escape(name)}" loading="lazy">'
        f"<figcaption><b>{escape(name)}</b> {escape(below)}</figcaption></figure>"
    )


def inline(folder: Path | None, name: str | None) -> str | None:
    """A PNG beside an evaluation as a data URL; None where there is none. Only names, no paths: the file may be from anybody."""
    if folder is None or not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
        return None
    data = (folder / name).read_bytes()
    return f"data:image/png;base64,{base64.b64encode(data).decode()}" if data.startswith(b"\x89PNG\r\n\x1a\n") else None
