"""Matching reconstructions at equal distortion, and the ratio bootstrap behind FVU."""

import numpy as np
import pytest

from glp_lens.evals.fidelity.matching import match
from glp_lens.evals.statistics import bootstrap_ratio


def test_match_interpolates_between_the_neighbouring_settings():
    point = match({"s=.5": 0.4, "s=.1": 0.1, "s=.3": 0.2}, 0.25)
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


def test_bootstrap_ratio_covers_the_truth_and_resamples_clusters():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        size = rng.integers(1, 30, 40)
        clusters = np.repeat(np.arange(40), size)
        share = np.repeat(rng.uniform(0.1, 0.5, 40), size)  # independent of the size: the true ratio is .3
        below, ci_low, ci_high, n = bootstrap_ratio(
            share, np.ones(len(share)), clusters, seed=trial, resamples=500
        )
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
