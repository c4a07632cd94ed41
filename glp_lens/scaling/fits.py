"""Loss as a power law of compute: robust fits, the compute frontier, and what a fit says of compute not yet spent."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from glp_lens.errors import InputError
from glp_lens.evals.statistics import intervals
from glp_lens.intervals import Interval

Floats = NDArray[np.float64]
HUBER = 0.003
"""Residual of the log loss from which on it counts linearly: about three times what seeds scatter."""
DECADES = 2.0
"""Powers of ten of compute that cells must span before their fit is asked for an irreducible loss."""
LEAST = 4
"""Different amounts of compute that a fit takes at least: one more than it has parameters."""
_STARTS = (1e-4, 0.3, 0.6, 0.8, 0.9, 0.97)
"""Floors that a fit starts from, as shares of the lowest loss."""
_WEBB = np.sqrt([0.5, 1.0, 1.5])


@dataclass(frozen=True)
class Fit:
    """`L(C) = E + A C^-alpha` fitted to the cells of several trainings, with its wild cluster bootstrap.

    Attributes:
        draws: `(1 + resamples, 3)`: log of the floor E, log of the loss above it at `centre`, and alpha; the first row
            is the fit, the others are those of the resamples.
        centre: log of the compute that `draws` refer to.
        scatter: `(points,)` residuals of the log loss, as in a fit without the trunk of each.
        clusters: number of trunks.
        lowest, highest: compute of the cells, FLOPs.
    """

    draws: Floats
    centre: float
    scatter: Floats
    clusters: int
    lowest: float
    highest: float

    @property
    def decades(self) -> float:
        """Powers of ten of compute that the cells span."""
        return float(np.log10(self.highest / self.lowest))

    @property
    def floor(self) -> Interval:
        """E, the irreducible loss."""
        return self._interval(np.exp(self.draws[:, 0]))

    @property
    def exponent(self) -> Interval:
        """The power alpha of compute that the loss above the floor falls with."""
        return self._interval(self.draws[:, 2])

    @property
    def coefficient(self) -> Interval:
        """A, in the loss's unit at a compute of 1 FLOP."""
        log = intervals(self.draws[:, 1] + self.draws[:, 2] * self.centre, self.clusters)
        value, low, high = map(float, np.exp(log))
        return Interval(value, low, high, self.clusters)

    def losses(self, flops: ArrayLike) -> Floats:
        """Loss by the fit and by each resample, `(1 + resamples, k)`, at each of `(k,)` amounts of compute."""
        return np.exp(_log_loss(self.draws, np.log(np.asarray(flops, dtype=np.float64)) - self.centre))

    def curve(self, flops: ArrayLike) -> Floats:
        """Loss that trainings have on average, and its 95% interval: `(3, k)`."""
        return intervals(self.losses(flops), self.clusters)

    def predict(self, flops: ArrayLike) -> Floats:
        """Loss of one training more, and the 95% interval that it should fall in: `(3, k)`."""
        drawn = self.losses(flops)
        return intervals(drawn * np.exp(self._new_scatter)[:, None], self.clusters)

    @cached_property
    def _new_scatter(self) -> Floats:
        drawn = np.random.default_rng(1).choice(self.scatter, size=len(self.draws))
        drawn[0] = 0.0
        return drawn

    def _interval(self, draws: Floats) -> Interval:
        value, low, high = intervals(draws, self.clusters)
        return Interval(float(value), max(float(low), 0.0), float(high), self.clusters)


def fit(
    flops: ArrayLike,
    loss: ArrayLike,
    trunks: ArrayLike,
    *,
    floor: float | None = None,
    resamples: int = 400,
    seed: int = 0,
) -> Fit:
    """Fit `L(C) = E + A C^-alpha` by Huber's loss on the residuals of log L.

    Resamples keep compute and multiply the residuals of each trunk by one draw of Webb's (2014) six points, for few
    clusters: cells that share a seed or a beginning are not independent. What several seeds of a size have in common is
    taken as given where `trunks` tell them apart.
    `tests/unit/test_scaling_fits.py` has how often the intervals hold the truth.

    Args:
        flops: `(n,)` compute of each cell.
        loss: `(n,)`, positive.
        trunks: `(n,)` labels of the trainings that cells were branched from.
        floor: E, if it is not to be fitted; 0 for a straight line in the log-log plot.
        resamples: bootstrap samples.
        seed: of the resampling.

    Raises:
        InputError: fewer than `LEAST` different amounts of compute, or numbers that are not positive.
    """
    c, y = np.asarray(flops, dtype=np.float64), np.asarray(loss, dtype=np.float64)
    if len(np.unique(c)) < LEAST:
        raise InputError(
            f"a fit needs cells of at least {LEAST} different amounts of compute, got {len(np.unique(c))}: train more"
        )
    if not (np.isfinite(c).all() and np.isfinite(y).all() and c.min() > 0 and y.min() > 0):
        raise InputError("a fit needs positive compute and losses: leave out cells without")
    if floor is not None and not 0 <= floor < y.min():
        raise InputError(f"floor must be at least 0 and below all losses ({y.min():.4g}), got {floor}")
    names, owner = np.unique(np.asarray(trunks), return_inverse=True)
    centre = float(np.log(c).mean())
    x, log_loss = np.log(c) - centre, np.log(y)
    shares = _STARTS if floor is None else (floor / y.min(),)
    starts = np.array([_start(x, y, share * y.min()) for share in shares])
    found, costs = _minimise(x, np.broadcast_to(log_loss, (len(starts), len(x))), starts, floor is None)
    best = found[np.argmin(costs)]

    fitted = _log_loss(best[None], x)[0]
    scatter = _left_out(log_loss - fitted, _slopes(best[None], x, floor is None)[0], owner)
    rng = np.random.default_rng(seed)
    size = (resamples, len(names))
    signs = rng.choice(_WEBB, size=size) * rng.choice([-1.0, 1.0], size=size)
    again = fitted + signs[:, owner] * scatter
    tried = [_minimise(x, again, np.broadcast_to(best, (resamples, 3)), floor is None)]
    if floor is None:  # once more from the other end
        share = _STARTS[0] if np.exp(best[0]) > y.min() / 2 else _STARTS[-2]
        tried.append(_minimise(x, again, np.broadcast_to(_start(x, y, share * y.min()), (resamples, 3)), True))
    chosen = np.argmin([cost for _, cost in tried], axis=0)
    draws = np.stack([own for own, _ in tried])[chosen, np.arange(resamples)]
    return Fit(np.vstack([best, draws]), centre, scatter, len(names), float(c.min()), float(c.max()))


def _log_loss(parameters: Floats, x: Floats) -> Floats:
    """`(b, n)` log losses at `(n,)` logs of compute, by `(b, 3)` parameters."""
    return np.logaddexp(parameters[:, :1], parameters[:, 1:2] - parameters[:, 2:] * x)


def _slopes(parameters: Floats, x: Floats, free: bool) -> Floats:
    """`(b, n, 3)` derivatives of the log loss in the parameters."""
    share = np.exp(parameters[:, 1:2] - parameters[:, 2:] * x - _log_loss(parameters, x))  # that lies above the floor
    return np.stack([(1 - share) * free, share, -x * share], axis=2)


def _left_out(residuals: Floats, slopes: Floats, owner: NDArray[np.int64]) -> Floats:
    """About the residuals that each trunk would have in a fit without it: the fit draws towards its own cells.

    That of the jackknife, known as CR3 (Bell & McCaffrey 2002); directions that a trunk alone determines, in which it
    would have any, are made at most ten times as large.
    """
    inverse = np.linalg.pinv(slopes.T @ slopes)
    result = np.empty_like(residuals)
    for i in range(owner.max() + 1):
        own = owner == i
        values, vectors = np.linalg.eigh(np.eye(int(own.sum())) - slopes[own] @ inverse @ slopes[own].T)
        result[own] = vectors @ ((vectors.T @ residuals[own]) / np.maximum(values, 0.1))
    return result


def _start(x: Floats, loss: Floats, floor: float) -> Floats:
    """Parameters with a given floor: a straight line through the logs of what lies above it."""
    slope, level = np.polyfit(x, np.log(loss - floor), 1)
    return np.array([np.log(floor) if floor > 0 else -np.inf, level, -slope])


def _minimise(x: Floats, log_loss: Floats, start: Floats, free: bool) -> tuple[Floats, Floats]:
    """Levenberg and Marquardt's method on Huber's loss for many samples of the same cells at once.

    Args:
        x: `(n,)` logs of compute.
        log_loss: `(b, n)`.
        start: `(b, 3)` parameters.
        free: whether the floor is fitted.

    Returns:
        `(b, 3)` parameters and their `(b,)` costs.
    """

    def cost_of(parameters: Floats) -> tuple[Floats, Floats]:
        r = (_log_loss(parameters, x) - log_loss) / HUBER
        size = np.abs(r)
        return r, np.where(size < 1, r**2 / 2, size - 0.5).sum(1)

    p, damping = np.array(start), np.full(len(start), 1e-3)
    r, cost = cost_of(p)
    for _ in range(100):
        slopes = _slopes(p, x, free) / HUBER
        weighted = slopes * (1 / np.maximum(np.abs(r), 1))[:, :, None]
        gradient = np.einsum("bnk,bn->bk", weighted, r)
        curvature = np.einsum("bnk,bnl->bkl", weighted, slopes)
        diagonal = np.einsum("bkk->bk", curvature)
        diagonal += damping[:, None] * diagonal + 1e-9
        step = -np.linalg.solve(curvature, gradient[:, :, None])[:, :, 0]
        tried = p + np.clip(step, -1, 1)
        if free:
            tried[:, 0] = np.maximum(tried[:, 0], -12)  # from where on it is nothing
        new, lower = cost_of(tried)
        better = lower < cost
        done = np.where(better, cost - lower <= 1e-8 * cost, damping > 1e8)
        p = np.where(better[:, None], tried, p)
        r, cost = np.where(better[:, None], new, r), np.where(better, lower, cost)
        damping = np.where(better, damping / 5, np.minimum(damping * 4, 1e9))
        if done.all():
            break
    return p, cost


@dataclass(frozen=True)
class Bought:
    """What some hours of a machine buy.

    Attributes:
        flops: of a training that takes them.
        loss: that it should have, with the 95% interval of one training.
        below: the same as per cent below the least loss of any Gaussian; None where that is not known.
        beyond: powers of ten of compute beyond the cells of the fit; where it is much over 0 the interval, which takes
            the law as given, promises too much.
    """

    flops: float
    loss: Interval
    below: Interval | None
    beyond: float


def bought(law: Fit, flops_per_second: float, *, hours: float = 1.0, gaussian_loss: float | None = None) -> Bought:
    """What hours of a machine buy, by a fit and the speed that trainings have there.

    Args:
        law: of the frontier, or of one size.
        flops_per_second: measured, as `flops / seconds` of a training on that machine.
        hours: of training.
        gaussian_loss: least loss of any Gaussian.

    Raises:
        InputError: numbers that are not positive.
    """
    flops = flops_per_second * 3600 * hours
    if not (np.isfinite(flops) and flops > 0):
        raise InputError(f"hours and FLOPs a second must be positive, got {hours} and {flops_per_second}")
    value, low, high = map(float, law.predict([flops])[:, 0])
    loss = Interval(value, low, high, law.clusters)
    below = None if gaussian_loss is None else below_gaussian(loss, gaussian_loss)
    return Bought(flops, loss, below, max(0.0, float(np.log10(flops / law.highest))))


def below_gaussian(loss: Interval, gaussian_loss: float) -> Interval:
    """A loss as per cent below the least that any Gaussian can reach; negative above it."""
    value, high, low = (100 * (1 - each / gaussian_loss) for each in loss[:3])
    return Interval(value, low, high, loss.n)


def frontier(flops: ArrayLike, loss: ArrayLike) -> NDArray[np.bool_]:
    """Which of `(n,)` points no other reaches with less compute: the lower convex hull in the log-log plot.

    A power law with a floor is convex there, so what lies above a line between two others would have been better spent
    on a size between theirs. Give the mean over seeds, not the luckiest one.
    """
    x, y = np.log(np.asarray(flops, dtype=np.float64)), np.log(np.asarray(loss, dtype=np.float64))
    hull: list[int] = []
    for i in np.lexsort((y, x)):
        if hull and y[i] >= y[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (y[b] - y[a]) * (x[i] - x[a]) < (y[i] - y[a]) * (x[b] - x[a]):
                break
            hull.pop()
        hull.append(int(i))
    chosen = np.zeros(len(x), dtype=bool)
    chosen[hull] = True
    return chosen
