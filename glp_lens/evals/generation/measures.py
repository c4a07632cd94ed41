"""Distances between two sets of rows beyond two moments, each on all rows and without each group of them.

Rows are standardised `(n, d)` and float32. `groups` `(n,)` are numbers from 0, the same ones in both sets, that a
jackknife leaves out one by one; `owners` `(n,)` are documents, whose rows depend on each other. Every function gives
draws `(1 + groups,)`, as `statistics.jackknife` takes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glp_lens.intervals import Floats
from glp_lens.types import Acts

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
_DIMENSIONS = 64
"""Dimensions that are sorted at once."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows, with the document and the group of each."""

    rows: Acts
    owners: Ints
    groups: Ints

    def __len__(self) -> int:
        return len(self.rows)

    def kept(self, without: int) -> Tensor:
        """`(n,)` bool: rows not in a group; all of them without -1."""
        return torch.from_numpy(self.groups != without)

    def first(self, n: int) -> Rows:
        """At most `n` rows, evenly chosen."""
        if len(self) <= n:
            return self
        index = np.linspace(0, len(self) - 1, n).round().astype(np.int64)
        return Rows(self.rows[index], self.owners[index], self.groups[index])


def _groups(first: Rows) -> Iterator[int]:
    """-1 for all rows, then the number of each group."""
    yield from range(-1, int(first.groups.max()) + 1)


def kolmogorov_smirnov(first: Rows, second: Rows) -> tuple[Floats, Floats]:
    """Kolmogorov-Smirnov distance of each dimension, the largest gap between two distribution functions.

    Returns:
        Draws of its mean and of its largest value over dimensions.
    """
    found = []
    for columns in range(0, first.rows.shape[1], _DIMENSIONS):
        part = slice(columns, columns + _DIMENSIONS)
        pooled, order = torch.cat([first.rows[:, part], second.rows[:, part]]).sort(0)
        # Distribution functions are compared behind the last of equal values.
        last = torch.ones_like(pooled, dtype=torch.bool)
        last[:-1] = pooled[1:] != pooled[:-1]
        gaps = []
        for without in _groups(first):
            mine, other = first.kept(without).double(), second.kept(without).double()
            steps = torch.cat([mine / mine.sum(), -other / other.sum()])
            gaps.append((steps[order].cumsum(0).abs() * last).amax(0))
        found.append(torch.stack(gaps))
    each = torch.cat(found, dim=1).numpy()
    return each.mean(1), each.max(1)


def sliced_wasserstein(first: Rows, second: Rows, *, slices: int = 128, seed: int = 0) -> Floats:
    """Draws of the sliced 2-Wasserstein distance: the root mean squared distance along random directions.

    Bonneel et al. 2015. Directions are uniform on the sphere; along each, the distance is exact.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(first.rows.shape[1], slices, generator=generator, dtype=torch.float64)
    directions /= directions.norm(dim=0)
    ours, theirs = (side.rows.double() @ directions for side in (first, second))
    draws = []
    for without in _groups(first):
        x, y = ours[first.kept(without)].sort(0).values, theirs[second.kept(without)].sort(0).values
        # Between these levels both quantile functions are constant.
        levels = np.union1d(np.arange(1, len(x) + 1) / len(x), np.arange(1, len(y) + 1) / len(y))
        widths = np.diff(levels, prepend=0.0)
        middles = levels - widths / 2
        at = [torch.from_numpy((middles * len(side)).astype(np.int64).clip(max=len(side) - 1)) for side in (x, y)]
        squares = (x[at[0]] - y[at[1]]).square().mean(1)
        draws.append(float(squares @ torch.from_numpy(widths)) ** 0.5)
    return np.array(draws)


class Pairwise:
    """Measures by the distances of all pairs of rows, to one set of reference rows.

    Args:
        reference: real rows.
        neighbours: k of the k-nearest-neighbour balls in precision and recall.
    """

    def __init__(self, reference: Rows, *, neighbours: int = 3) -> None:
        self._reference, self._k = reference, neighbours
        self._own = self._distances(reference, reference)
        other = _of_other_documents(reference)
        # Of two of the middle values the lower: torch's median.
        self._bandwidth = float(self._own[other].median())
        self._radii = self._all_radii(reference, self._own, other)
        self._own_sums = _block_sums(self._kernel(self._own) * other, reference, reference)
        self._own_pairs = _block_sums(other.double(), reference, reference)

    def measure(self, rows: Rows) -> tuple[Floats, Floats, Floats]:
        """Draws of squared MMD, precision and recall of some rows.

        The squared maximum mean discrepancy (Gretton et al. 2012) is the unbiased one, with a Gaussian kernel whose
        width is the median distance of reference rows; of pairs within a set, only those of two documents count.
        Precision is the share of rows that lie in the ball of some reference row, reaching to its k-th neighbour of
        another document; recall is the same with the sets exchanged (Kynkaanniemi et al. 2019).
        """
        across, inside = self._distances(self._reference, rows), self._distances(rows, rows)
        other = _of_other_documents(rows)
        sums = self._own_sums, _block_sums(self._kernel(inside) * other, rows, rows)
        pairs = self._own_pairs, _block_sums(other.double(), rows, rows)
        between = _block_sums(self._kernel(across), self._reference, rows)
        between_pairs = _block_sums(torch.ones_like(across), self._reference, rows)
        radii = self._all_radii(rows, inside, other)
        discrepancy, precision, recall = [], [], []
        for without, mine, theirs in zip(_groups(rows), self._radii, radii, strict=True):
            within = [_total(s, without) / _total(p, without) for s, p in zip(sums, pairs, strict=True)]
            discrepancy.append(sum(within) - 2 * _total(between, without) / _total(between_pairs, without))
            real, made = self._reference.kept(without), rows.kept(without)
            seen = across[real][:, made]
            precision.append(float((seen <= mine[real, None]).any(0).double().mean()))
            recall.append(float((seen <= theirs[made]).any(1).double().mean()))
        return np.array(discrepancy), np.array(precision), np.array(recall)

    def _distances(self, first: Rows, second: Rows) -> Tensor:
        return torch.cdist(first.rows.double(), second.rows.double())

    def _kernel(self, distances: Tensor) -> Tensor:
        return (distances / self._bandwidth).square_().mul_(-0.5).exp_()

    def _all_radii(self, rows: Rows, distances: Tensor, other: Tensor) -> list[Tensor]:
        """`(n,)` distances to the k-th neighbour of another document, among all rows and without each group."""
        radii = []
        for without in _groups(rows):
            allowed = other & rows.kept(without)
            candidates = distances.masked_fill(~allowed, torch.inf)
            k = min(self._k, candidates.shape[1])
            radii.append(candidates.topk(k, dim=1, largest=False, sorted=True).values[:, -1])
        return radii


def _of_other_documents(rows: Rows) -> Tensor:
    owners = torch.from_numpy(rows.owners)
    return owners[:, None] != owners


def _block_sums(values: Tensor, first: Rows, second: Rows) -> Floats:
    """Sums of values `(n, m)` over pairs of groups, `(groups, groups)`."""
    n = int(first.groups.max()) + 1
    one_hot = [torch.nn.functional.one_hot(torch.from_numpy(side.groups), n).double() for side in (first, second)]
    sums: Floats = (one_hot[0].T @ values @ one_hot[1]).numpy()
    return sums


def _total(sums: Floats, without: int) -> float:
    keep = np.arange(len(sums)) != without
    return float(sums[np.ix_(keep, keep)].sum())
