"""The dense probe: logistic regression on all dimensions, an upper reference for the one-feature probes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

PENALTIES = tuple(np.logspace(-5, 0, 6))
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
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        {"logisticregression__C": PENALTIES},
        scoring="roc_auc",
        cv=folds,
    ).fit(np.asarray(x_train, dtype=np.float64), np.asarray(y_train))
    scores = search.decision_function(np.asarray(x_test, dtype=np.float64))
    return DenseProbe(scores, float(search.best_score_), float(search.best_params_["logisticregression__C"]))
