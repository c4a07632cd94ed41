"""The best one-feature probe of a task, against fitting a logistic regression to every feature."""

import warnings

import numpy as np
import pytest
from conftest import OURS
from sklearn.linear_model import LogisticRegressionCV
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler

from glp_lens.evals.probing import rank

ROWS, FEATURES, FOLDS = 1024, 64, 5
CS = np.logspace(-5, 0, 6)


@pytest.fixture(scope="module")
def task() -> tuple[np.ndarray, np.ndarray]:
    """Features of which some carry the label, some are sparse and some have heavy tails; and the labels."""
    rng = np.random.default_rng(0)
    y = rng.permutation(np.arange(ROWS) % 2)
    x = rng.standard_normal((ROWS, FEATURES)) + y[:, None] * rng.normal(0, 0.4, FEATURES)
    x[:, 1::4] = np.maximum(x[:, 1::4] - 0.8, 0)
    x[:, 2::4] = np.sinh(2 * x[:, 2::4])
    return x.astype(np.float32), y


def our_probe(x: np.ndarray, y: np.ndarray) -> tuple[int, float]:
    probe = rank.choose(x, y)
    return probe.feature, probe.auc_validation


def fit_each(x: np.ndarray, y: np.ndarray) -> tuple[int, float]:
    """The paper's probe of each feature, one after the other; the best by mean validation AUC."""
    means = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn announces new defaults in each fit
        for i in range(x.shape[1]):
            column = StandardScaler().fit_transform(x[:, i : i + 1].astype(np.float64))
            probe = LogisticRegressionCV(Cs=CS, cv=StratifiedKFold(FOLDS), scoring="roc_auc").fit(column, y)
            means.append(probe.scores_[1].mean(0).max())
    best = int(np.argmax(means))
    return best, float(means[best])


WAYS = {OURS: our_probe, "LogisticRegressionCV of each feature": fit_each}


@pytest.mark.parametrize("way", WAYS)
def test_probing(way, task, timed):
    rounds = 10 if way == OURS else 1
    found = timed("1-D probe, 1024 x 64", way, WAYS[way], *task, amount=FEATURES, unit="features", rounds=rounds)
    feature, auc = our_probe(*task)
    assert found == (feature, pytest.approx(auc, abs=1e-12))
