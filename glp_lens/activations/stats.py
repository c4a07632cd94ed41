"""Running statistics of activation rows, in float64, that merge exactly as if the rows had come together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from glp_lens.types import Acts

_BLOCK = 2048  # rows turned to float64 at a time: bounds the memory of one pass


@dataclass(frozen=True)
class Stats:
    """Statistics of `count` rows; all tensors are float64 of shape `(d_in,)`.

    Attributes:
        M2: sum of squared deviations from the mean.
        norm_sum: sum of the rows' Euclidean norms.
    """

    count: int
    mean: Tensor
    M2: Tensor
    min: Tensor
    max: Tensor
    norm_sum: float

    @property
    def var(self) -> Tensor:
        """Population variance of each dimension."""
        return self.M2 / self.count

    @property
    def mean_norm(self) -> float:
        """Mean Euclidean norm of a row."""
        return self.norm_sum / self.count

    @classmethod
    def of(cls, x: Acts) -> Stats:
        """Statistics of at least one row, of any floating dtype."""
        return merge(_block_stats(block.double()) for block in x.split(_BLOCK))


def _block_stats(x: Tensor) -> Stats:
    mean = x.mean(0)
    return Stats(
        count=len(x),
        mean=mean,
        M2=(x - mean).square_().sum(0),
        min=x.amin(0),
        max=x.amax(0),
        norm_sum=float(x.norm(dim=1).sum()),
    )


def merge(parts: Iterable[Stats]) -> Stats:
    """Statistics of all the parts' rows together.

    Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances"
    (1979): the means' difference carries what the two sums of squares do not know of each other, so nothing
    is lost when the mean is far larger than the deviations.
    """
    return reduce(_merge_two, parts)


def _merge_two(a: Stats, b: Stats) -> Stats:
    count = a.count + b.count
    delta = b.mean - a.mean
    return Stats(
        count=count,
        mean=a.mean + delta * (b.count / count),
        M2=a.M2 + b.M2 + delta.square() * (a.count * b.count / count),
        min=torch.minimum(a.min, b.min),
        max=torch.maximum(a.max, b.max),
        norm_sum=a.norm_sum + b.norm_sum,
    )
