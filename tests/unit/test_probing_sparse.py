"""k-sparse probes: the ranking, the search for C, what the probe scores, on data small enough to work out by hand."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.metrics import f1_score, roc_auc_score

from glp_lens.errors import InputError
from glp_lens.evals.probing import sparse


def data(n, seed=0, features=11):
    """Sparse positive features: column 3 strongly and column 8 weakly says the label, the others nothing."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n) % 2)
    x = rng.exponential(1, (n, features)) * (rng.random((n, features)) < 0.3)
    x[:, 3] += 1.5 * y * rng.random(n)
    x[:, 8] += 0.8 * y * rng.random(n)
    return x.astype(np.float32), y


def test_ranks_by_the_difference_of_class_means_over_the_mean_activation():
    x, y = data(203)
    x *= np.logspace(-3, 3, 11, dtype=np.float32)
    x[:, 5] = 0
    wide = x.astype(np.float64)
    difference = np.abs(wide[y == 1].mean(0) - wide[y == 0].mean(0))
    size = np.array([np.abs(c[c != 0]).mean() if c.any() else 1 for c in wide.T])
    assert sparse.rank_features(x, y).tolist() == np.argsort(-difference / size).tolist()
    assert sparse.rank_features(x, y, normalize=False).tolist() == np.argsort(-difference).tolist()
    assert sparse.rank_features(-x, y).tolist() == sparse.rank_features(x, y).tolist()


def test_equal_differences_keep_the_order_of_columns_in_any_number_of_them():
    y = np.arange(41) % 2
    x = np.zeros((41, 20_003), dtype=np.float32)
    x[1, 1::2] = 3
    x[0, 700] = 9
    order = sparse.rank_features(x, y, normalize=False)
    assert order.tolist() == [700, *range(1, 20_003, 2), *(i for i in range(0, 20_003, 2) if i != 700)]


def test_blocks_of_features_rank_as_one(monkeypatch):
    x, y = data(57, features=407)
    whole = sparse.rank_features(x, y)
    monkeypatch.setattr(sparse, "_BLOCK", 64)
    assert sparse.rank_features(x, y).tolist() == whole.tolist()


def optimum(x, y, c):
    """The regression by another optimiser, in float64."""
    x, sign = np.c_[x.astype(np.float64), np.ones(len(x))], 2 * y - 1

    def loss(w):
        return 0.5 * w[:-1] @ w[:-1] + c * np.logaddexp(0, -sign * (x @ w)).sum()

    def slope(w):
        return np.r_[w[:-1], 0] - c * x.T @ (sign * expit(-sign * (x @ w)))

    return minimize(loss, np.zeros(x.shape[1]), jac=slope, method="BFGS", options={"gtol": 1e-9}).x


@pytest.mark.parametrize(("n", "k"), [(301, 1), (301, 4), (301, "dense"), (90, 4)])
def test_the_probe_is_the_regression_on_the_top_features_with_the_best_c(n, k):
    (x, y), (x_test, y_test) = data(n), data(153, seed=1)
    (probe,) = sparse.fit(x, y, x_test, y_test, [k])
    order = sparse.rank_features(x, y)
    assert probe.features.tolist() == order[: 11 if k == "dense" else k].tolist()
    assert probe.n_features == (11 if k == "dense" else k)
    assert probe.c in sparse.PENALTIES
    w = optimum(x[:, probe.features], y, probe.c)
    expected = expit(x_test[:, probe.features] @ w[:-1] + w[-1])
    np.testing.assert_allclose(probe.scores, expected, atol=2e-3)
    decisions = probe.scores > 0.5
    assert probe.auc == pytest.approx(roc_auc_score(y_test, probe.scores), abs=1e-12)
    assert probe.accuracy == pytest.approx((decisions == y_test).mean())
    assert probe.f1 == pytest.approx(f1_score(y_test, decisions, average="weighted"))


@pytest.mark.parametrize(("n", "held_out"), [(1024, 100), (301, 60)])
def test_c_is_chosen_on_the_last_train_rows(n, held_out):
    (x, y), (x_test, y_test) = data(n), data(97, seed=1)
    (probe,) = sparse.fit(x, y, x_test, y_test, [3])
    part = x[:, probe.features]
    found = []
    for c in sparse.PENALTIES:
        w = optimum(part[:-held_out], y[:-held_out], c)
        found.append(roc_auc_score(y[-held_out:], part[-held_out:] @ w[:-1]))
    assert probe.auc_validation == pytest.approx(max(found), abs=2e-3)
    assert max(found) - found[sparse.PENALTIES.index(probe.c)] < 2e-3


def test_all_of_more_features_than_rows_are_the_regression_on_all():
    (x, y), (x_test, y_test) = data(139, features=307), data(71, seed=1, features=307)
    (probe,) = sparse.fit(x, y, x_test, y_test, ["dense"])
    w = optimum(x, y, probe.c)
    np.testing.assert_allclose(probe.scores, expit(x_test @ w[:-1] + w[-1]), atol=5e-3)
    assert probe.n_features == 307


def test_test_labels_have_no_say_in_the_probe():
    (x, y), (x_test, y_test) = data(301), data(153, seed=1)
    one = sparse.fit(x, y, x_test, y_test, [2])[0]
    flipped = sparse.fit(x, y, x_test, 1 - y_test, [2])[0]
    assert (flipped.scores == one.scores).all()
    assert flipped.auc_validation == one.auc_validation
    assert flipped.auc == pytest.approx(1 - one.auc)


def test_sizes_without_enough_features_are_left_out():
    (x, y), (x_test, y_test) = data(131), data(40, seed=1)
    found = sparse.fit(x, y, x_test, y_test)
    assert [(p.k, p.n_features) for p in found] == [(1, 1), (2, 2), (5, 5), ("dense", 11)]
    assert found[0].features.tolist() == [3]


def test_three_rows_are_fitted_without_a_choice():
    x, y = np.array([[0.0], [1], [2]], dtype=np.float32), np.array([0, 1, 1])
    (probe,) = sparse.fit(x, y, x, y, [1])
    assert np.isnan(probe.c)
    assert probe.auc == probe.auc_validation == 1


def test_refuses_what_cannot_be():
    x, y = data(301)
    for k in (0, -1, "all", 2.5):
        with pytest.raises(InputError, match="number of features"):
            sparse.fit(x, y, x, y, [k])
    order = np.argsort(y, kind="stable")
    with pytest.raises(InputError, match="random order"):
        sparse.fit(x[order], y[order], x, y)
