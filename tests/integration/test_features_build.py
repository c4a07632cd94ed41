"""Building features by the job and the command: texts and stores give the same, what is done is not done again."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from glp_lens_cli import app
from typer.testing import CliRunner

from glp_lens import GLP, PCA, SAE, lm, pipeline
from glp_lens.activations import ActivationStore, collect
from glp_lens.corpus import split_documents
from glp_lens.errors import InputError
from glp_lens.features import FeatureFolder, passes, source
from glp_lens.models.denoiser import DenoiserConfig
from glp_lens.models.fitting import initial_denoiser
from glp_lens.models.random_features import RandomFeatures
from glp_lens.training.config import TrainConfig
from tests.conftest import tiny_texts

HOOK = "blocks.2.hook_resid_post"
SMALL = {"context": 32, "sample": 50, "top": 3, "per_band": 2, "window": 7}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return tiny_texts(200)


@pytest.fixture(scope="module")
def store(tiny_bridge, texts, tmp_path_factory) -> ActivationStore:
    folder = tmp_path_factory.mktemp("acts") / "store"
    return collect(tiny_bridge, split_documents(texts), HOOK, folder, dtype="float32", context=32, massive=None)


@pytest.fixture(scope="module")
def models(store, tmp_path_factory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("models")
    denoiser = initial_denoiser(DenoiserConfig(24, d_model=12, d_mlp=20, n_layers=2), TrainConfig())
    about = {"store": store.provenance(), "training": {}}
    prior = GLP(denoiser, store.stats.mean.float(), store.stats.var.float(), about)
    prior.save_pretrained(folder / "glp")
    SAE.fit(store, n_latents=40, k=5, rows=640, batch_size=64).save_pretrained(folder / "sae")
    PCA.fit(store).save_pretrained(folder / "pca")
    return tuple(f"{name}={folder / name}" for name in ("glp", "sae", "pca"))


def job(models, tiny_folder, out) -> pipeline.BuildFeaturesJob:
    return pipeline.BuildFeaturesJob(
        models=models, out=out, neurons=True, random=True, model=str(tiny_folder), tokens=0, **SMALL
    )


@pytest.fixture(scope="module")
def built(tiny_folder, tiny_bridge, texts, models, tmp_path_factory) -> FeatureFolder:
    asked = job(models, tiny_folder, tmp_path_factory.mktemp("features") / "out")
    return pipeline.build_features(asked, model=tiny_bridge, texts=texts, say=lambda _: None)


def test_all_kinds_of_models_are_measured(built, tiny_bridge, texts, store):
    about = built.about
    assert [(each.label, each.kind) for each in about.models] == [
        ("glp", "glp"), ("sae", "sae"), ("pca", "pca"), ("random", "random"), ("neurons", "neurons")
    ]  # fmt: skip
    assert [each.n_features for each in about.models] == [40, 40, 24, 40, 40]
    assert [each.signed for each in about.models] == [True, False, True, False, True]
    assert about.models[-1].hook.startswith("blocks.2.mlp")
    assert (about.tokens, about.texts) == (len(store), len(split_documents(texts)))
    assert about.language_model == lm.identity(tiny_bridge)
    for each in about.models:
        table, examples = built.table(each.label, "features"), built.table(each.label, "examples")
        assert table["feature"].tolist() == list(range(each.n_features))
        assert set(examples["feature"]) == set(table["feature"][~table["dead"]])
        assert not (examples["group"] == "bottom").any() or each.signed


def test_tables_that_were_deleted_are_made_again(built, tiny_folder, tiny_bridge, texts, models, tmp_path):
    asked = job(models, tiny_folder, Path(shutil.copytree(built.path, tmp_path / "out")))
    deleted = [asked.out / name for name in ("pca/examples.parquet", "sae/directions-class-mean.safetensors")]
    for path in deleted:
        path.unlink()
    again = pipeline.build_features(asked, model=tiny_bridge, texts=texts, say=lambda _: None)
    assert all(path.exists() for path in deleted)
    assert again.table("pca", "examples").equals(built.table("pca", "examples"))
    one, other = (each.directions("sae", "class mean")[0].nan_to_num() for each in (again, built))
    assert torch.equal(one, other)


def test_passages_are_from_the_texts(built, texts):
    by_key = {document.id: document.text for document in split_documents(texts)}
    for row in built.table("sae", "examples").head(200).itertuples():
        words = by_key[int(row.key)].split()
        first = row.position - row.peak - 1  # BOS has position 0
        assert list(row.tokens) == words[first : first + len(row.tokens)]


def test_neurons_are_those_of_the_language_model(built, tiny_bridge, texts):
    hook = built.model("neurons").hook
    ids = lm.to_ids(tiny_bridge, [document.text for document in split_documents(texts)], 32)
    rows = []
    for row in ids:
        tokens, mask = lm.pad([row])
        rows.append(lm.activations(tiny_bridge, tokens, mask, [hook], "model")[hook][0, 1:])
    x = np.concatenate([each.float().numpy() for each in rows])
    table = built.table("neurons", "features")
    np.testing.assert_allclose(table["mean"], x.mean(0), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(table["max"], x.max(0), rtol=1e-3, atol=1e-5)


def test_a_store_gives_what_its_texts_give(built, store, models, tiny_folder, tiny_bridge, tmp_path):
    job = pipeline.BuildFeaturesJob(
        models=models, store=store.path, out=tmp_path, model=str(tiny_folder), tokens=0, **SMALL
    )
    other = pipeline.build_features(job, model=tiny_bridge, say=lambda _: None)
    assert other.about.tokens == built.about.tokens
    for label in ("glp", "sae", "pca"):
        one, two = (folder.table(label, "features").drop(columns="histogram") for folder in (built, other))
        pd.testing.assert_frame_equal(one, two, rtol=1e-3, atol=1e-3)
        one, two = (folder.table(label, "examples").query("group == 'top' and rank == 0") for folder in (built, other))
        assert (one["key"].to_numpy() == two["key"].to_numpy()).mean() > 0.95
        np.testing.assert_allclose(one["value"], two["value"], rtol=1e-3)


def test_rows_of_a_store_are_cut_between_texts(store, monkeypatch):
    monkeypatch.setattr(source, "_TOKENS", 100)
    batches = list(source.Rows(store, 1000).batches(0, 0))
    assert sum(map(len, batches)) == 1000
    keys = [set(batch.keys.tolist()) for batch in batches]
    assert not any(one & two for one, two in pairwise(keys))
    assert max(map(len, batches)) <= 100
    whole = store.column("doc_id", 0, 1000)
    assert np.concatenate([batch.keys for batch in batches]).tolist() == whole.tolist()
    for batch in batches:
        assert (batch.positions[batch.starts] == 1).all()
    again = list(source.Rows(store, 1000).batches(batches[2].resume, 0))
    assert [len(batch) for batch in again] == [len(batch) for batch in batches[3:]]


def test_texts_end_at_the_number_of_tokens(tiny_bridge, texts):
    documents = split_documents(texts)
    of = source.Texts(tiny_bridge, documents, [HOOK], context=32, limits={}, tokens=500)
    n = sum(map(len, of.batches(0, 0)))
    assert 500 <= n < 500 + 31
    batches = list(of.batches(0, 0))
    assert [batch.resume is not None for batch in batches] == [False] * (len(batches) - 1) + [True]


def test_massive_activations_are_left_out(tiny_bridge, texts):
    documents = split_documents(texts)[:20]
    whole = source.Texts(tiny_bridge, documents, [HOOK], context=32, limits={}, tokens=0)
    norms = np.concatenate([batch.rows[HOOK].norm(dim=1).numpy() for batch in whole.batches(0, 0)])
    limit = float(np.median(norms))
    cut = source.Texts(tiny_bridge, documents, [HOOK], context=32, limits={HOOK: limit}, tokens=0)
    assert sum(map(len, cut.batches(0, 0))) == (norms <= limit).sum()


def lines(tiny_folder: Path, models: tuple[str, ...], *more: str) -> list[str]:
    sizes = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return ["features", "build", "--model", str(tiny_folder), "--models", ",".join(models), *sizes, *more]


def test_the_command_goes_on_where_it_stopped(tiny_folder, models, texts, tmp_path, monkeypatch):
    file = tmp_path / "texts.txt"
    file.write_text("\n\n".join(texts))
    out = tmp_path / "out"
    line = lines(tiny_folder, models[1:], "--texts", str(file), "--out", str(out))
    with monkeypatch.context() as patch:
        patch.setattr(passes._Clock, "due", lambda self: True)
        patch.setattr(source, "_DOCUMENTS", 30)
        save, saved = passes._save, []

        def interrupted(*arguments: object) -> None:
            save(*arguments)
            saved.append(1)
            if len(saved) == 2:
                raise KeyboardInterrupt

        patch.setattr(passes, "_save", interrupted)
        result = CliRunner().invoke(app, line)
        assert result.exit_code == 130
        assert (out / passes.STATE).is_file()
        assert not (out / "features.json").exists()
        result = CliRunner().invoke(app, [*line, "--seed", "3"])
        assert result.exit_code == 2
        assert "other settings" in result.stderr
        result = CliRunner().invoke(app, line)
        assert result.exit_code == 0, result.stderr
        assert not (out / passes.STATE).exists()
        whole = CliRunner().invoke(app, [*line[:-1], str(tmp_path / "whole")])
        assert whole.exit_code == 0, whole.stderr
    one, two = FeatureFolder.open(out), FeatureFolder.open(tmp_path / "whole")
    for label in ("sae", "pca"):
        for table in ("features", "examples"):
            pd.testing.assert_frame_equal(one.table(label, table), two.table(label, table), check_exact=True)
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0
    assert "already done" in result.stdout
    result = CliRunner().invoke(app, [*line, "--seed", "3", "--overwrite"])
    assert result.exit_code == 0, result.stderr
    assert json.loads((out / "features.json").read_text())["settings"]["seed"] == 3


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--store", "nowhere"], "no activation store"),
        (["--store", "nowhere", "--neurons"], "pass it without"),
        (["--store", "nowhere", "--texts", "a.txt"], "pass it without"),
        (["--random"], "random features take their number"),
        (["--texts", "nowhere.txt"], "nowhere.txt"),
        (["--window", "0"], "window"),
    ],
)
def test_bad_input_is_one_line(tiny_folder, models, tmp_path, more, said):
    result = CliRunner().invoke(app, lines(tiny_folder, models[1:], "--out", str(tmp_path / "out"), *more))
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.splitlines()[-1].count("error: ") == result.stderr.count("error: ") == 1
    assert not (tmp_path / "out" / "features.json").exists()


def test_no_model_is_refused(tiny_folder):
    with pytest.raises(InputError, match="at least one folder"):
        pipeline.BuildFeaturesJob(model=str(tiny_folder))


def test_a_model_of_other_activations_is_refused(tiny_bridge, texts, store, tmp_path):
    model = RandomFeatures.fit(store)
    model.provenance["store"]["weights"] = "of another language model"
    model.provenance["store"]["d_in"] = 24
    model.save_pretrained(tmp_path / "random")
    job = pipeline.BuildFeaturesJob(models=(str(tmp_path / "random"),), out=tmp_path / "out", **SMALL)
    with pytest.raises(InputError, match="random was trained"):
        pipeline.build_features(job, model=tiny_bridge, texts=texts)
