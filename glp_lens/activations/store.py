"""The activation store, opened for reading: a folder with `manifest.json` and immutable HDF5 shards.

The manifest says which shards count, how many rows they have and where they came from; a file that it does not list
does not exist.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor
from tqdm.auto import tqdm

from glp_lens.activations.batches import ArrayRows, Batches, window_rows
from glp_lens.activations.manifest import MANIFEST, STORED, Manifest, Manifested, Shard
from glp_lens.activations.reader import Extent, RowReader, to_tensor
from glp_lens.activations.shard import file_hash, open_shard
from glp_lens.activations.stats import Stats, merge
from glp_lens.arguments import checked
from glp_lens.errors import InputError, counted
from glp_lens.types import Acts, Json

_CENTRED_ROWS = 16_384
"""Rows that quantiles of the distance from the mean are taken from."""
_BLOCK = 2048


class ActivationStore(Manifested):
    """Activations of one hook point, with the token, document and position of each row.

    Reading needs no lock and keeps no file open, so a store can be shared by threads and forked workers.

    Attributes:
        path: the folder.
        manifest: what is in it and where it came from.
        stats: statistics of its rows, see `Stats`.

    Examples:
        >>> import torch
        >>> from glp_lens.activations import ActivationStore, write_store
        >>> x = torch.arange(12.0).reshape(6, 2)
        >>> _ = write_store("acts", x, hook="blocks.3.hook_resid_post")
        >>> store = ActivationStore.open("acts")
        >>> len(store), store.d_in, store.hook
        (6, 2, 'blocks.3.hook_resid_post')
        >>> store.rows(1, 3)
        tensor([[2., 3.],
                [4., 5.]])
        >>> store.stats.mean
        tensor([5., 6.], dtype=torch.float64)
        >>> store.column("norm").round(1)
        array([ 1. ,  3.6,  6.4,  9.2, 12. , 14.9], dtype=float32)
    """

    def __init__(self, path: Path, manifest: Manifest, layouts: list[dict[str, int]], stats: Stats) -> None:
        self.path = path
        self.manifest = manifest
        self.stats = stats
        self._layouts = layouts
        self._x = self._reader("x", (manifest.d_in,), STORED[manifest.dtype])

    @classmethod
    @checked
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
        if manifest.window is not None:
            raise InputError(f"{path} is a stream, whose shards are deleted once used: open it as ActivationStream")
        if not manifest.complete and not partial:
            raise InputError(
                f"the collection of {path} was interrupted after {counted(manifest.rows, 'row')}: "
                "run the same collect again to continue it"
            )
        if not manifest.files:
            raise InputError(f"activation store {path} has no rows yet: run the same collect again")
        return cls.of(path, manifest)

    @classmethod
    def of(cls, path: Path, manifest: Manifest) -> ActivationStore:
        """The rows in `path` that a manifest lists."""
        shards = tqdm(manifest.files, desc="open", unit="shard", delay=2)
        opened = [open_shard(path, shard, manifest) for shard in shards]
        return cls(path, manifest, [layout for layout, _ in opened], merge(stats for _, stats in opened))

    def __len__(self) -> int:
        return len(self._x)

    def __repr__(self) -> str:
        return f"ActivationStore({str(self.path)!r}, hook={self.hook!r}, rows={len(self)}, d_in={self.d_in})"

    @cached_property
    def median_norm(self) -> float:
        """Median Euclidean norm of a row."""
        return float(np.median(self.column("norm")))

    @cached_property
    def median_centred_norm(self) -> float:
        """Median distance of a row from the mean, the spread of the data; see `centred_norm_quantile`.

        Unlike `median_norm` it does not depend on the mean, nor on dimensions that are nearly constant.
        """
        return self.centred_norm_quantile(0.5)

    @checked
    def centred_norm_quantile(self, q: float) -> float:
        """A quantile of the Euclidean distance of rows from the mean `stats.mean`.

        It is that of a fixed random sample of at most 16,384 rows, so the quantile's level is within 0.8 percentage
        points of `q` (two standard errors at the median, less in the tails).

        Args:
            q: level, from 0 to 1.

        Raises:
            InputError: a level out of that range.
        """
        if not 0 <= q <= 1:
            raise InputError(f"the level of a quantile must be from 0 to 1, got {q}")
        return float(np.quantile(self._centred_norms, q))

    @cached_property
    def _centred_norms(self) -> np.ndarray:
        index = np.sort(self.sample_index(_CENTRED_ROWS, seed=0))
        mean = self.stats.mean.float()
        parts = [self.take(part).sub_(mean).norm(dim=1) for part in np.array_split(index, len(index) // _BLOCK + 1)]
        return torch.cat(parts).numpy()

    @checked
    def rows(self, start: int = 0, stop: int | None = None, dtype: torch.dtype = torch.float32) -> Acts:
        """Rows `start` to `stop` in stored order, `(n, d_in)`; bounds are cut to the store's."""
        start, stop, _ = slice(start, stop).indices(len(self))
        return to_tensor(self._x.read(np.array([start]), np.array([max(start, stop)]))).to(dtype)

    @checked
    def take(self, index: np.ndarray) -> Acts:
        """The rows of these indices, in this order, `(n, d_in)` float32."""
        index = np.asarray(index, dtype=np.int64)
        if index.size and not 0 <= index.min() <= index.max() < len(self):
            raise InputError(f"row indices must lie in [0, {len(self)}), got {index.min()} to {index.max()}")
        return to_tensor(self._x.read(index, index + 1)).float()

    @checked
    def column(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """One value a row: `token_id` (u4), `doc_id` (u8), `position` (u4), `norm` (f4), or a label.

        Of rows `start` to `stop`; bounds are cut to the store's.
        """
        if name not in self.manifest.columns:
            raise InputError(f"no column {name!r} in {self.path}: expected one of {', '.join(self.manifest.columns)}")
        reader = self._reader(name, (), self.manifest.columns[name])
        start, stop, _ = slice(start, stop).indices(len(self))
        return reader.read(np.array([start]), np.array([max(start, stop)]))

    @checked
    def sample_index(self, n: int, seed: int) -> np.ndarray:
        """Indices of `n` distinct rows in random order; of all rows if there are no more than `n`."""
        generator = np.random.default_rng(seed)
        return generator.choice(len(self), size=min(n, len(self)), replace=False)

    @checked
    def sample(self, n: int, seed: int) -> Acts:
        """`n` distinct rows in random order (all rows if there are no more), `(n, d_in)` float32."""
        return self.take(self.sample_index(n, seed))

    @checked
    def batches(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        start_batch: int = 0,
        epochs: int | None = None,
        drop_last: bool = True,
        rank: int = 0,
        world_size: int = 1,
        part: tuple[int, int] | None = None,
        normalize: tuple[Tensor, Tensor] | None = None,
        every: int = 1,
        window: int | None = None,
        values: np.ndarray | None = None,
    ) -> Batches:
        """Shuffled batches `(batch_size, d_in)` float32, every row once an epoch; see `Batches`.

        Args:
            batch_size: rows of a batch.
            seed: another seed, another order.
            start_batch: number of batches to leave out in front, to resume bit for bit.
            epochs: passes over the store; None never ends. A batch may span the end of one epoch and the
                beginning of the next.
            drop_last: leave out the incomplete batch at the very end.
            rank: which of `world_size` processes this is.
            world_size: processes that share the rows: each step is a batch of every process, all disjoint.
            part: `(first, whole)`, for shares that are not equal; see `Batches`.
            normalize: (mean, standard deviation) `(d_in,)` by which rows are normalised.
            every: take only every so many batches.
            window: rows shuffled together.
            values: `(n, k)` numbers, some for each row of the store, to take in place of the activations; with the
                same other arguments they come in the same order.

        Raises:
            InputError: a number out of its range, or not one whole batch.

        Examples:
            >>> import torch
            >>> from glp_lens.activations import write_store
            >>> store = write_store("acts", torch.arange(10.0)[:, None], hook="blocks.3.hook_resid_post")
            >>> batches = list(store.batches(4, seed=0, epochs=2))
            >>> [tuple(batch.shape) for batch in batches]
            [(4, 1), (4, 1), (4, 1), (4, 1), (4, 1)]
            >>> resumed = store.batches(4, seed=0, epochs=2, start_batch=3)
            >>> torch.equal(next(resumed), batches[3])
            True
        """
        if values is not None and len(values) != len(self):
            raise InputError(f"expected values for {len(self)} rows, got {len(values)}")
        return Batches(
            self._x if values is None else ArrayRows(values),
            batch_size,
            seed=seed,
            start_batch=start_batch,
            epochs=epochs,
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
            part=part,
            normalize=normalize,
            every=every,
            window=window or window_rows(self.d_in * self._x.dtype.itemsize),
            fingerprint=self.fingerprint,
        )

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the manifest, and with it of all rows."""
        return xxhash.xxh3_128_hexdigest((self.path / MANIFEST).read_bytes())

    def verify(self) -> None:
        """Compare every shard, whole, with its size and hash in the manifest; see the function `verify`."""
        verify(self.path, self.manifest)

    def provenance(self) -> Json:
        """Model, hook point, corpus and number of rows, which models trained on them keep."""
        return {
            **self.manifest.provenance(),
            "median_norm": self.median_norm,
            "manifest_hash": self.fingerprint,
        }

    def _reader(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> RowReader:
        shards = zip(self.manifest.files, self._layouts, strict=True)
        extents = [Extent(self.path / shard.name, shard.rows, layout[name]) for shard, layout in shards]
        return RowReader(extents, shape, dtype)


def verify(folder: Path, manifest: Manifest) -> int:
    """Compare every shard of a store, whole, with its size and xxh3-128 in the manifest; of a stream, those on disk.

    Opening a store checks structure only; this finds a change of any single bit.

    Returns:
        How many shards were compared.

    Raises:
        InputError: damaged shards, by name.
    """
    remedy = f"drop or collect them again with glp-lens store repair {folder}"
    if manifest.window is not None:
        remedy = "collect the stream again, in a new folder"
        present = tuple(shard for shard in manifest.files if (folder / shard.name).exists())
        manifest = replace(manifest, shards=present)
    if damaged := damaged_shards(folder, manifest):
        raise InputError(
            f"activation store {folder} is damaged: {len(damaged)} of {len(manifest.files)} shards differ from what "
            f"was written ({', '.join(shard.name for shard in damaged)}): {remedy}"
        )
    return len(manifest.files)


def damaged_shards(folder: Path, manifest: Manifest) -> list[Shard]:
    """The shards that are missing, unreadable or differ in any bit from what was written.

    In a stream none counts as missing, since its consumer deletes what it has used.
    """
    damaged = []
    total = sum(shard.bytes for shard in manifest.files)
    with tqdm(total=total, desc="verify", unit="B", unit_scale=True, mininterval=2) as bar:
        for shard in manifest.files:
            path = folder / shard.name
            try:
                same_size = path.is_file() and path.stat().st_size == shard.bytes
                intact = same_size and file_hash(path, bar.update) == (shard.bytes, shard.xxh3_128)
            except OSError:
                intact = False
            if not intact and (manifest.window is None or path.exists()):
                damaged.append(shard)
    return damaged
