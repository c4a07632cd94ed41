"""Repair drops exactly the damaged shards and collecting again brings exactly them back, byte for byte."""

import os
import sys

import numpy as np
import pytest
import torch

from glp_lens.activations import ActivationStore, collect, write_store
from glp_lens.activations.manifest import MANIFEST, Manifest
from glp_lens.activations.repair import repair
from glp_lens.activations.writer import lock
from glp_lens.errors import InputError
from tests.conftest import tiny_texts

HOOKS = ["blocks.1.hook_resid_post", "blocks.2.hook_resid_post"]
SMALL = {"context": 24, "batch_size": 4, "dtype": "bfloat16", "shard_tokens": 24 * 4, "max_tokens": 590}
D = 24


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    os.truncate(path, path.stat().st_size - 1)


def spoil(folder):
    """Three shards of seven, each in its own way."""
    flip(folder / "shard-00000001.h5")
    cut(folder / "shard-00000003.h5")
    (folder / "shard-00000006.h5").unlink()


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def sound(folder):
    """The files of a store, without those that repair put aside."""
    return {name: data for name, data in files(folder).items() if not name.endswith(".damaged")}


@pytest.fixture
def imported(tmp_path):
    x = torch.randn(7 * 30, D, generator=torch.Generator().manual_seed(0))
    write_store(tmp_path / "s", x, hook="h", shard_rows=30)
    return tmp_path / "s", x


def test_exactly_the_damaged_shards_are_dropped_and_the_rest_reads_right(imported):
    folder, x = imported
    before = files(folder)
    spoil(folder)
    damage = {name: (folder / name).read_bytes() for name in ("shard-00000001.h5", "shard-00000003.h5")}
    assert [shard.index for shard in repair(folder)] == [1, 3, 6]
    store = ActivationStore.open(folder)
    store.verify()
    assert torch.equal(store.rows(), torch.cat([x[30 * k : 30 * k + 30] for k in (0, 2, 4, 5)]))
    assert store.manifest.dropped == (1, 3, 6)
    assert store.stats.count == len(store) == 120
    np.testing.assert_array_equal(store.column("doc_id")[::30], [0, 60, 120, 150])
    left = {name: data for name, data in before.items() if name[6:14] in {f"{k:08d}" for k in (0, 2, 4, 5)}}
    assert {name: data for name, data in files(folder).items() if name.endswith(".h5")} == left
    assert {name: (folder / f"{name}.damaged").read_bytes() for name in damage} == damage
    flip(folder / "shard-00000000.h5")
    assert [shard.index for shard in repair(folder)] == [0]
    assert Manifest.read(folder).dropped == (0, 1, 3, 6)


def test_a_sound_store_is_left_as_it_is(imported):
    folder, _ = imported
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}
    assert repair(folder) == []
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()} == before


def test_what_a_killed_repair_left_is_removed(imported):
    folder, _ = imported
    before = files(folder)
    (folder / f".{MANIFEST}.abcd1234.tmp").write_text("half")
    assert repair(folder) == []
    assert files(folder) == before


def test_a_store_with_nothing_left_says_so(imported):
    folder, _ = imported
    for path in folder.glob("*.h5"):
        flip(path)
    assert len(repair(folder)) == 7
    with pytest.raises(InputError, match="has no rows") as caught:
        ActivationStore.open(folder)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_repaired_is_refused_and_left_alone(imported, tmp_path):
    folder, _ = imported
    with pytest.raises(InputError, match="does not exist"):
        repair(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    spoil(folder)
    before = files(folder)
    held = lock(folder)
    try:
        with pytest.raises(InputError, match="another process is writing to"):
            repair(folder)
    finally:
        os.close(held)
    assert files(folder) == before
    (folder / MANIFEST).write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        repair(folder)


def test_a_repair_cut_off_before_the_manifest_is_done_again(imported, monkeypatch):
    folder, _ = imported
    spoil(folder)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[repair.__module__], "publish", stop)
        with pytest.raises(KeyboardInterrupt):
            repair(folder)
    assert [shard.index for shard in repair(folder)] == [1, 3, 6]
    assert len(ActivationStore.open(folder)) == 120


@pytest.mark.parametrize("hooks", [HOOKS[:1], HOOKS], ids=["one hook", "two hooks"])
def test_the_same_collect_brings_back_what_was_dropped_and_reads_no_other_text(
    tiny_bridge, tmp_path, monkeypatch, hooks
):
    texts, out = tiny_texts(60), tmp_path / "s"
    collect(tiny_bridge, texts, hooks, out, **SMALL)
    folders = sorted(path.parent for path in out.rglob(MANIFEST))
    n = len(Manifest.read(folders[0]).shards)
    assert n > 6
    before = files(out)
    spoil(folders[0])
    lost = {1, 3, 6}
    if len(folders) > 1:
        flip(folders[1] / "shard-00000004.h5")
        lost |= {4}
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*.h5") if before[path.relative_to(out).as_posix()]
            == path.read_bytes()}  # fmt: skip
    for folder in folders:
        repair(folder)
    reader = sys.modules[collect.__module__]._Reader
    real, made = reader.shard, []
    monkeypatch.setattr(
        reader, "shard", lambda self, i, docs, bar: made.append(docs[0].text) or real(self, i, docs, bar)
    )
    collect(tiny_bridge, texts, hooks, out, **SMALL)
    assert made == [texts[4 * k] for k in sorted(lost)]
    assert sound(out) == before
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
