"""Reading rows of one dataset straight from the bytes of its shards: no lock, and no file kept open."""

from __future__ import annotations

import itertools
import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from glp_lens.errors import InputError


@dataclass(frozen=True)
class Extent:
    """Where a shard keeps its rows of a dataset: `rows` of them, one after the other from byte `offset` on."""

    path: Path
    rows: int
    offset: int


class RowReader:
    """The rows of a dataset that lies in shards, each in one piece.

    It has no state but the layout, so threads and forked or spawned processes can share it.

    Attributes:
        shape: shape of a row; `()` for one number a row.
        dtype: dtype of the stored numbers.
    """

    def __init__(self, extents: Sequence[Extent], shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        self._extents = tuple(extents)
        self._bounds = np.cumsum([0, *(extent.rows for extent in extents)])
        self._row_bytes = dtype.itemsize * int(np.prod(shape, dtype=np.int64))

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def read(self, starts: np.ndarray, stops: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Read row intervals, one after the other in the order given, `(n, *shape)`.

        Each shard is opened once and read from front to back. Reading is fastest with ascending intervals,
        because neighbours become one.

        Args:
            starts: first row of each interval.
            stops: the row after its last.
            out: contiguous array of this shape and dtype to read into; by default a new one.

        Raises:
            InputError: a shard is gone, unreadable, or shorter than it was.
        """
        n = int((stops - starts).sum())
        if out is None:
            out = np.empty((n, *self.shape), self.dtype)
        assert out.shape == (n, *self.shape), f"expected room for {n} rows, got {out.shape}"
        assert out.dtype == self.dtype, f"expected {self.dtype}, got {out.dtype}"
        if n == 0:
            return out
        view, row = out.data.cast("B"), self._row_bytes
        for shard, pieces in itertools.groupby(self._pieces(starts, stops).tolist(), key=operator.itemgetter(0)):
            extent = self._extents[shard]
            try:
                with extent.path.open("rb", buffering=0) as file:
                    for _, place, begin, end in pieces:
                        _read_into(file.fileno(), view[begin * row : end * row], extent.offset + place * row)
            except OSError as error:
                raise InputError(
                    f"{extent.path} cannot be read ({error.strerror or error}): restore it or repair the store"
                ) from None
        return out

    def _pieces(self, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """What to read from one shard in one go, in the shards' order: `(shard, row in it, rows of out: from, to)`."""
        joins = starts[1:] == stops[:-1]
        starts, stops = starts[np.r_[True, ~joins]], stops[np.r_[~joins, True]]
        some = stops > starts
        starts, stops = starts[some], stops[some]
        begins = np.cumsum(stops - starts) - (stops - starts)
        # An interval over several shards falls into a piece for each.
        first = np.searchsorted(self._bounds, starts, side="right") - 1
        parts = np.searchsorted(self._bounds, stops, side="left") - first
        whole = np.repeat(np.arange(len(starts)), parts)
        shard = first[whole] + np.arange(len(whole)) - np.repeat(np.cumsum(parts) - parts, parts)
        low = np.maximum(starts[whole], self._bounds[shard])
        high = np.minimum(stops[whole], self._bounds[shard + 1])
        begin = begins[whole] + low - starts[whole]
        pieces = np.stack([shard, low - self._bounds[shard], begin, begin + high - low], axis=1)
        return pieces[np.argsort(low, kind="stable")]


def to_tensor(rows: np.ndarray) -> Tensor:
    """Stored rows as a tensor that shares their memory: uint16 holds the bits of bfloat16."""
    tensor = torch.from_numpy(rows)
    return tensor.view(torch.bfloat16) if rows.dtype == np.uint16 else tensor


def _read_into(descriptor: int, buffer: memoryview, place: int) -> None:
    while buffer:
        n = os.preadv(descriptor, [buffer], place)
        if n == 0:
            raise OSError("it ends before its last row")
        buffer, place = buffer[n:], place + n
