"""Shuffled batches: every row once an epoch, the same again from the same seed, and from any batch on."""

import itertools

import numpy as np
import pytest
import torch

from glp_lens.activations.batches import permutation, shuffled_batches, window_rows
from glp_lens.errors import InputError

N, D = 1003, 3


def batches(batch_size, n=N, block=8, window=160, **options):
    """Batches of rows that hold their own index."""
    x = torch.arange(n)[:, None].repeat(1, D).to(torch.bfloat16 if n < 256 else torch.float32)

    def read(starts, stops):
        return torch.cat([x[a:b] for a, b in zip(starts, stops, strict=True)])

    return shuffled_batches(n, D, read, batch_size, block=block, window=window, **options)


def indices(stream):
    return [batch[:, 0].long().tolist() for batch in stream]


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1003, 5000])
def test_every_row_comes_once_an_epoch(batch_size):
    found = indices(batches(batch_size, epochs=1, drop_last=False))
    assert sorted(itertools.chain(*found)) == list(range(N))
    assert all(len(batch) == batch_size for batch in found[:-1])


def test_epochs_run_into_each_other_and_only_the_very_last_batch_is_dropped():
    found = indices(batches(100, epochs=3))
    assert [len(batch) for batch in found] == [100] * (3 * N // 100)
    rows = list(itertools.chain(*found))
    for epoch in range(2):
        assert sorted(rows[epoch * N : (epoch + 1) * N]) == list(range(N))
    assert rows[:N] != rows[N : 2 * N]


@pytest.mark.parametrize("start", [1, 2, 3, 9, 13, 14, 29, 30])
def test_resuming_at_a_batch_gives_the_same_batches(start):
    whole = list(itertools.islice(batches(77, seed=5), 40))
    rest = list(itertools.islice(batches(77, seed=5, start_batch=start), 40 - start))
    assert all(torch.equal(a, b) for a, b in zip(whole[start:], rest, strict=True))


def test_resuming_a_finite_run_ends_where_the_whole_one_ends():
    whole = indices(batches(77, epochs=2, drop_last=False))
    assert indices(batches(77, epochs=2, drop_last=False, start_batch=20)) == whole[20:]
    assert indices(batches(77, epochs=2, start_batch=10_000)) == []


def test_seed_decides_the_order():
    def first(seed):
        return next(iter(batches(50, seed=seed))).tolist()

    assert first(1) == first(1)
    assert first(1) != first(2)


def test_batches_longer_than_the_store_and_an_endless_stream():
    found = indices(itertools.islice(batches(50, n=20), 3))
    assert [len(batch) for batch in found] == [50, 50, 50]
    rows = list(itertools.chain(*found))
    assert all(sorted(rows[epoch * 20 : epoch * 20 + 20]) == list(range(20)) for epoch in range(7))


def test_bfloat16_rows_come_out_as_float32():
    batch = next(iter(batches(50, n=200)))
    assert batch.dtype == torch.float32
    assert batch.shape == (50, D)


def test_rows_of_a_document_are_spread_over_batches():
    # 40 neighbouring rows share a value, as tokens of a document do. Means of batches must vary as those of
    # independent rows; in stored order their variance is 40 times as large.
    n, b = 40_000, 100
    values = np.repeat(np.random.default_rng(0).standard_normal(n // 40), 40)
    found = indices(batches(b, n=n, block=4, window=20_000, epochs=1))
    means = np.array([values[batch].mean() for batch in found])
    assert means.var() / (values.var() / b) == pytest.approx(1, abs=0.3)
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.15


def test_permutation_is_a_known_function_of_its_key():
    # Philox's raw stream is promised by NumPy; these numbers must never change, or resumed runs would.
    known = [2, 1, 3, 0, 5, 4]
    assert permutation(6, seed=3, epoch=1, window=2).tolist() == known
    assert permutation(6, seed=3, epoch=2, window=1).tolist() != known


def test_windows_are_capped_by_bytes():
    assert window_rows(1152) == 262_144
    assert window_rows(1 << 20) == 512
    assert window_rows(1 << 40) == 64


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"batch_size": 4, "start_batch": -1}, {"batch_size": 4, "epochs": 0},
                {"batch_size": 2007, "epochs": 2}]
)  # fmt: skip
def test_bad_sizes_are_refused_before_the_first_batch(options):
    with pytest.raises(InputError):
        batches(**options)
