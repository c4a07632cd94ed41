"""Intervals for means and paired differences: the bootstrap, by clusters of dependent units or in two stages."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri, stdtr, stdtrit

from glp_lens.intervals import Interval

Floats = NDArray[np.float64]
_MOST_KEPT = 2**21
"""Numbers of draws that are kept, 16 MiB of them."""


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
    weights = _draws(n, resamples, seed)
    means = (weights @ sums) / (weights @ counts)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(x.mean()), float(low), float(high), n)


def _draws(n: int, resamples: int, seed: int) -> Floats:
    """How often each of `n` units is drawn in each resample, `(resamples, n)`, not to be written to.

    The last ones are kept, unless they are many: drawing takes longer than all else in an interval, and a suite has
    thousands of means over the same units.
    """
    return (_kept_draws if n * resamples <= _MOST_KEPT else _kept_draws.__wrapped__)(n, resamples, seed)


@lru_cache(maxsize=2)
def _kept_draws(n: int, resamples: int, seed: int) -> Floats:
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)
    draws.flags.writeable = False
    return draws


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
    weights = _draws(n, resamples, seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = (weights @ top) / (weights @ bottom)
    low, high = np.nanquantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), n)


def resampling(n: int, *, resamples: int = 2000, seed: int | Sequence[int] = 0) -> Floats:
    """Weights `(1 + resamples, n)` that sum to 1: the first row takes each of `n` units once, the others are resamples.

    A statistic of weighted units, computed with these, is one of the `draws` that the functions below take: their
    first row is the statistic on all data.
    """
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    return np.concatenate([np.ones((1, n)), draws]) / n


class GroupResampling:
    """The second stage of a bootstrap over groups and the units within them.

    Each resample draws as many groups as there are, with replacement, and for each a resample of its units, of its
    own also where a group was drawn twice. The spread within groups so counts once more beside its share in that
    between groups, which errs on the wide side where groups hardly differ (Davison & Hinkley 1997, section 3.8).
    """

    def __init__(self, groups: int, *, resamples: int = 2000, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self._groups = rng.integers(groups, size=(groups, resamples))
        self._rows = rng.permuted(np.broadcast_to(np.arange(1, 1 + resamples), (groups, resamples)), axis=1)

    def mean(self, draws: Floats) -> Floats:
        """Mean over groups: from draws `(groups, 1 + resamples, ...)` of each to `(1 + resamples, ...)`."""
        total: Floats = np.zeros_like(draws[0])
        for groups, rows in zip(self._groups, self._rows, strict=True):
            total[1:] += draws[groups, rows]
        total[0] = draws[:, 0].sum(0)
        total /= len(draws)
        return total


def intervals(draws: Floats, n: int) -> Floats:
    """Value and ends of the 95% interval, `(3, ...)`, from draws `(1 + resamples, ...)` over `n` independent units.

    The quantiles of the resamples about their mean, stretched by `sqrt(n / (n - 1))` and by the ratio of Student's to
    the normal quantile: for a mean that is about its t interval, where the percentile interval is too narrow with few
    units (Hesterberg 2015). The ends are NaN with fewer than two units.
    """
    value = draws[0]
    if n < 2:
        return np.stack([value, np.full_like(value, np.nan), np.full_like(value, np.nan)])
    low, high = np.quantile(draws[1:], [0.025, 0.975], axis=0) - draws[1:].mean(0)
    stretch = np.sqrt(n / (n - 1)) * _t(n, 0.975) / ndtri(0.975)
    return np.stack([value, value + stretch * low, value + stretch * high])


def standard_error(draws: Floats, n: int) -> Floats:
    """Standard error, from draws `(1 + resamples, ...)` over `n` units; NaN with fewer than two."""
    return np.std(draws[1:], axis=0) * np.sqrt(n / (n - 1)) if n > 1 else np.full_like(draws[0], np.nan)


def jackknife(draws: Floats, n: int, *, extrapolate: bool = False) -> Interval:
    """Interval of a statistic from its values on all data and without each of some groups of it.

    The delete-a-group jackknife: for statistics that a bootstrap would shift, since a resample repeats rows, such as
    distances between samples. The groups hold whole clusters and are of about equal size; the interval is Student's
    with one degree of freedom less than groups.

    Args:
        draws: `(1 + groups,)`, on all data, then without each group; two groups at least.
        n: independent units behind the statistic.
        extrapolate: take the value at infinitely many rows, on the line in 1/n through the statistic and the mean of
            those without a group: Quenouille's (1949) correction, which removes a bias of order 1/n.
    """
    value, without = float(draws[0]), np.asarray(draws[1:], dtype=np.float64)
    groups = len(without)
    error = float(np.sqrt((groups - 1) / groups * np.square(without - without.mean()).sum()))
    if extrapolate:
        value += (groups - 1) * (value - float(without.mean()))
    half = _t(groups, 0.975) * error
    return Interval(value, value - half, value + half, n)


def p_values(draws: Floats, n: int) -> Floats:
    """Two-sided p that the value is 0: Student's t with the bootstrap's standard error and `n - 1` degrees of freedom.

    Unlike a share of resamples, it has no smallest value, which an adjustment for many comparisons would multiply.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.abs(draws[0]) / standard_error(draws, n)
    return np.where(draws[0] == 0, 1.0, 2 * stdtr(n - 1, -ratio)) if n > 1 else np.full_like(draws[0], np.nan)


def smallest_visible(draws: Floats, n: int, *, comparisons: int = 1, power: float = 0.8) -> Floats:
    """The smallest true difference that a run with these draws finds with a chance of `power`, two-sided at 5%.

    `(t(1 - .05 / 2 / comparisons) + t(power))` standard errors, with Student's quantiles of `n - 1` degrees of freedom:
    2.8 of them for one comparison of many units. `comparisons` is the number that Holm adjusts for; the first step of
    his procedure is the strictest, so that with it the number is the largest that it could be.
    """
    return (_t(n, 1 - 0.025 / comparisons) + _t(n, power)) * standard_error(draws, n)


@cache
def _t(n: int, level: float) -> float:
    """Quantile of Student's t with `n - 1` degrees of freedom."""
    return float(stdtrit(n - 1, level)) if n > 1 else float("nan")


def holm(p_values: ArrayLike) -> Floats:
    """Holm's step-down adjusted p values, in the order given; NaNs stay NaN and are not counted."""
    p = np.asarray(p_values, dtype=np.float64)
    result = np.full(len(p), np.nan)
    known = np.flatnonzero(np.isfinite(p))
    order = known[np.argsort(p[known], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    result[order] = np.minimum(np.maximum.accumulate(p[order] * factors), 1.0)
    return result
