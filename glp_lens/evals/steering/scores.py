"""From scores of single generations to comparable numbers. Arrays are `(n_prompts, n_strengths)`."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

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


def concept_at_fluency(concept: ArrayLike, fluency: ArrayLike, level: ArrayLike) -> Floats:
    """The most concept that sweeps over strengths reach while their fluency is at least `level`.

    A sweep is the broken line through the mean scores of each strength, in rising order, the first being no steering.
    A method that merely acts like a weaker strength moves along the same line, and so gains nothing here.

    Args:
        concept, fluency: `(..., n_strengths)`.
        level: `(...)`, of each sweep, or one for all.

    Returns:
        `(...)`; NaN where the line never has that fluency.
    """
    c, f = np.asarray(concept, dtype=np.float64), np.asarray(fluency, dtype=np.float64)
    over = f >= np.asarray(level)[..., None]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = (np.asarray(level)[..., None] - f[..., :-1]) / np.diff(f, axis=-1)
        crossings = c[..., :-1] + share * np.diff(c, axis=-1)
    crossed = over[..., :-1] != over[..., 1:]
    reached = np.concatenate([np.where(over, c, -np.inf), np.where(crossed, crossings, -np.inf)], axis=-1).max(-1)
    return np.where(np.isneginf(reached), np.nan, reached)


def pareto_area(concept: ArrayLike, fluency: ArrayLike) -> Floats:
    """Area under the Pareto front of concept and fluency, each from 0 to 2, as a share of the whole square.

    The share of pairs (concept, fluency) that some strength reaches in both: the hypervolume of Zitzler & Thiele 1998
    from the origin. Between strengths nothing is interpolated.

    Args:
        concept, fluency: `(..., n_strengths)`, none negative.
    """
    c, f = np.asarray(concept, dtype=np.float64), np.asarray(fluency, dtype=np.float64)
    order = np.argsort(-f, axis=-1)
    c, f = np.take_along_axis(c, order, -1), np.take_along_axis(f, order, -1)
    lower = np.concatenate([f[..., 1:], np.zeros_like(f[..., :1])], axis=-1)
    area: Floats = ((f - lower) * np.maximum.accumulate(c, axis=-1)).sum(-1) / 4
    return area
