"""Priors beside other kinds of models that cost as much."""

from __future__ import annotations

import numpy as np
import pandas as pd

from glp_lens.evals.probing.tasks import family
from glp_lens.evals.results import Results, Setting
from glp_lens.evals.statistics import intervals, resampling
from glp_lens.intervals import Interval
from glp_lens.scaling.utilities import Utility

_Z = 1.96
"""Half of a 95% interval, in standard errors."""


def leads(results: Results, table: pd.DataFrame, shown: list[Utility]) -> None:
    """Add how far the priors of each size and budget lead the best model of every other kind that costs no more.

    Where all of a kind cost more, the cheapest of it is taken. Adds `lead:KIND`, positive where the prior is better
    whichever way the utility points, and `leads_from:KIND`, the compute from which on all leads are clear (NaN if the
    largest is not). The best of the others is taken by its value, which favours them. Where both have values of several
    tasks, the interval is that of the paired differences, resampling families of tasks; else it adds the variances of
    the two as if they were independent, though they were measured on the same texts, and errs on the wide side. That of
    the seeds is added to either.

    Args:
        results: to add to.
        table: utilities of the cells as `utility_table` gives them, with `size`, `rows` and `flops`.
        shown: which utilities it has.
    """
    for utility in shown:
        sign = 1 if utility.higher else -1
        own = table[table.utility == utility.name]
        priors = own[own.kind == "glp"].sort_values("flops")
        for kind in [kind for kind in own.kind.unique() if kind != "glp"]:
            others = own[own.kind == kind]
            clear: list[tuple[float, bool]] = []
            for (size, rows), group in priors.groupby(["size", "rows"], sort=False):
                flops = float(group.flops.mean())
                cheap = others[others.flops <= flops]
                if cheap.empty:
                    cheap = others[others.flops == others.flops.min()]
                best = cheap.iloc[int((sign * cheap.value).to_numpy().argmax())]
                gap = _paired(group, best, sign) or _independent(group, best, sign)
                if len(group) > 1:
                    gap = _wider(gap, float(group.value.var()) / len(group))
                results.add(
                    "glp", utility.name, Setting(size=size, rows=rows, cell=best.cell), "lead", gap.value,
                    ci_low=gap.ci_low, ci_high=gap.ci_high, n=gap.n, other=kind,
                )  # fmt: skip
                clear.append((flops, bool(gap.ci_low > 0)))
            if clear:
                clear.sort()
                behind = [i for i, (_, ahead) in enumerate(clear) if not ahead]
                first = behind[-1] + 1 if behind else 0
                start = clear[first][0] if first < len(clear) else np.nan
                results.add("glp", utility.name, "", "leads_from", start, n=len(clear), other=kind)


def _paired(group: pd.DataFrame, best: pd.Series, sign: int) -> Interval | None:
    """Mean over the tasks that all have of the differences, the seeds averaged; None if they share fewer than two."""
    shared = sorted(set.intersection(*map(set, (*group.tasks, best.tasks))))
    if len(shared) < 2:
        return None
    own = np.mean([[tasks[task] for task in shared] for tasks in group.tasks], axis=0)
    gaps = sign * (own - np.array([best.tasks[task] for task in shared]))
    _, owner = np.unique([_family(task) for task in shared], return_inverse=True)
    sums, counts = np.bincount(owner, weights=gaps), np.bincount(owner)
    weights = resampling(n := len(sums))
    value, low, high = map(float, intervals((weights @ sums) / (weights @ counts), n))
    return Interval(value, low, high, n)


def _family(task: str) -> str:
    """Of a task of sae-probes; one of other texts is its own."""
    try:
        return family(task)
    except ValueError:  # no number in front
        return task


def _independent(group: pd.DataFrame, best: pd.Series, sign: int) -> Interval:
    value = sign * float(group.value.mean() - best.value)
    half = _Z * np.sqrt(_variance(group.ci_low, group.ci_high) + _variance(best.ci_low, best.ci_high))
    return Interval(value, value - half, value + half, int(group.n.min()))


def _wider(gap: Interval, variance: float) -> Interval:
    """With the ends as far again as an independent error of that variance puts them."""
    low, high = (np.hypot(end - gap.value, _Z * np.sqrt(variance)) for end in (gap.ci_low, gap.ci_high))
    return Interval(gap.value, gap.value - low, gap.value + high, gap.n)


def _variance(low: pd.Series | float, high: pd.Series | float) -> float:
    """Of the mean over cells that a suite measured on the same units, from the ends of their 95% intervals."""
    return float((np.mean(np.asarray(high) - np.asarray(low)) / 2 / _Z) ** 2)
