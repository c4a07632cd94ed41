"""Shuffled float32 batches from a store, against other ways of reading the same rows."""

from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import OURS
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from glp_lens.activations import ActivationStore, write_store

ROWS, D_IN, BATCH = 100_001, 576, 4096
BASE = 256  # bfloat16 holds the integers up to this one exactly
Epoch = Callable[[], Iterator[Tensor]]


@pytest.fixture(scope="module")
def rows() -> Tensor:
    """Random rows whose first three numbers spell their index."""
    x = torch.randn(ROWS, D_IN, generator=torch.Generator().manual_seed(0)).bfloat16()
    index = torch.arange(ROWS)
    x[:, :3] = torch.stack([index // BASE**2, index // BASE % BASE, index % BASE], 1)
    return x


@pytest.fixture(scope="module")
def store(rows, tmp_path_factory) -> ActivationStore:
    folder = tmp_path_factory.mktemp("store") / "acts"
    return write_store(folder, rows, hook="blocks.14.hook_resid_post", dtype="bfloat16")


@pytest.fixture(scope="module")
def memmap(rows, tmp_path_factory) -> Path:
    """The rows' bits, one after the other in one file."""
    path = tmp_path_factory.mktemp("memmap") / "rows.bin"
    rows.view(torch.int16).numpy().tofile(path)
    return path


def ours(store: ActivationStore, memmap: Path) -> Epoch:
    return lambda: store.batches(BATCH, epochs=1, drop_last=False)


class OneRowAnItem(Dataset):
    def __init__(self, path: Path) -> None:
        self.bits = np.memmap(path, dtype=np.int16, mode="r").reshape(-1, D_IN)

    def __len__(self) -> int:
        return len(self.bits)

    def __getitem__(self, i: int) -> Tensor:
        return torch.tensor(self.bits[i]).view(torch.bfloat16).float()


def item_loader(store: ActivationStore, memmap: Path) -> Epoch:
    """How the released GLP code reads: no workers, one row an item. Its normalising is left out."""
    loader = DataLoader(
        OneRowAnItem(memmap), BATCH, shuffle=True, generator=torch.Generator().manual_seed(0), num_workers=0
    )
    return lambda: iter(loader)


def h5py_fancy(store: ActivationStore, memmap: Path) -> Epoch:
    """Each batch's rows by h5py index lists, which it wants sorted."""

    def epoch() -> Iterator[Tensor]:
        bounds = np.cumsum([0, *(shard.rows for shard in store.manifest.shards)])
        files = [h5py.File(store.path / shard.name) for shard in store.manifest.shards]
        order = np.random.default_rng(0).permutation(len(store))
        for at in range(0, len(order), BATCH):
            places = order[at : at + BATCH]
            sort = np.argsort(places)
            cuts = np.searchsorted(places[sort], bounds)
            bits = np.empty((len(places), D_IN), np.uint16)
            for k, file in enumerate(files):
                wanted = sort[cuts[k] : cuts[k + 1]]
                bits[wanted] = file["x"][places[wanted] - bounds[k]]
            yield torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float()
        for file in files:
            file.close()

    return epoch


def sequential(store: ActivationStore, memmap: Path) -> Epoch:
    """The same batches without shuffling: as fast as reading gets."""
    return lambda: (store.rows(at, at + BATCH) for at in range(0, len(store), BATCH))


CEILING = "sequential reading (ceiling)"
WAYS = {
    OURS: ours,
    "memmap, a DataLoader of one row an item": item_loader,
    "h5py index lists": h5py_fancy,
    CEILING: sequential,
}


@pytest.mark.parametrize("way", WAYS)
def test_batches(way, store, memmap, rows, timed):
    epoch = WAYS[way](store, memmap)

    def read() -> int:
        return sum(len(batch) for batch in epoch())

    rounds = 10 if way in (OURS, CEILING) else 3
    n = timed("shuffled batches of 4096 rows", way, read, amount=ROWS, unit="rows", rounds=rounds)
    assert n == ROWS

    x = torch.cat(list(epoch()))
    digits = x[:, :3].long()
    index = digits[:, 0] * BASE**2 + digits[:, 1] * BASE + digits[:, 2]
    assert torch.equal(index.sort().values, torch.arange(ROWS))
    assert torch.equal(index, torch.arange(ROWS)) == (way == CEILING)
    assert torch.equal(x, rows[index].float())
