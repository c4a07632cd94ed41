"""Comparing reconstructions at equal distortion.

The closer a reconstruction, the less the language model loses, and a noise level or a rank sets how close it is. So the
loss of a model measured at several settings is interpolated at another model's fraction of variance unexplained (FVU).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from glp_lens.intervals import Interval


class Match(NamedTuple):
    """A point between two settings of one model: `weight` of the way from `low` to `high`, in log FVU."""

    low: str
    high: str
    weight: float


def match(fvu: Mapping[str, float], target: float) -> Match | None:
    """Where between a model's settings its FVU equals `target`, or None outside their range.

    Args:
        fvu: by setting; settings without any error (FVU 0) are left out.
        target: the other model's FVU.
    """
    ordered = sorted((name for name, value in fvu.items() if value > 0), key=fvu.__getitem__)
    if len(ordered) < 2 or not fvu[ordered[0]] <= target <= fvu[ordered[-1]]:
        return None
    index = int(np.searchsorted([fvu[name] for name in ordered], target, side="left"))
    low, high = ordered[max(index - 1, 0)], ordered[max(index, 1)]
    gap = np.log(fvu[high] / fvu[low])
    return Match(low, high, float(np.log(target / fvu[low]) / gap) if gap else 0.0)


def power_law(low: ArrayLike, high: ArrayLike, weight: float) -> NDArray[np.float64]:
    """Interpolate delta losses as a power of FVU, a straight line in the log-log plot.

    Delta loss grows about like a power of FVU, so a straight line in plain units would lie far above the
    true curve between distant settings. Where an end is not positive, the plain line is all there is.
    """
    a, b = np.broadcast_arrays(np.asarray(low, dtype=np.float64), np.asarray(high, dtype=np.float64))
    line = (1 - weight) * a + weight * b
    positive = (a > 0) & (b > 0)
    safe_a, safe_b = np.where(positive, a, 1.0), np.where(positive, b, 1.0)
    return np.where(positive, safe_a ** (1 - weight) * safe_b**weight, line)


def matched_difference(
    low: ArrayLike,
    high: ArrayLike,
    other: ArrayLike,
    clusters: ArrayLike,
    weight: float,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Delta loss of the interpolated model minus the other's, with a paired interval over clusters.

    Args:
        low: `(n,)` delta loss of each token at the setting with less distortion.
        high: at the setting with more.
        other: of the other model.
        clusters: `(n,)` the tokens' documents.
        weight: where between the settings, taken as given.
        resamples: bootstrap samples.
        seed: of the resampling.
    """
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.stack([np.bincount(index, weights=np.asarray(v, dtype=np.float64)) for v in (low, high, other)])
    counts = np.bincount(index)
    n = len(counts)

    def difference(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        a, b, c = (sums @ weights) / (counts @ weights)
        return np.asarray(power_law(a, b, weight) - c)

    value = float(difference(np.ones((n, 1)))[0])
    if n < 2:
        return Interval(value, np.nan, np.nan, n)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples).T.astype(np.float64)
    ends = np.quantile(difference(drawn), [0.025, 0.975])
    return Interval(value, float(ends[0]), float(ends[1]), n)
