"""An estimate with its interval, and the interval of an AUC: what makers of directions and suites both report."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, logit
from scipy.stats import binomtest, norm, rankdata

Floats = NDArray[np.float64]


class Interval(NamedTuple):
    """An estimate with its 95% interval and the number of independent units behind it."""

    value: float
    ci_low: float
    ci_high: float
    n: int


def placements(scores: ArrayLike, labels: ArrayLike) -> tuple[Floats, Floats]:
    """Placement values of rows with the label 1, `(n1,)`, and 0, `(n0,)`.

    That of a row is the share of the other class that it lies on the right side of, ties counting half, and the mean
    of either is the AUC. Of several score vectors `(k, n)` it is the mean over them.
    """
    x = np.atleast_2d(np.asarray(scores, dtype=np.float64))
    positive = np.asarray(labels) == 1
    n1, n0 = int(positive.sum()), int((~positive).sum())
    ranks = rankdata(x, axis=1)
    above = ((ranks[:, positive] - rankdata(x[:, positive], axis=1)) / n0).mean(0)
    below = (1 - (ranks[:, ~positive] - rankdata(x[:, ~positive], axis=1)) / n1).mean(0)
    return above, below


def auc_interval(
    scores: ArrayLike, labels: ArrayLike, clusters: ArrayLike | None = None, *, level: float = 0.95
) -> Interval:
    """AUC of scores, or the mean AUC of several score vectors on the same rows, with its interval.

    The variance is that of DeLong et al. 1988; averaging the placement values over the vectors first makes
    it the variance of the mean AUC, with the vectors taken as given. The interval is symmetric on the logit
    scale (Pepe 2003). At an AUC of 0 or 1 that variance is 0: the end is then Wilson's for a proportion out
    of the smaller class, which errs on the wide side.

    Args:
        scores: `(n,)` or `(k, n)`.
        labels: `(n,)`, 0 or 1, both present.
        clusters: `(n,)`, of rows that are not independent of each other, such as the tokens of a text: the variance
            is then that of Obuchowski 1997. By default each row is its own.
        level: coverage.

    Returns:
        The AUC, its interval and the number of clusters. Of one cluster of a class nothing is known of the variance:
        the interval is then 0 to 1.
    """
    above, below = placements(scores, labels)
    positive = np.asarray(labels) == 1
    value = float(above.mean())
    own = np.arange(len(positive)) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    least = min(len(np.unique(own[positive])), len(np.unique(own[~positive])))
    if least < 2:
        low, high = 0.0, 1.0
    elif 0 < value < 1:
        variance = _variance(above, below, own[positive], own[~positive])
        half = norm.ppf((1 + level) / 2) * np.sqrt(variance) / (value * (1 - value))
        low, high = expit(logit(value) - half), expit(logit(value) + half)
    else:
        low, high = binomtest(round(value) * least, least).proportion_ci(level, method="wilson")
    return Interval(value, float(low), float(high), len(np.unique(own)))


def _variance(above: Floats, below: Floats, positive: NDArray[np.int64], negative: NDArray[np.int64]) -> float:
    """Variance of the AUC from the placement values and the numbers of the clusters, at least two, of both classes."""
    n = max(positive.max(), negative.max()) + 1
    sums = [
        np.bincount(index, weights=values - values.mean(), minlength=n) / len(values)
        for values, index in ((above, positive), (below, negative))
    ]

    def scale(clusters: int) -> float:
        return clusters / (clusters - 1)

    own = [scale(len(np.unique(index))) * part @ part for index, part in zip((positive, negative), sums, strict=True)]
    return max(float(sum(own) + 2 * scale(n) * sums[0] @ sums[1]), 0.0)
