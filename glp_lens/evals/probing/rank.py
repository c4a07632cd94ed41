"""Exact one-feature probes: logistic regression on a single feature, solved by ranks.

A logistic probe of one feature x scores a row by w x + b. A monotone map leaves an AUC alone, so the probe's AUC
on any rows is AUC(x) if w > 0, 1 - AUC(x) if w < 0, and 1/2 if w = 0. Only the sign of w is left to find.

Let the loss be w^2 / 2 + C sum_i log(1 + exp(-(2 y_i - 1)(w x_i + b))), with y in {0, 1}, and let g(w) be its
minimum over the free intercept b. g is strictly convex, as the partial minimum of a jointly convex function whose
w part is strictly so. At w = 0 the best b predicts the base rate p = n1 / n for every row. By the envelope theorem
g'(0) is the loss's derivative there:

    g'(0) = C sum_i (p - y_i) x_i = C (p (n0 m0 + n1 m1) - n1 m1) = -C n p (1 - p) (m1 - m0),

with m1 and m0 the means of x in the classes. A convex function has its minimum on the side to which it falls, so
sign(w) = sign(m1 - m0) for every C > 0, and w = 0 if the means are equal. Standardising x changes neither sign.
Hence each fold of a cross-validation takes the sign of the class-mean difference of its own training rows, C has
no effect, and the validation AUC is a rank statistic (ties count one half). A constant feature scores 1/2.

Where this ends:

- an L1 penalty gives w = 0 until C is large enough;
- liblinear penalises the intercept too, so that the sign is certain only for x centred on the training rows;
- an optimiser stops where the gradient is below its tolerance: at scikit-learn's default of 1e-4, w stays 0 for
  balanced classes whose standardised means differ by less than 4e-4; near 0 others stop on either side. Here the
  sign is exact;
- the paper's released probe standardises in float32 and so ties values that are distinct here: of a feature with a few
  large spikes the many small values, which moves that feature's AUC by up to .06, up as often as down;
- accuracy and F1 depend on w and b, not on the sign alone;
- with two features or more, the order of the rows depends on the ratio of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from glp_lens.errors import InputError

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
_BLOCK = 2**20
"""Numbers of features held at once. More is no faster; with less, a file is read in shorter pieces."""


class Columns(Protocol):
    """What features are read from: an array, or a dataset in an HDF5 file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """`(n, n_features)`."""

    def __getitem__(self, key: tuple[slice, slice], /) -> Any:
        """All rows of a range of columns."""


@dataclass(frozen=True)
class Scores:
    """How well the one-feature probe of each of F features does.

    Attributes:
        difference: `(F,)`, mean of class 1 minus mean of class 0 on the train rows, in the features' units.
        validation: `(F,)`, mean over folds of the AUC on the fold, with the sign from the rest.
        test: `(F,)`, AUC on the test rows with the sign of `difference`; NaN without test rows.
    """

    difference: Floats
    validation: Floats
    test: Floats

    def __len__(self) -> int:
        return len(self.difference)

    def __getitem__(self, columns: slice) -> Scores:
        return Scores(self.difference[columns], self.validation[columns], self.test[columns])

    @classmethod
    def concat(cls, parts: Sequence[Scores]) -> Scores:
        """The scores of several sets of features, one after the other."""
        fields = ([p.difference for p in parts], [p.validation for p in parts], [p.test for p in parts])
        return cls(*(np.concatenate(field) for field in fields))


@dataclass(frozen=True)
class Probe:
    """The chosen one-feature probe.

    Attributes:
        feature: column of the chosen feature.
        sign: 1, -1, or 0 if the class means are equal on the train rows: the probe scores `sign * x`.
        auc_validation: its mean AUC over the validation folds.
        auc_test: its AUC on the test rows.
        candidates: how many features it was chosen from; the best of more uninformative features looks better
            in validation.
    """

    feature: int
    sign: int
    auc_validation: float
    auc_test: float
    candidates: int


def score_features(
    features: Columns,
    labels: ArrayLike,
    train: ArrayLike,
    test: ArrayLike,
    folds: Sequence[tuple[ArrayLike, ArrayLike]],
) -> Scores:
    """Probe every feature, in blocks of columns: memory does not grow with the number of features.

    Args:
        features: `(n, F)`, finite. float32 and narrower numbers are fastest; the order of others is exact too.
        labels: `(n,)`, 0 or 1.
        train: rows to choose on.
        test: other rows, or none. They have no part in `difference` and `validation`.
        folds: pairs of training and validation rows, each as positions in `train`.

    Raises:
        InputError: features that are not finite, or rows of one class only.
    """
    positive = np.asarray(labels) == 1
    train, test = np.asarray(train, dtype=np.int64), np.asarray(test, dtype=np.int64)
    fits = [train, *(train[np.asarray(fit)] for fit, _ in folds)]
    held_out = [train[np.asarray(rows)] for _, rows in folds]
    for rows in (*fits, *held_out, *([test] if len(test) else [])):
        _need_both(positive[rows])
    n, width = features.shape
    scores = Scores(*np.full((3, width), np.nan))
    step = max(1, _BLOCK // n)
    for start in range(0, width, step):
        columns = slice(start, min(start + step, width))
        x = _finite(features[:, columns])
        differences = _mean_differences(x, positive, fits)
        scores.difference[columns] = differences[0]
        folds_auc = [_probe_auc(x[r], positive[r], d) for r, d in zip(held_out, differences[1:], strict=True)]
        scores.validation[columns] = np.mean(folds_auc, axis=0)
        if len(test):
            scores.test[columns] = _probe_auc(x[test], positive[test], differences[0])
    return scores


def choose(scores: Scores, keep: int | None = None, among: slice = slice(None)) -> Probe:
    """The feature with the best validation AUC; equal ones go to the larger |difference|, then the lower column.

    Args:
        scores: see `score_features`.
        keep: first keep so many features with the largest |difference|, as the GLP paper does with 512; None
            looks at all.
        among: the columns to look at.
    """
    columns = np.arange(len(scores))[among]
    order = columns[np.argsort(-np.abs(scores.difference[among]), kind="stable")[:keep]]
    if not len(order):
        raise InputError(f"expected features to choose from, got none of {len(scores)} (keep={keep}): widen the choice")
    best = int(order[np.argmax(scores.validation[order])])
    sign = int(np.sign(scores.difference[best]))
    return Probe(best, sign, float(scores.validation[best]), float(scores.test[best]), len(order))


def auc(features: ArrayLike, labels: ArrayLike) -> Floats:
    """Area under the ROC curve of each column of `(n, n_features)`, with ties at one half.

    Args:
        features: finite, of any real dtype; nothing is rounded.
        labels: `(n,)`, 0 and 1.

    Raises:
        InputError: features that are not finite, or labels of one class only.
    """
    x, positive = _finite(features), np.asarray(labels) == 1
    _need_both(positive)
    return _probe_auc(x, positive, np.ones(x.shape[1]))


def mean_difference(features: ArrayLike, labels: ArrayLike) -> Floats:
    """Mean of class 1 minus mean of class 0 of each column, in float64; exactly 0 for constant columns.

    Raises:
        InputError: as `auc`.
    """
    x, positive = _finite(features), np.asarray(labels) == 1
    _need_both(positive)
    (difference,) = _mean_differences(x, positive, [np.arange(len(x))])
    return np.asarray(difference)


def _finite(features: ArrayLike) -> NDArray[Any]:
    x = np.asarray(features)
    if not np.isfinite(x).all():
        raise InputError("expected finite features, got NaN or infinity: leave these rows or features out")
    return x


def _need_both(positive: NDArray[np.bool_]) -> None:
    if positive.all() or not positive.any():
        raise InputError(f"expected rows of both classes, got {len(positive)} of one: use more rows or fewer folds")


def _narrow(x: NDArray[Any]) -> bool:
    """Whether float32 holds every value."""
    return np.can_cast(x.dtype, np.float32)


def _mean_differences(x: NDArray[Any], positive: NDArray[np.bool_], subsets: Sequence[Indices]) -> Floats:
    """Class-mean difference of each column on each subset of the rows, `(len(subsets), n_features)`.

    A float64 adds up 2^29 numbers of float32's precision without rounding if they are of one exponent, and
    fewer where these differ. So equal means of constants, of integers and of the same numbers in both classes
    give exactly 0. Wider numbers are split in two.
    """
    members = np.zeros((len(subsets), 2, len(x)))
    for member, rows in zip(members, subsets, strict=True):
        member[positive[rows].astype(int), rows] = 1
    values = x.astype(np.float64)
    parts = [values]
    if not _narrow(x):
        high = (values.view(np.int64) & -(2**27)).view(np.float64)  # the upper 26 of 53 bits
        parts = [high, values - high]
    difference = np.zeros((len(subsets), x.shape[1]))
    for part in parts:
        sums = (members.reshape(-1, len(x)) @ part).reshape(len(subsets), 2, -1)
        means = sums / members.sum(2)[:, :, None]
        difference += means[:, 1] - means[:, 0]
    return difference


def _probe_auc(x: NDArray[Any], positive: NDArray[np.bool_], difference: Floats) -> Floats:
    """AUC of sign(difference) x for each column. Counts are halves, so that x and -x come out exactly alike."""
    pairs = int(positive.sum()) * int((~positive).sum())
    return (pairs / 2 + np.sign(difference) * (_pairs_won(x, positive) - pairs / 2)) / pairs


def _pairs_won(x: NDArray[Any], positive: NDArray[np.bool_]) -> Floats:
    """Pairs of rows of both classes in which the positive one is higher, a tie as one half (Mann-Whitney U).

    The label is the lowest bit of an integer that sorts as the value does; sorting the numbers themselves, not
    their positions, is what makes this fast. Of equal values negatives then come first, so that all their pairs
    count; with the bit flipped none does. The mean counts half of them.
    """
    keys = np.array(_ordered_integers(x).T, dtype=np.int64, order="C")
    keys += keys
    keys |= positive
    keys.sort(axis=1)
    n1 = int(positive.sum())
    positions = np.arange(len(x))
    below = n1 * (n1 - 1) // 2  # pairs within class 1, which positions count as well
    won = (keys & 1) @ positions - below
    tied = ((keys[:, 1:] ^ keys[:, :-1]) == 1).any(1)
    if not tied.any():
        return won.astype(np.float64)
    keys = keys[tied] ^ 1
    keys.sort(axis=1)
    result = won.astype(np.float64)
    result[tied] = (won[tied] + (1 - (keys & 1)) @ positions - below) / 2
    return result


def _ordered_integers(x: NDArray[Any]) -> NDArray[np.int64] | NDArray[np.int32]:
    """Integers of at most 32 bits in the order of the values of each column, equal where these are equal."""
    if not _narrow(x):
        return np.asarray(rankdata(x, method="dense", axis=0), dtype=np.int64)
    bits = (x.astype(np.float32, copy=False) + np.float32(0)).view(np.int32)  # both zeros become 0
    flip = bits >> 31
    flip &= 2**31 - 1
    bits ^= flip  # a larger magnitude is a lower integer where the sign bit is set
    return np.asarray(bits)
