"""Detection with a tiny language model: what is read, the suite from texts to metrics, and the commands."""

import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from glp_lens_cli import app
from typer.testing import CliRunner

import glp_lens as gl
from glp_lens import lm
from glp_lens.errors import InputError
from glp_lens.evals import detect
from glp_lens.evals.detect import DetectData, DetectSettings, DetectTask, page, read
from glp_lens.evals.detect.detectors import log_density_scores
from glp_lens.evals.entries import Entry
from glp_lens.evals.results import Results, structured_frame
from glp_lens.report import write_report
from tests.conftest import tiny_texts

pytestmark = pytest.mark.usefixtures("blank_pictures")

HOOK = "blocks.1.hook_resid_post"
SETTINGS = DetectSettings(detect_texts=40, detect_fit=40, false_positive_rates=(0.05, 0.2), denoise_sigmas=(0.2, 0.6))


def ids_of(model, n, seed=0):
    return lm.to_ids(model, tiny_texts(n, seed), 30)


def test_tokens_are_those_of_single_texts(tiny_model):
    ids = ids_of(tiny_model, 7)
    tokens = read(tiny_model, HOOK, ids)
    at = 0
    for i, row in enumerate(ids):
        one, mask = lm.pad([row])
        rows = lm.activations(tiny_model, one, mask, [HOOK])[HOOK][0, 1:]
        part = slice(at, at + len(row) - 1)
        torch.testing.assert_close(tokens.rows[part], rows, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(tokens.loss[part], lm.token_nll(tiny_model, one, mask)[0], rtol=1e-4, atol=1e-4)
        assert tokens.ids[part].tolist() == row[1:]
        assert set(tokens.text[part]) == {i}
        assert tokens.position[part].tolist() == list(range(1, len(row)))
        at = part.stop
    assert at == len(tokens)


def test_a_push_moves_all_tokens_but_bos_and_what_follows_sees_it(tiny_model):
    ids, push = ids_of(tiny_model, 5), torch.linspace(-2, 3, 24)
    plain, pushed = read(tiny_model, HOOK, ids), read(tiny_model, HOOK, ids, push=push)
    torch.testing.assert_close(pushed.rows, plain.rows + push, rtol=1e-4, atol=1e-4)
    assert np.abs(pushed.loss - plain.loss).max() > 0.01
    # The first token is predicted from BOS, which is not pushed.
    first = plain.position == 1
    np.testing.assert_allclose(pushed.loss[first], plain.loss[first], rtol=1e-4, atol=1e-4)


def test_massive_activations_are_left_out_and_counted(tiny_model):
    ids = ids_of(tiny_model, 6)
    everything = read(tiny_model, HOOK, ids)
    limit = float(everything.rows.norm(dim=1).median())
    usual = read(tiny_model, HOOK, ids, limit=limit)
    assert float(usual.rows.norm(dim=1).max()) <= limit
    assert usual.massive == len(everything) - len(usual) > 0
    pushed = read(tiny_model, HOOK, ids, limit=limit, push=torch.full((24,), 100.0))
    assert pushed.massive == usual.massive  # what a push makes large is no massive activation
    with pytest.raises(InputError, match="all .* tokens at blocks.1.hook_resid_post have massive activations"):
        read(tiny_model, HOOK, ids, limit=0.0)


@pytest.fixture(scope="module")
def store(tiny_bridge, tmp_path_factory):
    return gl.collect(tiny_bridge, tiny_texts(300), hooks=[HOOK], out=tmp_path_factory.mktemp("acts"))


@pytest.fixture(scope="module")
def entries(store):
    glp = gl.GLP.fit(store, gl.recipe("fast", rows=1280, batch_size=64), d_model=12, d_mlp=20, n_layers=2)
    return [Entry("glp", glp, {"sigma": (0.2, 0.6)}), Entry("gaussian", gl.Gaussian.fit(store))]


def task(name="repeated", **changes):
    """Odd texts of the same lengths hold one word again and again."""
    texts = tiny_texts(400, seed=5)
    odd = [" ".join(["dog"] * len(text.split())) for text in texts[200:]]
    given = {"about": "Odd texts repeat a word.", "push": None, **changes}
    return DetectTask(name, tuple(texts[:120]), tuple(odd[:80]), tuple(texts[120:200]), tuple(odd[80:160]), **given)


@pytest.fixture(scope="module")
def results(tiny_bridge, store, entries, tmp_path_factory):
    push = torch.zeros(24)
    push[3] = 500.0
    texts = tiny_texts(400, seed=6)
    pushed = DetectTask("pushed", *(tuple(texts[i : i + 100]) for i in range(0, 400, 100)), "Pushed.", push)
    same = DetectTask("same", *(tuple(texts[i : i + 100]) for i in (300, 0, 200, 100)), "No difference.", None)
    few = DetectTask("few", ("a cat",) * 9, ("a dog",) * 9, ("a",), ("a",), "Too few.", None)
    data = DetectData(tiny_bridge, HOOK, [task(), pushed, same, few], training=store.rows())
    folder = tmp_path_factory.mktemp("cache")
    return detect.run(entries, data, SETTINGS, folder=folder), data, folder


def value(results, model, name, metric, setting="pool=mean"):
    frame = results.frame()
    chosen = frame[
        (frame.model == model) & (frame.task == name) & (frame.metric == metric) & (frame.setting == setting)
    ]
    assert len(chosen) == 1, (model, name, metric, setting)
    return chosen.iloc[0]


def test_what_cannot_be_missed_is_found_and_what_is_not_there_is_not(results):
    made = results[0]
    for model in ("norm", "diagonal", "neighbours", "gaussian", "fitted mahalanobis", "fitted neighbours", "probe"):
        found = value(made, model, "pushed", "auroc")
        assert found.value == 1, model
        assert found.ci_low < 1
        assert value(made, model, "pushed", "tpr_at_1").value == 1
    assert value(made, "probe", "repeated", "auroc").value > 0.9
    for model in ("norm", "gaussian", "glp", "fitted mahalanobis", "probe"):
        found = value(made, model, "same", "auroc")
        assert 0.3 < found.value < 0.7, model
        assert found.ci_high - found.ci_low > 0.2
        false = value(made, model, "same", "false_positive_rate", "rate=0.2")
        assert false.ci_low < 0.25
    true = value(made, "gaussian", "pushed", "true_positive_rate", "rate=0.05")
    assert true.value == 1


def test_every_detector_has_its_measures_and_stands_against_mahalanobis(results):
    made = results[0]
    labels = {"norm", "lm loss", "diagonal", "neighbours", "glp", "glp sigma=0.2", "glp sigma=0.6", "gaussian",
              "fitted mahalanobis", "fitted neighbours", "probe"}  # fmt: skip
    assert set(made.frame().model) == labels
    for label in labels - {"gaussian"}:
        gap = value(made, label, "repeated", "auroc_diff:gaussian")
        areas = [value(made, m, "repeated", "auroc").value for m in (label, "gaussian")]
        assert gap.value == pytest.approx(areas[0] - areas[1], abs=1e-9)
    frame = made.frame()
    adjusted = set(frame[frame.metric == "p_holm:gaussian"].model)
    assert adjusted == labels - {"gaussian", "probe", "glp sigma=0.2", "glp sigma=0.6"}
    mean = value(made, "glp", "all", "auroc")
    assert mean.n == 3
    assert mean.value == pytest.approx(
        np.mean([value(made, "glp", name, "auroc").value for name in ("repeated", "pushed", "same")])
    )
    token = value(made, "gaussian", "repeated", "auroc", "pool=token")
    assert token.n == 80  # texts are the clusters


def test_log_densities_are_those_of_each_texts_last_token(tiny_bridge, entries):
    tokens = read(tiny_bridge, HOOK, ids_of(tiny_bridge, 9))
    ode = {"method": "ode", "steps": 3, "probes": 4}
    found = log_density_scores(tokens, [*entries, Entry("glp density", entries[0].model, ode, main=False)])
    last = np.append(np.diff(tokens.text) != 0, True)
    assert list(found) == ["glp density"]
    np.testing.assert_array_equal(np.isfinite(found["glp density"]), last)
    exact = entries[0].model.log_density(tokens.rows[torch.from_numpy(last)], steps=3, probes=4).value
    np.testing.assert_allclose(found["glp density"][last], -exact, rtol=1e-4)
    made = detect.run(
        [Entry("glp density", entries[0].model, ode, main=False)],
        DetectData(tiny_bridge, HOOK, [task()]),
        DetectSettings(**{**SETTINGS.to_json(), "detect_ode_steps": 3}),
    )
    assert value(made, "glp density", "repeated", "auroc").n == 80
    assert value(made, "glp density", "repeated", "auroc_diff:fitted mahalanobis").n == 80


def test_a_task_of_too_few_texts_is_left_out_with_a_sentence(results):
    made = results[0]
    assert set(made.data["tasks"]) == {"repeated", "pushed", "same"}
    assert any(line.startswith("few: ") and "expected 8 at least" in line for line in made.failures)


def test_lengths_of_both_classes_are_told(results):
    about = results[0].data["tasks"]["repeated"]
    assert about["texts"] == 40
    assert 4 <= about["shortest"] <= about["median_length"] <= about["longest"] <= 64


def test_a_second_run_reads_its_scores_and_other_rates_need_no_new_ones(results, entries, monkeypatch):
    made, data, folder = results
    monkeypatch.setattr(detect.suite, "read", lambda *_a, **_k: pytest.fail("read again"))
    again = detect.run(entries, data, SETTINGS, folder=folder)
    pd.testing.assert_frame_equal(again.frame(), made.frame())
    other = detect.run(entries, data, DetectSettings(**{**SETTINGS.to_json(), "false_positive_rates": (0.5,)}),
                       folder=folder)  # fmt: skip
    assert {s for s in other.frame().setting if s.startswith("rate")} == {"rate=0.5"}


def test_a_page_tells_of_it(results, tmp_path):
    page = write_report([results[0]], tmp_path, {"title": "Detection"}).read_text()
    for words in ("AUROC of telling odd texts", "Mahalanobis distance", "No difference.", "supervised probe"):
        assert words in page
    assert page.count('class="tokens"') == 9
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == {"detect_roc", "detect_calibration"}


def test_bad_tasks_and_models_are_refused(tiny_bridge, entries):
    data = DetectData(tiny_bridge, HOOK, [task(), task()])
    with pytest.raises(InputError, match="distinct names"):
        detect.run(entries, data, SETTINGS)
    elsewhere = DetectData(tiny_bridge, "blocks.2.hook_resid_post", [task()])
    with pytest.raises(InputError, match="trained at blocks.1"):
        detect.run(entries, elsewhere, SETTINGS)
    with pytest.raises(InputError, match="labels must be unique"):
        detect.run([Entry("norm", entries[1].model)], DetectData(tiny_bridge, HOOK, [task()]), SETTINGS)


@pytest.fixture(scope="module")
def command(tiny_folder, store, entries, tmp_path_factory):
    """Runs a command in a folder with models and texts."""
    folder = tmp_path_factory.mktemp("work")
    for entry in entries:
        entry.model.save_pretrained(folder / entry.label)
    gl.PCA.fit(store).save_pretrained(folder / "pca")
    (folder / "texts.csv").write_text("text\n" + "\n".join(tiny_texts(900, seed=8)))
    (folder / "few.csv").write_text("text\n" + "\n".join(["the cat", "</script><b>red</b> dog " * 30, "a king"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)

        def run(line, code=0):
            words = line.replace("LM", f"--model {tiny_folder} --lm-dtype float32").replace("STORE", str(store.path))
            result = CliRunner().invoke(app, shlex.split(words))
            assert result.exit_code == code, (result.exception, result.output)
            return result.output

        yield run


def test_score_writes_every_token_and_a_page(command):
    said = command("score LM --models glp,gaussian --texts few.csv --context 9 --store STORE --ref glp --out scores")
    tokens, texts = (pd.read_parquet(f"scores/{name}.parquet") for name in ("tokens", "texts"))
    assert tokens["text"].unique().tolist() == texts["text"].tolist() == [0, 1, 2]
    assert len(tokens[tokens.text == 1]) > 60  # longer than the context: read in pieces
    assert tokens.groupby("text").position.apply(lambda p: p.tolist() == list(range(1, len(p) + 1))).all()
    names = ["norm", "lm loss", "diagonal", "neighbours", "glp", "glp sigma=0.1", "glp sigma=0.3", "glp sigma=0.5",
             "glp ratio", "gaussian"]  # fmt: skip
    assert list(tokens.columns) == ["text", "position", "token", "token_id", *names]
    np.testing.assert_allclose(tokens["glp ratio"], 0, atol=1e-6)  # a prior against itself
    assert list(texts["content"]) == ["the cat", ("</script><b>red</b> dog " * 30).strip(), "a king"]
    np.testing.assert_allclose(texts["glp_mean"], tokens.groupby("text").glp.mean())
    page = Path("scores/tokens.html").read_text()
    assert page.count("</script>") == 2  # the texts' own is data
    assert "http" not in page
    assert "scores/tokens.html" in said


def test_score_against_normal_texts_gives_p_values(command):
    command("score LM --models gaussian --texts few.csv --normal texts.csv --documents 60 --out judged")
    texts = pd.read_parquet("judged/texts.parquet")
    assert texts["gaussian_p"].between(1 / 61, 1).all()


def test_score_says_in_one_line_what_is_wrong(command):
    command("score LM --models gaussian,pca --texts few.csv --out once")
    assert "already exists" in command("score LM --models gaussian --texts few.csv --out once", code=2)
    assert "--ref must be a prior" in command("score LM --models gaussian --texts few.csv --ref pca --out no", code=2)
    assert "expected one of" in command("detect LM --models gaussian --store STORE --tasks family:none", code=2)
    assert "no probing task matches" in command("detect LM --models gaussian --store STORE --tasks nothing", code=2)


def test_detect_measures_packaged_tasks(command):
    command(
        "detect LM --models glp,gaussian --store STORE --texts texts.csv --tasks shuffled,steered,code,family:ha* "
        "--detect-texts 10 --detect-fit 9 --context 12 --out results"
    )
    made = Results.load("results")
    assert set(made.data["tasks"]) == {"shuffled", "steered", "code", "family:hate"}
    assert value(made, "gaussian", "code", "auroc").n == 20
    assert value(made, "gaussian", "steered", "auroc").n >= 16
    assert Path("results/report.html").is_file()


def test_a_lead_over_what_is_worse_than_chance_is_no_win():
    made = Results("detect")
    for name, own, other, gap in (("odd", 0.55, 0.3, 0.25), ("clear", 0.9, 0.7, 0.2)):
        for model, area in (("glp", own), ("gaussian", other)):
            made.add(model, name, "pool=mean", "auroc", area, ci_low=area - 0.1, ci_high=area + 0.1, n=80)
        made.add("glp", name, "pool=mean", "auroc_diff:gaussian", gap, ci_low=gap - 0.1, ci_high=gap + 0.1, n=80)
        made.add("glp", name, "pool=mean", "p_holm:gaussian", 0.001, n=80)
    found = {v.sentence.split(":")[0]: v.outcome for v in page.verdicts(structured_frame(made.metrics), "glp")}
    assert found == {
        "GLP detects odd no better than chance, Gaussian worse": "unclear",
        "GLP beats Gaussian in detecting clear": "ahead",
    }
