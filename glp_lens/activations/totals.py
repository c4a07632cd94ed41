"""Statistics of all rows of a stream, kept in a file of their own, since its shards are deleted once used.

Shard k is committed in three steps, each durable before the next: its file, these totals with it, the manifest with it.
The file of totals also holds those without the last shard. So whenever the producer is killed, one of the two fits the
manifest, and a shard that the manifest does not list is made again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Self

import numpy as np
import torch
from torch import Tensor

from glp_lens.activations.shard import no_space
from glp_lens.activations.stats import Stats, merge
from glp_lens.errors import InputError
from glp_lens.files import Kind, read_tensors, write_tensors
from glp_lens.types import Acts

STATISTICS: Final = "statistics.safetensors"
_FILE = Kind("statistics of a stream", "collect the stream again, in a new folder", quiet=True)
_VECTORS = ("mean", "M2", "min", "max")
_BINS = 1 << 15


@dataclass(frozen=True)
class Total:
    """Statistics of the rows of the first shards.

    Attributes:
        shards: how many shards, those without rows left out.
        stats: of their rows.
        norms: `(32768,)` int64, how many rows have a norm whose float32 begins with these 16 bits.
    """

    shards: int
    stats: Stats
    norms: np.ndarray

    @classmethod
    def of(cls, x: Acts, stats: Stats) -> Self:
        """The statistics of one shard."""
        norm = torch.cat([torch.linalg.vector_norm(block.float(), dim=1) for block in x.split(2048)]).numpy()
        return cls(1, stats, np.bincount(norm.view(np.uint32) >> 16, minlength=_BINS))

    def and_then(self, other: Total) -> Total:
        """The statistics of these shards and those that follow."""
        return Total(self.shards + other.shards, merge([self.stats, other.stats]), self.norms + other.norms)

    @property
    def median_norm(self) -> float:
        """Median norm of a row, within 0.4%: the middle of the bin it lies in."""
        middle = np.searchsorted(np.cumsum(self.norms), (self.stats.count + 1) // 2)
        return float(np.array([(int(middle) << 16) | 0x8000], np.uint32).view(np.float32)[0])


@dataclass(frozen=True)
class Totals:
    """The content of `statistics.safetensors`.

    Attributes:
        window: most shards of the stream on disk.
        opening: of the first `window` shards, or of all while there are no more; it never changes after that.
        last: of all shards.
        before: of all but the last.
    """

    window: int
    opening: Total | None = None
    last: Total | None = None
    before: Total | None = None

    def add(self, shard: Total) -> Totals:
        """With one more shard."""
        last = self.last.and_then(shard) if self.last else shard
        return replace(self, opening=last if last.shards <= self.window else self.opening, last=last, before=self.last)

    def at(self, shards: int, rows: int) -> Totals | None:
        """The statistics as they were when the stream had this many shards; None if that is not known."""
        for last in (self.last, self.before):
            if (last.shards, last.stats.count) == (shards, rows) if last else shards == 0:
                return Totals(self.window, last if shards <= self.window else self.opening, last)
        return None

    def write(self, folder: Path) -> None:
        """Write the file atomically and durably.

        Raises:
            InputError: the disk is full.
        """
        kept = {"opening": self.opening, "last": self.last, "before": self.before}
        tensors = {f"{name}.{k}": v for name, total in kept.items() if total for k, v in _tensors(total).items()}
        with no_space(folder):
            write_tensors(folder / STATISTICS, tensors, _FILE)

    @classmethod
    def read(cls, folder: Path, window: int) -> Self:
        """Read the file of a stream; empty before the first shard.

        Raises:
            InputError: the file is damaged.
        """
        path = folder / STATISTICS
        if not path.exists():
            return cls(window)
        tensors = read_tensors(path, _FILE)
        try:
            totals = {
                name: _total({k: tensors[f"{name}.{k}"] for k in ("numbers", "norms", *_VECTORS)})
                for name in ("opening", "last", "before")
                if f"{name}.numbers" in tensors
            }
        except (KeyError, ValueError) as error:
            raise InputError(f"{path} is damaged ({error}): collect the stream again, in a new folder") from None
        return cls(window, **totals)


def _tensors(total: Total) -> dict[str, Tensor]:
    stats = total.stats
    numbers = torch.tensor([total.shards, stats.count, stats.norm_sum], dtype=torch.float64)
    vectors = {name: getattr(stats, name) for name in _VECTORS}
    return {"numbers": numbers, "norms": torch.from_numpy(total.norms), **vectors}


def _total(tensors: dict[str, Tensor]) -> Total:
    shards, count, norm_sum = tensors["numbers"].tolist()
    vectors = {name: tensors[name] for name in _VECTORS}
    return Total(int(shards), Stats(int(count), norm_sum=norm_sum, **vectors), tensors["norms"].numpy())
