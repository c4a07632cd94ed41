"""All probes of one task: of entries that share a model, over all noise seeds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glp_lens.errors import InputError
from glp_lens.evals.entries import Entry
from glp_lens.evals.probing import features, rank, sparse
from glp_lens.evals.probing.features import Concatenated, Matrix, NotFinite, Values
from glp_lens.evals.probing.inference import equal_count
from glp_lens.evals.probing.settings import Size, Solver
from glp_lens.evals.probing.splits import Rows, SplitRows
from glp_lens.evals.probing.tasks import Indices
from glp_lens.evals.results import Setting
from glp_lens.types import Json

PAPER, ALL, SPARSE = Setting(mode="paper"), Setting(mode="all"), Setting(probe="sparse")
"""Settings of the best of the candidates as in the paper, of the best of all features, and of k-sparse probes."""
_TEXTS, _TEXT_LENGTH = 5, 160
_COLUMNS = 8192


class _Turns:
    """Many features are kept of one task at a time, of those that are scored side by side."""

    lock: AbstractContextManager[Any] = Lock()


@dataclass(frozen=True)
class Options:
    """What a task is scored with; see `ProbingSettings`. `smallest` is the least number of features of a main entry."""

    seeds: tuple[int, ...]
    ks: tuple[Size, ...]
    sparse_solver: Solver
    max_features: int
    sizes: tuple[int, ...]
    smallest: int
    device: str


class Choice(NamedTuple):
    """A chosen feature and its scores `(n_test,)`, higher for class 1."""

    probe: rank.Probe
    scores: NDArray[np.float64]


@dataclass
class SplitScores:
    """The probes of one entry on one split.

    Attributes:
        choices: by setting, an item for each noise seed.
        numbers: by setting and metric, likewise.
        sparse: by setting without k, of the first noise seed.
        texts: that excite the feature chosen among all most, with the first noise seed.
    """

    choices: dict[Setting, list[Choice]] = field(default_factory=lambda: defaultdict(list))
    numbers: dict[tuple[Setting, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    sparse: dict[Setting, list[sparse.SparseProbe]] = field(default_factory=dict)
    texts: list[Json] = field(default_factory=list)


def score(
    entries: Sequence[Entry], rows: Rows, options: Options, folder: Path | None, advance: Callable[[], Any]
) -> tuple[dict[str, dict[str, SplitScores]], list[str]]:
    """Score entries of one model at one hook point, each set of features encoded once for all that use it.

    Args:
        entries: with one model object.
        rows: of the task.
        options: see there.
        folder: where features that are too large for memory go, by default that of temporary files.
        advance: called after each entry and noise seed.

    Returns:
        Scores by label and split, of the entries that could be scored, and a sentence for each failure.
    """
    width = sum(features.count(entry) for entry in entries)
    large = 4 * len(rows.acts) * width > features.IN_MEMORY // 4
    with _Turns.lock if large else nullcontext():
        return _score(entries, rows, options, folder, advance)


def take_turns(lock: AbstractContextManager[Any]) -> None:
    """Let this process take turns with others in what needs much memory."""
    _Turns.lock = lock


def _score(
    entries: Sequence[Entry], rows: Rows, options: Options, folder: Path | None, advance: Callable[[], Any]
) -> tuple[dict[str, dict[str, SplitScores]], list[str]]:
    scores = {entry.label: {split: SplitScores() for split in rows.splits} for entry in entries}
    failed: dict[str, str] = {}
    notes: dict[str, None] = {}
    for i, seed in enumerate(features.noise_seeds(entries[0], options.seeds)):
        encoder = _Encoder(rows, seed, options.device, folder, entries)
        for entry in entries:
            try:
                if entry.label not in failed:
                    notes |= dict.fromkeys(_add_seed(scores[entry.label], entry, encoder, options, first=i == 0))
            except NotFinite as error:
                failed[entry.label] = f"{entry.label} on {rows.task.name}: skipped, {error}"
            advance()
    return {label: own for label, own in scores.items() if label not in failed}, [*failed.values(), *notes]


def _add_seed(
    scores: dict[str, SplitScores], entry: Entry, encoder: _Encoder, options: Options, *, first: bool
) -> list[str]:
    """Add the probes of one noise seed, by split; a sentence for what cannot be fitted.

    Features go when this returns, so that those of two seeds are never held at once.
    """
    (matrix, by_split), rows = encoder(entry), encoder.rows
    notes: list[str] = []
    for split, own in scores.items():
        _add_single(own, entry, matrix, by_split[split], rows, rows.splits[split], options)
        if first:
            notes += _add_sparse(own, entry, split, matrix, rows, options)
    return notes


class _Encoder:
    """Features, and their scores by split, for one noise seed; each is made once."""

    def __init__(self, rows: Rows, seed: int, device: str, folder: Path | None, entries: Sequence[Entry]) -> None:
        self.rows, self.seed = rows, seed
        most = sum(max(1, len(features.parts(entry))) for entry in entries)
        self.encode = partial(features.encode, folder=folder, device=device, in_memory=features.IN_MEMORY // most)
        self.done: dict[str, tuple[Matrix, dict[str, rank.Scores]]] = {}

    def __call__(self, entry: Entry) -> tuple[Matrix, dict[str, rank.Scores]]:
        key = repr(sorted(entry.options.items()))
        if key not in self.done:
            self.done[key] = self._joined(entry) if features.parts(entry) else self._own(entry)
        return self.done[key]

    def _own(self, entry: Entry) -> tuple[Matrix, dict[str, rank.Scores]]:
        rows = self.rows
        stochastic = len(features.noise_seeds(entry, (0, 1))) > 1
        matrix = self.encode(
            entry, rows.acts, features.noise(rows.task.name, self.seed, rows.acts) if stochastic else None
        )
        return matrix, {name: rank.score_features(matrix, rows.labels, *split) for name, split in rows.splits.items()}

    def _joined(self, entry: Entry) -> tuple[Matrix, dict[str, rank.Scores]]:
        parts = [self(part) for part in features.parts(entry)]
        scores = {name: rank.Scores.concat([own[name] for _, own in parts]) for name in self.rows.splits}
        return Concatenated([matrix for matrix, _ in parts]), scores


def _add_single(
    own: SplitScores,
    entry: Entry,
    matrix: Matrix,
    scores: rank.Scores,
    rows: Rows,
    split: SplitRows,
    options: Options,
) -> None:
    """Add the one-feature probes of one noise seed."""
    for setting, probe in _choose(entry, scores, options.max_features):
        column = matrix[:, probe.feature].astype(np.float64)
        own.choices[setting].append(Choice(probe, probe.sign * column[split.test]))
        if setting == ALL and not own.texts:
            own.texts = _texts(rows, split, column, probe.sign)
    shortlist = np.argsort(-np.abs(scores.difference), kind="stable")[: options.max_features]
    own.numbers[PAPER, "auc_oracle"].append(float(scores.test[shortlist].max()))
    own.numbers[ALL, "auc_oracle"].append(float(scores.test.max()))
    n = len(scores.test)
    sizes = sorted({k for k in (*options.sizes, options.smallest, n) if k <= n})
    expected = equal_count(scores.validation, scores.test, sizes, difference=scores.difference)
    for k, value in zip(sizes, expected, strict=True):
        own.numbers[Setting(mode="equal", features=k), "auc"].append(float(value))


def _choose(entry: Entry, scores: rank.Scores, max_features: int) -> Iterator[tuple[Setting, rank.Probe]]:
    """The probe of each setting."""
    yield PAPER, rank.choose(scores, keep=max_features)
    yield ALL, rank.choose(scores)
    layers = 1 if features.parts(entry) else features.layers(entry)
    width = len(scores.test) // layers
    for layer in range(layers if layers > 1 else 0):
        yield ALL | Setting(layer=layer), rank.choose(scores, among=slice(layer * width, (layer + 1) * width))


def _add_sparse(
    own: SplitScores, entry: Entry, split: str, matrix: Matrix, rows: Rows, options: Options
) -> Iterator[str]:
    """Add the k-sparse probes of the first noise seed; a sentence for what cannot be fitted."""
    where, (train, test, _), y = f"{entry.label} on {rows.task.name}, split={split}", rows.splits[split], rows.labels
    ks = options.ks if entry.main else ()  # a sweep is shown by its one-feature probes
    large = 4 * prod(matrix.shape) > features.IN_MEMORY
    if large and "dense" in ks:
        ks = tuple(k for k in ks if k != "dense")
        yield f"{where}, k=dense: skipped, {matrix.shape[1]} features are too many to regress on at once"
    if not ks:
        return
    some = tuple(k for k in ks if k != "dense")  # of all features, the order does not matter
    if not large:
        parts = [matrix[:, :][part] for part in (train, test)]
    for setting, normalize, sizes in ((SPARSE, True, ks), (SPARSE | Setting(rank="difference"), False, some)):
        if large:
            x = _shortlist(matrix, train, y, max(some), normalize)
            parts = [x[part] for part in (train, test)]
        x_train, x_test = parts
        try:
            own.sparse[setting] = sparse.fit(
                x_train, y[train], x_test, y[test], sizes, normalize=normalize, solver=options.sparse_solver
            )
        except InputError as error:
            yield f"{where}: no k-sparse probes, {error}"
            return


def _shortlist(matrix: Matrix, train: Indices, labels: Indices, k: int, normalize: bool) -> Values:
    """Those features among which are the first `k` of all in `sparse.rank_features`: the first of each block."""
    blocks = []
    for start in range(0, matrix.shape[1], _COLUMNS):
        block = matrix[:, start : start + _COLUMNS]
        order = sparse.rank_features(block[train], labels[train], normalize=normalize)
        blocks.append(block[:, np.sort(order[:k])])
    return np.concatenate(blocks, axis=1)


def _texts(rows: Rows, split: SplitRows, column: NDArray[np.float64], sign: int) -> list[Json]:
    """The train texts that excite a feature most in the direction of its sign, each at its highest row."""
    texts: dict[int, Json] = {}
    for row in split.train[np.argsort(-(sign or 1) * column[split.train], kind="stable")].tolist():
        i = int(rows.text[row])
        if i not in texts:
            text = rows.task.texts[i]
            # The end is what the last token has seen, and what a limit on the context leaves.
            cut = text if len(text) <= _TEXT_LENGTH else "…" + text[1 - _TEXT_LENGTH :]
            texts[i] = {"text": cut, "value": float(column[row]), "label": int(rows.labels[row])}
        if len(texts) == _TEXTS:
            break
    return list(texts.values())
