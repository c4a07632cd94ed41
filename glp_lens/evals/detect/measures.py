"""How well scores tell two classes apart, over resamples of texts, and thresholds with a guarantee."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest

from glp_lens.evals.statistics import intervals
from glp_lens.intervals import Interval

Floats = NDArray[np.float64]


class Separation:
    """Scores of normal and odd texts, higher for odder, under weights of the texts.

    Args:
        normal: `(n,)` scores.
        odd: `(m,)` scores.
        normal_weights: `(r, n)`; the first row has equal weights, the others are resamples (`statistics.resampling`).
        odd_weights: `(r, m)`.
    """

    def __init__(self, normal: Floats, odd: Floats, normal_weights: Floats, odd_weights: Floats) -> None:
        scores = np.concatenate([normal, odd])
        order = np.argsort(-scores, kind="stable")
        ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # texts of one score are flagged together

        def shares(weights: Floats, first: bool) -> Floats:
            blank = np.zeros((len(weights), len(odd if first else normal)))
            both = np.concatenate([weights, blank] if first else [blank, weights], axis=1)
            total: Floats = both[:, order].cumsum(1)[:, ends] / weights.sum(1, keepdims=True)
            return np.concatenate([np.zeros((len(weights), 1)), total], axis=1)

        self.false = shares(normal_weights, True)
        """Share of the normal texts with at least each score, from the highest score on, `(r, k)`."""
        self.true = shares(odd_weights, False)
        """Likewise of the odd texts."""

    def auroc(self) -> Floats:
        """Area under the ROC curve, `(r,)`: of equal scores, half."""
        widths, heights = np.diff(self.false, axis=1), (self.true[:, 1:] + self.true[:, :-1]) / 2
        out: Floats = (widths * heights).sum(1)
        return out

    def auprc(self) -> Floats:
        """Average precision, `(r,)`, for as many odd texts as normal ones."""
        true, false = self.true[:, 1:], self.false[:, 1:]
        precision = true / np.maximum(true + false, 1e-300)
        out: Floats = (np.diff(self.true, axis=1) * precision).sum(1)
        return out

    def tpr_at(self, fpr: float, draws: int | None = None) -> Floats:
        """Share of odd texts above the lowest threshold that at most a share `fpr` of the normal ones is above.

        Of the first so many draws `(draws,)`, by default of all.
        """
        false, true = self.false[:draws], self.true[:draws]
        last = (false <= fpr + 1e-12).sum(1) - 1
        out: Floats = np.take_along_axis(true, last[:, None], axis=1)[:, 0]
        return out


def bounded(draws: Floats, n: int, smaller: int) -> Interval:
    """A share of texts with its interval from resamples, cut to [0, 1].

    Where no resample differs from 0 or 1, the end is Wilson's for a proportion of the smaller class.
    """
    value, low, high = (float(x) for x in intervals(draws, n))
    if np.ptp(draws) < 1e-9 and abs(round(value) - value) < 1e-9:
        value = float(round(value))
        low, high = binomtest(round(value) * smaller, smaller).proportion_ci(method="wilson")
    return Interval(value, max(float(low), 0.0), min(float(high), 1.0), n)


def conformal_threshold(calibration: ArrayLike, rate: float) -> float:
    """The threshold above which a new normal text lies with a probability of at most `rate`, whatever the scores.

    With n calibration scores it is the one of rank `n + 1 - floor(rate (n + 1))` from below (Vovk et al. 2005; split
    conformal prediction), infinite if that is n + 1. The guarantee is over the draw of calibration and new text
    together, which must be exchangeable.
    """
    scores = np.sort(np.asarray(calibration, dtype=np.float64))
    above = math.floor(rate * (len(scores) + 1) + 1e-9)
    return float(scores[len(scores) - above]) if above else math.inf


def conformal_p(calibration: ArrayLike, scores: ArrayLike) -> Floats:
    """How many calibration scores are as high as each score, as a p value: `(1 + #{calibration >= score}) / (n + 1)`.

    A new normal text has a p of `rate` or less with a probability of at most `rate`, as with `conformal_threshold`.
    """
    known = np.sort(np.asarray(calibration, dtype=np.float64))
    below = np.searchsorted(known, np.asarray(scores, dtype=np.float64), side="left")
    out: Floats = (1 + len(known) - below) / (len(known) + 1)
    return out
