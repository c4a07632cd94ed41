"""Intervals against simulation, tests against scipy, Holm against a worked example, selection against brute force."""

from itertools import combinations

import numpy as np
import pytest
from scipy.stats import norm, permutation_test, rankdata
from sklearn.model_selection import StratifiedKFold

from glp_lens.evals.probing.inference import equal_count, null_best, sign_flip_p, win_rate
from glp_lens.intervals import auc_interval


def brute_auc(scores, y):
    gaps = scores[y == 1][:, None] - scores[y == 0][None, :]
    return np.mean((gaps > 0) + 0.5 * (gaps == 0))


def test_auc_interval_has_delongs_variance():
    rng = np.random.default_rng(0)
    y = np.array([0] * 23 + [1] * 31)
    scores = np.round(rng.standard_normal(54) + y, 1)
    wins = scores[y == 1][:, None] - scores[y == 0][None, :]
    wins = (wins > 0) + 0.5 * (wins == 0)
    variance = wins.mean(1).var(ddof=1) / 31 + wins.mean(0).var(ddof=1) / 23
    found = auc_interval(scores, y)
    assert found.value == pytest.approx(brute_auc(scores, y))
    half = (np.log(found.ci_high / (1 - found.ci_high)) - np.log(found.ci_low / (1 - found.ci_low))) / 2
    assert half == pytest.approx(1.959964 * np.sqrt(variance) / (found.value * (1 - found.value)), rel=1e-5)
    assert found.n == 54


def test_auc_interval_covers_the_true_auc():
    rng = np.random.default_rng(1)
    y = np.array([0] * 40 + [1] * 60)
    truth = norm.cdf(1.2 / np.sqrt(2))
    found = [auc_interval(rng.standard_normal(100) + 1.2 * y, y) for _ in range(600)]
    assert 0.925 < np.mean([i.ci_low < truth < i.ci_high for i in found]) < 0.975


def test_several_score_vectors_give_their_mean_auc_with_a_narrower_interval():
    rng = np.random.default_rng(2)
    y = np.array([0] * 50 + [1] * 50)
    scores = rng.standard_normal((4, 100)) + y
    found = auc_interval(scores, y)
    assert found.value == pytest.approx(np.mean([brute_auc(row, y) for row in scores]))
    widths = [i.ci_high - i.ci_low for i in (auc_interval(row, y) for row in scores)]
    assert found.ci_high - found.ci_low < min(widths)
    same = auc_interval(np.tile(scores[0], (3, 1)), y)
    assert same == pytest.approx(auc_interval(scores[0], y))


@pytest.mark.parametrize("sign", [1, -1])
def test_a_perfect_auc_still_has_a_width(sign):
    y = np.array([0] * 20 + [1] * 30)
    found = auc_interval(sign * y, y)
    # Wilson at 20 of 20: z^2 / (n + z^2) is left out.
    gap = 3.841459 / (20 + 3.841459)
    expected = (1, 1 - gap, 1) if sign == 1 else (0, 0, gap)
    assert (found.value, found.ci_low, found.ci_high) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("scores", [[1, 2, 3, 5, 4, 6], [1, 2, 3, 4, 5, 6]])
def test_one_cluster_of_a_class_tells_nothing_of_the_variance(scores):
    found = auc_interval(scores, [0, 0, 0, 1, 0, 1], [1, 2, 3, 4, 5, 4])
    assert (found.ci_low, found.ci_high, found.n) == (0, 1, 5)


def test_sign_flip_p_equals_scipy_exactly():
    x = np.array([0.03, 0.05, -0.01, 0.04, 0.02, 0.06, -0.02])
    expected = permutation_test((x,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
    assert sign_flip_p(x) == pytest.approx(expected)


def test_sign_flip_flips_whole_clusters_and_skips_nan():
    x, clusters = [0.1, 0.2, 0.3, 0.4, np.nan, -0.05], ["a", "a", "b", "b", "b", "c"]
    sums = np.array([0.3, 0.7, -0.05])
    expected = permutation_test((sums,), np.sum, permutation_type="samples", n_resamples=np.inf).pvalue
    assert sign_flip_p(x, clusters) == pytest.approx(expected)
    assert sign_flip_p([0.1, 0.2], ["a", "a"]) == 1.0
    assert np.isnan(sign_flip_p([np.nan]))


def test_sampled_sign_flips_agree_with_the_exact_ones_and_repeat():
    x = np.random.default_rng(3).normal(0.5, 1, 14)
    exact, sampled = sign_flip_p(x), sign_flip_p(x, draws=8000, seed=1)
    assert sampled == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 8000) + 1 / 8000)
    assert sampled == sign_flip_p(x, draws=8000, seed=1)


def cross_validated(x, y):
    """Mean validation AUC and whole-sample class-mean difference of columns, written out once more."""
    total = 0
    for train, held in StratifiedKFold(5).split(x, y):
        a, b = x[train], y[train] == 1
        sign = np.sign(a[b].mean(0) - a[~b].mean(0))
        ranks, n1 = rankdata(x[held], axis=0), (y[held] == 1).sum()
        value = (ranks[y[held] == 1].sum(0) - n1 * (n1 + 1) / 2) / (n1 * (len(held) - n1))
        total += 0.5 + sign * (value - 0.5)
    return total / 5, x[y == 1].mean(0) - x[y == 0].mean(0)


@pytest.fixture(scope="module")
def noise():
    """Labels, and of each of 80 draws of 1000 features that know nothing, the validation AUCs and differences."""
    rng = np.random.default_rng(5)
    y = rng.permutation(np.repeat([0, 1], [70, 112]))
    found = [cross_validated(rng.standard_normal((len(y), 1000)), y) for _ in range(80)]
    counts = np.array([np.bincount(y[held]) for _, held in StratifiedKFold(5).split(y, y)])
    return counts, *(np.array(part) for part in zip(*found, strict=True))


@pytest.mark.parametrize("k", [10, 40, 250, 1000])
def test_null_best_is_what_cross_validated_selection_finds_in_noise(noise, k):
    counts, validation, _ = noise
    best = validation.reshape(-1, k).max(1)
    error = 3 * best.std() / np.sqrt(len(best))
    # Beside the sampling error, that of the normal approximation at these counts: 1% of what is above one half.
    assert null_best(k, *counts.T) == pytest.approx(best.mean(), abs=error + 0.0015)


def test_folds_with_signs_taken_as_independent_would_promise_too_little(noise):
    """The reason for half-normal values, and not normal ones."""
    counts, validation, _ = noise
    n0, n1 = counts.T.astype(float)
    spread = np.sqrt(((n0 + n1 + 1) / (12 * n0 * n1)).sum()) / 5
    best = validation.reshape(-1, 250).max(1).mean() - 0.5
    t = np.linspace(-12, 12, 9601)
    normal = spread * (np.trapezoid(1 - norm.cdf(t) ** 250, t) - 12)
    half_normal = null_best(250, *counts.T) - 0.5
    assert abs(half_normal - best) < 0.5 * (best - normal)


def test_a_filter_by_the_mean_difference_does_not_lower_the_best_of_noise(noise):
    _, validation, difference = noise
    kept = np.argsort(-np.abs(difference), axis=1)[:, :100]
    filtered = np.take_along_axis(validation, kept, 1).max(1).mean()
    assert filtered == pytest.approx(validation.max(1).mean(), abs=5e-4)


def test_null_best_has_the_known_means_of_half_normal_maxima():
    """One fold of n rows a class: variance (2n + 1) / (12 n^2); E max of 1 and 2 half-normals in closed form."""
    spread = np.sqrt(61 / (12 * 900))
    assert null_best(1, [30], [30]) == pytest.approx(0.5 + spread * np.sqrt(2 / np.pi), rel=1e-6)
    assert null_best(2, [30], [30]) == pytest.approx(0.5 + spread * 2 / np.sqrt(np.pi), rel=1e-6)
    assert null_best(10**6, [30], [30]) < 0.5 + spread * np.sqrt(2 * np.log(2e6))


def brute_equal_count(validation, test, m):
    """The mean over every subset; ties to the first."""
    subsets = [list(s) for s in combinations(range(len(test)), m)]
    return np.mean([test[s[int(np.argmax(validation[s]))]] for s in subsets])


@pytest.mark.parametrize("n", [1, 2, 7, 10])
def test_equal_count_is_the_mean_over_all_subsets(n):
    rng = np.random.default_rng(n)
    validation, test = np.round(rng.random(n), 1), rng.random(n)  # rounded: with ties
    sizes = range(1, n + 1)
    expected = [brute_equal_count(validation, test, m) for m in sizes]
    np.testing.assert_allclose(equal_count(validation, test, sizes), expected)


def test_equal_count_ends_at_the_mean_and_the_chosen_one():
    validation, test = np.array([0.6, 0.8, 0.7]), np.array([0.5, 0.9, 0.4])
    found = equal_count(validation, test, [1, 3, 4])
    np.testing.assert_allclose(found, [0.6, 0.9, np.nan])


def test_equal_count_breaks_ties_by_the_larger_difference_then_the_lower_column():
    validation, test = np.full(4, 0.7), np.array([0.1, 0.2, 0.3, 0.4])
    assert equal_count(validation, test, [4]) == [0.1]
    assert equal_count(validation, test, [4], difference=[0.5, -2.0, 2.0, 1.0]) == [0.2]


def test_equal_count_agrees_with_drawn_subsets_of_many_features():
    rng = np.random.default_rng(8)
    validation, test = rng.random(3011), rng.random(3011)
    for m in (3, 200):
        drawn = [rng.choice(3011, m, replace=False) for _ in range(3000)]
        values = test[[s[np.argmax(validation[s])] for s in drawn]]
        assert equal_count(validation, test, [m])[0] == pytest.approx(
            values.mean(), abs=4 * values.std() / np.sqrt(3000)
        )


@pytest.mark.parametrize("mixed", [False, True])
def test_auc_interval_of_clusters_is_as_wide_as_auc_varies_over_draws_of_clusters(mixed):
    rng = np.random.default_rng(5)

    def draw():
        clusters = np.repeat(np.arange(60), rng.integers(1, 8, 60))
        y = rng.integers(0, 2, len(clusters)) if mixed else np.arange(60)[clusters] % 2
        return rng.standard_normal(60)[clusters] + 0.5 * rng.standard_normal(len(y)) + y, y, clusters

    values = [brute_auc(*draw()[:2]) for _ in range(400)]
    found = [auc_interval(*draw()) for _ in range(60)]
    widths = [np.log(i.ci_high / (1 - i.ci_high)) - np.log(i.ci_low / (1 - i.ci_low)) for i in found]
    assert np.mean(widths) / 3.92 == pytest.approx(np.std(np.log(values) - np.log1p(-np.array(values))), rel=0.12)
    assert {i.n for i in found} == {60}
    scores, y, clusters = draw()
    assert np.diff(auc_interval(scores, y)[1:3]) != pytest.approx(
        np.diff(auc_interval(scores, y, clusters)[1:3]), rel=0.1
    )


def test_win_rate_counts_ties_half_and_resamples_families():
    a, b = [0.9, 0.8, 0.7, 0.6, np.nan], [0.5, 0.8, 0.6, 0.7, 0.1]
    found = win_rate(a, b, ["x", "x", "y", "z", "z"])
    assert found.value == pytest.approx(2.5 / 4)
    assert found.n == 3
    assert 0 <= found.ci_low <= found.value <= found.ci_high <= 1
    together = win_rate(np.tile(a, 4), np.tile(b, 4), np.tile(["x", "x", "y", "z", "z"], 4), seed=1)
    assert together.value == found.value
    assert together.n == 3


def test_win_rate_interval_is_the_binomial_one_for_independent_tasks():
    a = np.r_[np.ones(60), np.zeros(40)]
    found = win_rate(a, np.full(100, 0.5), resamples=20_000)
    half = 1.96 * np.sqrt(0.6 * 0.4 / 100)
    assert (found.ci_low, found.value, found.ci_high) == pytest.approx((0.6 - half, 0.6, 0.6 + half), abs=0.011)
