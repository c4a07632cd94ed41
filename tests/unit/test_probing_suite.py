"""The suite on synthetic activations with known answers."""

from typing import ClassVar

import numpy as np
import pytest
import torch

from glp_lens.artifacts import ActivationModel
from glp_lens.errors import InputError
from glp_lens.evals.entries import Entry
from glp_lens.evals.probing import suite
from glp_lens.evals.probing.activations import TaskActivations
from glp_lens.evals.probing.tasks import build
from glp_lens.evals.results import Results
from glp_lens.interface import Featurizer

D = 7


class Map(ActivationModel, Featurizer):
    """Features are a linear map of the rows, plus noise if `spread` is above 0."""

    kind: ClassVar[str] = "map"

    def __init__(self, weight, spread=0.0, store=None):
        self.weight, self.spread = weight, spread
        self.d_in, self.n_width = weight.shape
        self.stochastic = spread > 0
        self.provenance = {"store": store or {}}
        self.seen = []

    @property
    def n_features(self):
        return self.n_width

    def encode(self, x, *, noise=None, generator=None, scale=1.0):
        self.seen.append(noise)
        return scale * (x + self.spread * noise) @ self.weight

    def _config(self):
        return {}

    def _tensors(self):
        return {}

    @classmethod
    def _restore(cls, config, tensors):
        raise KeyError


class NoFeatures(ActivationModel):
    kind: ClassVar[str] = "none"
    d_in, provenance = D, {}
    _config = _tensors = _restore = None


def problem(n_tasks=4, n_train=60, n_test=41, strength=1.0):
    """Tasks whose dimension `t` of the activations tells the classes apart, tasks 0 and 1 of one family."""
    generator = torch.Generator().manual_seed(0)
    tasks, rows = [], {}
    for t in range(n_tasks):
        n = n_train + n_test
        y = np.random.default_rng(t).permutation(np.arange(n) % 2)
        texts = [f"{t} {i}" for i in range(n)]
        name, family = f"task{t}", f"family{max(t, 1)}"
        tasks.append(build(name, texts, y, range(n_train), range(n_train, n), family=family))
        x = torch.randn(n, D, generator=generator)
        x[:, t] += strength * (2 * torch.as_tensor(y) - 1)
        rows[name] = x
    source = {"hook": "blocks.1.hook_resid_post", "model": {"weight_processing": "raw"}}
    return tasks, TaskActivations(rows, source)


def get(results, model, task, setting, metric):
    rows = [m for m in results.metrics if (m.model, m.task, m.setting, m.metric) == (model, task, setting, metric)]
    assert len(rows) == 1
    return rows[0]


def test_numbers_agree_with_each_other_and_survive_saving(tmp_path):
    tasks, acts = problem(strength=1.5)
    eye, blind = Map(torch.eye(D)), Map(torch.cat([torch.zeros(4, 5), torch.randn(3, 5)]))
    results = suite.run([Entry("eye", eye), Entry("blind", blind)], tasks, acts, max_features=3)
    for setting in ("split=official;mode=all", "split=dedup;mode=paper"):
        values = [get(results, "eye", t.name, setting, "auc").value for t in tasks]
        others = [get(results, "blind", t.name, setting, "auc").value for t in tasks]
        assert min(values) > 0.9
        assert np.mean(others) < 0.7
        mean = get(results, "eye", "all", setting, "auc")
        assert mean.value == pytest.approx(np.mean(values))
        assert mean.n == 3
        difference = get(results, "eye", "all", setting, "auc_diff:blind")
        assert difference.value == pytest.approx(np.mean(values) - np.mean(others))
        assert difference.ci_low > 0
        assert get(results, "eye", "all", setting, "p_holm:blind").value == pytest.approx(2 / 2**3)
    assert get(results, "eye", "task2", "split=official;mode=paper", "n_candidates").value == 3
    assert get(results, "blind", "task2", "split=official;mode=all", "n_candidates").value == 5
    assert get(results, suite.DENSE, "task0", "split=official", "auc").value > 0.9
    chosen = {
        (p["model"], p["task"]): p["features"]
        for p in results.extras["probes"]
        if p["setting"] == "split=official;mode=all"
    }
    assert [chosen["eye", t.name] for t in tasks] == [[0], [1], [2], [3]]
    assert not results.failures
    assert Results.load(results.save(tmp_path)).frame().equals(results.frame())


def test_stochastic_models_are_averaged_over_noise_seeds_with_shared_noise():
    tasks, acts = problem(n_tasks=2)
    noisy, other = Map(torch.eye(D), spread=0.8), Map(torch.randn(D, 11), spread=0.1)
    entries = [
        Entry("noisy", noisy),
        Entry("other", other, {"scale": 2.0}),
        Entry("still", Map(torch.eye(D))),
    ]
    results = suite.run(entries, tasks, acts, seeds=(3, 4), row_block=29)
    setting = "split=official;mode=all"
    record = next(p for p in results.extras["probes"] if (p["model"], p["setting"]) == ("noisy", setting))
    assert len(record["auc"]) == 2
    assert record["auc"][0] != record["auc"][1]
    assert get(results, "noisy", "task0", setting, "auc").value == pytest.approx(np.mean(record["auc"]))
    spread = get(results, "noisy", "task0", setting, "auc_seed_sd").value
    assert spread == pytest.approx(np.std(record["auc"], ddof=1))
    assert not [m for m in results.metrics if m.model == "still" and m.metric == "auc_seed_sd"]
    for a, b in zip(noisy.seen, other.seen, strict=True):
        assert torch.equal(a, b)
    whole = suite.run(entries, tasks, acts, seeds=(3, 4))
    np.testing.assert_allclose(whole.frame()["value"], results.frame()["value"])


def test_test_rows_do_not_touch_the_choice():
    tasks, acts = problem(n_tasks=1)
    first = suite.run([Entry("eye", Map(torch.eye(D)))], tasks, acts)
    test = tasks[0].splits["official"].test
    acts.rows["task0"][test] = torch.randn(len(test), D, generator=torch.Generator().manual_seed(9)) * 100
    second = suite.run([Entry("eye", Map(torch.eye(D)))], tasks, acts)
    for a, b in zip(first.extras["probes"], second.extras["probes"], strict=True):
        assert (a["features"], a["signs"], a["auc_validation"]) == (
            b["features"],
            b["signs"],
            b["auc_validation"],
        )
    assert first.extras["probes"][0]["auc"] != second.extras["probes"][0]["auc"]


def test_what_cannot_be_measured_is_said():
    tasks, acts = problem(n_tasks=2)
    tiny = build("tiny", ["a", "b", "c", "d", "e", "f"], [0, 1] * 3, range(4), range(4, 6))
    rows = {**acts.rows, "tiny": torch.randn(6, D)}
    broken = Map(torch.full((D, 2), float("nan")))
    entries = [Entry("eye", Map(torch.eye(D))), Entry("none", NoFeatures()), Entry("broken", broken)]
    results = suite.run(entries, [*tasks, tiny], TaskActivations(rows, acts.source))
    text = "\n".join(results.failures)
    assert "none: gives no features" in text
    assert "tiny, split=official: skipped" in text
    assert "broken on task1: skipped, features are not finite" in text
    assert not [m for m in results.metrics if m.model in ("none", "broken") or m.task == "tiny"]


def test_bad_input_is_refused_in_one_line():
    tasks, acts = problem(n_tasks=1)
    eye = Entry("eye", Map(torch.eye(D)))
    with pytest.raises(InputError, match="labels must be unique"):
        suite.run([eye, eye], tasks, acts)
    with pytest.raises(InputError, match="at least one model"):
        suite.run([], tasks, acts)
    with pytest.raises(InputError, match="width 5"):
        suite.run([Entry("narrow", Map(torch.eye(5)))], tasks, acts)
    with pytest.raises(InputError, match="collect them for this very task"):
        suite.run([eye], tasks, TaskActivations({}, {}))
    elsewhere = Entry("e", Map(torch.eye(D), store={"hook": "blocks.2.hook_resid_post"}))
    with pytest.raises(InputError, match="allow_mismatch"):
        suite.run([elsewhere], tasks, acts)
    assert suite.run([elsewhere], tasks, acts, allow_mismatch=True).metrics
    folded = Entry("f", Map(torch.eye(D), store={"model": {"weight_processing": "folded"}}))
    with pytest.raises(InputError, match=r"folded weights \(here raw\)"):
        suite.run([folded], tasks, acts)
