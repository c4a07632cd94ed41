"""Uncertainty of probing results: intervals for an AUC, sign-flip tests and Holm's adjustment."""

from __future__ import annotations

from itertools import product

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, logit
from scipy.stats import binomtest, norm, rankdata

from glp_lens.evals.statistics import Interval


def auc_interval(scores: ArrayLike, labels: ArrayLike, level: float = 0.95) -> Interval:
    """AUC of scores, or the mean AUC of several score vectors on the same rows, with its interval.

    The variance is that of DeLong et al. 1988; averaging the placement values over the vectors first makes
    it the variance of the mean AUC, with the vectors taken as given. The interval is symmetric on the logit
    scale (Pepe 2003). At an AUC of 0 or 1 that variance is 0: the end is then Wilson's for a proportion out
    of the smaller class, which errs on the wide side.

    Args:
        scores: `(n,)` or `(k, n)`.
        labels: `(n,)`, 0 or 1, both present.
        level: coverage.
    """
    x = np.atleast_2d(np.asarray(scores, dtype=np.float64))
    positive = np.asarray(labels) == 1
    n1, n0 = int(positive.sum()), int((~positive).sum())
    ranks = rankdata(x, axis=1)
    # Placement value: the share of the other class that a row lies on the right side of.
    above = ((ranks[:, positive] - rankdata(x[:, positive], axis=1)) / n0).mean(0)
    below = (1 - (ranks[:, ~positive] - rankdata(x[:, ~positive], axis=1)) / n1).mean(0)
    value = float(above.mean())
    variance = sum(v.var(ddof=1) / len(v) for v in (above, below) if len(v) > 1)
    if 0 < value < 1:
        half = norm.ppf((1 + level) / 2) * np.sqrt(variance) / (value * (1 - value))
        low, high = expit(logit(value) - half), expit(logit(value) + half)
    else:
        m = min(n0, n1)
        low, high = binomtest(round(value) * m, m).proportion_ci(level, method="wilson")
    return Interval(value, float(low), float(high), n0 + n1)


def sign_flip_p(values: ArrayLike, clusters: ArrayLike | None = None, *, draws: int = 2**15, seed: int = 0) -> float:
    """Two-sided p of a sign-flip test that the values are symmetric around 0, flipping whole clusters.

    Exact when all sign patterns number at most `draws`; else a seeded sample of them, with the observed one
    counted in. NaN without values.
    """
    x = np.asarray(values, dtype=np.float64)
    labels = np.arange(len(x)) if clusters is None else np.asarray(clusters)
    _, index = np.unique(labels[np.isfinite(x)], return_inverse=True)
    sums = np.bincount(index, weights=x[np.isfinite(x)])
    if not len(sums):
        return float("nan")
    if 2 ** len(sums) <= draws:
        signs = np.array(list(product((-1, 1), repeat=len(sums))), dtype=np.int8)
    else:
        signs = np.random.default_rng(seed).choice(np.array([-1, 1], dtype=np.int8), (draws - 1, len(sums)))
        signs = np.concatenate([np.ones((1, len(sums)), dtype=np.int8), signs])
    # The slack counts patterns that equal the observed one but for rounding.
    return float(np.mean(np.abs(signs @ sums) >= abs(sums.sum()) - 1e-12 * np.abs(sums).sum()))


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Holm's step-down adjusted p values, in the order given; NaNs stay NaN and are not counted."""
    p = np.asarray(p_values, dtype=np.float64)
    result = np.full(len(p), np.nan)
    known = np.flatnonzero(np.isfinite(p))
    order = known[np.argsort(p[known], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    result[order] = np.minimum(np.maximum.accumulate(p[order] * factors), 1.0)
    return result
