"""Features that are alike, against NumPy's correlations of all pairs; and tasks that features won."""

import numpy as np
import pytest
import torch

from glp_lens import GLP, PCA, Raw
from glp_lens.activations.writer import write_store
from glp_lens.errors import InputError
from glp_lens.evals.results import Results
from glp_lens.features import FeatureFolder, ModelAbout
from glp_lens.features.neighbours import NEIGHBOURS, Vectors, nearest, neighbours
from glp_lens.features.sample import Sample, encode, options_of
from glp_lens.features.won_tasks import won_tasks
from glp_lens.models.denoiser import Denoiser, DenoiserConfig
from glp_lens.models.random_features import RandomFeatures

D, N, HOOK = 6, 211, "blocks.1.hook_resid_post"


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr("glp_lens.features.neighbours._BLOCK", 7)
    monkeypatch.setattr("glp_lens.features.neighbours._IN_MEMORY", 4 * N * 10)  # some in memory, some in a file


def sample(rows, seed=0):
    rng = np.random.default_rng(seed)
    keys = rng.integers(1 << 63, size=len(rows)).astype(np.uint64)
    return Sample(rows, keys, rng.integers(1, 60, len(rows)), rng.integers(0, 99, len(rows)))


def mixed(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=generator) @ torch.randn(D, D, generator=generator) + 3


def brute(values, own):
    """Rank by absolute value, itself aside: `{feature: [(other, value)]}`."""
    found = {}
    for i, row in enumerate(values):
        order = [j for j in np.argsort(-np.abs(row), kind="stable") if not (own and i == j) and row[j] != 0]
        found[i] = [(j, row[j]) for j in order[:NEIGHBOURS]]
    return found


def assert_neighbours(table, by, model, expected):
    part = table[(table["by"] == by) & (table["model"] == model)]
    for feature, pairs in expected.items():
        rows = part[part["feature"] == feature]
        assert rows["value"].tolist() == pytest.approx([value for _, value in pairs], abs=2e-4)
        assert rows["other"].tolist() == [other for other, _ in pairs]


def models(store):
    generator = torch.Generator().manual_seed(4)
    net = Denoiser(DenoiserConfig(D, 8, 10, 2))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
        net.layers[1].up_proj.weight[3] = net.layers[1].up_proj.bias[3] = 0  # dead
    random = RandomFeatures.fit(store, n_features=9)
    return [
        (ModelAbout("glp", "glp", "glp", HOOK, 20, 2, True, 0.1), GLP(net, torch.zeros(D), torch.ones(D))),
        (ModelAbout("pca", "pca", "pca", HOOK, 4, 1, True), PCA.fit(store, n_components=4)),
        (ModelAbout("random", "random", "random", HOOK, 9, 1, False), random),
    ]


def test_neighbours_are_those_of_all_pairs(tmp_path, small_blocks):
    rows = mixed(N)
    compared = models(write_store(tmp_path / "acts", mixed(300, 1), hook=HOOK))
    folder, tokens = FeatureFolder(tmp_path / "features"), sample(rows)
    directions = {}
    for about, _ in compared:
        way = {"glp": "jacobian", "pca": "component", "random": "input weights"}[about.kind]
        directions[about.label] = torch.randn(about.n_features, D, generator=torch.Generator().manual_seed(len(way)))
        directions[about.label][2] = float("nan")
        folder.write_directions(about, way, directions[about.label])
        folder.write_directions(about, "class mean", torch.ones(about.n_features, D))
    neighbours(folder, compared, {HOOK: tokens}, seed=3)
    values = {a.label: encode(m, options_of(a), tokens, 3).double().numpy() for a, m in compared}
    for about, _ in compared:
        table = folder.table(about, "neighbours")
        assert table["feature"].is_monotonic_increasing
        for other, _ in compared:
            a, b = values[about.label], values[other.label]
            with np.errstate(invalid="ignore"):
                correlations = np.nan_to_num(np.corrcoef(a.T, b.T)[: a.shape[1], a.shape[1] :])
            own = about.label == other.label
            assert_neighbours(table, "activation", other.label, brute(correlations, own))
            unit = [
                (v / v.norm(dim=1, keepdim=True)).nan_to_num() for v in (directions[x.label] for x in (about, other))
            ]
            assert_neighbours(table, "direction", other.label, brute((unit[0] @ unit[1].T).numpy(), own))
    assert 13 not in set(folder.table(compared[0][0], "neighbours").query("by == 'activation'")["feature"])  # dead


def test_features_that_are_on_in_few_rows_have_no_neighbours_by_activation(tmp_path):
    """Two that are on in one and the same row have a correlation of 1, which says nothing."""
    rows = torch.rand(50, 7, generator=torch.Generator().manual_seed(0)) + 0.1
    rows[3:, 0] = rows[3:, 1] = rows[8:, 2] = 0
    about, folder = ModelAbout("raw", "raw", "raw", HOOK, 7, 1, False), FeatureFolder(tmp_path)
    neighbours(folder, [(about, Raw(rows))], {HOOK: sample(rows)})
    table = folder.table(about, "neighbours")
    assert set(table["feature"]) == set(table["other"]) == {2, 3, 4, 5, 6}
    assert set(table["by"]) == {"activation"}


@pytest.mark.parametrize("size", [1e-25, 1e-44])
def test_tiny_features_are_nobodys_nearest_for_being_tiny(tmp_path, size):
    """Their squares are 0 in float32: a correlation that is no number would stand before all others."""
    rows = mixed(40)
    rows[:, 2] *= size
    about, folder = ModelAbout("raw", "raw", "raw", HOOK, D, 1, True), FeatureFolder(tmp_path)
    neighbours(folder, [(about, Raw(rows))], {HOOK: sample(rows)})
    table = folder.table(about, "neighbours")
    assert table["value"].notna().all()
    if size > 1e-30:
        expected = np.corrcoef(rows.double().numpy().T)
        for row in table.itertuples():
            assert row.value == pytest.approx(expected[row.feature, row.other], abs=1e-4)
    else:
        assert 2 not in {*table["feature"], *table["other"]}


def test_models_of_another_width_are_compared_by_activation_alone(tmp_path):
    rows, inside = mixed(40), torch.rand(40, 11, generator=torch.Generator().manual_seed(0))
    folder, places = FeatureFolder(tmp_path), {HOOK: sample(rows), "blocks.1.mlp.hook_post": sample(inside)}
    compared = [
        (ModelAbout("a", "a", "raw", HOOK, D, 1, True), Raw(rows)),
        (ModelAbout("b", "b", "raw", "blocks.1.mlp.hook_post", 11, 1, True), Raw(inside)),
    ]
    for about, _ in compared:
        folder.write_directions(about, "decoder", torch.eye(about.n_features) + 0.1)
    neighbours(folder, compared, places)
    assert set(folder.table(compared[0][0], "neighbours").query("by == 'direction'")["model"]) == {"a"}
    second = folder.table(compared[1][0], "neighbours")
    assert set(second["by"]) == {"activation"}
    assert set(second["model"]) == {"a", "b"}
    places["blocks.1.mlp.hook_post"] = sample(inside, seed=1)
    with pytest.raises(InputError, match="not of the same tokens"):
        neighbours(folder, compared, places)


def test_nearest_of_fewer_features_than_are_asked_for():
    vectors = torch.nn.functional.normalize(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), dim=0)
    others, values = nearest([Vectors(3, 5, lambda part: vectors[:, part])])[0, 0]
    assert (values != 0).sum(1).tolist() == [2, 2, 2]
    assert sorted(others[0, :2].tolist()) == [1, 2]


def probed(**changes):
    """Results of `probe` of two priors and random features, of which the first prior is at two noise levels."""
    entry = {"kind": "glp", "hook": HOOK, "main": True, "n_features": 20, "sigma": 0.1}
    entries = {
        "first": entry,
        "first sigma=0.3": entry | {"sigma": 0.3, "main": False},
        "second": entry,
        "random": {"kind": "random", "hook": HOOK, "main": True, "n_features": 9},
    }
    made = {"first": {"seed": 1}, "first sigma=0.3": {"seed": 1}, "second": {"seed": 2}, "random": {}}
    best = [
        {"model": label, "task": task, "feature": feature, "sign": -1, "auc": auc, "ci_low": auc - 0.1, "ci_high": 0.99}
        for label, task, feature, auc in [
            ("first", "tone", 7, 0.8), ("first", "topic", 3, 0.7), ("first", "other", 7, 0.9),
            ("second", "tone", 5, 0.6), ("first sigma=0.3", "tone", 1, 0.5), ("random", "tone", 8, 0.55),
        ]
    ]  # fmt: skip
    extras = {"best": best, "probes": []}
    return Results("probing", config={"entries": entries, "seed": 0}, data={"models": made}, extras=extras, **changes)


def test_tasks_are_those_of_the_same_model_whatever_its_label(tmp_path):
    compared = models(write_store(tmp_path / "acts", mixed(300, 1), hook=HOOK))
    folder, (about, glp) = FeatureFolder(tmp_path), compared[0]
    glp.provenance = {"seed": 1}
    compared[2][1].provenance = {}
    (note,) = won_tasks(folder, compared, probed())
    assert "pca" in note
    table = folder.table(about, "tasks")
    assert table["feature"].tolist() == [3, 7, 7]
    assert table["task"].tolist() == ["topic", "other", "tone"]
    assert table["ci_low"].tolist() == pytest.approx([0.6, 0.8, 0.7])
    assert set(table["sign"]) == {-1}
    assert folder.table(compared[2][0], "tasks")["feature"].tolist() == [8]
    glp.provenance = {"seed": 2}
    won_tasks(folder, compared[:1], probed())
    assert folder.table(about, "tasks")["feature"].tolist() == [5]
    glp.provenance = {"seed": 3}
    assert len(won_tasks(folder, compared, probed(), seed=1)) == 3  # random features of another seed too


def test_results_of_earlier_versions_have_intervals_only_of_one_noise_seed(tmp_path):
    results = probed()
    setting = "split=dedup;mode=all"
    for best in results.extras["best"]:
        del best["ci_low"], best["ci_high"]
        seeds = 2 if best["task"] == "topic" else 1
        results.extras["probes"].append(
            {"model": best["model"], "task": best["task"], "setting": setting, "features": [best["feature"]] * seeds}
        )
        results.add(best["model"], best["task"], setting, "auc", best["auc"], ci_low=0.25, ci_high=0.75, n=9)
    folder, about = FeatureFolder(tmp_path), ModelAbout("glp", "glp", "glp", HOOK, 20, 2, True, 0.1)
    glp = GLP(Denoiser(DenoiserConfig(D, 8, 10, 2)), torch.zeros(D), torch.ones(D), {"seed": 1})
    assert won_tasks(folder, [(about, glp)], results) == []
    table = folder.table(about, "tasks").set_index("task")
    assert table.loc["tone", ["ci_low", "ci_high"]].tolist() == [0.25, 0.75]
    assert table.loc["topic", ["ci_low", "ci_high"]].isna().all()
