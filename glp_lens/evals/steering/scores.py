"""From scores of single generations to comparable numbers. Arrays are `(n_prompts, n_strengths)`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from glp_lens.evals.statistics import Interval

Floats = NDArray[np.float64]


def harmonic_mean(concept: ArrayLike, fluency: ArrayLike) -> Floats:
    """Harmonic mean of two scores from 0 to 2, elementwise; 0 where either is 0 (AxBench, Wu et al. 2025)."""
    a, b = np.asarray(concept, dtype=np.float64), np.asarray(fluency, dtype=np.float64)
    total = a + b
    return np.divide(2 * a * b, total, out=np.zeros_like(total), where=total > 0)


def halves(n: int, seed: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Two random halves of `n` prompts, as sorted indices."""
    order = np.random.default_rng(seed).permutation(n)
    return np.sort(order[: n // 2]), np.sort(order[n // 2 :])


def chosen_elsewhere(harmonic: Floats, parts: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """For each prompt, the strength with the best mean in the half that the prompt is *not* in (AxBench)."""
    chosen = np.empty(len(harmonic), dtype=np.int64)
    first, second = parts
    chosen[second] = harmonic[first].mean(0).argmax()
    chosen[first] = harmonic[second].mean(0).argmax()
    return chosen


def concept_at_fluency(concept: ArrayLike, fluency: ArrayLike, level: float) -> float:
    """The most concept that a sweep over strengths reaches while its fluency is at least `level`.

    The sweep is the broken line through the mean scores of each strength, in rising order, the first being
    no steering. A method that merely acts like a weaker strength moves along the same line, and so gains
    nothing here.

    Returns:
        NaN if the line never has that fluency.
    """
    c, f = np.asarray(concept, dtype=np.float64), np.asarray(fluency, dtype=np.float64)
    reached = list(c[f >= level])
    for i in np.flatnonzero((f[:-1] >= level) != (f[1:] >= level)):
        share = (level - f[i]) / (f[i + 1] - f[i])
        reached.append(c[i] + share * (c[i + 1] - c[i]))
    return float(max(reached, default=np.nan))


class Frontier:
    """`concept_at_fluency` of several sweeps over the same prompts, with paired bootstrap intervals.

    The level is a share of the unsteered fluency, of each resample's own.
    """

    def __init__(self, fluency: Floats, *, share: float = 0.8, resamples: int = 1000, seed: int = 0) -> None:
        """`fluency` `(n_prompts,)` is that of the unsteered texts."""
        n = len(fluency)
        draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
        self._weights = np.concatenate([np.full((1, n), 1 / n), draws / n])
        self._levels = share * self._weights @ fluency

    def values(self, concept: Floats, fluency: Floats) -> Floats:
        """Of one sweep `(n_prompts, 1 + n_strengths)`, unsteered first: on all prompts, then by resample."""
        curves = zip(self._weights @ concept, self._weights @ fluency, self._levels, strict=True)
        return np.array([concept_at_fluency(c, f, level) for c, f, level in curves])

    def interval(self, values: Floats) -> Interval:
        """The 95% interval of `values`, or of a difference of two sweeps' values."""
        low, high = np.nanquantile(values[1:], [0.025, 0.975])
        return Interval(float(values[0]), float(low), float(high), self._weights.shape[1])
