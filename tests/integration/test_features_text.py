"""`features top` and `features steer` on a tiny language model: the same numbers and texts by another way."""

import numpy as np
import pandas as pd
import pytest
import torch

from glp_lens import hooks, lm
from glp_lens.activations import write_store
from glp_lens.corpus import Document
from glp_lens.errors import InputError
from glp_lens.evals.probing.job import random_control
from glp_lens.features import TABLES, About, FeatureFolder, ModelAbout
from glp_lens.features.sample import Sample, noise, sample_path
from glp_lens.features.steered import evenly, steer
from glp_lens.models.glp import GLP
from glp_lens.models.neurons import Neurons
from glp_lens.models.pca import PCA
from glp_lens.pipeline import SteerFeaturesJob, TopFeaturesJob, steer_features, top_features
from glp_lens.pipeline.features.inputs import open_featurizers
from glp_lens.training.config import TrainConfig
from tests.unit.feature_folder import write_features

HOOK, WIDTH, SEED, DEAD = "blocks.1.hook_resid_post", 24, 5, 3
TEXT = "the cat has a gold river of money"


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_bridge):
    """A prior, PCA, random features of the prior's number, and the neurons; the first two in folders."""
    root = tmp_path_factory.mktemp("models")
    tokens = torch.randint(3, 100, (40, 12), generator=torch.Generator().manual_seed(0))
    rows = lm.activations(tiny_bridge, tokens, torch.ones_like(tokens, dtype=torch.bool), [HOOK])[HOOK]
    store = write_store(root / "acts", rows.reshape(-1, WIDTH), hook=HOOK)
    glp = GLP.fit(store, TrainConfig(batch_size=32, rows=96), d_model=10, d_mlp=22, n_layers=3)
    glp.save_pretrained(root / "glp")
    pca = PCA.fit(store, n_components=9)
    pca.save_pretrained(root / "pca")
    return root, {
        "glp": glp, "pca": pca, "random": random_control({"glp": glp}, seed=SEED),
        "neurons": Neurons.of(tiny_bridge, HOOK),
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path, models, tiny_bridge):
    root, trained = models
    out, rng = FeatureFolder(tmp_path / "features"), np.random.default_rng(0)
    abouts = [
        ModelAbout(
            label, label, each.kind, each.hook or HOOK, each.n_features, each.feature_layers, label != "random",
            0.3 if label == "glp" else None, str(root / label) if label in ("glp", "pca") else "", each.fingerprint(),
        )
        for label, each in trained.items()
    ]  # fmt: skip
    for about in abouts:
        n = about.n_features
        table = pd.DataFrame({"feature": np.arange(n), "mean": rng.normal(size=n), "std": rng.uniform(0.5, 2, n)})
        table["dead"], table["density"] = table.feature == DEAD, 0.01
        table["dense"] = table.feature == 1
        table.loc[DEAD, "std"] = 0
        out.write_table(about, "features", table.reindex(columns=list(TABLES["features"])))
        vectors = torch.from_numpy(rng.normal(size=(n, WIDTH)))
        vectors[DEAD] = float("nan")
        out.write_directions(about, "class mean", vectors)
    rows = torch.from_numpy(rng.normal(size=(50, WIDTH))).float() + 4
    keys = np.arange(50)
    Sample(rows, keys.astype(np.uint64), keys, keys).write(sample_path(out.path, HOOK))
    out.finish(About(tuple(abouts), lm.identity(tiny_bridge), 1, 1, "toy", {"seed": SEED}, {}))
    return FeatureFolder.open(out.path)


def top(folder, model, **options):
    said = []
    frame = top_features(TopFeaturesJob(built=folder.path, **{"text": TEXT, **options}), model=model, say=said.append)
    return frame, said


def test_features_of_a_text_are_those_of_its_activations(folder, models, tiny_bridge):
    frame, said = top(folder, tiny_bridge, top=4)
    assert not said
    _, cache = tiny_bridge.run_with_cache(torch.tensor(lm.to_ids(tiny_bridge, [TEXT], 64)))
    n = len(TEXT.split())
    positions = frame.groupby("model", sort=False).position.unique()
    assert list(positions.index) == list(models[1])
    assert all(each.tolist() == list(range(1, n + 1)) for each in positions)
    assert frame.drop_duplicates("position").token.tolist() == TEXT.split()
    eps = noise(np.full(n, Document.of(TEXT).id, np.uint64), np.arange(1, n + 1), WIDTH, SEED)
    for about in folder.about.models:
        options = {"sigma": 0.3, "noise": eps} if about.kind == "glp" else {}
        values = models[1][about.label].encode(cache[about.hook][0, 1:].float(), **options).double().numpy()
        known = folder.table(about.label, "features")
        with np.errstate(divide="ignore"):
            z = (values - known["mean"].to_numpy()) / known["std"].to_numpy()
        z[:, DEAD] = 0
        mine = frame[frame.model == about.label]
        distance = np.abs(z) if about.signed else z
        for position, rows in mine.groupby("position"):
            order = np.argsort(-distance[position - 1])[:4]
            assert rows.feature.tolist() == order.tolist()
            np.testing.assert_allclose(rows.z, z[position - 1, order], rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(rows.value, values[position - 1, order], rtol=1e-4, atol=1e-4)
    unit = frame[frame.model == "glp"].iloc[0]
    assert unit["name"] == f"{unit.feature // 22}:{unit.feature % 22}"


def test_a_long_text_is_cut_and_told(folder, tiny_bridge):
    frame, said = top(folder, tiny_bridge, context=4, models=("pca",))
    assert frame.position.max() == 3
    assert set(frame.model) == {"pca"}
    assert "left out: 5 tokens" in said[0]


def test_models_are_found_where_they_lie_now(folder, models, tiny_bridge):
    root, trained = models
    (root / "pca").rename(root / "moved")
    try:
        with pytest.raises(InputError):
            open_featurizers(folder, tiny_bridge, ["pca"], "cpu", allow_mismatch=False)
        opened = open_featurizers(folder, tiny_bridge, [f"pca={root / 'moved'}", "random"], "cpu", allow_mismatch=False)
    finally:
        (root / "moved").rename(root / "pca")
    assert list(opened) == ["pca", "random"]
    assert all(each.fingerprint() == trained[label].fingerprint() for label, each in opened.items())


def test_another_model_is_refused(folder, models, tiny_bridge, tmp_path):
    store = write_store(tmp_path / "acts", torch.randn(60, WIDTH), hook=HOOK)
    PCA.fit(store, n_components=9).save_pretrained(tmp_path / "other")
    PCA.fit(store, n_components=8).save_pretrained(tmp_path / "smaller")
    with pytest.raises(InputError, match="other weights"):
        top(folder, tiny_bridge, models=(f"pca={tmp_path / 'other'}",))
    top(folder, tiny_bridge, models=(f"pca={tmp_path / 'other'}",), allow_mismatch=True)
    with pytest.raises(InputError, match="another"):
        top(folder, tiny_bridge, models=(f"pca={tmp_path / 'smaller'}",), allow_mismatch=True)
    with pytest.raises(InputError, match="no model 'sae'"):
        top(folder, tiny_bridge, models=("sae",))


def test_another_language_model_is_refused(tmp_path, tiny_bridge):
    folder = write_features(tmp_path / "features")
    with pytest.raises(InputError, match="the features were built on"):
        top(folder, tiny_bridge)


def steered(folder, model, *features, **options):
    return steer(folder, folder.model("pca"), features, model, **{"new_tokens": 7, "say": lambda _: None, **options})


def test_texts_are_those_of_steering_one_by_one(folder, tiny_bridge):
    prompt, strengths = "the dog is", (0.8, 3.0)
    frame = steered(folder, tiny_bridge, 2, 6, 0, prompt=prompt, strengths=strengths)
    assert frame[["feature", "strength"]].to_numpy().tolist() == [[f, s] for f in (0, 2, 6) for s in (0.0, 0.8, 3.0)]
    rows = Sample.read(sample_path(folder.path, HOOK)).rows.double().numpy()
    unit = np.median(np.linalg.norm(rows - rows.mean(0), axis=1))
    vectors, _ = folder.directions("pca", "class mean")
    tokens = torch.tensor(lm.to_ids(tiny_bridge, [prompt], 64))
    for row in frame.itertuples():
        edit = hooks.steer(float(unit) * vectors[row.feature], row.strength)
        text = lm.generate(tiny_bridge, tokens, 7, hooks=[(HOOK, edit)])[0, tokens.shape[1] :].tolist()
        assert row.text == lm.decode(tiny_bridge, text)
    assert frame[frame.strength == 0].text.nunique() == 1
    assert frame[frame.strength == 3].text.nunique() > 1
    pd.testing.assert_frame_equal(folder.table("pca", "steered"), frame)


def test_an_interrupted_call_goes_on(folder, tiny_bridge, monkeypatch):
    whole = steered(folder, tiny_bridge, 0, 2, 6, 7)
    (folder.path / "pca" / "steered.parquet").unlink()
    monkeypatch.setattr("glp_lens.features.steered._BATCH", 4)
    generate, made = lm.generate, []

    def stopped(model, tokens, *args, **options):
        made.append(len(tokens))
        if len(made) == 3:
            raise KeyboardInterrupt
        return generate(model, tokens, *args, **options)

    monkeypatch.setattr(lm, "generate", stopped)
    with pytest.raises(KeyboardInterrupt):
        steered(folder, tiny_bridge, 0, 2, 6, 7)
    assert folder.table("pca", "steered").feature.unique().tolist() == [0, 2]
    again = steered(folder, tiny_bridge, 0, 2, 6, 7, keep=True)
    assert len(made) == 3 + 2
    pd.testing.assert_frame_equal(again, whole)


def test_other_texts_of_a_feature_stay_and_the_same_are_replaced(folder, tiny_bridge):
    first = steered(folder, tiny_bridge, 2, prompt="the dog is")
    steered(folder, tiny_bridge, 2, prompt="it was", strengths=(2.0,))
    steered(folder, tiny_bridge, 2, prompt="the dog is", new_tokens=3)
    table = folder.table("pca", "steered")
    assert table.groupby("prompt").size().to_dict() == {"the dog is": 4, "it was": 2}
    assert (table[table.prompt == "the dog is"].text.str.len().to_numpy() < first.text.str.len().to_numpy()).all()


def test_the_command_says_the_texts_and_what_it_leaves_out(folder, tiny_bridge):
    said = []
    settings = SteerFeaturesJob(built=folder.path, names=("pca/2", f"pca/{DEAD}"), new_tokens=4, strength=(2.0,))
    frames = steer_features(settings, model=tiny_bridge, say=said.append)
    assert frames["pca"].feature.unique().tolist() == [2]
    assert any("1 of these features of pca have no direction" in line for line in said)
    assert all(any(" ".join(text.split()) in line for line in said) for text in frames["pca"].text)


def test_neurons_are_steered_after_their_block(folder, tiny_bridge):
    frame = steer(folder, folder.model("neurons"), [5], tiny_bridge, new_tokens=3, say=lambda _: None)
    assert len(frame) == 4


def test_features_are_chosen_evenly_among_those_alive(folder):
    chosen = evenly(folder, folder.model("glp"), 5)
    able = [i for i in range(66) if i not in (1, DEAD)]
    assert len(chosen) == 5
    assert set(chosen) <= set(able)
    assert (chosen[0], chosen[-1]) == (able[0], able[-1])
    assert evenly(folder, folder.model("pca"), 100) == [0, 2, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"way": "decoder"}, "class mean"),
        ({"strength": (0.0,)}, "other than 0"),
        ({"prompt": " "}, "prompt must not be empty"),
    ],
)
def test_steering_that_cannot_be_is_refused(folder, tiny_bridge, options, message):
    with pytest.raises(InputError, match=message):
        steer_features(SteerFeaturesJob(built=folder.path, names=("pca/2",), **options), model=tiny_bridge)
