"""The activation store: a folder with `manifest.json` and immutable HDF5 shards, opened for reading.

A shard `shard-00000000.h5` holds `/x (n, d_in)`, contiguous and unfiltered (bfloat16 as uint16 bits), the
columns `/token_id`, `/doc_id`, `/position` and `/norm`, `/block_xxh3` with a checksum for every 256 rows of
`/x`, and `/stats`. The manifest says which shards count, how many rows they have and where they came from;
a file that it does not list does not exist.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np
import torch
import xxhash
from torch import Tensor
from tqdm.auto import tqdm

from glp_lens.activations.batches import shuffled_batches, window_rows
from glp_lens.activations.stats import Stats, merge
from glp_lens.artifacts import read_json
from glp_lens.errors import InputError
from glp_lens.types import Acts, Json

SCHEMA: Final = "glp-lens activations"
VERSION: Final = 1
MANIFEST: Final = "manifest.json"
ROW_ORDER: Final = "document"
HASH_BLOCK: Final = 256
"""Rows of `/x` under one checksum in `/block_xxh3`."""

STORED: Final[dict[str, np.dtype]] = {
    "bfloat16": np.dtype("<u2"),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
}
"""How each dtype lies in the file."""
TORCH: Final = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
COLUMNS: Final[dict[str, np.dtype]] = {
    "token_id": np.dtype("<u4"),
    "doc_id": np.dtype("<u8"),
    "position": np.dtype("<u4"),
    "norm": np.dtype("<f4"),
}
"""What is kept about each row; `norm` is the Euclidean norm of the stored row."""

_SHARD_NAME = re.compile(r"shard-\d{8}\.h5")


@dataclass(frozen=True)
class Cursor:
    """How far in its texts a collection is.

    Attributes:
        documents: documents used up.
        corpus_hash: xxh3-64 over their ids, in order, in hexadecimal.
        excluded: rows left out so far, by reason.
    """

    documents: int
    corpus_hash: str
    excluded: dict[str, int]


@dataclass(frozen=True)
class Shard:
    """One shard, as the manifest lists it; `cursor` is where its collection stood at its end."""

    name: str
    rows: int
    bytes: int
    xxh3_128: str
    cursor: Cursor


@dataclass(frozen=True)
class Manifest:
    """What a store holds and where it came from.

    Attributes:
        dtype: `bfloat16`, `float16` or `float32`.
        source: model, tokenizer, corpus and settings: a continued collection must repeat all of it.
        max_norm: norm above which rows were left out; None if all were kept.
        cursor: where the collection stands.
        complete: whether the collection came to its end.
    """

    hook: str
    d_in: int
    dtype: str
    source: Json
    versions: Json
    max_norm: float | None
    cursor: Cursor
    shards: tuple[Shard, ...] = ()
    complete: bool = False

    @property
    def rows(self) -> int:
        """Rows of all shards."""
        return sum(shard.rows for shard in self.shards)

    def to_json(self) -> Json:
        """The content of `manifest.json`."""
        return {
            "schema": SCHEMA,
            "version": VERSION,
            "row_order": ROW_ORDER,
            "rows": self.rows,
            **asdict(self),
        }

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read and check the manifest of a store.

        Raises:
            InputError: missing, damaged, or not a manifest of this schema and version.
        """
        value = read_json(folder / MANIFEST, "activation store")
        if value.get("schema") != SCHEMA:
            raise InputError(f"{folder / MANIFEST} is not the manifest of an activation store")
        if value.get("version") != VERSION:
            raise InputError(
                f"activation store {folder} has format version {value.get('version')!r}, expected {VERSION}: "
                "open it with the glp-lens release that wrote it"
            )
        try:
            shards = tuple(Shard(**{**s, "cursor": Cursor(**s["cursor"])}) for s in value["shards"])
            fields = {name: value[name] for name in cls.__dataclass_fields__}
            manifest = cls(**{**fields, "cursor": Cursor(**value["cursor"]), "shards": shards})
            valid = (
                manifest.dtype in STORED
                and type(manifest.d_in) is int
                and manifest.d_in > 0
                and all(_SHARD_NAME.fullmatch(s.name) and type(s.rows) is int and s.rows > 0 for s in shards)
                and len({s.name for s in shards}) == len(shards)
                and manifest.rows == value["rows"]
            )
        except (KeyError, TypeError) as error:
            raise InputError(f"activation store {folder} has a damaged manifest ({error})") from None
        if not valid:
            raise InputError(f"activation store {folder} has a damaged manifest (its values do not fit together)")
        return manifest


class ActivationStore:
    """Activations of one hook point, with the token, document and position of each row.

    Reading needs no lock and keeps no file open, so a store can be shared by threads and forked workers.

    Attributes:
        path: the folder.
        manifest: what is in it and where it came from.
    """

    def __init__(self, path: Path, manifest: Manifest, layouts: list[dict[str, int]], stats: Stats) -> None:
        self.path = path
        self.manifest = manifest
        self.stats = stats
        self._layouts = layouts
        self._bounds = np.cumsum([0, *(shard.rows for shard in manifest.shards)])

    @classmethod
    def open(cls, path: str | Path, *, partial: bool = False) -> ActivationStore:
        """Open a store after checking its manifest and the structure and size of every shard.

        Damage inside a shard that leaves its structure whole takes reading it all: see `verify`.

        Args:
            path: the store's folder.
            partial: also open a store whose collection was interrupted.

        Raises:
            InputError: no store there, several stores below it, interrupted, foreign or damaged.
        """
        path = Path(path)
        if not (path / MANIFEST).is_file():
            below = sorted(file.parent.name for file in path.glob(f"*/{MANIFEST}"))
            if below:
                raise InputError(f"{path} holds {len(below)} stores, open one of: {', '.join(below)}")
            raise InputError(f"no activation store at {path}: expected a folder with {MANIFEST}")
        manifest = Manifest.read(path)
        if not manifest.complete and not partial:
            raise InputError(
                f"the collection of {path} was interrupted after {manifest.rows} rows: "
                "run the same collect again to continue it"
            )
        if not manifest.shards:
            raise InputError(f"activation store {path} has no rows yet: run the same collect again")
        opened = [_open_shard(path, shard, manifest) for shard in manifest.shards]
        return cls(path, manifest, [layout for layout, _ in opened], merge(stats for _, stats in opened))

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def __repr__(self) -> str:
        return f"ActivationStore({str(self.path)!r}, hook={self.hook!r}, rows={len(self)}, d_in={self.d_in})"

    @property
    def hook(self) -> str:
        """The hook point the rows came from."""
        return self.manifest.hook

    @property
    def d_in(self) -> int:
        """Width of a row."""
        return self.manifest.d_in

    @property
    def dtype(self) -> str:
        """Name of the dtype the rows are kept in."""
        return self.manifest.dtype

    @cached_property
    def median_norm(self) -> float:
        """Median Euclidean norm of a row."""
        return float(np.median(self.column("norm")))

    def rows(self, start: int = 0, stop: int | None = None, dtype: torch.dtype = torch.float32) -> Acts:
        """Rows `start` to `stop` in stored order, `(n, d_in)`; bounds are cut to the store's."""
        start, stop, _ = slice(start, stop).indices(len(self))
        return self._read_x(np.array([start]), np.array([max(start, stop)])).to(dtype)

    def take(self, index: np.ndarray) -> Acts:
        """The rows of these indices, in this order, `(n, d_in)` float32."""
        index = np.asarray(index, dtype=np.int64)
        if index.size and not 0 <= index.min() <= index.max() < len(self):
            raise InputError(f"row indices must lie in [0, {len(self)}), got {index.min()} to {index.max()}")
        return self._read_x(index, index + 1).float()

    def column(self, name: str) -> np.ndarray:
        """One value a row: `token_id` (u4), `doc_id` (u8), `position` (u4) or `norm` (f4)."""
        if name not in COLUMNS:
            raise InputError(f"no column {name!r} in an activation store: expected one of {', '.join(COLUMNS)}")
        return self._read(name, np.array([0]), np.array([len(self)]))

    def sample_index(self, n: int, seed: int) -> np.ndarray:
        """Indices of `n` distinct rows in random order; of all rows if there are no more than `n`."""
        generator = np.random.default_rng(seed)
        return generator.choice(len(self), size=min(n, len(self)), replace=False)

    def sample(self, n: int, seed: int) -> Acts:
        """`n` distinct rows in random order (all rows if there are no more), `(n, d_in)` float32."""
        return self.take(self.sample_index(n, seed))

    def batches(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        start_batch: int = 0,
        epochs: int | None = None,
        drop_last: bool = True,
    ) -> Iterator[Acts]:
        """Shuffled batches `(batch_size, d_in)` float32, every row once an epoch.

        Args:
            batch_size: rows of a batch.
            seed: another seed, another order.
            start_batch: number of batches to leave out in front, to resume bit for bit.
            epochs: passes over the store; None never ends. A batch may span the end of one epoch and the
                beginning of the next.
            drop_last: leave out the incomplete batch at the very end.

        Raises:
            InputError: a size below 1, or not one whole batch.
        """
        return shuffled_batches(
            len(self),
            self.d_in,
            self._read_x,
            batch_size,
            seed=seed,
            start_batch=start_batch,
            epochs=epochs,
            drop_last=drop_last,
            window=window_rows(self.d_in * STORED[self.dtype].itemsize),
        )

    def verify(self) -> None:
        """Read every shard whole and compare its size and xxh3-128 with the manifest's.

        `open` checks structure only; this finds a change of any single bit.

        Raises:
            InputError: shards that are missing, unreadable or not as they were written, by name.
        """
        shards, damaged = self.manifest.shards, []
        total = sum(shard.bytes for shard in shards)
        with tqdm(total=total, desc="verify", unit="B", unit_scale=True, mininterval=2) as bar:
            for shard in shards:
                digest, size = xxhash.xxh3_128(), 0
                try:
                    with (self.path / shard.name).open("rb") as file:
                        while chunk := file.read(4 << 20):
                            digest.update(chunk)
                            size += len(chunk)
                            bar.update(len(chunk))
                    intact = (size, digest.hexdigest()) == (shard.bytes, shard.xxh3_128)
                except OSError:
                    intact = False
                if not intact:
                    damaged.append(shard.name)
        if damaged:
            raise InputError(
                f"activation store {self.path} is damaged: {len(damaged)} of {len(shards)} shards differ from what "
                f"was written ({', '.join(damaged)}): restore them from a copy, or collect again into a new folder"
            )

    def provenance(self) -> Json:
        """Which rows of which corpus through which model these are, for whoever trains on them."""
        manifest, source = self.manifest, self.manifest.source
        return {
            "model": source.get("model", {}),
            "weights": source.get("weights"),
            "tokenizer": source.get("tokenizer"),
            "hook": self.hook,
            "d_in": self.d_in,
            "rows": len(self),
            "dtype": self.dtype,
            "context": source.get("settings", {}).get("context"),
            "corpus": {
                **source.get("corpus", {}),
                "documents": manifest.cursor.documents,
                "hash": manifest.cursor.corpus_hash,
            },
            "excluded": dict(manifest.cursor.excluded),
            "max_norm": manifest.max_norm,
            "median_norm": self.median_norm,
            "manifest_hash": xxhash.xxh3_128_hexdigest((self.path / MANIFEST).read_bytes()),
        }

    def _read_x(self, starts: np.ndarray, stops: np.ndarray) -> Tensor:
        """Row intervals, one after the other, in the dtype they are kept in."""
        bits = self._read("x", starts, stops)
        if self.dtype == "bfloat16":
            return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(bits)

    def _read(self, name: str, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """Row intervals of one dataset, in the order given; each shard is opened once."""
        lengths = stops - starts
        width = (self.d_in,) if name == "x" else ()
        dtype = STORED[self.dtype] if name == "x" else COLUMNS[name]
        out = np.empty((int(lengths.sum()), *width), dtype=dtype)
        if out.size == 0:
            return out
        row = out.nbytes // len(out)
        view = out.data.cast("B")
        targets = np.cumsum(lengths) - lengths
        try:
            for k, shard in enumerate(self.manifest.shards):
                first, end = self._bounds[k], self._bounds[k + 1]
                inside = np.flatnonzero((starts < end) & (stops > first))
                if not len(inside):
                    continue
                low, high = np.maximum(starts[inside], first), np.minimum(stops[inside], end)
                places = self._layouts[k][name] + (low - first) * row
                begins = (targets[inside] + low - starts[inside]) * row
                ends = begins + (high - low) * row
                in_file_order = np.argsort(places, kind="stable")
                pieces = np.stack([places, begins, ends], axis=1)[in_file_order].tolist()
                descriptor = os.open(self.path / shard.name, os.O_RDONLY)
                try:
                    for place, begin, stop in pieces:
                        _read_into(descriptor, view[begin:stop], place)
                finally:
                    os.close(descriptor)
        except OSError as error:
            raise InputError(f"activation store {self.path} cannot be read: {error}") from None
        return out


def describe_store(store: ActivationStore, tokenizer: Any = None, examples: int = 5) -> Json:
    """What is in a store, for people: provenance, size, norms, odd dimensions and a few tokens.

    A dimension is dead if its variance is 0, and massive if its |mean| or its standard deviation is over ten
    times the median of that over all dimensions.

    Args:
        store: the store.
        tokenizer: with one, the tokens of the first rows are decoded.
        examples: number of runs of tokens to decode.
    """
    std, size = store.stats.var.sqrt(), store.stats.mean.abs()
    massive = (std > 10 * std.median()) | (size > 10 * size.median())
    levels = (0.01, 0.25, 0.5, 0.75, 0.99, 1.0)
    quantiles = np.quantile(store.column("norm"), levels)
    found: Json = {
        "path": str(store.path),
        **store.provenance(),
        "complete": store.manifest.complete,
        "shards": len(store.manifest.shards),
        "bytes": sum(shard.bytes for shard in store.manifest.shards),
        "mean_norm": store.stats.mean_norm,
        "norm_quantiles": {f"{level:g}": float(q) for level, q in zip(levels, quantiles, strict=True)},
        "dead_dims": torch.where(store.stats.var == 0)[0].tolist(),
        "massive_dims": torch.where(massive)[0].tolist(),
    }
    if tokenizer is not None:
        documents = store.column("doc_id")
        starts = np.flatnonzero(np.r_[True, documents[1:] != documents[:-1]])[:examples]
        tokens = store.column("token_id")
        found["examples"] = [
            tokenizer.decode(tokens[s : s + 24][documents[s : s + 24] == documents[s]].tolist()) for s in starts
        ]
    return found


def _read_into(descriptor: int, buffer: memoryview, place: int) -> None:
    while buffer:
        n = os.preadv(descriptor, [buffer], place)
        if n == 0:
            raise OSError("a shard ended before its last row: it was truncated after opening")
        buffer, place = buffer[n:], place + n


def _open_shard(folder: Path, shard: Shard, manifest: Manifest) -> tuple[dict[str, int], Stats]:
    """Byte offsets of a shard's row datasets, and its statistics, after checking all we rely on.

    HDF5 can point to other files and claim sizes it does not have, so nothing is read that was not checked.
    """
    n, d = shard.rows, manifest.d_in
    path = folder / shard.name
    rows: dict[str, tuple[tuple[int, ...], np.dtype]] = {
        "x": ((n, d), STORED[manifest.dtype]),
        "block_xxh3": ((-(-n // HASH_BLOCK),), np.dtype("<u8")),
        **{name: ((n,), dtype) for name, dtype in COLUMNS.items()},
    }
    stats: dict[str, tuple[tuple[int, ...], np.dtype]] = {
        "stats/count": ((1,), np.dtype("<u8")),
        "stats/norm_sum": ((1,), np.dtype("<f8")),
        **{f"stats/{name}": ((d,), np.dtype("<f8")) for name in ("mean", "M2", "min", "max")},
    }
    try:
        size = path.stat().st_size
        if size != shard.bytes:
            raise _Damaged(f"it has {size} bytes, expected {shard.bytes}")
        with h5py.File(path, "r", locking=False) as file:
            if file.attrs.get("schema") != SCHEMA or file.attrs.get("version") != VERSION:
                raise _Damaged("it is no shard of this format")
            if not isinstance(file.get("stats", getlink=True), h5py.HardLink):
                raise _Damaged("/stats is missing or lies in another file")
            layout = {k: _offset(file, k, *want, size=size) for k, want in (rows | stats).items()}
            values = {name.removeprefix("stats/"): file[name][()] for name in stats}
    except _Damaged as error:
        raise InputError(f"activation store {folder} is damaged: {shard.name}: {error}") from None
    except (OSError, KeyError, RuntimeError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"activation store {folder} is damaged: {shard.name} cannot be opened ({reason})") from None
    count = int(values.pop("count")[0])
    if count != n:
        raise InputError(f"activation store {folder} is damaged: {shard.name}: /stats counts {count} of {n} rows")
    norm_sum = float(values.pop("norm_sum")[0])
    return layout, Stats(count, norm_sum=norm_sum, **{k: torch.from_numpy(v) for k, v in values.items()})


class _Damaged(Exception):
    """Why a shard was refused."""


def _offset(file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype, *, size: int) -> int:
    """Where a dataset's bytes begin, if they lie in this file, in one piece, as they are."""
    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        raise _Damaged(f"/{name} is missing or lies in another file")
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset) or dataset.shape != shape or dataset.dtype != dtype:
        raise _Damaged(f"/{name} is not {dtype} of shape {shape}")
    how = dataset.id.get_create_plist()
    if how.get_layout() != h5py.h5d.CONTIGUOUS or how.get_nfilters() or how.get_external_count():
        raise _Damaged(f"/{name} is chunked, filtered or external")
    offset = dataset.id.get_offset()
    if offset is None or offset + dtype.itemsize * int(np.prod(shape, dtype=np.int64)) > size:
        raise _Damaged(f"/{name} reaches past the end of the file")
    return int(offset)
