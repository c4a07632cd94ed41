"""What was measured on one task, as metrics and as material for the report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from glp_lens.evals.entries import Entry
from glp_lens.evals.probing import dense, features, rank
from glp_lens.evals.probing.inference import null_best
from glp_lens.evals.probing.scoring import ALL, PAPER, Choice, SplitScores
from glp_lens.evals.probing.settings import DENSE
from glp_lens.evals.probing.splits import Rows
from glp_lens.evals.results import Metric, Setting
from glp_lens.intervals import auc_interval
from glp_lens.types import Json


@dataclass
class Record:
    """Everything measured on one task, in JSON-like values, as the result cache keeps it.

    Attributes:
        metrics: as `Metric.row` gives them.
        probes: the chosen features of each model, setting and noise seed.
        best: the feature that each model chose among all, with the texts that excite it.
        failures: a sentence for each thing that could not be measured.
    """

    metrics: list[Json] = field(default_factory=list)
    probes: list[Json] = field(default_factory=list)
    best: list[Json] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def add_dense(self, rows: Rows, split: str) -> None:
        """Fit and add the dense probe."""
        x, y, (train, test, folds) = rows.acts.numpy(), rows.labels, rows.splits[split]
        probe = dense.fit(x[train], y[train], x[test], folds)
        writer = _Writer(self, DENSE, rows, split)
        writer.add(Setting(), "auc", **writer.interval(probe.scores))
        writer.add(Setting(), "auc_validation", probe.auc_validation, n=writer.n_train)

    def add_entry(self, scores: SplitScores, entry: Entry, rows: Rows, split: str) -> None:
        """Add all probes of an entry."""
        writer = _Writer(self, entry.label, rows, split)
        for setting, choices in scores.choices.items():
            writer.choice(setting, choices)
        null = writer.null(features.count(entry))
        for setting in (PAPER, ALL):
            gap = np.mean([c.probe.auc_validation - c.probe.auc_test for c in scores.choices[setting]])
            writer.add(setting, "optimism", float(gap), n=writer.n_test)
            writer.add(setting, "auc_null", null, n=writer.n_train)
        for (setting, metric), values in scores.numbers.items():
            writer.add(setting, metric, float(np.mean(values)), n=writer.n_test)
        for ranking, probe in ((ranking, probe) for ranking, probes in scores.sparse.items() for probe in probes):
            setting = ranking | Setting(k=probe.k)
            writer.add(setting, "auc", **writer.interval(probe.scores))
            writer.add(setting, "auc_validation", probe.auc_validation, n=writer.n_train)
            writer.add(setting, "accuracy", probe.accuracy, n=writer.n_test)
            writer.add(setting, "f1", probe.f1, n=writer.n_test)
        if split == "dedup":
            writer.best(scores, entry)


class _Writer:
    """Adds what one model has on one split to a record."""

    def __init__(self, record: Record, label: str, rows: Rows, split: str) -> None:
        self.record, self.label, self.rows, self.name = record, label, rows, split
        self.split = rows.splits[split]
        self.groups = rows.task.groups[rows.text]  # rows of one group are one unit: they are not independent
        self.n_train, self.n_test = (len(np.unique(self.groups[part])) for part in (self.split.train, self.split.test))

    def add(self, setting: Setting, metric: str, value: float, **rest: Any) -> None:
        """A metric; `rest` is `ci_low`, `ci_high`, `n`."""
        setting = Setting(split=self.name) | setting
        made = Metric("probing", self.label, self.rows.task.name, setting, metric, value, **rest)
        self.record.metrics.append(made.row())

    def choice(self, setting: Setting, choices: list[Choice]) -> None:
        """The chosen features of all noise seeds."""
        probes, scores = [c.probe for c in choices], np.stack([c.scores for c in choices])
        by_seed = rank.auc(scores.T, self.rows.labels[self.split.test]).tolist()
        validation = [probe.auc_validation for probe in probes]
        self.add(setting, "auc", **self.interval(scores))
        self.add(setting, "auc_validation", float(np.mean(validation)), n=self.n_train)
        self.add(setting, "n_candidates", probes[0].candidates, n=1)
        if len(probes) > 1:
            self.add(setting, "auc_seed_sd", float(np.std(by_seed, ddof=1)), n=len(probes))
        self.record.probes.append(
            {
                "model": self.label,
                "task": self.rows.task.name,
                "setting": str(Setting(split=self.name) | setting),
                "features": [probe.feature for probe in probes],
                "signs": [probe.sign for probe in probes],
                "auc_validation": validation,
                "auc": by_seed,
            }
        )

    def best(self, scores: SplitScores, entry: Entry) -> None:
        """The feature chosen among all, with the texts that excite it."""
        choice = scores.choices[ALL][0]
        probe, interval = choice.probe, self.interval(choice.scores)
        layers, own = features.layers(entry), features.count(entry) // max(1, len(features.parts(entry)))
        layer, neuron = divmod(probe.feature % own, own // layers)
        self.record.best.append(
            {
                "model": self.label,
                "task": self.rows.task.name,
                "feature": probe.feature,
                "layer": layer if layers > 1 else None,
                "neuron": neuron,
                "sign": probe.sign,
                "auc": probe.auc_test,
                "ci_low": interval["ci_low"],
                "ci_high": interval["ci_high"],
                "auc_validation": probe.auc_validation,
                "texts": scores.texts,
            }
        )

    def null(self, n_features: int) -> float:
        """Validation AUC that the best of so many uninformative features is expected to reach."""
        group, y = self.groups[self.split.train], self.rows.labels[self.split.train]
        folds = [validation for _, validation in self.split.folds]
        counts = [[len(np.unique(group[fold][y[fold] == label])) for fold in folds] for label in (0, 1)]
        return null_best(n_features, *counts)

    def interval(self, scores: ArrayLike) -> Json:
        """AUC of test scores."""
        test = self.split.test
        return auc_interval(scores, self.rows.labels[test], self.groups[test])._asdict()
