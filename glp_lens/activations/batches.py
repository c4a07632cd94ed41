"""Seeded batches of shuffled rows, read in blocks: close to a global permutation at sequential speed.

An epoch permutes blocks of `block` rows, reads them a window at a time, and permutes the rows of each window.
Epochs follow each other as one endless stream of rows that is cut into batches, so every row comes exactly
once an epoch whatever the batch size, and batch k can be found without reading the batches before it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from glp_lens.errors import InputError
from glp_lens.types import Acts

BLOCK_ROWS = 64
WINDOW_ROWS = 262_144
WINDOW_BYTES = 512 << 20

ReadRows = Callable[[np.ndarray, np.ndarray], Tensor]
"""(first rows, rows after the last) of intervals -> the intervals' rows, one after the other."""


@dataclass(frozen=True)
class _Window:
    """What to read, `(starts, stops)`, and in which order to hand the rows out."""

    starts: np.ndarray
    stops: np.ndarray
    order: np.ndarray


def window_rows(row_bytes: int) -> int:
    """Rows of a window: `WINDOW_ROWS`, fewer if they would take more than `WINDOW_BYTES`."""
    return max(BLOCK_ROWS, min(WINDOW_ROWS, WINDOW_BYTES // row_bytes))


def permutation(n: int, *, seed: int, epoch: int, window: int = 0) -> np.ndarray:
    """A permutation of `range(n)` that depends on the arguments only.

    Sorts raw Philox output: NumPy promises that stream across versions, but not `Generator.permutation`.
    """
    key = np.array([seed % 2**64, 0], dtype=np.uint64)
    counter = np.array([0, 0, window, epoch], dtype=np.uint64)
    return np.argsort(np.random.Philox(key=key, counter=counter).random_raw(n), kind="stable")


def shuffled_batches(
    n_rows: int,
    d_in: int,
    read: ReadRows,
    batch_size: int,
    *,
    seed: int = 0,
    start_batch: int = 0,
    epochs: int | None = None,
    drop_last: bool = True,
    block: int = BLOCK_ROWS,
    window: int = WINDOW_ROWS,
) -> Iterator[Acts]:
    """Batches `(batch_size, d_in)` float32 of shuffled rows; the next window is read in a thread meanwhile.

    Args:
        n_rows: rows there are.
        d_in: their width.
        read: reads row intervals.
        batch_size: rows of a batch.
        seed: another seed, another order.
        start_batch: number of batches to leave out in front; what follows is bit for bit what would have.
        epochs: passes over the rows; None never ends.
        drop_last: leave out the incomplete batch at the end of the last epoch.
        block: rows read together.
        window: rows shuffled together.

    Raises:
        InputError: a size below 1, or not one whole batch in all the epochs with `drop_last`.
    """
    if batch_size < 1 or start_batch < 0 or (epochs is not None and epochs < 1):
        raise InputError(
            "batches need batch_size >= 1, start_batch >= 0 and epochs >= 1 or None, "
            f"got {batch_size}, {start_batch} and {epochs}"
        )
    if epochs is not None and drop_last and n_rows * epochs < batch_size:
        raise InputError(
            f"batch_size {batch_size} is more than the {n_rows * epochs} rows of {epochs} epoch(s): "
            "use a smaller batch or collect more rows"
        )
    windows = _windows(
        n_rows,
        start_batch * batch_size,
        seed=seed,
        epochs=epochs,
        block=block,
        blocks_per_window=max(1, window // block),
    )
    return _cut(_prefetch(windows, read), torch.empty(0, d_in), batch_size, drop_last)


def _windows(
    n_rows: int, first_row: int, *, seed: int, epochs: int | None, block: int, blocks_per_window: int
) -> Iterator[_Window]:
    """The windows of the stream from row `first_row` of the stream on."""
    first_epoch, skip = divmod(first_row, n_rows)
    n_blocks = -(-n_rows // block)
    for epoch in itertools.count(first_epoch) if epochs is None else range(first_epoch, epochs):
        blocks = permutation(n_blocks, seed=seed, epoch=epoch)
        for index, at in enumerate(range(0, n_blocks, blocks_per_window)):
            starts = blocks[at : at + blocks_per_window] * block
            stops = np.minimum(starts + block, n_rows)
            rows = int((stops - starts).sum())
            if skip >= rows:
                skip -= rows
                continue
            yield _Window(starts, stops, permutation(rows, seed=seed, epoch=epoch, window=index + 1)[skip:])
            skip = 0


def _prefetch(windows: Iterator[_Window], read: ReadRows) -> Iterator[tuple[Tensor, Tensor]]:
    """Each window's rows, in stored order, and the order to hand them out in."""

    def load(window: _Window | None) -> tuple[Tensor, Tensor] | None:
        if window is None:
            return None
        return read(window.starts, window.stops), torch.from_numpy(window.order)

    with ThreadPoolExecutor(max_workers=1) as pool:
        loaded = pool.submit(load, next(windows, None)).result()
        while loaded is not None:
            upcoming = pool.submit(load, next(windows, None))
            yield loaded
            loaded = upcoming.result()


def _cut(windows: Iterator[tuple[Tensor, Tensor]], carry: Tensor, batch_size: int, drop_last: bool) -> Iterator[Tensor]:
    for data, order in windows:
        at = 0
        while len(carry) + len(order) - at >= batch_size:
            stop = at + batch_size - len(carry)
            rows = data.index_select(0, order[at:stop]).float()
            yield torch.cat([carry, rows]) if len(carry) else rows
            carry, at = carry[:0], stop
        carry = torch.cat([carry, data.index_select(0, order[at:]).float()])
    if len(carry) and not drop_last:
        yield carry
