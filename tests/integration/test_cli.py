"""The stages one by one, as commands, on a tiny model folder: what one writes, the next reads."""

import json
import re
import shlex
from pathlib import Path

import pandas as pd
import pytest
from glp_lens_cli import app
from typer.testing import CliRunner

import glp_lens as gl
from glp_lens import lm
from glp_lens.evals import probing
from glp_lens.evals.results import Results
from tests.conftest import tiny_texts
from tests.integration.toy_steering import steer_in_the_toy_language

KINDS = ["glp", "sae", "pca", "gaussian", "raw"]
SIZES = {
    "glp": "--rows 1280 --batch-size 64 --width 12 --mlp 20 --layers 2 --validation heldout",
    "sae": "--rows 1280 --batch-size 64 --latents 40 --k 5",
    "pca": "--components 20",
    "gaussian": "",
    "raw": "",
}


@pytest.fixture(scope="module")
def command(tiny_folder, tmp_path_factory):
    """Runs a command in a folder that all tests share; it must succeed."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "texts.csv").write_text("text\n" + "\n".join(tiny_texts(400)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        runner = CliRunner()

        def run(line):
            result = runner.invoke(app, shlex.split(line.replace("LM", f"--model {tiny_folder}")))
            assert result.exit_code == 0, (result.exception, result.stderr)
            return result.stdout

        yield run


@pytest.fixture(scope="module")
def stores(command):
    said = command("collect LM --texts texts.csv --tokens 2000 --context 24 --out acts")
    command("collect LM --texts texts.csv --tokens 200 --context 24 --split heldout --out heldout")
    return said


@pytest.fixture(scope="module")
def models(command, stores):
    for kind in KINDS:
        assert f"saved {kind}" in command(f"train {kind} --store acts {SIZES[kind]}")
    return ",".join(f"models/{kind}" for kind in KINDS)


def test_collect_says_what_it_made_and_the_store_tells(command, stores):
    assert "2,000 rows of width 24 from blocks.1.hook_resid_post" in stores
    about = json.loads(command("store info acts --json"))
    assert (about["rows"], about["dtype"], about["corpus"]["name"]) == (2000, "bfloat16", "texts.csv (train)")
    assert "blocks.1.hook_resid_post" in command("store info acts")


def test_collecting_again_opens_the_finished_store(command, stores):
    assert command("collect LM --texts texts.csv --tokens 2000 --context 24 --out acts") == stores


def test_several_hook_points_give_aligned_stores(command):
    command("collect LM --texts texts.csv --tokens 300 --hook blocks.0.hook_resid_post,blocks.2.hook_mlp_out --out two")
    first, second = (gl.ActivationStore.open(f"two/{h}") for h in ("blocks.0.hook_resid_post", "blocks.2.hook_mlp_out"))
    assert len(first) == len(second) == 300
    assert first.column("token_id").tolist() == second.column("token_id").tolist()


def test_every_kind_is_trained_and_loads(models):
    for folder in models.split(","):
        model = gl.load(folder)
        assert (model.kind, model.d_in) == (folder.split("/")[1], 24)
    assert gl.load("models/glp").history[-1]["validation_loss"] > 0
    assert gl.load("models/sae").n_features == 40


TINY_TASKS = "--probe-train 130 --probe-test 30 --context 24"


@pytest.fixture(scope="module")
def probed(command, models):
    """A run on a task of sae-probes and one of the user's, with all controls: its options, and what it printed."""
    rows = [f"{text},{'game' if i % 2 else 'war'}" for i, text in enumerate(tiny_texts(180, seed=3))]
    Path("mine.csv").write_text("text,topic\n" + "\n".join(rows))
    line = (
        f"probe LM --models {models} --tasks 5_hist_fig_ismale,mine.csv --label-column topic {TINY_TASKS} "
        "--sigmas 0.5,0.1 --ks 3 --seeds 2 --random --neurons"
    )
    return line, command(f"{line} --out results/probing")


def test_probe_compares_models_and_controls_in_one_command(probed):
    _, said = probed
    assert re.search(r"2 tasks of 2 families: \d+ texts to read, .* then 7 models to probe", said)  # told beforehand
    results = Results.load("results/probing")
    entries = results.config["entries"]
    assert list(entries) == [
        "glp sigma=0.5", "glp sigma=0.1", "glp sigma=0.1+0.5", "sae", "pca", "gaussian", "raw", "random", "neurons",
    ]  # fmt: skip
    assert [name for name, entry in entries.items() if not entry["main"]] == ["glp sigma=0.1", "glp sigma=0.1+0.5"]
    sizes = {name: entry["n_features"] for name, entry in entries.items()}
    assert (sizes["random"], sizes["neurons"], sizes["glp sigma=0.1+0.5"]) == (40, 40, 80)
    assert entries["neurons"]["hook"] == "blocks.1.mlp.hook_post"
    assert results.config["seeds"] == [0, 1]
    table = results.frame()
    assert set(table.task) == {"5_hist_fig_ismale", "mine", "all"}
    assert set(table.setting[table.setting.str.contains("dedup;probe")]) == {
        "split=dedup;probe=sparse;k=3",
        "split=dedup;probe=sparse;rank=difference;k=3",
    }
    page = Path("results/probing/report.html")
    assert "mine" in page.read_text()
    for part in (*entries, page, "results/probing/metrics.csv", "results/probing/results.json"):
        assert str(part) in said


def test_probe_goes_on_where_it_stopped(command, probed, tiny_folder, monkeypatch):
    line = f"{probed[0]} --cache results/probing/cache --out results/again"
    real, seen = probing.suite.score, []

    def interrupted(entries, rows, *rest):
        if rows.task.name == "mine":
            raise KeyboardInterrupt
        return real(entries, rows, *rest)

    def counted(entries, rows, *rest):
        seen.append(rows.task.name)
        return real(entries, rows, *rest)

    def refused(*_args, **_options):
        raise AssertionError("texts were run again")

    monkeypatch.setattr(lm, "activations", refused)
    monkeypatch.setattr(probing.suite, "score", interrupted)
    assert CliRunner().invoke(app, shlex.split(line.replace("LM", f"--model {tiny_folder}"))).exit_code == 130
    assert not Path("results/again/metrics.csv").exists()
    monkeypatch.setattr(probing.suite, "score", counted)
    command(line)
    assert set(seen) == {"mine"}
    assert Path("results/again/metrics.csv").read_bytes() == Path("results/probing/metrics.csv").read_bytes()


def test_probe_of_a_labelled_store(command, models):
    rows = [f"{text},{i % 2}" for i, text in enumerate(tiny_texts(60, seed=5))]
    Path("labelled.csv").write_text("text,label\n" + "\n".join(rows))
    command("collect LM --texts labelled.csv --labels label --split all --context 24 --out labelled")
    said = command("probe --models models/raw --store labelled --label label --probe-train 0 --ks none --out of_store")
    results = Results.load("of_store")
    (task,) = results.data["tasks"].values()
    n = len(gl.ActivationStore.open("labelled"))
    assert sum(task["official"].values()) == n
    assert results.data["hook"] == "blocks.1.hook_resid_post"
    assert not results.frame().setting.str.contains("sparse").any()
    assert "raw" in said


def test_probe_takes_all_rows_of_a_task_when_asked(command, models):
    line = "probe LM --models models/raw --tasks 119_us_state_TX --context 4 --probe-train 0 --probe-test 0 --ks none"
    command(f"{line} --out uncapped")
    sizes = Results.load("uncapped").data["tasks"]["119_us_state_TX"]["official"]
    n = len(gl.corpus.read_dataset("119_us_state_TX"))
    train = min(1024, n - 100)
    assert sizes == {"train": train, "test": n - train - 1}


def test_fidelity_and_density(command, models):
    line = f"fidelity LM --models {models} --store acts --texts texts.csv --documents 5 --context 24"
    assert "delta_nll" in command(line)
    assert "flow_loss" in command(f"density --models {models} --store heldout")
    assert {"clean", "mean ablation", "glp", "sae", "pca"} <= set(pd.read_csv("results/fidelity/metrics.csv").model)
    assert {"glp", "gaussian"} <= set(pd.read_csv("results/density/metrics.csv").model)


def test_steer_with_named_models(command, models, monkeypatch):
    steer_in_the_toy_language(monkeypatch)
    said = command(
        "steer LM --models prior=models/glp,models/sae --store acts --strengths 0.5,1 --prompts 4 --new-tokens 5"
    )
    table = pd.read_csv("results/steering/metrics.csv")
    assert {
        "prior",
        "prior sigma=0.3",
        "prior difference",
        "sae",
        "plain",
        "shrink",
        "random labels",
        "unsteered",
    } <= set(table.model)
    assert "harmonic" in said


def test_report_of_the_suites_and_of_its_own_folder_again(command, models):
    command(f"probe LM --models {models} --tasks 5_hist_fig_ismale {TINY_TASKS} --ks none --out out/probing")
    for out in ("out/report", "out"):  # the second time, merged results of the first lie among the suites'
        command(f"report out --out {out} --title Mine")
        assert "Mine" in Path(out, "report.html").read_text()
        suites = json.loads(Path(out, "results.json").read_text())["suites"]
        assert set(suites) == {"probing"}
    table = pd.read_csv("out/metrics.csv")
    assert len(table) == len(pd.read_csv("out/probing/metrics.csv"))
