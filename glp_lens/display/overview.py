"""The table that a page begins with: models in rows, suites in columns, and who is clearly ahead."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from glp_lens.display.comparisons import Outcome, Verdict, mains
from glp_lens.display.elements import Cell
from glp_lens.display.labels import DASH, Style, display, family, number
from glp_lens.kinds import KINDS

_SIGNS: dict[Outcome, str] = {"behind": "▲", "ahead": "▼", "unclear": "="}
"""How a rival fares where the focus is ahead, behind or not told apart: in the rival's own row."""
_WORDS = {"▲": "clearly ahead of", "▼": "clearly behind", "=": "not told apart from"}


@dataclass(frozen=True)
class Column:
    """One suite, or one of its measures.

    Attributes:
        section: id of the part of the page that has all of it.
        title: its heading.
        measure: what its numbers are, and which way is better.
        cells: by label, the value and its interval; of one model, the main setting is shown.
        units: how many independent units are behind its comparisons, in words.
        field: of the verdicts that mark it (`Verdict.field`).
        task: of those verdicts; of all tasks if empty.
        digits: decimals.
    """

    section: str
    title: str
    measure: str
    cells: Mapping[str, Cell]
    units: str
    field: str
    task: str = ""
    digits: int = 3


@dataclass(frozen=True)
class Mark:
    """Which side of a comparison is clearly ahead: `▲`, `▼` or `=`, how often, and the same in words."""

    sign: str
    times: str
    words: str


@dataclass(frozen=True)
class Row:
    """One model: its name, what it got, and for each column its cell, the setting it is of, and its marks."""

    name: str
    below: str
    cells: Sequence[tuple[Cell, str, Sequence[Mark]]]


@dataclass(frozen=True)
class Overview:
    """The whole table; `visible` has the smallest visible differences under the columns, or dashes."""

    focus: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    visible: Sequence[str]


def make_overview(
    columns: Sequence[Column],
    judged: Sequence[Verdict],
    focus: str,
    conditions: Mapping[str, Style],
    below: Mapping[str, str] | None = None,
) -> Overview:
    """Make the table of columns and verdicts.

    Args:
        columns: of all suites.
        judged: verdicts on the model in focus.
        focus: that model.
        conditions: titles of labels that are no model's; their rows come last.
        below: by model, a line under its name.
    """
    labels = dict.fromkeys(label for column in columns for label in column.cells)
    rows = list(dict.fromkeys(map(_row, labels)))
    kinds = list(KINDS)
    known = [row for row in rows if row in KINDS]
    known.sort(key=lambda row: (row != focus, kinds.index(row)))
    others = [row for row in rows if row not in KINDS]
    others.sort(key=lambda row: (row != focus, family(row) in conditions))
    if focus in others:
        known.insert(0, others.pop(0))
    verdicts = [[v for v in mains(judged, focus) if _about(v, column)] for column in columns]
    return Overview(
        display(focus),
        columns,
        [
            Row(
                display(row, None if row in KINDS else conditions),
                (below or {}).get(row, ""),
                [_cell(column, own, row, focus) for column, own in zip(columns, verdicts, strict=True)],
            )
            for row in known + others
        ],
        [_visible(own, column) for column, own in zip(columns, verdicts, strict=True)],
    )


def _row(label: str) -> str:
    """What names a label's row: of our kinds of models the kind, so that settings share one row."""
    return family(label) if family(label) in KINDS else label


def _about(verdict: Verdict, column: Column) -> bool:
    return verdict.field == column.field and column.task in ("", verdict.task)


def _cell(column: Column, judged: Sequence[Verdict], row: str, focus: str) -> tuple[Cell, str, Sequence[Mark]]:
    labels = [label for label in column.cells if _row(label) == row]
    if not labels:
        return Cell(DASH), "", ()
    label = row if row in labels else labels[0]
    setting = display(label.removeprefix(row).strip()) if label != row else ""
    return column.cells[label], setting, _marks(judged, label, row, focus)


def _marks(judged: Sequence[Verdict], label: str, row: str, focus: str) -> Sequence[Mark]:
    """Of a rival, how it fares against the focus; of the focus, that it is ahead of all that it is compared with."""
    if row == focus:
        won = bool(judged) and all(v.outcome == "ahead" for v in judged)
        return [Mark("▲", "", "clearly ahead of all that it is compared with")] if won else ()
    outcomes = [v.outcome for v in judged if v.second == label]
    outcomes = outcomes or [v.outcome for v in judged if family(v.second) == label]
    marks = []
    for outcome, sign in _SIGNS.items():
        times = outcomes.count(outcome)
        if times and (outcome != "unclear" or times == len(outcomes)):
            often = f"{times} of {len(outcomes)}" if len(outcomes) > times else ""
            words = f"{_WORDS[sign]} {display(focus)}" + (f" in {often} comparisons" if often else "")
            marks.append(Mark(sign, often, words))
    return marks


def _visible(judged: Sequence[Verdict], column: Column) -> str:
    """The smallest visible difference, or from which to which it is over the comparisons of a column."""
    values = sorted(v.visible for v in judged if math.isfinite(v.visible))
    ends = dict.fromkeys(number(value, column.digits) for value in (values[0], values[-1])) if values else {DASH: None}
    return " to ".join(ends)
