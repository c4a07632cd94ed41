"""Writing activation stores so that a crash, a kill or a full disk leaves a store that opens."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import torch
import xxhash
from torch import Tensor

from glp_lens.activations.stats import Stats
from glp_lens.activations.store import (
    COLUMNS,
    HASH_BLOCK,
    MANIFEST,
    ROW_ORDER,
    SCHEMA,
    STORED,
    TORCH,
    VERSION,
    ActivationStore,
    Cursor,
    Manifest,
    Shard,
)
from glp_lens.artifacts import versions, write_json
from glp_lens.errors import InputError
from glp_lens.types import Acts, Json

SHARD_ROWS = 32_768


class StoreWriter:
    """Adds shards to a store; the manifest on disk lists exactly the shards that are safely there."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Begin a store in `folder`, or go on with the one whose manifest this is.

        Files that an earlier process left without listing them in the manifest are removed.
        """
        self.folder = folder
        self.manifest = manifest
        folder.mkdir(parents=True, exist_ok=True)
        self._publish(manifest)
        listed = {shard.name for shard in manifest.shards}
        for file in [*folder.glob("shard-*.h5"), *folder.glob(".shard-*.tmp")]:
            if file.name not in listed:
                file.unlink()

    def append(self, x: Acts, columns: Mapping[str, np.ndarray], cursor: Cursor) -> None:
        """Write one shard and list it in the manifest.

        Args:
            x: rows in the store's dtype, at least one.
            columns: `token_id`, `doc_id` and `position` of each row.
            cursor: where the collection stands after these rows.

        Raises:
            InputError: the disk is full.
        """
        name = f"shard-{len(self.manifest.shards):08d}.h5"
        size, digest = write_shard(self.folder / name, x, columns)
        shard = Shard(name=name, rows=len(x), bytes=size, xxh3_128=digest, cursor=cursor)
        self._publish(replace(self.manifest, shards=(*self.manifest.shards, shard), cursor=cursor))

    def finish(self, cursor: Cursor) -> None:
        """Mark the collection as complete."""
        self._publish(replace(self.manifest, cursor=cursor, complete=True))

    def _publish(self, manifest: Manifest) -> None:
        write_json(self.folder / MANIFEST, manifest.to_json())
        _sync_folder(self.folder)
        self.manifest = manifest


def write_shard(path: Path, x: Acts, columns: Mapping[str, np.ndarray]) -> tuple[int, str]:
    """Write one shard under a temporary name, make it durable, then rename it.

    Returns:
        Its size in bytes and the xxh3-128 of the whole file.

    Raises:
        InputError: the disk is full; nothing is left behind.
    """
    bits = _bits(x)
    stats = Stats.of(x)
    data: dict[str, np.ndarray] = {
        "x": bits,
        "norm": x.float().norm(dim=1).numpy(),
        **{name: np.asarray(columns[name]) for name in COLUMNS if name != "norm"},
        "block_xxh3": np.array(
            [xxhash.xxh3_64_intdigest(bits[i : i + HASH_BLOCK].data) for i in range(0, len(bits), HASH_BLOCK)],
            dtype="<u8",
        ),
        "stats/count": np.array([stats.count], dtype="<u8"),
        "stats/norm_sum": np.array([stats.norm_sum], dtype="<f8"),
        **{f"stats/{name}": getattr(stats, name).numpy() for name in ("mean", "M2", "min", "max")},
    }
    data = {name: values.astype(COLUMNS.get(name, values.dtype)) for name, values in data.items()}
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        _write_hdf5(temporary, data, _name_of(x.dtype))
        size, digest = _sync_and_hash(temporary)
        os.replace(temporary, path)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise InputError(f"disk full: {path.parent} has no room for a shard of {bits.nbytes} bytes") from None
        raise
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)
    return size, digest


def write_store(
    folder: str | Path,
    x: Acts,
    *,
    hook: str,
    dtype: str = "float32",
    columns: Mapping[str, np.ndarray] | None = None,
    source: Json | None = None,
    max_norm: float | None = None,
    shard_rows: int = SHARD_ROWS,
) -> ActivationStore:
    """A store of rows that are already in memory.

    Args:
        folder: a new or empty folder.
        x: `(n, d_in)`, at least one row.
        hook: the hook point they came from.
        dtype: `bfloat16`, `float16` or `float32`, as which they are kept.
        columns: `token_id`, `doc_id` and `position`; what is missing is zero, and each row its own document.
        source: what is known of model, corpus and settings.
        max_norm: norm above which rows were left out before; None if none were.
        shard_rows: rows of a shard.

    Raises:
        InputError: a store is there already; no rows; values that are not finite in `dtype`.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not empty: choose another folder")
    if x.ndim != 2 or not len(x):
        raise InputError(f"an activation store needs rows (n, d_in), got shape {tuple(x.shape)}")
    rows = x.detach().cpu().to(TORCH[check_dtype(dtype)])
    if not torch.isfinite(rows).all():
        raise InputError(f"the rows hold values that are not finite in {dtype}: clean them, or use bfloat16")
    values = {"token_id": np.zeros(len(x)), "doc_id": np.arange(len(x)), "position": np.zeros(len(x))}
    values |= columns or {}
    cursor = Cursor(documents=len(np.unique(values["doc_id"])), corpus_hash="", excluded={})
    manifest = Manifest(
        hook=hook,
        d_in=x.shape[1],
        dtype=dtype,
        source=source or {},
        versions=versions(),
        max_norm=max_norm,
        cursor=cursor,
    )
    writer = StoreWriter(folder, manifest)
    for start in range(0, len(x), shard_rows):
        part = slice(start, start + shard_rows)
        writer.append(rows[part], {name: np.asarray(v)[part] for name, v in values.items()}, cursor)
    writer.finish(cursor)
    return ActivationStore.open(folder)


def check_dtype(dtype: str) -> str:
    """The dtype's name, refused if a store cannot keep it."""
    if dtype not in STORED:
        raise InputError(f"an activation store keeps {', '.join(STORED)}, got dtype {dtype!r}")
    return dtype


def _bits(x: Tensor) -> np.ndarray:
    x = x.contiguous()
    return x.view(torch.int16).numpy().view(np.uint16) if x.dtype == torch.bfloat16 else x.numpy()


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write_hdf5(path: Path, data: Mapping[str, np.ndarray], dtype: str) -> None:
    """Lay all datasets out, reserve their space on disk, then fill them."""
    path.unlink(missing_ok=True)
    # Rows begin at a page boundary, so that blocks can be read straight into buffers.
    with h5py.File(path, "w", alignment_threshold=65536, alignment_interval=4096) as file:
        file.attrs.update({"schema": SCHEMA, "version": VERSION, "row_order": ROW_ORDER})
        how = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        how.set_layout(h5py.h5d.CONTIGUOUS)
        how.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        how.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        sets = {
            name: file.create_dataset(name, values.shape, values.dtype, dcpl=how.copy())
            for name, values in data.items()
        }
        sets["x"].attrs["dtype"] = dtype
        file.flush()
        end = max(item.id.get_offset() + item.id.get_storage_size() for item in sets.values())
        _reserve(path, end)
        for name, values in data.items():
            sets[name][()] = values


def _reserve(path: Path, size: int) -> None:
    """Have the disk set the space aside now: a full disk must fail here, not inside HDF5."""
    if hasattr(os, "posix_fallocate"):  # not on macOS
        descriptor = os.open(path, os.O_RDWR)
        try:
            os.posix_fallocate(descriptor, 0, size)
        finally:
            os.close(descriptor)


def _sync_and_hash(path: Path) -> tuple[int, str]:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        os.fsync(file.fileno())
        while chunk := file.read(4 << 20):
            digest.update(chunk)
        return file.tell(), digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
