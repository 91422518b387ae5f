"""What a conformance run found: rows, a verdict, and the matrix as text or Markdown."""

from collections.abc import Iterable
from dataclasses import dataclass, field

__all__ = ["ConformanceError", "Report", "Row"]


class ConformanceError(AssertionError):
    """A scheduler did not pass; the message names every row that failed."""


@dataclass(frozen=True)
class Row:
    """One measurement.

    Args:
        scheduler: whose.
        check: the name of the check, an entry of `CHECKS`.
        network: the kind of network.
        grid: what was asked of the grid or of the number of steps; empty for the usual.
        passed: the verdict; None where it does not apply, or the scheduler refused (ValueError) and said why.
        measured: the numbers by name: errors, an order of convergence, ...
        allowed: the limits they were held against.
        note: why it failed, was refused or not judged.
    """

    scheduler: str
    check: str
    network: str
    grid: str = ""
    passed: bool | None = True
    measured: dict[str, float] = field(default_factory=dict)
    allowed: dict[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def verdict(self) -> str:
        """A few characters for a table: what was measured where that says more than a word."""
        if self.passed is None:
            return "refused" if self.note.startswith("ValueError") else "-"
        if self.check in ("order", "weak order") and "order" in self.measured:
            return f"{self.measured['order']:.2f}" + ("" if self.passed else " !")
        if self.passed:
            return "ok"
        if {"mean", "spread"} <= self.measured.keys():
            return " / ".join(_short(self.measured[k]) for k in ("mean", "spread"))
        return self.note.split(":")[0] if "Error" in self.note.split(":")[0] else "wrong"

    def __str__(self) -> str:
        where = ", ".join(w for w in (self.network, self.grid) if w)
        limit = lambda k: f" (allowed {self.allowed[k]:.3g})" if k in self.allowed else ""
        numbers = ", ".join(f"{k} {v:.3g}{limit(k)}" for k, v in self.measured.items())
        return f"{self.scheduler}, {self.check} on {where}: {'; '.join(w for w in (numbers, self.note) if w) or 'passed'}"


def _short(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.0e}".replace("e+0", "e").replace("e+", "e") if value == value else "nan"


@dataclass(frozen=True)
class Report:
    """The rows of one run; `str(report)` is the matrix and the failures."""

    rows: tuple[Row, ...]

    def __add__(self, other: "Report") -> "Report":
        return Report(self.rows + other.rows)

    @property
    def failures(self) -> tuple[Row, ...]:
        """The rows that did not pass."""
        return tuple(row for row in self.rows if row.passed is False)

    @property
    def passed(self) -> bool:
        """Whether something was judged, and nothing failed. A refusal is no failure: look for it in the matrix."""
        return not self.failures and any(row.passed for row in self.rows)

    def only(self, **values: str | Iterable[str]) -> "Report":
        """The rows with these values: `report.only(check="moments", network=("edm", "sd_eps"))`."""
        wanted = {k: {v} if isinstance(v, str) else set(v) for k, v in values.items()}
        return Report(tuple(row for row in self.rows if all(getattr(row, k) in v for k, v in wanted.items())))

    def raise_for_failures(self) -> None:
        """Raises ConformanceError, with every failed row, unless the report is `passed`."""
        if self.failures:
            raise ConformanceError(f"{len(self.failures)} of {len(self.rows)} checks failed:\n" + "\n".join(map(str, self.failures)))
        if not self.passed:
            raise ConformanceError("nothing was judged: every check was refused or does not apply.")

    def matrix(self, down: str | None = None, across: str | None = None) -> tuple[list[str], list[list[str]]]:
        """(heads, lines): one line for each value of `down`, one column for each of `across` (fields of `Row`). A cell is the worst of its
        rows: a number or a word where one failed, `ok`, or empty where none was run.

        None is schedulers down and networks across for several schedulers, networks down and checks across for one.
        """
        several = len({row.scheduler for row in self.rows}) > 1
        down, across = down or ("scheduler" if several else "network"), across or ("network" if several else "check")
        columns = list(dict.fromkeys(getattr(row, across) for row in self.rows))
        lines: dict[str, dict[str, list[Row]]] = {}
        for row in self.rows:
            lines.setdefault(getattr(row, down), {}).setdefault(getattr(row, across), []).append(row)
        badness = lambda row: 3 if row.passed is False else 2 if row.verdict == "refused" else 1 if row.passed else 0
        cell = lambda rows: max(rows, key=badness).verdict if rows else ""
        return [down, *columns], [[key, *(cell(found.get(c, [])) for c in columns)] for key, found in lines.items()]

    def table(self, down: str | None = None, across: str | None = None) -> str:
        """The matrix in columns; arguments as in `matrix`."""
        heads, lines = self.matrix(down, across)
        widths = [max(len(line[i]) for line in (heads, *lines)) for i in range(len(heads))]
        return "\n".join("  ".join(word.ljust(w) for word, w in zip(line, widths, strict=True)).rstrip() for line in (heads, *lines))

    def markdown(self, down: str | None = None, across: str | None = None) -> str:
        """The matrix as a Markdown table; arguments as in `matrix`."""
        heads, lines = self.matrix(down, across)
        return "\n".join("| " + " | ".join(line) + " |" for line in (heads, ["---"] * len(heads), *lines))

    def __str__(self) -> str:
        if not self.rows:
            return "no checks were run"
        names = list(dict.fromkeys(row.scheduler for row in self.rows))
        judged = [row for row in self.rows if row.passed is not None]
        head = f"{', '.join(names)}: {len(judged) - len(self.failures)} of {len(judged)} checks passed"
        failed = "".join(f"\n  {row}" for row in self.failures)
        return f"{head}\n\n{self.table()}" + (f"\n\nfailed:{failed}" if failed else "")
