"""Import from and export to other formats, against readers and writers that are not ours."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from glp_lens.activations import write_store
from glp_lens.activations.convert import (
    export_arrays,
    export_memmap_layers,
    export_memmaps,
    export_sae_lens,
    import_arrays,
    import_memmap_layers,
    import_memmaps,
    import_sae_lens,
    memmaps,
    transfer,
)
from glp_lens.activations.store import ActivationStore
from glp_lens.errors import InputError

HOOK = "blocks.2.hook_resid_post"
ROWS, WIDTH = 211, 7
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that a few rows are many blocks."""
    monkeypatch.setattr(transfer, "BLOCK_BYTES", 13 * WIDTH * 4)


def rows(n=ROWS, seed=0, dtype="float32"):
    return (torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed)) * 3).to(DTYPES[dtype])


@pytest.fixture(params=DTYPES)
def store(request, tmp_path):
    generator = np.random.default_rng(1)
    documents = np.sort(generator.integers(0, 40, ROWS))
    columns = {
        "token_id": generator.integers(0, 50_000, ROWS),
        "doc_id": documents + 2**40,
        "position": np.arange(ROWS) - np.searchsorted(documents, documents) + 1,
        "sentiment": generator.normal(size=ROWS).astype(np.float32),
        "speaker": generator.integers(-3, 3, ROWS),
    }
    labels = {"sentiment": "float32", "speaker": "int64"}
    x = rows(dtype=request.param)
    return write_store(tmp_path / "store", [(x, columns)], hook=HOOK, dtype=request.param, labels=labels, shard_rows=64)


def exact(store: ActivationStore) -> torch.Tensor:
    return store.rows(dtype=DTYPES[store.dtype])


def same(store, expected, *names):
    """Whether rows are equal bit for bit, and these columns."""
    assert store.dtype == expected.dtype
    assert store.hook == expected.hook
    assert torch.equal(exact(store), exact(expected))
    for name in names:
        assert np.array_equal(store.column(name), expected.column(name)), name


def released_read(folder):
    """Every row of a GLP folder as float32, found the way its trainer finds them."""
    dtype = np.dtype((folder / "dtype.txt").read_text().strip())
    found = []
    for file, begin, end in np.load(folder / "data_indices.npy"):
        row = torch.tensor(np.memmap(folder / f"data_{file:04d}.npy", dtype=dtype, mode="r")[begin:end])
        found.append((row.view(torch.bfloat16) if row.dtype == torch.int16 else row).float())
    return torch.stack(found)


def released_write(folder, x, *, file_values=1 << 10, positions=None, documents=None):
    """Bfloat16 rows the way the GLP producer writes them: files of fixed size, filled row by row."""
    folder.mkdir(parents=True)
    index, files, used = [], [], file_values
    for row in x.view(torch.int16).numpy():
        if used + len(row) > file_values:
            files.append(np.memmap(folder / f"data_{len(files):04d}.npy", np.int16, "w+", shape=file_values))
            used = 0
        files[-1][used : used + len(row)] = row
        index.append((len(files) - 1, used, used + len(row)))
        used += len(row)
    for file in files:
        file.flush()
    np.save(folder / "data_indices.npy", np.array(index, dtype=np.uint64))
    if positions is not None:
        (folder / "token_buffer.json").write_text(json.dumps(positions))
        (folder / "doc_buffer.json").write_text(json.dumps(documents))


def test_the_released_reader_finds_exported_rows_and_statistics(store, tmp_path, monkeypatch):
    monkeypatch.setattr(memmaps, "FILE_VALUES", 50 * WIDTH + 3)
    export_memmaps(store, tmp_path / "glp")

    assert len(list((tmp_path / "glp").glob("data_0*.npy"))) == 5
    assert torch.equal(released_read(tmp_path / "glp"), store.rows())
    statistics = torch.load(tmp_path / "glp" / "rep_statistics.pt", weights_only=True)
    torch.testing.assert_close(statistics["mean"], store.rows().double().mean(0).float())
    torch.testing.assert_close(statistics["var"], store.rows().double().var(0, correction=0).float())


def test_what_nothing_varied_in_can_be_divided_by(tmp_path):
    """The released trainer divides by the square root of the variance: 0 would be NaN there."""
    x = rows(dtype="bfloat16")
    x[:, 2] = 0.3
    export_memmaps(write_store(tmp_path / "store", x, hook=HOOK, dtype="bfloat16"), tmp_path / "glp")
    statistics = torch.load(tmp_path / "glp" / "rep_statistics.pt", weights_only=True)
    z = (released_read(tmp_path / "glp") - statistics["mean"]) / statistics["var"].sqrt()
    assert torch.equal(z[:, 2], torch.zeros(ROWS))
    torch.testing.assert_close(z.var(0, correction=0)[[0, 1, 3, 4, 5, 6]], torch.ones(6))


LAYERS = {layer: f"blocks.{layer}.hook_resid_post" for layer in (1, 3, 12)}


def layer_stores(folder, depth=None):
    source = {"model": {"name": "org/tiny"} | ({"n_layers": depth} if depth else {})}
    return {
        hook: write_store(folder / hook, rows(90 + n, n) * n + n, hook=hook, source=source)
        for n, hook in LAYERS.items()
    }


def released_layers(folder):
    """`(layer, normalised rows)` as the released trainer makes them of all folders that it is given."""
    statistics = torch.load(folder / "rep_statistics.pt", weights_only=True)
    for path in sorted(folder.glob("layer_*")):
        layer = int(re.search(r"layer_(\d+)", str(path))[1])
        yield layer, (released_read(path) - statistics["mean"][layer]) / torch.sqrt(statistics["var"][layer])


@pytest.mark.parametrize(("depth", "count"), [(None, 13), (16, 16)])
def test_the_released_trainer_finds_each_layers_statistics_by_its_number(depth, count, tmp_path):
    stores = layer_stores(tmp_path / "acts", depth)
    export_memmap_layers(dict(reversed(stores.items())), tmp_path / "glp")

    found = dict(released_layers(tmp_path / "glp"))
    assert list(found) == [1, 3, 12]
    for layer, z in found.items():
        x = stores[LAYERS[layer]].rows().double()
        want = (x - x.mean(0)) / x.std(0, correction=0)
        torch.testing.assert_close(z, want.float())
    statistics = torch.load(tmp_path / "glp" / "rep_statistics.pt", weights_only=True)
    for values in statistics.values():
        assert values.shape == (count, WIDTH)
        assert values.dtype == torch.float32
        assert values.isfinite().all(1).nonzero().flatten().tolist() == [1, 3, 12]
        assert values.isnan().any(1).sum() == count - 3
    back = import_memmap_layers(tmp_path / "glp", tmp_path / "back")
    assert all(torch.equal(back[hook].rows(), stores[hook].rows()) for hook in stores)


def test_stores_that_are_not_several_layers_are_refused(tmp_path):
    one, two, three = layer_stores(tmp_path / "acts").values()
    pre = write_store(tmp_path / "pre", rows(9), hook="blocks.5.hook_resid_pre")
    plain = write_store(tmp_path / "plain", rows(9), hook="embeddings")
    wide = write_store(tmp_path / "wide", torch.ones(3, 9), hook="blocks.5.hook_resid_post")
    other = write_store(
        tmp_path / "other", rows(9), hook="blocks.5.hook_resid_post", source={"model": {"name": "org/other"}}
    )
    for stores, words in (
        ([], "got none"),
        ([one], "several layers at one hook point, .* got blocks.1.hook_resid_post"),
        ([one, one], "several layers at one hook point"),
        ([one, pre], "several layers at one hook point"),
        ([plain, one], "several layers at one hook point"),
        ([one, wide], "expected stores of one width"),
        ([one, other], "expected stores of one language model"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            export_memmap_layers(stores, tmp_path / "glp")
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="takes the first layer_N in a path as the layer"):
        export_memmap_layers([two, three], tmp_path / "layer_7" / "glp")
    assert not (tmp_path / "glp").exists()


def test_only_the_bytes_of_rows_are_hashed(tmp_path):
    """The producer's files are mostly unused: 64 GiB of it would take minutes to read."""
    import xxhash

    x = rows(dtype="bfloat16")
    released_write(tmp_path / "glp", x)
    index, data = np.load(tmp_path / "glp" / "data_indices.npy"), sorted((tmp_path / "glp").glob("data_0*.npy"))
    want = xxhash.xxh3_128((tmp_path / "glp" / "data_indices.npy").read_bytes())
    for number, file in enumerate(data):
        want.update(file.read_bytes()[: 2 * int(index[index[:, 0] == number, 2].max())])

    def imported(name):
        store = import_memmaps(tmp_path / "glp", tmp_path / name, hook=HOOK)
        assert torch.equal(exact(store).view(torch.int16), x[: len(store)].view(torch.int16))
        return store.manifest.source["imported"]["hash"]

    assert imported("a") == want.hexdigest()
    for file in data:
        os.truncate(file, 1 << 36)
    assert imported("b") == want.hexdigest()
    x.view(torch.int16)[0, 3] ^= 1
    with data[0].open("r+b") as file:
        file.write(x[0].view(torch.int16).numpy().tobytes())
    assert imported("c") != want.hexdigest()


def test_rows_between_which_there_is_room_are_hashed_alone(tmp_path):
    """Also where the index leaves rows out, names one twice or has them in another order."""
    released_write(tmp_path / "glp", rows(dtype="bfloat16"))
    index = np.load(tmp_path / "glp" / "data_indices.npy")[[150, 9, 10, 9, 0]]
    np.save(tmp_path / "glp" / "data_indices.npy", index)
    hashes = set()
    for number in range(2):
        store = import_memmaps(tmp_path / "glp", tmp_path / str(number), hook=HOOK)
        assert torch.equal(exact(store), rows(dtype="bfloat16")[[150, 9, 10, 9, 0]])
        hashes.add(store.manifest.source["imported"]["hash"])
        values = np.memmap(tmp_path / "glp" / "data_0000.npy", np.int16, "r+")
        values[WIDTH : 9 * WIDTH] = values[11 * WIDTH : 140 * WIDTH] = 1
        values.flush()
    assert len(hashes) == 1


def test_memmaps_round_trip(store, tmp_path, monkeypatch):
    monkeypatch.setattr(memmaps, "FILE_VALUES", 50 * WIDTH)
    export_memmaps(store, tmp_path / "glp")
    same(import_memmaps(tmp_path / "glp", tmp_path / "back", hook=HOOK), store, "doc_id", "position")


def test_ids_on_both_sides_of_two_to_the_63_survive(tmp_path):
    ids = np.random.default_rng(0).integers(0, 2**64, ROWS, dtype=np.uint64)
    ids[:2] = 2**63 + 1, 2**63 - 1
    store = write_store(tmp_path / "store", rows(), hook=HOOK, columns={"doc_id": ids})
    assert store.column("position")[0] == 0  # counted after BOS, that is -1
    export_memmaps(store, tmp_path / "glp")
    export_sae_lens(store, tmp_path / "cached", context=1)
    export_arrays(store, tmp_path / "x.safetensors")
    for back in (
        import_memmaps(tmp_path / "glp", tmp_path / "a", hook=HOOK),
        import_sae_lens(tmp_path / "cached", tmp_path / "b"),
        import_arrays(tmp_path / "x.safetensors", tmp_path / "c", hook=HOOK),
    ):
        assert np.array_equal(back.column("doc_id"), ids)
        assert np.array_equal(back.column("position"), store.column("position"))


def test_released_shards_are_read_in_order_with_documents_and_positions(tmp_path):
    layer, x = tmp_path / "run" / "layer_02", rows(dtype="bfloat16")
    for number, (a, b, end) in enumerate([(0, 90, "active"), (90, 180, "ready"), (180, ROWS, "tmp")]):
        n = b - a
        released_write(layer / f"shard_{number:015d}.{end}", x[a:b], positions=list(range(n)), documents=[number] * n)
    (layer / "dtype.txt").write_text("int16")

    store = import_memmaps(layer, tmp_path / "out", hook=HOOK, model="llama")

    assert torch.equal(exact(store).view(torch.int16), x.view(torch.int16))
    assert store.dtype == "bfloat16"
    assert store.column("position")[:3].tolist() == [1, 2, 3]  # counted after BOS there, from BOS here
    assert np.unique(store.column("doc_id"), return_counts=True)[1].tolist() == [90, 90, ROWS - 180]
    source = store.manifest.source
    assert source["model"] == {"name": "llama"}
    assert source["imported"]["from"] == "layer_02"
    assert str(tmp_path) not in json.dumps(source)


def test_rows_in_any_order_in_the_index_are_found(tmp_path):
    x = rows(dtype="bfloat16")
    released_write(tmp_path / "glp", x)
    index = np.load(tmp_path / "glp" / "data_indices.npy")
    order = np.random.default_rng(0).permutation(ROWS)
    order = np.r_[0, 147, order]  # where row 0 ends in its file, row 147 begins in the next
    np.save(tmp_path / "glp" / "data_indices.npy", index[order])
    assert torch.equal(exact(import_memmaps(tmp_path / "glp", tmp_path / "out", hook=HOOK)), x[order])


def test_documents_are_numbered_on_where_shards_do_not_tell_them(tmp_path):
    for number in (0, 1):
        released_write(tmp_path / "layer_02" / f"shard_{number:015d}.ready", rows(20, dtype="bfloat16"))
    store = import_memmaps(tmp_path / "layer_02", tmp_path / "out", hook=HOOK)
    assert np.array_equal(store.column("doc_id"), np.arange(40))


def test_layers_become_one_store_each(tmp_path):
    for layer in (0, 11):
        released_write(tmp_path / "run" / f"layer_{layer:02d}", rows(seed=layer, dtype="bfloat16"))
    with pytest.raises(InputError, match="holds layers 0, 11"):
        import_memmaps(tmp_path / "run", tmp_path / "one", hook=HOOK)

    stores = import_memmap_layers(tmp_path / "run", tmp_path / "out")

    assert list(stores) == ["blocks.0.hook_resid_post", "blocks.11.hook_resid_post"]
    assert torch.equal(exact(stores["blocks.11.hook_resid_post"]), rows(seed=11, dtype="bfloat16"))
    assert ActivationStore.open(tmp_path / "out" / "blocks.0.hook_resid_post").hook == "blocks.0.hook_resid_post"


def write_zip(path):
    with path.open("wb") as file:
        np.savez(file, x=np.ones((4, 3), np.float32))


def damage_short_file(folder):
    with (folder / "data_0001.npy").open("r+b") as file:
        file.truncate(200)


def damage_width(folder):
    index = np.load(folder / "data_indices.npy")
    index[17, 2] += 1
    np.save(folder / "data_indices.npy", index)


def damage_with_nan(folder):
    values = np.memmap(folder / "data_0000.npy", np.int16, "r+")
    values[41 * WIDTH + 2] = 0x7FC0
    values.flush()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_short_file, "data_0001.npy is truncated: it has 200 bytes"),
        (damage_width, "row 17 has width 8, the first row 7"),
        (damage_with_nan, "row 41 holds values that are not finite"),
        (lambda f: (f / "data_0001.npy").unlink(), "data_0001.npy is missing"),
        (lambda f: np.save(f / "data_0000.npy", np.zeros(2048, np.int16)), "array with a header"),
        (lambda f: (f / "dtype.txt").write_text("int8"), "got dtype 'int8' in"),
        (lambda f: np.save(f / "data_indices.npy", np.zeros((9, 2), int)), "must be integers \\(rows, 3\\)"),
        (lambda f: (f / "data_indices.npy").write_bytes(b"no"), "data_indices.npy is pickled, truncated or no"),
        (lambda f: write_zip(f / "data_indices.npy"), "data_indices.npy is pickled, truncated or no"),
        (lambda f: (f / "doc_buffer.json").write_text("[1, 2]"), "one integer for each of 211 rows"),
        (lambda f: (f / "doc_buffer.json").write_text("null"), "one integer for each of 211 rows, got NoneType"),
        (lambda f: (f / "doc_buffer.json").write_text(json.dumps([0.5] * ROWS)), "one integer for each of 211 rows"),
        (lambda f: (f / "doc_buffer.json").write_text(json.dumps([2**64] * ROWS)), "doc_buffer.json is damaged"),
        (lambda f: (f / "doc_buffer.json").write_text("[" * 100_000), "doc_buffer.json is damaged"),
        (lambda f: (f / "data_indices.npy").unlink(), "no data_indices.npy in"),
    ],
)
def test_damaged_memmaps_are_refused_in_one_line_and_leave_nothing(tmp_path, damage, message):
    released_write(tmp_path / "glp", rows(dtype="bfloat16"))
    damage(tmp_path / "glp")
    with pytest.raises(InputError, match=message) as error:
        import_memmaps(tmp_path / "glp", tmp_path / "out", hook=HOOK)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["glp"]


def sae_lens_reader(folder, hook, context, width):
    from sae_lens.training.activations_store import ActivationsStore

    return ActivationsStore(
        model=None, dataset=None, streaming=False, hook_name=hook, hook_head_index=None, context_size=context,
        d_in=width, n_batches_in_buffer=2, total_training_tokens=100, store_batch_size_prompts=3,
        train_batch_size_tokens=10, prepend_bos=False, normalize_activations="none", device=torch.device("cpu"),
        dtype="float32", cached_activations_path=str(folder),
    )  # fmt: skip


def test_sae_lens_reads_exported_rows(store, tmp_path):
    left_out = export_sae_lens(store, tmp_path / "cached", context=10)
    assert left_out == 1

    reader = sae_lens_reader(tmp_path / "cached", HOOK, 10, WIDTH)
    batches = [reader.get_raw_llm_batch() for _ in range(7)]

    assert torch.equal(torch.cat([x for x, _ in batches]), store.rows(0, 210))
    assert np.array_equal(torch.cat([ids for _, ids in batches]).int(), store.column("token_id")[:210])


def test_sae_lens_round_trip(store, tmp_path):
    export_sae_lens(store, tmp_path / "cached", context=10)
    back = import_sae_lens(tmp_path / "cached", tmp_path / "back")
    assert torch.equal(back.rows(), store.rows(0, 210))
    assert back.dtype == ("float16" if store.dtype == "float16" else "float32")
    for name in ("token_id", "doc_id", "position"):
        assert np.array_equal(back.column(name), store.column(name)[:210])


def test_rows_whose_positions_are_known_are_not_skipped(tmp_path):
    store = write_store(tmp_path / "store", rows(30), hook=HOOK, columns={"position": np.arange(30) % 3})
    export_sae_lens(store, tmp_path / "cached", context=10)
    assert torch.equal(import_sae_lens(tmp_path / "cached", tmp_path / "back").rows(), store.rows())


@pytest.mark.parametrize(("tokens", "repeated"), [([5, 6, 7], 0), ([5, 6, 5], 1), ([0, 0, 0], 0)])
def test_sequences_that_are_there_twice_are_told(tokens, repeated, tmp_path, recwarn):
    """SAELens begins again when its texts run out; a store without tokens has zeros."""
    columns = {"token_id": np.repeat(tokens, 10)}
    export_sae_lens(
        write_store(tmp_path / "store", rows(30), hook=HOOK, columns=columns), tmp_path / "cached", context=10
    )
    assert len(import_sae_lens(tmp_path / "cached", tmp_path / "back")) == 30
    told = [str(warning.message) for warning in recwarn if "of an earlier one" in str(warning.message)]
    assert [text.split(" sequences")[0] for text in told] == ([f"{repeated} of the 3"] if repeated else [])


def test_what_sae_lens_caches_is_what_the_model_computes(tiny_hooked, tmp_path, monkeypatch):
    from datasets import Dataset
    from sae_lens import cache_activations_runner
    from sae_lens.config import CacheActivationsRunnerConfig

    monkeypatch.setattr(cache_activations_runner, "load_model", lambda **_: tiny_hooked)
    texts = Dataset.from_dict(
        {"text": ["the cat and the dog run home " * 6, "a bird in the sky is not a fish " * 9] * 3}
    )
    config = CacheActivationsRunnerConfig(
        dataset_path="", model_name="tiny", model_batch_size=2, hook_name=HOOK, d_in=24, training_tokens=66,
        context_size=11, streaming=False, device="cpu", buffer_size_gb=1e-5, shuffle=False, dtype="float32",
        new_cached_activations_path=str(tmp_path / "cached"),
    )  # fmt: skip
    cache_activations_runner.CacheActivationsRunner(config, override_dataset=texts).run()

    store = import_sae_lens(tmp_path / "cached", tmp_path / "out", drop_tokens=[3])

    tokens = torch.stack([torch.tensor(ids) for ids in Dataset.load_from_disk(tmp_path / "cached")["token_ids"]])
    computed = tiny_hooked.run_with_cache(tokens, names_filter=HOOK)[1][HOOK]
    kept = tokens != 3
    kept[:, 0] = False
    assert 0 < int(kept.sum()) < tokens[:, 1:].numel()
    torch.testing.assert_close(store.rows(), computed[kept].detach())
    sequence, place = kept.nonzero().T
    assert np.array_equal(store.column("token_id"), tokens[kept])
    assert np.array_equal(store.column("doc_id"), sequence)
    assert np.array_equal(store.column("position"), place)
    imported = store.manifest.source["imported"]
    assert (imported["rows"], imported["skip_first"], imported["drop_tokens"]) == (tokens.numel(), True, [3])
    everything = import_sae_lens(tmp_path / "cached", tmp_path / "all", hook=HOOK, skip_first=False)
    assert len(everything) == tokens.numel()


def test_bad_sae_lens_folders_are_refused(tmp_path):
    from datasets import Array2D, Dataset, Features

    x = rows(30).reshape(10, 3, WIDTH).numpy()
    for name, dtype in (("two", "float32"), ("double", "float64")):
        features = Features({"a": Array2D((3, WIDTH), dtype), "b": Array2D((3, WIDTH), dtype)})
        Dataset.from_dict({"a": x, "b": x}, features=features).save_to_disk(tmp_path / name)
    for arguments, message in (
        ({}, "has activations of a, b: pass hook"),
        ({"hook": "c"}, "got hook 'c'"),
        ({"hook": "a", "drop_tokens": [0]}, "has no token_ids"),
    ):
        with pytest.raises(InputError, match=message):
            import_sae_lens(tmp_path / "two", tmp_path / "out", **arguments)
    with pytest.raises(InputError, match="is float64, expected float16 or float32"):
        import_sae_lens(tmp_path / "double", tmp_path / "out", hook="a")
    with pytest.raises(InputError, match="no cached activations"):
        import_sae_lens(tmp_path / "nothing", tmp_path / "out")
    file = next((tmp_path / "two").glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:-900])
    with pytest.raises(InputError, match="damaged"):
        import_sae_lens(tmp_path / "two", tmp_path / "out", hook="a")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("length", "tokens", "message"),
    [
        (None, [[1, 2, 3]] * 10, r"a in .* has shape \(None, 7\), expected sequences of one length"),
        (3, [["1", "2", "3"]] * 10, "'token_ids' holds string, expected integers"),
        (3, [{"ids": 1}] * 10, "'token_ids' holds struct<ids: int64>, expected integers"),
        (3, [[1.5, 2, 3]] * 10, "'token_ids' holds double, expected integers"),
    ],
)
def test_sae_lens_columns_of_other_types_are_refused_in_one_line(tmp_path, length, tokens, message):
    from datasets import Array2D, Dataset

    dataset = Dataset.from_dict({"a": rows(30).reshape(10, 3, WIDTH).numpy(), "token_ids": tokens})
    dataset.cast_column("a", Array2D((length, WIDTH), "float32")).save_to_disk(tmp_path / "cached")
    with pytest.raises(InputError, match=message) as error:
        import_sae_lens(tmp_path / "cached", tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_exported_arrays_are_what_numpy_and_safetensors_read(store, tmp_path):
    export_arrays(store, tmp_path / "x.npy")
    export_arrays(store, tmp_path / "x.safetensors")

    values = np.load(tmp_path / "x.npy", allow_pickle=False)
    assert values.dtype == ("float16" if store.dtype == "float16" else "float32")
    assert torch.equal(torch.from_numpy(values).float(), store.rows())
    tensors = load_file(tmp_path / "x.safetensors")
    assert tensors["activations"].dtype == DTYPES[store.dtype]
    assert torch.equal(tensors["activations"], exact(store))
    for name in ("token_id", "doc_id", "position", "sentiment", "speaker"):
        assert np.array_equal(tensors[name], store.column(name)), name


def test_array_round_trips(store, tmp_path):
    export_arrays(store, tmp_path / "x.npy")
    export_arrays(store, tmp_path / "x.safetensors")
    same(
        import_arrays(tmp_path / "x.safetensors", tmp_path / "a", hook=HOOK),
        store, "token_id", "doc_id", "position", "sentiment", "speaker",
    )  # fmt: skip
    plain = import_arrays(tmp_path / "x.npy", tmp_path / "b", hook=HOOK)
    assert torch.equal(plain.rows(), store.rows())


def test_documents_and_positions_of_three_axes_go_on_over_files(tmp_path):
    x = rows(60).reshape(12, 5, WIDTH)
    np.save(tmp_path / "a.npy", np.asfortranarray(x[:8].numpy().astype(">f4")))
    save_file({"resid": x[8:].contiguous(), "mask": torch.ones(4)}, tmp_path / "b.safetensors")

    store = import_arrays([tmp_path / "a.npy", tmp_path / "b.safetensors"], tmp_path / "out", hook=HOOK)

    assert torch.equal(store.rows(), x.reshape(60, WIDTH))
    assert np.array_equal(store.column("doc_id"), np.repeat(np.arange(12), 5))
    assert np.array_equal(store.column("position"), np.tile(np.arange(5), 12))


def with_file(name, write):
    return lambda folder: write(folder / name) or folder / name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: f / "none.npy", "does not exist"),
        (lambda f: f / "x.csv", "arrays are read from .npy or .safetensors"),
        (with_file("a.npy", lambda p: np.save(p, np.array([{"a": 1}]), allow_pickle=True)), "is pickled"),
        (with_file("a.npy", lambda p: p.write_bytes(b"") and None), "is pickled, truncated or no NumPy"),
        (with_file("a.npy", write_zip), "is pickled, truncated or no NumPy"),
        (with_file("a.npy", lambda p: p.write_bytes(b"PK\3\4 no zip") and None), "is pickled, truncated or no NumPy"),
        (with_file("a.npy", lambda p: np.save(p, np.ones((4, 3)))), "holds float64, expected float16 or float32"),
        (with_file("a.npy", lambda p: np.save(p, np.ones(4, np.float32))), r"shape \(4,\), expected \(n, d\)"),
        (with_file("a.safetensors", lambda p: p.write_bytes(b"12345678x") and None), "truncated or no safetensors"),
        (
            with_file("a.safetensors", lambda p: save_file({"p": torch.ones(4, 3), "q": torch.ones(2, 3)}, p)),
            "holds the tensors p, q: pass key",
        ),
        (with_file("a.safetensors", lambda p: save_file({"p": torch.ones(4, 3).long()}, p)), "p in .* is I64"),
    ],
)
def test_bad_arrays_are_refused_in_one_line(tmp_path, make, message):
    with pytest.raises(InputError, match=message) as error:
        import_arrays(make(tmp_path), tmp_path / "out", hook=HOOK)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_truncated_arrays_are_refused(tmp_path):
    for name, write in (("a.npy", np.save), ("a.safetensors", lambda p, x: save_file({"x": torch.from_numpy(x)}, p))):
        write(tmp_path / name, rows().numpy())
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-5])
        with pytest.raises(InputError, match="truncated"):
            import_arrays(tmp_path / name, tmp_path / "out", hook=HOOK)


def test_files_that_do_not_fit_together_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((4, 3), np.float32))
    np.save(tmp_path / "b.npy", np.ones((4, 5), np.float32))
    with pytest.raises(InputError, match="b.npy holds float32 of width 5, .*a.npy float32 of width 3"):
        import_arrays([tmp_path / "a.npy", tmp_path / "b.npy"], tmp_path / "out", hook=HOOK)


def test_infinite_rows_are_refused_by_their_number_over_all_files(tmp_path):
    x = rows(40).numpy()
    np.save(tmp_path / "a.npy", x)
    x[23, 4] = np.inf
    np.save(tmp_path / "b.npy", x)
    with pytest.raises(InputError, match="row 63 holds values that are not finite"):
        import_arrays([tmp_path / "a.npy", tmp_path / "b.npy"], tmp_path / "out", hook=HOOK)
    assert not (tmp_path / "out").exists()


def test_nothing_that_exists_is_overwritten(tmp_path):
    store = write_store(tmp_path / "store", rows(30), hook=HOOK)
    (tmp_path / "x.npy").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    for export in (
        lambda: export_arrays(store, tmp_path / "x.npy"),
        lambda: export_memmaps(store, tmp_path / "full"),
        lambda: export_sae_lens(store, tmp_path / "full", context=10),
    ):
        with pytest.raises(InputError, match="exists"):
            export()
    np.save(tmp_path / "y.npy", rows(30).numpy())
    with pytest.raises(InputError, match="exists"):
        import_arrays(tmp_path / "y.npy", tmp_path / "store", hook=HOOK)
    assert (tmp_path / "x.npy").read_text() == "mine"


def test_an_empty_working_folder_becomes_the_store(tmp_path, monkeypatch):
    np.save(tmp_path / "x.npy", rows(30).numpy())
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    store = import_arrays("../x.npy", ".", hook=HOOK)
    assert torch.equal(store.rows(), rows(30))
    assert torch.equal(ActivationStore.open(tmp_path / "here").rows(), rows(30))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "x.npy"]
    with pytest.raises(InputError, match="is not empty"):
        import_arrays("../x.npy", ".", hook=HOOK)


def test_the_hash_names_the_data(tmp_path):
    import xxhash

    np.save(tmp_path / "a.npy", rows(30).numpy())
    np.save(tmp_path / "b.npy", rows(30, seed=1).numpy())
    store = import_arrays([tmp_path / "a.npy", tmp_path / "b.npy"], tmp_path / "out", hook=HOOK)
    both = (tmp_path / "a.npy").read_bytes() + (tmp_path / "b.npy").read_bytes()
    assert store.manifest.source["imported"] == {
        "format": "arrays", "from": "a.npy", "hash": xxhash.xxh3_128_hexdigest(both), "files": 2,
    }  # fmt: skip


def test_too_few_rows_for_one_sequence(tmp_path):
    store = write_store(tmp_path / "store", rows(30), hook=HOOK)
    with pytest.raises(InputError, match="context must be 1 to 30"):
        export_sae_lens(store, tmp_path / "cached", context=31)
    with pytest.raises(InputError, match="arrays are written as .npy or .safetensors"):
        export_arrays(store, tmp_path / "x.csv")


@pytest.mark.parametrize("killed", [False, True])
def test_an_empty_folder_whose_filling_was_cut_off_is_filled_by_the_next_run(store, tmp_path, monkeypatch, killed):
    out, real, moved = tmp_path / "out", os.replace, []
    out.mkdir()

    def cut_off(old, new):
        if Path(new).parent == out:
            moved.append(new)
            if len(moved) == 3:
                raise Killed
        real(old, new)

    class Killed(BaseException):
        pass

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", cut_off)
        if killed:  # nothing is tidied up
            patch.setattr(transfer, "_undo_move", lambda _: None)
        with pytest.raises(Killed):
            export_memmaps(store, out)
    assert len([*out.iterdir()]) == (2 if killed else 0)
    export_memmaps(store, out)
    export_memmaps(store, tmp_path / "whole")
    assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}
    assert {path.name for path in tmp_path.glob(".*")} == set()
    with pytest.raises(InputError, match="already exists and is not empty"):
        export_memmaps(store, out)
