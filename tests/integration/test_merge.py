"""Parts of a collection, joined, are the store of one process: rows, columns, statistics, counts and bytes."""

import functools
import itertools
import json
import os
import shutil

import numpy as np
import pytest
import torch

from glp_lens import lm
from glp_lens.activations import ActivationStore, collect
from glp_lens.activations.manifest import MANIFEST, Manifest
from glp_lens.activations.merge import ShortParts, merge
from glp_lens.activations.repair import repair
from glp_lens.activations.writer import StoreWriter
from glp_lens.corpus import Document
from glp_lens.errors import InputError
from tests.conftest import tiny_texts

HOOK = "blocks.1.hook_resid_post"
OTHER = "blocks.2.hook_resid_post"
SMALL = {"context": 24, "batch_size": 16, "dtype": "float32", "shard_tokens": 24 * 5, "massive": 1.3}


def collect_parts(model, texts, hooks, out, n, **options):
    return [collect(model, iter(texts), hooks, out, part=(i, n), **{**SMALL, **options}) for i in range(n)]


def files(folder):
    """Every file of a store by name, without its parts."""
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: data for name, data in found.items() if not name.startswith("parts/")}


def folders(out):
    return sorted((out / "parts").iterdir())


def assert_same(merged, whole):
    assert torch.equal(merged.rows(), whole.rows())
    for name in whole.manifest.columns:
        np.testing.assert_array_equal(merged.column(name), whole.column(name))
    for name in ("count", "mean", "M2", "min", "max", "norm_sum"):
        assert torch.equal(torch.as_tensor(getattr(merged.stats, name)), torch.as_tensor(getattr(whole.stats, name)))
    assert merged.manifest.excluded == whole.manifest.excluded
    assert merged.provenance() == whole.provenance()
    merged.verify()


@pytest.fixture(scope="module")
def texts():
    return tiny_texts(43)


@pytest.fixture(scope="module")
def whole_at(tiny_bridge, texts, tmp_path_factory):
    """The store of one process, collected once for each hook points and number of rows."""

    @functools.cache
    def at(hooks, max_tokens):
        folder = tmp_path_factory.mktemp("whole") / "store"
        collect(tiny_bridge, texts, list(hooks), folder, max_tokens=max_tokens, **SMALL)
        return folder

    return at


@pytest.mark.parametrize(
    ("n", "hooks", "max_tokens"),
    [(3, [HOOK], None), (2, [HOOK], 223), *itertools.product([1, 2, 3, 5], [[HOOK, OTHER]], [None, 223, 100_000])],
)
def test_merged_parts_are_the_store_of_one_process_to_the_byte(
    tiny_bridge, tmp_path, texts, whole_at, n, hooks, max_tokens
):
    whole = whole_at(tuple(hooks), max_tokens)
    collect_parts(tiny_bridge, texts, hooks, tmp_path / "merged", n, max_tokens=max_tokens)
    merged = merge(tmp_path / "merged")
    assert files(tmp_path / "merged") == files(whole)
    for name in hooks:
        a = merged if len(hooks) == 1 else merged[name]
        b = ActivationStore.open(whole if len(hooks) == 1 else whole / name)
        assert_same(a, b)
        assert len(b) == 223 or max_tokens != 223
        assert b.manifest.excluded["massive"] > 0
        assert len(b.manifest.shards) > 2


def test_parts_share_the_work(tiny_bridge, tmp_path, texts):
    parts = collect_parts(tiny_bridge, texts, HOOK, tmp_path, 3)
    made = [[shard.index for shard in part.manifest.shards if shard.documents] for part in parts]
    assert made == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]


@pytest.mark.parametrize("keep", ["last", "mean", 3])
def test_merging_keeps_one_row_a_text_and_labels(tiny_bridge, tmp_path, texts, keep):
    documents = [
        Document(d.id, d.text, d.source, labels=(("half", i / 2),)) for i, d in enumerate(map(Document.of, texts))
    ]

    def labels(document, ids):
        return {"length": len(document.text), "place": list(range(len(ids)))}

    options = {"keep": keep, "labels": labels, "max_tokens": 31, "seed": 3}
    whole = collect(tiny_bridge, documents, HOOK, tmp_path / "whole", **SMALL, **options)
    collect_parts(tiny_bridge, documents, HOOK, tmp_path / "merged", 2, **options)
    merged = merge(tmp_path / "merged")
    assert_same(merged, whole)
    assert set(merged.manifest.labels) == {"half", "length", "place"}
    assert merged.column("half").max() > 0
    assert files(tmp_path / "merged") == files(tmp_path / "whole")


def test_more_parts_than_shards(tiny_bridge, tmp_path, texts):
    few = texts[:7]
    whole = collect(tiny_bridge, few, HOOK, tmp_path / "whole", max_tokens=10_000, **SMALL)
    made = collect_parts(tiny_bridge, few, HOOK, tmp_path / "merged", 5, max_tokens=10_000)
    assert made[2:] == [{}, {}, {}]
    assert collect_parts(tiny_bridge, few, HOOK, tmp_path / "merged", 5, max_tokens=10_000)[2:] == [{}, {}, {}]
    assert_same(merge(tmp_path / "merged"), whole)
    assert files(tmp_path / "merged") == files(tmp_path / "whole")


@pytest.mark.parametrize("stop_at", [2, 4, 5])
def test_a_part_that_was_killed_goes_on(tiny_bridge, tmp_path, texts, whole_at, monkeypatch, stop_at):
    real, calls = lm.activations, []

    def stop(*arguments):
        calls.append(1)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return real(*arguments)

    out = tmp_path / "merged"
    with monkeypatch.context() as patch:
        patch.setattr(lm, "activations", stop)
        with pytest.raises(KeyboardInterrupt):
            collect(tiny_bridge, texts, [HOOK, OTHER], out, part=(0, 2), **SMALL)
    if stop_at > 2:  # after the look at the first documents
        with pytest.raises(InputError, match="part 0/2 in .* is not finished: run the same collect --shard 0/2 again"):
            merge(out, [folders(out)[0]])
    collect_parts(tiny_bridge, texts, [HOOK, OTHER], out, 2)
    merge(out)
    assert files(out) == files(whole_at((HOOK, OTHER), None))


def test_a_finished_part_is_not_made_again(tiny_bridge, tmp_path, texts, monkeypatch):
    collect_parts(tiny_bridge, texts, HOOK, tmp_path, 2, max_tokens=150)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    monkeypatch.setattr(lm, "activations", None)
    collect_parts(tiny_bridge, texts, HOOK, tmp_path, 2, max_tokens=150)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    for other, message in [(texts[::-1], "other texts"), (texts[:9], "other texts")]:
        with pytest.raises(InputError, match=message):
            collect_parts(tiny_bridge, other, HOOK, tmp_path, 2, max_tokens=150)


def test_a_part_notices_that_texts_were_added(tiny_bridge, tmp_path, texts):
    collect_parts(tiny_bridge, texts[:20], HOOK, tmp_path, 2)
    with pytest.raises(InputError, match="fewer texts"):
        collect_parts(tiny_bridge, texts, HOOK, tmp_path, 2)


@pytest.mark.parametrize("linked", [True, False], ids=["linked", "copied"])
def test_parts_of_other_machines_are_named_and_stay_as_they_are(tiny_bridge, tmp_path, texts, monkeypatch, linked):
    whole = collect(tiny_bridge, texts, HOOK, tmp_path / "whole", max_tokens=223, **SMALL)
    named = []
    for i in range(3):
        collect(tiny_bridge, texts, HOOK, tmp_path / f"machine{i}", part=(i, 3), max_tokens=223, **SMALL)
        named.append(shutil.copytree(folders(tmp_path / f"machine{i}")[0], tmp_path / f"copy-{i}"))
        shutil.rmtree(tmp_path / f"machine{i}")
    before = [files(folder) for folder in named]
    if not linked:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("another disk")))
    assert_same(merge(tmp_path / "merged", named[::-1]), whole)
    assert [files(folder) for folder in named] == before
    assert files(tmp_path / "merged") == files(tmp_path / "whole")


@pytest.mark.parametrize(("method", "at"), [("list", 2), ("list", 5), ("append", 1), ("append", 2), ("finish", 2)])
def test_a_merge_that_was_killed_goes_on_and_a_finished_one_opens(
    tiny_bridge, tmp_path, texts, whole_at, monkeypatch, method, at
):
    hooks, out = (HOOK, OTHER), tmp_path
    collect_parts(tiny_bridge, texts, hooks, out, 2, max_tokens=223)
    real, calls = getattr(StoreWriter, method), []

    def stop(self, *arguments, **options):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return real(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, method, stop)
        with pytest.raises(KeyboardInterrupt):
            merge(out)
    for _ in range(2):
        merge(out)
        assert files(out) == files(whole_at(hooks, 223))
        collect_parts(tiny_bridge, texts, hooks, out, 2, max_tokens=223)


def test_a_merged_store_opens_as_a_finished_collection(tiny_bridge, tmp_path, texts, monkeypatch):
    collect_parts(tiny_bridge, texts, HOOK, tmp_path, 2, max_tokens=223)
    merged = merge(tmp_path)
    monkeypatch.setattr(lm, "activations", None)
    again = collect(tiny_bridge, texts, HOOK, tmp_path, max_tokens=223, **SMALL)
    assert again.provenance() == merged.provenance()


def test_damage_in_a_part_is_refused_then_repaired(tiny_bridge, tmp_path, texts, monkeypatch):
    whole = collect(tiny_bridge, texts, HOOK, tmp_path / "whole", **SMALL)
    out = tmp_path / "merged"
    collect_parts(tiny_bridge, texts, HOOK, out, 2)
    shard = folders(out)[1] / "shard-00000003.h5"
    data = bytearray(shard.read_bytes())
    shard.write_bytes(data[:-100])
    with pytest.raises(InputError, match=r"0001-of-0002 is damaged: shard-00000003.h5"):
        merge(out)
    shard.unlink()
    with pytest.raises(InputError, match=r"0001-of-0002 is damaged: shard-00000003.h5"):
        merge(out)
    shard.write_bytes(data)

    def copy_badly(source, target):
        damaged = bytearray(source.read_bytes())
        damaged[len(damaged) // 2] ^= 4
        target.write_bytes(damaged)

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("another disk")))
        patch.setattr(shutil, "copyfile", copy_badly)
        with pytest.raises(InputError, match=r"is damaged: shard-0000000\d.h5 differs from what was written: copy"):
            merge(out)
    copy_badly(shard, shard)
    assert [s.index for s in repair(folders(out)[1])] == [3]
    with pytest.raises(InputError, match="part 1/2 in .* is not finished"):
        merge(out)
    collect_parts(tiny_bridge, texts, HOOK, out, 2)
    assert_same(merge(out), whole)
    assert files(out) == files(tmp_path / "whole")


def test_what_does_not_fit_together_is_refused_in_one_line(tiny_bridge, tmp_path, texts):
    out, other = tmp_path / "parts3", tmp_path / "other"
    with pytest.raises(InputError, match="no parts in .*: collect them with --shard i/n first"):
        merge(out)
    collect_parts(tiny_bridge, texts, HOOK, out, 3)
    collect_parts(tiny_bridge, texts, HOOK, other, 3, max_tokens=150)
    a, b, c = folders(out)
    for named, message in [
        ([a, c], "part 1/3 is missing"),
        ([a, b, c, a], "named twice"),
        ([a, b, c, shutil.copytree(b, tmp_path / "b")], "named twice"),
        ([a, folders(other)[1], c], "different collections .settings.max_tokens = 150, None."),
        ([tmp_path], "part|different"),
        ([a, b, tmp_path / "nowhere"], "not found|no activation store"),
    ]:
        with pytest.raises(InputError, match=message) as error:
            merge(tmp_path / "new", named)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()
    collect(tiny_bridge, texts, HOOK, out / "parts" / "0003-of-0004", **SMALL)
    with pytest.raises(InputError, match="whole store, not a part"):
        merge(out)
    shutil.rmtree(out / "parts" / "0003-of-0004")
    collect(tiny_bridge, texts, HOOK, out, part=(0, 2), **SMALL)
    with pytest.raises(InputError, match="different collections .parts = .* name the folders of one"):
        merge(out)
    whole = collect(tiny_bridge, texts[::-1], HOOK, tmp_path / "whole", **{**SMALL, "context": 20})
    before = files(whole.path)
    with pytest.raises(InputError, match="another activation store already"):
        merge(whole.path, [a, b, c])
    with pytest.raises(InputError, match="whole store already"):
        collect(tiny_bridge, texts, HOOK, whole.path, part=(0, 2), **SMALL)
    assert files(whole.path) == before


def uneven(texts, rich, n, shards):
    """Texts of which those in the shards of part `rich` of `n` are long and the others short."""
    words = " ".join(texts).split()
    lengths = [22 if (i // 5) % n == rich else 2 for i in range(5 * shards - 2)]
    return [" ".join([*words[7 * i % 99 :][:length], str(i)]) for i, length in enumerate(lengths)]


@pytest.mark.parametrize(("rich", "n"), [(0, 2), (2, 3)])
@pytest.mark.parametrize("max_tokens", [300, 600, 5000])
def test_parts_that_stopped_at_their_share_too_early_go_on(tiny_bridge, tmp_path, texts, rich, n, max_tokens):
    skewed = uneven(texts, rich, n, 16)
    options = {"max_tokens": max_tokens, "massive": None}
    hooks = [HOOK, OTHER]
    whole = collect(tiny_bridge, skewed, hooks, tmp_path / "whole", **{**SMALL, **options})
    out = tmp_path / "merged"
    collect_parts(tiny_bridge, skewed, hooks, out, n, **options)
    try:
        merged = merge(out)
    except ShortParts as short:
        with pytest.raises(InputError, match="not finished"):
            merge(out)
        for i in short.parts:
            collect(tiny_bridge, skewed, hooks, out, part=(i, n), **{**SMALL, **options})
        merged = merge(out)  # once is enough
        collect_parts(tiny_bridge, skewed, hooks, out, n, **options)
    for name in hooks:
        assert_same(merged[name], whole[name])
    assert files(out) == files(tmp_path / "whole")


def test_uneven_texts_do_make_parts_too_short(tiny_bridge, tmp_path, texts):
    skewed = uneven(texts, 0, 2, 24)
    collect_parts(tiny_bridge, skewed, HOOK, tmp_path, 2, max_tokens=700, massive=None)
    with pytest.raises(ShortParts, match="part 0/2 stopped at its share") as short:
        merge(tmp_path)
    assert short.value.parts == [0]
    manifest = Manifest.read(folders(tmp_path)[0])
    assert manifest.dropped
    assert not (tmp_path / MANIFEST).exists()
    assert json.loads((folders(tmp_path)[0] / MANIFEST).read_text())["rows"] == manifest.rows


def test_merging_never_touches_shards_that_no_manifest_lists(tiny_bridge, tmp_path):
    for i in range(2):
        collect(tiny_bridge, tiny_texts(20), HOOK, tmp_path / "from", part=(i, 2), context=24, dtype="float32")
    out = tmp_path / "out"
    out.mkdir()
    (out / "shard-00000007.h5").write_text("mine")
    with pytest.raises(InputError, match="shards without a manifest"):
        merge(out, sorted((tmp_path / "from" / "parts").iterdir()))
    assert (out / "shard-00000007.h5").read_text() == "mine"


def test_a_part_of_an_earlier_version_is_merged_and_a_true_difference_named(tiny_bridge, tmp_path):
    collect_parts(tiny_bridge, tiny_texts(40), HOOK, tmp_path, 2, massive=None)
    path = next(tmp_path.rglob("0001-of-0002/manifest.json"))
    about = json.loads(path.read_text())
    del about["glp_lens"], about["source"]["hook_names"], about["source"]["model"]["blocks"]
    earlier = json.dumps(about)
    about["source"]["settings"]["context"] = 23
    path.write_text(json.dumps(about))
    with pytest.raises(InputError, match=r"different collections \(settings.context = 23, 24\)"):
        merge(path.parents[2])
    path.write_text(earlier)
    assert len(merge(path.parents[2])) > 0
