"""Logistic regression with an L2 penalty at its optimum, for many penalties: Newton's method in float64.

With rows x_i, signs s_i = +-1 and margins m_i = s_i (w x_i + b), it minimises

    f(w, b) = sum_i log(1 + exp(-m_i)) + |w|^2 / (2 C),

which is scikit-learn's objective over C. The intercept b is free. Where both classes are there, f has one optimum.

A step d solves H d = -g, with g the gradient, H = sum_i v_i x_i x_i' + 1 / C (none for b) and v_i = p_i (1 - p_i). Its
length is measured by the Newton decrement l = sqrt(-g d). With the H of this very point l^2 is the sum of v_i dm_i^2
and |dw|^2 / C, so that no probability of a row changes by more than about l / 2.

- H's sum is what takes time. It is made again only where the last one, of a point nearby or of the optimum for another
  C, has not at least halved l.
- The search ends where l, times its last ratio, is at most 1e-7 and 1e-7 / sqrt(C), so that no weight changes by more
  than 1e-7 either, or where rounding keeps it from falling.
- A step with this point's H that changes no margin by more than 1 lowers f. The curvature of log(1 + exp(-m)) changes
  by a factor of at most exp(|dm|), so along the step phi(t) = f(t d), with a = max |dm_i|, has phi''(t) <= phi''(0)
  exp(a t). As phi'(0) = -phi''(0), phi(1) - phi(0) <= -phi''(0) (1 - (exp(a) - 1 - a) / a^2), which is negative up to
  a = 1.79. Longer steps are halved until f does not rise.
- Strong penalties go first, where the optimum is near w = 0. The next search starts at the last optimum or, if f is
  lower there, on the straight line in log C through the last two, along which separable rows move.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.lapack import dpotrf, dpotrs
from scipy.special import expit, log_expit

Floats = NDArray[np.float64]

_SURE = 1.0
"""Largest change of a margin by a step that lowers f in any case."""
_RATIO = 0.5
"""Decrement over the last one above which the Hessian is made again."""
_END, _ROUNDING = 1e-7, 1e-6
"""Decrement that is small enough, and one that rounding may keep from falling."""
_STEPS, _HALVINGS = 200, 60


class Regression:
    """Logistic regressions on the same rows."""

    def __init__(self, x: Floats, y: NDArray[np.int64], centre: Floats) -> None:
        """Prepare rows.

        Args:
            x: `(n, k)`, finite.
            y: `(n,)`, 0 or 1, and both there.
            centre: `(k,)`, about the means of the features. Rows are moved by it against rounding errors; the optimum
                is the same, as the intercept is free.
        """
        self._signed = np.empty((x.shape[1] + 1, len(x)))
        np.subtract(x.T, centre[:, None], out=self._signed[:-1])
        self._signed[-1] = 1
        self._signed *= 2.0 * y - 1
        self._sum: Floats | None = None

    def path(self, penalties: Sequence[float]) -> Floats:
        """The optima for several C, `(len(penalties), k + 1)`: weights, and the intercept for rows less the centre."""
        found = np.zeros((len(penalties), len(self._signed)))
        done: list[int] = []
        for i in np.argsort(penalties).tolist():
            starts = [found[j] for j in done[-1:]]
            if len(done) > 1:
                c0, c1, c2 = (np.log(penalties[j]) for j in (*done[-2:], i))
                starts.append(starts[0] + (starts[0] - found[done[-2]]) * ((c2 - c1) / (c1 - c0)))
            found[i] = self.optimum(penalties[i], starts)
            done.append(i)
        return found

    def optimum(self, c: float, starts: Sequence[Floats] = ()) -> Floats:
        """The optimum for one C, as in `path`. The search starts at that of `starts` and 0 where f is lowest."""
        rows = self._signed
        ridge = np.full(len(rows), 1 / c)
        ridge[-1] = 0
        tried = [(weights, weights @ rows) for weights in (np.zeros(len(rows)), *starts)]
        weights, margins = min(tried, key=lambda point: self._loss(point[0], point[1], c))
        end = _END / max(1, c) ** 0.5
        factor, before = None, np.inf
        for _ in range(_STEPS):
            wrong = expit(-margins)  # the probability of the other class: accurate where it is small
            downhill = rows @ wrong - ridge * weights
            fresh = False
            while True:
                if self._sum is None:
                    scaled = rows * np.sqrt(wrong * (1 - wrong))
                    self._sum, factor, fresh = scaled @ scaled.T, None, True
                if factor is None:
                    factor = _factor(self._sum, ridge)
                step = dpotrs(factor, downhill)[0]
                decrement = np.sqrt(max(step @ downhill, 0))
                if fresh or decrement <= _RATIO * before:
                    break
                self._sum = None
            if fresh and decrement <= _ROUNDING and decrement > _RATIO * before:
                break
            change = step @ rows
            if max(change.max(), -change.min()) > _SURE:
                share = self._share(weights, margins, step, change, c)
                step, change = share * step, share * change
            weights, margins = weights + step, margins + change
            if decrement <= end or (before < np.inf and decrement * min(1, decrement / before) <= end):
                break
            before = decrement
        return weights

    def _loss(self, weights: Floats, margins: Floats, c: float) -> float:
        return float(weights[:-1] @ weights[:-1] / (2 * c) - log_expit(margins).sum())

    def _share(self, weights: Floats, margins: Floats, step: Floats, change: Floats, c: float) -> float:
        """The largest of 1, 1/2, 1/4, .. of a step with which the loss does not rise, but for rounding."""
        most, share = self._loss(weights, margins, c) * (1 + 1e-13), 1.0
        for _ in range(_HALVINGS):
            if self._loss(weights + share * step, margins + share * change, c) <= most:
                break
            share /= 2
        return share


def _factor(total: Floats, ridge: Floats) -> Floats:
    """Cholesky factor of the Hessian; of one that is not positive in float64, with more on the diagonal."""
    diagonal, more = np.diagonal(total).clip(min=np.finfo(np.float64).tiny), 0.0
    while True:
        hessian = total.copy()
        np.fill_diagonal(hessian, diagonal * (1 + more) + ridge)
        factor, failed = dpotrf(hessian)
        if not failed:
            return np.asarray(factor)
        more = max(10 * more, len(total) * np.finfo(np.float64).eps)
