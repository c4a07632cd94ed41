"""`glp-lens train glp`: what it writes, how it goes on, and what it can be asked for."""

import contextlib
import faulthandler
import os
import shlex
import socket
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from glp_lens_cli import app
from typer.testing import CliRunner

import glp_lens as gl
from glp_lens.activations import write_store
from glp_lens.activations.writer import lock
from glp_lens.training import history, loop
from glp_lens.training.config import RunOptions
from tests.fuzz.children import fork, wait

pytestmark = pytest.mark.usefixtures("blank_pictures")

D = 10
BASE = "train glp --rows 640 --batch-size 32 --width 12 --mlp 20 --layers 2"


def rows(n, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, D, generator=generator) @ torch.randn(D, D, generator=generator)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Stores: `acts` and `held` of one layer, with a class; siblings of layers 1 and 3 in `two` and `two_held`."""
    root = tmp_path_factory.mktemp("data")
    source = {"model": {"name": "tiny", "n_layers": 4}}
    for name, n, seed in (("acts", 500, 0), ("held", 90, 1)):
        kind = torch.arange(n) % 3
        x = rows(n, seed)
        x[:, 0] += 8.0 * kind
        options = {"columns": {"kind": kind.numpy()}, "labels": {"kind": "int64"}}
        write_store(root / name, x, hook="blocks.1.hook_resid_post", source=source, **options)
    for name, n, seed in (("two", 500, 2), ("two_held", 90, 3)):
        for layer in (1, 3):
            hook = f"blocks.{layer}.hook_resid_post"
            write_store(root / name / hook, rows(n, seed + layer), hook=hook, source=source)
    spiked = rows(500, 0)
    spiked[7] *= 1e3
    write_store(root / "spiked", spiked, hook="blocks.1.hook_resid_post", source=source)
    return root


def called(data, options, out, base=BASE):
    return CliRunner().invoke(app, shlex.split(f"{base} --out {out} {options}".replace("DATA", str(data))))


@pytest.fixture
def train(data, tmp_path, monkeypatch):
    """Runs `train glp` with more options, into `tmp_path/NAME`; gives what it said, or the exception."""
    monkeypatch.chdir(tmp_path)

    def run(options, out="glp", *, base=BASE, fails=False):
        result = called(data, options, out, base)
        if fails:
            assert result.exit_code != 0
            return result
        assert result.exit_code == 0, (result.exception, result.stderr)
        return result.stdout

    return run


def weights(path, checkpoint="final"):
    return gl.GLP.from_pretrained(path, checkpoint=checkpoint).denoiser.state_dict()


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_training_leaves_model_curve_picture_and_checkpoints(train, tmp_path):
    train(
        "--store DATA/acts --validation DATA/held --checkpoints 4 --ema 0.9 --accumulate 4 --optimizer muon "
        "--recipe small --lr 1e-3"
    )
    glp = gl.load(tmp_path / "glp")
    assert sorted(path.name for path in (tmp_path / "glp").iterdir()) == [
        "checkpoints", "config.json", "history.parquet", "loss.png", "model.safetensors",
    ]  # fmt: skip
    frame = history.read_history(tmp_path / "glp")
    assert frame["step"].tolist() == list(range(1, 21))
    assert frame["validation_loss"].tolist() == [entry["validation_loss"] for entry in glp.history]
    assert frame["validation_loss"].iloc[-1] < frame["validation_loss"].iloc[0]
    assert (tmp_path / "glp" / "loss.png").read_bytes().startswith(b"\x89PNG")
    # 20 steps: 1, 20^(1/3), 20^(2/3), 20
    names = [f"step_{step:08d}" for step in (1, 3, 7, 20)]
    assert sorted(path.name for path in (tmp_path / "glp" / "checkpoints").iterdir()) == names
    each = [weights(tmp_path / "glp", name) for name in names]
    assert equal(each[-1], glp.denoiser.state_dict())
    assert not equal(each[0], each[1])
    middle = gl.load(tmp_path / "glp" / "checkpoints" / names[2])
    assert equal(middle.denoiser.state_dict(), each[2])
    assert middle.provenance["training"]["rows_seen"] == 7 * 32
    assert middle.sample(5, steps=2).shape == (5, D)


class Killed(BaseException):
    """Passes through all that catches errors, as the end of a process does."""


TO_BE_KILLED = "--store DATA/acts --validation DATA/held --checkpoints 3 --ema 0.9"


@pytest.fixture(scope="module")
def whole(data):
    """What that training comes to if nothing happens to it."""
    result = called(data, TO_BE_KILLED, data / "whole")
    assert result.exit_code == 0, (result.exception, result.stderr)
    return data / "whole"


@pytest.mark.parametrize(("at", "curve"), [(1, "kept"), (8, "kept"), (8, "lost"), (8, "damaged"), (8, "of another")])
def test_a_killed_training_keeps_its_curve_and_goes_on_to_the_same_weights(
    train, whole, tmp_path, monkeypatch, at, curve
):
    usual = history.add_to_history

    def dying(folder, entry):
        usual(folder, entry)
        if entry["step"] == at:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setitem(RunOptions.__init__.__kwdefaults__, "save_seconds", 0)
        patch.setattr(history, "add_to_history", dying)
        with pytest.raises(Killed):
            train(TO_BE_KILLED, "cut", fails=True)
    assert history.read_history(tmp_path / "cut")["step"].tolist() == list(range(1, at + 1))
    assert (tmp_path / "cut" / "training.state").exists() == (at > 1)
    path = tmp_path / "cut" / "history.parquet"  # the state has it too
    if curve == "lost":
        path.unlink()
    elif curve == "damaged":
        path.write_bytes(path.read_bytes()[:-30])
    elif curve == "of another":
        history.write_history(path.parent, [{"step": 1, "loss": 99.0}, {"step": 2, "loss": 98.0}])
    train(TO_BE_KILLED, "cut")
    assert not (tmp_path / "cut" / "training.state").exists()
    assert equal(weights(tmp_path / "cut"), weights(whole))
    cut, uncut = (history.read_history(folder).drop(columns="seconds") for folder in (tmp_path / "cut", whole))
    assert cut.equals(uncut)
    for name in ("step_00000001", "step_00000004", "step_00000020"):
        assert equal(weights(tmp_path / "cut", name), weights(whole, name))


def test_starting_over_leaves_nothing_of_the_run_before(train, tmp_path):
    train("--store DATA/acts --checkpoints 4")
    assert "pass --overwrite" in train("--store DATA/acts", fails=True).stderr
    train("--store DATA/acts --checkpoints 2 --overwrite --rows 320")
    assert {path.name for path in (tmp_path / "glp" / "checkpoints").iterdir()} == {"step_00000001", "step_00000010"}
    assert history.read_history(tmp_path / "glp")["step"].tolist() == list(range(1, 11))


def test_others_can_read_what_is_saved(train, tmp_path):
    train("--store DATA/acts")
    assert {file.name: file.stat().st_mode & 0o444 for file in (tmp_path / "glp").glob("model*")} == {
        "model.safetensors": 0o444
    }


def test_a_folder_has_one_training_at_a_time(train, tmp_path):
    held = lock(tmp_path / "glp")
    result = train("--store DATA/acts", fails=True)
    assert "another process is writing to glp" in result.stderr
    os.close(held)
    train("--store DATA/acts")


def test_a_width_below_that_of_the_activations_is_told(train, recwarn):
    train(f"--store DATA/acts --width {D}", "wide")
    assert not [each for each in recwarn if "denoiser" in str(each.message)]
    with pytest.warns(UserWarning, match=f"a denoiser of width {D - 1} cannot give back noise in all {D} dimensions"):
        train(f"--store DATA/acts --width {D - 1}", "narrow")


def test_a_diverged_training_says_so_in_a_line_and_leaves_its_curve(train, tmp_path, monkeypatch):
    monkeypatch.setitem(RunOptions.__init__.__kwdefaults__, "save_seconds", 0)
    usual = loop._Trainer.step
    spoilt = lambda self, step, batch: usual(self, step, batch) * (float("nan") if step == 6 else 1)  # noqa: E731
    monkeypatch.setattr(loop._Trainer, "step", spoilt)
    error = train("--store DATA/acts --checkpoints 3", fails=True)
    assert error.exit_code == 2
    told = error.stderr.strip().splitlines()[-1]
    assert "error: training diverged at step 7: loss or gradient is not finite" in told
    assert "the last good state, of step 6, is kept in glp/training.state" in told
    assert history.read_history(tmp_path / "glp")["step"].tolist() == list(range(1, 7))
    assert (tmp_path / "glp" / "loss.png").exists()
    assert gl.load(tmp_path / "glp" / "checkpoints" / "step_00000006").d_in == D


def test_a_logger_gets_the_curve_only_if_it_is_asked_for(train, tmp_path, monkeypatch):
    sent = []
    fake = SimpleNamespace(
        init=lambda **k: sent.append(k),
        log=lambda values, step: sent.append((step, values["loss"])),
        finish=lambda: sent.append("end"),
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setitem(sys.modules, "trackio", None)
    train("--store DATA/acts", "quiet")
    assert sent == []
    train("--store DATA/acts --logger wandb --lr 1e-3", "mine")
    frame = history.read_history(tmp_path / "mine")
    assert sent[0]["name"] == "mine"
    assert sent[0]["config"]["lr"] == 1e-3
    assert sent[1:-1] == list(zip(frame["step"], frame["loss"], strict=True))
    assert sent[-1] == "end"
    assert "pip install trackio" in train("--store DATA/acts --logger trackio", "other", fails=True).stderr
    refused = train("--store DATA/acts --logger mlflow", "other", fails=True).stderr
    assert "'mlflow' is not one of 'trackio', 'wandb', 'tensorboard'" in refused


def test_sibling_stores_make_one_prior_of_several_layers(train, data, tmp_path):
    hooks = ["blocks.1.hook_resid_post", "blocks.3.hook_resid_post"]
    train(f"--store {','.join(f'DATA/two/{hook}' for hook in reversed(hooks))}", "listed")
    train("--store DATA/two --validation DATA/two_held", "folder")
    glp = gl.load(tmp_path / "folder")
    assert glp.layers == [1, 3]
    assert equal(glp.denoiser.state_dict(), weights(tmp_path / "listed"))
    assert glp.at(hooks[1]).sample(4, steps=2).isfinite().all()
    assert "validation_loss" in history.read_history(tmp_path / "folder")
    both = train("--store DATA/two", "pca", base="train pca", fails=True).stderr
    assert "a pca is trained on one store, got 2" in both


def test_random_features_are_a_kind_of_their_own(train, data, tmp_path):
    train("--store DATA/acts --features 23 --seed 4", "random", base="train random")
    expected = gl.RandomFeatures.fit(gl.ActivationStore.open(data / "acts"), n_features=23, seed=4)
    assert torch.equal(gl.load(tmp_path / "random").encode(rows(7, 9)), expected.encode(rows(7, 9)))


def test_finetuning_goes_on_from_a_checkpoint_with_its_normaliser(train, tmp_path):
    train("--store DATA/acts --checkpoints 3")
    short = "train glp --rows 64 --batch-size 32 --lr 1e-6"
    train("--store DATA/held --finetune glp --checkpoint step_00000004", "tuned", base=short)
    tuned, start = gl.load(tmp_path / "tuned"), gl.GLP.from_pretrained(tmp_path / "glp", checkpoint="step_00000004")
    assert torch.equal(tuned.mean, start.mean)
    assert torch.equal(tuned.var, start.var)
    near, far = (
        max(float((tuned.denoiser.state_dict()[k] - other[k]).abs().max()) for k in other)
        for other in (start.denoiser.state_dict(), weights(tmp_path / "glp"))
    )
    assert 0 < near < 1e-5 < far
    for options, words in (
        ("--finetune glp --width 20", "keeps its shape"),
        ("--finetune nowhere", "nowhere"),
        ("--finetune glp --checkpoint step_00000005", "there are step_00000001, step_00000004, step_00000020"),
        ("--finetune glp --store DATA/two/blocks.3.hook_resid_post", "blocks.3.hook_resid_post"),
    ):
        store = "" if "--store" in options else "--store DATA/held"
        assert words in train(f"{store} {options}", "other", base=short, fails=True).stderr
    train("--finetune glp --store DATA/two/blocks.3.hook_resid_post --allow-mismatch", "elsewhere", base=short)


def test_a_prior_conditioned_on_a_label_of_the_store(train, tmp_path):
    train("--store DATA/acts --validation DATA/held --condition kind")
    glp = gl.load(tmp_path / "glp")
    assert sorted(glp.class_vectors) == [0.0, 1.0, 2.0]
    assert glp.denoiser.config.d_condition == 3
    assert "no column 'colour'" in train("--store DATA/acts --condition colour", "other", fails=True).stderr


def test_massive_rows_count_only_if_told_to(train, tmp_path):
    with pytest.warns(UserWarning, match="1 of 500 rows are massive"):
        train("--store DATA/spiked", "robust")
    train("--store DATA/spiked --massive 0", "all")
    robust, everything = (gl.load(tmp_path / name) for name in ("robust", "all"))
    assert robust.provenance["training"]["massive_rows"] == 1
    assert float(everything.var.max() / robust.var.max()) > 100


def test_recomputing_changes_the_memory_and_not_the_weights(train, tmp_path):
    train("--store DATA/acts", "plain")
    train("--store DATA/acts --recompute", "again")
    assert equal(weights(tmp_path / "plain"), weights(tmp_path / "again"))


def test_two_processes_train_one_prior_and_one_of_them_reports(whole, data, tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = f"{BASE} {TO_BE_KILLED} --out two".replace("DATA", str(data))
    monkeypatch.chdir(tmp_path)

    def process(rank):
        faulthandler.dump_traceback_later(110, exit=True)
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()})  # as torchrun does
        with open(f"said-{rank}", "w") as said, contextlib.redirect_stdout(said):
            app(shlex.split(line), standalone_mode=False)

    assert [wait(pid) for pid in [fork(partial(process, rank)) for rank in range(2)]] == [0, 0]
    said = "".join((tmp_path / f"said-{rank}").read_text() for rank in range(2))
    assert said.count("saved glp: two") == 1
    assert said.count("GLP trained on") == 1
    one, two = (history.read_history(folder) for folder in (whole, tmp_path / "two"))
    assert two["step"].tolist() == one["step"].tolist()
    # The network runs in bfloat16, and rounds otherwise on half of the rows.
    assert two["validation_loss"].to_numpy() == pytest.approx(one["validation_loss"].to_numpy(), rel=5e-3)
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in whole.iterdir()}
    assert len(list((tmp_path / "two" / "checkpoints").iterdir())) == 3
    assert (tmp_path / "two" / "loss.png").exists()
