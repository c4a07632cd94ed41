"""The shard: one immutable HDF5 file of activation rows, written crash-safely and validated before it is read.

`/x (n, d_in)` is contiguous and unfiltered (bfloat16 as uint16 bits), beside the columns `/token_id`, `/doc_id`,
`/position`, `/norm` and the caller's own, `/block_xxh3` with a checksum for every 256 rows of `/x`, and `/stats`.
The root's attributes say which store and which documents the rows belong to, and hold a hash of all else, so that a
shard can be verified by itself. All that HDF5 needs to find the rows lies in the first 64 KiB, or in more with
many label columns, and `/stats` right behind. The manifest has a hash of that part, checked before HDF5 opens the file,
since HDF5 can crash or hang on damaged bytes.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np
import torch
import xxhash
from torch import Tensor

from glp_lens.activations.manifest import ROW_ORDER, SCHEMA, STORED, VERSION, Manifest, Shard, shard_name
from glp_lens.activations.stats import Stats, measure
from glp_lens.errors import InputError, first_line
from glp_lens.files import sync_folder
from glp_lens.types import Acts

HASH_BLOCK: Final = 256
"""Rows of `/x` under one checksum in `/block_xxh3`."""
_CHUNK = 4 << 20
_DESCRIPTIONS = 32 << 10
_LABEL_DESCRIPTION = 1 << 10
"""More than what describes a label column takes, 0.7 KiB with the longest name; 40 fit without more room."""
_Spec = dict[str, tuple[tuple[int, ...], np.dtype]]


@dataclass(frozen=True)
class Source:
    """The documents a shard was made of: how many, the hash of their ids, and what was left out of them."""

    documents: int
    documents_hash: str
    excluded: dict[str, int]


class Damaged(Exception):
    """Why a shard was refused."""


def write_shard(
    folder: Path, index: int, manifest: Manifest, x: Acts, columns: Mapping[str, np.ndarray], source: Source
) -> tuple[Shard, Stats]:
    """Write one shard under a temporary name, make it durable, then rename it.

    Args:
        folder: the store's folder.
        index: the shard's place in the store.
        manifest: of the store; says which columns there are.
        x: rows in the store's dtype, at least one.
        columns: the columns of each row; `norm` is computed here.
        source: the documents that the rows are of.

    Returns:
        Its manifest entry, and its statistics.

    Raises:
        InputError: the disk is full; nothing is left behind.
    """
    path = folder / shard_name(index)
    bits = _bits(x)
    stats, norms = measure(x)
    data: dict[str, np.ndarray] = {
        "x": bits,
        **{
            name: np.ascontiguousarray(norms.numpy() if name == "norm" else columns[name], dtype)
            for name, dtype in manifest.columns.items()
        },
        "block_xxh3": _block_hashes(bits),
        "stats/count": np.array([stats.count], dtype="<u8"),
        "stats/norm_sum": np.array([stats.norm_sum], dtype="<f8"),
        **{f"stats/{name}": getattr(stats, name).numpy() for name in ("mean", "M2", "min", "max")},
    }
    attributes: dict[str, Any] = {
        "schema": SCHEMA,
        "version": VERSION,
        "row_order": ROW_ORDER,
        "store": manifest.identity,
        "index": index,
        "documents": source.documents,
        "documents_hash": source.documents_hash,
        "excluded": json.dumps(source.excluded),
    }
    attributes["content_xxh3"] = _content_hash(data, attributes)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with no_space(folder):
            _write_hdf5(temporary, data, attributes, manifest)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            shard = _listed(temporary, index, len(x), manifest, source)
            os.replace(temporary, path)
            sync_folder(folder)
    finally:
        temporary.unlink(missing_ok=True)
    return shard, stats


@contextmanager
def no_space(folder: Path) -> Iterator[None]:
    """Turn the exception of a full or unwritable disk into one clear line.

    Raises:
        InputError: the disk, or the quota, is full; the folder is gone or read-only; the disk fails.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            why, remedy = "disk full: no room to write in", "free space"
        else:
            why, remedy = f"cannot write ({error.strerror or first_line(error)}) in", "make the folder writable"
        raise InputError(f"{why} {folder}; what is saved is safe: {remedy} and run the same command again") from None


def open_shard(folder: Path, shard: Shard, manifest: Manifest) -> tuple[dict[str, int], Stats]:
    """Byte offsets of a shard's row datasets, and its statistics, after checking all we rely on.

    HDF5 can point to other files and claim sizes it does not have, so nothing is read that was not checked: names
    are hard links, datasets are contiguous, unfiltered, of the expected type and shape, and lie inside the file. The
    shard itself may be a link to a regular file, as in caches of downloads.

    Raises:
        InputError: damaged or foreign.
    """
    path = folder / shard.name
    with _checked(folder, shard.name):
        if not path.is_file():
            raise Damaged("it is missing")
        size = path.stat().st_size
        if size != shard.bytes:
            raise Damaged(f"it has {size} bytes, expected {shard.bytes}")
        if not _as_written(path, shard, manifest):
            raise Damaged("its beginning is not what was written")
        with h5py.File(path, "r", locking=False) as file:
            return _layout(file, shard.index, shard.rows, manifest, size)


def adopt_shard(folder: Path, index: int, manifest: Manifest) -> Shard:
    """The manifest entry of a shard that was finished but not listed, after checking every byte.

    Raises:
        InputError: it is damaged, or of another store.
    """
    path = folder / shard_name(index)
    with _checked(folder, path.name), h5py.File(path, "r", locking=False) as file:
        size = path.stat().st_size
        x = file.get("x") if isinstance(file.get("x", getlink=True), h5py.HardLink) else None
        if not isinstance(x, h5py.Dataset) or not x.shape:
            raise Damaged("/x is missing or lies in another file")
        rows = int(x.shape[0])
        _layout(file, index, rows, manifest, size)
        if file["stats/count"].id.get_offset() < _descriptions(manifest):  # which is right behind them
            raise Damaged("an earlier release wrote it, with descriptions among its rows")
        names = _row_datasets(rows, manifest) | _stat_datasets(manifest.d_in)
        data = {name: file[name][()] for name in names}
        blocks_match = np.array_equal(_block_hashes(data["x"]), data["block_xxh3"])
        if not blocks_match or _content_hash(data, dict(file.attrs)) != file.attrs["content_xxh3"]:
            raise Damaged("its bytes are not those that were written")
        source = Source(
            int(file.attrs["documents"]), str(file.attrs["documents_hash"]), json.loads(file.attrs["excluded"])
        )
    return _listed(path, index, rows, manifest, source)


def _as_written(path: Path, shard: Shard, manifest: Manifest) -> bool:
    """Whether all that HDF5 would parse of a shard is what was written.

    With many label columns earlier releases left descriptions among the rows: then all of the file is compared.
    """
    if head_hash(path, manifest) == shard.head_xxh3:
        return True
    many = _descriptions(manifest) > _DESCRIPTIONS
    return many and file_hash(path) == (shard.bytes, shard.xxh3_128)


def _listed(path: Path, index: int, rows: int, manifest: Manifest, source: Source) -> Shard:
    hashes = (*file_hash(path), head_hash(path, manifest))
    return Shard(index, rows, *hashes, source.documents, source.documents_hash, source.excluded)


@contextmanager
def _checked(folder: Path, name: str) -> Iterator[None]:
    try:
        yield
    except Damaged as error:
        raise InputError(f"activation store {folder} is damaged: {name}: {error}") from None
    except Exception as error:  # h5py raises whatever a strange file leads to
        if "locking flag" in str(error):
            raise InputError(
                f"{folder / name} is open elsewhere in this process, with HDF5's own file locking: close it first"
            ) from None
        raise InputError(
            f"activation store {folder} is damaged: {name} cannot be opened ({first_line(error)})"
        ) from None


def _row_datasets(n: int, manifest: Manifest) -> _Spec:
    return {
        "x": ((n, manifest.d_in), STORED[manifest.dtype]),
        **{name: ((n,), dtype) for name, dtype in manifest.columns.items()},
        "block_xxh3": ((-(-n // HASH_BLOCK),), np.dtype("<u8")),
    }


def _stat_datasets(d: int) -> _Spec:
    return {
        "stats/count": ((1,), np.dtype("<u8")),
        "stats/norm_sum": ((1,), np.dtype("<f8")),
        **{f"stats/{name}": ((d,), np.dtype("<f8")) for name in ("mean", "M2", "min", "max")},
    }


def _layout(file: h5py.File, index: int, rows: int, manifest: Manifest, size: int) -> tuple[dict[str, int], Stats]:
    if file.attrs.get("schema") != SCHEMA or file.attrs.get("version") != VERSION:
        raise Damaged("it is no shard of this format")
    if file.attrs.get("store") != manifest.identity or file.attrs.get("index") != index:
        raise Damaged("it belongs to another store, or to another place in it")
    if not isinstance(file.get("stats", getlink=True), h5py.HardLink):
        raise Damaged("/stats is missing or lies in another file")
    layout = {name: _offset(file, name, *want, size=size) for name, want in _row_datasets(rows, manifest).items()}
    stats = _stat_datasets(manifest.d_in)
    for name, want in stats.items():
        _offset(file, name, *want, size=size)
    values = {name.removeprefix("stats/"): file[name][()] for name in stats}
    if (count := int(values.pop("count")[0])) != rows:
        raise Damaged(f"/stats counts {count} of {rows} rows")
    norm_sum = float(values.pop("norm_sum")[0])
    return layout, Stats(rows, norm_sum=norm_sum, **{k: torch.from_numpy(v) for k, v in values.items()})


def _offset(file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype, *, size: int) -> int:
    """Where a dataset's bytes begin, if they lie in this file, in one piece, as they are."""
    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        raise Damaged(f"/{name} is missing or lies in another file")
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset) or dataset.shape != shape or dataset.dtype != dtype:
        raise Damaged(f"/{name} is not {dtype} of shape {shape}")
    how = dataset.id.get_create_plist()
    if how.get_layout() != h5py.h5d.CONTIGUOUS or how.get_nfilters() or how.get_external_count():
        raise Damaged(f"/{name} is chunked, filtered or external")
    offset = dataset.id.get_offset()
    if offset is None or offset + dtype.itemsize * math.prod(shape) > size:
        raise Damaged(f"/{name} reaches past the end of the file")
    return int(offset)


def _bits(x: Tensor) -> np.ndarray:
    x = x.contiguous()
    return x.view(torch.int16).numpy().view(np.uint16) if x.dtype == torch.bfloat16 else x.numpy()


def _block_hashes(bits: np.ndarray) -> np.ndarray:
    hashes = [xxhash.xxh3_64_intdigest(bits[i : i + HASH_BLOCK].data) for i in range(0, len(bits), HASH_BLOCK)]
    return np.array(hashes, dtype="<u8")


def _content_hash(data: Mapping[str, np.ndarray], attributes: Mapping[str, Any]) -> str:
    """Of all datasets and attributes; `/x` is in it through the checksums of its blocks."""
    digest = xxhash.xxh3_128()
    described = {name: str(value) for name, value in attributes.items() if name != "content_xxh3"}
    digest.update(json.dumps(described, sort_keys=True).encode())
    for name, values in data.items():
        if name != "x":
            digest.update(values.data)
    return digest.hexdigest()


def _descriptions(manifest: Manifest) -> int:
    """Bytes at the beginning of a shard that are kept for HDF5's descriptions, of which each column has its own."""
    return _DESCRIPTIONS + _LABEL_DESCRIPTION * max(0, len(manifest.labels) - 40)


def _write_hdf5(path: Path, data: Mapping[str, np.ndarray], attributes: Mapping[str, Any], manifest: Manifest) -> None:
    """Lay all datasets out, reserve their space on disk, then fill them."""
    path.unlink(missing_ok=True)
    # HDF5 does not survive a full disk, so there must be room before it writes the first byte.
    _reserve(path, 2 * _descriptions(manifest) + sum(values.nbytes + 4096 for values in data.values()))
    # Rows begin at a page boundary, so that blocks can be read straight into buffers; all descriptions lie together at
    # the beginning, and no lock is needed for a file that is not listed yet.
    layout = {"alignment_threshold": 65536, "alignment_interval": 4096, "meta_block_size": _descriptions(manifest)}
    with h5py.File(path, "w", locking=False, **layout) as file:
        file.attrs.update(attributes)
        how = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        how.set_layout(h5py.h5d.CONTIGUOUS)
        how.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        how.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        sets = {
            name: file.create_dataset(name, values.shape, values.dtype, dcpl=how.copy())
            for name, values in sorted(data.items(), key=lambda item: not item[0].startswith("stats/"))
        }
        sets["x"].attrs["dtype"] = manifest.dtype
        file.flush()
        _reserve(path, max(item.id.get_offset() + item.id.get_storage_size() for item in sets.values()))
        for name, values in data.items():
            sets[name][()] = values


def _reserve(path: Path, size: int) -> None:
    """Have the disk set the space aside now: a full disk must fail here, not inside HDF5."""
    if hasattr(os, "posix_fallocate"):  # not on macOS
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            os.posix_fallocate(descriptor, 0, size)
        finally:
            os.close(descriptor)


def head_hash(path: Path, manifest: Manifest) -> str:
    """xxh3-64, in hexadecimal, of a shard's beginning: 64 KiB, or more with many label columns, and its statistics.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return xxhash.xxh3_64_hexdigest(
            file.read(_DESCRIPTIONS + _descriptions(manifest) + 8 * (4 * manifest.d_in + 2))
        )


def file_hash(path: Path, progress: Callable[[int], Any] | None = None) -> tuple[int, str]:
    """Size and xxh3-128 of a whole file; `progress` is called with the number of bytes of each read.

    Raises:
        OSError: it cannot be read.
    """
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
            if progress is not None:
                progress(len(chunk))
    return size, digest.hexdigest()
