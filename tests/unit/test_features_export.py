"""Features in the formats of other tools, against what those tools expect, and directions against their table."""

import gzip
import json

import numpy as np
import pandas as pd
import pytest
import torch

from glp_lens import directions
from glp_lens.errors import InputError
from glp_lens.features import BANDS, About, FeatureFolder, ModelAbout
from glp_lens.features import export as exporting
from glp_lens.pipeline import ExportFeaturesJob, export_features
from tests.unit.feature_folder import DEAD, GLP, SAE, write_features

DASHBOARD = {
    "feature_index", "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1",
    "correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson",
    "correlated_features_indices", "correlated_features_l1", "correlated_features_pearson", "neg_str", "neg_values",
    "pos_str", "pos_values", "frac_nonzero", "freq_hist_data_bar_values", "freq_hist_data_bar_heights",
    "logits_hist_data_bar_heights", "logits_hist_data_bar_values", "n_prompts_total", "n_tokens_in_prompt", "dataset",
    "decoder_weights_dist", "vector", "activations",
}  # fmt: skip
"""Keys of NeuronpediaDashboardFeature.to_dict of sae_dashboard 0.8.0."""
PASSAGE = {"bin_min", "bin_max", "bin_contains", "tokens", "values", "qualifying_token_index"}
"""Keys of its NeuronpediaDashboardActivation.to_dict, without attribution."""
FEATURE = {
    "modelId", "layer", "index", "maxActApprox", "creatorId", "frac_nonzero", "freq_hist_data_bar_heights",
    "freq_hist_data_bar_values", "logits_hist_data_bar_heights", "logits_hist_data_bar_values",
    "neuron_alignment_indices", "neuron_alignment_l1", "neuron_alignment_values", "correlated_neurons_indices",
    "correlated_neurons_l1", "correlated_neurons_pearson", "decoder_weights_dist", "neg_str", "neg_values", "pos_str",
    "pos_values", "sourceSetName", "topkCosSimIndices", "topkCosSimValues", "vector", "vectorLabel", "hookName",
    "vectorDefaultSteerStrength", "hasVector",
}  # fmt: skip
"""Columns of the table of features that Neuronpedia's export-data.py writes."""


@pytest.fixture
def folder(tmp_path):
    return write_features(tmp_path / "features")


def go(folder, **options):
    return export_features(ExportFeaturesJob(built=folder.path, **options), say=lambda _: None)


def lines(path):
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]


def test_a_dashboard_holds_what_the_tables_say(folder, tmp_path):
    [file] = go(folder, to="saedashboard", all_of="my sae", out=tmp_path / "out")
    batch = json.loads(file.read_text())
    assert {key: batch[key] for key in batch if key != "features"} == {
        "model_id": "toy", "layer": 1, "sae_set": "my-sae", "sae_id_suffix": None,
    }  # fmt: skip
    known, writes = folder.table("my sae", "features"), folder.table("my sae", "writes")
    examples, (units, norms) = folder.table("my sae", "examples"), folder.directions("my sae", "decoder")
    assert [each["feature_index"] for each in batch["features"]] == list(range(SAE.n_features))
    for i, each in enumerate(batch["features"]):
        assert each.keys() == DASHBOARD
        assert each["frac_nonzero"] == known.density[i]
        assert each["freq_hist_data_bar_heights"] == known.histogram[i].tolist()
        own = writes[(writes.feature == i) & (writes.way == "decoder")].set_index("side")
        for side, name in (("top", "pos"), ("bottom", "neg")):
            assert each[f"{name}_str"] == (list(own.tokens[side]) if i != DEAD else [])
            assert each[f"{name}_values"] == (list(own.logits[side]) if i != DEAD else [])
        passages = examples[(examples.feature == i) & (examples.group == "top")].sort_values("rank")
        shown = [passage for passage in each["activations"] if passage["bin_contains"] == -1]
        assert [passage["tokens"] for passage in shown] == [list(tokens) for tokens in passages.tokens]
        assert [passage["values"] for passage in shown] == [list(values) for values in passages["values"]]
        assert [passage["qualifying_token_index"] for passage in shown] == passages.peak.tolist()
        assert all(passage.keys() == PASSAGE for passage in each["activations"])
        if i != DEAD:
            torch.testing.assert_close(torch.tensor(each["vector"]), units[i] * norms[i], rtol=1e-4, atol=0)
    assert batch["features"][DEAD]["vector"] == batch["features"][DEAD]["activations"] == []


def test_bars_stand_in_the_middle_of_their_bins_and_bands_tell_their_share(tmp_path):
    values = np.random.default_rng(0).gamma(0.5, 2.0, 4000)
    values *= 10 / values.max()
    counts, edges = np.histogram(values, 40, (0, 10))
    model = ModelAbout("one", "one", "sae", "hook_embed", 1, 1, False)
    folder = FeatureFolder(tmp_path / "features")
    row = {
        "feature": 0, "block": 0, "unit": 0, "mean": 1.0, "std": 1.0, "kurtosis": 0.0, "min": 0.0, "max": 10.0,
        "density": 1.0, "dead": False, "dense": True, "histogram_low": 0.0, "histogram_high": 10.0,
        "histogram": counts.tolist(),
    }  # fmt: skip
    passages = [(0, f"band {i}", 0, 1, 2, 0, 1.0, [3], [" a"], [1.0]) for i in range(5)]
    columns = ["feature", "group", "rank", "key", "position", "peak", "value", "token_ids", "tokens", "values"]
    folder.write_table(model, "features", pd.DataFrame([row]))
    folder.write_table(model, "examples", pd.DataFrame(passages, columns=columns))
    folder.finish(About((model,), {}, 1, 1, "", {}, {}))
    [file] = go(folder, to="saedashboard", out=tmp_path / "out")
    [each] = json.loads(file.read_text())["features"]
    np.testing.assert_allclose(each["freq_hist_data_bar_values"], (edges[1:] + edges[:-1]) / 2, rtol=1e-4)
    for passage, (low, high) in zip(each["activations"], reversed(BANDS), strict=True):
        assert (passage["bin_min"], passage["bin_max"]) == pytest.approx((10 * low, 10 * high))
        inside = (values >= 10 * low) & ((values < 10 * high) | (high == 1))
        assert passage["bin_contains"] == pytest.approx(inside.mean())


def test_neuronpedia_gets_three_tables(folder, tmp_path):
    files = go(folder, to="neuronpedia", out=tmp_path / "out")
    assert [file.relative_to(tmp_path / "out").as_posix() for file in files] == [
        f"{table}/batch-0.jsonl.gz" for table in ("features", "activations", "explanations")
    ]
    features, activations, explanations = map(lines, files)
    assert [each["index"] for each in features] == [str(i) for i in range(GLP.n_features)]
    assert features[0].keys() >= FEATURE
    assert {(each["modelId"], each["layer"]) for each in features + activations} == {("toy", "1-glp")}
    assert [each["hasVector"] for each in features] == [i != DEAD for i in range(GLP.n_features)]
    assert features[15]["vectorLabel"] == "glp/1:3"
    near = folder.table("glp", "neighbours")
    near = near[(near.feature == 3) & (near.by == "direction") & (near.model == "glp")]
    assert features[3]["topkCosSimIndices"] == near.other.tolist()
    assert len({each["id"] for each in activations}) == len(activations)
    for each in activations:
        assert each["maxValue"] == max(each["values"]) == each["values"][each["maxValueTokenIndex"]]
        assert each["values"][each["qualifyingTokenIndex"]] > 0  # a signed feature's low passages have no place there
    labels = folder.table("glp", "labels")
    assert [each["description"] for each in explanations] == labels.label.tolist()
    assert all("automatic" in each["notes"] for each in explanations)


def test_large_models_come_in_batches_and_an_earlier_export_leaves_nothing(folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(exporting, "BATCH", 7)
    files = go(folder, to="saedashboard", out=out)
    assert [file.name for file in files] == [f"batch-{i}.json" for i in range(4)]
    indices = [each["feature_index"] for file in files for each in json.loads(file.read_text())["features"]]
    assert indices == list(range(24))
    with pytest.raises(InputError, match="overwrite"):
        go(folder, to="saedashboard", names=("0:1", "1:2"), out=out)
    [file] = go(folder, to="saedashboard", names=("0:1", "1:2"), out=out, overwrite=True)
    assert [each["feature_index"] for each in json.loads(file.read_text())["features"]] == [1, 14]
    assert sorted(path.name for path in out.glob("batch*")) == ["batch-0.json"]


@pytest.mark.parametrize("suffix", [".safetensors", ".gguf", ".pt", ".npy"])
def test_a_direction_is_read_back_as_generate_reads_it(folder, tmp_path, suffix):
    [file] = go(folder, to="directions", names=("1:3",), way="class mean", out=tmp_path / f"way{suffix}")
    made = directions.read(file, GLP.hook)
    units, norms = folder.directions("glp", "class mean")
    torch.testing.assert_close(made.vector, units[15])
    assert made.norm == pytest.approx(float(norms[15]), rel=1e-5)
    assert made.hook == GLP.hook


def test_directions_of_several_features_are_files_of_a_folder(folder, tmp_path):
    files = go(folder, to="directions", names=("my sae/7", "1:3"), out=tmp_path / "out")
    made = [directions.Direction.load(file) for file in files]
    assert [each.name for each in made] == ["my sae/7", "glp/1:3"]
    assert [each.method for each in made] == ["feature, decoder", "feature, jacobian"]
    assert made[0].provenance["model"] == {"name": "toy"}
    assert made[0].provenance["feature"]["weights"] == SAE.fingerprint


def test_neurons_are_steered_in_the_stream_that_they_write_to(tmp_path):
    neurons = ModelAbout("neurons", "neurons", "neurons", "blocks.2.mlp.hook_post", 24, 1, True)
    folder = write_features(tmp_path / "features", (neurons,))
    [file] = go(folder, to="directions", names=("7",), way="decoder", out=tmp_path / "way.safetensors")
    assert directions.read(file).hook == "blocks.2.hook_resid_post"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "directions"}, "names of features"),
        ({"to": "directions", "names": ("4",), "out": "x.npy"}, "glp/0:4 has no direction"),
        ({"to": "directions", "names": ("1", "2"), "out": "x.npy"}, "folder"),
        ({"to": "directions", "names": ("1",), "way": "component"}, "jacobian, class mean"),
        ({"to": "saedashboard", "out": "x.npy"}, "writes a folder"),
        ({"to": "saedashboard", "names": ("1", "my sae/2")}, "one model"),
        ({"to": "saedashboard", "names": ("1",), "all_of": "glp"}, "not both"),
        ({"to": "saedashboard", "all_of": "none"}, "no model 'none'"),
        ({"to": "saedashboard", "out": "features"}, "folder of features itself"),
    ],
)
def test_what_cannot_be_exported_is_refused(folder, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        go(folder, **{**options, "out": tmp_path / options.get("out", "out")})
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "x.npy").exists()
