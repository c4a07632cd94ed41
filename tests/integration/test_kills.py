"""A collection killed again and again, at every step of writing, loses nothing and ends with the same bytes."""

import os
import random
import signal
import sys
import time

import pytest
import torch

from glp_lens.activations import ActivationStore, collect
from glp_lens.activations.manifest import MANIFEST, Manifest
from glp_lens.errors import InputError
from tests.conftest import tiny_texts
from tests.fuzz.children import fork, kill_after_renaming, kill_at, wait, watch

HOOK, OTHER = "blocks.1.hook_resid_post", "blocks.2.hook_resid_post"
SMALL = {"context": 24, "batch_size": 4, "dtype": "bfloat16", "shard_tokens": 24 * 4}
TEXTS = tiny_texts(54)  # 14 shards, the last of 2 texts
STEPS = ("posix_fallocate", "fsync", "replace")


def start(model, hooks, out, act=None):
    """Collect in a forked process; `act` as in `watch`."""

    def work():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        if act is not None:
            watch(act, STEPS)
        collect(model, TEXTS, hooks, out, **SMALL)

    return fork(work)


def ended(pid):
    """Whether it came to its end, rather than being killed."""
    code = wait(pid)
    assert code in (0, -signal.SIGKILL)
    return code == 0


def stores(out):
    return sorted(path.parent for path in out.rglob(MANIFEST))


def committed(out):
    """What a killed run left: every store opens and every shard it lists is whole."""
    found = {}
    for folder in stores(out):
        found[folder.name] = Manifest.read(folder).shards
        if found[folder.name]:
            ActivationStore.open(folder, partial=True).verify()
    return found


def keeps(before, after):
    return all(set(map(str, shards)) <= set(map(str, after[name])) for name, shards in before.items())


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module", params=[[HOOK], [HOOK, OTHER]], ids=["one hook", "two hooks"])
def whole(request, tiny_bridge, tmp_path_factory):
    """Hook points and the files of an uninterrupted run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the children: sums depend on it in the last bit
    out = tmp_path_factory.mktemp("whole") / "s"
    collect(tiny_bridge, TEXTS, request.param, out, **SMALL)
    assert all(len(Manifest.read(folder).shards) == 14 for folder in stores(out))
    yield request.param, files(out)
    torch.set_num_threads(threads)


def test_killed_25_times_at_random(tiny_bridge, tmp_path, whole):
    hooks, want = whole
    begin = time.monotonic()
    assert ended(start(tiny_bridge, hooks, tmp_path / "timed"))
    length = time.monotonic() - begin
    delays, kills, finished = random.Random(0), 0, 0
    before = {}
    while kills < 25:
        out = tmp_path / f"s{finished}"
        pid = start(tiny_bridge, hooks, out)
        time.sleep(delays.uniform(0, length / 2))
        os.kill(pid, signal.SIGKILL)
        kills += 1
        done = ended(pid)
        after = committed(out)
        assert keeps(before, after)
        before = after
        if done:
            assert files(out) == want
            before, finished = {}, finished + 1
    assert ended(start(tiny_bridge, hooks, out))
    assert files(out) == want


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_every_step_of_writing(tiny_bridge, tmp_path, whole, after):
    hooks, want = whole
    before, out, run = {}, tmp_path / "s", 0
    # One step further each time, so that every run but the first few adds a step of its own.
    while not ended(start(tiny_bridge, hooks, out, kill_at(run + 1, after))):
        run += 1
        found = committed(out)
        assert keeps(before, found)
        before = found
    assert run >= 10 * len(hooks), "a manifest takes three steps, a shard seven"
    assert files(out) == want


@pytest.mark.parametrize("n_hooks", [1, 2])
def test_a_shard_that_was_finished_but_not_listed_is_not_made_again(tiny_bridge, tmp_path, monkeypatch, n_hooks):
    hooks, out = [HOOK, OTHER][:n_hooks], tmp_path / "s"
    assert not ended(start(tiny_bridge, hooks, out, kill_after_renaming("shard-00000001.h5")))
    first = stores(out)[0]
    assert [shard.index for shard in Manifest.read(first).shards] == [0]
    orphan = first / "shard-00000001.h5"
    at = orphan.stat().st_mtime_ns
    made = []
    reader = sys.modules[collect.__module__]._Reader
    real = reader.shard
    monkeypatch.setattr(
        reader, "shard", lambda self, i, texts, bar: made.append(texts[0].text) or real(self, i, texts, bar)
    )
    collect(tiny_bridge, TEXTS, hooks, out, **SMALL)
    assert orphan.stat().st_mtime_ns == at
    # With a sibling that lacks it, the texts are read again, but the finished file stays.
    assert made == TEXTS[8 if n_hooks == 1 else 4 :: 4]


def test_a_second_writer_is_refused_and_a_killed_one_holds_nothing(tiny_bridge, tmp_path):
    out = tmp_path / "s"
    ready, tell = os.pipe()

    def stall(number, name, *_):
        if name == "posix_fallocate":
            os.write(tell, b"!")
            time.sleep(60)

    pid = start(tiny_bridge, HOOK, out, stall)
    assert os.read(ready, 1) == b"!"
    with pytest.raises(InputError, match="another process is writing to") as caught:
        collect(tiny_bridge, TEXTS, HOOK, out, **SMALL)
    assert "\n" not in str(caught.value)
    os.kill(pid, signal.SIGKILL)
    assert not ended(pid)
    assert collect(tiny_bridge, TEXTS, HOOK, out, **SMALL).manifest.complete
