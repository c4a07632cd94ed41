"""Bootstrap intervals against scipy, against theory, and against the coverage they promise."""

import math

import numpy as np
import pytest
from scipy import stats

from glp_lens.evals.statistics import bootstrap_mean, bootstrap_ratio

CLUSTERS, SIZE, RUNS = 40, 7, 500


def clustered(rng):
    """Values with mean 0 that share a large effect within each cluster, and their clusters."""
    labels = np.repeat(np.arange(CLUSTERS), SIZE)
    return rng.normal(size=CLUSTERS)[labels] + 0.5 * rng.normal(size=len(labels)), labels


def coverage(by_cluster, runs, seed=1):
    """How often the interval of the mean holds the true mean, 0."""
    rng = np.random.default_rng(seed)
    hits = 0
    for run in range(runs):
        values, labels = clustered(rng)
        found = bootstrap_mean(values, labels if by_cluster else None, resamples=600, seed=1000 + run)
        hits += found.ci_low <= 0 <= found.ci_high
    return hits / runs


def test_intervals_cover_the_mean_of_clustered_values_as_often_as_they_say():
    assert 0.91 <= coverage(True, RUNS) <= 0.97  # 95%, less what 40 clusters cost


def test_intervals_that_ignore_the_clusters_are_too_narrow():
    assert coverage(False, 100) < 0.7


def test_the_width_is_that_of_theory():
    values, labels = clustered(np.random.default_rng(1))
    found = bootstrap_mean(values, labels, resamples=4000)
    means = values.reshape(CLUSTERS, SIZE).mean(1)
    assert found.ci_high - found.ci_low == pytest.approx(2 * 1.96 * means.std() / math.sqrt(CLUSTERS), rel=0.06)
    assert found.value == pytest.approx(values.mean())
    assert found.n == CLUSTERS


def test_without_clusters_it_is_the_percentile_bootstrap_of_scipy():
    values = np.random.default_rng(2).exponential(size=83)
    for level in (0.5, 0.95):
        want = stats.bootstrap(
            (values,), np.mean, method="percentile", confidence_level=level, n_resamples=9000, rng=0
        ).confidence_interval
        found = bootstrap_mean(values, resamples=9000, level=level)
        assert (found.ci_low, found.ci_high) == pytest.approx(tuple(want), rel=0.02)
        assert found.n == 83


def test_clusters_of_unequal_size_weigh_by_their_rows():
    values, labels = [1.0, 1.0, 1.0, 5.0], ["a", "a", "a", "b"]
    found = bootstrap_mean(values, labels)
    assert found.value == 2.0
    assert found.n == 2
    assert (found.ci_low, found.ci_high) == (1.0, 5.0)


def test_values_that_are_not_numbers_are_left_out():
    found = bootstrap_mean([1.0, math.nan, 3.0, math.inf], ["a", "b", "c", "d"])
    assert (found.value, found.n) == (2.0, 2)


def test_too_little_gives_no_interval():
    assert bootstrap_mean([])[3] == 0
    assert math.isnan(bootstrap_mean([]).value)
    one = bootstrap_mean([2.0, 4.0], ["a", "a"])
    assert (one.value, one.n) == (3.0, 1)
    assert math.isnan(one.ci_low)
    assert math.isnan(one.ci_high)


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(3).normal(size=31)
    assert bootstrap_mean(values, seed=4) == bootstrap_mean(values, seed=4)
    assert bootstrap_mean(values, seed=4) != bootstrap_mean(values, seed=5)


def test_a_ratio_over_ones_is_the_mean():
    values, labels = clustered(np.random.default_rng(4))
    assert bootstrap_ratio(values, np.ones_like(values), labels) == pytest.approx(bootstrap_mean(values, labels))


def test_intervals_of_ratios_cover_as_often_as_they_say():
    rng = np.random.default_rng(5)
    hits = 0
    for run in range(RUNS):
        size = rng.gamma(4.0, size=CLUSTERS)  # clusters that differ in size, as documents do
        labels = np.repeat(np.arange(CLUSTERS), SIZE)
        bottom = size[labels] * rng.uniform(0.5, 1.5, len(labels))
        top = 0.3 * bottom + (0.2 * rng.normal(size=CLUSTERS))[labels]
        found = bootstrap_ratio(top, bottom, labels, resamples=400, seed=run)
        hits += found.ci_low <= 0.3 <= found.ci_high
    assert 0.90 <= hits / RUNS <= 0.98


def test_ratios_that_cannot_be_formed():
    assert math.isnan(bootstrap_ratio([1.0], [0.0], ["a"]).value)
    assert bootstrap_ratio([], [], []).n == 0
    one = bootstrap_ratio([1.0, 2.0], [2.0, 4.0], ["a", "a"])
    assert (one.value, one.n) == (0.5, 1)
    assert math.isnan(one.ci_low)
    some = bootstrap_ratio([0.0, 1.0], [0.0, 2.0], ["a", "b"])  # a resample of "a" alone has no ratio
    assert (some.ci_low, some.ci_high) == (0.5, 0.5)
