"""What pages are made of: sections, tables and cells, and how metrics become them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import pandas as pd

from glp_lens.display.labels import DASH, interval, number, signed
from glp_lens.display.plots import Plot


@dataclass(frozen=True)
class Cell:
    """One cell: its text, a smaller line below, whether it is the best of its column, and passages of prose."""

    text: str
    below: str = ""
    best: bool = False
    passages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """A table; the first column names the row. Long ones are folded; columns in `prose` wrap."""

    caption: str
    header: list[str]
    rows: list[list[Cell]]
    folded: bool = False
    prose: tuple[str, ...] = ()


@dataclass(frozen=True)
class Example:
    """Continuations of one prompt: for each condition, one cell a strength."""

    concept: str
    prompt: str
    unsteered: str
    strengths: list[str]
    rows: list[tuple[str, list[Cell]]]


@dataclass(frozen=True)
class ColouredText:
    """A text as tokens, each with a share from 0 to 1 that says how strongly it is coloured."""

    title: str
    tokens: list[tuple[str, float]]


@dataclass(frozen=True)
class Part:
    """A titled part of a long section."""

    title: str
    lead: str = ""
    plots: list[Plot] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


@dataclass(frozen=True)
class Section:
    """A part of the page with its own entry in the contents."""

    id: str
    title: str
    lead: str
    plots: list[Plot] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    texts: list[ColouredText] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def all_plots(self) -> list[Plot]:
        """The section's own plots and those of its parts."""
        return [*self.plots, *(plot for part in self.parts for plot in part.plots)]

    def contents(self, comparisons: int) -> str:
        """What is folded below the first plot, in words."""
        found = {
            "table": len(self.tables) + sum(len(part.tables) for part in self.parts),
            "more plot": len(self.all_plots) - len(self.plots[:1]),
            "comparison": comparisons,
            "example": len(self.examples) + len(self.texts),
        }
        words = [f"{n} {what}{'s' if n != 1 else ''}" for what, n in found.items() if n]
        return ", ".join([*words, *(["notes"] if self.notes else [])])


def value_cell(row: pd.Series | None, digits: int = 3, *, best: bool = False, sign: bool = False) -> Cell:
    """A metric row as value and interval; a dash if it was not measured."""
    if row is None:
        return Cell(DASH)
    write = signed if sign else number
    return Cell(write(row.value, digits), interval(row.ci_low, row.ci_high, digits, sign=sign), best)


def find_row(frame: pd.DataFrame, **where: object) -> pd.Series | None:
    """The first metric row with these values in these columns, or None."""
    chosen = frame
    for column, value in where.items():
        chosen = chosen[chosen[column] == value]
    return chosen.iloc[0] if len(chosen) else None


def rows_of(frame: pd.DataFrame, models: Iterable[str], **where: object) -> list[pd.Series | None]:
    """The first metric row of each model with these values in these columns, or None."""
    return [find_row(frame, model=model, **where) for model in models]


def _best(rows: Iterable[pd.Series | None], *, highest: bool) -> float:
    values = [float(r.value) for r in rows if r is not None and math.isfinite(r.value)]
    if not values:
        return math.nan
    return max(values) if highest else min(values)


def value_cells(rows: Sequence[pd.Series | None], *, highest: bool, digits: int = 3) -> list[Cell]:
    """Cells of one column, the best value marked."""
    best = _best(rows, highest=highest)
    return [value_cell(r, digits, best=r is not None and r.value == best) for r in rows]


def table_of(caption: str, columns: Iterable[tuple[str, list[Cell]]], *, folded: bool = False) -> Table:
    """A table from its columns under their titles, the first of which names the rows."""
    header, cells = zip(*columns, strict=True)
    return Table(caption, list(header), [list(row) for row in zip(*cells, strict=True)], folded)


def metric_lines(frame: pd.DataFrame) -> str:
    """Metric rows as plain text, a line each: model, setting, metric, value and interval."""
    return "\n".join(
        f"{row.model:24} {row.setting!s:32} {row.metric} {row.value:.3f} {interval(row.ci_low, row.ci_high)}".rstrip()
        for row in frame.itertuples()
    )
