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
from dataclasses import dataclass, fields, replace

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
"""Of the intercept, added for its steps where all rows are far from the boundary."""


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
    rows = whole.transform(x)
    scalers = [StandardScaler().fit(rows[part]) for part in parts]
    own = np.zeros((len(parts), len(x)))
    for member, part in zip(own, parts, strict=True):
        member[part] = 1
    each = len(penalties)

    def of_each(values: Floats) -> Tensor:
        return torch.from_numpy(np.repeat(values, each, axis=0))

    mean, scale = (np.stack([getattr(scaler, name) for scaler in scalers]) for name in ("mean_", "scale_"))
    ridge = torch.from_numpy(1 / np.tile(np.asarray(penalties, dtype=np.float64), len(parts)))[:, None]
    signs = torch.from_numpy(2.0 * y - 1)
    together = _Together(torch.from_numpy(rows), signs, of_each(mean), of_each(scale), of_each(own), ridge)
    # Of the features as they are given: what is subtracted from them, and what they are divided by.
    centre, size = of_each(whole.mean_ + whole.scale_ * mean), of_each(whole.scale_ * scale)
    shape = (len(parts), each, x.shape[1] + 1)
    given = torch.from_numpy(np.zeros(shape) if starts is None else starts).reshape(len(ridge), -1)
    weights, intercept = given[:, :-1], given[:, -1:]
    weights, intercept = together.optima(weights * size, intercept + (weights * centre).sum(1, keepdim=True))
    weights = weights / size
    intercept = intercept - (weights * centre).sum(1, keepdim=True)
    return torch.cat([weights, intercept], 1).reshape(shape).numpy()


@dataclass(frozen=True)
class _Together:
    """Regressions that share the matrix of their rows; `m` of them.

    Attributes:
        x: `(n, d)`, all rows.
        signs: `(n,)`, 1 or -1.
        mean, scale: `(m, d)`, which each regression standardises the features by.
        member: `(m, n)`, 1 for its rows and 0 for others.
        ridge: `(m, 1)`, 1 / C.
    """

    x: Tensor
    signs: Tensor
    mean: Tensor
    scale: Tensor
    member: Tensor
    ridge: Tensor

    def optima(self, weights: Tensor, intercept: Tensor) -> tuple[Tensor, Tensor]:
        """Weights `(m, d)` of the standardised features and intercepts `(m, 1)`, from those given."""
        margins = self._predict(weights, intercept)
        short = _Together(self.x.float(), *(getattr(self, f.name).float() for f in fields(self)[1:]))
        left = torch.arange(len(weights))
        for _ in range(_STEPS):
            some, some_short = self._of(left), short._of(left)
            w, b, m = weights[left], intercept[left], margins[left]
            wrong = torch.sigmoid(-self.signs * m) * some.member
            slope, slope_b = some._gather(self.signs * wrong)
            slope -= some.ridge * w
            curvature = wrong * (1 - wrong)
            step, step_b, share = some_short._step(slope.float(), slope_b.float(), curvature.float())
            step, step_b = step.double(), step_b.double()
            downhill = (slope * step).sum(1, keepdim=True) + slope_b * step_b
            change = some._predict(step, step_b)
            length = some._length(w, m, step, change, downhill, curvature)
            weights[left], intercept[left] = w + length * step, b + length * step_b
            margins[left] = m + length * change
            left = left[(downhill.clamp(min=0).sqrt() * share > _END_TOGETHER)[:, 0]]
            if not len(left):
                break
        return weights, intercept

    def _of(self, which: Tensor) -> _Together:
        return replace(self, **{name: getattr(self, name)[which] for name in ("mean", "scale", "member", "ridge")})

    def _predict(self, weights: Tensor, intercept: Tensor) -> Tensor:
        """`(m, n)`, w z + b of the standardised rows z."""
        weights = weights / self.scale
        return weights @ self.x.T + (intercept - (weights * self.mean).sum(1, keepdim=True))

    def _gather(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The transpose of `_predict`: sums of standardised rows times `values` `(m, n)`, and of `values`."""
        total = values.sum(1, keepdim=True)
        return (values @ self.x - self.mean * total) / self.scale, total

    def _step(self, slope: Tensor, slope_b: Tensor, curvature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Steps towards H d = -g by conjugate gradients, and the share `(m, 1)` of the gradient that they may leave.

        Weights and intercepts are of different curvature, so each kind is divided by its own, about.
        """
        total = curvature.sum(1, keepdim=True) + _LEAST_CURVATURE
        over, over_b = 1 / (total + self.ridge), 1 / total
        rest, rest_b = slope, slope_b
        step, step_b = torch.zeros_like(slope), torch.zeros_like(slope_b)
        way, way_b = over * rest, over_b * rest_b
        size = (rest * way).sum(1, keepdim=True) + rest_b * way_b
        share = (_SHARE * size.sqrt()).clamp(_LEAST_SHARE, _MOST_SHARE)
        enough = share**2 * size
        for _ in range(_DIRECTIONS):
            if not (size > enough).any():
                break
            bent, bent_b = self._gather(curvature * self._predict(way, way_b))
            bent, bent_b = bent + self.ridge * way, bent_b + _LEAST_CURVATURE * way_b
            far = size / ((way * bent).sum(1, keepdim=True) + way_b * bent_b)
            far = torch.where(size > enough, far, 0)  # one that has arrived waits for the others
            step, step_b = step + far * way, step_b + far * way_b
            rest, rest_b = rest - far * bent, rest_b - far * bent_b
            new = torch.where(size > enough, over * rest.square().sum(1, keepdim=True) + over_b * rest_b**2, size)
            way, way_b = over * rest + new / size * way, over_b * rest_b + new / size * way_b
            size = new
        return step, step_b, share

    def _length(
        self, weights: Tensor, margins: Tensor, step: Tensor, change: Tensor, downhill: Tensor, curvature: Tensor
    ) -> Tensor:
        """The largest of 1, 1/2, 1/4, .. of each step with which the loss does not rise, `(m, 1)`."""
        length = torch.ones_like(downhill)
        most = (change.abs() * self.member).amax(1, keepdim=True)
        bend = (curvature * change.square()).sum(1, keepdim=True) + self.ridge * step.square().sum(1, keepdim=True)
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
        return self.ridge * weights.square().sum(1, keepdim=True) / 2 - fit
