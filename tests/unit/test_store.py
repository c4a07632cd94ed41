"""A store gives back what was written, and a damaged or foreign one is refused with one line."""

import json
import os

import h5py
import numpy as np
import pytest
import torch
import xxhash

from glp_lens.activations import ActivationStore, describe_store, write_store
from glp_lens.activations.manifest import MANIFEST
from glp_lens.errors import InputError
from glp_lens.types import DTYPES
from tests.conformance import MODES

N, D = 1001, 24


@pytest.fixture
def x():
    return torch.randn(N, D, generator=torch.Generator().manual_seed(0)) * 3 + 50


@pytest.fixture
def columns():
    return {
        "token_id": np.arange(N) % 91,
        "doc_id": np.uint64(2**63) + np.arange(N, dtype=np.uint64) // 17,
        "position": np.arange(N) % 17 + 1,
    }


@pytest.fixture
def store(tmp_path, x, columns):
    return write_store(
        tmp_path / "s", x, hook="blocks.1.hook_resid_post", dtype="bfloat16", columns=columns, shard_rows=300
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rows_come_back_bit_for_bit(tmp_path, x, dtype):
    store = write_store(tmp_path / "s", x, hook="h", dtype=dtype, shard_rows=256)
    assert torch.equal(store.rows(dtype=DTYPES[dtype]), x.to(DTYPES[dtype]))
    assert store.rows().dtype == torch.float32
    assert torch.equal(store.rows(250, 530), x.to(DTYPES[dtype]).float()[250:530])
    assert store.rows(5, 5).shape == (0, D)
    assert store.rows(N - 2, N + 100).shape == (2, D)


@pytest.mark.parametrize("mode", MODES)
def test_stores_do_not_depend_on_the_callers_modes(tmp_path, x, mode):
    with MODES[mode]():
        store = write_store(tmp_path / "s", x.clone(), hook="h", shard_rows=300)
        stats, got = store.stats, torch.cat(list(store.batches(77, epochs=1, drop_last=False)))
        drawn = store.sample(5, seed=3)
    for value, want in ((stats.mean, x.double().mean(0)), (stats.var, x.double().var(0, correction=0))):
        torch.testing.assert_close(value, want, rtol=1e-6, atol=0)  # float64 too
    assert stats.mean_norm == pytest.approx(float(x.double().norm(dim=1).mean()), rel=1e-6)
    order = torch.from_numpy(np.lexsort(got.numpy().T[::-1])), torch.from_numpy(np.lexsort(x.numpy().T[::-1]))
    assert torch.equal(got[order[0]], x[order[1]])
    assert torch.equal(drawn, x[torch.from_numpy(store.sample_index(5, seed=3))])


def test_columns_and_statistics_are_those_of_the_rows(store, x, columns):
    for name, values in columns.items():
        np.testing.assert_array_equal(store.column(name), values)
    assert store.column("doc_id").dtype == np.uint64
    kept = x.bfloat16().double().numpy()
    norms = np.linalg.norm(kept, axis=1)
    np.testing.assert_allclose(store.column("norm"), norms, rtol=1e-6)
    np.testing.assert_allclose(store.stats.mean, kept.mean(0), rtol=1e-9)
    np.testing.assert_allclose(store.stats.var, kept.var(0), rtol=1e-6)
    assert store.stats.count == len(store) == N
    assert store.stats.mean_norm == pytest.approx(norms.mean())
    assert store.median_norm == pytest.approx(np.median(norms), rel=1e-6)
    with pytest.raises(InputError, match="no column"):
        store.column("label")


def test_rows_are_taken_in_any_order_across_shards(store, x):
    index = np.array([1000, 0, 299, 300, 0, 899, 900, 17])
    assert torch.equal(store.take(index), x.bfloat16().float()[index])
    assert store.take(np.array([], dtype=int)).shape == (0, D)
    for bad in ([N], [-1]):
        with pytest.raises(InputError, match="row indices"):
            store.take(np.array(bad))


def test_samples_are_distinct_rows_chosen_by_the_seed(store):
    index = store.sample_index(400, seed=3)
    assert len(np.unique(index)) == 400
    assert torch.equal(store.sample(400, seed=3), store.take(index))
    assert not np.array_equal(index, store.sample_index(400, seed=4))
    assert sorted(store.sample_index(5000, seed=0)) == list(range(N))


def test_batches_give_every_row_once(store):
    found = torch.cat(list(store.batches(90, epochs=1, drop_last=False)))
    want = store.rows()
    assert torch.equal(found.sort(0).values, want.sort(0).values)
    assert not torch.equal(found, want)
    resumed = next(iter(store.batches(90, seed=1, start_batch=4)))
    assert torch.equal(resumed, list(store.batches(90, seed=1, epochs=1))[4])


def test_order_does_not_depend_on_the_shards(tmp_path, store, x):
    one = write_store(tmp_path / "one", x, hook="h", dtype="bfloat16", shard_rows=10_000)
    assert len(one.manifest.shards) == 1
    assert len(store.manifest.shards) == 4
    assert torch.equal(next(iter(one.batches(333))), next(iter(store.batches(333))))


def test_a_shard_is_plain_hdf5_with_checksums(store, x):
    shard = store.manifest.shards[1]
    path = store.path / shard.name
    assert xxhash.xxh3_128_hexdigest(path.read_bytes()) == shard.xxh3_128
    with h5py.File(path) as file:
        bits = file["x"][()]
        assert file["x"].attrs["dtype"] == "bfloat16"
        assert bits.dtype == np.uint16
        assert file["block_xxh3"][1] == xxhash.xxh3_64_intdigest(bits[256:].tobytes())
        np.testing.assert_allclose(file["stats/mean"], x[300:600].bfloat16().double().mean(0), rtol=1e-9)
    np.testing.assert_array_equal(bits.astype(np.uint32) << 16, x[300:600].bfloat16().float().numpy().view(np.uint32))


def test_large_rows_begin_at_a_page(tmp_path):
    store = write_store(tmp_path / "s", torch.randn(1000, 33), hook="h")
    with h5py.File(store.path / store.manifest.shards[0].name) as file:
        assert file["x"].id.get_offset() % 4096 == 0


def test_writing_over_something_is_refused(tmp_path, store, x):
    with pytest.raises(InputError, match="not empty"):
        write_store(store.path, x, hook="h")
    with pytest.raises(InputError, match="not finite in float16"):
        write_store(tmp_path / "f16", x * 1e5, hook="h", dtype="float16")
    with pytest.raises(InputError, match="dtype 'int8'"):
        write_store(tmp_path / "i8", x, hook="h", dtype="int8")
    with pytest.raises(InputError, match="needs rows"):
        write_store(tmp_path / "none", x[:0], hook="h")


def test_no_store_several_stores_and_foreign_folders(tmp_path, store):
    with pytest.raises(InputError, match="no activation store"):
        ActivationStore.open(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"holds 1 stores, open one of: s"):
        ActivationStore.open(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / MANIFEST).write_text('{"a": 1}')
    with pytest.raises(InputError, match="not the manifest of an activation store"):
        ActivationStore.open(tmp_path / "other")


def _edit(store, change):
    path = store.path / MANIFEST
    value = json.loads(path.read_text())
    del value["glp_lens"]  # as of a store of an earlier version, whose manifest has no digest
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=99), "format version 99"),
        (lambda m: m.pop("hook"), "damaged manifest"),
        (lambda m: m.update(rows=7), "damaged manifest"),
        (lambda m: m["shards"][0].update(index="../../etc/passwd"), "damaged manifest"),
        (lambda m: m["shards"][0].update(name="../../etc/passwd"), "damaged manifest"),
        (lambda m: m["shards"][0].update(rows="300"), "damaged manifest"),
        (lambda m: m["shards"][0].update(rows=299, bytes=m["shards"][0]["bytes"]) or m.update(rows=1000), "/x is not"),
        (lambda m: m.update(d_in=25), "belongs to another store"),
        (lambda m: m["labels"].update(x="int64"), "damaged manifest"),
        (lambda m: m.update(complete=False), "interrupted after 1,001 rows"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(store, change, message):
    _edit(store, change)
    with pytest.raises(InputError, match=message) as caught:
        ActivationStore.open(store.path)
    assert "\n" not in str(caught.value)


def test_a_manifest_that_was_changed_is_refused_and_one_without_a_digest_read(store, recwarn):
    path = store.path / MANIFEST
    whole = path.read_bytes()
    for byte in range(0, len(whole), 97):
        path.write_bytes(whole[:byte] + bytes([whole[byte] ^ 4]) + whole[byte + 1 :])
        with pytest.raises(InputError, match="activation store|digest"):
            ActivationStore.open(store.path)
    path.write_bytes(whole)
    _edit(store, lambda m: None)
    assert len(ActivationStore.open(store.path)) == N
    assert not [warning for warning in recwarn if "unchecked" in str(warning.message)]


def test_an_interrupted_store_opens_when_asked_to(store):
    _edit(store, lambda m: m.update(complete=False))
    assert len(ActivationStore.open(store.path, partial=True)) == N


def test_truncation_after_opening_is_one_clear_line(store):
    os.truncate(store.path / store.manifest.shards[3].name, 100)
    with pytest.raises(InputError, match="ends before its last row"):
        store.rows()


def test_provenance_and_description_can_be_written_as_json(tmp_path, x):
    x[:, 3] = 7.0
    x[:, 5] = 5000.0 + x[:, 5]
    store = write_store(tmp_path / "s", x, hook="h", max_norm=9e9, source={"corpus": {"name": "mine"}})
    about = store.provenance()
    assert (about["hook"], about["d_in"], about["rows"], about["max_norm"]) == ("h", D, N, 9e9)
    assert about["corpus"]["name"] == "mine"
    found = json.loads(json.dumps(describe_store(store)))
    assert found["dead_dims"] == [3]
    assert found["massive_dims"] == [5]
    assert found["bytes"] == sum(file.stat().st_size for file in store.path.glob("*.h5"))
    norms = x.double().norm(dim=1).numpy()
    assert found["norm_quantiles"]["0.99"] == pytest.approx(np.quantile(norms, 0.99), rel=1e-6)


def test_quantiles_of_the_distance_from_the_mean_see_no_constant_dimension(tmp_path, store, x):
    rows = store.rows().double()
    distances = (rows - rows.mean(0)).norm(dim=1).numpy()
    for q in (0.0, 0.1, 0.99, 1.0):
        assert store.centred_norm_quantile(q) == pytest.approx(np.quantile(distances, q), rel=1e-5)
    assert store.median_centred_norm == store.centred_norm_quantile(0.5)
    assert store.median_norm > 5 * store.median_centred_norm  # the mean is far from 0
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match="from 0 to 1"):
            store.centred_norm_quantile(wrong)


def test_of_a_large_store_quantiles_are_those_of_a_fixed_sample(tmp_path):
    x = torch.randn(40_000, 3, generator=torch.Generator().manual_seed(1)) + 100
    path = write_store(tmp_path / "large", x, hook="h", dtype="float32").path
    found = [ActivationStore.open(path).centred_norm_quantile(q) for q in (0.5, 0.95)]
    assert found == [ActivationStore.open(path).centred_norm_quantile(q) for q in (0.5, 0.95)]
    assert found == pytest.approx(np.sqrt([2.366, 7.815]), rel=0.03)  # of chi-square with 3 degrees of freedom


@pytest.mark.parametrize(
    ("columns", "labels"),
    [({"token_id": [-1]}, {}), ({"position": [2**33]}, {}), ({"y": [0.7]}, {"y": "int64"}), ({"doc_id": [1.5]}, {})],
)
def test_columns_are_never_wrapped_or_cut(tmp_path, columns, labels):
    values = {name: np.array(value) for name, value in columns.items()}
    with pytest.raises(InputError, match="cannot keep, such as"):
        write_store(tmp_path / "s", torch.ones(1, 3), hook="h", columns=values, labels=labels)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(examples=[3]),
        lambda m: m.update(window="2"),
        lambda m: m["shards"][0].update(documents_hash=7),
        lambda m: m["shards"][0].update(excluded={"bos": "many"}),
    ],
)
def test_a_manifest_of_odd_types_is_refused(store, change):
    _edit(store, change)
    with pytest.raises(InputError, match="damaged manifest"):
        ActivationStore.open(store.path)
