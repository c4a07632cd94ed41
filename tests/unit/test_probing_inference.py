"""Intervals against simulation, tests against scipy, Holm against a worked example."""

import numpy as np
import pytest
from scipy.stats import norm, permutation_test

from glp_lens.evals.probing.inference import auc_interval, holm, sign_flip_p


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


def test_holm_steps_down_and_stays_monotone():
    found = holm([0.04, 0.01, np.nan, 0.03, 0.9])
    np.testing.assert_allclose(found, [0.09, 0.04, np.nan, 0.09, 0.9])
    assert len(holm([])) == 0
