"""The store as a torch dataset: a DataLoader gives the plain iterator's batches, whatever its workers."""

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from glp_lens.activations import ActivationStore, write_store
from glp_lens.activations.torch_data import StoreDataset
from glp_lens.errors import InputError

N, D = 1003, 5


@pytest.fixture
def path(tmp_path):
    x = torch.arange(N)[:, None].float().repeat(1, D)
    write_store(tmp_path / "s", x, hook="h", dtype="float32", shard_rows=300)
    return tmp_path / "s"


def indices(stream):
    return [batch[:, 0].long().tolist() for batch in stream]


def plain(path, batch_size=50, **options):
    return indices(ActivationStore.open(path).batches(batch_size, **options))


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("options", [{"epochs": 2}, {"epochs": 1, "drop_last": False, "start_batch": 4}])
def test_a_loader_gives_the_plain_order(path, workers, options):
    dataset = StoreDataset(path, 50, seed=3, **options)
    loader = DataLoader(dataset, batch_size=None, num_workers=workers)
    assert indices(loader) == plain(path, seed=3, **options)


def test_an_opened_store_is_as_good_as_its_folder(path):
    dataset = StoreDataset(ActivationStore.open(path), 50, epochs=1)
    assert len(pickle.dumps(dataset)) < 1000
    assert indices(DataLoader(dataset, batch_size=None, num_workers=2)) == plain(path, epochs=1)
    with pytest.raises(InputError, match="path must be .* or an ActivationStore, got a Tensor"):
        StoreDataset(torch.zeros(3, 2), 50)


def test_spawned_workers_open_the_store_for_themselves(path):
    dataset = StoreDataset(path, 50, epochs=1, normalize=(torch.full((D,), 500.0), torch.full((D,), 250.0)))
    assert len(pickle.dumps(dataset)) < 5000
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="spawn")
    x = torch.cat(list(loader))
    expected = torch.tensor([i for batch in plain(path, epochs=1) for i in batch])
    np.testing.assert_allclose(x[:, 0], (expected - 500) / 250, rtol=1e-5, atol=1e-6)


def test_ranks_share_the_batches(path):
    ranks = [indices(StoreDataset(path, 25, rank=rank, world_size=2, epochs=1)) for rank in range(2)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == plain(path, epochs=1)


def test_rank_and_world_size_come_from_the_process_group(path, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        dataset = StoreDataset(path, 50, epochs=1)
    finally:
        torch.distributed.destroy_process_group()
    assert indices(dataset) == plain(path, epochs=1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_from_a_state(path, workers):
    whole = plain(path, epochs=2)
    first = StoreDataset(path, 50, epochs=2, start_batch=3)
    second = StoreDataset(path, 50, epochs=2)
    second.load_state_dict(first.state_dict(8))
    assert indices(DataLoader(second, batch_size=None, num_workers=workers)) == whole[11:]
    with pytest.raises(InputError, match="seed"):
        StoreDataset(path, 50, epochs=2, seed=1).load_state_dict(first.state_dict(8))
