"""Bootstrap intervals against scipy, against theory, and against the coverage they promise."""

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from glp_lens.evals.statistics import (
    GroupResampling,
    bootstrap_mean,
    bootstrap_ratio,
    holm,
    intervals,
    p_values,
    resampling,
    smallest_visible,
    standard_error,
)

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


GROUPS, UNITS, DRAWS = 6, 15, 300


def two_stages(rng, between, within=1.0):
    """Draws of the mean over groups of units, whose true value is 0."""
    values = between * rng.normal(size=(GROUPS, 1)) + within * rng.normal(size=(GROUPS, UNITS))
    own = [resampling(UNITS, resamples=DRAWS, seed=int(rng.integers(2**31))) @ row for row in values]
    return GroupResampling(GROUPS, resamples=DRAWS, seed=int(rng.integers(2**31))).mean(np.array(own)), values


@pytest.mark.parametrize(
    ("between", "low", "high"),
    [
        (1.0, 0.925, 0.98),  # groups differ as they do in steering, where a concept helps or hurts: as promised
        (0.0, 0.97, 1.0),  # groups are alike: on the wide side, as documented
    ],
)
def test_two_stage_intervals_cover_the_mean_at_least_as_often_as_they_say(between, low, high):
    rng = np.random.default_rng(6)
    hits = wins = 0
    for _ in range(RUNS):
        draws, _ = two_stages(rng, between)
        _, a, b = intervals(draws, GROUPS)
        hits += a <= 0 <= b
        wins += p_values(draws, GROUPS) <= 0.05
    assert low <= hits / RUNS <= high
    assert wins / RUNS <= 0.075


def test_the_plain_percentile_interval_would_be_too_narrow_with_few_groups():
    rng = np.random.default_rng(7)
    hits = 0
    for _ in range(RUNS):
        draws, _ = two_stages(rng, 1.0)
        a, b = np.quantile(draws[1:], [0.025, 0.975])
        hits += a <= 0 <= b
    assert hits / RUNS < 0.925


def test_the_spread_of_two_stages_is_that_of_theory():
    draws, values = two_stages(np.random.default_rng(8), 1.0)
    between = values.mean(1).var() / GROUPS  # of the means that are resampled
    within = values.var(1).mean() / UNITS / GROUPS
    want = math.sqrt((between + within) * GROUPS / (GROUPS - 1))
    assert standard_error(draws, GROUPS) == pytest.approx(want, rel=0.12)
    assert draws[0] == pytest.approx(values.mean())


def test_a_group_drawn_twice_has_two_resamples_of_its_units():
    draws = np.zeros((2, 1 + 5000, 3))
    draws[0, 1:] = np.random.default_rng(9).normal(size=(5000, 1))
    found = GroupResampling(2, resamples=5000).mean(draws)
    # Half of the variance of one normal number: from both slots, one, or none; were both slots alike, it were 3/4.
    assert found[1:, 1].var() == pytest.approx(2 * 0.5 / 4, rel=0.06)
    assert (found[:, 0] == found[:, 2]).all()  # statistics stay paired


def test_of_one_sample_interval_and_p_are_those_of_the_t_test():
    values = np.random.default_rng(10).normal(0.4, 1, 9)
    draws = resampling(9, resamples=40_000) @ values
    want = stats.ttest_1samp(values, 0)
    assert p_values(draws, 9) == pytest.approx(want.pvalue, rel=0.05)
    ends = want.confidence_interval()
    assert intervals(draws, 9) == pytest.approx([values.mean(), ends.low, ends.high], abs=0.06)
    assert p_values(np.zeros(11), 9) == 1
    assert np.isnan(p_values(draws, 1))
    assert np.isnan(intervals(draws, 1)[1:]).all()


@pytest.mark.parametrize(("n", "comparisons"), [(8, 1), (96, 1), (96, 12)])
def test_the_smallest_visible_difference_is_found_with_the_power_it_says(n, comparisons):
    draws = resampling(n, resamples=20_000) @ np.random.default_rng(11).normal(size=n)
    gap = smallest_visible(draws, n, comparisons=comparisons)
    effect = gap / standard_error(draws, n) / math.sqrt(n)
    assert TTestPower().power(effect, n, 0.05 / comparisons) == pytest.approx(0.8, abs=0.02)


def test_many_units_need_2_8_standard_errors():
    draws = resampling(5000, resamples=50) @ np.random.default_rng(12).normal(size=5000)
    assert smallest_visible(draws, 5000) / standard_error(draws, 5000) == pytest.approx(1.96 + 0.84, abs=0.01)


def test_holm_steps_down_and_stays_monotone():
    found = holm([0.04, 0.01, np.nan, 0.03, 0.9])
    np.testing.assert_allclose(found, [0.09, 0.04, np.nan, 0.09, 0.9])
    assert len(holm([])) == 0


def test_holm_is_that_of_statsmodels():
    p = np.random.default_rng(13).uniform(0, 0.2, 23)
    np.testing.assert_allclose(holm(p), multipletests(p, method="holm")[1])


def test_intervals_do_not_depend_on_which_draws_are_kept(monkeypatch):
    values, clusters = np.random.default_rng(0).normal(size=23), np.arange(23) // 2
    asked = [(50, 0), (50, 1), (70, 0), (50, 0)]

    def intervals_of():
        means = [bootstrap_mean(values, clusters, resamples=n, seed=seed) for n, seed in asked]
        return means + [bootstrap_ratio(values, 2 + values, clusters, resamples=n, seed=s) for n, s in asked]

    kept = intervals_of()
    assert kept[0] == kept[3]
    assert len({(mean.ci_low, mean.ci_high) for mean in kept[:3]}) == 3
    monkeypatch.setattr("glp_lens.evals.statistics._MOST_KEPT", 0)
    assert intervals_of() == kept
