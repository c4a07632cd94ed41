"""Probing tasks of a user's own: labelled texts of a file, or labelled rows of an activation store."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from tqdm.auto import tqdm

from glp_lens.activations import ActivationStore
from glp_lens.arguments import checked
from glp_lens.corpus import parse_number
from glp_lens.corpus.files import read_rows
from glp_lens.corpus.tables import TABLES, kind_of
from glp_lens.errors import InputError
from glp_lens.evals.probing.activations import TaskActivations
from glp_lens.evals.probing.tasks import Indices, Task, all_names, build, folds, load, names
from glp_lens.types import Json

LEAST = {"train": 5, "test": 2}
"""Fewest rows of each class: one a fold, and two for the variance of a test AUC."""

_NAME = re.compile(r"\w([\w. -]*[\w-])?", re.ASCII)


@checked
def open_tasks(
    specs: str | Sequence[str] | None = None,
    *,
    max_train: int | None = None,
    max_test: int | None = None,
    **options: Any,
) -> list[Task]:
    """Tasks by name or file, as a command line gives them.

    Args:
        specs: each a shell pattern of sae-probes names, `all` of them, a csv, tsv, jsonl, json or parquet file, or
            `name=file`. Without any, the default tasks; see `tasks.names`.
        max_train: use at most so many train texts of each task.
        max_test: likewise for test texts.
        options: of `from_file`, for the tasks of files: `text`, `label`, `group`, `split`, `positive`, `seed`.

    Raises:
        InputError: a pattern that matches nothing, a file that makes no task, two tasks of one name.
    """
    given = names(None) if not specs else [specs] if isinstance(specs, str) else specs
    known: dict[str, None] = {}
    files: dict[str, str] = {}
    for spec in given:
        if kind_of(spec) not in TABLES:
            known |= dict.fromkeys(names(spec))
            continue
        name, equals, path = spec.partition("=")
        if not equals or Path(spec).exists():
            name, path = Path(spec).stem, spec
        if name in files:
            raise InputError(f"two tasks have the name {name!r}: pass one of them as another_name={path}")
        files[name] = path
    most: Json = {"max_train": max_train, "max_test": max_test}
    own = [from_file(path, name=name, **most, **options) for name, path in files.items()]
    bar = tqdm(known, desc="read tasks", unit="task", mininterval=2, delay=2)
    return [load(name, **most) for name in bar] + own


@checked
def from_file(
    path: str | Path,
    *,
    text: str = "text",
    label: str = "label",
    group: str | None = None,
    split: str | None = None,
    positive: object = None,
    name: str | None = None,
    test_share: float = 0.25,
    max_train: int | None = None,
    max_test: int | None = None,
    seed: int = 0,
) -> Task:
    """A task from the rows of a csv, tsv, jsonl, json or parquet file.

    Args:
        path: the file.
        text: column of the texts.
        label: column of the classes: text, booleans or numbers. Different texts are different classes. Class 1
            is the value that sorts last, as a number if all are different numbers, also where they are text.
        group: column of what belongs together, such as an author or a document: not parted between train and test,
            nor between folds. By default equal texts belong together.
        split: column with the values `train` and `test`, which is then the official split even where it parts groups.
            Without it, groups are drawn at random, stratified by class.
        positive: of a column with more than two values, class 1; all others are class 0.
        name: letters, digits, `-`, `_`, `.` and spaces; by default the file's name without its ending.
        test_share: share of the groups to test on.
        max_train: use at most so many train rows, half of each class where there are enough.
        max_test: likewise for test rows.
        seed: of the split and of the order of the rows.

    Raises:
        InputError: a file or column that is missing; a row without text, label, group or split, or with a list of
            labels, by its number; other than two classes; labels that only white space tells apart; too few rows; a
            bad name.
    """
    name = _checked_name(Path(path).stem if name is None else name)
    texts: list[str] = []
    marks: dict[str, list[Any]] = {column: [] for column in (label, group, split) if column}
    rows = read_rows(path, text, list(marks))
    for number, row in enumerate(tqdm(rows, desc=f"read {name}", unit="row", mininterval=2, delay=2), start=1):
        place = f"{path}, row {number}"
        value = _cell(row, text, place)
        if not isinstance(value, str):
            raise InputError(f"{place}: expected text in {text!r}, got {str(value)[:40]!r}: name the text column")
        texts.append(value)
        for column, values in marks.items():
            values.append(_cell(row, column, place))
        for column, values in marks.items():
            if isinstance(values[-1], list | dict):
                raise InputError(
                    f"{place}: expected one {'class' if column == label else 'value'} in {column!r}, got "
                    f"{str(values[-1])[:40]} of type {type(values[-1]).__name__}: write one value a row"
                )
    labels, classes = _binary(marks[label], f"column {label!r} of {path}", positive)
    together = [_written(value) for value in marks[group]] if group else [value.strip() for value in texts]
    groups, _ = pd.factorize(np.array(together, dtype=object))
    is_test = _is_test(marks[split], str(path)) if split else None
    train, test = _arrange(labels, groups, is_test, test_share, (max_train, max_test), seed)
    return _checked(build(name, texts, labels, train, test, classes=classes, groups=groups))


@checked
def from_store(
    store: ActivationStore,
    label: str,
    *,
    positive: object = None,
    name: str | None = None,
    test_share: float = 0.25,
    max_train: int | None = 1024,
    max_test: int | None = 1024,
    seed: int = 0,
) -> tuple[Task, TaskActivations]:
    """A task from a labelled column of an activation store, and its activations: each row is a token.

    No document is parted between train and test nor between folds, in neither split.

    Args:
        store: where the rows are.
        label: the column. Rows where it is negative or NaN have no label and are left out.
        positive: of a column with more than two values, class 1; all others are class 0. `token_id` can be probed
            so too.
        name: by default that of the column; see `from_file`.
        test_share: share of the documents to test on.
        max_train: use at most so many train rows, half of each class where there are enough.
        max_test: likewise for test rows.
        seed: of the split and of the choice of rows.

    Raises:
        InputError: no such column; other than two classes; too few rows or documents; a bad name.
    """
    name = _checked_name(label if name is None else name)
    values = store.column(label)
    labelled = np.flatnonzero(values >= 0)
    place = f"column {label!r} of {store.path}, without rows that are negative or NaN,"
    y, classes = _binary(values[labelled], place, positive)
    documents = store.column("doc_id")[labelled]
    groups, _ = pd.factorize(documents)
    train, test = _arrange(y, groups, None, test_share, (max_train, max_test), seed)
    chosen = np.concatenate([train, test])
    rows, documents, y = labelled[chosen], documents[chosen], y[chosen]
    position = store.column("position")
    # Rows of unknown position would all look like the same token of their document.
    kind, places = ("position", position[rows]) if position.any() else ("row", rows)
    texts = [f"document {document}, {kind} {place}" for document, place in zip(documents, places, strict=True)]
    order = np.arange(len(rows))
    task = build(name, texts, y, order[: len(train)], order[len(train) :], classes=classes, groups=documents)
    facts = store.provenance()
    source = {key: facts.get(key) for key in ("model", "weights", "hook", "context", "corpus", "manifest_hash")}
    source |= {"hooks": [store.hook], "pooling": "all"}
    return _checked(task), TaskActivations.of({name: store.take(rows)}, source)


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise InputError(
            f"a task's name must be of letters, digits, '-', '_', '.' and spaces, got {name!r}: pass another name"
        )
    if name in all_names():
        raise InputError(f"{name!r} is a task of sae-probes: pass another name for your own")
    return name


def _cell(row: Mapping[str, Any], column: str, place: str) -> Any:
    """A value that is there: not null, NaN or empty text."""
    value = row.get(column)
    nothing = math.isnan(value) if isinstance(value, float) else value is None or not str(value).strip()
    if nothing:
        raise InputError(f"{place} has nothing in {column!r}: fill it in or leave out the row")
    return value


def _is_test(values: Sequence[Any], path: str) -> NDArray[np.bool_]:
    parts = [str(value).strip().lower() for value in values]
    for number, part in enumerate(parts, start=1):
        if part not in LEAST:
            raise InputError(f"{path}, row {number}: expected the split train or test, got {part[:40]!r}")
    return np.array([part == "test" for part in parts], dtype=bool)


def _binary(values: ArrayLike, place: str, positive: object) -> tuple[Indices, tuple[str, str]]:
    """Labels `(n,)` 0 and 1, and what they stand for."""
    codes, distinct = pd.factorize(np.asarray(values, dtype=object))
    titles = [_written(value) for value in distinct]
    _check_spaces(distinct, titles, place)
    numbers = _as_numbers(dict(zip(titles, distinct, strict=True)))
    order = sorted(set(titles), key=lambda title: numbers.get(title, title))
    if len(order) < 2:
        only = f"only the value {order[0]!r}" if order else "no values"
        raise InputError(f"{place} holds {only}, expected two classes: add rows of each class")
    if positive is None:
        if len(order) > 2:
            raise InputError(
                f"{place} holds {len(order)} values ({', '.join(order[:5])}), expected two: "
                "choose one as positive, against the rest"
            )
        high = order[-1]
    else:
        wanted = _written(positive)
        number = _as_numbers({wanted: positive}).get(wanted)
        matches = [title for title in order if title == wanted or (numbers and numbers[title] == number)]
        if not matches:
            raise InputError(
                f"{place} holds the values {', '.join(order[:5])}: expected the positive value {wanted!r} among them"
            )
        high = matches[0]
    rest = [title for title in order if title != high]
    is_high = np.array([title == high for title in titles])
    return is_high[codes].astype(np.int64), (rest[0] if len(rest) == 1 else f"not {high}", high)


def _as_numbers(values: Mapping[str, Any]) -> dict[str, int | float]:
    """The number that each value is, also where it is text, by its title; nothing unless they are different numbers.

    So codes that write one number in two ways, such as `01` and `1` or `1E5` and `100000`, stay different texts.
    """
    try:
        numbers = {title: parse_number(value) for title, value in values.items()}
    except ValueError:
        return {}
    return numbers if len(set(numbers.values())) == len(numbers) else {}


def _check_spaces(values: Sequence[Any], titles: Sequence[str], place: str) -> None:
    """Refuses texts that only the white space around them tells apart."""
    seen: dict[str, str] = {}
    for value, title in zip(values, titles, strict=True):
        if isinstance(value, str) and seen.setdefault(title, value) != value:
            raise InputError(
                f"{place} holds {seen[title]!r} and {value!r}, which differ in white space alone: write them alike"
            )


def _written(value: object) -> str:
    """How people write a value: 1 for 1.0."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()


def _arrange(
    labels: Indices,
    group: Indices,
    is_test: NDArray[np.bool_] | None,
    share: float,
    most: tuple[int | None, int | None],
    seed: int,
) -> tuple[Indices, Indices]:
    """Row numbers of train and test. Groups `(n,)`, numbered from 0, follow each other in random order.

    So a validation set that is cut off the end parts one group at most.
    """
    if not 0 < share < 1:
        raise InputError(f"test_share must lie between 0 and 1, got {share}")
    rng = np.random.default_rng(seed)
    n_groups = group.max() + 1
    if is_test is None:
        # Groups may hold both classes: the rarer one is what must be in both parts.
        has_rarer = np.zeros(n_groups, dtype=bool)
        has_rarer[group[labels == np.bincount(labels, minlength=2).argmin()]] = True
        strata = [rng.permutation(np.flatnonzero(has_rarer == value)) for value in (True, False)]
        drawn = np.concatenate([stratum[: round(share * len(stratum))] for stratum in strata])
        is_test = np.isin(group, drawn)
    order = np.argsort(rng.permutation(n_groups)[group], kind="stable")
    parts = [order[is_test[order] == value] for value in (False, True)]
    train, test = (_thinned(part, labels, limit, rng) for part, limit in zip(parts, most, strict=True))
    return train, test


def _thinned(rows: Indices, labels: Indices, most: int | None, rng: np.random.Generator) -> Indices:
    """At most so many of the rows, in their order: half of each class, or more of one where the other has fewer."""
    if most is None or len(rows) <= most:
        return rows
    zeros, ones = (np.flatnonzero(labels[rows] == label) for label in (0, 1))
    n_ones = min(len(ones), max(most // 2, most - len(zeros)))
    kept = [rng.choice(ones, n_ones, replace=False), rng.choice(zeros, most - n_ones, replace=False)]
    return np.take(rows, np.sort(np.concatenate(kept)))


def _checked(task: Task) -> Task:
    """The task, if its official split can be probed."""
    for (part, least), rows in zip(LEAST.items(), task.splits["official"], strict=True):
        counts = np.bincount(task.labels[rows], minlength=2)
        if counts.min() < least:
            raise InputError(
                f"task {task.name!r} needs {least} {part} rows of each class, got {counts[0]} of {task.classes[0]!r} "
                f"and {counts[1]} of {task.classes[1]!r}: add rows or documents, or choose the test rows otherwise"
            )
    rows = task.splits["official"].train
    try:
        folds(task.labels[rows], task.groups[rows])
    except InputError as error:
        raise InputError(f"task {task.name!r}: {error}") from None
    return task
