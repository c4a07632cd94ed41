"""Running statistics of activation rows, kept in float64, that merge exactly as if the rows had come together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import reduce

import torch
from torch import Tensor

from glp_lens.types import Acts

_BLOCK = 512  # rows of one pass: small enough for the cache and for float32 sums


@dataclass(frozen=True)
class Stats:
    """Statistics of `count` rows; all tensors are float64 of shape `(d_in,)`.

    Attributes:
        M2: sum of squared deviations from the mean.
        norm_sum: sum of the rows' Euclidean norms.
    """

    count: int
    mean: Tensor = field(repr=False)
    M2: Tensor = field(repr=False)
    min: Tensor = field(repr=False)
    max: Tensor = field(repr=False)
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
        """Statistics of at least one row, of any floating dtype.

        Examples:
            >>> import torch
            >>> from glp_lens.activations import Stats
            >>> stats = Stats.of(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
            >>> stats.mean.tolist(), stats.var.tolist(), stats.mean_norm
            ([1.5, 2.0], [2.25, 4.0], 2.5)
        """
        return measure(x)[0]


def measure(x: Acts) -> tuple[Stats, Tensor]:
    """Statistics of at least one row, of any floating dtype, and the norm of each, `(n,)`."""
    buffer = torch.empty((min(_BLOCK, len(x)), x.shape[1]), dtype=torch.promote_types(x.dtype, torch.float32))
    parts, norms = zip(*(_block(part, buffer[: len(part)]) for part in x.split(_BLOCK)), strict=True)
    return merge(parts), torch.cat(norms)


def _block(x: Tensor, buffer: Tensor) -> tuple[Stats, Tensor]:
    """Of a few hundred rows: float32 sums of what is left after taking off about the mean lose nothing.

    Each step is one pass over rows that stay in the cache. `torch.aminmax` and `vector_norm` along the first dimension
    are ten times slower than what is used here.
    """
    buffer.copy_(x)
    low, high = buffer.amin(0), buffer.amax(0)
    norms = torch.linalg.vector_norm(buffer, dim=1)
    shift = buffer.mean(0)
    rest = buffer.sub_(shift).sum(0).double() / len(x)
    squares = buffer.square_().sum(0).double()
    stats = Stats(
        count=len(x),
        mean=shift.double() + rest,
        M2=(squares - len(x) * rest.square()).clamp_(min=0),
        min=low.double(),
        max=high.double(),
        norm_sum=float(norms.double().sum()),
    )
    return stats, norms


def merge(parts: Iterable[Stats]) -> Stats:
    """Statistics of all the parts' rows together.

    Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances"
    (1979): the means' difference carries what the two sums of squares do not know of each other, so nothing
    is lost when the mean is far larger than the deviations.
    """
    whole = reduce(_merge_two, parts)
    constant = whole.min == whole.max  # exactly that, whatever rounding says
    return replace(whole, mean=torch.where(constant, whole.min, whole.mean), M2=torch.where(constant, 0.0, whole.M2))


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
