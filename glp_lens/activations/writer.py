"""Writing activation stores so that a crash, a kill or a full disk loses nothing that was saved."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from glp_lens.activations.manifest import (
    COLUMNS,
    FILE,
    LABELS,
    MANIFEST,
    STORED,
    Manifest,
    Shard,
    documents_hash,
    label_name,
)
from glp_lens.activations.shard import Source, adopt_shard, no_space, write_shard
from glp_lens.activations.stats import Stats
from glp_lens.activations.store import ActivationStore
from glp_lens.activations.totals import STATISTICS, Total, Totals
from glp_lens.activations.waiting import wait_until
from glp_lens.arguments import checked
from glp_lens.errors import InputError
from glp_lens.files import make_writable, sync_folder, try_lock, versions, write_json
from glp_lens.types import DTYPES, Acts, Json

SHARD_ROWS = 65_536
Columns = Mapping[str, np.ndarray]
Block = tuple[Acts, Columns]

_SHARD_FILE = re.compile(r"shard-(\d{8})\.h5")


class StoreWriter:
    """Adds shards to a store; the manifest on disk lists exactly the shards that are durably written.

    One process at a time may write to a store; the lock ends with the process. Use it in a `with` block.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Begin a store in `folder`, or continue the one whose manifest this is.

        A shard that an earlier process finished but did not come to list is adopted if every byte of it is right;
        other files that it left behind are removed. A stream adopts nothing, since the statistics it keeps of all
        shards go by the manifest.

        Raises:
            InputError: another process is writing there, or the folder cannot be written; the statistics of a stream
                are not those of its shards.
        """
        self.folder = folder
        self._lock = lock(folder)
        try:
            # Another process may have gone on between the reading of this manifest and the lock.
            if (folder / MANIFEST).is_file() and (now := Manifest.read(folder)).identity == manifest.identity:
                manifest = now if now.shards != manifest.shards else manifest
            self.manifest = manifest
            self._totals = None if manifest.window is None else _totals(folder, manifest, manifest.window)
            listed = {shard.name for shard in manifest.shards}
            for file in sorted(folder.glob("shard-*.h5")):
                name = _SHARD_FILE.fullmatch(file.name)
                if name and file.name not in listed and (self._totals or not self._adopt(int(name[1]))):
                    file.unlink()
            # Earlier versions wrote manifests under such names.
            left = [file for file in folder.glob(f".{MANIFEST}.*") if file.is_file()]
            for file in [*folder.glob(".shard-*.tmp"), *left]:
                file.unlink()
            self._publish(self.manifest)
        except BaseException:
            self.close()
            raise

    def append(self, index: int, x: Acts, columns: Columns, source: Source) -> None:
        """Write shard `index` and list it in the manifest.

        Args:
            index: its place in the store.
            x: rows in the store's dtype; without any, there is no file, but the documents count as done.
            columns: `token_id`, `doc_id` and `position` of each row, and the labels that the manifest declares.
            source: the documents that the rows are of.

        Raises:
            InputError: the disk is full.
        """
        stats: Stats | None
        if len(x) and self.manifest.window != 0:
            shard, stats = write_shard(self.folder, index, self.manifest, x, columns, source)
        else:
            shard = Shard(index, len(x), 0, "", "", source.documents, source.documents_hash, source.excluded)
            stats = Stats.of(x) if len(x) else None
        if self._totals and stats:
            self._totals = self._totals.add(Total.of(x, stats))
            self._totals.write(self.folder)
        self.list(shard)

    def wait_for_room(self) -> None:
        """Of a stream, wait until its consumer has deleted enough for one more shard."""
        window = self.manifest.window
        if window:
            wait_until(
                lambda: True if len(list(self.folder.glob("shard-*.h5"))) < window else None,
                lambda: f"waiting for the consumer of {self.folder}: {window} shards are on disk",
            )

    def list(self, shard: Shard, *, publish: bool = True) -> None:
        """List a shard whose file is in the folder already; `publish` can wait for the next one, or for `finish`."""
        self._list(shard)
        if publish:
            self._publish(self.manifest)

    def finish(self) -> None:
        """Mark the store as complete."""
        self._publish(replace(self.manifest, complete=True))

    def close(self) -> None:
        """Let other processes write."""
        os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _adopt(self, index: int) -> bool:
        try:
            self._list(adopt_shard(self.folder, index, self.manifest))
        except InputError:
            return False
        return True

    def _list(self, shard: Shard) -> None:
        others = [s for s in self.manifest.shards if s.index != shard.index]
        shards = tuple(sorted([*others, shard], key=lambda s: s.index))
        dropped = tuple(i for i in self.manifest.dropped if i != shard.index)
        self.manifest = replace(self.manifest, shards=shards, dropped=dropped)

    def _publish(self, manifest: Manifest) -> None:
        publish(self.folder, manifest)
        self.manifest = manifest


def publish(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest on disk, so that a crash leaves the old one or the new.

    Raises:
        InputError: the disk is full.
    """
    with no_space(folder):
        write_json(folder / MANIFEST, manifest.to_json(), FILE)
        sync_folder(folder)


@checked
def write_store(
    folder: str | Path,
    rows: Acts | Iterable[Block],
    *,
    hook: str,
    dtype: str = "float32",
    columns: Columns | None = None,
    labels: Mapping[str, str] | None = None,
    source: Json | None = None,
    max_norm: float | None = None,
    shard_rows: int = SHARD_ROWS,
) -> ActivationStore:
    """Write a store of rows that exist already.

    Args:
        folder: a new or empty folder.
        rows: `(n, d_in)`, at least one row, or an iterable of blocks `(x (n, d_in), columns)` of any sizes, which
            are never all in memory.
        hook: the hook point they came from.
        dtype: `bfloat16`, `float16` or `float32`, as which they are kept.
        columns: of rows given at once: `token_id`, `doc_id` and `position`; what is missing is zero, and each row
            its own document.
        labels: further columns and their dtypes, `int64` or `float32`.
        source: what is known of model, corpus and settings.
        max_norm: norm above which rows were left out before; None if none were.
        shard_rows: rows of a shard.

    Raises:
        InputError: a store is there already; no rows; blocks of different widths, columns that do not fit, or
            values that are not finite in `dtype`.

    Examples:
        >>> import torch
        >>> from glp_lens.activations import write_store
        >>> x = torch.randn(100, 8)
        >>> given = {"doc_id": torch.arange(100).numpy() // 10, "score": x[:, 0].numpy()}
        >>> hook = "blocks.3.hook_resid_post"
        >>> store = write_store("acts", x, hook=hook, columns=given, labels={"score": "float32"})
        >>> len(store), sorted(store.manifest.columns)
        (100, ['doc_id', 'norm', 'position', 'score', 'token_id'])
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not empty: choose another folder")
    if shard_rows < 1:
        raise InputError(f"shard_rows must be at least 1, got {shard_rows}")
    labels = check_labels(labels or {})
    if isinstance(rows, Tensor):
        rows = [(rows, columns or {})]
    blocks = _checked_blocks(rows, check_dtype(dtype), labels)
    first = next(blocks, None)
    if first is None:
        raise InputError("an activation store needs rows (n, d_in), got none")
    make_writable(folder)
    manifest = Manifest(
        hook=hook,
        d_in=first[0].shape[1],
        dtype=dtype,
        source=source or {},
        versions=versions(),
        max_norm=max_norm,
        labels=labels,
    )
    with StoreWriter(folder, manifest) as writer, tqdm(desc="write", unit="row", unit_scale=True, delay=2) as bar:
        for index, (x, values) in enumerate(_in_shards(first, blocks, shard_rows)):
            # Neighbouring rows of one document count as one.
            ids = values["doc_id"][np.r_[True, values["doc_id"][1:] != values["doc_id"][:-1]]]
            writer.append(index, x, values, Source(len(ids), documents_hash(ids), {}))
            bar.update(len(x))
        writer.finish()
    return ActivationStore.open(folder)


def check_dtype(dtype: str) -> str:
    """The dtype's name; an InputError if a store cannot keep it."""
    if dtype not in STORED:
        raise InputError(f"an activation store keeps {', '.join(STORED)}, got dtype {dtype!r}")
    return dtype


def check_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """Names and dtypes of a caller's columns; an InputError if a store cannot keep them."""
    for name, dtype in labels.items():
        if not label_name(name):
            raise InputError(f"a label column is named by letters, digits and _, not like {', '.join(COLUMNS)} or x, "
                             f"got {name!r}")  # fmt: skip
        if dtype not in LABELS:
            raise InputError(f"label column {name!r} must be {' or '.join(LABELS)}, got {dtype!r}")
    return dict(labels)


class AtWorkError(InputError):
    """Another process is writing to the folder."""


def lock(folder: Path, *, wait: bool = False) -> int:
    """Lock the folder until the descriptor is closed; the system releases it when the process ends, however it ends.

    Args:
        wait: until another process that holds it ends, with a line that says so.

    Raises:
        AtWorkError: another process holds it.
        InputError: it cannot be written.
    """
    make_writable(folder)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if try_lock(descriptor) is False:
            if not wait:
                raise AtWorkError(f"another process is writing to {folder}: wait for it, or choose another folder")
            wait_until(
                lambda: None if try_lock(descriptor) is False else True,
                lambda: f"waiting for another process that writes to {folder}",
            )
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Keep other processes out of a folder, as `lock` does, to the end of the block.

    A folder that was made for it, and in which nothing was made, is removed.
    """
    new = not folder.exists()
    descriptor = lock(folder, wait=wait)
    try:
        yield
    finally:
        if new and not wait and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        os.close(descriptor)


def being_written(folder: Path) -> bool:
    """Whether a process has locked the folder for writing, as far as this machine can tell."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        return try_lock(descriptor, shared=True) is False
    finally:
        os.close(descriptor)


def _totals(folder: Path, manifest: Manifest, window: int) -> Totals:
    """The statistics of the shards that a stream's manifest lists."""
    totals = Totals.read(folder, window).at(len(manifest.files), manifest.rows)
    if totals is None:
        raise InputError(
            f"{folder / STATISTICS} is not that of the {len(manifest.files)} shards in {MANIFEST}: "
            "collect the stream again, in a new folder"
        )
    return totals


def _checked_blocks(
    blocks: Iterable[Block], dtype: str, labels: Mapping[str, str]
) -> Iterator[tuple[Tensor, dict[str, np.ndarray]]]:
    """Blocks with at least one row, in the store's dtype, with all columns."""
    seen, width = 0, None
    for rows, given in blocks:
        if rows.ndim != 2 or (width is not None and rows.shape[1] != width):
            raise InputError(
                f"an activation store needs rows (n, {width or 'd_in'}), got shape {tuple(rows.shape)} at row {seen}"
            )
        if not len(rows):
            continue
        n, width = len(rows), rows.shape[1]
        if (strange := set(given) - set(COLUMNS) - set(labels)) or (missing := set(labels) - set(given)):
            name = next(iter(strange or missing))
            raise InputError(f"column {name!r} is {'not declared in labels' if strange else 'declared but missing'}")
        columns = {"token_id": np.zeros(n), "doc_id": np.arange(seen, seen + n), "position": np.zeros(n), **given}
        for name, values in columns.items():
            if len(values) != n:
                raise InputError(f"column {name!r} has {len(values)} values for {n} rows")
        x = rows.detach().cpu().to(DTYPES[dtype])
        bad = (~torch.isfinite(x).all(1)).nonzero()
        if len(bad):
            row = seen + int(bad[0, 0])
            raise InputError(f"row {row} holds values that are not finite in {dtype}: clean it, or use bfloat16")
        types = {**COLUMNS, **{name: LABELS[d] for name, d in labels.items()}}
        yield x, {name: _cast(name, np.asarray(values), types[name]) for name, values in columns.items()}
        seen += n


def _cast(name: str, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    cast = values.astype(dtype)
    if dtype.kind != "f" and not np.array_equal(cast, values):
        raise InputError(f"column {name!r} holds numbers that {dtype} cannot keep, such as {values[cast != values][0]}")
    return cast


def _in_shards(
    first: tuple[Tensor, dict[str, np.ndarray]], rest: Iterable[tuple[Tensor, dict[str, np.ndarray]]], size: int
) -> Iterator[tuple[Tensor, dict[str, np.ndarray]]]:
    """Blocks of any sizes as blocks of `size` rows; the last may have fewer."""
    waiting: list[tuple[Tensor, dict[str, np.ndarray]]] = []
    count = 0
    for x, columns in itertools.chain([first], rest):
        cuts = [0, *range(size - count, len(x), size), len(x)] if count + len(x) > size else [0, len(x)]
        for start, stop in itertools.pairwise(cuts):
            waiting.append((x[start:stop], {name: values[start:stop] for name, values in columns.items()}))
            count += stop - start
            if count == size:
                yield _join(waiting)
                waiting, count = [], 0
    if waiting:
        yield _join(waiting)


def _join(blocks: list[tuple[Tensor, dict[str, np.ndarray]]]) -> tuple[Tensor, dict[str, np.ndarray]]:
    if len(blocks) == 1:
        return blocks[0]
    names = blocks[0][1]
    return torch.cat([x for x, _ in blocks]), {name: np.concatenate([c[name] for _, c in blocks]) for name in names}
