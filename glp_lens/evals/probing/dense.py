"""The dense probe: logistic regression on all dimensions, an upper reference for the one-feature probes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import check_cv
from sklearn.preprocessing import StandardScaler

from glp_lens.evals.probing import rank

PENALTIES = tuple(np.logspace(-5, 0, 6).tolist())
"""Inverse L2 strengths C to choose from, the grid of the released GLP probe."""


class DenseProbe(NamedTuple):
    """Scores of test rows `(n_test,)`, the mean validation AUC, and the chosen inverse penalty."""

    scores: NDArray[np.float64]
    auc_validation: float
    c: float


def fit(
    x_train: ArrayLike, y_train: ArrayLike, x_test: ArrayLike, folds: int | Sequence[tuple[ArrayLike, ArrayLike]] = 5
) -> DenseProbe:
    """Fit on standardised train rows `(n, d_in)` with C chosen by validation AUC; score the test rows.

    `folds` are pairs of train and validation rows, or a number of stratified ones that are not shuffled.
    """
    x, y, x_test = np.asarray(x_train, dtype=np.float64), np.asarray(y_train), np.asarray(x_test, dtype=np.float64)
    aucs = []
    for train, held_out in check_cv(folds, y, classifier=True).split(x, y):
        scores = _scores(x[train], y[train], x[held_out], PENALTIES)
        aucs.append(rank.auc(scores, y[held_out]))
    means = np.mean(aucs, axis=0)
    best = int(means.argmax())
    return DenseProbe(_scores(x, y, x_test, PENALTIES[best : best + 1])[:, 0], float(means[best]), PENALTIES[best])


def _scores(
    x: NDArray[np.float64], y: NDArray[np.int64], others: NDArray[np.float64], penalties: Sequence[float]
) -> NDArray[np.float64]:
    """Scores `(n, penalties)` of other rows by fits on `x`, which is standardised once for all of them."""
    scaler = StandardScaler().fit(x)
    x, others = scaler.transform(x), scaler.transform(others)
    fits = [LogisticRegression(C=c, max_iter=1000).fit(x, y) for c in penalties]
    return np.stack([fit.decision_function(others) for fit in fits], axis=1)
