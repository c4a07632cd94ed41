"""Paired differences between models, and from them sentences: who wins, by how much, and where nobody does.

A winner is named only if the 95% interval of the paired difference leaves out 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import pandas as pd

from glp_lens.display.elements import Cell, find_row
from glp_lens.display.labels import family, interval, signed

Outcome = Literal["ahead", "behind", "unclear"]


@dataclass(frozen=True)
class Verdict:
    """One comparison of the model in focus with another.

    Attributes:
        suite: where the numbers come from.
        outcome: `ahead`, `behind`, or `unclear` if the interval contains 0.
        first: label of the model in focus.
        second: label of what it is compared with.
        sentence: the verdict, with difference and interval.
        detail: what qualifies it; may be empty.
        area: what the headline calls the comparison's field, by default the suite.
        task: which one it is of, where a suite compares on several.
        visible: the smallest true difference that 80% of such runs would find, one comparison alone; NaN if unknown.
    """

    suite: str
    outcome: Outcome
    first: str
    second: str
    sentence: str
    detail: str = ""
    area: str = ""
    task: str = ""
    visible: float = math.nan

    @property
    def field(self) -> str:
        """Where it is about: its area, by default the suite."""
        return self.area or self.suite


class Difference(NamedTuple):
    """A paired difference `first - second` with its interval."""

    first: str
    second: str
    task: str
    setting: Any
    value: float
    low: float
    high: float
    n: int

    @property
    def visible(self) -> float:
        """The smallest true difference that 80% of such runs would find, two-sided at 5%; NaN with under two units.

        By Student's quantiles of `n - 1` degrees of freedom, with the standard error that the interval's width implies.
        """
        from scipy.special import stdtrit

        if self.n < 2:
            return math.nan
        least, power = stdtrit(self.n - 1, [0.975, 0.8])
        return float((self.high - self.low) / 2 * (1 + power / least))


def differences(frame: pd.DataFrame, metric: str) -> Iterator[Difference]:
    """All rows of the metric `<metric>_diff`."""
    for row in frame[frame.metric == f"{metric}_diff"].itertuples():
        values = row.value, row.ci_low, row.ci_high, int(row.n)
        yield Difference(row.model, row.other, row.task, row.setting, *values)


def facing(pairs: Iterable[Difference], focus: str) -> list[Difference]:
    """The differences between the model in focus and others, turned so that the focus comes first."""
    turned = []
    for d in pairs:
        mine = [family(d.first) == focus, family(d.second) == focus]
        if mine == [True, False]:
            turned.append(d)
        elif mine == [False, True]:
            turned.append(d._replace(first=d.second, second=d.first, value=-d.value, low=-d.high, high=-d.low))
    return turned


def mains(judged: Iterable[Verdict], focus: str) -> list[Verdict]:
    """Of a rival that is compared with several settings of the focus, the verdict on the main one.

    That is the label that equals the focus, or else the first.
    """
    judged, main = list(judged), dict[tuple[str, str], str]()
    for v in judged:
        key = v.field, v.second
        main[key] = v.first if v.first == focus else main.get(key, v.first)
    return [v for v in judged if v.first == main[v.field, v.second]]


def judge(difference: Difference, *, higher_is_better: bool, p_adjusted: float = math.nan) -> Outcome:
    """Who wins, seen from the first; `unclear` also without an interval or with an adjusted p above .05."""
    low, high = difference.low, difference.high
    if not (math.isfinite(low) and math.isfinite(high)) or low <= 0 <= high or p_adjusted > 0.05:
        return "unclear"
    return "ahead" if (low > 0) == higher_is_better else "behind"


def opening(outcome: Outcome, first: str, second: str, matter: str) -> str:
    """The words that a verdict on two models, named as readers see them, begins with."""
    if outcome == "ahead":
        return f"{first} beats {second} {matter}"
    if outcome == "behind":
        return f"{first} loses to {second} {matter}"
    return f"No clear winner between {first} and {second} {matter}"


def difference_cells(difference: Difference, display: Callable[[str], str]) -> list[Cell]:
    """The pair, named as readers see it, its difference, and the interval."""
    d = difference
    pair = f"{display(d.first)} minus {display(d.second)}"
    return [Cell(pair), Cell(signed(d.value)), Cell(interval(d.low, d.high, sign=True))]


def value_of(frame: pd.DataFrame, **where: object) -> float:
    """The value of the first metric row with these values in these columns; NaN if there is none."""
    row = find_row(frame, **where)
    return math.nan if row is None else float(row.value)


def shown(difference: Difference) -> str:
    """A difference and its interval."""
    return f"{signed(difference.value)} {interval(difference.low, difference.high, sign=True)}".strip()


def sentences(notes: list[str]) -> str:
    """Notes as the detail of a verdict."""
    return ". ".join(notes) + "." if notes else ""
