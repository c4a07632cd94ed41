"""Confidence intervals and tests of probing results, and the bias of choosing among many features."""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import erf

from glp_lens.evals.statistics import bootstrap_mean
from glp_lens.intervals import Interval

Floats = NDArray[np.float64]


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
    flipped = _signs(len(sums), draws, seed) @ sums
    # The slack counts patterns that equal the observed one but for rounding.
    return float(np.mean(np.abs(flipped) >= abs(sums.sum()) - 1e-12 * np.abs(sums).sum()))


@lru_cache(maxsize=2)
def _signs(n: int, draws: int, seed: int) -> NDArray[np.int8]:
    """Patterns of signs `(at most draws, n)`, not to be written to: many tests over the same clusters share them."""
    if 2**n <= draws:
        signs = np.array(list(product((-1, 1), repeat=n)), dtype=np.int8)
    else:
        signs = np.random.default_rng(seed).choice(np.array([-1, 1], dtype=np.int8), (draws - 1, n))
        signs = np.concatenate([np.ones((1, n), dtype=np.int8), signs])
    signs.flags.writeable = False
    return signs


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
