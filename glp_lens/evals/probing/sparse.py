"""k-sparse probes: logistic regression on the k features with the largest class-mean difference.

Selection of features, folds and penalties are those of sae-probes 0.4.2 (Kantamneni et al. 2025, "Are Sparse
Autoencoders Useful? A Case Study in Sparse Probing"). A probe is fitted in one of two ways:

- `newton`: to the optimum of the regression, short of which sae-probes' solver may stop on features of unequal scales.
  Rows are ranked by w x. By the probability, as there, rows tie that the intercept rounds alike, such as those where a
  feature is 1e-17 and 1e-20, and the last digits decide.
- `lbfgs`: as sae-probes does, so that its `run_sae_evals(reg_type="l2", setting="normal")` gives the same numbers for
  the same features and rows: to the last digit, since every sum is done in its order and number format.

In both, three things differ from sae-probes:

- Among features with equal differences, as those that fire on one row of one class often have, the earlier column goes
  first. sae-probes leaves their order to an unstable sort, which depends on the processor.
- A k above the number of features is left out. sae-probes fits all features again under each such k.
- All features, where they are more than the train rows, are fitted in as many coordinates as there are train rows: the
  same regression, at the cost of that many features, by another sum.

Whoever compares must compare the same activations: sae-probes adds BOS only if the tokenizer does.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import LeavePOut, StratifiedKFold
from torch import Tensor

from glp_lens import numerics
from glp_lens.errors import InputError
from glp_lens.evals.probing import logistic, rank
from glp_lens.evals.probing.settings import Size, Solver

Rows = NDArray[np.int64]
Floats = NDArray[np.float64]

PENALTIES = tuple(np.logspace(5, -5, 10))
"""Inverse L2 strengths C to choose from; of equals in validation, the first. Equals are common: where C hardly matters
any more, optima rank the validation rows alike, and the weakest penalty is taken."""
_BLOCK = 8192
_TINY = 1e-6


class SparseProbe(NamedTuple):
    """A fitted probe and what it scores.

    Attributes:
        k: number of features, or "dense" for all of them.
        features: columns of the features used, the largest difference first.
        c: the inverse L2 strength chosen; NaN of under four train rows, where there is no choice and it is 1.
        scores: `(n_test,)`, what rows are ranked by, higher for class 1: w x, or with `lbfgs` the probability, in which
            rows tie where it saturates.
        probability: `(n_test,)`, of class 1.
        auc: of the scores.
        accuracy: share of test rows on the right side of probability 1/2.
        f1: of the same decisions, each class weighted by its number of test rows.
        auc_validation: mean over the validation folds; of under four train rows, on the train rows.
    """

    k: Size
    features: Rows
    c: float
    scores: Floats
    probability: Floats
    auc: float
    accuracy: float
    f1: float
    auc_validation: float

    @property
    def n_features(self) -> int:
        """Number of features used."""
        return len(self.features)


def fit(
    x_train: NDArray[np.float32],
    y_train: Rows,
    x_test: NDArray[np.float32],
    y_test: Rows,
    ks: Sequence[Size] = (1, 2, 5, 16, 64, 128, "dense"),
    *,
    normalize: bool = True,
    solver: Solver = "newton",
    seed: int = 42,
) -> list[SparseProbe]:
    """Rank the features, then fit a probe on the first k, for each k that there are features for.

    There is no scaler. C is chosen by validation AUC on the last min(20%, 100) train rows; of under 128 rows, by 6
    shuffled folds, and of up to 12, on every pair of rows. The probe is then fitted on all train rows in an order
    shuffled by the seed, which matters to `lbfgs` alone: it is sklearn's, with 1,000 steps and its default tolerance.

    Args:
        x_train: `(n_train, n_features)`, rows in random order, since the last are the validation rows.
        y_train: `(n_train,)`, 0 or 1.
        x_test, y_test: likewise.
        ks: numbers of features; "dense" for all.
        normalize: as `rank_features`.
        solver: `newton` for the optimum, `lbfgs` for the numbers of sae-probes.
        seed: of the folds and the shuffle; sae-probes uses 42.

    Raises:
        InputError: a k that is no number of features, or train or validation rows of one class only.
    """
    if bad := [k for k in ks if k != "dense" and (not isinstance(k, int) or k < 1)]:
        raise InputError(f"k must be a number of features from 1, or 'dense', got {bad[0]!r}")
    y_train, y_test = np.asarray(y_train), np.asarray(y_test)
    if len(np.unique(y_train)) < 2:
        raise InputError(f"expected train rows of both classes, got {len(y_train)} of one: use more rows")
    folds = list(_folds(y_train, seed))
    order = rank_features(x_train, y_train, normalize=normalize)
    found = []
    # Products of a hundred features are so small that two threads take four times as long for them as one.
    with warnings.catch_warnings(), numerics.blas_threads(1) if solver == "newton" else nullcontext():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for k in ks:
            if k == "dense" or k <= len(order):
                features = order if k == "dense" else order[:k]
                train, test = _columns(x_train, x_test, features)
                probes = _Newton(train, y_train) if solver == "newton" else _Lbfgs(train, y_train, seed)
                found.append(_fit(k, features, train, y_train, test, y_test, folds, probes))
    return found


def rank_features(x: NDArray[np.float32], y: Rows, *, normalize: bool = True) -> Rows:
    """Columns of `x` `(n, n_features)` by absolute difference of the class means, the largest first; ties by column.

    Args:
        normalize: divide each feature by the mean of its non-zero absolute values first, as sae-probes does, so that
            features of any scale compete; without, the rule of the GLP paper.
    """
    rows = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))
    positive = np.asarray(y) == 1
    ones, zeros = (torch.from_numpy(np.flatnonzero(those)) for those in (positive, ~positive))
    # Blocks of a round width, the last one wider: torch adds up the rows in another order in narrow or odd ones.
    blocks = rows.tensor_split(tuple(range(_BLOCK, rows.shape[1] - _BLOCK, _BLOCK)), dim=1)
    difference = torch.cat([_difference(part, ones, zeros, normalize) for part in blocks])
    return torch.argsort(difference.abs(), descending=True, stable=True).numpy()


def _difference(x: Tensor, ones: Tensor, zeros: Tensor, normalize: bool) -> Tensor:
    if normalize:
        fired = torch.from_numpy(np.count_nonzero(x.numpy(), axis=0)).int()  # twice as fast as a sum of what is not 0
        size = x.abs().sum(0) / (fired + _TINY)
        x = x / (size + _TINY)
    return x.index_select(0, ones).mean(0) - x.index_select(0, zeros).mean(0)


def _columns(x_train: NDArray[np.float32], x_test: NDArray[np.float32], features: Rows) -> tuple[Floats, Floats]:
    """Some features of train and test rows, or where they are more than train rows, coordinates that stand for them.

    The weights of a regression with an L2 penalty are a sum of train rows, so that all it knows of the features is the
    inner products with those. The coordinates, in an orthonormal basis of their span, have the same inner products.
    """
    n, rows = len(x_train), (x_train, x_test)
    if len(features) <= n:
        # In float64, since that is what sklearn makes of the tensors that sae-probes hands to it.
        train, test = (np.take(x, features, axis=1).astype(np.float64) for x in rows)
        return train, test
    products = np.zeros((n + len(x_test), n))
    for start in range(0, len(features), _BLOCK):
        part = np.concatenate([x[:, features[start : start + _BLOCK]] for x in rows]).astype(np.float64)
        products += part @ part[:n].T
    values, vectors = np.linalg.eigh(products[:n])
    kept = values >= n * np.finfo(np.float64).eps * values[-1]
    scale = np.sqrt(values[kept].clip(min=np.finfo(np.float64).tiny))  # features that are all 0 stay so
    coordinates = products @ (vectors[:, kept] / scale)
    return coordinates[:n], coordinates[n:]


def _folds(y: Rows, seed: int) -> Iterator[tuple[Rows, Rows]]:
    """Train and validation rows; none where there are too few rows to choose C."""
    n, rows = len(y), np.arange(len(y))
    if n <= 3:
        return
    if n >= 128:
        cut = n - min(n // 5, 100)
        if len(np.unique(y[cut:])) < 2:
            raise InputError(f"expected both classes among the last {n - cut} train rows: put the rows in random order")
        yield rows[:cut], rows[cut:]
        return
    splitter = LeavePOut(2) if n <= 12 else StratifiedKFold(6, shuffle=True, random_state=seed)
    for train, validation in splitter.split(rows, y):
        if len(np.unique(y[validation])) == 2:
            yield train, validation


def _fit(
    k: Size,
    features: Rows,
    x_train: Floats,
    y_train: Rows,
    x_test: Floats,
    y_test: Rows,
    folds: list[tuple[Rows, Rows]],
    probes: _Newton | _Lbfgs,
) -> SparseProbe:
    c, auc_validation = np.nan, np.nan
    if folds:
        means = np.stack([probes.validate(train, validation) for train, validation in folds], axis=1).mean(1)
        c, auc_validation = float(PENALTIES[means.argmax()]), float(means.max())
    (on_train, _), (scores, probability) = probes.fit(c if folds else 1.0, [x_train, x_test])
    if not folds:
        auc_validation = probes.auc(on_train, y_train)
    decisions = probability > 0.5
    return SparseProbe(
        k,
        features,
        c,
        scores,
        probability,
        auc=probes.auc(scores, y_test),
        accuracy=float((decisions == y_test).mean()),
        f1=_weighted_f1(decisions, y_test == 1),
        auc_validation=auc_validation,
    )


def _weighted_f1(decisions: NDArray[np.bool_], positive: NDArray[np.bool_]) -> float:
    """F1 of both classes, each weighted by its number of rows; 0 for a class that is neither there nor decided for."""
    classes = [(~decisions, ~positive), (decisions, positive)]
    scores = [2 * (found & true).sum() / max(found.sum() + true.sum(), 1) for found, true in classes]
    return float(np.average(scores, weights=[true.sum() for _, true in classes]))


class _Newton:
    """Probes of k features at their optimum."""

    def __init__(self, x: Floats, y: Rows) -> None:
        self.x, self.y, self.centre = x, y, x.mean(0)
        self.found: list[Floats] = []

    def validate(self, train: Rows, validation: Rows) -> Floats:
        """Validation AUC for each penalty, 1/2 where the fold trains on one class."""
        y = self.y[train]
        if y.all() or not y.any():
            return np.full(len(PENALTIES), 0.5)
        weights = logistic.Regression(self.x[train], y, self.centre).path(PENALTIES)
        self.found.append(weights)
        return rank.auc(_scores(self.x[validation], weights).T, self.y[validation])

    def fit(self, c: float, parts: Sequence[Floats]) -> list[tuple[Floats, Floats]]:
        """Fit on all rows, starting from the fits of folds: scores and probabilities of each part's rows."""
        starts = [np.mean([weights[PENALTIES.index(c)] for weights in self.found], axis=0)] if self.found else []
        weights = logistic.Regression(self.x, self.y, self.centre).optimum(c, starts)
        intercept = weights[-1] - weights[:-1] @ self.centre
        scores = [_scores(part, weights[None])[0] for part in parts]
        return [(own, expit(own + intercept)) for own in scores]

    def auc(self, scores: Floats, y: Rows) -> float:
        """AUC of one probe."""
        return float(rank.auc(scores[:, None], y)[0])


def _scores(x: Floats, weights: Floats) -> Floats:
    """Sums w x, `(n_probes, n)`, of weights `(n_probes, k + 1)`."""
    # For each row by itself, not a matrix product, so that equal rows tie wherever they stand.
    return np.asarray((x * weights[:, None, :-1]).sum(-1))


class _Lbfgs:
    """Probes of k features as sae-probes fits them, with its libraries."""

    def __init__(self, x: Floats, y: Rows, seed: int) -> None:
        self.x, self.y = x, y
        self.shuffled = np.random.RandomState(seed).permutation(len(x))  # the generator of sae-probes

    def validate(self, train: Rows, validation: Rows) -> Floats:
        """Validation AUC for each penalty, 1/2 where the fold trains on one class."""
        if len(np.unique(self.y[train])) < 2:
            return np.full(len(PENALTIES), 0.5)
        fits = (_regression(c).fit(self.x[train], self.y[train]) for c in PENALTIES)
        return np.array([self.auc(fit.predict_proba(self.x[validation])[:, 1], self.y[validation]) for fit in fits])

    def fit(self, c: float, parts: Sequence[Floats]) -> list[tuple[Floats, Floats]]:
        """Fit on all rows in another order: probabilities of each part's rows, twice, since they are the scores too."""
        probe = _regression(c).fit(self.x[self.shuffled], self.y[self.shuffled])
        return [(own, own) for own in (probe.predict_proba(part)[:, 1] for part in parts)]

    def auc(self, scores: Floats, y: Rows) -> float:
        """AUC of one probe."""
        return float(roc_auc_score(y, scores))


def _regression(c: float) -> LogisticRegression:
    return LogisticRegression(C=c, max_iter=1000)
