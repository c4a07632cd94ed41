"""The stages one by one, as commands, on a tiny model folder: what one writes, the next reads."""

import json
import shlex
from pathlib import Path

import pandas as pd
import pytest
from glp_lens_cli import app
from typer.testing import CliRunner

import glp_lens as gl
from glp_lens.evals import steering
from glp_lens.evals.steering import suite
from tests.conftest import tiny_texts
from tests.integration.test_steering import Words, ordered_texts, toy_concept

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


def test_probe(command, models):
    sizes = "--tasks 5_hist_fig_ismale --probe-train 40 --probe-test 30 --context 24"
    said = command(f"probe LM --models {models} {sizes} --sigmas 0.1,0.5 --out results/probing")
    table = pd.read_csv("results/probing/metrics.csv")
    assert {"glp sigma=0.1", "glp sigma=0.5", "sae", "pca", "gaussian", "raw"} <= set(table.model)
    assert "auc" in said


def test_fidelity_and_density(command, models):
    line = f"fidelity LM --models {models} --store heldout --texts texts.csv --documents 5 --context 24"
    said = command(line + " --out results")
    assert "delta_nll" in said
    assert "flow_loss" in said
    assert {"clean", "mean ablation", "glp", "sae", "pca"} <= set(pd.read_csv("results/fidelity/metrics.csv").model)
    assert {"glp", "gaussian"} <= set(pd.read_csv("results/density/metrics.csv").model)


def test_steer_with_named_models(command, models, monkeypatch):
    run, calibrate = steering.run, suite.FluencyJudge.calibrate

    def by_hand(ngrams, tokenize, prompts, unsteered, human, *, seed):
        return calibrate(ngrams, tokenize, ["the of"] * len(human), [t[20:] for t in human], human, seed=seed)

    def toy(model, entries, concept, **options):
        return run(model, entries, toy_concept(), embedder=Words(), fluency_texts=ordered_texts(), **options)

    monkeypatch.setattr(steering, "run", toy)
    monkeypatch.setattr(suite.FluencyJudge, "calibrate", by_hand)
    said = command(
        "steer LM --models prior=models/glp,models/sae --store acts --strengths 0.5,1 --prompts 4 --new-tokens 5"
    )
    table = pd.read_csv("results/steering/metrics.csv")
    assert {"prior", "prior sigma=0.2", "sae", "plain", "random", "unsteered"} <= set(table.model)
    assert "harmonic" in said


def test_report_of_the_suites_and_of_its_own_folder_again(command, models):
    command(f"probe LM --models {models} --tasks 5_hist_fig_ismale --probe-train 40 --probe-test 30 --out out/probing")
    for out in ("out/report", "out"):  # the second time, merged results of the first lie among the suites'
        command(f"report out --out {out} --title Mine")
        assert "Mine" in Path(out, "report.html").read_text()
        suites = json.loads(Path(out, "results.json").read_text())["suites"]
        assert set(suites) == {"probing"}
    table = pd.read_csv("out/metrics.csv")
    assert len(table) == len(pd.read_csv("out/probing/metrics.csv"))
