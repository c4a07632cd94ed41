"""Collecting and training at once: nothing is lost or seen twice whoever is killed, and little is ever on disk."""

import json
import os
import random
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tqdm.auto import tqdm

from glp_lens.activations import ActivationStore, collect, write_store, writer
from glp_lens.activations import stream as stream_module
from glp_lens.activations.manifest import MANIFEST, Manifest
from glp_lens.activations.stream import ActivationStream, collect_stats, open_all
from glp_lens.activations.totals import STATISTICS, Total, Totals
from glp_lens.activations.writer import StoreWriter
from glp_lens.errors import InputError
from glp_lens.files import write_json
from glp_lens.models.gaussian import Gaussian
from glp_lens.models.glp import GLP
from glp_lens.models.sae import SAE
from glp_lens.training.config import RunOptions, TrainConfig
from tests.conftest import tiny_texts

HOOK = "blocks.1.hook_resid_post"
OTHER = "blocks.2.hook_resid_post"
SMALL = {"context": 24, "batch_size": 4, "dtype": "float32", "shard_tokens": 24 * 5}
TEXTS = tiny_texts(83)
pytestmark = pytest.mark.filterwarnings("ignore:the first shards of")
N = 5
BATCH = 37
SEED = 3
PATIENCE = 10


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the children: sums depend on the number of threads in the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tiny_bridge, tmp_path_factory):
    """The store of the same texts, at both hook points."""
    return collect(tiny_bridge, TEXTS, [HOOK, OTHER], tmp_path_factory.mktemp("whole"), **SMALL)


@pytest.fixture(scope="module")
def shards(tiny_bridge, tmp_path_factory):
    """What the manifest of a store at one hook point lists."""
    return collect(tiny_bridge, TEXTS, HOOK, tmp_path_factory.mktemp("alone"), **SMALL).manifest.shards


def forked(function, *arguments) -> int:
    """The process id of a child that runs a function."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        tqdm.set_lock(threading.RLock())  # the one inherited is shared, and a killed process may hold it
        torch.set_num_threads(1)
        function(*arguments)
        code = 0
    finally:
        os._exit(code)


def ended(child: int, seconds: float = 60) -> int:
    """Exit code of a child; it is killed if it takes too long."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -99


def produce(model, out, hooks=HOOK, n=N, **options):
    collect(model, iter(TEXTS), hooks, out, window=n, **{**SMALL, **options})


def on_disk(folder) -> int:
    """Shard files, finished and begun."""
    return sum(name.startswith(("shard-", ".shard-")) for name in os.listdir(folder)) if folder.exists() else 0


class Watcher(threading.Thread):
    """Looks at the number of shard files all the time."""

    def __init__(self, *folders):
        super().__init__(daemon=True)
        self.folders, self.most, self.stop = folders, 0, threading.Event()

    def run(self):
        while not self.stop.is_set():
            self.most = max(self.most, *map(on_disk, self.folders))
            time.sleep(0.0005)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.join()


def consume(folder, log: Path):
    """A trainer: its checkpoint is the list of the batches it has seen."""
    seen = list(torch.load(log, weights_only=True)) if log.exists() else []
    stream = ActivationStream.open(folder, patience=PATIENCE)
    stream.commit(len(seen) * BATCH)
    stats = stream.stats
    for batch in stream.batches(BATCH, seed=SEED, start_batch=len(seen), epochs=1, drop_last=False):
        seen.append(batch)
        time.sleep(0.002)
        if len(seen) % 7 == 0 or stream.commit_due(len(seen) * BATCH):
            save(log, seen)
            stream.commit(len(seen) * BATCH)
    save(log, seen)
    (log.parent / "mean.json").write_text(json.dumps(stats.mean.tolist()))


def save(log, seen):
    torch.save(seen, log.with_suffix(".tmp"))
    os.replace(log.with_suffix(".tmp"), log)


def in_order(rows):
    """Rows in an order of their own, to compare sets."""
    return rows[np.lexsort(rows.numpy().T)]


def test_every_row_comes_exactly_once_whoever_is_killed(tiny_bridge, whole, shards, tmp_path):
    quiet = tmp_path / "quiet"
    quiet.mkdir()
    producer = forked(produce, tiny_bridge, quiet / "s")
    began = time.monotonic()
    consume(quiet / "s", quiet / "log.pt")
    assert ended(producer) == 0
    took = time.monotonic() - began
    want = torch.load(quiet / "log.pt", weights_only=True)
    assert len(want) > 20
    torch.testing.assert_close(in_order(torch.cat(want)), in_order(whole[HOOK].rows()), rtol=0, atol=0)

    chance, kills, folder, log = random.Random(5), {"producer": 0, "consumer": 0}, tmp_path / "s", tmp_path / "log.pt"
    start = {
        "producer": lambda: forked(produce, tiny_bridge, folder),
        "consumer": lambda: forked(consume, folder, log),
    }
    with Watcher(folder) as watcher:
        running = {name: begin() for name, begin in start.items()}
        while running:
            if sum(kills.values()) < 24:
                time.sleep(chance.uniform(0, took / 20))
                victim = chance.choice(list(running))
                os.kill(running[victim], signal.SIGKILL)
                if ended(running.pop(victim)) == -signal.SIGKILL:
                    kills[victim] += 1
                    running[victim] = start[victim]()
            else:
                name = next(iter(running))
                assert ended(running.pop(name)) == 0, name
    got = torch.load(log, weights_only=True)
    assert len(got) == len(want)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert min(kills.values()) >= 3
    assert watcher.most <= N
    assert (tmp_path / "mean.json").read_text() == (quiet / "mean.json").read_text()
    manifest = Manifest.read(folder)
    assert manifest.complete
    assert manifest.shards == shards  # the same bytes, though most are gone
    total = Totals.read(folder, N).last
    assert total.shards == len(manifest.files)
    check_stats(total.stats, whole[HOOK].stats)


def check_stats(found, want):
    assert found.count == want.count
    for name in ("mean", "M2", "min", "max"):
        torch.testing.assert_close(getattr(found, name), getattr(want, name), rtol=1e-9, atol=1e-9)
    assert found.norm_sum == pytest.approx(want.norm_sum, rel=1e-9)


class Killed(BaseException):
    """Stands for SIGKILL at one line."""


@pytest.mark.parametrize("shard", [0, N - 1, N])
@pytest.mark.parametrize("step", ["file", "statistics", "manifest"])
def test_statistics_fit_the_manifest_whatever_the_last_step_of_a_killed_producer_was(
    tiny_bridge, whole, shards, tmp_path, monkeypatch, step, shard
):
    calls = []

    def dying(real):
        def run(*arguments):
            calls.append(1)
            result = real(*arguments)
            if len(calls) == shard + 1:
                raise Killed
            return result

        return run

    monkeypatch.setattr(StoreWriter, "wait_for_room", make_room)
    with monkeypatch.context() as patch:
        owner, name = {
            "file": (writer, "write_shard"),
            "statistics": (Totals, "write"),
            "manifest": (StoreWriter, "list"),
        }[step]
        patch.setattr(owner, name, dying(getattr(owner, name)))
        with pytest.raises(Killed):
            produce(tiny_bridge, tmp_path / "s")
    produce(tiny_bridge, tmp_path / "s")
    totals = Totals.read(tmp_path / "s", N)
    check_stats(totals.last.stats, whole[HOOK].stats)
    assert totals.opening.shards == N
    assert totals.opening.stats.count == sum(shard.rows for shard in whole[HOOK].manifest.files[:N])
    assert Manifest.read(tmp_path / "s").shards == shards


def make_room(writer):
    """Delete the oldest shard, as a consumer would."""
    files = sorted(writer.folder.glob("shard-*.h5"))
    for file in files[: max(0, len(files) - N + 1)]:
        file.unlink()


def test_a_finished_stream_is_left_alone(tiny_bridge, tmp_path, monkeypatch):
    monkeypatch.setattr(StoreWriter, "wait_for_room", make_room)
    produce(tiny_bridge, tmp_path / "s")
    before = {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()}
    assert len([name for name in before if name.startswith("shard-")]) == N
    produce(tiny_bridge, tmp_path / "s")
    assert {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()} == before
    with pytest.raises(InputError, match="open it as ActivationStream"):
        ActivationStore.open(tmp_path / "s")


def test_statistics_of_another_stream_are_refused(tiny_bridge, tmp_path, monkeypatch):
    monkeypatch.setattr(StoreWriter, "wait_for_room", make_room)
    produce(tiny_bridge, tmp_path / "s")
    manifest = json.loads((tmp_path / "s" / MANIFEST).read_text())
    del manifest["glp_lens"]
    shards = manifest["shards"][:3]
    cut = {**manifest, "shards": shards, "rows": sum(s["rows"] for s in shards), "complete": False}
    (tmp_path / "s" / MANIFEST).write_text(json.dumps(cut))
    with pytest.raises(InputError, match=rf"{STATISTICS} is not that of the 3 shards"):
        produce(tiny_bridge, tmp_path / "s")


def test_siblings_give_aligned_batches(tiny_bridge, whole, tmp_path):
    producer = forked(produce, tiny_bridge, tmp_path / "two", [HOOK, OTHER], 2)
    with Watcher(tmp_path / "two" / HOOK, tmp_path / "two" / OTHER) as watcher:
        streams = open_all(tmp_path / "two", patience=PATIENCE)
        assert list(streams) == [HOOK, OTHER]
        pairs = []
        for pair in zip(*(s.batches(13, seed=1, epochs=1, drop_last=False) for s in streams.values()), strict=True):
            pairs.append(pair)
            if any(stream.commit_due(13 * len(pairs)) for stream in streams.values()):
                for stream in streams.values():
                    stream.commit(13 * len(pairs))
    assert ended(producer) == 0
    assert watcher.most <= 2
    both = torch.cat([torch.cat(pair, 1) for pair in pairs])
    want = torch.cat([whole[HOOK].rows(), whole[OTHER].rows()], 1)
    assert torch.equal(in_order(both), in_order(want))
    assert not torch.equal(both, want)


def test_a_prior_trains_while_its_data_are_collected_and_resumes(tiny_bridge, whole, tmp_path, monkeypatch):
    config = TrainConfig(rows=len(whole[HOOK]) // 29 * 29, batch_size=29, seed=2, autocast=False)
    shape = {"d_model": 10, "d_mlp": 14, "n_layers": 1}

    def fit(folder, state):
        return GLP.fit(ActivationStream.open(folder, patience=PATIENCE), config, **shape, run=RunOptions(state=state))

    producer = forked(produce, tiny_bridge, tmp_path / "a", HOOK, 2)
    with Watcher(tmp_path / "a") as watcher:
        straight = fit(tmp_path / "a", tmp_path / "a.state")
    assert ended(producer) == 0
    assert watcher.most <= 2
    about = straight.provenance["store"]
    assert about["rows"] == len(whole[HOOK])
    assert about["hook"] == HOOK
    assert about["median_norm"] == pytest.approx(whole[HOOK].median_norm, rel=0.1)
    drift = about["stream"]["drift"]
    mean, std = straight.mean.double(), straight.var.double().sqrt()
    assert drift["mean_shift"] == pytest.approx(float(((whole[HOOK].stats.mean - mean).abs() / std).max()), rel=1e-3)
    assert drift["rows"] == len(whole[HOOK])

    producer = forked(produce, tiny_bridge, tmp_path / "b", HOOK, 2)
    real, calls = ActivationStream.commit, []

    def dying(self, rows):
        calls.append(rows)
        if len(calls) == 3:
            raise Killed  # the checkpoint is saved, and nothing deleted
        real(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(ActivationStream, "commit", dying)
        with pytest.raises(Killed):
            fit(tmp_path / "b", tmp_path / "b.state")
    resumed = fit(tmp_path / "b", tmp_path / "b.state")
    assert ended(producer) == 0
    for got, want in zip(resumed.history, straight.history, strict=True):
        assert {**got, "seconds": None} == {**want, "seconds": None}
    for name, value in straight.denoiser.state_dict().items():
        assert torch.equal(value, resumed.denoiser.state_dict()[name]), name


def test_without_checkpoints_shards_go_as_they_are_read_or_the_trainer_is_told(
    tiny_bridge, whole, tmp_path, monkeypatch
):
    monkeypatch.setattr(stream_module, "STUCK_SECONDS", 1.0)
    producer = forked(produce, tiny_bridge, tmp_path / "s", HOOK, 2)
    stream = ActivationStream.open(tmp_path / "s", patience=PATIENCE)
    with pytest.raises(InputError, match="stuck") as caught:
        for _ in stream.batches(BATCH):
            pass
    assert "\n" not in str(caught.value)
    stream = ActivationStream.open(tmp_path / "s", checkpointed=False, patience=PATIENCE)
    model = Gaussian.fit(stream, max_rows=len(whole[HOOK]))
    assert ended(producer) == 0
    assert model.d_in == whole[HOOK].d_in
    assert on_disk(tmp_path / "s") == 0
    with pytest.raises(InputError, match=r"shard-00000000.h5 .* was used and deleted"):
        next(stream.batches(BATCH))


def test_a_trainer_that_wants_more_rows_than_there_are_is_told_how_many(tiny_bridge, tmp_path):
    producer = forked(produce, tiny_bridge, tmp_path / "s")
    stream = ActivationStream.open(tmp_path / "s", checkpointed=False, patience=PATIENCE)
    with pytest.raises(InputError, match=r"ended after [\d,]+ rows"):
        for _ in stream.batches(BATCH):
            pass
    assert ended(producer) == 0


def test_what_is_no_stream_and_a_producer_that_never_comes_are_one_line(whole, tmp_path, tiny_bridge):
    with pytest.raises(InputError, match="no stream but an activation store"):
        ActivationStream.open(whole[HOOK].path)
    with pytest.raises(InputError, match="waiting for a producer to begin"):
        ActivationStream.open(tmp_path / "nothing", patience=0.02)
    with pytest.raises(InputError, match="window must be at least 2"):
        produce(tiny_bridge, tmp_path / "s", HOOK, 1)


def test_a_pass_for_statistics_alone_is_exact_and_writes_no_rows(tiny_bridge, whole, tmp_path, monkeypatch):
    found = collect_stats(tiny_bridge, TEXTS, [HOOK, OTHER], tmp_path / "stats", **SMALL)
    for hook in (HOOK, OTHER):
        check_stats(found[hook], whole[hook].stats)
        assert on_disk(tmp_path / "stats" / hook) == 0
    assert Totals.read(tmp_path / "stats" / HOOK, 0).last.median_norm == pytest.approx(
        whole[HOOK].median_norm, rel=4e-3
    )
    monkeypatch.setattr(StoreWriter, "wait_for_room", make_room)
    produce(tiny_bridge, tmp_path / "s")
    stream = ActivationStream.open(tmp_path / "s", stats=found[HOOK])
    assert stream.stats is found[HOOK]
    assert stream.drift()["mean_shift"] == pytest.approx(0, abs=1e-12)
    with pytest.raises(InputError, match="no stream but statistics alone"):
        ActivationStream.open(tmp_path / "stats" / HOOK)


def test_statistics_that_drifted_are_warned_of(tiny_bridge, tmp_path, monkeypatch):
    monkeypatch.setattr(StoreWriter, "wait_for_room", make_room)
    texts = ["cat dog bird fish horse tree"[: 8 + i % 9] for i in range(30)] + TEXTS
    collect(tiny_bridge, texts, HOOK, tmp_path / "s", window=2, **SMALL)
    stream = ActivationStream.open(tmp_path / "s")
    with pytest.warns(UserWarning, match="shuffle the texts"):
        about = stream.provenance()
    assert about["stream"]["drift"]["mean_shift"] > 0.1


def handmade(folder, hook=HOOK, hooks=(HOOK,)):
    """A stream of shards of 100 and 20 rows, as a producer leaves it just before it marks it as complete."""
    source = {"settings": {"hooks": list(hooks)}}
    store = write_store(
        folder,
        torch.randn(120, 6, generator=torch.Generator().manual_seed(0)),
        hook=hook,
        shard_rows=100,
        source=source,
    )
    Totals(2).add(Total.of(store.rows(), store.stats)).write(folder)
    begun = replace(store.manifest, window=2, complete=False)
    write_json(folder / MANIFEST, begun.to_json())
    return store


def finish(folder):
    write_json(folder / MANIFEST, replace(Manifest.read(folder), complete=True).to_json())


def test_a_full_stream_whose_producer_is_about_to_finish_is_not_stuck(tmp_path):
    store = handmade(tmp_path / "s")
    stream = ActivationStream.open(tmp_path / "s", stats=store.stats, patience=PATIENCE)
    timer = threading.Timer(1.0, finish, [tmp_path / "s"])
    timer.start()
    batches = list(stream.batches(64, epochs=1, drop_last=False))
    timer.join()
    assert [len(batch) for batch in batches] == [64, 56]
    torch.testing.assert_close(in_order(torch.cat(batches)), in_order(store.rows()), rtol=0, atol=0)


def test_the_manifest_is_read_only_when_it_has_changed(tmp_path, monkeypatch):
    store = handmade(tmp_path / "s")
    stream = ActivationStream.open(tmp_path / "s", stats=store.stats, patience=PATIENCE)
    real, reads = Manifest.read, []

    def counting(folder):
        reads.append(folder)
        return real(folder)

    monkeypatch.setattr(Manifest, "read", counting)
    assert [len(stream) for _ in range(7)] == [120] * 7
    assert not reads
    finish(tmp_path / "s")
    reads.clear()
    assert len(stream) == 120
    assert stream.manifest.complete
    assert len(reads) == 1


@pytest.mark.parametrize("name", ["{elsewhere}", "../elsewhere", "..", ""])
def test_streams_outside_the_folder_are_not_opened(tmp_path, name):
    hook = name.format(elsewhere=tmp_path / "elsewhere")
    handmade(tmp_path / "elsewhere", hook=hook)
    handmade(tmp_path / "parent" / HOOK, hooks=[HOOK, hook])
    with pytest.raises(InputError, match="no folder of"):
        open_all(tmp_path / "parent", patience=0.02)


def test_an_autoencoder_trains_on_a_stream_that_has_just_begun(tmp_path):
    pytest.importorskip("sae_lens.training.sae_trainer")  # slow to import: now, not while the producer gets ahead
    store = handmade(tmp_path / "s")
    filled = Manifest.read(tmp_path / "s").to_json()
    write_json(tmp_path / "s" / MANIFEST, replace(Manifest.read(tmp_path / "s"), shards=()).to_json())
    stream = ActivationStream.open(tmp_path / "s", stats=store.stats, checkpointed=False, patience=PATIENCE)
    timer = threading.Timer(1.0, write_json, [tmp_path / "s" / MANIFEST, filled])
    timer.start()
    training = SAE.fit(stream, n_latents=30, k=3, rows=93, batch_size=31).provenance["training"]
    timer.join()
    assert (training["batch_size"], training["rows_seen"]) == (31, 93)
