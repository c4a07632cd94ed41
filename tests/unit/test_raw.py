"""The identity model."""

import pytest
import torch

from glp_lens.errors import InputError
from glp_lens.models.raw import Raw
from tests.unit.memory_store import MemoryStore


@pytest.fixture(scope="module")
def x():
    return torch.arange(37 * 5, dtype=torch.float32).reshape(37, 5)


def test_every_role_gives_the_rows_back(x):
    model = Raw.fit(MemoryStore(x))
    for method in (model.encode, model.reconstruct, model.project):
        out = method(x[:7])
        assert torch.equal(out, x[:7])
        assert out.data_ptr() != x.data_ptr()


def test_samples_are_rows_of_the_store_and_reach_all_of_the_reservoir(x):
    model = Raw.fit(MemoryStore(x), n_rows=9)
    drawn = model.sample(2001, generator=torch.Generator().manual_seed(0))
    ids, counts = (drawn[:, 0] / 5).long().unique(return_counts=True)
    assert torch.equal(drawn, x[(drawn[:, 0] / 5).long()])
    assert sorted(ids.tolist()) == sorted((model.reservoir[:, 0] / 5).long().tolist())
    assert len(ids) == 9
    expected = 2001 / 9
    assert float(((counts - expected) ** 2 / expected).sum()) < 26.1  # chi-square, 8 degrees, p = .001


def test_extreme_noise_stays_within_the_reservoir(x):
    model = Raw.fit(MemoryStore(x), n_rows=9)
    noise = torch.tensor([[40.0], [-40.0]]).expand(2, 5)
    assert torch.equal(model.sample(2, noise=noise), model.reservoir[[8, 0]])


def test_reservoir_is_seeded(x):
    kept = [Raw.fit(MemoryStore(x), n_rows=9, seed=seed).reservoir for seed in (0, 0, 1)]
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])
    assert len(kept[0].unique(dim=0)) == 9


def test_refuses_an_empty_reservoir(x):
    with pytest.raises(InputError, match="n_rows"):
        Raw.fit(MemoryStore(x), n_rows=0)
