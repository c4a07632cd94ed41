"""The jobs that explain features and score their labels, on a folder of features of a tiny language model."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from glp_lens import lm, pipeline
from glp_lens.corpus import Document, split_documents
from glp_lens.errors import InputError
from glp_lens.evals.results import Results
from glp_lens.features import About, FeatureFolder, ModelAbout, labels
from glp_lens.features.sample import Sample, blocks, options_of, sample_path
from glp_lens.models.random_features import RandomFeatures
from tests.conftest import tiny_texts
from tests.unit.test_features_explain import server  # noqa: F401

HOOK = "blocks.0.hook_resid_pre"
"""Where a row depends on its token alone, so that tokens say all of a feature."""
WINDOW, CONTEXT = 5, 24


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_bridge):
    """Two saved models by label."""
    folder = tmp_path_factory.mktemp("trained")
    ids = [row for row in lm.to_ids(tiny_bridge, tiny_texts(40), CONTEXT) if len(row) > WINDOW]
    rows = torch.cat([lm.activations(tiny_bridge, *lm.pad([row]), [HOOK])[HOOK][0, 1:].float() for row in ids])
    made = {
        "random": RandomFeatures.draw(rows.mean(0), rows.std(0), 30, seed=1),
        "other": RandomFeatures.draw(rows.mean(0), rows.std(0), 22, seed=2),
    }
    for label, model in made.items():
        model.save_pretrained(folder / label)
    return {label: (folder / label, model) for label, model in made.items()}


@pytest.fixture
def folder(tmp_path, tiny_bridge, trained):
    """Features of the models on texts of the training side, as the smallest build would write them."""
    made = FeatureFolder(tmp_path / "features")
    documents = split_documents(tiny_texts(120, seed=3), "train")
    abouts = tuple(
        ModelAbout(label, label, model.kind, HOOK, model.n_features, 1, False, None, str(path), model.fingerprint())
        for label, (path, model) in trained.items()
    )
    identity = {"model": lm.identity(tiny_bridge)}
    made.finish(About(abouts, identity, len(documents), 1, "tiny", {"seed": 0}, {}))
    tokenizer = lm.tokenizer_of(tiny_bridge)
    ids = lm.to_ids(tiny_bridge, [d.text for d in documents], CONTEXT)
    keep = [i for i, row in enumerate(ids) if len(row) > WINDOW + 1]
    parts = []
    for i in keep:
        rows = lm.activations(tiny_bridge, *lm.pad([ids[i]]), [HOOK])[HOOK][0, 1:].float()
        n = len(rows)
        parts.append((rows, np.full(n, documents[i].id, np.uint64), np.arange(1, n + 1), np.array(ids[i][1:])))
    sample = Sample(torch.cat([p[0] for p in parts]), *(np.concatenate([p[k] for p in parts]) for k in (1, 2, 3)))
    sample.write(sample_path(made.path, HOOK))
    starts = np.cumsum([0, *(len(p[0]) for p in parts)])
    for about in abouts:
        model = trained[about.label][1]
        values = torch.cat([v for _, v in blocks(model, options_of(about), sample, 0)]).numpy()
        density = (values > 0).mean(0)
        zero = np.zeros(about.n_features)
        table = {
            "feature": np.arange(about.n_features), "block": 0, "unit": np.arange(about.n_features),
            "mean": values.mean(0), "std": values.std(0), "kurtosis": zero, "min": zero, "max": values.max(0),
            "density": density, "dead": values.max(0) == 0, "dense": density > 0.1, "histogram_low": zero,
            "histogram_high": values.max(0), "histogram": [[1]] * about.n_features,
        }  # fmt: skip
        made.write_table(about, "features", pd.DataFrame(table))
        rows = []
        for f in range(about.n_features):
            best = [start + values[start:stop, f].argmax() for start, stop in pairwise(starts)]
            for rank, row in enumerate(sorted(best, key=lambda i: -values[i, f])[:12]):
                text = int(np.searchsorted(starts, row, side="right")) - 1
                first = min(max(row - 2, starts[text]), starts[text + 1] - WINDOW)
                window = slice(first, first + WINDOW)
                tokens = [str(tokenizer.decode([t])) + " " for t in sample.token_ids[window].tolist()]
                rows.append((f, "top", rank, int(sample.keys[row]), int(sample.positions[row]), row - first,
                             float(values[row, f]), sample.token_ids[window].tolist(), tokens,
                             values[window, f].tolist()))  # fmt: skip
        columns = ["feature", "group", "rank", "key", "position", "peak", "value", "token_ids", "tokens", "values"]
        frame = pd.DataFrame(rows, columns=columns)
        made.write_table(about, "examples", frame.assign(key=frame["key"].astype(np.uint64)))
    labels.label(made)
    return made


def texts_of(n=900):
    return tiny_texts(n, seed=7)


def job_of(folder, tmp_path, **options):
    given = {"built": folder.path, "context": CONTEXT, "passage": 6, "features": 12, "out": tmp_path / "scores"}
    return pipeline.ScoreFeaturesJob(**{**given, **options})


def test_labels_are_scored_on_other_texts_and_results_saved(folder, tmp_path, tiny_bridge):
    said = []
    results = pipeline.score_features(job_of(folder, tmp_path), model=tiny_bridge, texts=texts_of(), say=said.append)
    found = {(m.model, m.setting.get("among"), m.setting.get("active"), m.name): m for m in results.metrics}
    for label in ("random", "other"):
        auc = found[label, "alive", "tenth", "auc"]
        assert auc.ci_low > 0.5
        assert 40 < auc.n <= results.data["documents"]
        assert auc.setting.get("features") == "12"
        assert found[label, "alive", "tenth", "auc_diff:exchanged"].ci_low > 0
    assert not any(among == "sparse" for _, among, _, _ in found)  # half of all rows are above 0
    assert [f for f in results.failures if "sparse" in f]
    loaded = Results.load(tmp_path / "scores")
    assert loaded.frame().equals(results.frame())
    table = pd.read_parquet(tmp_path / "scores" / "scores.parquet")
    assert len(table) == 2 * 2 * 12
    assert any("AUC" in line for line in said)
    with pytest.raises(InputError, match="already exists"):
        pipeline.score_features(job_of(folder, tmp_path), model=tiny_bridge, texts=texts_of())
    again = pipeline.score_features(
        job_of(folder, tmp_path, overwrite=True), model=tiny_bridge, texts=texts_of(), say=said.append
    )
    assert again.frame().equals(results.frame())


def test_texts_that_are_examples_are_never_scored(folder, tmp_path, tiny_bridge):
    examples = folder.table("random", "examples")
    held = split_documents(texts_of(), "heldout")
    examples.loc[0, "key"] = held[0].id
    folder.write_table(folder.model("random"), "examples", examples)
    results = pipeline.score_features(
        job_of(folder, tmp_path), model=tiny_bridge, texts=texts_of(), say=lambda line: None
    )
    assert results.data["documents"] == len(held) - 1
    assert [f for f in results.failures if f == f"left out, as examples of features: 1 of {len(held)} texts"]
    keys = {Document.of(text).id for text in texts_of()}
    assert len(keys) == 900
    everything = examples.assign(key=np.resize(np.array([d.id for d in held], np.uint64), len(examples)))
    folder.write_table(folder.model("random"), "examples", everything)
    with pytest.raises(InputError, match="all|examples of features: pass --texts"):
        pipeline.score_features(job_of(folder, tmp_path / "b"), model=tiny_bridge, texts=texts_of())


def explain_job(folder, server, **options):  # noqa: F811
    url = f"http://127.0.0.1:{server.server_port}/v1"
    given = {"hosted_url": url, "hosted_model": "big", "hosted_key": "JUDGE_KEY", "built": folder.path,
             "context": CONTEXT, "names": ("random/3", "random/8", "other/1"), "shown": 4, "tested": 4}  # fmt: skip
    return pipeline.ExplainJob(**{**given, **options})


def test_explanations_are_kept_in_the_folder(folder, server, tiny_bridge):  # noqa: F811
    server.reply = lambda text, n: (
        "1: 3\n2: 0\n3: 2\n4: 1\n5: 0\n6: 3\n7: 1\n8: 2" if "said to be" in text else "Explanation: words"
    )
    said = []
    made = pipeline.explain(explain_job(folder, server), model=tiny_bridge, texts=texts_of(), say=said.append)
    assert {label: table["feature"].tolist() for label, table in made.items()} == {"random": [3, 8], "other": [1]}
    kept = folder.table("random", "explanations")
    assert kept["explanation"].tolist() == ["words"] * 2
    assert kept["n"].tolist() == [4, 4]
    assert kept[["detection", "fuzzing"]].notna().all().all()
    assert kept["neighbours"].isna().all()  # there is no such table
    assert any("cost 0" in line for line in said)
    asked = len(server.requests)
    pipeline.explain(explain_job(folder, server), model=tiny_bridge, texts=texts_of(), say=said.append)
    assert len(server.requests) == asked
    pipeline.explain(
        explain_job(folder, server, names=("random/9",)), model=tiny_bridge, texts=texts_of(), say=said.append
    )
    assert folder.table("random", "explanations")["feature"].tolist() == [3, 8, 9]


def test_without_names_features_are_drawn(folder, server, tiny_bridge):  # noqa: F811
    server.reply = lambda text, n: "Nothing."
    made = pipeline.explain(
        explain_job(folder, server, names=(), features=2, models=("other",)), model=tiny_bridge, texts=texts_of(),
        say=lambda line: None,
    )  # fmt: skip
    assert {label: len(table) for label, table in made.items()} == {"other": 2}
    assert made["other"]["explanation"].tolist() == ["", ""]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"names": ("random/77",)}, "random has 1 block of 30 features"),
        ({"names": ("none/7",)}, "no model has a feature 'none/7'"),
        ({"features": 1, "names": (), "models": ("none",)}, "enough features to draw from"),
        ({"hosted_url": None, "hosted_model": None}, "--hosted-url"),
    ],
)
def test_bad_settings_are_told_before_anything_is_asked(folder, server, tiny_bridge, options, words):  # noqa: F811
    with pytest.raises(InputError, match=words):
        pipeline.explain(explain_job(folder, server, **options), model=tiny_bridge, texts=texts_of())
    assert server.requests == []


def test_a_wrong_address_is_told_before_texts_are_read(folder, server):  # noqa: F811
    server.reply = lambda text, n: (401, {}, b'{"error": {"message": "no"}}')
    with pytest.raises(InputError, match=r"the hosted model at .* refuses the request"):
        pipeline.explain(explain_job(folder, server, model="nowhere"))


def test_commands(folder, tmp_path):
    from glp_lens_cli import app

    for line, words in (
        ([f"--folder={folder.path}", "--passage=128"], "--passage must be under --context"),
        ([f"--folder={tmp_path}"], "no features in"),
    ):
        done = CliRunner().invoke(app, ["features", "score", *line, f"--out={tmp_path / 'new'}"])
        assert done.exit_code == 2
        assert words in " ".join(done.stderr.split())
    done = CliRunner().invoke(app, ["features", "explain", f"--folder={folder.path}"])
    assert done.exit_code == 2
    assert "--hosted-url and --hosted-model" in " ".join(done.stderr.split())
