"""Training on several processes: the same as on one, also sharded, killed and resumed, and never a hang."""

import contextlib
import faulthandler
import math
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from glp_lens.activations import ActivationStore, write_store
from glp_lens.errors import InputError
from glp_lens.models.glp import GLP
from glp_lens.training import checkpoint, distributed
from glp_lens.training.config import TrainConfig
from glp_lens.training.objective import Batch
from tests.unit.toy_training import D, Killed, denoiser, rows, same, train, weights

STEPS, SIZE = 20, 36
PLAIN = TrainConfig(rows=STEPS * SIZE, batch_size=SIZE, lr=1e-3, autocast=False)
FULL = replace(PLAIN, sigmas="stratified", ema=0.9, accumulate=2)
MUON = replace(FULL, optimizer="muon")
LARGE = replace(PLAIN, rows=3 * 1200, batch_size=1200)  # more rows a process than share a generator of noise
CASES = {
    "plain": (PLAIN, {}),
    "full": (FULL, {}),
    "muon": (MUON, {}),
    "large": (LARGE, {}),
    "grown": (replace(FULL, grow_rows=SIZE), {}),
    "conditioned": (FULL, {}),
    "recompute": (replace(FULL, rows=4 * SIZE), {"recompute": True}),
    "shard": (replace(FULL, rows=6 * SIZE), {"shard_weights": True}),
    "shard-muon-conditioned-recompute": (replace(MUON, rows=2 * SIZE), {"shard_weights": True, "recompute": True}),
}
"""Settings, and how they are run on several processes."""

SEVERAL = [(2, name) for name in CASES] + [(3, "full")]
RESUMED = [(2, "full"), (2, "shard"), (3, "full")]
SAME = 1e-6
MUON_SAME = 1e-3
"""Muon makes its matrices orthogonal in bfloat16: a last bit that differs in a gradient becomes a larger difference."""
PATIENCE = 200


def model(case, seed=0):
    extra = {"multi_layer_n_layers": 3, "d_condition": 5} if "conditioned" in case else {}
    return denoiser(seed, d_model=20, d_mlp=33, **extra)


def feed(case, size, killed_at=None, spoilt_at=None):
    """This process's share of batches that depend on their number alone."""
    share = size // distributed.world_size()
    mine = slice(distributed.rank() * share, (distributed.rank() + 1) * share)

    def start(k):
        while True:
            if k == killed_at:
                raise Killed
            x, layer, condition = rows(size, 1000 + k), None, None
            if "conditioned" in case:
                generator = torch.Generator().manual_seed(k)
                layer = torch.randint(3, (size,), generator=generator)
                condition = torch.randn(size, 5, generator=generator)
            if k == spoilt_at:
                x[-1, 2] = math.nan  # in the last process's rows
            yield Batch(x, layer, condition).part(mine)
            k += 1

    return start


def held(case):
    layer = torch.arange(50) % 3 if "conditioned" in case else None
    return Batch(rows(50, 8), layer)


def run(case, config=None, *, module=None, batches=None, **options):
    """What a training comes to, in this process."""
    config, module = config or CASES[case][0], module or model(case)
    snapshots, entries = {}, []
    result = train(
        module, batches or feed(case, config.batch_size), config, validation=held(case), log_points=4, snapshots=3,
        on_snapshot=lambda step: snapshots.update({step: weights(module)}), on_entry=entries.append, **options,
    )  # fmt: skip
    return {
        "weights": weights(module),
        "history": [{k: v for k, v in entry.items() if k != "seconds"} for entry in result.history],
        "snapshots": snapshots,
        "told": len(entries),
        "plain": all(type(p) is torch.nn.Parameter for p in module.parameters()),
    }


def refused(case, config=None, **options):
    with pytest.raises(InputError) as caught:
        run(case, config, **options)
    return str(caught.value)


def fitted(folder):
    config = replace(FULL, rows=SIZE * 8)
    return weights(GLP.fit(ActivationStore.open(folder / "store"), config, d_model=10, d_mlp=15, n_layers=2).denoiser)


# -- what the processes do ---------------------------------------------------------------------------------


def everything(folder):
    """All cases for this number of processes, one after the other."""
    writes, write = [], checkpoint.write_tensors
    checkpoint.write_tensors = lambda *args: (writes.append(args[0].name), write(*args))
    found = {case: run(case, **CASES[case][1]) for size, case in SEVERAL if size == distributed.world_size()}
    for case in [case for size, case in RESUMED if size == distributed.world_size()]:
        (config, options), state = CASES[case], folder / f"state-{case}"
        with pytest.raises(Killed):
            run(case, batches=feed(case, SIZE, killed_at=config.steps // 2), state=state, save_seconds=0, **options)
        if distributed.is_main():
            shutil.copy(state, folder / f"killed-{case}")
        distributed.barrier()
        found[f"{case}-resumed"] = run(case, module=model(case, seed=5), state=state, **options)
    if distributed.world_size() == 2:
        found["autocast"] = [
            run("plain", replace(FULL, rows=8 * SIZE, autocast=True), shard_weights=s) for s in (False, True)
        ]
    found["writes"] = writes
    found["fit"] = fitted(folder)
    found["refused"] = [
        refused("plain", batches=feed("plain", SIZE, spoilt_at=7), state=folder / "spoilt", save_seconds=0),
        refused("plain", batches=feed("plain", SIZE, spoilt_at=1), shard_weights=True),
        refused("plain", replace(PLAIN, batch_size=35)),
    ]
    return found


def one_fails(folder):
    """The last process ends with an error while the others go on."""
    last = distributed.rank() == distributed.world_size() - 1
    run("plain", batches=feed("plain", SIZE, killed_at=4 if last else None))


def _process(function, folder, rank, size, port):
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    faulthandler.dump_traceback_later(PATIENCE * 0.8, exit=True)
    with distributed.session("cpu"):
        torch.save(function(folder), folder / f"found-{rank}")
    assert not distributed.running()


def together(function, folder, size):
    """Run a function in several processes; gives their exit codes. None outlives this call."""
    context = multiprocessing.get_context("forkserver")  # a clean process that has imported all this once
    context.set_forkserver_preload([__name__, "torch.distributed.fsdp", "torch._dynamo"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [context.Process(target=_process, args=(function, folder, i, size, port)) for i in range(size)]
    try:
        for process in processes:
            process.start()
        until = time.monotonic() + PATIENCE
        for process in processes:
            process.join(max(0.0, until - time.monotonic()))
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def dying(folder):
    """What torchrun starts: the first time, the last process is killed after some steps."""
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    last = distributed.rank() == distributed.world_size() - 1

    def batches(k):
        (folder / f"start-{distributed.rank()}-{'first' if first else 'again'}").write_text(str(k))
        for batch in feed("plain", SIZE)(k):
            if first and last and k == 7:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch
            k += 1

    found = run("plain", batches=batches, state=folder / "state", save_seconds=0)
    if distributed.is_main():
        torch.save(found["weights"], folder / "elastic")


# -- the same as one process -------------------------------------------------------------------------------


def write_rows(folder):
    x = rows(411, 77) * torch.arange(1, D + 1) + 3
    write_store(folder / "store", x, hook="blocks.1.hook_resid_post")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    write_rows(folder)
    return {case: run(case) for case in CASES} | {"fit": fitted(folder)}


@contextlib.contextmanager
def torchrun_job(function, folder, restarts):
    """Two processes that torchrun started; none outlives the block."""
    options = ["--nproc-per-node", "2", "--max-restarts", str(restarts)]
    options += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    with (folder / "log").open("w") as log:
        job = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *options, __file__, function.__name__, str(folder)],
            env=environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        yield job
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory):
    """A job of which a process is killed, on its way while the other tests run."""
    folder = tmp_path_factory.mktemp("torchrun")
    with torchrun_job(dying, folder, 1) as job:
        yield job, folder


@pytest.fixture(scope="module")
def several(tmp_path_factory, torchrun):
    """By the number of processes: the folder, and what each of them found."""
    found = {}
    for size in (2, 3):
        folder = tmp_path_factory.mktemp("several")
        write_rows(folder)
        assert together(everything, folder, size) == [0] * size
        found[size] = folder, [torch.load(folder / f"found-{i}", weights_only=True) for i in range(size)]
    return found


def difference(got, want):
    """Largest relative difference of any tensor, by norm."""
    assert got.keys() == want.keys()
    return max(float((got[name] - want[name]).norm() / want[name].norm()) for name in want)


@pytest.mark.parametrize(("size", "case"), SEVERAL)
def test_several_processes_train_what_one_does(several, alone, size, case):
    want = alone[case]
    for process in several[size][1]:
        got = process[case]
        assert got["plain"]
        assert difference(got["weights"], want["weights"]) < (MUON_SAME if "muon" in case else SAME)
        assert got["snapshots"].keys() == want["snapshots"].keys()
        for step, snapshot in want["snapshots"].items():
            assert difference(got["snapshots"][step], snapshot) < (MUON_SAME if "muon" in case else SAME)
        assert len(got["history"]) == len(want["history"])
        for entry, expected in zip(got["history"], want["history"], strict=True):
            assert entry == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("size", "case"), SEVERAL)
def test_processes_agree_to_the_last_bit_and_one_reports(several, size, case):
    first, *others = [process[case] for process in several[size][1]]
    assert first["told"] == len(first["history"]) > 0
    for other in others:
        assert same(other["weights"], first["weights"])
        assert other["history"] == first["history"]
        assert other["told"] == 0


@pytest.mark.parametrize(("size", "case"), RESUMED)
def test_a_killed_training_resumes_to_the_same_bits(several, size, case):
    folder, processes = several[size]
    for process in processes:
        assert same(process[f"{case}-resumed"]["weights"], process[case]["weights"])
        assert process[f"{case}-resumed"]["history"] == process[case]["history"]
    writers = [process["writes"].count(f"state-{case}") for process in processes]
    assert writers[0] > 1
    assert set(writers[1:]) == {0}
    # and on another number of processes, here one, to the same weights but for rounding
    again = run(case, module=model(case, seed=6), state=folder / f"killed-{case}")
    assert difference(again["weights"], processes[0][case]["weights"]) < SAME


def test_sharded_bfloat16_weights_train_like_autocast(several):
    """Were the gains of the layer norms rounded too, the losses would differ by some 3e-4."""
    unsharded, sharded = several[2][1][0]["autocast"]
    assert all(w.dtype == torch.float32 for w in sharded["weights"].values())
    for entry, expected in zip(sharded["history"], unsharded["history"], strict=True):
        assert entry["loss"] == pytest.approx(expected["loss"], rel=3e-5)
        assert entry["validation_loss"] == pytest.approx(expected["validation_loss"], rel=3e-5)


def test_a_job_whose_process_is_killed_ends_with_the_same_bits(several, torchrun):
    job, folder = torchrun
    assert job.wait(PATIENCE) == 0, (folder / "log").read_text()
    starts = {path.name: int(path.read_text()) for path in folder.glob("start-*")}
    assert starts == {"start-0-first": 0, "start-1-first": 0, "start-0-again": 5, "start-1-again": 5}
    undisturbed = several[2][1][0]["plain"]["weights"]
    assert same(torch.load(folder / "elastic", weights_only=True), undisturbed)


def test_a_store_is_shared_out_to_the_same_prior(several, alone):
    for _, processes in several.values():
        for process in processes:
            assert difference(process["fit"], alone["fit"]) < SAME


def test_all_processes_are_refused_with_the_same_line(several):
    for size, (_, processes) in several.items():
        diverged, sharded, uneven = processes[0]["refused"]
        assert all(process["refused"] == processes[0]["refused"] for process in processes)
        assert "training diverged at step 8" in diverged
        assert "the last good state, of step 5, is kept" in diverged
        assert "training diverged at step 2" in sharded
        assert f"batch_size=35 does not among {size} process(es)" in uneven


def test_processes_whose_fellow_fails_end_too(tmp_path):
    """Under torchrun, which also ends a process that gloo keeps waiting for the one that failed."""
    with torchrun_job(one_fails, tmp_path, 0) as job:
        assert job.wait(PATIENCE) == 1
    assert "Killed" in (tmp_path / "log").read_text()


def test_sharding_needs_processes():
    with pytest.raises(InputError, match="start them with torchrun"):
        run("plain", shard_weights=True)


def test_a_process_of_its_own_joins_nothing():
    with distributed.session("cpu"):
        assert not distributed.running()
        assert distributed.device("cuda") == "cuda"


def test_recomputed_activations_give_the_same_gradients(alone):
    assert difference(run("recompute", recompute=True)["weights"], alone["recompute"]["weights"]) == 0


if __name__ == "__main__":  # as torchrun starts it
    torch.set_num_threads(1)
    with distributed.session("cpu"):
        {"dying": dying, "one_fails": one_fails}[sys.argv[1]](Path(sys.argv[2]))
