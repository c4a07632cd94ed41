"""One-feature probes against scikit-learn's logistic regression, AUCs against a brute-force count."""

import warnings

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegressionCV
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from glp_lens.evals.probing import dense, rank


def data(seed=0, n=83, width=4):
    """Labels and features of every sort: 4 columns each of dense, sparse, tied, separable, constant."""
    rng = np.random.default_rng(seed)
    y = (rng.random(n) < 0.45).astype(int)
    shift = 0.7 * y[:, None] * np.array([1, -1, 0.3, 0.0])[:width]
    dense_features = rng.standard_t(3, (n, width)) + shift
    relu = np.maximum(rng.standard_normal((n, width)) - 1 + shift, 0)
    tied = np.round(rng.standard_normal((n, width)) + shift) * 0.1
    separable = (2 * y[:, None] - 1) * (0.5 + rng.random((n, width)))
    constant = np.full((n, width), 0.1)
    return np.concatenate([dense_features, relu, tied, separable, constant], 1), y


def sklearn_folds(column, y, folds=5):
    """Validation AUC of each fold, `(folds,)`, at a middling C."""
    model = LogisticRegressionCV(
        Cs=[0.1], cv=StratifiedKFold(folds), scoring="roc_auc", tol=1e-9, max_iter=10_000,
        use_legacy_attributes=True,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_pipeline(StandardScaler(), model).fit(column[:, None], y)
    return model.scores_[1].ravel()


@pytest.mark.parametrize("seed", [0, 1])
def test_folds_and_choice_equal_logistic_regression(seed):
    x, y = data(seed)
    expected = np.stack([sklearn_folds(x[:, i], y) for i in range(x.shape[1])], 1)
    found = rank.validation_auc(x, y)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    unsure = np.r_[0:12, 16:20]  # without the separable features, which all reach 1
    assert rank.choose(x[:, unsure], y).feature == np.argmax(expected[:, unsure].mean(0))
    assert rank.choose(x, y).auc_validation == 1.0


def test_a_feature_constant_in_the_training_folds_gives_one_half():
    y = np.array([0, 1] * 15)
    x = np.full((30, 1), 0.1, dtype=np.float32)
    x[1] = 5.0  # alone in the first validation fold
    np.testing.assert_allclose(rank.validation_auc(x, y)[0], sklearn_folds(x[:, 0], y)[0])
    assert rank.validation_auc(x, y)[0, 0] == 0.5


def test_auc_counts_ties_as_one_half():
    x, y = data(3, n=31)
    for column, found in zip(x.T, rank.auc(x, y), strict=True):
        gaps = column[y == 1][:, None] - column[y == 0][None, :]
        assert found == pytest.approx(np.mean((gaps > 0) + 0.5 * (gaps == 0)), abs=1e-12)
        assert found == pytest.approx(roc_auc_score(y, column), abs=1e-12)


def test_blocks_do_not_change_the_numbers(monkeypatch):
    x, y = data(4)
    whole = rank.validation_auc(x, y), rank.mean_difference(x, y)
    monkeypatch.setattr(rank, "_BLOCK", 3 * len(x))
    np.testing.assert_array_equal(rank.validation_auc(x, y), whole[0])
    np.testing.assert_array_equal(rank.mean_difference(x, y), whole[1])


def test_constant_columns_have_no_mean_difference_at_all():
    x = np.full((97, 3), [0.1, 1 / 3, 1e7 + 0.3])
    y = (np.arange(97) < 31).astype(int)
    assert (x[y == 1].mean(0) != x[y == 0].mean(0)).any()  # rounding, which would give them a sign
    np.testing.assert_array_equal(rank.mean_difference(x, y), 0.0)


def test_mean_difference_survives_a_large_offset():
    rng = np.random.default_rng(0)
    small = rng.integers(-8, 9, (101, 3)).astype(np.float64)
    y = np.arange(101) % 2
    expected = small[y == 1].mean(0) - small[y == 0].mean(0)
    np.testing.assert_allclose(rank.mean_difference((small + 2**23 - 16).astype(np.float32), y), expected)


def test_keep_takes_the_largest_mean_differences_only():
    x, y = data(5)
    x = x[:, :12]
    x[:, 0] = y - 0.5  # perfect, but small: others have a larger raw difference
    x[:, 0] *= 1e-3
    assert rank.choose(x, y).feature == 0
    probe = rank.choose(x, y, keep=3)
    order = np.argsort(-np.abs(x[y == 1].mean(0) - x[y == 0].mean(0)))[:3]
    assert probe.feature in order
    assert probe.candidates == 3
    assert probe == rank.choose(x, y, keep=3, validation=rank.validation_auc(x, y))


def test_sign_comes_from_train_not_from_test():
    y = np.array([0] * 10 + [1] * 10)
    x = np.where(y == 1, -1.0, 1.0)[:, None] + np.arange(20)[:, None] * 1e-3
    probe = rank.choose(x, y)
    assert probe.sign == -1
    reversed_test = -x
    assert rank.auc(probe.score(reversed_test)[:, None], y)[0] == 0.0


def test_dense_probe_finds_a_direction_no_single_feature_has():
    rng = np.random.default_rng(0)
    y = np.arange(240) % 2
    x = rng.standard_normal((240, 7))
    x += 0.8 * (2 * y[:, None] - 1) / np.sqrt(7) * np.array([1, -1, 1, -1, 1, -1, 1])
    found = dense.fit(x[:160], y[:160], x[160:])
    assert found.scores.shape == (80,)
    assert roc_auc_score(y[160:], found.scores) > rank.auc(x[160:], y[160:]).max()
    assert found.c in dense.PENALTIES
    assert 0.7 < found.auc_validation < 1
