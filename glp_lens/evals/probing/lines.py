"""What was found on one task, as a JSON-like record: metrics, and material for the report."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from glp_lens.evals.entries import Entry
from glp_lens.evals.probing import dense, features, rank
from glp_lens.evals.probing.inference import auc_interval, null_best
from glp_lens.evals.probing.rows import Rows, SplitRows
from glp_lens.evals.probing.scoring import Choice, Found
from glp_lens.types import Json

DENSE = "dense"
"""Label of the logistic regression on all raw dimensions, an upper reference."""
LISTS = ("metrics", "probes", "best", "failures")


def record(found: Found, entry: Entry, rows: Rows, name: str) -> Json:
    """The record of one entry on one split."""
    return _Record(entry.label, rows, name).of(found, entry)


def reference(rows: Rows, name: str) -> Json:
    """The record of the dense probe on one split."""
    split, y = rows.splits[name], rows.labels
    x = rows.acts.numpy()
    probe = dense.fit(x[split.train], y[split.train], x[split.test], split.folds)
    made = _Record(DENSE, rows, name)
    made.add("", "auc", **made.interval(probe.scores))
    made.add("", "auc_validation", probe.auc_validation, n=made.n_train)
    return made.lists


class _Record:
    """A record of one model on one split, in the making."""

    def __init__(self, label: str, rows: Rows, name: str) -> None:
        self.label, self.rows, self.name = label, rows, name
        self.split: SplitRows = rows.splits[name]
        self.groups = rows.task.groups[rows.text]  # rows of one group are one unit: they are not independent
        self.n_train, self.n_test = (len(np.unique(self.groups[part])) for part in (self.split.train, self.split.test))
        self.lists: Json = {key: [] for key in LISTS}

    def of(self, found: Found, entry: Entry) -> Json:
        """Everything of an entry."""
        for setting, choices in found.choices.items():
            self.choice(setting, choices)
        null = self.null(features.count(entry))
        for setting in ("mode=paper", "mode=all"):
            choices = found.choices[setting]
            gap = np.mean([c.probe.auc_validation - c.probe.auc_test for c in choices])
            self.add(setting, "optimism", float(gap), n=self.n_test)
            self.add(setting, "auc_null", null, n=self.n_train)
        for (setting, metric), values in found.numbers.items():
            self.add(setting, metric, float(np.mean(values)), n=self.n_test)
        for ranking, probe in ((ranking, probe) for ranking, probes in found.sparse.items() for probe in probes):
            setting = f"{ranking};k={probe.k}"
            self.add(setting, "auc", **self.interval(probe.scores))
            self.add(setting, "auc_validation", probe.auc_validation, n=self.n_train)
            self.add(setting, "accuracy", probe.accuracy, n=self.n_test)
            self.add(setting, "f1", probe.f1, n=self.n_test)
        if self.name == "dedup":
            self.best(found, entry)
        return self.lists

    def choice(self, setting: str, choices: list[Choice]) -> None:
        """The chosen features of all noise seeds."""
        probes, scores = [c.probe for c in choices], np.stack([c.scores for c in choices])
        by_seed = rank.auc(scores.T, self.rows.labels[self.split.test]).tolist()
        self.add(setting, "auc", **self.interval(scores))
        validation = [probe.auc_validation for probe in probes]
        self.add(setting, "auc_validation", float(np.mean(validation)), n=self.n_train)
        self.add(setting, "n_candidates", probes[0].candidates, n=1)
        if len(probes) > 1:
            self.add(setting, "auc_seed_sd", float(np.std(by_seed, ddof=1)), n=len(probes))
        self.lists["probes"].append(
            {
                "model": self.label,
                "task": self.rows.task.name,
                "setting": f"split={self.name};{setting}",
                "features": [probe.feature for probe in probes],
                "signs": [probe.sign for probe in probes],
                "auc_validation": validation,
                "auc": by_seed,
            }
        )

    def best(self, found: Found, entry: Entry) -> None:
        """The feature chosen among all, with the texts that excite it."""
        probe = found.choices["mode=all"][0].probe
        layers, own = features.layers(entry), features.count(entry) // max(1, len(features.parts(entry)))
        layer, neuron = divmod(probe.feature % own, own // layers)
        self.lists["best"].append(
            {
                "model": self.label,
                "task": self.rows.task.name,
                "feature": probe.feature,
                "layer": layer if layers > 1 else None,
                "neuron": neuron,
                "sign": probe.sign,
                "auc": probe.auc_test,
                "auc_validation": probe.auc_validation,
                "texts": found.texts,
            }
        )

    def null(self, n_features: int) -> float:
        """What the best of so many features reaches in validation that know nothing."""
        group, y = self.groups[self.split.train], self.rows.labels[self.split.train]
        folds = [validation for _, validation in self.split.folds]
        counts = [[len(np.unique(group[fold][y[fold] == label])) for fold in folds] for label in (0, 1)]
        return null_best(n_features, *counts)

    def interval(self, scores: ArrayLike) -> Json:
        """AUC of test scores."""
        test = self.split.test
        return auc_interval(scores, self.rows.labels[test], self.groups[test])._asdict()

    def add(self, setting: str, metric: str, value: float, **rest: Any) -> None:
        """A metric; `rest` is `ci_low`, `ci_high`, `n`."""
        setting = ";".join(filter(None, (f"split={self.name}", setting)))
        self.lists["metrics"].append(
            {"model": self.label, "task": self.rows.task.name, "setting": setting, "metric": metric, "value": value}
            | rest
        )
