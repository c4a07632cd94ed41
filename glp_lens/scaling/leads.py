"""Priors beside other kinds of models that cost as much."""

from __future__ import annotations

import numpy as np
import pandas as pd

from glp_lens.evals.results import Results, Setting
from glp_lens.scaling.utilities import Utility


def leads(results: Results, table: pd.DataFrame, shown: list[Utility]) -> None:
    """Add how far the priors of each size and budget lead the best model of every other kind that costs no more.

    Where all of a kind cost more, the cheapest of it is taken. Adds `lead:KIND`, positive where the prior is better
    whichever way the utility points, and `leads_from:KIND`, the compute from which on all leads are clear (NaN if the
    largest is not). The best of the others is taken by its value, which favours them. The two are measured on the same
    tasks but by separate runs of a suite, so the interval adds their variances as if they were independent, and that of
    the seeds: it errs on the wide side.

    Args:
        results: to add to.
        table: utilities of the cells, with `size`, `rows` and `flops`.
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
                value = sign * float(group.value.mean() - best.value)
                half = 1.96 * np.sqrt(_variance(group.ci_low, group.ci_high) + _variance(best.ci_low, best.ci_high)
                                      + (group.value.var() / len(group) if len(group) > 1 else 0.0))  # fmt: skip
                results.add(
                    "glp", utility.name, Setting(size=size, rows=rows, cell=best.cell), "lead", value,
                    ci_low=value - half, ci_high=value + half, n=int(group.n.min()), other=kind,
                )  # fmt: skip
                clear.append((flops, bool(value - half > 0)))
            if clear:
                clear.sort()
                behind = [i for i, (_, ahead) in enumerate(clear) if not ahead]
                first = behind[-1] + 1 if behind else 0
                start = clear[first][0] if first < len(clear) else np.nan
                results.add("glp", utility.name, "", "leads_from", start, n=len(clear), other=kind)


def _variance(low: pd.Series | float, high: pd.Series | float) -> float:
    """Of the mean over cells that a suite measured on the same units, from the ends of their 95% intervals."""
    return float((np.mean(np.asarray(high) - np.asarray(low)) / 2 / 1.96) ** 2)
