"""One-feature probes of a task, against fitting a logistic regression to every feature, and their peak memory; and
k-sparse and dense probes, against scikit-learn's regression; and several tasks side by side."""

import tracemalloc
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from by_row import random_prior
from conftest import OURS, Sized, Timed
from joblib import Parallel, delayed
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from glp_lens import numerics
from glp_lens.evals.entries import Entry
from glp_lens.evals.probing import ProbingData, TaskActivations, build, dense, rank, side_by_side, sparse, suite
from glp_lens.evals.probing.settings import Solver
from glp_lens.evals.results import Results
from glp_lens.models.glp import GLP

TRAIN, TEST, FEATURES, FOLDS = 1024, 1024, 512, 5
CS = np.logspace(-5, 0, 6)
D_IN, BLOCKS = 576, 6
FEW = 2048
"""Features of the smaller of two files, between which peak memory is compared."""


def labels(n: int) -> np.ndarray:
    return np.random.default_rng(1).permutation(np.arange(n) % 2)


def folds_of(y: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    return list(StratifiedKFold(FOLDS).split(np.zeros(len(y)), y))


@pytest.fixture(scope="module")
def task() -> tuple[np.ndarray, np.ndarray]:
    """Features of which some carry the label, some are sparse and some have heavy tails; and the labels."""
    rng = np.random.default_rng(0)
    y = labels(TRAIN)
    x = rng.standard_normal((TRAIN, FEATURES)) + y[:, None] * rng.normal(0, 0.3, FEATURES)
    x[:, 1::4] = np.maximum(x[:, 1::4] - 0.8, 0)
    x[:, 2::4] = np.sinh(2 * x[:, 2::4])
    return x.astype(np.float32), y


Best = tuple[int, float]
"""The best feature and its mean validation AUC."""


def by_rank(x: np.ndarray, y: np.ndarray) -> Best:
    probe = rank.choose(rank.score_features(x, y, np.arange(len(y)), [], folds_of(y)))
    return probe.feature, probe.auc_validation


def by_rankdata(x: np.ndarray, y: np.ndarray) -> Best:
    """The same statistics in the usual words."""
    aucs = []
    for fit, held_out in folds_of(y):
        rows, positive = x[fit].astype(np.float64), y[held_out] == 1
        sign = np.sign(rows[y[fit] == 1].mean(0) - rows[y[fit] == 0].mean(0))
        n1, n0 = positive.sum(), (~positive).sum()
        u = rankdata(x[held_out], axis=0)[positive].sum(0) - n1 * (n1 + 1) / 2
        aucs.append(0.5 + sign * (u / (n1 * n0) - 0.5))
    return best_of(np.mean(aucs, 0))


def validation_auc(column: np.ndarray, y: np.ndarray) -> float:
    """The paper's probe of one feature."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn announces new defaults in each fit
        scaled = StandardScaler().fit_transform(column[:, None].astype(np.float64))
        probe = LogisticRegressionCV(Cs=CS, cv=StratifiedKFold(FOLDS), scoring="roc_auc").fit(scaled, y)
    return float(probe.scores_[1].mean(0).max())


def one_by_one(x: np.ndarray, y: np.ndarray) -> Best:
    return best_of(validation_auc(column, y) for column in x.T)


def in_parallel(x: np.ndarray, y: np.ndarray) -> Best:
    return best_of(Parallel(n_jobs=-1)(delayed(validation_auc)(column, y) for column in x.T))


def best_of(aucs: Iterable[float]) -> Best:
    values = np.fromiter(aucs, np.float64)
    best = int(np.argmax(values))
    return best, float(values[best])


WAYS = {
    OURS: by_rank,
    "LogisticRegressionCV, joblib": in_parallel,
    "LogisticRegressionCV, sequential": one_by_one,
    "scipy's rankdata": by_rankdata,
}


@pytest.mark.parametrize("way", WAYS)
def test_one_task(way: str, task: tuple[np.ndarray, np.ndarray], timed: Timed) -> None:
    rounds = 1 if "CV" in way else 10
    if WAYS[way] is in_parallel:
        in_parallel(task[0][:, :8], task[1])  # starts the workers
    work = f"1-D probes, {TRAIN} rows, {FEATURES} features"
    best = timed(work, way, WAYS[way], *task, amount=FEATURES, unit="features", rounds=rounds)
    feature, auc = by_rank(*task)
    assert best == (feature, pytest.approx(auc, abs=1e-12))


@pytest.fixture(scope="module")
def glp() -> tuple[GLP, torch.Tensor, torch.Tensor]:
    """A prior of the paper's widths, rows for it `(n, 576)`, and noise."""
    prior, generator = random_prior(D_IN, BLOCKS), torch.Generator().manual_seed(0)
    x = prior.mean + torch.randn(TRAIN + TEST, D_IN, generator=generator)
    return prior, x, torch.randn(x.shape, generator=generator)


@pytest.fixture(scope="module")
def encoded(glp: tuple[GLP, torch.Tensor, torch.Tensor]) -> np.ndarray:
    prior, x, eps = glp
    features: np.ndarray = prior.encode(x, noise=eps).numpy()
    return features


def score(features: rank.Columns) -> rank.Scores:
    y = labels(TRAIN + TEST)
    return rank.score_features(features, y, np.arange(TRAIN), np.arange(TRAIN, len(y)), folds_of(y[:TRAIN]))


@pytest.mark.parametrize("way", [OURS, "encoding alone", "scoring alone"])
def test_every_feature_of_a_glp(
    way: str, glp: tuple[GLP, torch.Tensor, torch.Tensor], encoded: np.ndarray, timed: Timed
) -> None:
    prior, x, eps = glp
    does = {
        OURS: lambda: score(prior.encode(x, noise=eps).numpy()),
        "encoding alone": lambda: prior.encode(x, noise=eps).numpy(),
        "scoring alone": lambda: score(encoded),
    }[way]
    work = f"every feature of a GLP of {BLOCKS} blocks, d = {D_IN}, {TRAIN} + {TEST} rows"
    result = timed(work, way, does, amount=prior.n_features, unit="features", rounds=2)
    if way == "encoding alone":
        np.testing.assert_array_equal(result, encoded)
    else:
        np.testing.assert_array_equal(result.test, score(encoded).test)


def test_peak_memory(tmp_path: Path, sized: Sized) -> None:
    rng = np.random.default_rng(0)
    for factor, way in ((8, OURS), (1, f"{FEW} features")):
        with h5py.File(tmp_path / f"{factor}.h5", "w") as file:
            features = file.create_dataset("x", (TRAIN + TEST, factor * FEW), np.float32)
            for start in range(0, factor * FEW, FEW):
                features[:, start : start + FEW] = rng.standard_normal((TRAIN + TEST, FEW), dtype=np.float32)
            tracemalloc.start()
            scores = score(features)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert len(scores) == factor * FEW
        sized(f"peak memory of scoring {8 * FEW} features from a file", way, peak / 2**20, "MiB")


KS = (1, 2, 5, 16, 64, 128)
TASKS = 8


@pytest.fixture(scope="module", params=[1, 30])
def scaled(request: pytest.FixtureRequest, task: tuple[np.ndarray, np.ndarray]) -> tuple[int, np.ndarray]:
    """The features of the task, more of them telling the label, each times a power of a number: 1 is equal scales."""
    x, y = task
    rng = np.random.default_rng(2)
    told = x + y[:, None] * rng.normal(0, 0.15, FEATURES).astype(np.float32)
    return request.param, told * np.float32(request.param) ** rng.uniform(-1, 1, FEATURES).astype(np.float32)


@pytest.mark.parametrize("way", [OURS, "scikit-learn's lbfgs, as sae-probes"])
def test_sparse_probes(
    way: str, scaled: tuple[int, np.ndarray], task: tuple[np.ndarray, np.ndarray], timed: Timed
) -> None:
    (spread, x), y, cut = scaled, task[1], 768
    solver: Solver = "newton" if way == OURS else "lbfgs"
    work = f"k-sparse probes, {cut} + {TRAIN - cut} rows, scales {spread} to the powers -1 to 1, all k and C"

    def fit() -> list[sparse.SparseProbe]:
        return sparse.fit(x[:cut], y[:cut], x[cut:], y[cut:], KS, solver=solver)

    found = timed(work, way, fit, amount=len(KS), unit="probes", rounds=5 if way == OURS else 1)
    if way != OURS:
        return
    for probe in found:
        # On moved rows, which have the same weights, and with another algorithm than lbfgs.
        rows = x[:, probe.features].astype(np.float64)
        rows -= rows[:cut].mean(0)
        theirs = LogisticRegression(C=probe.c, solver="newton-cholesky", tol=1e-10, max_iter=1000)
        expected = theirs.fit(rows[:cut], y[:cut]).decision_function(rows[cut:])
        assert probe.auc == pytest.approx(roc_auc_score(y[cut:], expected), abs=1e-3)


@pytest.mark.parametrize("way", [OURS, "GridSearchCV of a pipeline"])
def test_dense_probe(way: str, task: tuple[np.ndarray, np.ndarray], timed: Timed) -> None:
    x, y = (values[:768] for values in task)
    folds = folds_of(y)

    def searched() -> dense.DenseProbe:
        search = GridSearchCV(
            make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
            {"logisticregression__C": dense.PENALTIES},
            scoring="roc_auc",
            cv=folds,
        ).fit(x.astype(np.float64), y)
        best = float(search.best_params_["logisticregression__C"])
        return dense.DenseProbe(search.decision_function(task[0][768:].astype(np.float64)), search.best_score_, best)

    fit = partial(dense.fit, x, y, task[0][768:], folds) if way == OURS else searched
    found = timed(f"dense probe, 768 rows of {FEATURES} features", way, fit, amount=1, unit="probes")
    probe = LogisticRegression(C=found.c, solver="newton-cholesky", tol=1e-10)
    optimum = make_pipeline(StandardScaler(), probe).fit(x.astype(np.float64), y)
    expected = optimum.decision_function(task[0][768:].astype(np.float64))
    np.testing.assert_allclose(found.scores, expected, atol=1e-4 if way == OURS else 0.1)  # lbfgs stops short of it


@pytest.mark.parametrize("way", [OURS, "in threads", "one after the other"])
def test_tasks(way: str, timed: Timed, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a task but reading its texts: with one core all ways are the same."""
    prior, generator, n = random_prior(D_IN, 3), torch.Generator().manual_seed(0), TRAIN + 256
    tasks = [
        build(f"task {t}", [f"{t} {i}" for i in range(n)], labels(n), range(TRAIN), range(TRAIN, n))
        for t in range(TASKS)
    ]
    rows = {task.name: prior.mean + torch.randn(n, D_IN, generator=generator) for task in tasks}
    data = ProbingData(tasks, TaskActivations.of(rows, {}))
    if way != OURS:
        monkeypatch.setattr(side_by_side, "_MANY", TASKS)
    if way == "one after the other":
        monkeypatch.setattr(side_by_side, "_IN_THREADS", 1)
        monkeypatch.setattr(numerics, "blas_threads", lambda _: nullcontext())  # as it was before
    entries = [Entry("glp", prior, {"sigma": 0.1})]

    def score_all() -> Results:
        return suite.run(entries, data)

    results = timed(
        f"probing, {TRAIN} + 256 texts, GLP of 3 blocks", way, score_all, amount=TASKS, unit="tasks", rounds=1
    )
    assert {metric.task for metric in results.metrics} == {"all", *(task.name for task in tasks)}
