"""The whole comparison on a tiny model: complete, resumable, repeatable, and careful with what is there."""

import dataclasses
import importlib
import json
import shutil
from types import SimpleNamespace

import pandas as pd
import pytest

import glp_lens as gl
from glp_lens import lm
from glp_lens.activations import ActivationStore
from glp_lens.errors import InputError
from glp_lens.evals.results import Results
from glp_lens.pipeline import CompareJob, compare
from tests.conftest import tiny_texts
from tests.integration.toy_steering import steer_in_the_toy_language

pytestmark = pytest.mark.usefixtures("blank_pictures")

STAGES = [
    "collect",
    "train-glp",
    "train-sae",
    "train-baselines",
    "density",
    "probing",
    "steering",
    "fidelity",
    "report",
]
TEXTS = tiny_texts(700)


def settings(**changes):
    """Sizes that take seconds."""
    tiny = CompareJob(
        tokens=3000, heldout_tokens=300, context=24, rows=1280, glp_width=12, glp_mlp=20, glp_layers=2, glp_batch=64,
        sae_latents=40, sae_k=5, sae_batch=64, tasks=("5_hist_fig_ismale",), probe_train=130, probe_test=30,
        ks=(3,), strengths=(0.5, 1.0), prompts=4, new_tokens=6, documents=5,
    )  # fmt: skip
    return dataclasses.replace(tiny, **changes)


@pytest.fixture(scope="module", autouse=True)
def _judges_of_a_toy_language():
    """The tiny model knows a hundred words, so concept, sentence model and fluent text are made of those."""
    with pytest.MonkeyPatch.context() as patch:
        steer_in_the_toy_language(patch)
        yield


def go(out, model, **options):
    """One call; gives back the lines it said."""
    said = []
    texts, command = options.pop("texts", TEXTS), options.pop("command", None)
    page = compare(settings(**options, out=out), model=model, texts=texts, command=command, say=said.append)
    assert page == out / "report.html"
    return said


def done_before(said):
    """The stages that a call skipped."""
    return [line.split("] ")[1].split(":")[0] for line in said if line.endswith("already done")]


def fresh(model, out):
    """A finished run, and what it said."""
    said = go(out, model, command="glp-lens compare --seed 0")
    return SimpleNamespace(model=model, out=out, said=said)


@pytest.fixture(scope="module")
def bridge_run(tiny_bridge, tmp_path_factory):
    """A run that tests may look at but not change."""
    return fresh(tiny_bridge, tmp_path_factory.mktemp("bridge") / "runs")


@pytest.fixture(scope="module")
def hooked_run(tiny_hooked, tmp_path_factory):
    """Likewise, with the other class of model."""
    return fresh(tiny_hooked, tmp_path_factory.mktemp("hooked") / "runs")


@pytest.fixture(params=["bridge_run", "hooked_run"])
def finished(request):
    return request.getfixturevalue(request.param)


def test_every_stage_runs_once_and_says_so(finished):
    assert [line.split("] ")[1] for line in finished.said if ":" not in line] == STAGES
    assert done_before(finished.said) == []


def test_stores_are_disjoint_and_as_large_as_asked(finished):
    train, heldout = (ActivationStore.open(finished.out / "acts" / name) for name in ("train", "heldout"))
    assert (len(train), len(heldout)) == (3000, 300)
    assert train.d_in == 24
    assert train.hook == lm.default_hook(finished.model) == "blocks.1.hook_resid_post"
    assert not set(train.column("doc_id")) & set(heldout.column("doc_id"))


def test_models_load_and_know_where_they_come_from(finished):
    store = ActivationStore.open(finished.out / "acts" / "train")
    for kind in ("glp", "sae", "pca", "gaussian", "raw", "random"):
        model = gl.load(finished.out / "models" / kind)
        assert (model.kind, model.d_in, model.hook) == (kind, 24, store.hook)
        assert model.provenance["store"]["manifest_hash"] == store.provenance()["manifest_hash"]
    for kind in ("glp", "sae"):
        assert gl.load(finished.out / "models" / kind).provenance["training"]["rows_seen"] == 1280


def test_numbers_are_tidy_and_complete(finished):
    table = pd.read_csv(finished.out / "metrics.csv")
    assert list(table.columns) == [
        "suite", "model", "task", "setting", "metric", "value", "ci_low", "ci_high", "n",
    ]  # fmt: skip
    models = table.groupby("suite")["model"].agg(set)
    assert {"glp", "sae", "pca", "gaussian"} <= models["density"]
    assert models["probing"] == {"glp", "sae", "pca", "gaussian", "raw", "random", "dense"}
    assert {"glp difference", "sae difference", "pca difference", "plain", "shrink", "unsteered"} <= models["steering"]
    assert {"glp", "sae", "pca", "clean", "mean ablation"} <= models["fidelity"]
    key = ["suite", "model", "task", "setting", "metric"]
    assert not table.duplicated(key).any()
    named = table.assign(setting=table["setting"].fillna("")).set_index(["suite", "model", "metric"]).sort_index()
    views = set(table.setting[table.suite == "probing"])
    assert {
        "split=dedup;mode=all;layer=1",
        "split=official;probe=sparse;k=3",
        "split=dedup;mode=equal;features=24",
    } <= views
    bound = named.loc[("density", "gaussian", "flow_loss_bound")].query("setting == 'sigma=all'")["value"].iloc[0]
    assert 0.5 < bound < 1.6
    assert named.loc[("fidelity", "mean ablation", "fvu"), "value"].iloc[0] == pytest.approx(1, abs=1e-6)


def test_random_features_are_a_control_of_probing_as_wide_as_the_prior(finished):
    glp, random = (gl.load(finished.out / "models" / kind) for kind in ("glp", "random"))
    assert random.n_features == glp.n_features == 40
    everything = json.loads((finished.out / "results.json").read_text())
    assert {line["model"] for line in everything["training"]} == {"glp", "sae", "pca", "pca_raw", "gaussian", "raw"}
    assert all(
        m["model"] != "random" for suite in ("density", "fidelity") for m in everything["suites"][suite]["metrics"]
    )


def test_the_files_agree(finished):
    everything = json.loads((finished.out / "results.json").read_text())
    table = pd.read_csv(finished.out / "metrics.csv")
    assert set(everything["suites"]) == {"density", "probing", "steering", "fidelity"}
    assert sum(len(s["metrics"]) for s in everything["suites"].values()) == len(table)
    assert everything["seed"] == 0
    assert everything["config"]["sae_k"] == 5
    for name in everything["suites"]:
        alone = Results.load(finished.out / "results" / name)
        assert len(alone.metrics) == (table.suite == name).sum()


def test_the_report_tells_what_was_run(finished):
    page = (finished.out / "report.html").read_text()
    assert "glp-lens compare --seed 0" in page
    for name in ("GLP", "SAE", "PCA", "Gaussian", "plain"):
        assert name.lower() in page.lower()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert list((finished.out / "plots").glob("*.png"))


def test_a_second_call_does_nothing(finished, monkeypatch):
    def refuse(*_args, **_options):
        raise AssertionError("the language model was run")

    before = {path: path.stat().st_mtime_ns for path in finished.out.rglob("*") if path.is_file()}
    for name in ("run_with_hooks", "generate"):
        monkeypatch.setattr(finished.model, name, refuse, raising=False)
    assert done_before(go(finished.out, finished.model)) == STAGES
    assert {path: path.stat().st_mtime_ns for path in finished.out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sae_k": 3}, "train-sae: sae_k 5 -> 3"),
        ({"seed": 7}, "collect: seed 0 -> 7"),
        ({"documents": 4}, "fidelity: documents 5 -> 4"),
        ({"ks": (1, 2)}, "probing: ks [3] -> [1, 2]"),
        ({"texts": TEXTS[:-1]}, "collect: texts '700 texts"),
        ({"glp_lr": 1e-4}, "train-glp: glp_lr None -> 0.0001"),
    ],
)
def test_other_settings_are_refused_by_name(bridge_run, changes, words):
    before = (bridge_run.out / "metrics.csv").read_bytes()
    with pytest.raises(InputError) as caught:
        go(bridge_run.out, bridge_run.model, **changes)
    assert words in str(caught.value)
    assert "--overwrite" in str(caught.value)
    assert (bridge_run.out / "metrics.csv").read_bytes() == before
    assert gl.load(bridge_run.out / "models" / "sae").provenance["training"]["k"] == 5


class Stop(Exception):
    pass


def _interrupt(monkeypatch, place):
    """Make a place in the code fail at its n-th call."""
    module, name, at = place
    home = importlib.import_module(module)
    usual, calls = getattr(home, name), []

    def fails(*args, **options):
        calls.append(1)
        if len(calls) == at:
            raise Stop
        return usual(*args, **options)

    monkeypatch.setattr(home, name, fails)


@pytest.mark.parametrize(
    ("place", "skipped"),
    [
        (("glp_lens.activations.forward", "read", 2), 0),
        (("glp_lens.training.loop", "validation_loss", 3), 1),
        (("glp_lens.evals.probing.suite", "score", 4), 5),
        (("glp_lens.evals.steering.suite", "generate", 4), 6),
    ],
    ids=["collect", "train-glp", "probing", "steering"],
)
def test_an_interrupted_run_ends_like_one_that_was_not(bridge_run, tmp_path, place, skipped):
    """Also the proof that the same seed gives the same numbers, whatever the folder."""
    with pytest.MonkeyPatch.context() as patch:
        _interrupt(patch, place)
        with pytest.raises(Stop):
            go(tmp_path, bridge_run.model)
    assert not (tmp_path / "metrics.csv").exists()
    assert done_before(go(tmp_path, bridge_run.model)) == STAGES[:skipped]
    assert (tmp_path / "metrics.csv").read_bytes() == (bridge_run.out / "metrics.csv").read_bytes()


def test_overwriting_redoes_what_depends_on_the_change_and_no_more(bridge_run, tmp_path):
    out = shutil.copytree(bridge_run.out, tmp_path / "runs")
    kept = {p: p.stat().st_mtime_ns for p in (out / "models" / "glp").iterdir()}
    said = go(out, bridge_run.model, sae_k=3, overwrite=True)
    assert done_before(said) == ["collect", "train-glp", "train-baselines"]
    assert {p: p.stat().st_mtime_ns for p in (out / "models" / "glp").iterdir()} == kept
    assert gl.load(out / "models" / "sae").provenance["training"]["k"] == 3
    assert (out / "metrics.csv").read_bytes() != (bridge_run.out / "metrics.csv").read_bytes()
    assert done_before(go(out, bridge_run.model, sae_k=3)) == STAGES
    go(out, bridge_run.model, overwrite=True)
    assert (out / "metrics.csv").read_bytes() == (bridge_run.out / "metrics.csv").read_bytes()


def test_fast_redoes_what_projects_with_fewer_network_calls(bridge_run, tmp_path):
    out = shutil.copytree(bridge_run.out, tmp_path / "runs")
    said = go(out, bridge_run.model, fast=True, overwrite=True)
    assert set(STAGES) - set(done_before(said)) == {"steering", "fidelity", "report"}
    tables = [pd.read_csv(folder / "metrics.csv").query("model == 'glp'") for folder in (bridge_run.out, out)]
    calls = [t[t.metric == "network_calls"]["value"].tolist() for t in tables]
    assert calls == [[10], [3]]  # from sigma 0.474
    assert all("fast=True" in s for s in tables[1][tables[1].metric.isin(["delta_nll", "nll"])].setting)


def test_output_that_was_deleted_is_made_again(bridge_run, tmp_path):
    out = shutil.copytree(bridge_run.out, tmp_path / "runs")
    shutil.rmtree(out / "models" / "pca")
    (out / "report.html").unlink()
    assert set(STAGES) - set(done_before(go(out, bridge_run.model))) == {"train-baselines", "report"}
    assert gl.load(out / "models" / "pca").kind == "pca"
    assert (out / "metrics.csv").read_bytes() == (bridge_run.out / "metrics.csv").read_bytes()


def test_a_mistake_can_be_corrected_in_the_same_folder(tiny_bridge, tmp_path, monkeypatch):
    """Nothing was made with the wrong setting, so nothing stands in the way of the right one."""
    with pytest.raises(InputError, match="did you mean"):
        go(tmp_path, tiny_bridge, hook="blocks.1.hook_resid_pots")
    _interrupt(monkeypatch, ("glp_lens.models.fitting", "train", 1))
    with pytest.raises(Stop):
        go(tmp_path, tiny_bridge)
    assert len(ActivationStore.open(tmp_path / "acts" / "train")) == 3000


def test_another_seed_gives_other_numbers(bridge_run, tmp_path):
    go(tmp_path, bridge_run.model, seed=1)
    one, two = (pd.read_csv(out / "metrics.csv") for out in (bridge_run.out, tmp_path))
    losses = [t[(t.metric == "flow_loss") & (t.model == "glp")]["value"].iloc[0] for t in (one, two)]
    assert losses[0] != losses[1]


def test_settings_no_run_can_have_are_refused_before_any_work(tmp_path):
    with pytest.raises(InputError, match="concept"):
        go(tmp_path / "runs", None, concepts=("love",))
    assert not (tmp_path / "runs").exists()


def test_other_suites_join_a_finished_run(bridge_run, tmp_path):
    out = tmp_path / "runs"
    shutil.copytree(bridge_run.out, out)
    suites = ("density", "detect", "generation")
    with pytest.raises(InputError, match="report: what it reads"):
        go(out, bridge_run.model, suites=suites)
    said = go(out, bridge_run.model, suites=suites, overwrite=True, detect_texts=8, detect_fit=8, samples=60)
    assert done_before(said) == ["collect", "train-glp", "train-sae", "train-baselines", "density"]
    assert set(pd.read_csv(out / "metrics.csv").suite) == set(suites)
    page = (out / "report.html").read_text()
    assert [name in page for name in ('id="detect"', 'id="generation"', 'id="steering"')] == [True, True, False]


@pytest.mark.parametrize("suites", [(), ("density", "density"), ("spelling",)])
def test_suites_that_cannot_run_are_refused(suites):
    with pytest.raises(InputError, match="suites must be some of density, probing"):
        settings(suites=suites)
