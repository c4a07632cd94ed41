"""Means and covariances of rows that come in parts, and Frechet distances between them.

The Frechet distance of two sets of rows is the squared 2-Wasserstein (Bures) distance between the Gaussians of their
means and covariances, `|m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1^(1/2) S2 S1^(1/2))^(1/2)`: Dowson & Landau 1982; as a
measure of samples, Heusel et al. 2017. With any factor `S1 = R R^T` the last trace is the sum of the root eigenvalues
of the symmetric `R^T S2 R`, so no root of a general matrix is needed: a Cholesky factor, or eigenvectors where there is
none, and eigenvalues. All of it is in float64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from scipy.linalg.lapack import dsygst
from torch import Tensor

from glp_lens.errors import InputError
from glp_lens.intervals import Floats
from glp_lens.types import Acts

_BLOCK = 4096


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and scatter of `count` rows, float64; parts are added up as if their rows had come together.

    Attributes:
        mean: `(d,)`.
        scatter: `(d, d)`, the sum of the outer products of deviations from the mean.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 7.0]])
        >>> moments = Moments.of(x[:1]) + Moments.of(x[1:])
        >>> moments.count, moments.mean.tolist(), moments.covariance.tolist()
        (3, [2.0, 3.0], [[4.0, 6.0], [6.0, 12.0]])
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, x: Acts) -> Moments:
        """Of at least one row `(n, d)`, of any floating dtype."""
        return cls.of_batches(x.split(_BLOCK))

    @classmethod
    def of_batches(cls, batches: Iterable[Acts]) -> Moments:
        """Of batches of rows that need not be in memory at once, at least one row in all.

        Raises:
            InputError: no rows.
        """
        parts = (cls._of_block(batch) for batch in batches if len(batch))
        if (first := next(parts, None)) is None:
            raise InputError("means and covariances need at least one row, got none")
        return reduce(cls.__add__, parts, first)

    @classmethod
    def _of_block(cls, x: Acts) -> Moments:
        wide = x.detach().cpu().double()
        mean = wide.mean(0)
        rest = wide - mean
        return cls(len(x), mean, rest.T @ rest)

    def __add__(self, other: Moments) -> Moments:
        # As in activations.stats: Chan, Golub and LeVeque 1979.
        count = self.count + other.count
        delta = other.mean - self.mean
        scatter = (self.scatter + other.scatter).addr_(delta, delta, alpha=self.count * other.count / count)
        return Moments(count, self.mean + delta * (other.count / count), scatter)

    @property
    def covariance(self) -> Tensor:
        """`(d, d)`, unbiased: divided by `count - 1`, as numpy's `cov` does."""
        return self.scatter / max(self.count - 1, 1)

    @property
    def std(self) -> Tensor:
        """`(d,)`, the standard deviation of each dimension."""
        return (self.scatter.diagonal() / max(self.count - 1, 1)).sqrt()


def frechet_distance(first: Moments, second: Moments) -> float:
    """Frechet distance, in squared units of the rows; its root is the 2-Wasserstein distance between two Gaussians.

    Of finite samples it is too large, by about a constant over the number of rows, and the more the wider they are.

    Raises:
        InputError: rows of two widths.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 7.0]])
        >>> round(frechet_distance(Moments.of(x), Moments.of(x + 3)), 6)
        18.0
    """
    if first.mean.shape != second.mean.shape:
        raise InputError(f"rows must be of one width, got {len(first.mean)} and {len(second.mean)}")
    return _Fixed(first).distance(second)


class _Fixed:
    """One side of Frechet distances, its covariance factored once."""

    def __init__(self, moments: Moments) -> None:
        covariance = moments.covariance
        self.mean, self.variances = moments.mean, covariance.diagonal().clone()
        self.factor, failed = torch.linalg.cholesky_ex(covariance)
        self.triangular = not bool(failed)
        if not self.triangular:  # singular, as of fewer rows than dimensions
            values, vectors = torch.linalg.eigh(covariance)
            self.factor = vectors * values.clamp(min=0).sqrt()

    def distance(self, other: Moments, weights: Tensor | None = None) -> float:
        """To another side; with `weights` `(d,)`, of rows times these."""
        covariance, factor, delta = other.covariance, self.factor, self.mean - other.mean
        spread = self.variances + covariance.diagonal()
        if weights is not None:
            covariance, factor = covariance * weights * weights[:, None], factor * weights[:, None]
            delta, spread = delta * weights, spread * weights.square()
        if self.triangular:
            # LAPACK's R^T S R of a triangular R takes half the multiplications of one product of two matrices.
            product = torch.from_numpy(dsygst(covariance.numpy().T, factor.numpy(), itype=2, lower=1)[0])
        else:
            product = factor.T @ covariance @ factor
        shared = torch.linalg.eigvalsh(product, UPLO="L").clamp_(min=0).sqrt_().sum()
        return float(delta.square().sum() + spread.sum() - 2 * shared)


def _left_out(parts: Sequence[Moments]) -> Iterator[Moments]:
    """Of all parts, then of all but each."""
    yield reduce(Moments.__add__, parts)
    for i in range(len(parts)):
        yield reduce(Moments.__add__, (part for j, part in enumerate(parts) if j != i))


class FrechetReference:
    """Frechet distances to one set of rows, on all of it and without each of its groups.

    Args:
        parts: moments of each group of the reference rows, at least two.
        weights: `(d,)`, by which rows are multiplied in the standardised space.
    """

    def __init__(self, parts: Sequence[Moments], weights: Tensor) -> None:
        self._fixed = [_Fixed(moments) for moments in _left_out(parts)]
        self._weights = weights

    def distances(self, parts: Sequence[Moments]) -> tuple[Floats, Floats]:
        """Draws `(1 + groups,)`, as in `statistics.jackknife`, in units of the rows and of weighted rows.

        Args:
            parts: moments of each group of the other rows, as many as the reference has.
        """
        pairs = [
            (fixed.distance(moments), fixed.distance(moments, self._weights))
            for fixed, moments in zip(self._fixed, _left_out(parts), strict=True)
        ]
        plain, weighted = np.array(pairs).T
        return plain, weighted
