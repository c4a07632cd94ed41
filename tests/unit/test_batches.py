"""Shuffled batches: every row once an epoch, the same again from the same seed, and from any batch on."""

import gc
import itertools
import json
import threading
import tracemalloc

import numpy as np
import pytest
import torch

from glp_lens.activations.batches import Batches, permutation, window_rows
from glp_lens.errors import InputError

N, D = 1003, 3


class ArrayRows:
    """Rows in memory, as a store would read them; counts the rows read."""

    def __init__(self, x):
        self.x, self.shape, self.dtype, self.n_read = x, x.shape[1:], x.dtype, 0

    def __len__(self):
        return len(self.x)

    def read(self, starts, stops, out):
        self.n_read += len(out)
        return np.concatenate([self.x[a:b] for a, b in zip(starts, stops, strict=True)], out=out)


def numbered(n=N):
    """Rows that hold their own index."""
    return ArrayRows(np.arange(n, dtype=np.float32)[:, None].repeat(D, 1))


def batches(batch_size, n=N, block=8, window=160, **options):
    return Batches(numbered(n), batch_size, block=block, window=window, **options)


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
def test_starting_at_a_batch_gives_the_same_batches(start):
    whole = list(itertools.islice(batches(77, seed=5), 40))
    rest = list(itertools.islice(batches(77, seed=5, start_batch=start), 40 - start))
    assert all(torch.equal(a, b) for a, b in zip(whole[start:], rest, strict=True))


def test_a_late_start_does_not_read_what_lies_before():
    rows = numbered()
    next(Batches(rows, 7, block=8, window=160, epochs=1, start_batch=140)).sum()
    assert rows.n_read < 160  # the last window is a short one


def test_resuming_a_finite_run_ends_where_the_whole_one_ends():
    whole = indices(batches(77, epochs=2, drop_last=False))
    assert indices(batches(77, epochs=2, drop_last=False, start_batch=20)) == whole[20:]
    assert indices(batches(77, epochs=2, start_batch=10_000)) == []


@pytest.mark.parametrize("taken", [0, 1, 13, 26])
def test_a_saved_state_goes_on_bit_for_bit(taken):
    whole = batches(77, epochs=3, seed=5, fingerprint="abc")
    for _ in range(taken):
        next(whole)
    state = json.loads(json.dumps(whole.state_dict()))
    assert (state["epoch"], state["rows_emitted"]) == divmod(taken * 77, N)
    resumed = batches(77, epochs=3, seed=5, fingerprint="abc")
    next(resumed)
    resumed.load_state_dict(state)
    assert resumed.next_batch == taken
    assert indices(resumed) == indices(whole)


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"fingerprint": "b"}, {"n": 1004}, {"batch_size": 78}, {"block": 4}, {"window": 320}]
)
def test_a_state_of_another_stream_is_refused_in_one_line(other):
    state = batches(77, fingerprint="a").state_dict()
    with pytest.raises(InputError, match="instead of") as error:
        batches(**({"batch_size": 77, "fingerprint": "a"} | other)).load_state_dict(state)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError):
        batches(77).load_state_dict({})


@pytest.mark.parametrize("drop_last", [True, False])
def test_ranks_share_the_batches_of_one_process(drop_last):
    options = {"epochs": 2, "seed": 3, "drop_last": drop_last}
    whole = indices(batches(60, **options))
    ranks = [indices(batches(20, rank=rank, world_size=3, **options)) for rank in range(3)]
    together = [list(itertools.chain(*parts)) for parts in itertools.zip_longest(*ranks, fillvalue=[])]
    assert together == whole
    assert all(len(batch) == 20 for batch in itertools.chain(*ranks)) == drop_last


def test_a_state_may_be_shared_by_ranks_and_continued_by_more_of_them():
    one = batches(60, seed=3)
    for _ in range(20):
        next(one)
    parts = []
    for rank in range(4):
        part = batches(15, seed=3, rank=rank, world_size=4)
        part.load_state_dict(one.state_dict())
        parts.append(next(part))
    assert torch.equal(torch.cat(parts), next(one))


@pytest.mark.parametrize("every", [2, 3, 17])
def test_takers_of_every_nth_batch_share_the_stream(every):
    options = {"epochs": 4, "drop_last": False}
    whole = indices(batches(50, **options))
    parts = [indices(batches(50, start_batch=k, every=every, **options)) for k in range(every)]
    assert [batch for row in itertools.zip_longest(*parts) for batch in row if batch is not None] == whole


def test_windows_without_own_rows_are_not_read():
    rows = numbered()
    assert len(list(Batches(rows, 20, block=8, window=40, epochs=2, every=10))) == 10
    assert rows.n_read <= 10 * 2 * 40  # of 2006: a batch can lie across two windows


def test_seed_decides_the_order():
    def first(seed):
        return next(batches(50, seed=seed)).tolist()

    assert first(1) == first(1)
    assert first(1) != first(2)


def test_the_stream_is_a_known_function_of_its_seed():
    # Philox's raw stream is promised by NumPy; these numbers must never change, or resumed runs would.
    assert permutation(6, seed=3, epoch=1, window=2).tolist() == [2, 1, 3, 0, 5, 4]
    assert permutation(6, seed=3, epoch=2, window=1).tolist() != [2, 1, 3, 0, 5, 4]
    assert indices(itertools.islice(batches(5, n=23, block=4, window=8, seed=7), 5)) == [
        [16, 5, 19, 17, 6],
        [4, 7, 18, 11, 15],
        [14, 10, 9, 8, 12],
        [13, 22, 1, 20, 3],
        [2, 21, 0, 20, 8],
    ]


def test_batches_longer_than_the_store_and_an_endless_stream():
    found = indices(itertools.islice(batches(50, n=20), 3))
    assert [len(batch) for batch in found] == [50, 50, 50]
    rows = list(itertools.chain(*found))
    assert all(sorted(rows[epoch * 20 : epoch * 20 + 20]) == list(range(20)) for epoch in range(7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_come_out_as_float32_and_normalised(dtype):
    x = (3 * torch.randn(N, D, generator=torch.Generator().manual_seed(0)) + 5).to(dtype)
    stored = x.view(torch.uint16) if dtype == torch.bfloat16 else x
    mean, std = x.double().mean(0), x.double().std(0)
    options = {"block": 8, "window": 160, "epochs": 1, "drop_last": False}
    plain = torch.cat(list(Batches(ArrayRows(stored.numpy()), 50, **options)))
    order = list(itertools.chain(*indices(batches(50, epochs=1, drop_last=False))))
    assert plain.dtype == torch.float32
    assert torch.equal(plain, x[order].float())
    z = torch.cat(list(Batches(ArrayRows(stored.numpy()), 50, normalize=(mean, std), **options)))
    torch.testing.assert_close(z.double(), (x[order].double() - mean) / std, rtol=1e-5, atol=1e-6)


def test_large_batches_are_made_in_pieces(monkeypatch):
    monkeypatch.setattr("glp_lens.activations.batches._PIECE_BYTES", 7 * D * 4)
    assert sorted(itertools.chain(*indices(batches(100, epochs=1, drop_last=False)))) == list(range(N))


def test_a_batch_stays_what_it_was_as_long_as_anything_refers_to_it():
    expected = [batch.tolist() for batch in itertools.islice(batches(40), 30)]
    stream, kept = batches(40), []
    for k in range(30):
        batch = next(stream)
        kept.append([batch, batch[3:].t(), batch.numpy()[1:], batch.detach().flatten()][k % 4])
        del batch
    for k, (view, numbers) in enumerate(zip(kept, expected, strict=True)):
        rows = np.array(numbers, np.float32)
        want = [rows, rows[3:].T, rows[1:], rows.ravel()][k % 4]
        np.testing.assert_array_equal(np.asarray(view), want)


def test_batches_made_in_inference_mode_are_the_same():
    with torch.inference_mode():
        found = indices(batches(40, epochs=1, normalize=(torch.zeros(D), torch.ones(D))))
    assert found == indices(batches(40, epochs=1))


def test_the_memory_of_dropped_batches_is_used_again():
    stream, places = batches(40), []
    for _ in range(20):
        batch = next(stream)
        places.append(batch.data_ptr())
    assert len(set(places)) <= 5


def correlated(n, d, document=100, share=0.1):
    """Rows of documents: a share of the variance is common to the rows of a document."""
    generator = np.random.default_rng(0)
    common = generator.standard_normal((-(-n // document), d), dtype=np.float32).repeat(document, 0)[:n]
    own = generator.standard_normal((n, d), dtype=np.float32)
    return np.sqrt(share) * common + np.sqrt(1 - share) * own


@pytest.fixture(scope="module")
def documents():
    return correlated(1_000_003, 16)


def mixing(x, **options):
    """(variance of the batch mean against that of independent rows, its lag-1 correlation)."""
    b = 4096
    means = torch.stack([batch.mean(0) for batch in Batches(ArrayRows(x), b, epochs=2, **options)]).double()
    means -= torch.from_numpy(x.mean(0, dtype=np.float64))
    variance = means.square().mean(0)
    lag = (means[1:] * means[:-1]).mean(0) / variance
    return float((variance * b / torch.from_numpy(x.var(0, dtype=np.float64))).mean()), float(lag.mean())


def test_batches_are_mixed_nearly_as_well_as_by_a_global_permutation(documents):
    # 488 means of 16 numbers: a standard error of 0.016 for the variance and 0.011 for the correlation.
    variance, lag = mixing(documents)
    assert variance == pytest.approx(1.07, abs=0.08)
    assert abs(lag) < 0.12


def test_large_blocks_in_a_small_window_mix_worse(documents):
    variance, lag = mixing(documents, block=256, window=65_536)
    assert variance > 1.3
    assert lag > 0.25


class HugeRows:
    """Rows that cost nothing to have; notes which memory they are read into."""

    shape, dtype = (64,), np.dtype(np.float32)

    def __init__(self, n):
        self.n, self.buffers = n, {}

    def __len__(self):
        return self.n

    def read(self, starts, stops, out):
        self.buffers[out.ctypes.data] = max(out.nbytes, self.buffers.get(out.ctypes.data, 0))
        out[:] = 0
        return out


def memory_for(n):
    """(bytes of windows, bytes of all else that Python and NumPy took) to read 10 windows of `n` rows."""
    rows, window = HugeRows(n), 32_768
    tracemalloc.start()
    try:
        assert sum(len(x) for x in itertools.islice(Batches(rows, 1000, window=window), 320)) == 320_000
        return list(rows.buffers.values()), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_is_two_windows_whatever_the_size_of_the_store():
    window = 32_768 * 64 * 4
    (small, small_rest), (large, large_rest) = memory_for(500_000), memory_for(20_000_000)
    assert small == large == [window, window]
    assert small_rest < window / 2
    assert large_rest - small_rest < 40 * 20_000_000 / 64  # a few numbers a block


def test_the_threads_end_with_the_iterator():
    before = set(threading.enumerate())
    started = lambda: set(threading.enumerate()) - before  # noqa: E731
    stream = batches(50)
    assert not started()
    first = next(stream)
    assert started()
    stream.close()
    assert not started()
    assert not torch.equal(next(stream), first)  # it goes on
    del stream
    gc.collect()
    assert not started()
    list(batches(50, epochs=2))
    assert not started()


def test_an_error_of_the_reader_ends_the_threads_and_loses_no_batch():
    rows = numbered()
    read, fails = rows.read, iter([False, False, True])

    def unreliable(*arguments):
        if next(fails, False):
            raise InputError("gone")
        return read(*arguments)

    rows.read = unreliable
    before = set(threading.enumerate())
    stream, found = Batches(rows, 50, block=8, window=160, epochs=1), []
    with pytest.raises(InputError, match="gone"):
        found.extend(batch[:, 0].long().tolist() for batch in stream)
    assert not set(threading.enumerate()) - before
    assert found
    assert found + indices(stream) == indices(batches(50, epochs=1))


def test_windows_are_capped_by_bytes():
    assert window_rows(1152) == 262_144
    assert window_rows(1 << 20) == 512
    assert window_rows(1 << 40) == 64


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"start_batch": -1}, {"epochs": 0}, {"batch_size": 2007, "epochs": 2},
                {"batch_size": 1004, "world_size": 2, "epochs": 2}, {"rank": 2, "world_size": 2}, {"rank": -1},
                {"every": 0}, {"block": 0}, {"window": 0}, {"n": 0},
                {"normalize": (torch.zeros(D), torch.zeros(D))}, {"normalize": (torch.zeros(D + 1), torch.ones(D))},
                {"normalize": (torch.full((D,), torch.nan), torch.ones(D))}]
)  # fmt: skip
def test_bad_arguments_are_refused_before_the_first_batch(options):
    with pytest.raises(InputError) as error:
        batches(**({"batch_size": 4} | options))
    assert "\n" not in str(error.value)


def test_the_trainer_of_sae_lens_takes_them_as_its_data_provider():
    pytest.importorskip("sae_lens")
    from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    x = np.random.default_rng(0).standard_normal((N, 6), dtype=np.float32)
    stream = Batches(ArrayRows(x), 25, block=8, window=160)
    sae = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=6, d_sae=11))
    config = SAETrainerConfig(
        total_training_samples=500, train_batch_size_samples=25, lr=1e-3, lr_end=1e-4, device="cpu", autocast=False
    )
    before = sae.W_enc.detach().clone()
    SAETrainer(cfg=config, sae=sae, data_provider=stream).fit()
    stream.close()
    assert not torch.equal(sae.W_enc, before)
    assert stream.next_batch == 20
