"""The suite on synthetic activations with known answers."""

import os
import signal
import sys
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from glp_lens.artifacts import ActivationModel
from glp_lens.errors import InputError
from glp_lens.evals.entries import Entry
from glp_lens.evals.probing import TaskActivations, TaskRows, dense, features, rank, side_by_side, sparse, splits, suite
from glp_lens.evals.probing.settings import DENSE, ProbingSettings
from glp_lens.evals.probing.tasks import build
from glp_lens.evals.results import Results
from glp_lens.interface import Featurizer

D = 7
HOOK = "blocks.1.hook_resid_post"
ALL = "split=official;mode=all"
QUICK = {"ks": (), "resamples": 50}


@pytest.fixture(autouse=True)
def few_regressions(monkeypatch):
    """Fewer penalties to choose from: the regressions have tests of their own and are most of the time here."""
    monkeypatch.setattr(dense, "PENALTIES", (1.0,))
    monkeypatch.setattr(sparse, "PENALTIES", (1.0, 0.1))


class Map(ActivationModel, Featurizer):
    """Features are a linear map of the rows, plus noise if `spread` is above 0; for a tuple of them, side by side."""

    kind: ClassVar[str] = "map"

    def __init__(self, weight, spread=0.0, store=None, layers=1):
        self.weight, self.spread, self.layers = weight, spread, layers
        self.d_in = weight.shape[0]
        self.stochastic = spread != 0
        self.provenance = {"store": store or {}}
        self.seen = []

    @property
    def spreads(self):
        return self.spread if isinstance(self.spread, tuple) else (self.spread,)

    @property
    def n_features(self):
        return self.weight.shape[1] * len(self.spreads)

    @property
    def feature_layers(self):
        return self.layers

    def encode(self, x, *, noise=None, generator=None, sigma=1.0):
        self.seen.append(noise if noise is None else noise.clone())
        return torch.cat([(x if noise is None else x + s * sigma * noise) @ self.weight for s in self.spreads], dim=1)

    def _config(self):
        return {"spread": self.spread}

    def _tensors(self):
        return {"weight": self.weight}

    @classmethod
    def _restore(cls, config, tensors):
        raise KeyError


class NoFeatures(ActivationModel):
    kind: ClassVar[str] = "none"
    d_in, provenance = D, {}
    _config = _tensors = _restore = None


def problem(n_tasks=4, n_train=131, n_test=41, strength=1.0):
    """Tasks whose dimension `t` of the activations tells the classes apart, tasks 0 and 1 of one family."""
    generator = torch.Generator().manual_seed(0)
    tasks, acts = [], {}
    for t in range(n_tasks):
        n = n_train + n_test
        y = np.random.default_rng(t).permutation(np.arange(n) % 2)
        texts = [f"{t} {i}" for i in range(n)]
        name, family = f"task{t}", f"family{max(t, 1)}"
        tasks.append(build(name, texts, y, range(n_train), range(n_train, n), family=family))
        x = torch.randn(n, D, generator=generator)
        x[:, t] += strength * (2 * torch.as_tensor(y) - 1)
        acts[name] = x
    return tasks, acts, TaskActivations.of(acts, {"hook": HOOK, "model": {"weight_processing": "raw"}})


def random_map(width, seed=1, **rest):
    return Map(torch.randn(D, width, generator=torch.Generator().manual_seed(seed)), **rest)


def run(entries, tasks, activations, *, folder=None, allow_mismatch=False, **settings):
    data, chosen = suite.ProbingData(tasks, activations), ProbingSettings(**settings)
    return suite.run(entries, data, chosen, folder=folder, allow_mismatch=allow_mismatch)


def get(results, model, task, setting, metric):
    (metric,) = (
        m for m in results.metrics if (m.model, m.task, str(m.setting), m.name) == (model, task, setting, metric)
    )
    return metric


def numbers(results, model, contains=""):
    """All of a model's numbers by task, setting and metric."""
    return {
        (m.task, str(m.setting), m.name): (m.value, m.ci_low, m.ci_high, m.n)
        for m in results.metrics
        if m.model == model and contains in str(m.setting)
    }


def same(one, other):
    assert one.keys() == other.keys()
    np.testing.assert_allclose([one[key] for key in other], list(other.values()), atol=1e-6)


def test_numbers_agree_with_each_other_and_survive_saving(tmp_path):
    tasks, _, acts = problem(strength=1.5)
    blind = Map(torch.cat([torch.zeros(4, 5), torch.randn(3, 5, generator=torch.Generator().manual_seed(0))]))
    entries = [Entry("eye", Map(torch.eye(D))), Entry("blind", blind), Entry("sweep", random_map(9), main=False)]
    results = run(entries, tasks, acts, max_features=3, ks=(2,))
    smallest = "mode=equal;features=5"
    for setting in (ALL, "split=dedup;mode=paper", f"split=dedup;{smallest}", "split=official;probe=sparse;k=2"):
        values = [get(results, "eye", t.name, setting, "auc").value for t in tasks]
        others = [get(results, "blind", t.name, setting, "auc").value for t in tasks]
        assert min(values) > 0.75
        assert np.mean(others) < 0.7
        mean = get(results, "eye", "all", setting, "auc")
        assert mean.value == pytest.approx(np.mean(values))
        assert mean.n == 3
        difference = get(results, "eye", "all", setting, "auc_diff:blind")
        assert difference.value == pytest.approx(np.mean(values) - np.mean(others))
        assert difference.ci_low > 0
        assert get(results, "eye", "all", setting, "p_holm:blind").value == pytest.approx(2 / 2**3)
        assert get(results, "eye", "all", setting, "win_rate:blind").value == 1
    assert not [m for m in results.metrics if m.other == "sweep" or (m.model == "sweep" and m.other)]
    assert not [m for m in results.metrics if m.model == "sweep" and m.setting.get("probe") == "sparse"]
    assert get(results, "eye", "task2", "split=official;mode=paper", "n_candidates").value == 3
    assert get(results, "blind", "task2", ALL, "n_candidates").value == 5
    assert get(results, DENSE, "task0", "split=official", "auc").value > 0.9
    for mode in ("mode=all", "mode=paper"):
        at = {
            name: get(results, "blind", "task3", f"split=dedup;{mode}", name).value
            for name in ("auc", "auc_validation", "optimism", "auc_oracle")
        }
        assert at["optimism"] == pytest.approx(at["auc_validation"] - at["auc"])
        assert at["auc_oracle"] >= at["auc"]
    chosen = {(p["model"], p["task"]): p["features"] for p in results.extras["probes"] if p["setting"] == ALL}
    assert [chosen["eye", t.name] for t in tasks] == [[0], [1], [2], [3]]
    about = results.config["entries"]["sweep"]
    assert about == {"kind": "map", "hook": HOOK, "main": False, "n_features": 9}
    assert not results.failures
    assert Results.load(results.save(tmp_path)).frame().equals(results.frame())


def test_the_best_feature_comes_with_the_texts_that_excite_it():
    tasks, acts, found = problem(n_tasks=2, strength=2.0)
    weight = torch.eye(D)[:, :6].clone()
    weight[1] *= -1
    results = run([Entry("e", Map(weight, layers=3))], tasks, found, **QUICK)
    first, second = results.extras["best"]
    assert (first["task"], first["feature"], first["layer"], first["neuron"], first["sign"]) == ("task0", 0, 0, 0, 1)
    assert (second["task"], second["feature"], second["layer"], second["neuron"], second["sign"]) == (
        "task1",
        1,
        0,
        1,
        -1,
    )
    values = -acts["task1"][:131, 1]
    top = values.argsort()[:5].tolist()  # the sign is -1
    assert [t["text"] for t in second["texts"]] == [tasks[1].texts[i] for i in top]
    assert [t["value"] for t in second["texts"]] == pytest.approx(values[top].tolist())
    assert [t["label"] for t in second["texts"]] == tasks[1].labels[top].tolist()
    only = get(results, "e", "task1", "split=dedup;mode=all", "auc")  # of one noise seed
    assert (second["ci_low"], second["ci_high"]) == pytest.approx((only.ci_low, only.ci_high))
    assert second["auc"] == pytest.approx(only.value)


def test_features_that_know_nothing_reach_the_null_and_gain_nothing_on_test():
    tasks, _, found = problem(n_tasks=4, n_train=200, n_test=90, strength=0.0)
    few, many = Independent(20), Independent(150)
    results = run([Entry("few", few), Entry("many", many)], tasks, found, seeds=5, **QUICK)
    mean = {name: get(results, "many", "all", ALL, name).value for name in ("auc", "auc_validation", "auc_null")}
    assert mean["auc_validation"] == pytest.approx(mean["auc_null"], abs=0.012)
    assert mean["auc_null"] > 0.58
    assert mean["auc"] == pytest.approx(0.5, abs=0.05)
    assert get(results, "many", "all", ALL, "optimism").value > 0.05
    assert get(results, "few", "all", ALL, "auc_null").value < mean["auc_null"]


class Independent(Map):
    """Features drawn anew for each row, by its noise."""

    def __init__(self, width):
        super().__init__(torch.zeros(D, width), spread=1.0)

    def encode(self, x, *, noise=None, generator=None):
        draw = [np.random.default_rng(list(row.tobytes())) for row in noise.numpy()]
        return torch.tensor(np.stack([rng.standard_normal(self.n_features) for rng in draw]))


def test_stochastic_models_are_averaged_over_noise_seeds_with_shared_noise(monkeypatch):
    monkeypatch.setattr(side_by_side, "_IN_THREADS", 1)  # else noise of both tasks is seen in any order
    tasks, _, acts = problem(n_tasks=2)
    noisy, other = Map(torch.eye(D), spread=0.8), random_map(11, spread=0.1)
    still = Map(torch.eye(D))
    entries = [Entry("noisy", noisy), Entry("other", other, {"sigma": 2.0}), Entry("still", still)]
    monkeypatch.setattr(features, "BLOCK", 29 * D)
    results = run(entries, tasks, acts, seeds=2, **QUICK)
    record = next(p for p in results.extras["probes"] if (p["model"], p["setting"]) == ("noisy", ALL))
    assert len(record["auc"]) == 2
    assert record["auc"][0] != record["auc"][1]
    assert get(results, "noisy", "task0", ALL, "auc").value == pytest.approx(np.mean(record["auc"]))
    spread = get(results, "noisy", "task0", ALL, "auc_seed_sd").value
    assert spread == pytest.approx(np.std(record["auc"], ddof=1))
    assert not [m for m in results.metrics if m.model == "still" and m.metric == "auc_seed_sd"]
    # Blocks have other numbers of rows for other numbers of features, and rows the same noise in all of them.
    assert len(other.seen) > len(noisy.seen) > 4
    assert torch.equal(torch.cat(noisy.seen), torch.cat(other.seen))
    assert len(still.seen) == len(noisy.seen) // 2
    monkeypatch.undo()
    whole = run(entries, tasks, acts, seeds=2, **QUICK)
    np.testing.assert_allclose(whole.frame()["value"], results.frame()["value"])


def test_a_layer_is_scored_as_its_features_alone_are():
    tasks, _, acts = problem(n_tasks=2)
    whole = random_map(12, layers=3)
    alone = [Entry(f"layer {i}", Map(whole.weight[:, 4 * i : 4 * i + 4])) for i in range(3)]
    results = run([Entry("whole", whole), *alone], tasks, acts, **QUICK)
    for i in range(3):
        for metric in ("auc", "auc_validation", "n_candidates"):
            for task in ("task0", "task1", "all"):
                view = get(results, "whole", task, f"split=dedup;mode=all;layer={i}", metric)
                own = get(results, f"layer {i}", task, "split=dedup;mode=all", metric)
                assert (view.value, view.ci_low, view.n) == pytest.approx((own.value, own.ci_low, own.n), nan_ok=True)
    assert get(results, "whole", "task0", "split=dedup;mode=all;layer=2", "n_candidates").value == 4
    assert not [m for m in results.metrics if m.model != "whole" and m.setting.get("layer")]


@pytest.mark.parametrize("file", [False, True])
def test_noise_levels_side_by_side_score_as_one_model_with_all_features(monkeypatch, file):
    tasks, _, acts = problem(n_tasks=2, strength=0.4)
    parts = random_map(9, spread=1.0, layers=3)
    wide = Map(parts.weight, spread=(0.3, 0.9))
    entries = [
        Entry("0.3", parts, {"sigma": 0.3}),
        Entry("wide", wide),
        Entry("both", parts, {"sigma": (0.3, 0.9)}),
    ]
    options = {"max_features": 4, "ks": (1, 5), "sizes": (4, 9), "seeds": 2, "resamples": 50}
    expected = run([entries[1]], tasks, acts, **options)
    if file:
        monkeypatch.setattr(features, "IN_MEMORY", 0)
        monkeypatch.setattr("glp_lens.evals.probing.scoring._COLUMNS", 8)
    parts.seen.clear()
    results = run(entries, tasks, acts, **options)
    assert not results.failures
    # Two levels, two seeds, two tasks: the level that is an entry of its own is encoded once for both.
    assert len(parts.seen) == 2 * 2 * 2
    same(numbers(results, "both"), numbers(expected, "wide"))
    alone = {key: value for key, value in numbers(results, "wide").items() if ":" not in key[2]}
    same(alone, numbers(expected, "wide"))
    assert results.config["entries"]["both"]["n_features"] == 18
    assert not [m for m in results.metrics if m.model == "both" and m.setting.get("layer")]
    chosen = next(b for b in results.extras["best"] if b["model"] == "both")
    assert (chosen["layer"], chosen["neuron"]) == divmod(chosen["feature"] % 9, 3)


def test_equal_count_is_the_mean_of_single_features_at_one_and_the_choice_at_all():
    tasks, acts, found = problem(n_tasks=1)
    model = random_map(13)
    results = run([Entry("m", model)], tasks, found, sizes=(1, 4, 99), **QUICK)
    at = {k: get(results, "m", "task0", f"split=dedup;mode=equal;features={k}", "auc").value for k in (1, 4, 13)}
    assert at[13] == pytest.approx(get(results, "m", "task0", "split=dedup;mode=all", "auc").value)
    x, y, (train, test) = (acts["task0"] @ model.weight).numpy(), tasks[0].labels, tasks[0].splits["dedup"]
    signs = np.sign(x[train][y[train] == 1].mean(0) - x[train][y[train] == 0].mean(0))
    assert at[1] == pytest.approx(
        np.mean([roc_auc_score(y[test], s * c[test]) for s, c in zip(signs, x.T, strict=True)])
    )
    assert "split=dedup;mode=equal;features=99" not in {str(m.setting) for m in results.metrics}


def test_k_sparse_probes_are_those_of_the_split():
    tasks, acts, found = problem(n_tasks=1)
    model = random_map(9)
    model.weight[:, 0] *= 1e-3  # rankings with and without normalisation differ
    results = run([Entry("m", model)], tasks, found, ks=(2, "dense"), resamples=50)
    x, y, (train, test) = (acts["task0"] @ model.weight).numpy(), tasks[0].labels, tasks[0].splits["dedup"]
    for ranking, normalize, ks in (("", True, (2, "dense")), ("rank=difference;", False, (2,))):
        for probe in sparse.fit(x[train], y[train], x[test], y[test], ks, normalize=normalize):
            for metric in ("auc", "auc_validation", "accuracy", "f1"):
                value = get(results, "m", "task0", f"split=dedup;probe=sparse;{ranking}k={probe.k}", metric).value
                assert value == pytest.approx(getattr(probe, metric))
    interval = get(results, "m", "task0", "split=dedup;probe=sparse;k=2", "auc")
    assert 0 < interval.ci_low < interval.value < interval.ci_high < 1


def test_a_regression_on_more_features_than_fit_into_memory_is_left_out(monkeypatch):
    tasks, _, acts = problem(n_tasks=1)
    monkeypatch.setattr(features, "IN_MEMORY", 0)
    results = run([Entry("m", random_map(9))], tasks, acts, ks=(1, "dense"), resamples=50)
    settings = {str(m.setting) for m in results.metrics}
    assert "split=dedup;probe=sparse;k=1" in settings
    assert "split=dedup;probe=sparse;k=dense" not in settings
    assert "m on task0, split=dedup, k=dense: skipped, 9 features are too many" in "\n".join(results.failures)


def test_test_rows_do_not_touch_the_choice():
    tasks, rows_, acts = problem(n_tasks=1)
    entry = Entry("m", random_map(9))
    first = run([entry], tasks, acts, ks=(2,), resamples=50)
    test = tasks[0].splits["official"].test
    rows_["task0"][test] = torch.randn(len(test), D, generator=torch.Generator().manual_seed(9)) * 100
    second = run([entry], tasks, acts, ks=(2,), resamples=50)
    for a, b in zip(first.extras["probes"], second.extras["probes"], strict=True):
        assert (a["features"], a["signs"], a["auc_validation"]) == (b["features"], b["signs"], b["auc_validation"])
        assert a["auc"] != b["auc"]
    for metric in ("auc_validation", "auc_null", "n_candidates"):
        assert [m.value for m in first.metrics if m.metric == metric] == [
            m.value for m in second.metrics if m.metric == metric
        ]


class Interrupted(Map):
    """Stops a run after so many calls."""

    left = None

    def encode(self, x, **options):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left = self.left and self.left - 1
        return super().encode(x, **options)


def test_tasks_side_by_side_give_the_same_results_as_one_after_the_other(monkeypatch):
    """In threads, and two in processes. Also where one is wrong: its error is told, as it stands."""
    tasks, acts, found = problem(n_tasks=5)
    entries = [Entry("noisy", Map(torch.randn(D, 9), spread=0.5)), Entry("plain", Map(torch.eye(D)))]
    results, threads = {}, torch.get_num_threads()
    try:
        for n in (1, 3, 2):
            torch.set_num_threads(n)
            entries[0].model.seen.clear()
            results[n] = run(entries, tasks, found, ks=(1, 3), seeds=2)
            assert bool(entries[0].model.seen) == (n != 2)  # in another process
        acts["task1"][0, 0] = torch.nan
        for n in (3, 2):
            torch.set_num_threads(n)
            with pytest.raises(InputError, match="'task1': expected finite"):
                run(entries, tasks, found)
            assert torch.get_num_threads() == n
    finally:
        torch.set_num_threads(threads)
    for n in (2, 3):
        assert results[1].frame().equals(results[n].frame())
        assert results[1].extras == results[n].extras


class Ends(Map):
    """Ends the process that it is used in, or fails."""

    how = None

    def encode(self, x, **options):
        if self.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise InputError("no features today")


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")
@pytest.mark.parametrize(
    ("how", "told"), [("killed", "ended from outside.*with OMP_NUM_THREADS=1"), ("fails", "no features today")]
)
def test_what_ends_a_process_is_told(tmp_path, how, told):
    tasks, _, found = problem(n_tasks=5)
    model, threads = Ends(torch.eye(D)), torch.get_num_threads()
    model.how = how
    try:
        torch.set_num_threads(2)
        with pytest.raises(InputError, match=told):
            run([Entry("m", model)], tasks, found, **QUICK)
        # What is finished is kept, whoever made it.
        kept = run([Entry("m", Map(torch.eye(D)))], tasks, found, folder=tmp_path, **QUICK)
        torch.set_num_threads(1)
        model = Interrupted(torch.eye(D))
        model.left = 0
        again = run([Entry("m", model)], tasks, found, folder=tmp_path, **QUICK)
    finally:
        torch.set_num_threads(threads)
    assert again.frame().equals(kept.frame())


def test_processes_are_only_forked_where_that_is_safe(monkeypatch):
    assert side_by_side._may_fork("cpu") == (sys.platform == "linux")
    assert not side_by_side._may_fork("cuda")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert not side_by_side._may_fork("cpu")


def test_an_interrupted_run_goes_on_after_the_finished_tasks(tmp_path, monkeypatch):
    monkeypatch.setattr(side_by_side, "_IN_THREADS", 1)  # else it is chance which tasks are finished
    tasks, acts, found = problem(n_tasks=2)
    model = Interrupted(torch.eye(D), spread=0.5)

    def again_with(which=tasks, **changed):
        model.seen.clear()
        options = {"seeds": 2, "ks": (), "resamples": 50, "folder": tmp_path} | changed
        results = run([Entry("m", model)], which, found, **options)
        return results, len(model.seen)

    whole, _ = again_with(folder=None)
    model.left = 3
    with pytest.raises(KeyboardInterrupt):
        again_with()
    model.left = None
    again, calls = again_with()
    assert calls == 2  # of two tasks with two noise seeds the first was finished
    assert again.frame().equals(whole.frame())
    assert again.extras == whole.extras
    assert again_with(resamples=70, which=tasks[1:])[1] == 0
    assert again_with(max_features=3)[1] == 4
    acts["task1"][0, 0] += 1  # other activations
    assert again_with()[1] == 2
    model.weight[0, 0] += 1  # other weights
    assert again_with()[1] == 4
    for file in tmp_path.rglob("task1-*.json"):
        file.write_text(file.read_text()[:99])
    assert again_with()[1] == 2


def test_a_record_is_of_one_task_name_and_one_part_in_the_comparison(tmp_path):
    tasks, acts, found = problem(n_tasks=1)
    model = Map(torch.eye(D))
    for name in ("a b", "a_b"):  # the same file name, but for the hash in it
        again = [replace(tasks[0], name=name)]
        here = TaskActivations.of({name: acts["task0"]}, found.source)
        for main in (False, True):
            entries = [Entry("m", model, main=main), Entry("other", random_map(3))]
            results = run(entries, again, here, ks=(2,), resamples=50, folder=tmp_path)
            sparse_probes = [m for m in results.metrics if m.model == "m" and m.setting.get("probe") == "sparse"]
            assert bool(sparse_probes) == main
            assert {m.task for m in results.metrics} == {name, "all"}


def test_features_in_files_leave_nothing_behind(tmp_path, monkeypatch):
    tasks, _, acts = problem(n_tasks=1)
    monkeypatch.setattr(features, "IN_MEMORY", 0)

    def look(*args, **options):
        assert not list(tmp_path.iterdir())  # as a run that is killed now would leave it
        return score_features(*args, **options)

    score_features = rank.score_features
    monkeypatch.setattr(rank, "score_features", look)
    run([Entry("m", random_map(9, spread=1.0))], tasks, acts, folder=tmp_path, **QUICK)
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".json"]


def test_activations_may_lack_a_hook_point_and_be_of_any_number_format():
    tasks, acts, found = problem(n_tasks=1)
    entry = Entry("m", Map(torch.eye(D), store={"hook": HOOK}))
    rounded = {name: x.bfloat16() for name, x in acts.items()}
    results, expected = (
        run([entry], tasks, given, **QUICK)
        for given in (
            TaskActivations.of({name: x.requires_grad_() for name, x in rounded.items()}, {}),
            TaskActivations.of({name: x.detach().float() for name, x in rounded.items()}, found.source),
        )
    )
    same(numbers(results, "m"), numbers(expected, "m"))
    assert results.config["entries"]["m"]["hook"] is None
    with pytest.raises(InputError, match="of an unknown hook point, got"):
        run([replace(entry, hook=HOOK)], tasks, TaskActivations.of(acts, {}), **QUICK)


def test_models_are_read_at_their_own_hook_points():
    tasks, acts, one = problem(n_tasks=2, strength=1.5)
    other = {name: torch.randn(len(x), 5, generator=torch.Generator().manual_seed(7)) for name, x in acts.items()}
    hooks = [HOOK, "blocks.3.hook_resid_post"]
    both = TaskActivations(
        {**one.source, "hooks": hooks},
        lambda task, hook: one.rows(task) if hook == HOOK else TaskRows(other[task], np.arange(len(other[task]))),
    )
    entries = [
        Entry("default", Map(torch.eye(D))),
        Entry("own", Map(torch.eye(5), store={"hook": hooks[1]})),
        Entry("told", Map(torch.eye(5)), hook=hooks[1]),
    ]
    results = run(entries, tasks, both, **QUICK)
    assert [results.config["entries"][e.label]["hook"] for e in entries] == [HOOK, hooks[1], hooks[1]]
    alone = run([Entry("x", Map(torch.eye(5)))], tasks, TaskActivations.of(other, {"hook": hooks[1]}), **QUICK)
    same(
        numbers(alone, "x", "mode=all"),
        {k: v for k, v in numbers(results, "told", "mode=all").items() if ":" not in k[2]},
    )
    assert get(results, "default", "all", ALL, "auc").value > 0.9
    assert get(results, "own", "all", ALL, "auc").value < 0.75
    assert get(results, DENSE, "all", "split=official", "auc").value > 0.9
    with pytest.raises(InputError, match="collect them there too"):
        run([Entry("e", Map(torch.eye(5)), hook="blocks.0.hook_resid_pre")], tasks, both)


def tokens(acts, source, times):
    """Every row so many times, as of texts with so many tokens."""
    return TaskActivations(
        {**source, "pooling": "all"},
        lambda task, hook: TaskRows(acts[task].repeat_interleave(times, 0), np.arange(len(acts[task])).repeat(times)),
    )


def test_rows_of_a_text_stay_together_and_count_once():
    tasks, acts, found = problem(n_tasks=2)
    many = tokens(acts, found.source, 3)
    at = splits.read(tasks[0], many, None)
    for name, split in at.splits.items():
        assert set(at.text[split.train]) == set(tasks[0].splits[name].train)
        assert set(at.text[split.test]) == set(tasks[0].splits[name].test)
        assert len(split.train) == 393
        for train, validation in split.folds:
            texts = at.text[split.train]
            assert len(train) + len(validation) == 393
            assert not set(texts[train]) & set(texts[validation])
    entry = Entry("one", Map(torch.eye(D)[:, :1]))
    once, thrice = (run([entry], tasks, a, **QUICK) for a in (found, many))
    for task in ("task0", "task1"):
        a, b = (get(r, "one", task, ALL, "auc") for r in (once, thrice))
        # The same information, so the same interval, as wide as if every text had one row.
        assert (b.value, b.ci_low, b.ci_high, b.n) == pytest.approx((a.value, a.ci_low, a.ci_high, a.n))
        a, b = (get(r, "one", task, ALL, "auc_validation") for r in (once, thrice))
        assert b.n == a.n == 131
        a, b = (get(r, "one", task, ALL, "auc_null") for r in (once, thrice))
        assert b.value == pytest.approx(a.value, abs=2e-3)
    most = run([entry], tasks, many, **QUICK).extras["best"][0]["texts"]
    assert len({t["text"] for t in most}) == 5


def test_what_cannot_be_measured_is_said():
    tasks, acts, found = problem(n_tasks=2)
    tiny = build("tiny", ["a", "b", "c", "d", "e", "f"], [0, 1] * 3, range(4), range(4, 6))
    blank = build("blank", [*tasks[0].texts, " "], [*tasks[0].labels, 1], range(131), range(131, 173))
    several = {**acts, "tiny": torch.randn(6, D), "blank": acts["task0"]}
    broken = Map(torch.full((D, 2), float("nan")))
    entries = [Entry("eye", Map(torch.eye(D))), Entry("none", NoFeatures()), Entry("broken", broken)]
    results = run(entries, [*tasks, tiny, blank], TaskActivations.of(several, found.source), **QUICK)
    text = "\n".join(results.failures)
    assert "none: gives no features" in text
    assert "tiny, split=official: skipped" in text
    assert "broken on task1: skipped, features are not finite" in text
    assert "blank: left out, as they have no token: 1 of 173 texts" in text
    assert not [m for m in results.metrics if m.model in ("none", "broken") or m.task == "tiny"]
    same_but_blank = [get(results, "eye", task, ALL, "auc").value for task in ("task0", "blank")]
    assert same_but_blank[0] == same_but_blank[1]


def test_bad_input_is_refused_in_one_line():
    tasks, acts, found = problem(n_tasks=1)
    eye = Entry("eye", Map(torch.eye(D)))
    with pytest.raises(InputError, match="labels must be unique"):
        run([eye, eye], tasks, found)
    with pytest.raises(InputError, match="at least one model"):
        run([], tasks, found)
    with pytest.raises(InputError, match="sizes must be at least 1"):
        run([eye], tasks, found, sizes=(4, 0))
    with pytest.raises(InputError, match="got 0"):
        run([eye], tasks, found, ks=(0,))
    with pytest.raises(InputError, match="width 5"):
        run([Entry("narrow", Map(torch.eye(5)))], tasks, found)
    with pytest.raises(InputError, match="collect them"):
        run([eye], tasks, TaskActivations.of({}, {"hook": HOOK}))
    with pytest.raises(InputError, match="collect them for this very task"):
        run([eye], tasks, TaskActivations.of({"task0": acts["task0"][:-1]}, {"hook": HOOK}))
    with pytest.raises(InputError, match="expected finite activations"):
        run([eye], tasks, TaskActivations.of({"task0": acts["task0"].log()}, {"hook": HOOK}))
    elsewhere = Entry("e", Map(torch.eye(D), store={"hook": "blocks.2.hook_resid_post"}))
    with pytest.raises(InputError, match="allow_mismatch"):
        run([elsewhere], tasks, found)
    accepted = run([elsewhere], tasks, found, allow_mismatch=True, **QUICK)
    assert "accepted by allow_mismatch" in accepted.failures[0]
    centred = Entry("f", Map(torch.eye(D), store={"model": {"weight_processing": "centred"}}))
    with pytest.raises(InputError, match=r"centred weights \(here raw\)"):
        run([centred], tasks, found)
