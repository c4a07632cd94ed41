"""Training while collecting: a stream of shards of which only a few are ever on disk.

`collect(..., window=N)` is the producer. It writes a shard only while fewer than N are there. The consumer reads them
in windows of N // 2 consecutive shards, rows permuted within each, and deletes the shards before a window once a
checkpoint holds all that came of them. A window is read whole, so with checkpoints taken when `commit_due` says so, all
that must be on disk at a time is the window that the next batch begins in and the one after it: never more than N
shards, so neither side ever waits for the other in vain.

The batches depend on the rows, the seed and the batch size alone. So each side can be killed at any moment:
the producer makes what is missing, and the consumer continues at its checkpoint's batch.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Generator, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import torch
import xxhash
from torch import Tensor

from glp_lens import lm
from glp_lens.activations.batches import permutation
from glp_lens.activations.collect import collect
from glp_lens.activations.manifest import MANIFEST, Manifest, Manifested, Shard
from glp_lens.activations.stats import Stats
from glp_lens.activations.store import ActivationStore
from glp_lens.activations.totals import STATISTICS, Total, Totals
from glp_lens.activations.waiting import wait_until
from glp_lens.arguments import checked
from glp_lens.corpus import Document
from glp_lens.errors import InputError, counted
from glp_lens.types import DTYPES, Acts, Json

DRIFT_BOUND: Final = 0.1
"""How far the statistics that normalise may be from those of all rows, in standard deviations and in the logarithm of
the standard deviation, before a warning."""
STUCK_SECONDS: Final = 5.0
"""How long a full stream must not change to count as stuck: its producer may be about to mark it as complete."""


class ActivationStream(Manifested):
    """Activations of one hook point that are being collected, for one trainer at a time.

    It stands in for an `ActivationStore` where a model is fitted on batches: a stream is passed over once.

    Attributes:
        path: the folder.
        manifest: what the producer had made when it was last read.
    """

    def __init__(
        self, path: Path, manifest: Manifest, *, stats: Stats | None, checkpointed: bool, patience: float | None
    ) -> None:
        if not manifest.window:
            what = "an activation store" if manifest.window is None else "statistics alone"
            raise InputError(f"{path} is no stream but {what}: collect with a window of at least 2 shards")
        if stats is not None and stats.mean.shape != (manifest.d_in,):
            raise InputError(f"{path} needs statistics of width {manifest.d_in}, got {len(stats.mean)}")
        self.path, self.manifest = path, manifest
        self._n, self._window = manifest.window, manifest.window // 2
        self._given, self._checkpointed, self._patience = stats, checkpointed, patience
        self._deleted = self._next = 0  # shards known to be deleted; the window to read next
        self._stamp: tuple[int, int] | None = None
        self._refresh()

    @classmethod
    @checked
    def open(
        cls,
        path: str | Path,
        *,
        stats: Stats | None = None,
        checkpointed: bool = True,
        patience: float | None = None,
    ) -> Self:
        """Open a stream, after waiting for its producer to begin.

        Args:
            path: the folder that the producer collects to.
            stats: of all rows, from `collect_stats`; by default those of the first shards.
            checkpointed: the trainer saves checkpoints and calls `commit` after each. For one that does not, shards
                are deleted as they are read: then what it has read is lost if it is killed.
            patience: seconds without a shard after which to give up; None waits for ever.

        Raises:
            InputError: a store that is no stream, several streams, statistics that do not fit, or nothing came.
        """
        path = Path(path)
        _wait_for_manifest(path, MANIFEST, patience)
        return cls(path, Manifest.read(path), stats=stats, checkpointed=checkpointed, patience=patience)

    def __len__(self) -> int:
        """Rows of the whole stream; until that is known, the number that `collect` was asked for."""
        self._refresh()
        planned = self.manifest.source.get("settings", {}).get("max_tokens")
        if self.manifest.complete or planned is None:
            return self.manifest.rows
        return int(planned)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"ActivationStream({str(self.path)!r}, hook={self.hook!r}, rows={self.manifest.rows}, d_in={self.d_in})"

    @property
    def stats(self) -> Stats:
        """Statistics to normalise by, the same at every call and in every run.

        Those given to `open`, or those of the first N shards, or of all if there are fewer; waits for them. They are
        an unbiased sample if the texts came in random order: `drift` says how far they were from all rows.
        """
        return self._given or self._opening.stats

    @property
    def median_norm(self) -> float:
        """Median norm of a row of the first N shards, within 0.4%."""
        return self._opening.median_norm

    def batches(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        start_batch: int = 0,
        epochs: int | None = None,
        drop_last: bool = True,
    ) -> Generator[Acts]:
        """Shuffled batches `(batch_size, d_in)` float32, every row once; waits for the producer.

        Args:
            batch_size: rows of a batch; much fewer than the rows of a shard.
            seed: another seed, another order.
            start_batch: number of batches to leave out in front, to resume bit for bit.
            epochs: 1 ends with the stream; None expects the trainer to stop before that.
            drop_last: leave out the incomplete batch at the very end.

        Raises:
            InputError: bad numbers; rows that were deleted; the stream ended, and `epochs` is None; shards cannot be
                deleted for lack of a checkpoint.
        """
        if batch_size < 1 or start_batch < 0 or epochs not in (None, 1):
            raise InputError(
                "a stream is passed over once, in batches of at least one row, from batch 0 or later on; got "
                f"batch_size={batch_size}, start_batch={start_batch}, epochs={epochs}"
            )
        return self._batches(batch_size, seed, start_batch, endless=epochs is None, drop_last=drop_last)

    def commit(self, rows: int) -> None:
        """Delete the shards that no batch needs which begins at row `rows` of the stream, or later.

        To be called when all batches before that are in a checkpoint that is safely on disk.
        """
        first = self._first_needed(rows)
        for shard in self._files[self._deleted : first]:
            (self.path / shard.name).unlink(missing_ok=True)
        self._deleted = max(self._deleted, first)

    def commit_due(self, rows: int) -> bool:
        """Whether a checkpoint is needed before the batch that begins at row `rows`, so that the producer can continue.

        True if shards can be deleted and the window to be read next is not there yet: at most once a window.
        """
        while self._deleted < self._first_needed(rows):
            if (self.path / self._files[self._deleted].name).exists():
                return self._listed(self._next) is None
            self._deleted += 1
        return False

    def drift(self) -> Json:
        """How far `stats` are from the statistics of all rows so far, at the dimension where they differ most.

        `mean_shift` is in standard deviations, `log_std_ratio` the absolute natural logarithm of the ratio of the two.
        """
        used, total = self.stats, Totals.read(self.path, self._n).last
        assert total is not None, "there are statistics to normalise by, so there are rows"
        std, std_now = (torch.where(s.var > 0, s.var.sqrt(), 1.0) for s in (used, total.stats))
        return {
            "mean_shift": float(((total.stats.mean - used.mean).abs() / std).max()),
            "log_std_ratio": float((std_now / std).log().abs().max()),
            "rows": total.stats.count,
        }

    def provenance(self) -> Json:
        """Model, hook point, corpus and number of all rows so far, which models trained on them keep.

        Warns if the statistics that normalise have drifted by more than `DRIFT_BOUND`. Its hash is the same from the
        first shards on.
        """
        drift = self.drift()
        if (worst := max(drift["mean_shift"], drift["log_std_ratio"])) > DRIFT_BOUND:
            warnings.warn(
                f"the first shards of {self.path} differ from all {drift['rows']} rows by {worst:.2f} standard "
                f"deviations (bound {DRIFT_BOUND}): shuffle the texts, or normalise by collect_stats",
                stacklevel=2,
            )
        self._refresh()
        begin = f"{self.manifest.identity} {self._n} {self._files[0].documents_hash}"
        return {
            **self.manifest.provenance(),
            "median_norm": self.median_norm,
            "manifest_hash": xxhash.xxh3_128_hexdigest(begin.encode()),
            "stream": {"shards_on_disk": self._n, "normalised_by_rows": self.stats.count, "drift": drift},
        }

    # -- inside --------------------------------------------------------------------------------------------

    def _batches(self, size: int, seed: int, start_batch: int, *, endless: bool, drop_last: bool) -> Generator[Acts]:
        number, skip = self._place(start_batch * size)
        row = start_batch * size
        batch, have = torch.empty(size, self.d_in, dtype=torch.float32), 0
        while shards := self._wait_for_window(number, row if self._checkpointed else row + have):
            data = self._read(shards)
            order = torch.from_numpy(permutation(len(data), seed=seed, epoch=0, window=number + 1))[skip:]
            number, skip = number + 1, 0
            self._next = number
            while len(order):
                taken, order = order[: size - have], order[size - have :]
                batch[have : have + len(taken)] = data.index_select(0, taken)
                have += len(taken)
                if have == size:
                    yield batch
                    row += size
                    batch, have = torch.empty(size, self.d_in, dtype=torch.float32), 0
            del data
        if endless:
            raise InputError(
                f"the stream {self.path} ended after {counted(self.manifest.rows, 'row')}, and more were asked for: "
                f"collect more, or train on at most {self.manifest.rows // size * size} rows in batches of {size}"
            )
        if have and not drop_last:
            yield batch[:have]

    def _place(self, row: int) -> tuple[int, int]:
        """The window that a row of the stream is in, and how many of the window's rows come before it."""

        def known() -> bool | None:
            self._refresh()
            return True if self.manifest.complete or row == 0 or row < self.manifest.rows else None

        wait_until(known, self._note, patience=self._patience)
        number = self._first_needed(row) // self._window
        if row >= self.manifest.rows:
            number = -(-len(self._files) // self._window)
        return number, row - int(self._bounds[min(number * self._window, len(self._files))])

    def _wait_for_window(self, number: int, done: int) -> Sequence[Shard]:
        """The shards of a window, none at the end of the stream; waits for the producer."""
        if not self._checkpointed:
            self.commit(done)

        seen, since = self.manifest, time.monotonic()

        def ready() -> Sequence[Shard] | None:
            nonlocal seen, since
            shards = self._listed(number)
            if self.manifest is not seen or self._on_disk() < self._n:
                seen, since = self.manifest, time.monotonic()
            if shards is None and time.monotonic() - since > STUCK_SECONDS:
                raise InputError(
                    f"the stream {self.path} is stuck, since its {self._n} shards on disk are all still needed: train "
                    "with a state file or open it with checkpointed=False, in batches of fewer rows than a shard"
                )
            return shards

        return wait_until(ready, self._note, patience=self._patience)

    def _listed(self, number: int) -> Sequence[Shard] | None:
        """The shards of a window, none past the end of the stream; None if the producer has not made all of them."""
        first, stop = number * self._window, (number + 1) * self._window
        if len(self._files) < stop:
            self._refresh()
        return self._files[first:stop] if len(self._files) >= stop or self.manifest.complete else None

    def _read(self, shards: Sequence[Shard]) -> Tensor:
        """Rows of whole shards, in the dtype they are kept in."""
        if gone := [shard.name for shard in shards if not (self.path / shard.name).exists()]:
            raise InputError(
                f"{gone[0]} of the stream {self.path} was used and deleted before: resume the training that used it, "
                "or collect the stream again, in a new folder"
            )
        store = ActivationStore.of(self.path, replace(self.manifest, shards=tuple(shards)))
        return store.rows(dtype=DTYPES[self.dtype])

    def _first_needed(self, row: int) -> int:
        """Index of the first shard of the window that a row is in; past the last shard at the very end."""
        if row >= self.manifest.rows and self.manifest.complete:
            return len(self._files)
        index = int(np.searchsorted(self._bounds, row, side="right")) - 1
        return index // self._window * self._window

    def _on_disk(self) -> int:
        return sum((self.path / shard.name).exists() for shard in self._files[self._deleted :])

    def _refresh(self) -> None:
        """Read the manifest again, if the producer has changed it."""
        if self._stamp and self.manifest.complete:
            return
        try:
            status = (self.path / MANIFEST).stat()
            stamp = (status.st_mtime_ns, status.st_size)
        except FileNotFoundError:
            stamp = None
        if stamp is not None and stamp == self._stamp:
            return
        self._stamp, self.manifest = stamp, Manifest.read(self.path)
        self._files = self.manifest.files
        self._bounds = np.cumsum([0, *(shard.rows for shard in self._files)])

    def _note(self) -> str:
        try:
            age = f"the last shard came {time.time() - (self.path / STATISTICS).stat().st_mtime:.0f} s ago"
        except FileNotFoundError:
            age = "no shard has come yet"
        return f"waiting for the producer of {self.path}: {age}"

    @cached_property
    def _opening(self) -> Total:
        def known_totals() -> Total | None:
            self._refresh()
            # The totals are written before the manifest, so they hold at least the shards that it lists.
            known = self.manifest.complete or len(self._files) >= self._n
            return Totals.read(self.path, self._n).opening if known else None

        return wait_until(known_totals, self._note, patience=self._patience)


def open_all(parent: str | Path, *, patience: float | None = None, **options: Any) -> dict[str, ActivationStream]:
    """The streams of several hook points of one collection, by hook point.

    Their rows are aligned, and with one seed and batch size so are their batches. The producer continues when all of
    them have room, so all must be read.

    Args:
        parent: the folder that the producer collects to.
        patience: as for `ActivationStream.open`; so are the options.

    Raises:
        InputError: as `ActivationStream.open`; the manifest names a hook point that is no folder of `parent`.
    """
    parent = Path(parent)
    first = _wait_for_manifest(parent, f"*/{MANIFEST}", patience)
    hooks = Manifest.read(first.parent).source["settings"]["hooks"]
    for hook in hooks:
        if hook in ("", "..") or Path(hook).name != hook:
            raise InputError(f"{first} names a hook point {hook!r}, which is no folder of {parent}: collect again")
    streams = {hook: ActivationStream.open(parent / hook, patience=patience, **options) for hook in hooks}
    for hook, stream in streams.items():
        if stream.hook != hook:
            raise InputError(f"{stream.path} holds the hook point {stream.hook!r}, expected {hook!r}: collect again")
    return streams


def collect_stats(
    model: lm.Model,
    texts: Iterable[str | Document],
    hooks: str | Sequence[str] | None = None,
    out: str | Path = "statistics",
    **options: Any,
) -> Stats | dict[str, Stats]:
    """Exact statistics of what `collect` would keep, in a pass that writes no rows: see `ActivationStream.open`.

    It is continued like any collection; all arguments are those of `collect`.

    Returns:
        The statistics, or with several hook points a dictionary of them.
    """
    collect(model, texts, hooks, out, **options, window=0)
    stats = {}
    for file in sorted(Path(out).rglob(MANIFEST)):
        total = Totals.read(file.parent, 0).last
        assert total is not None, "a collection without rows is refused"
        stats[Manifest.read(file.parent).hook] = total.stats
    return stats if len(stats) > 1 else next(iter(stats.values()))


def _wait_for_manifest(folder: Path, pattern: str, patience: float | None) -> Path:
    """The first manifest that matches; waits for the producer to begin."""
    return wait_until(
        lambda: next(folder.glob(pattern), None),
        lambda: f"waiting for a producer to begin in {folder}",
        patience=patience,
    )
