"""Statistics over all tasks: means, and paired comparisons of the main entries."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from tqdm.auto import tqdm

from glp_lens.evals.probing.inference import sign_flip_p, win_rate
from glp_lens.evals.probing.settings import MEAN
from glp_lens.evals.results import Metric, Results, Setting
from glp_lens.evals.statistics import bootstrap_mean, holm
from glp_lens.intervals import Interval

NOT_AVERAGED = ("auc_seed_sd",)
Table = Mapping[str, Mapping[str, float]]
"""Values by model label, then task name."""


@dataclass(frozen=True)
class AcrossTasks:
    """Settings of statistics over tasks.

    Attributes:
        families: of each task; whole families are resampled and flipped.
        resamples: bootstrap draws.
        seed: of the bootstrap and the sign flips.
    """

    families: Mapping[str, str]
    resamples: int
    seed: int

    def mean(self, values: Mapping[str, float]) -> Interval:
        """Mean over tasks, with the interval over families."""
        return bootstrap_mean(list(values.values()), self.families_of(values), resamples=self.resamples, seed=self.seed)

    def families_of(self, tasks: Iterable[str]) -> list[str]:
        """Family of each task."""
        return [self.families[task] for task in tasks]


def add_means(results: Results, across: AcrossTasks) -> None:
    """Add the mean over tasks of every metric."""
    for (setting, metric), table in _bar(tables(results.metrics), "means"):
        for model, values in table.items() if metric not in NOT_AVERAGED else ():
            results.add(model, MEAN, setting, metric, **across.mean(values)._asdict())


def add_pairs(results: Results, main: Sequence[str], smallest: int, across: AcrossTasks) -> None:
    """Add paired comparisons of the main entries, on the tasks that both have, with Holm's adjustment by setting."""
    for (setting, metric), table in _bar(tables(results.metrics), "pairs"):
        if metric == "auc" and _compared(setting, smallest):
            _pairs(results, setting, {label: table[label] for label in main if label in table}, across)


def _compared(setting: Setting, smallest: int) -> bool:
    """Whether main entries are compared at a setting: all of one feature, but for single layers, or k-sparse probes."""
    if setting.get("mode") == "equal":
        return setting.get("features") == str(smallest)
    return (setting.get("mode") or setting.get("probe")) is not None and setting.get("layer") is None


def tables(metrics: Iterable[Metric]) -> dict[tuple[Setting, str], dict[str, dict[str, float]]]:
    """Values of single tasks by setting and metric, then model, then task."""
    values: dict[tuple[Setting, str], dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for m in metrics:
        if m.task != MEAN:
            values[m.setting, m.metric][m.model][m.task] = m.value
    return values


def _bar(by_setting: dict[tuple[Setting, str], Any], what: str) -> tqdm[Any]:
    return tqdm(by_setting.items(), desc=f"probing, {what}", unit="setting", mininterval=2, leave=False)


def _pairs(results: Results, setting: Setting, table: Table, across: AcrossTasks) -> None:
    pairs = []
    for a, b in combinations(table, 2):
        shared = [task for task in table[a] if task in table[b]]
        if not shared:
            continue
        one, other = [table[a][task] for task in shared], [table[b][task] for task in shared]
        gap = [x - y for x, y in zip(one, other, strict=True)]
        families = across.families_of(shared)
        wins = win_rate(one, other, families, resamples=across.resamples, seed=across.seed)
        mean = across.mean(dict(zip(shared, gap, strict=True)))
        pairs.append((a, b, mean, wins, sign_flip_p(gap, families, seed=across.seed)))
    for (a, b, mean, wins, _), p in zip(pairs, holm([p for *_, p in pairs]), strict=True):
        results.add(a, MEAN, setting, "auc_diff", **mean._asdict(), other=b)
        results.add(a, MEAN, setting, "win_rate", **wins._asdict(), other=b)
        results.add(a, MEAN, setting, "p_holm", p, n=mean.n, other=b)
