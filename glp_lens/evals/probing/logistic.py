"""Logistic regression with an L2 penalty at its optimum, for many penalties: Newton's method in float64.

Two ways to the same optimum: `Regression` solves for its steps directly and suits few features, `standardised` solves
for those of many regressions at once with conjugate gradients and suits all dimensions of the activations.

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
- The curvature of log(1 + exp(-m)) changes by a factor of at most exp(|dm|), so along a step phi(t) = f(t d), with
  a = max |dm_i|, has phi''(t) <= phi''(0) exp(a t), and phi(1) - phi(0) <= phi'(0) + phi''(0) (exp(a) - 1 - a) / a^2.
  A step for which this is positive, as with the H of its point it is from a = 1.79, is halved until f does not rise.
- Strong penalties go first, where the optimum is near w = 0. The next search starts at the last optimum or, if f is
  lower there, on the straight line in log C through the last two, along which separable rows move.

`standardised` differs in this:

- The regressions, of each set of train rows with each C, share the rows' matrix: one product serves all of them.
- A step d is what conjugate gradients have found when the rest of H d = -g is a small share of g, smaller near the end
  (an inexact Newton method; Nocedal and Wright, "Numerical Optimization", 7.1). Products with H are in float32, since
  they decide how many steps are taken, and not where these end; g, margins and f are in float64.
- The search ends where l, by the step that was found, times that share is at most 1e-5. For C up to 1 probabilities are
  those of scikit-learn's Newton solver to 1e-5 (tests); weaker penalties leave directions of so little curvature that
  conjugate gradients end before they have seen them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg.lapack import dpotrf, dpotrs
from scipy.special import expit
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn.functional import logsigmoid

from glp_lens import numerics

Floats = NDArray[np.float64]

_FAR = 20.0
"""Change of a margin from which a step is not taken for one that lowers f without a look."""
_RATIO = 0.5
"""Decrement over the last one above which the Hessian is made again."""
_END, _ROUNDING = 1e-7, 1e-6
"""Decrement that is small enough, and one that rounding may keep from falling."""
_STEPS, _HALVINGS = 200, 60
_END_TOGETHER = 1e-5
_SHARE, _LEAST_SHARE, _MOST_SHARE = 0.3, 1e-3, 0.3
"""Share of the gradient that a step may leave, over the decrement, and its bounds."""
_DIRECTIONS = 300
"""Most conjugate directions of a step."""
_LEAST_CURVATURE = 1e-6
"""Added for the steps, where all rows are far from the boundary and the intercept has none."""


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
            most = max(change.max(), -change.min())
            bend = (wrong * (1 - wrong)) @ change**2 + ridge @ step**2
            if most > _FAR or decrement**2 * most**2 < bend * (np.expm1(most) - most):
                share = self._share(weights, margins, step, change, c)
                step, change = share * step, share * change
            weights, margins = weights + step, margins + change
            if decrement <= end or (before < np.inf and decrement * min(1, decrement / before) <= end):
                break
            before = decrement
        return weights

    def _loss(self, weights: Floats, margins: Floats, c: float) -> float:
        # log(1 + exp(-m)), by functions that NumPy has vector instructions for
        losses = np.log1p(np.exp(-np.abs(margins))).sum() - np.minimum(margins, 0).sum()
        return float(weights[:-1] @ weights[:-1] / (2 * c) + losses)

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
        hessian = total.T.copy(order="F")  # of the symmetric matrix, in LAPACK's order
        np.fill_diagonal(hessian, diagonal * (1 + more) + ridge)
        factor, failed = dpotrf(hessian, clean=0, overwrite_a=1)
        if not failed:
            return np.asarray(factor)
        more = max(10 * more, len(total) * np.finfo(np.float64).eps)


@numerics.own()
@torch.no_grad()
def standardised(
    x: Floats,
    y: NDArray[np.int64],
    parts: Sequence[NDArray[np.int64]],
    penalties: Sequence[float],
    starts: Floats | None = None,
) -> Floats:
    """Regressions on several sets of rows with each of several C up to 1, features standardised by the rows of the set.

    Args:
        x: `(n, d)`, finite.
        y: `(n,)`, 0 or 1.
        parts: row numbers of each set, with both classes in it.
        penalties: the C.
        starts: weights to start from, as they are returned; 0 by default.

    Returns:
        `(len(parts), len(penalties), d + 1)`: weights of `x` as it is given, and the intercept.
    """
    whole = StandardScaler().fit(x)
    n, d = x.shape
    rows = np.column_stack([whole.transform(x), np.ones(n)])  # the intercept is a weight of ones
    # The intercept is free, so that rows need not be centred, and what the scale of a part does to a feature it does as
    # well to the penalty of its weight.
    member, squares = np.zeros((len(parts), n)), np.ones((len(parts), d + 1))
    for i, part in enumerate(parts):
        member[i, part] = 1
        squares[i, :d] = StandardScaler().fit(rows[part, :d]).scale_ ** 2
    ridge = squares[:, None] / np.asarray(penalties)[:, None]
    ridge[:, :, d] = 0
    weights = np.zeros_like(ridge)
    if starts is not None:
        weights[:, :, :d] = starts[:, :, :-1] * whole.scale_
        weights[:, :, d] = starts[:, :, -1] + starts[:, :, :-1] @ whole.mean_
    own, size = (torch.from_numpy(np.repeat(values, len(penalties), axis=0)) for values in (member, squares))
    signs, costs = torch.from_numpy(2.0 * y - 1), torch.from_numpy(ridge.reshape(-1, d + 1))
    together = _Together(torch.from_numpy(rows), signs, own, size, costs)
    found = together.optima(torch.from_numpy(weights.reshape(-1, d + 1))).numpy().reshape(weights.shape)
    slopes = found[:, :, :d] / whole.scale_
    return np.concatenate([slopes, (found[:, :, d] - slopes @ whole.mean_)[:, :, None]], axis=2)


@dataclass(frozen=True)
class _Together:
    """Regressions that share the matrix of their rows; `m` of them.

    Attributes:
        x: `(n, k)`, all rows.
        signs: `(n,)`, 1 or -1.
        member: `(m, n)`, 1 for the rows of each regression and 0 for others.
        squares: `(m, k)`, about the mean square of each feature over these rows.
        ridge: `(m, k)`, what a weight's square costs, twice.
    """

    x: Tensor
    signs: Tensor
    member: Tensor
    squares: Tensor
    ridge: Tensor

    def optima(self, weights: Tensor) -> Tensor:
        """Weights `(m, k)`, from those given, which are changed."""
        margins = weights @ self.x.T
        short = self.x.float()
        left = torch.arange(len(weights))
        for _ in range(_STEPS):
            some = _Together(self.x, self.signs, self.member[left], self.squares[left], self.ridge[left])
            w, m = weights[left], margins[left]
            wrong = torch.sigmoid(-self.signs * m) * some.member
            slope = (self.signs * wrong) @ self.x - some.ridge * w
            curvature = wrong * (1 - wrong)
            step, share = some._step(short, slope.float(), curvature.float())
            step = step.double()
            downhill = (slope * step).sum(1, keepdim=True)
            change = step @ self.x.T
            length = some._length(w, m, step, change, downhill, curvature)
            weights[left], margins[left] = w + length * step, m + length * change
            left = left[(downhill.clamp(min=0).sqrt() * share > _END_TOGETHER)[:, 0]]
            if not len(left):
                break
        return weights

    def _step(self, x: Tensor, slope: Tensor, curvature: Tensor) -> tuple[Tensor, Tensor]:
        """Steps `(m, k)` towards H d = -g by conjugate gradients, and the share `(m, 1)` of g that they may leave.

        All in float32. The directions are those of weights of equal curvature, about.
        """
        ridge = self.ridge.float() + _LEAST_CURVATURE
        over = 1 / (curvature.sum(1, keepdim=True) * self.squares.float() + ridge)
        rest, step = slope, torch.zeros_like(slope)
        way = over * rest
        size = (rest * way).sum(1, keepdim=True)
        share = (_SHARE * size.sqrt()).clamp(_LEAST_SHARE, _MOST_SHARE)
        enough = share**2 * size
        for _ in range(_DIRECTIONS):
            going = size > enough
            if not going.any():
                break
            bent = torch.addcmul((curvature * (way @ x.T)) @ x, ridge, way)
            far = torch.where(going, size / (way * bent).sum(1, keepdim=True), 0)  # one that has arrived waits
            step = torch.addcmul(step, far, way)
            rest = torch.addcmul(rest, far, bent, value=-1)
            toward = over * rest
            new = torch.where(going, (rest * toward).sum(1, keepdim=True), size)
            way = torch.addcmul(toward, new / size.clamp(min=torch.finfo(size.dtype).tiny), way)
            size = new
        return step, share

    def _length(
        self, weights: Tensor, margins: Tensor, step: Tensor, change: Tensor, downhill: Tensor, curvature: Tensor
    ) -> Tensor:
        """The largest of 1, 1/2, 1/4, .. of each step with which the loss does not rise, `(m, 1)`."""
        length = torch.ones_like(downhill)
        most = (change.abs() * self.member).amax(1, keepdim=True)
        bend = (curvature * change.square()).sum(1, keepdim=True) + (self.ridge * step.square()).sum(1, keepdim=True)
        unsure = (most > _FAR) | (downhill * most**2 < bend * (torch.expm1(most) - most))
        if unsure.any():
            before = self._loss(weights, margins) * (1 + 1e-13)
            for _ in range(_HALVINGS):
                rises = unsure & (self._loss(weights + length * step, margins + length * change) > before)
                if not rises.any():
                    break
                length = torch.where(rises, length / 2, length)
        return length

    def _loss(self, weights: Tensor, margins: Tensor) -> Tensor:
        fit = (logsigmoid(self.signs * margins) * self.member).sum(1, keepdim=True)
        return (self.ridge * weights.square()).sum(1, keepdim=True) / 2 - fit
