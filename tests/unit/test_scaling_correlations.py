"""Rank correlations against scipy and statsmodels, and intervals against the coverage they promise."""

import math

import numpy as np
import pytest
import statsmodels.api as sm
from scipy.stats import rankdata, spearmanr

from glp_lens.scaling.correlations import rank_correlation


def drawn(rng, clusters=12, size=5, shared=0.7):
    """Two columns whose clusters share a part, and the clusters; the correlation is 0.6 between and within them."""
    labels = np.repeat(np.arange(clusters), size)
    root = np.linalg.cholesky([[1, 0.6], [0.6, 1]])
    own = rng.normal(size=(len(labels), 2)) @ root.T
    common = rng.normal(size=(clusters, 2)) @ root.T
    return *(math.sqrt(shared) * common[labels] + math.sqrt(1 - shared) * own).T, labels


def test_it_is_spearmans_also_with_ties():
    rng = np.random.default_rng(1)
    x, y, labels = drawn(rng)
    for a in (x, np.round(x)):
        found = rank_correlation(a, y, labels, resamples=20)
        assert found.value == pytest.approx(spearmanr(a, y).statistic)
        assert found.n == 12


def test_the_partial_one_is_that_of_what_a_line_leaves_of_ranks():
    rng = np.random.default_rng(2)
    x, y, labels = drawn(rng)
    given = np.round(x + y + rng.normal(size=len(x)), 1)
    design = sm.add_constant(rankdata(given))
    left = [sm.OLS(rankdata(v), design).fit().resid for v in (x, y)]
    found = rank_correlation(x, y, labels, given=given, resamples=20)
    assert found.value == pytest.approx(np.corrcoef(*left)[0, 1])
    assert abs(found.value - spearmanr(x, y).statistic) > 0.1  # so that this test can tell the two apart


def test_intervals_hold_the_truth_as_often_as_they_say_and_those_that_ignore_clusters_do_not():
    rng = np.random.default_rng(3)
    truth = 6 / math.pi * math.asin(0.6 / 2)  # of a normal pair (Pearson 1907)
    hits = {"trunks": 0, "cells": 0}
    runs = 70
    for run in range(runs):
        x, y, labels = drawn(rng)
        for name, clusters in (("trunks", labels), ("cells", np.arange(len(x)))):
            found = rank_correlation(x, y, clusters, resamples=100, seed=run)
            hits[name] += found.ci_low <= truth <= found.ci_high
    assert 0.86 <= hits["trunks"] / runs <= 1
    assert hits["cells"] / runs < 0.8


def test_a_monotone_relation_has_no_ends():
    found = rank_correlation([1, 2, 3, 5, 8, 9], [2, 4, 6, 7, 9, 11], list("aabbcc"))
    assert found.value == 1
    assert math.isnan(found.ci_low)
    assert math.isnan(found.ci_high)


def test_what_cannot_be_correlated():
    x, labels = [1.0, 3.0, 2.0, 5.0], list("abcd")
    assert math.isnan(rank_correlation(x, [2.0] * 4, labels).value)
    assert math.isnan(rank_correlation(x, [4, 1, 2, 3], labels, given=x).value)  # nothing of x is left
    assert math.isnan(rank_correlation(x, [4, 1, 2, 3], labels, given=[7.0] * 4).value)
    one = rank_correlation(x, [4, 1, 2, 3], ["a"] * 4)
    assert one.n == 1
    assert math.isnan(one.ci_low)


def test_the_same_seed_gives_the_same_interval():
    x, y, labels = drawn(np.random.default_rng(4))
    assert rank_correlation(x, y, labels, resamples=50, seed=1) == rank_correlation(x, y, labels, resamples=50, seed=1)
    assert rank_correlation(x, y, labels, resamples=50, seed=1) != rank_correlation(x, y, labels, resamples=50, seed=2)
