"""Writing shards, statistics, checksums and durability included, against writing the same bytes to a file."""

import os
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import OURS, Timed
from torch import Tensor

from glp_lens.activations.manifest import Manifest
from glp_lens.activations.shard import Source, adopt_shard, open_shard, write_shard

BYTES = 256 << 20
DURABLE, CACHED = "write() and fsync of the rows' bytes (ceiling)", "write() alone, into the page cache"


def ours(folder: Path, x: Tensor, manifest: Manifest) -> None:
    n = len(x)
    columns = {name: np.zeros(n, dtype) for name, dtype in manifest.columns.items()}
    write_shard(folder, 0, manifest, x, columns, Source(1, "", {}))


def plain(folder: Path, x: Tensor, manifest: Manifest, *, sync: bool = True) -> None:
    with (folder / "rows.bin").open("wb", buffering=0) as file:
        file.write(x.view(torch.int16).numpy().data)
        if sync:
            os.fsync(file.fileno())


def cached(folder: Path, x: Tensor, manifest: Manifest) -> None:
    plain(folder, x, manifest, sync=False)


WAYS = {OURS: ours, DURABLE: plain, CACHED: cached}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("d_in", [576, 2048])
def test_write(d_in: int, way: str, tmp_path: Path, timed: Timed) -> None:
    rows = BYTES // (2 * d_in)
    x = torch.randn(rows, d_in, generator=torch.Generator().manual_seed(0)).bfloat16()
    manifest = Manifest(hook="h", d_in=d_in, dtype="bfloat16", source={}, versions={})
    folders = (tmp_path / str(i) for i in count())

    def setup() -> tuple[tuple[Path, Tensor, Manifest], dict[str, Any]]:
        folder = next(folders)
        folder.mkdir()
        return (folder, x, manifest), {}

    timed(f"writing {BYTES >> 20} MiB, width {d_in}", way, WAYS[way], setup=setup, amount=rows, unit="rows", rounds=5)
    written = sorted(tmp_path.iterdir())[-1]
    if way == OURS:
        shard = adopt_shard(written, 0, manifest)  # reads and checks every byte
        assert shard.rows == rows
        _, stats = open_shard(written, shard, manifest)
        torch.testing.assert_close(stats.mean, x.double().mean(0), atol=1e-6, rtol=0)
    else:
        assert (written / "rows.bin").stat().st_size == x.nbytes
