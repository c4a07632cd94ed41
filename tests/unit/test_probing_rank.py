"""One-feature probes against scikit-learn's logistic regression, AUCs against a brute-force count."""

import tracemalloc
import warnings
from itertools import pairwise

import h5py
import numpy as np
import pytest
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from glp_lens.errors import InputError
from glp_lens.evals.probing import dense, rank

KINDS = ("dense", "heavy-tailed", "sparse", "tied", "separable", "constant", "near-constant")
CS = np.logspace(-5, 0, 6)
"""The paper's grid, on which the outcome must not depend."""


def data(kind, seed=0, n=83, width=4, dtype=np.float32):
    """Features `(n, width)` that carry the label to different degrees, and labels `(n,)` of unequal number."""
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    y = (rng.random(n) < 0.4).astype(int)
    shift = 0.7 * y[:, None] * np.array([1, -1, 0.3, 0.0])[:width]
    noise = rng.standard_normal((n, width)) + shift
    near = np.full((n, width), 0.1)
    near[rng.permuted(np.tile(np.arange(n) < 4, (width, 1)), axis=1).T] = 5.0  # constant but for four rows
    x = {
        "dense": noise,
        "heavy-tailed": rng.standard_t(1.5, (n, width)) + shift,
        "sparse": np.maximum(noise - 1, 0),
        "tied": np.round(noise) * 0.1,
        "separable": (2 * y[:, None] - 1) * (0.5 + rng.random((n, width))),
        "constant": np.full((n, width), 0.1),
        "near-constant": near,
    }[kind]
    return x.astype(dtype), y


def stratified(y, k=5):
    """Folds as `score_features` takes them: positions in the train rows, whose labels these are."""
    return list(StratifiedKFold(k).split(np.zeros(len(y)), y))


def score(x, y, test=(), k=5):
    """Scores with all rows but the test rows to train on."""
    train = np.setdiff1d(np.arange(len(y)), test)
    return rank.score_features(x, y, train, test, stratified(y[train], k))


def fitted(model, column, y):
    """A model fitted to one standardised feature as closely as float64 allows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn announces new defaults in each fit
        return make_pipeline(StandardScaler(), model).fit(column[:, None].astype(np.float64), y)


def sklearn_validation(column, y):
    """Mean validation AUC for each C, `(6,)`."""
    model = LogisticRegressionCV(
        Cs=CS, cv=StratifiedKFold(5), scoring="roc_auc", tol=1e-9, max_iter=10_000, use_legacy_attributes=True
    )
    return fitted(model, column, y)[-1].scores_[1].mean(0)


@pytest.mark.parametrize("kind", KINDS)
def test_validation_and_choice_equal_logistic_regression(kind):
    x, y = data(kind)
    expected = np.stack([sklearn_validation(column, y) for column in x.T], 1)
    scores = score(x, y)
    np.testing.assert_allclose(np.broadcast_to(scores.validation, expected.shape), expected, atol=1e-12)
    assert rank.choose(scores).auc_validation == pytest.approx(expected[0].max(), abs=1e-12)
    if kind in ("dense", "heavy-tailed", "sparse"):  # elsewhere several are equally good
        assert rank.choose(scores).feature == np.argmax(expected[0])


@pytest.mark.parametrize("kind", KINDS)
def test_test_auc_equals_logistic_regression_on_rows_it_has_not_seen(kind):
    x, y = data(kind, n=131)
    test = np.arange(83, 131)
    scores = score(x, y, test)
    for column, found in zip(x.T, scores.test, strict=True):
        probe = fitted(LogisticRegression(C=0.1, tol=1e-9), column[:83], y[:83])
        outputs = probe.decision_function(column[test, None].astype(np.float64))
        assert found == pytest.approx(roc_auc_score(y[test], outputs), abs=1e-12)
    np.testing.assert_allclose(scores.difference, x[:83][y[:83] == 1].mean(0) - x[:83][y[:83] == 0].mean(0), atol=1e-5)


def test_test_rows_have_no_part_in_the_choice():
    x, y = data("dense", n=131)
    test = np.arange(0, 131, 3)
    scores = score(x, y, test)
    x[test] = -100 * x[test]
    other = score(x, y, test)
    np.testing.assert_array_equal(other.difference, scores.difference)
    np.testing.assert_array_equal(other.validation, scores.validation)
    np.testing.assert_allclose(other.test, 1 - scores.test, atol=1e-15)  # never turned round to look better


def test_a_fold_takes_its_sign_from_the_other_folds():
    """The classes lie the other way round in the first fold, by so much that they do in all rows together."""
    y = np.arange(50) % 2
    x = np.where(y == 1, 1.0, -1.0)
    x[:10] *= -100
    folds = stratified(y)
    np.testing.assert_array_equal(folds[0][1], np.arange(10))
    scores = rank.score_features(x[:, None], y, np.arange(50), [], folds)
    assert scores.difference[0] < 0
    assert scores.validation == [0.0]  # the first fold is told by the others, and they by the first


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("outlier", [5.0, 1e30])
def test_a_feature_constant_in_the_training_folds_gives_one_half(dtype, outlier):
    y = np.array([0, 1] * 15)
    x = np.full((30, 1), 0.1, dtype=dtype)
    x[:2, 0] = -outlier, outlier  # both in the first validation fold
    first = stratified(y)[:1]
    assert rank.score_features(x, y, np.arange(30), [], first).validation == [0.5]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64])
@pytest.mark.parametrize("values", [3, 10_000])
def test_auc_counts_ties_as_one_half(values, dtype):
    rng = np.random.default_rng(values)
    y = (rng.random(61) < 0.2).astype(int)
    x = (rng.integers(-values, values, (61, 5)) / (1 if dtype is np.int64 else 7)).astype(dtype)
    x[:, 0] = 2
    found = rank.auc(x, y)
    for column, value in zip(x.T, found, strict=True):
        gaps = column[y == 1][:, None].astype(np.float64) - column[y == 0][None, :]
        assert value == pytest.approx(np.mean((gaps > 0) + 0.5 * (gaps == 0)), abs=1e-14)
        assert value == pytest.approx(roc_auc_score(y, column), abs=1e-14)
    n1 = y.sum()
    u = rankdata(x, axis=0)[y == 1].sum(0) - n1 * (n1 + 1) / 2
    np.testing.assert_allclose(found, u / (n1 * (61 - n1)), atol=1e-14)
    assert found[0] == 0.5


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_whole_range_of_numbers_keeps_its_order(dtype):
    limits = np.finfo(dtype)
    one = np.array(1, dtype)
    rising = np.array(
        [-limits.max, -1, np.nextafter(-one, one), -limits.tiny, -limits.smallest_subnormal, 0,
         limits.smallest_subnormal, limits.tiny, 1, np.nextafter(one, 2 * one), limits.max], dtype
    )  # fmt: skip
    for low, high in pairwise(rising):
        assert rank.auc(np.array([[low], [high]]), [0, 1]) == [1.0]
        assert rank.auc(np.array([[low], [high]]), [1, 0]) == [0.0]
    y = np.arange(len(rising)) % 2
    assert rank.auc(rising[:, None], y)[0] == roc_auc_score(y, np.arange(len(rising)))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_two_zeros_are_equal(dtype):
    x = np.array([[-0.0], [0.0], [-0.0], [0.0], [1.0]], dtype)
    assert rank.auc(x[:4], [1, 0, 0, 1]) == [0.5]
    assert rank.auc(x, [0, 1, 0, 1, 0]) == pytest.approx(2 / 6)


def test_integers_that_float64_would_merge_stay_apart():
    assert rank.auc(np.array([[2**60], [2**60 + 1]]), [0, 1]) == [1.0]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("k", [2, 5])
def test_folds_of_any_size_and_form(k, dtype):
    """Folds that leave rows out and differ in size: each by itself, against a count with another library."""
    x, y = data("sparse", seed=3, n=101, dtype=dtype)
    rng = np.random.default_rng(k)
    train = rng.permutation(101)[:90]
    folds = []
    for i in range(k):
        order = rng.permutation(90)
        folds.append((order[: 40 + i], order[60 - 3 * i : 85]))
    expected = []
    for fit, held_out in folds:
        rows, y_rows = x[train[fit]].astype(np.float64), y[train[fit]]
        sign = np.sign(rows[y_rows == 1].mean(0) - rows[y_rows == 0].mean(0))
        expected.append([roc_auc_score(y[train[held_out]], c) for c in (sign * x[train[held_out]]).T])
    np.testing.assert_allclose(rank.score_features(x, y, train, [], folds).validation, np.mean(expected, 0))


@pytest.mark.parametrize("block", [1, 3 * 131, 2**20])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_dataset_read_in_blocks_gives_what_an_array_gives(tmp_path, monkeypatch, block, dtype):
    parts = [data(kind, n=131, dtype=dtype)[0] for kind in KINDS]
    x, y = np.concatenate(parts, 1), data("dense", n=131)[1]
    test = np.arange(1, 131, 4)
    whole = score(x, y, test)
    monkeypatch.setattr(rank, "_BLOCK", block)
    with h5py.File(tmp_path / "features.h5", "w") as file:
        found = score(file.create_dataset("x", data=x, chunks=(50, 3)), y, test)
    alone = rank.Scores.concat([score(part, y, test) for part in parts])
    for name in ("difference", "validation", "test"):
        np.testing.assert_array_equal(getattr(alone, name), getattr(found, name))
        np.testing.assert_allclose(getattr(found, name), getattr(whole, name), atol=1e-15)


class Generated:
    """Features that exist only while they are read."""

    def __init__(self, n, width):
        self.shape = n, width

    def __getitem__(self, key):
        rows, columns = key
        assert rows == slice(None)
        start, stop, _ = columns.indices(self.shape[1])
        return np.random.default_rng(start).standard_normal((self.shape[0], stop - start), dtype=np.float32)


def test_memory_does_not_grow_with_the_number_of_features(monkeypatch):
    monkeypatch.setattr(rank, "_BLOCK", 2**16)
    y = np.arange(307) % 2

    def peak(width):
        tracemalloc.start()
        score(Generated(307, width), y, np.arange(0, 307, 5))
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    peak(500)  # what is made once
    assert peak(8000) < 1.5 * peak(1000)  # the features themselves: 10 MB more


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_features_are_left_as_they_are(order, dtype):
    x, y = data("tied", dtype=dtype)
    x = np.asarray(x, order=order)
    x[x == 0] = -0.0
    before = x.copy()
    scores = score(x, y)
    assert (np.signbit(x) == np.signbit(before)).all()
    np.testing.assert_array_equal(x, before)
    np.testing.assert_array_equal(scores.validation, score(before[:, ::-1], y).validation[::-1])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equal_means_have_no_difference_at_all(dtype):
    constant = np.full((97, 3), [0.1, 1 / 3, 1e7 + 0.3], dtype)
    y = (np.arange(97) < 31).astype(int)
    assert (constant[y == 1].mean(0) != constant[y == 0].mean(0)).any()  # rounding, which would give them a sign
    np.testing.assert_array_equal(rank.mean_difference(constant, y), 0.0)
    rng = np.random.default_rng(0)
    one = rng.integers(-9, 9, 31)
    integers = np.concatenate([one, rng.permutation(np.r_[one, one]), [0] * 4])[:93, None].astype(dtype)
    np.testing.assert_array_equal(rank.mean_difference(integers, y[:93]), 0.0)
    values = rng.standard_normal(40)
    balanced = np.concatenate([values, rng.permutation(values)])[:, None].astype(dtype)
    assert rank.mean_difference(balanced, np.arange(80) < 40) == [0.0]
    assert (score(balanced, np.arange(80) // 40)).difference == [0.0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_mean_difference_survives_a_large_offset(dtype):
    rng = np.random.default_rng(0)
    small = rng.integers(-8, 9, (101, 3)).astype(np.float64)
    y = np.arange(101) % 2
    expected = small[y == 1].mean(0) - small[y == 0].mean(0)
    np.testing.assert_allclose(rank.mean_difference((small + 2**23 - 16).astype(dtype), y), expected, rtol=1e-7)


def test_a_feature_and_its_negative_are_equally_good():
    x, y = data("sparse", n=131)
    there, back = score(x, y, np.arange(40)), score(-x, y, np.arange(40))
    np.testing.assert_array_equal(there.validation, back.validation)
    np.testing.assert_array_equal(there.test, back.test)
    np.testing.assert_array_equal(there.difference, -back.difference)


SCORES = rank.Scores(
    difference=np.array([0.1, -3.0, 2.0, 0.5, -0.5, 0.0]),
    validation=np.array([0.9, 0.6, 0.7, 0.8, 0.8, 0.5]),
    test=np.array([0.85, 0.6, 0.4, 0.7, 0.75, 0.5]),
)


def test_choose_takes_the_best_in_validation_whatever_the_test_rows_say():
    assert rank.choose(SCORES) == rank.Probe(0, 1, 0.9, 0.85, 6)
    assert rank.choose(SCORES, keep=512) == rank.choose(SCORES)


def test_keep_leaves_the_largest_mean_differences():
    assert rank.choose(SCORES, keep=2) == rank.Probe(2, 1, 0.7, 0.4, 2)
    assert rank.choose(SCORES, keep=1) == rank.Probe(1, -1, 0.6, 0.6, 1)
    assert rank.choose(SCORES, keep=3).feature == 3  # of 3 and 4, equally different, the first is kept


def test_equally_good_features_go_to_the_larger_difference_then_to_the_lower_column():
    assert rank.choose(SCORES, among=slice(1, 6)).feature == 3
    larger = rank.Scores(np.array([0.5, -0.6, 0.6]), np.full(3, 0.8), np.full(3, 0.7))
    assert rank.choose(larger).feature == 1
    assert rank.choose(larger, among=slice(0, 1)).feature == 0


def test_among_looks_at_some_columns_only():
    assert rank.choose(SCORES, among=slice(1, 3)) == rank.Probe(2, 1, 0.7, 0.4, 2)
    assert rank.choose(SCORES, keep=1, among=slice(3, None)) == rank.Probe(3, 1, 0.8, 0.7, 1)
    assert rank.choose(SCORES, among=slice(5, 6)) == rank.Probe(5, 0, 0.5, 0.5, 1)


def test_scores_of_several_sets_of_features():
    both = rank.Scores.concat([SCORES[:2], SCORES[2:]])
    assert len(both) == 6
    assert rank.choose(both, keep=3) == rank.choose(SCORES, keep=3)
    np.testing.assert_array_equal(both.test, SCORES.test)


def test_what_cannot_be_scored_is_said():
    x, y = data("dense")
    with pytest.raises(InputError, match="of both classes, got 16 of one"):
        rank.score_features(x, np.sort(y), np.arange(83), [], [(np.arange(16, 83), np.arange(16))])
    with pytest.raises(InputError, match="of both classes"):
        rank.auc(x, np.ones(83))
    with pytest.raises(InputError, match="got none of 6"):
        rank.choose(SCORES, among=slice(6, 9))
    assert np.isnan(score(x, y).test).all()
    for bad in (np.nan, np.inf):
        x[80, 2] = bad
        for call in (
            lambda: score(x, y),
            lambda: rank.auc(x, y),
            lambda: rank.mean_difference(x, y),
        ):
            with pytest.raises(InputError, match="expected finite features"):
                call()


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
