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
    np.testing.assert_allclose(probe.probability, expected, atol=1e-6)
    np.testing.assert_allclose(probe.scores, x_test[:, probe.features] @ w[:-1], atol=1e-5)
    decisions = expected > 0.5
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
    assert probe.auc_validation == pytest.approx(max(found), abs=1e-9)
    assert probe.c == sparse.PENALTIES[int(np.argmax(np.round(found, 9)))]


def test_all_of_more_features_than_rows_are_the_regression_on_all():
    (x, y), (x_test, y_test) = data(139, features=307), data(71, seed=1, features=307)
    (probe,) = sparse.fit(x, y, x_test, y_test, ["dense"])
    w = optimum(x, y, probe.c)
    np.testing.assert_allclose(probe.probability, expit(x_test @ w[:-1] + w[-1]), atol=1e-5)
    assert probe.n_features == 307


@pytest.mark.parametrize("n", [90, 301])
def test_the_solver_of_sae_probes_gives_the_same_where_it_reaches_the_optimum(n):
    (x, y), (x_test, y_test) = data(n), data(153, seed=1)
    ks = (1, 3, "dense")
    ours, theirs = (sparse.fit(x, y, x_test, y_test, ks, solver=solver) for solver in ("newton", "lbfgs"))
    for a, b in zip(ours, theirs, strict=True):
        assert (a.k, a.features.tolist()) == (b.k, b.features.tolist())
        assert a.auc_validation == pytest.approx(b.auc_validation, abs=0.01)
        if a.c == b.c:
            np.testing.assert_allclose(a.probability, b.probability, atol=0.02)
            assert (b.scores == b.probability).all()


def test_a_probe_of_one_feature_ranks_as_that_feature_does():
    """Also where it is so small that the intercept would round all of it away."""
    (x, y), (x_test, y_test) = data(301), data(153, seed=1)
    for part in (x, x_test):
        part[:, 3] = 1e-20 * (part[:, 3] - 0.1)
    x[np.flatnonzero(y)[:2], 3] = 900
    (probe,) = sparse.fit(x[:, 3:4], y, x_test[:, 3:4], y_test, [1])
    assert probe.auc == pytest.approx(roc_auc_score(y_test, x_test[:, 3]), abs=1e-12)
    assert probe.auc_validation == pytest.approx(roc_auc_score(y[-60:], x[-60:, 3]), abs=1e-12)
    assert probe.c == sparse.PENALTIES[0]  # all rank alike: the weakest penalty


def test_equal_rows_tie():
    x, y = data(301)
    x_test = np.repeat(x[:1], 67, axis=0)
    for probe in sparse.fit(x, y, x_test, np.arange(67) % 2, [5, "dense"]):
        assert len(np.unique(probe.scores)) == 1
        assert probe.auc == 0.5


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


@pytest.mark.parametrize("solver", ["newton", "lbfgs"])
def test_three_rows_are_fitted_without_a_choice(solver):
    x, y = np.array([[0.0], [1], [2]], dtype=np.float32), np.array([0, 1, 1])
    (probe,) = sparse.fit(x, y, x, y, [1], solver=solver)
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
    with pytest.raises(InputError, match="both classes, got 40 of one"):
        sparse.fit(x[:40], np.ones(40, dtype=int), x, y)
