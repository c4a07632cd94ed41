"""The dense probe: logistic regression on all dimensions, an upper reference for the one-feature probes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.model_selection import check_cv

from glp_lens.evals.probing import logistic, rank

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

    `folds` are pairs of train and validation rows, or a number of stratified ones that are not shuffled. Fits are at
    the optimum of the regression, short of which scikit-learn's lbfgs stops by default.
    """
    x, y, x_test = np.asarray(x_train, dtype=np.float64), np.asarray(y_train), np.asarray(x_test, dtype=np.float64)
    pairs = list(check_cv(folds, y, classifier=True).split(x, y))
    fits = logistic.standardised(x, y, [np.asarray(train) for train, _ in pairs], PENALTIES)
    aucs = [
        rank.auc(_scores(x[held_out], weights), y[held_out]) for weights, (_, held_out) in zip(fits, pairs, strict=True)
    ]
    means = np.mean(aucs, axis=0)
    best = int(means.argmax())
    c, start = PENALTIES[best], fits[:, best].mean(0)[None, None]
    ((weights,),) = logistic.standardised(x, y, [np.arange(len(x))], [c], start)
    return DenseProbe(_scores(x_test, weights[None])[:, 0], float(means[best]), c)


def _scores(x: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scores `(n, m)` of rows by weights `(m, d + 1)`."""
    return np.asarray(x @ weights[:, :-1].T + weights[:, -1])
