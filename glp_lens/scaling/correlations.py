"""Rank correlations of cells that share trainings, also at equal compute."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from glp_lens.evals.statistics import intervals
from glp_lens.intervals import Interval

Floats = NDArray[np.float64]


def rank_correlation(
    x: ArrayLike,
    y: ArrayLike,
    clusters: ArrayLike,
    *,
    given: ArrayLike | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Spearman's correlation, or the partial one, with an interval that resamples whole clusters.

    The interval is that of `intervals` on Fisher's scale, which widens it for few clusters. A correlation that is 1 in
    every resample too has no ends: how sure it is cannot be read off its resamples.

    Args:
        x: `(n,)`.
        y: `(n,)`.
        clusters: `(n,)` labels of what is not independent, such as the size of priors.
        given: `(n,)`, what is held equal: the correlation is that of what a straight line in the ranks of `given`
            leaves of the ranks of the others.
        resamples: bootstrap samples.
        seed: of the resampling.

    Returns:
        The correlation and its interval, over the number of clusters; NaN where one of them does not vary, or where
        `given` determines it.
    """
    columns = np.stack([np.asarray(v, dtype=np.float64) for v in ((x, y) if given is None else (x, y, given))])
    names, owner = np.unique(np.asarray(clusters), return_inverse=True)
    n = len(names)
    members = [np.flatnonzero(owner == i) for i in range(n)]
    value = _correlation(columns)
    if n < 2 or not np.isfinite(value):
        return Interval(value, np.nan, np.nan, n)
    rng = np.random.default_rng(seed)
    drawn = np.array(
        [
            _correlation(columns[:, np.concatenate([members[i] for i in rng.integers(n, size=n)])])
            for _ in range(resamples)
        ]
    )
    drawn = drawn[np.isfinite(drawn)]  # without those that drew one cluster alone, which may not vary
    if len(drawn) < resamples / 2 or np.ptp(drawn) < 1e-12:
        return Interval(value, np.nan, np.nan, n)
    scale = np.arctanh(np.clip([value, *drawn], -0.9999, 0.9999))
    _, low, high = np.tanh(intervals(scale, n))
    return Interval(value, float(low), float(high), n)


def _correlation(columns: Floats) -> float:
    """Of the ranks of the first two of `(2, n)` or `(3, n)` columns, given the third."""
    ranks = rankdata(columns, axis=1)
    ranks -= ranks.mean(1, keepdims=True)
    square = ranks @ ranks.T
    if len(columns) == 3:
        if square[2, 2] == 0:
            return float("nan")
        left = square - np.outer(square[2], square[2]) / square[2, 2]
        # What is left of ranks that the third determines is rounding alone.
        square = np.where(np.abs(left) > 1e-9 * square.diagonal().max(), left, 0.0)
    spread = np.sqrt(square[0, 0] * square[1, 1])
    return float(np.clip(square[0, 1] / spread, -1, 1)) if spread > 0 else float("nan")
