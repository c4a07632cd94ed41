"""Jobs that were stopped at any point go on with the same command; finished ones and those of others are refused."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from glp_lens_cli import app
from typer.testing import CliRunner

import glp_lens as gl
from glp_lens import report
from glp_lens.activations.writer import lock, locked
from glp_lens.display import plots
from glp_lens.errors import InputError
from glp_lens.evals.density import suite as density_suite
from glp_lens.evals.results import Results
from glp_lens.pipeline import CompareJob, compare
from tests.conftest import tiny_texts

pytestmark = pytest.mark.usefixtures("blank_pictures")

DENSITY = "density --models glp,gaussian --store heldout --out density"
LINES = {
    "density": DENSITY,
    "report": "report results --out page",
    "score": "score LM --models gaussian --texts few.csv --context 24 --out scores",
    "train": "train glp --store acts --rows 128 --batch-size 64 --width 12 --mlp 20 --layers 2 --out new",
    "sample": "sample glp --n 5 --out rows.safetensors",
}


class Stop(BaseException):
    """As a kill, in that nothing catches it."""


@pytest.fixture(scope="module")
def work(tiny_folder, tmp_path_factory):
    """Stores, two models, and results of a suite."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "texts.csv").write_text("text\n" + "\n".join(tiny_texts(400)))
    (folder / "few.csv").write_text("text\n" + "\n".join(tiny_texts(3, seed=4)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for split, tokens in (("train", 2000), ("heldout", 200)):
            out = "acts" if split == "train" else split
            run(f"collect LM --texts texts.csv --tokens {tokens} --context 24 --split {split} --out {out}", tiny_folder)
        run("train glp --store acts --rows 1280 --batch-size 64 --width 12 --mlp 20 --layers 2 --out glp")
        run("train gaussian --store acts --out gaussian")
        run(DENSITY.replace("--out density", "--out results/density"))
    return folder


@pytest.fixture
def here(work, tmp_path, monkeypatch):
    """A copy of them to work in."""
    shutil.copytree(work, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def run(line, model=None, code=0):
    """What a command says, with its warnings and errors."""
    result = CliRunner().invoke(app, shlex.split(line.replace("LM", f"--model {model}")))
    if isinstance(result.exception, Stop):
        raise result.exception
    assert result.exit_code == code, (result.exception, result.output)
    return result.output


def stopped(monkeypatch, line, model, step):
    """Run a command that is stopped before its `step`-th file takes its place; whether it came to that."""
    with monkeypatch.context() as patch:
        count, real = [], os.replace

        def deadly(source, target):
            count.append(target)
            if len(count) == step:
                raise Stop
            real(source, target)

        patch.setattr(os, "replace", deadly)
        try:
            run(line, model)
        except Stop:
            return True
    return False


def files(folder="."):
    return {path for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_stopped_at_every_step_of_writing_the_same_command_goes_on(here, tiny_folder, monkeypatch, line):
    before, step = files(), 1
    while stopped(monkeypatch, line, tiny_folder, step):
        step += 1
    made, out = files() - before, Path(line.split("--out ")[1])
    assert step > 1
    assert "already" in run(line, tiny_folder, code=2)
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    run(line, tiny_folder)
    assert files() - before == made  # as if it had never been stopped


def test_a_page_that_is_missing_is_made_of_the_results(here, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(report, "write_report", lambda *_: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            run(DENSITY)
    saved = Path("density/results.json").read_bytes()
    monkeypatch.setattr(density_suite, "_run", lambda *_: pytest.fail("measured again"))
    shutil.rmtree("density/cache")
    assert "density/report.html" in run(DENSITY)
    assert Path("density/results.json").read_bytes() == saved
    assert "already exists" in run(DENSITY, code=2)
    Path("density/report.html").unlink()
    assert "density/report.html" in run(DENSITY)


def test_results_of_models_that_have_changed_since_are_not_shown(here, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(report, "write_report", lambda *_: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            run(DENSITY)
    saved = Results.load("density").frame()
    run("train glp --store acts --rows 640 --batch-size 64 --width 12 --mlp 20 --layers 2 --out glp --overwrite")
    run(DENSITY)
    assert not Results.load("density").frame().equals(saved)


@pytest.mark.parametrize("change", ["--seed 3", "--density-rows 50"])
def test_results_of_another_job_are_refused_and_stay(here, monkeypatch, change):
    with monkeypatch.context() as patch:
        patch.setattr(report, "write_report", lambda *_: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            run(DENSITY)
    saved = Path("density/results.json").read_bytes()
    assert "already exists: choose another --out" in run(f"{DENSITY} {change}", code=2)
    assert "already exists" in run("report results --out density", code=2)
    assert Path("density/results.json").read_bytes() == saved
    run(f"{DENSITY} {change} --overwrite")


def test_a_plot_or_page_that_fails_is_a_line_and_costs_no_results(here, monkeypatch):
    def broken(*_args, **_options):
        raise RuntimeError("no such\nglyph")

    with monkeypatch.context() as patch:
        patch.setattr(plots, "_write_powers", lambda figure: broken() if len(figure.axes) else None)
        with pytest.warns(UserWarning, match="plot density could not be made"):
            run(DENSITY)
    assert "This plot could not be drawn" in Path("density/report.html").read_text()
    monkeypatch.setattr(report, "write_report", broken)
    with pytest.warns(UserWarning, match=r"report.html could not be made \(RuntimeError: no such glyph\)"):
        run(DENSITY.replace("--out density", "--out other"))
    assert len(Results.load("other").metrics) == len(Results.load("density").metrics)
    assert "all numbers are saved" in run("report density --out page", code=2)
    assert Path("page/results.json").exists()


def test_a_loss_curve_that_fails_costs_no_model(here, monkeypatch):
    monkeypatch.setattr("glp_lens.report.plots.loss_curve", lambda *_, **__: 1 / 0)
    with pytest.warns(UserWarning, match=r"loss.png could not be made"):
        run(LINES["train"])
    assert gl.load("new").kind == "glp"


def test_a_folder_has_one_job_at_a_time(here, tiny_bridge):
    held = lock(Path("density"))
    assert "another process is writing to density" in run(DENSITY, code=2)
    os.close(held)
    held = lock(Path("runs"))
    with pytest.raises(InputError, match="another process is writing to runs"):
        compare(CompareJob(out="runs"), model=tiny_bridge, texts=["a text"])
    assert not any(Path("runs").iterdir())
    os.close(held)


def test_a_job_that_fails_before_it_made_anything_leaves_no_folder(here):
    run("density --models nothing --store heldout --out failed", code=2)
    assert not Path("failed").exists()


def test_a_shared_folder_is_waited_for_also_if_its_holder_is_killed(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("glp_lens.activations.waiting.QUIET_SECONDS", 0)
    code = f"import fcntl, os, time; f = os.open({str(tmp_path)!r}, 0); fcntl.flock(f, 2); print(flush=True)"
    holder = subprocess.Popen([sys.executable, "-c", f"{code}; time.sleep(60)"], stdout=subprocess.PIPE)
    holder.stdout.readline()
    pid = os.fork()
    if pid == 0:
        time.sleep(2.5)  # a line is drawn every two seconds at most
        os.kill(holder.pid, signal.SIGKILL)
        os._exit(0)
    with locked(tmp_path, wait=True):
        pass
    os.waitpid(pid, 0)
    holder.communicate()
    assert f"waiting for another process that writes to {tmp_path}" in capfd.readouterr().err
