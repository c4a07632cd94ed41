"""Confidence intervals and tests of probing results, and the bias of choosing among many features."""

from __future__ import annotations

from itertools import product

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import erf, expit, logit
from scipy.stats import binomtest, norm, rankdata

from glp_lens.evals.statistics import Interval, bootstrap_mean

Floats = NDArray[np.float64]


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
    x = np.atleast_2d(np.asarray(scores, dtype=np.float64))
    positive = np.asarray(labels) == 1
    n1, n0 = int(positive.sum()), int((~positive).sum())
    ranks = rankdata(x, axis=1)
    # Placement value: the share of the other class that a row lies on the right side of.
    above = ((ranks[:, positive] - rankdata(x[:, positive], axis=1)) / n0).mean(0)
    below = (1 - (ranks[:, ~positive] - rankdata(x[:, ~positive], axis=1)) / n1).mean(0)
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


def holm(p_values: ArrayLike) -> Floats:
    """Holm's step-down adjusted p values, in the order given; NaNs stay NaN and are not counted."""
    p = np.asarray(p_values, dtype=np.float64)
    result = np.full(len(p), np.nan)
    known = np.flatnonzero(np.isfinite(p))
    order = known[np.argsort(p[known], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    result[order] = np.minimum(np.maximum.accumulate(p[order] * factors), 1.0)
    return result


def null_best(k: int, n0: ArrayLike, n1: ArrayLike) -> float:
    """Expected best mean validation AUC of `k` independent, uninformative features.

    On a fold the AUC of such a feature, less 1/2, is about normal with the variance
    `(n0 + n1 + 1) / (12 n0 n1)` (Mann & Whitney 1947). The folds' signs are not independent of each other: a fold
    takes its sign from the rows of the others. With folds of one size the mean over them is above 1/2 only if all
    signs agree, and it is then 1/2 plus the absolute value of the mean deviation. So the best of `k` is that of `k`
    half-normal values. Signs taken as independent would give the best of `k` normal ones, which is too low.

    It holds from some ten features on; of fewer the best is lower. Ties lower it too, as in sparse features. A
    filter by the class-mean difference on all train rows keeps the features that would win: of features of one
    scale, `k` is their number before the filter.

    Args:
        k: number of features.
        n0, n1: `(folds,)`, rows of each class in each validation fold.
    """
    n0, n1 = np.asarray(n0, dtype=np.float64), np.asarray(n1, dtype=np.float64)
    spread = np.sqrt(np.sum((n0 + n1 + 1) / (12 * n0 * n1))) / n0.size
    t = np.linspace(0, 12, 4801)
    # The mean of what is never negative is the integral of the chance that it is above t.
    return float(0.5 + spread * np.trapezoid(1 - erf(t / np.sqrt(2)) ** k, t))


def equal_count(
    validation: ArrayLike, test: ArrayLike, sizes: ArrayLike, *, difference: ArrayLike | None = None
) -> Floats:
    """Expected test AUC of the feature that is best in validation, among some of the features drawn at random.

    The mean over all subsets of each size, exactly: with the `F` features in order of validation AUC, the j-th
    best (from 0) is the best of a subset of `m` with probability `C(F - 1 - j, m - 1) / C(F, m)`.

    Args:
        validation, test: `(F,)`, AUC of each feature.
        sizes: `(s,)`, features in a subset, at least 1. All of them give the test AUC of the one chosen.
        difference: `(F,)`, class-mean differences: equal validation AUCs go to the larger absolute one. Then, and
            without it, they go to the lower column.

    Returns:
        `(s,)`; NaN for subsets larger than the set.
    """
    keys = [-np.asarray(validation, dtype=np.float64)]
    if difference is not None:
        keys.insert(0, -np.abs(np.asarray(difference, dtype=np.float64)))
    ordered = np.asarray(test, dtype=np.float64)[np.lexsort(keys)]
    n, m = len(ordered), np.asarray(sizes)
    result = np.full(m.shape, np.nan)
    j = np.arange(n - 1)
    for i in np.flatnonzero(m <= n):
        chance = m[i] / n * np.cumprod(np.concatenate([[1.0], np.maximum(n - m[i] - j, 0) / (n - 1 - j)]))
        result[i] = chance @ ordered
    return result


def win_rate(
    a: ArrayLike, b: ArrayLike, clusters: ArrayLike | None = None, *, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Share of tasks on which `a` is above `b`, ties one half, with the bootstrap interval over clusters.

    Args:
        a, b: `(n,)`, paired by task; a task with a NaN is left out.
        clusters: `(n,)`, families of tasks that share texts.
        resamples: bootstrap samples.
        seed: of the resampling.
    """
    return bootstrap_mean(np.heaviside(np.subtract(a, b), 0.5), clusters, resamples=resamples, seed=seed)
