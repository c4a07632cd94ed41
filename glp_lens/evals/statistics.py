"""Intervals for means and paired differences: the percentile bootstrap, by clusters of dependent units."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Interval(NamedTuple):
    """A mean with its 95% interval and the number of clusters behind it."""

    value: float
    ci_low: float
    ci_high: float
    n: int


def bootstrap_mean(
    values: ArrayLike,
    clusters: ArrayLike | None = None,
    *,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Mean with a percentile bootstrap interval, resampling whole clusters.

    Args:
        values: `(n,)`; NaNs are left out.
        clusters: `(n,)` labels of units that are not independent of each other (prompts of one family,
            tokens of one document); by default each value is its own cluster.
        resamples: bootstrap samples.
        seed: of the resampling.
        level: coverage of the interval.

    Returns:
        The mean over all values; the ends are NaN with fewer than two clusters.
    """
    x = np.asarray(values, dtype=np.float64)
    labels = np.arange(len(x)) if clusters is None else np.asarray(clusters)
    keep = np.isfinite(x)
    x, labels = x[keep], labels[keep]
    if len(x) == 0:
        return Interval(np.nan, np.nan, np.nan, 0)
    _, index = np.unique(labels, return_inverse=True)
    sums, counts = np.bincount(index, weights=x), np.bincount(index)
    n = len(sums)
    if n < 2:
        return Interval(float(x.mean()), np.nan, np.nan, n)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(n, np.full(n, 1 / n), size=resamples)
    means = (weights @ sums) / (weights @ counts)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(x.mean()), float(low), float(high), n)


def bootstrap_ratio(
    numerator: ArrayLike,
    denominator: ArrayLike,
    clusters: ArrayLike,
    *,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """A ratio of two sums, for example explained to total variance, with a percentile bootstrap interval.

    Args:
        numerator: `(n,)`.
        denominator: `(n,)`, paired with the numerator.
        clusters: `(n,)` labels; whole clusters are resampled, numerator and denominator together.
        resamples: bootstrap samples.
        seed: of the resampling.
        level: coverage of the interval.

    Returns:
        `sum(numerator) / sum(denominator)`; NaN if the denominator sums to 0, and the ends are NaN with
        fewer than two clusters.
    """
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    if len(index) == 0:
        return Interval(np.nan, np.nan, np.nan, 0)
    top = np.bincount(index, weights=np.asarray(numerator, dtype=np.float64))
    bottom = np.bincount(index, weights=np.asarray(denominator, dtype=np.float64))
    n, total = len(top), bottom.sum()
    value = float(top.sum() / total) if total else np.nan
    if n < 2 or not total:
        return Interval(value, np.nan, np.nan, n)
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = (weights @ top) / (weights @ bottom)
    low, high = np.nanquantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), n)
