"""A task's activations at one hook point, and which of them belong to which split and fold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from glp_lens.errors import InputError, counted
from glp_lens.evals.probing import tasks
from glp_lens.evals.probing.activations import TaskActivations
from glp_lens.evals.probing.tasks import SPLITS, Indices, Split, Task
from glp_lens.types import Acts

FOLDS = 5


class SplitRows(NamedTuple):
    """Row numbers of a split, and its folds as pairs of positions in `train`."""

    train: Indices
    test: Indices
    folds: list[tuple[Indices, Indices]]


@dataclass(frozen=True)
class Rows:
    """Activations of a task at one hook point.

    Attributes:
        task: the task.
        acts: `(n_rows, d_in)`.
        text: index of each row's text, `(n_rows,)`, ascending.
        labels: `(n_rows,)`, 0 or 1.
        splits: those that can be scored.
        problems: a sentence for each thing that cannot be.
    """

    task: Task
    acts: Acts
    text: Indices
    labels: Indices
    splits: dict[str, SplitRows]
    problems: list[str]


def read(task: Task, activations: TaskActivations, hook: str | None) -> Rows:
    """The rows of a task, with folds that never part the rows of one text.

    Raises:
        InputError: rows of other texts than the task's, or that are not finite.
    """
    acts, text = activations.rows(task.name, hook)
    n = len(task.texts)
    missing = np.setdiff1d(np.arange(n), text).tolist()
    if len(acts) != len(text) or text.max(initial=0) >= n or any(task.texts[i].strip() for i in missing):
        raise InputError(
            f"task {task.name!r} has {n} texts, got activations of {n - len(missing)} of them in {len(acts)} rows: "
            "collect them for this very task"
        )
    if not torch.isfinite(acts).all():
        raise InputError(f"task {task.name!r}: expected finite activations, got NaN or infinity: leave these texts out")
    labels, splits, problems = task.labels[text], {}, []
    if missing:
        problems.append(f"{task.name}: left out, as they have no token: {len(missing)} of {counted(n, 'text')}")
    for name in SPLITS:
        try:
            splits[name] = _split(task, name, text, labels)
        except InputError as error:
            problems.append(f"{task.name}, split={name}: skipped, {error}")
    return Rows(task, acts, text, labels, splits, problems)


def _split(task: Task, name: str, text: Indices, labels: Indices) -> SplitRows:
    split: Split = task.splits[name]
    train, test = (np.flatnonzero(np.isin(text, part)) for part in split)
    smallest = np.bincount(labels[test], minlength=2).min()
    if smallest < 2:
        raise InputError(f"the smaller class has {smallest} test rows: 2 are needed")
    groups = task.fold_groups(name)
    groups = text if groups is None else groups[text]
    return SplitRows(train, test, tasks.folds(labels[train], groups[train], FOLDS))
