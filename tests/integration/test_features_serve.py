"""Reading a text with the models of a folder of features, as the server does."""

import json
import threading
import urllib.request
from dataclasses import replace

import numpy as np
import pytest
import torch

from glp_lens import lm
from glp_lens.corpus import Document
from glp_lens.errors import InputError
from glp_lens.features import ModelAbout
from glp_lens.features.page import write_page
from glp_lens.features.sample import noise
from glp_lens.features.serve import Reader
from glp_lens.models.denoiser import Denoiser, DenoiserConfig
from glp_lens.models.glp import GLP
from glp_lens.models.random_features import RandomFeatures
from glp_lens.pipeline import ServeFeaturesJob, serve_features
from tests.unit.feature_folder import write_features

HOOK, TEXT = "blocks.1.hook_resid_post", "the cat and the dog play a game"


def small_glp(mean, std):
    denoiser = Denoiser(DenoiserConfig(24, 11, 17, 2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return GLP(denoiser, mean, std**2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_hooked):
    """A prior and random features, saved, and a folder that says to have their features."""
    root = tmp_path_factory.mktemp("serve")
    rows = torch.randn(200, 24, generator=torch.Generator().manual_seed(0)) * 3
    mean, std = rows.mean(0), rows.std(0)
    models = {"glp": small_glp(mean, std), "random": RandomFeatures.draw(mean, std, 30, seed=1)}
    abouts = []
    for label, model in models.items():
        model.save_pretrained(root / label)
        sigma = 0.3 if label == "glp" else None
        name = str(root / label)
        abouts.append(ModelAbout(label, label, model.kind, HOOK, model.n_features, 1, label == "glp", sigma, name))
    folder = write_features(root / "features", tuple(abouts))
    folder.finish(replace(folder.about, language_model=lm.identity(tiny_hooked), settings={"seed": 5}))
    return folder, models


def test_values_are_those_of_the_models_with_the_noise_of_the_text(trained, tiny_hooked):
    folder, models = trained
    reader = Reader(folder, tiny_hooked, models, 128)
    [ids] = lm.to_ids(tiny_hooked, [TEXT], 128)
    _, cache = tiny_hooked.run_with_cache(torch.tensor([ids]), names_filter=HOOK)
    rows = cache[HOOK][0, 1:]
    keys = np.full(len(rows), Document.of(TEXT).id, np.uint64)
    eps = noise(keys, np.arange(1, len(ids)), 24, 5)
    wanted = {"glp": models["glp"].encode(rows, sigma=0.3, noise=eps), "random": models["random"].encode(rows)}
    answer = reader({"text": TEXT})
    assert "".join(answer["tokens"]) == TEXT.replace(" ", "")
    for told in answer["models"]:
        values = wanted[told["label"]]
        frame = folder.table(told["label"], "features")
        z = (values.double().numpy() - frame["mean"].to_numpy()) / np.where(frame["std"] > 0, frame["std"], np.inf)
        z = np.abs(z) if told["label"] == "glp" else z
        features = [each["feature"] for each in told["features"]]
        assert features[:20] == np.argsort(-z.max(0), kind="stable")[:20].tolist()
        assert set(np.argsort(-z, axis=1)[:, :5].ravel()) <= set(features)
        for each in told["features"]:
            assert each["values"] == pytest.approx(values[:, each["feature"]].tolist(), rel=1e-3, abs=1e-5)
    one = reader({"text": TEXT, "model": "random", "feature": 29})
    assert [each["feature"] for each in one["models"][0]["features"]] == [29]
    assert json.dumps(answer) == json.dumps(reader({"text": TEXT}))


def test_long_texts_are_cut_and_massive_tokens_left_out(trained, tiny_hooked):
    folder, models = trained
    answer = Reader(folder, tiny_hooked, models, 4)({"text": TEXT, "model": "random", "feature": 0})
    assert answer["cut"] is True
    assert len(answer["tokens"]) == 3
    reader = Reader(folder, tiny_hooked, models, 128)
    norms = lm.activations(tiny_hooked, *lm.pad(lm.to_ids(tiny_hooked, [TEXT], 128)), [HOOK])[HOOK][0, 1:].norm(dim=1)
    reader.limits = {HOOK: float(norms.sort().values[-2])}
    values = reader({"text": TEXT, "model": "random", "feature": 0})["models"][0]["features"][0]["values"]
    assert [value is None for value in values] == (norms == norms.max()).tolist()


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({}, "expected a text"),
        ({"text": ["a"]}, "expected a text"),
        ({"text": ""}, "no token"),
        ({"text": "a", "model": "sae"}, "no model 'sae' is open"),
        ({"text": "a", "model": ["glp"]}, "no model"),
        ({"text": "a", "model": "random", "feature": 30}, "30 features, counted from 0; got 30"),
        ({"text": "a", "model": "random", "feature": True}, "got True"),
        ({"text": "a", "model": "random", "feature": -1}, "got -1"),
    ],
)
def test_questions_without_an_answer_are_one_line(trained, tiny_hooked, question, message):
    folder, models = trained
    with pytest.raises(InputError, match=message):
        Reader(folder, tiny_hooked, models, 128)(question)


def test_the_job_serves_the_page_and_reads_texts(trained, tiny_hooked):
    folder, _ = trained
    settings = ServeFeaturesJob(built=folder.path, models=("glp",), port=0)
    with pytest.raises(InputError, match="make it with glp-lens features page"):
        serve_features(settings, model=tiny_hooked)
    page = write_page(folder)
    said = []

    def run(server):
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        address = said[-1].split()[1]
        assert urllib.request.urlopen(address, timeout=20).read() != page.read_bytes()
        asked = urllib.request.Request(
            f"{address}read", json.dumps({"text": TEXT}).encode(), {"Content-Type": "application/json"}
        )
        answer = json.loads(urllib.request.urlopen(asked, timeout=60).read())
        assert [each["label"] for each in answer["models"]] == ["glp"]
        server.shutdown()
        raise KeyboardInterrupt

    serve_features(settings, model=tiny_hooked, say=said.append, run=run)
    assert said[-1] == "ended"
