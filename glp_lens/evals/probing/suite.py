"""Sparse probing: how well the best single feature of each model tells two classes apart."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from glp_lens import provenance
from glp_lens.errors import InputError
from glp_lens.evals.entries import Entry
from glp_lens.evals.probing import dense, rank
from glp_lens.evals.probing.activations import TaskActivations
from glp_lens.evals.probing.inference import auc_interval, holm, sign_flip_p
from glp_lens.evals.probing.tasks import SPLITS, Indices, Split, Task
from glp_lens.evals.results import Results
from glp_lens.evals.statistics import Interval, bootstrap_mean
from glp_lens.interface import Featurizer
from glp_lens.types import Json

FOLDS = 5
DENSE = "dense"
"""Label of the logistic regression on all raw dimensions, an upper reference."""
ALL = "all"
"""The `task` of means over tasks."""


@dataclass(frozen=True)
class _Options:
    """What `run` was asked for; see there."""

    seeds: tuple[int, ...]
    max_features: int
    row_block: int
    resamples: int
    seed: int
    device: str


class _Line(NamedTuple):
    """One model on one task in one setting, over all noise seeds; the dense probe has no `probes`."""

    auc: Interval
    auc_validation: float
    n_train: int
    auc_by_seed: list[float]
    probes: list[rank.Probe]


_Table = dict[str, dict[str, _Line]]
"""Lines by model label, then task name."""


def run(
    entries: Sequence[Entry],
    tasks: Sequence[Task],
    activations: TaskActivations,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    max_features: int = 512,
    row_block: int = 1024,
    resamples: int = 2000,
    seed: int = 0,
    device: str = "cpu",
    allow_mismatch: bool = False,
) -> Results:
    """Probe every entry on every task with its best single feature.

    Feature and sign are chosen on train rows alone (see `rank`); test rows are looked at once. Two views:
    `mode=all` chooses among all features, `mode=paper` among the `max_features` with the largest
    class-mean difference, which also gives models of different size the same number of candidates.
    A stochastic model is probed once for each noise seed, each choosing its own feature, and its AUC is the
    mean; on one task all models see the same noise.

    Metrics, with `setting` = `split=official|dedup;mode=paper|all`:

    - `auc` and `auc_validation` of each task, and of task `all`: the mean over tasks;
    - `n_candidates`: the number of features chosen from;
    - `auc_seed_sd`: standard deviation of a stochastic model's test AUC over noise seeds;
    - `auc_diff:B` of entry A and task `all`: the mean of A - B over tasks, once for each pair in the order
      of the entries, and `p_holm:B`, its sign-flip p, adjusted over all pairs of one setting.

    The model `dense` is a logistic regression on all raw dimensions, under `split=...` alone. Intervals of
    one task cover the draw of test rows; intervals and p values over tasks cover the draw of families, whose
    number is their `n`.

    Args:
        entries: models with the `Featurizer` capability; others are noted in `failures` and left out.
        tasks: see `tasks.load`.
        activations: see `activations.collect`; in the language model's units.
        seeds: noise seeds.
        max_features: the number of candidates in `mode=paper`.
        row_block: rows encoded at once.
        resamples: bootstrap draws.
        seed: of the bootstrap and the sign flips.
        device: where activations and noise are handed to the models.
        allow_mismatch: probe models trained at another hook point, or on another language model or weight
            processing; each is noted in `failures`.

    Raises:
        InputError: nothing to probe, labels that are not unique, activations that do not fit the models.
    """
    start = time.perf_counter()
    options = _Options(tuple(seeds), max_features, row_block, resamples, seed, device)
    _check(entries, tasks, options)
    accepted = _check_activations(entries, tasks, activations, allow_mismatch)
    results = Results(
        "probing",
        config={
            **asdict(options),
            "entries": {entry.label: {"kind": entry.model.kind, **entry.options} for entry in entries},
            "folds": FOLDS,
        },
        data={
            **activations.source,
            "tasks": {task.name: _describe(task) for task in tasks},
            "models": {entry.label: entry.model.provenance for entry in entries},
        },
        failures=accepted,
    )
    usable = [entry for entry in entries if isinstance(entry.model, Featurizer)]
    for entry in entries:
        if entry not in usable:
            results.failures.append(f"{entry.label}: gives no features to probe ({entry.model.kind})")
    tables: dict[str, _Table] = defaultdict(lambda: defaultdict(dict))
    for task in tqdm(tasks, desc="probing", unit="task", mininterval=2):
        x = activations.rows[task.name]
        splits, problems = _usable_splits(task)
        results.failures += problems
        for name, split in splits.items():
            tables[f"split={name}"][DENSE][task.name] = _dense(task, x, split)
        for entry in usable if splits else []:
            lines = _probe(task, entry, x, splits, options)
            if not lines:
                results.failures.append(f"{entry.label} on {task.name}: skipped, features are not finite")
            for setting, line in lines.items():
                tables[setting][entry.label][task.name] = line
    _write_tasks(results, tables)
    families = {task.name: task.family for task in tasks}
    for setting, table in tables.items():
        _write_means(results, setting, table, families, options)
        _write_pairs(results, setting, {e.label: table[e.label] for e in usable if e.label in table},
                     families, options)  # fmt: skip
    results.seconds = time.perf_counter() - start
    return results


def _check(entries: Sequence[Entry], tasks: Sequence[Task], options: _Options) -> None:
    if not entries or not tasks or not options.seeds or options.max_features < 1:
        raise InputError(
            f"expected at least one model, task, noise seed and feature, got {len(entries)} models, "
            f"{len(tasks)} tasks, {len(options.seeds)} noise seeds and max_features={options.max_features}"
        )
    for what, found, reserved in (
        ("labels", [entry.label for entry in entries], DENSE),
        ("task names", [task.name for task in tasks], ALL),
    ):
        if len({*found, reserved}) <= len(found):
            raise InputError(f"{what} must be unique and other than {reserved!r}, got {', '.join(found)}")


def _check_activations(
    entries: Sequence[Entry], tasks: Sequence[Task], activations: TaskActivations, allow_mismatch: bool
) -> list[str]:
    """Refuse activations that do not fit the models; a line for each mismatch that was accepted."""
    widths = set()
    for task in tasks:
        rows = activations.rows.get(task.name)
        if rows is None or len(rows) != len(task.texts):
            raise InputError(
                f"task {task.name!r} has {len(task.texts)} texts, got activations of "
                f"{'none' if rows is None else len(rows)}: collect them for this very task"
            )
        widths.add(rows.shape[1])
    models = {entry.label: entry.model for entry in entries}
    return [
        note
        for width in widths
        for note in provenance.check_models(
            models, {**activations.source, "d_in": width}, allow_mismatch=allow_mismatch
        )
    ]


def _describe(task: Task) -> Json:
    sizes = {name: {"train": len(rows.train), "test": len(rows.test)} for name, rows in task.splits.items()}
    return {"family": task.family, "classes": list(task.classes), **sizes}


def _usable_splits(task: Task) -> tuple[dict[str, Split], list[str]]:
    """Splits with both classes in every fold and enough test rows for a variance; a line for each other."""
    splits, problems = {}, []
    for name in SPLITS:
        train, test = (np.bincount(task.labels[rows], minlength=2).min() for rows in task.splits[name])
        if train >= FOLDS and test >= 2:
            splits[name] = task.splits[name]
        else:
            problems.append(
                f"{task.name}, split={name}: skipped, smaller class has {train} train rows (needs {FOLDS}) "
                f"and {test} test rows (needs 2)"
            )
    return splits, problems


def _dense(task: Task, x: Tensor, split: Split) -> _Line:
    y = task.labels
    found = dense.fit(x[split.train].numpy(), y[split.train], x[split.test].numpy(), FOLDS)
    interval = auc_interval(found.scores, y[split.test])
    return _Line(interval, found.auc_validation, len(split.train), [interval.value], [])


def _probe(task: Task, entry: Entry, x: Tensor, splits: dict[str, Split], options: _Options) -> dict[str, _Line]:
    """Lines of one entry by setting, over all noise seeds; empty if a feature is not finite."""
    model = entry.model
    assert isinstance(model, Featurizer)
    probes: dict[tuple[str, str], list[rank.Probe]] = defaultdict(list)
    scores: dict[tuple[str, str], list[NDArray[np.float64]]] = defaultdict(list)
    for seed in options.seeds if model.stochastic else options.seeds[:1]:
        features = _encode(entry, x, _noise(task, seed, x), options)
        if not np.isfinite(features).all():
            return {}
        for name, (train, test) in splits.items():
            y = task.labels[train]
            validation = rank.validation_auc(features[train], y, FOLDS)
            for mode, keep in (("paper", options.max_features), ("all", None)):
                probe = rank.choose(features[train], y, keep=keep, validation=validation)
                probes[name, mode].append(probe)
                scores[name, mode].append(probe.score(features[test]))
    return {
        f"split={name};mode={mode}": _line(found, np.stack(scores[name, mode]), task.labels, splits[name])
        for (name, mode), found in probes.items()
    }


def _line(probes: list[rank.Probe], scores: NDArray[np.float64], labels: Indices, split: Split) -> _Line:
    y = labels[split.test]
    validation = float(np.mean([probe.auc_validation for probe in probes]))
    return _Line(auc_interval(scores, y), validation, len(split.train), rank.auc(scores.T, y).tolist(), probes)


@torch.no_grad()
def _encode(entry: Entry, x: Tensor, noise: Tensor, options: _Options) -> NDArray[np.float32]:
    """Features `(n, n_features)` of rows `(n, d_in)`, made in blocks of rows."""
    model = entry.model
    assert isinstance(model, Featurizer)
    features = np.empty((len(x), model.n_features), dtype=np.float32)
    for start in range(0, len(x), options.row_block):
        part = slice(start, start + options.row_block)
        rows, eps = x[part].to(options.device), noise[part].to(options.device)
        features[part] = model.encode(rows, noise=eps, **entry.options).float().cpu().numpy()
    return features


def _noise(task: Task, seed: int, x: Tensor) -> Tensor:
    """Standard normal `(n, d_in)`: the same for all models, another for each task and seed."""
    key = xxhash.xxh3_64_intdigest(f"{seed}:{task.name}".encode()) >> 1
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(key))


def _write_tasks(results: Results, tables: dict[str, _Table]) -> None:
    """One task's numbers as metrics, and which features were chosen as extras for the report."""
    chosen: list[Json] = []
    for setting, table in tables.items():
        for label, lines in table.items():
            for task, line in lines.items():
                results.add(label, task, setting, "auc", **line.auc._asdict())
                results.add(label, task, setting, "auc_validation", line.auc_validation, n=line.n_train)
                if not line.probes:
                    continue
                results.add(label, task, setting, "n_candidates", line.probes[0].candidates, n=1)
                if len(line.probes) > 1:
                    spread = float(np.std(line.auc_by_seed, ddof=1))
                    results.add(label, task, setting, "auc_seed_sd", spread, n=len(line.probes))
                chosen.append(
                    {
                        "model": label,
                        "task": task,
                        "setting": setting,
                        "features": [probe.feature for probe in line.probes],
                        "signs": [probe.sign for probe in line.probes],
                        "auc_validation": [probe.auc_validation for probe in line.probes],
                        "auc": line.auc_by_seed,
                    }
                )
    results.extras["probes"] = chosen


def _write_means(results: Results, setting: str, table: _Table, families: dict[str, str], options: _Options) -> None:
    for label, lines in table.items():
        for metric, values in (
            ("auc", {task: line.auc.value for task, line in lines.items()}),
            ("auc_validation", {task: line.auc_validation for task, line in lines.items()}),
        ):
            mean = _over_families(values, families, options)
            results.add(label, ALL, setting, metric, **mean._asdict())


def _write_pairs(results: Results, setting: str, table: _Table, families: dict[str, str], options: _Options) -> None:
    """Paired differences over the tasks that both models of a pair have."""
    pairs, p_values = list(combinations(table, 2)), []
    means = []
    for a, b in pairs:
        shared = [task for task in table[a] if task in table[b]]
        differences = {task: table[a][task].auc.value - table[b][task].auc.value for task in shared}
        means.append(_over_families(differences, families, options))
        clusters = [families[task] for task in shared]
        p_values.append(sign_flip_p(list(differences.values()), clusters, seed=options.seed))
    for (a, b), mean, p in zip(pairs, means, holm(p_values), strict=True):
        results.add(a, ALL, setting, f"auc_diff:{b}", **mean._asdict())
        results.add(a, ALL, setting, f"p_holm:{b}", p, n=mean.n)


def _over_families(values: dict[str, float], families: dict[str, str], options: _Options) -> Interval:
    clusters = [families[task] for task in values]
    return bootstrap_mean(list(values.values()), clusters, resamples=options.resamples, seed=options.seed)
