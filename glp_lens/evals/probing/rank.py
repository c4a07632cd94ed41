"""Exact one-feature probes: logistic regression on a single feature, solved by ranks.

A logistic probe on one feature x scores a row by w x + b, and its AUC depends only on the sign of w. Let
g(w) be the L2-penalised loss with the free intercept b minimised out. g is convex, as the partial minimum of
a jointly convex function. At w = 0 the best b predicts the base rate p for each row, so
g'(0) = -n C p (1 - p) (m1 - m0), with m1 and m0 the class means. A convex function has its minimum on the
side where it falls: sign(w) = sign(m1 - m0), for every C > 0, and w = 0 if the means are equal. Standardising
x keeps the sign. Hence the probe's AUC on any rows is AUC(x), 1 - AUC(x) or 1/2, whatever C is, and each
cross-validation fold takes the sign from its own training rows. The AUC comes from mid-ranks, so that ties
count one half.

The proof needs an L2 penalty that leaves the intercept alone; it says nothing on accuracy or F1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata
from sklearn.model_selection import StratifiedKFold

Floats = NDArray[np.float64]
_BLOCK = 2**22
"""Numbers of a feature block held in float64 at once."""


@dataclass(frozen=True)
class Probe:
    """The chosen one-feature probe.

    Attributes:
        feature: column of the chosen feature.
        sign: 1, -1, or 0 if the class means are equal on the train set: the probe scores `sign * x`.
        auc_validation: its mean AUC over the validation folds.
        candidates: how many features it was chosen from; the best of more features that know nothing looks
            better in validation.
    """

    feature: int
    sign: int
    auc_validation: float
    candidates: int

    def score(self, features: ArrayLike) -> Floats:
        """Scores `(n,)` of rows of features `(n, n_features)`, higher for class 1."""
        return self.sign * np.asarray(features)[:, self.feature].astype(np.float64)


def auc(features: ArrayLike, labels: ArrayLike) -> Floats:
    """Area under the ROC curve of each column of `(n, n_features)`, with ties at one half.

    `labels` `(n,)` holds 0 and 1, and both occur.
    """
    positive = np.asarray(labels) == 1
    n1, n0 = int(positive.sum()), int((~positive).sum())
    ranks = rankdata(np.asarray(features), axis=0)
    return np.asarray((ranks[positive].sum(0) - n1 * (n1 + 1) / 2) / (n1 * n0))


def mean_difference(features: ArrayLike, labels: ArrayLike) -> Floats:
    """Mean of class 1 minus mean of class 0 of each column, in float64; exactly 0 for constant columns."""
    x = np.asarray(features)
    positive = np.asarray(labels) == 1
    difference = np.empty(x.shape[1])
    step = max(1, _BLOCK // max(len(x), 1))
    for start in range(0, x.shape[1], step):
        block = x[:, start : start + step].astype(np.float64)
        # Counted from the first row, a constant column is all zeros, free of rounding.
        block -= block[:1].copy()
        difference[start : start + step] = block[positive].mean(0) - block[~positive].mean(0)
    return difference


def validation_auc(features: ArrayLike, labels: ArrayLike, folds: int = 5) -> Floats:
    """AUC on each validation fold of the one-feature probe of every column.

    Args:
        features: `(n, n_features)`.
        labels: `(n,)`, 0 or 1, with at least `folds` rows of each.
        folds: number of stratified folds, not shuffled.

    Returns:
        `(folds, n_features)`.
    """
    x, y = np.asarray(features), np.asarray(labels)
    result = np.empty((folds, x.shape[1]))
    step = max(1, _BLOCK // max(len(x), 1))
    for i, (train, validation) in enumerate(StratifiedKFold(folds).split(np.zeros(len(y)), y)):
        sign = np.sign(mean_difference(x[train], y[train]))
        for start in range(0, x.shape[1], step):
            part = slice(start, start + step)
            result[i, part] = 0.5 + sign[part] * (auc(x[validation, part], y[validation]) - 0.5)
    return result


def choose(
    features: ArrayLike,
    labels: ArrayLike,
    *,
    keep: int | None = None,
    validation: Floats | None = None,
) -> Probe:
    """The feature with the best mean validation AUC, and its sign from all of these train rows.

    Args:
        features: `(n, n_features)` of train rows.
        labels: `(n,)`, 0 or 1.
        keep: first keep so many features with the largest |class-mean difference| on the train rows, as the
            GLP paper does with 512; None looks at all. Equal AUCs go to the larger difference, or without
            `keep` to the lower column.
        validation: what `validation_auc` gave for these rows, to save computing it again.
    """
    x = np.asarray(features)
    difference = mean_difference(x, labels)
    order = np.arange(x.shape[1]) if keep is None else np.argsort(-np.abs(difference), kind="stable")[:keep]
    mean = (validation_auc(x[:, order], labels) if validation is None else validation[:, order]).mean(0)
    best = int(np.argmax(mean))
    feature = int(order[best])
    return Probe(feature, int(np.sign(difference[feature])), float(mean[best]), len(order))
