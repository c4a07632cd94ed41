"""Matching reconstructions at equal distortion, and the ratio bootstrap behind FVU."""

import numpy as np
import pytest

from glp_lens.evals.fidelity.matching import match, matched_difference, power_law
from glp_lens.evals.statistics import bootstrap_mean, bootstrap_ratio


def test_match_interpolates_between_the_neighbouring_settings():
    point = match({"s=.5": 0.4, "s=.1": 0.1, "s=.3": 0.2, "s=0": 0.0}, 0.2 * 2**0.25)
    assert (point.low, point.high) == ("s=.3", "s=.5")
    assert point.weight == pytest.approx(0.25)


@pytest.mark.parametrize(("target", "weight", "low"), [(0.1, 0.0, "a"), (0.4, 1.0, "b"), (0.2, 1.0, "a")])
def test_match_at_a_setting_is_that_setting(target, weight, low):
    point = match({"a": 0.1, "b": 0.2, "c": 0.4}, target)
    assert point.weight == pytest.approx(weight)
    assert point.low == low


def test_no_match_outside_the_range_or_with_one_setting():
    assert match({"a": 0.1, "b": 0.2}, 0.3) is None
    assert match({"a": 0.1, "b": 0.2}, 0.05) is None
    assert match({"a": 0.1}, 0.1) is None


def test_matched_difference_reads_a_power_law_off_exactly():
    fvu = {"a": 0.02, "b": 0.5}
    point = match(fvu, 0.26)
    law = {name: 3 * value**1.7 for name, value in fvu.items()}
    truth = 3 * 0.26**1.7
    assert power_law(law["a"], law["b"], point.weight) == pytest.approx(truth)
    rng = np.random.default_rng(0)
    scale, clusters = rng.uniform(0.5, 1.5, 90), np.arange(90) // 3
    scale /= scale.mean()
    gap = matched_difference(law["a"] * scale, law["b"] * scale, 0.1 * scale, clusters, point.weight)
    assert gap.value == pytest.approx(truth - 0.1)
    assert gap.ci_low < truth - 0.1 < gap.ci_high
    assert gap.n == 30


def test_matched_difference_at_one_end_is_the_plain_paired_difference():
    rng = np.random.default_rng(1)
    low, high, other = rng.normal(1, 0.5, (3, 80))
    clusters = np.arange(80) // 4
    found = matched_difference(low, high, other, clusters, 1.0)
    np.testing.assert_allclose(found, bootstrap_mean(high - other, clusters), atol=1e-12)


def test_power_law_falls_back_on_a_line_where_an_end_is_not_positive():
    np.testing.assert_allclose(power_law([-0.2, 0.5], [1.0, 2.0], 0.5), [0.4, 1.0])


def test_bootstrap_ratio_covers_the_truth_and_resamples_clusters():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        size = rng.integers(1, 30, 40)
        clusters = np.repeat(np.arange(40), size)
        share = np.repeat(rng.uniform(0.1, 0.5, 40), size)  # independent of the size: the true ratio is .3
        below, ci_low, ci_high, n = bootstrap_ratio(share, np.ones(len(share)), clusters, seed=trial, resamples=500)
        assert n == 40
        assert ci_low < below < ci_high
        hits += ci_low < 0.3 < ci_high
    assert 0.85 < hits / 200 <= 1


def test_bootstrap_ratio_without_spread_or_data_says_nan():
    assert np.isnan(bootstrap_ratio([1.0], [0.0], [0]).value)
    assert np.isnan(bootstrap_ratio([], [], []).value)
    one = bootstrap_ratio([1.0, 2.0], [2.0, 4.0], [5, 5])
    assert one.value == 0.5
    assert np.isnan(one.ci_low)
