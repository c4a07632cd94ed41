"""Shuffled, normalised float32 batches from a store, against other ways of reading the same rows."""

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import h5py
import numpy as np
import pytest
import torch
from conftest import OURS, Timed
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from glp_lens.activations import ActivationStore, write_store

BATCH = 4096
ROWS = {576: 400_001, 2048: 150_001}
"""Rows of each width: more than one window of the shuffle."""
Item = TypeVar("Item")
BASE = 256  # bfloat16 holds the integers up to this one exactly


@dataclass(frozen=True)
class Data:
    """The same rows in memory, in a store and in a memory map, and what to normalise them by."""

    rows: Tensor
    store: ActivationStore
    memmap: Path
    mean: Tensor
    std: Tensor

    def normalise(self, x: Tensor) -> Tensor:
        return (x.float() - self.mean) / self.std


@pytest.fixture(scope="module", params=ROWS)
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Rows whose first three numbers spell their index, which normalising leaves as they are."""
    d, n = request.param, ROWS[request.param]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9973, d, generator=generator).bfloat16().repeat(n // 9973 + 1, 1)[:n]
    index = torch.arange(n)
    x[:, :3] = torch.stack([index // BASE**2, index // BASE % BASE, index % BASE], 1)
    mean, std = torch.randn(d, generator=generator), 0.5 + torch.rand(d, generator=generator)
    mean[:3], std[:3] = 0, 1
    folder = tmp_path_factory.mktemp("rows")
    x.view(torch.int16).numpy().tofile(folder / "rows.bin")
    store = write_store(folder / "acts", x, hook="blocks.14.hook_resid_post", dtype="bfloat16")
    return Data(x, store, folder / "rows.bin", mean, std)


def ours(data: Data, epochs: int) -> Iterator[Tensor]:
    return data.store.batches(BATCH, epochs=epochs, drop_last=False, normalize=(data.mean, data.std))


class OneRowAnItem(Dataset[Tensor]):
    """Rows of a memory map, with as little work for each as can be."""

    def __init__(self, path: Path, d: int) -> None:
        self.bits = np.memmap(path, dtype=np.int16, mode="r").reshape(-1, d)

    def __len__(self) -> int:
        return len(self.bits)

    def __getitem__(self, i: int) -> Tensor:
        return torch.tensor(self.bits[i]).view(torch.bfloat16)


class ReleasedItems(Dataset[dict[str, Tensor]]):
    """What the released GLP code does for each row: place looked up, layer read from the folder's name, float32."""

    def __init__(self, path: Path, d: int) -> None:
        self.path = path
        self.maps = {0: np.memmap(path, dtype=np.int16, mode="r")}
        ends = np.arange(d, len(self.maps[0]) + 1, d)
        self.index = np.stack([np.zeros_like(ends), ends - d, ends], axis=1).astype(np.uint64)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        re.search(r"layer_(\d+)", str(self.path))
        file, start, stop = self.index[i]
        parts = [torch.tensor(self.maps[file][start:stop])[None]]
        return {"activations": torch.cat(parts, dim=-1).view(torch.bfloat16).float()}


def loader(items: Dataset[Item], epochs: int, collate: Callable[[list[Item]], Tensor]) -> Iterator[Tensor]:
    for epoch in range(epochs):
        shuffle = torch.Generator().manual_seed(epoch)
        yield from DataLoader(items, BATCH, shuffle=True, generator=shuffle, collate_fn=collate)


def item_loader(data: Data, epochs: int) -> Iterator[Tensor]:
    items = OneRowAnItem(data.memmap, data.rows.shape[1])
    return loader(items, epochs, lambda rows: data.normalise(torch.stack(rows)))


def released_loader(data: Data, epochs: int) -> Iterator[Tensor]:
    def collate(rows: list[dict[str, Tensor]]) -> Tensor:
        return data.normalise(torch.stack([row["activations"] for row in rows]))[:, 0]

    items: ConcatDataset[dict[str, Tensor]] = ConcatDataset([ReleasedItems(data.memmap, data.rows.shape[1])])
    return loader(items, epochs, collate)


def h5py_fancy(data: Data, epochs: int) -> Iterator[Tensor]:
    """Each batch's rows by h5py index lists, which must be sorted."""
    store, (n, d) = data.store, data.rows.shape
    bounds = np.cumsum([0, *(shard.rows for shard in store.manifest.shards)])
    files = [h5py.File(store.path / shard.name) for shard in store.manifest.shards]
    for epoch in range(epochs):
        order = np.random.default_rng(epoch).permutation(n)
        for at in range(0, n, BATCH):
            places = order[at : at + BATCH]
            sort = np.argsort(places)
            cuts = np.searchsorted(places[sort], bounds)
            bits = np.empty((len(places), d), np.uint16)
            for k, file in enumerate(files):
                wanted = sort[cuts[k] : cuts[k + 1]]
                bits[wanted] = file["x"][places[wanted] - bounds[k]]
            yield data.normalise(torch.from_numpy(bits).view(torch.bfloat16))
    for file in files:
        file.close()


def in_order(data: Data, epochs: int) -> Iterator[Tensor]:
    """Normalised batches without shuffling."""
    d = data.rows.shape[1]
    out, scale = torch.empty(BATCH, d), 1 / data.std
    for batch in sequential(data, epochs):
        yield out[: len(batch)].copy_(batch).sub_(data.mean).mul_(scale)


def sequential(data: Data, epochs: int) -> Iterator[Tensor]:
    """Nothing but `readinto` of the rows' bytes, 4096 rows at a time into the same buffer: as fast as reading gets."""
    d = data.rows.shape[1]
    buffer = np.empty((BATCH, d), np.int16)
    rows = torch.from_numpy(buffer).view(torch.bfloat16)
    for _ in range(epochs):
        with data.memmap.open("rb", buffering=0) as file:
            while size := file.readinto(buffer.data.cast("B")):
                yield rows[: size // (2 * d)]


@dataclass(frozen=True)
class Way:
    """How to read, and how much of it is timed: whole epochs, or only the first batches where it is slow."""

    read: Callable[[Data, int], Iterator[Tensor]]
    epochs: int = 1
    batches: int | None = None
    rounds: int = 3
    shuffled: bool = True
    normalised: bool = True


WAYS = {
    OURS: Way(ours, epochs=8, rounds=5),
    "memmap, the released code's loader": Way(released_loader, batches=10),
    "memmap, a DataLoader of one row an item": Way(item_loader, batches=15),
    "h5py index lists": Way(h5py_fancy, batches=15),
    "batches in stored order, normalised": Way(in_order, epochs=4, rounds=7, shuffled=False),
    "readinto of the bytes (ceiling)": Way(sequential, epochs=4, rounds=7, shuffled=False, normalised=False),
}


@pytest.mark.parametrize("name", WAYS)
def test_batches(name: str, data: Data, timed: Timed) -> None:
    way, (n, d) = WAYS[name], data.rows.shape

    def read() -> int:
        return sum(len(batch) for batch in itertools.islice(way.read(data, way.epochs), way.batches))

    amount = way.batches * BATCH if way.batches else way.epochs * n
    work = f"shuffled batches of 4096 rows, d = {d}"
    assert timed(work, name, read, amount=amount, unit="rows", rounds=way.rounds) == amount

    seen, place = torch.zeros(n, dtype=torch.int64), 0
    for batch in itertools.islice(way.read(data, 1), way.batches):
        digits = batch[:, :3].long()
        index = digits[:, 0] * BASE**2 + digits[:, 1] * BASE + digits[:, 2]
        expected = data.normalise(data.rows[index]) if way.normalised else data.rows[index]
        torch.testing.assert_close(batch, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(index, torch.arange(place, place + len(batch))) != way.shuffled
        seen[index] += 1
        place += len(batch)
    assert int(seen.max()) == 1
    assert int(seen.sum()) == (way.batches * BATCH if way.batches else n)
