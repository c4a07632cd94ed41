"""Seeded batches of shuffled rows, read in blocks: close to a global permutation at sequential speed.

An epoch permutes blocks of `block` rows, reads them a window at a time, and permutes the rows of each window.
Epochs follow each other as one endless stream of rows that is cut into batches, so every row comes exactly
once an epoch whatever the batch size, and batch k can be found without reading the batches before it.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from glp_lens import numerics
from glp_lens.activations.reader import to_tensor
from glp_lens.errors import InputError
from glp_lens.types import Acts, Json

BLOCK_ROWS: Final = 64
WINDOW_ROWS: Final = 262_144
WINDOW_BYTES: Final = 512 << 20
_ENDLESS: Final = 1 << 62
_PIECE_BYTES: Final = 4 << 20
"""Float32 rows that are gathered, converted and normalised together: small enough to stay in a CPU's cache."""
_AHEAD: Final = 2
"""Batches prefetched."""
_THREADS: Final = 4
"""Most threads that read and make batches; memory is no faster with more."""


class Rows(Protocol):
    """Stored rows `(n, d_in)`; `glp_lens.activations.reader.RowReader` is one."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def __len__(self) -> int: ...
    def read(self, starts: np.ndarray, stops: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """The rows of intervals, one after the other, in `out`."""
        ...


class ArrayRows:
    """`Rows` of an array in memory, `(n, k)`."""

    def __init__(self, values: np.ndarray) -> None:
        self._values, self.shape, self.dtype = values, values.shape[1:], values.dtype

    def __len__(self) -> int:
        return len(self._values)

    def read(self, starts: np.ndarray, stops: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """The rows of intervals, one after the other, in `out`."""
        index = np.concatenate([np.arange(a, b) for a, b in zip(starts, stops, strict=True)])
        return np.take(self._values, index, axis=0, out=out)


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


class Batches(Iterator[Acts]):
    """An iterator of batches `(batch_size, d_in)` float32 of shuffled rows.

    The next window is read and the next batches are made in threads: as many as torch may use, up to four. Two
    windows are in memory, and 8 bytes for each block of the whole. A batch belongs to the caller: its memory is reused
    only after nothing refers to it any more.

    With `world_size` processes, step k takes `world_size * batch_size` rows of the stream, and each process the
    slice of its rank. Put together, these are the batches of one process with that batch size.

    Closing the iterator, dropping it, or an error ends the threads, after the read that is under way.

    Attributes:
        next_batch: index in the stream of the batch that comes next.
    """

    def __init__(
        self,
        rows: Rows,
        batch_size: int,
        *,
        seed: int = 0,
        epochs: int | None = None,
        drop_last: bool = True,
        start_batch: int = 0,
        every: int = 1,
        rank: int = 0,
        world_size: int = 1,
        part: tuple[int, int] | None = None,
        normalize: tuple[Tensor, Tensor] | None = None,
        block: int = BLOCK_ROWS,
        window: int | None = None,
        fingerprint: str = "",
    ) -> None:
        """Nothing is read before the first batch is requested.

        Args:
            rows: what to read.
            batch_size: rows of a batch, for each process.
            seed: another seed, another order.
            epochs: passes over the rows; None never ends. A batch may span two epochs.
            drop_last: leave out what is less than a batch of all processes at the end of the last epoch. Otherwise
                the last ranks can get a shorter last batch, or none.
            start_batch: number of batches to leave out in front; what follows is bit for bit what would have.
            every: from there on, take only every so many batches.
            rank: which of the processes this is.
            world_size: how many processes share the stream.
            part: `(first, whole)` in place of both, where the shares are not equal: a step takes `whole` rows of the
                stream, of which this process gets `batch_size` from `first` on.
            normalize: (mean, standard deviation) `(d_in,)` by which rows are normalised.
            block: rows read together.
            window: rows shuffled together; by default `WINDOW_ROWS`, in at most `WINDOW_BYTES`.
            fingerprint: hash of the data, so that a state is not continued on other data.

        Raises:
            InputError: a number out of its range, no rows, not one whole batch in all the epochs with
                `drop_last`, or statistics that do not fit.
        """
        n, (d_in,) = len(rows), rows.shape
        if window is None:
            window = window_rows(d_in * rows.dtype.itemsize)
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("epochs", epochs, 1),
            ("start_batch", start_batch, 0),
            ("every", every, 1),
            ("world_size", world_size, 1),
            ("block", block, 1),
            ("window", window, 1),
        ):
            if value is not None and value < least:
                raise InputError(f"batches need {name} >= {least}, got {value}")
        if not 0 <= rank < world_size:
            raise InputError(f"batches for {world_size} processes need a rank from 0 to {world_size - 1}, got {rank}")
        offset, step_rows = part or (rank * batch_size, world_size * batch_size)
        if not 0 <= offset <= step_rows - batch_size:
            raise InputError(f"a step of {step_rows} rows has no {batch_size} from row {offset} on")
        total = _ENDLESS if epochs is None else n * epochs
        if n == 0 or (drop_last and total < step_rows):
            raise InputError(
                f"a batch of {step_rows} is more than the {n if epochs is None else total} rows of "
                f"{epochs or 'any'} epoch(s): use a smaller batch or collect more rows"
            )
        if drop_last and epochs is not None:
            total -= total % step_rows
        self._rows, self._every, self._normalize, self._fingerprint = rows, every, normalize, fingerprint
        self._shuffle = _Shuffle(n_rows=n, seed=seed, block=block, window=max(1, window // block) * block)
        self._share = _Share(batch_size=batch_size, offset=offset, step_rows=step_rows, end=total)
        self.next_batch = start_batch
        self._running: Generator[Tensor] | None = None
        if normalize is not None:
            mean, std = (t.detach().float().cpu() for t in normalize)
            if not mean.shape == std.shape == rows.shape or not (mean.isfinite() & (std > 0) & std.isfinite()).all():
                raise InputError(
                    f"normalize takes a finite mean and a standard deviation above 0 for each of {d_in} dimensions, "
                    f"got shapes {tuple(mean.shape)} and {tuple(std.shape)}, smallest deviation {std.min():g}"
                )
            self._normalize = mean, 1 / std

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Acts:
        if self._running is None:
            # A generator of its own, which does not refer to this object: dropping this one closes it.
            share = replace(self._share, first=self.next_batch, every=self._every)
            self._running = _make_batches(self._shuffle, share, self._rows, self._normalize)
        try:
            batch = next(self._running)
        except BaseException:
            self.close()
            raise
        self.next_batch += self._every
        return batch

    def close(self) -> None:
        """End the threads and free the memory. The next batch requested is the one after the last."""
        if self._running is not None:
            self._running.close()
            self._running = None

    def state_dict(self) -> Json:
        """The position of the iterator: JSON, the same for all ranks."""
        epoch, rows = divmod(self.next_batch * self._share.step_rows, self._shuffle.n_rows)
        return {**self._key(), "epoch": epoch, "rows_emitted": rows}

    def load_state_dict(self, state: Json) -> None:
        """Continue from the position that another iterator saved as `state`, bit for bit.

        The number of processes may have changed, if together they take as many rows at a step as before.

        Raises:
            InputError: the state is of other data, or of another order.
        """
        differ = [f"{name} {state.get(name)!r} instead of {value!r}" for name, value in self._key().items()
                  if state.get(name) != value]  # fmt: skip
        if differ:
            raise InputError(
                f"the state of other batches: {', '.join(differ)}; resume with the arguments and data it was saved with"
            )
        self.close()
        self.next_batch = (state["epoch"] * self._shuffle.n_rows + state["rows_emitted"]) // self._share.step_rows

    def _key(self) -> Json:
        """Everything that determines which rows make up which step."""
        shuffle = self._shuffle
        return {
            "fingerprint": self._fingerprint,
            "n_rows": shuffle.n_rows,
            "seed": shuffle.seed,
            "block": shuffle.block,
            "window": shuffle.window,
            "step_rows": self._share.step_rows,
        }


@dataclass(frozen=True, kw_only=True)
class _Share:
    """Which rows of the stream are taken, up to row `end`.

    Every step from step `first` on takes `step_rows` for all ranks together, of which `batch_size` from `offset` on are
    this one's.
    """

    batch_size: int
    offset: int
    step_rows: int
    end: int
    first: int = 0
    every: int = 1

    def slice_at(self, row: int) -> tuple[int, int]:
        """(first row, row after the last) of the first slice that does not end before row `row` of the stream."""
        step = max(self.first, -(-(row - self.offset - self.batch_size + 1) // self.step_rows))
        step += (self.first - step) % self.every
        begin = step * self.step_rows + self.offset
        return begin, min(begin + self.batch_size, self.end)


@dataclass(frozen=True)
class _Window:
    """What to read, `(starts, stops)` in ascending order, and in which order to hand the rows out.

    Its rows are those of the stream from row `at` on.
    """

    at: int
    starts: np.ndarray
    stops: np.ndarray
    order: np.ndarray


@dataclass(frozen=True, kw_only=True)
class _Shuffle:
    """The order of the stream: `window` is a multiple of `block`."""

    n_rows: int
    seed: int
    block: int
    window: int

    def windows(self, share: _Share) -> Iterator[_Window]:
        """The windows that hold rows of the share."""
        n_blocks = -(-self.n_rows // self.block)
        for epoch in itertools.count(share.slice_at(0)[0] // self.n_rows):
            at = epoch * self.n_rows
            blocks = permutation(n_blocks, seed=self.seed, epoch=epoch)
            for index in range(-(-self.n_rows // self.window)):
                if at >= share.end:
                    return
                starts = blocks[index * self.window // self.block :][: self.window // self.block] * self.block
                lengths = np.minimum(self.block, self.n_rows - starts)
                rows = int(lengths.sum())
                if share.slice_at(at)[0] < min(at + rows, share.end):
                    order = permutation(rows, seed=self.seed, epoch=epoch, window=index + 1)
                    yield _in_stored_order(at, starts, lengths, order)
                at += rows


def _in_stored_order(at: int, starts: np.ndarray, lengths: np.ndarray, order: np.ndarray) -> _Window:
    """A window of blocks in the order drawn, to be read in stored order; its rows come out in the same order."""
    ascending = np.argsort(starts)
    moved = np.empty_like(starts)
    moved[ascending] = np.cumsum(lengths[ascending]) - lengths[ascending]
    moved -= np.cumsum(lengths) - lengths
    place = np.arange(len(order)) + np.repeat(moved, lengths)
    return _Window(at, starts[ascending], (starts + lengths)[ascending], place[order])


_Loaded = tuple[int, Tensor, Tensor]
"""A window in memory: its first row in the stream, its rows as stored, and the order to hand them out in."""


def _make_batches(
    shuffle: _Shuffle, share: _Share, rows: Rows, normalize: tuple[Tensor, Tensor] | None
) -> Generator[Tensor]:
    """The share's batches. All work is done in threads; the caller only waits for finished batches."""
    threads = min(_THREADS, torch.get_num_threads())
    # One thread of torch in each of the pool's, which share the work already.
    alone = partial(numerics.threads, 1)
    with ThreadPoolExecutor(threads, thread_name_prefix="batches", initializer=alone) as pool:
        windows = _prefetch(shuffle.windows(share), rows, min(shuffle.window, shuffle.n_rows), pool)
        yield from _cut(windows, share, _Memory(share.batch_size, *rows.shape), normalize, pool)


def _prefetch(windows: Iterator[_Window], rows: Rows, size: int, pool: ThreadPoolExecutor) -> Iterator[_Loaded]:
    """Read windows of at most `size` rows, each while the one before is used; that one's memory is then reused."""
    buffers = itertools.cycle([_uninitialised((size, *rows.shape), rows.dtype) for _ in range(2)])

    def load(buffer: np.ndarray) -> _Loaded | None:
        window = next(windows, None)
        if window is None:
            return None
        data = rows.read(window.starts, window.stops, buffer[: len(window.order)])
        return window.at, to_tensor(data), torch.from_numpy(window.order)

    loaded = pool.submit(load, next(buffers)).result()
    while loaded is not None:
        upcoming = pool.submit(load, next(buffers))
        yield loaded
        loaded = upcoming.result()


def _cut(
    windows: Iterator[_Loaded],
    share: _Share,
    memory: _Memory,
    normalize: tuple[Tensor, Tensor] | None,
    pool: ThreadPoolExecutor,
) -> Generator[Tensor]:
    """Cut the stream into the share's batches; a batch can take rows from several windows."""
    piece = max(1, _PIECE_BYTES // (4 * memory.d_in))
    row, end = share.slice_at(0)
    # Batches under way, the oldest first, each with the work on it; of the newest, the rows from `row` on are missing.
    batches: deque[tuple[np.ndarray, list[Future[None]]]] = deque()
    missing = False
    for at, data, order in windows:
        stop = at + len(order)
        while row < min(end, stop):
            if not missing:
                batches.append((memory.batch(end - row), []))
            out, work = batches[-1]
            upto = min(end, stop, row + piece)
            done = len(out) - (end - row)
            part = out[done : done + upto - row]
            work.append(pool.submit(_fill, part, data, order[row - at : upto - at], normalize))
            row, missing = upto, upto < end
            if not missing:
                row, end = share.slice_at(row + share.batch_size - len(out))
                if len(batches) > _AHEAD:
                    yield _finished(*batches.popleft())
        wait(future for _, work in batches for future in work)  # before the window's memory is read into again
    while batches:
        yield _finished(*batches.popleft())


def _finished(batch: np.ndarray, work: list[Future[None]]) -> Tensor:
    for future in work:
        future.result()
    return torch.from_numpy(batch)


def _fill(out: np.ndarray, data: Tensor, order: Tensor, normalize: tuple[Tensor, Tensor] | None) -> None:
    """Write rows `order` of `data` to `out`, optionally normalised by (mean, 1 / standard deviation)."""
    # Indexing with [] is four times slower on bfloat16.
    batch = torch.from_numpy(out).copy_(torch.index_select(data, 0, order))
    if normalize is not None:
        mean, scale = normalize
        batch.sub_(mean).mul_(scale)


def _uninitialised(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array, aligned to 64 bytes: with NumPy's 16 the kernel reads at half the speed."""
    return torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8).numpy().view(dtype).reshape(shape)


class _Memory:
    """Memory for batches, reused once no tensor refers to a batch any more.

    The kernel takes longer to zero new memory for a large batch than the batch takes to make.
    """

    def __init__(self, batch_size: int, d_in: int) -> None:
        self.d_in = d_in
        self._shape = batch_size, d_in
        self._free: deque[np.ndarray] = deque(maxlen=_AHEAD + 2)

    def batch(self, n: int) -> np.ndarray:
        """Memory for `n` rows."""
        memory = self._free.pop() if self._free else _uninitialised(self._shape, np.dtype(np.float32))
        rows = memory[:n]  # an array of its own, which lives as long as any tensor that shares its memory
        weakref.finalize(rows, self._free.append, memory).atexit = False
        return rows
