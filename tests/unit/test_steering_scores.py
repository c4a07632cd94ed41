import numpy as np
import pytest
from scipy.stats import hmean

from glp_lens.evals.steering.scores import (
    concept_at_fluency,
    halves,
    harmonic_mean,
    pareto_area,
)


def test_harmonic_mean_is_scipys_and_0_at_0():
    a, b = np.random.default_rng(0).uniform(0.01, 2, (2, 5, 3))
    assert harmonic_mean(a, b) == pytest.approx(hmean([a, b]))
    assert harmonic_mean([0, 0, 2], [0, 2, 0]).tolist() == [0, 0, 0]


def test_halves_share_no_prompt_and_leave_none_out():
    first, second = halves(11, seed=3)
    assert sorted([*first, *second]) == list(range(11))
    assert len(first) == 5


def test_concept_at_fluency_interpolates():
    concept, fluency = [0.2, 0.6, 1.4], [2.0, 1.8, 1.0]
    assert concept_at_fluency(concept, fluency, 1.8) == pytest.approx(0.6)
    assert concept_at_fluency(concept, fluency, 1.4) == pytest.approx(1.0)
    assert concept_at_fluency(concept, fluency, 0.5) == pytest.approx(1.4)
    assert np.isnan(concept_at_fluency(concept, fluency, 2.1))


def test_less_strength_gains_nothing_at_equal_fluency():
    rng = np.random.default_rng(0)
    slopes = rng.uniform(0.8, 1.2, (9, 1))
    strengths = np.array([0, 0.5, 1, 1.5, 2])
    concept, fluency = slopes * strengths, np.repeat(2 - 0.8 * strengths[None], 9, 0)
    weaker = np.array([0, 0.25, 0.5, 0.75, 1])
    level = 0.7 * 2
    plain = concept_at_fluency(concept, fluency, level)
    tamed = concept_at_fluency(slopes * weaker, np.repeat(2 - 0.8 * weaker[None], 9, 0), level)
    better = concept_at_fluency(concept + 0.3 * (strengths > 0), fluency, level)
    assert tamed == pytest.approx(plain)
    assert better == pytest.approx(plain + 0.3)


def test_concept_at_fluency_of_many_sweeps_is_that_of_each():
    rng = np.random.default_rng(1)
    concept, fluency, level = rng.uniform(0, 2, (3, 7, 5)), rng.uniform(0, 2, (3, 7, 5)), rng.uniform(0.5, 2, (3, 7))
    found = concept_at_fluency(concept, fluency, level)
    t = np.linspace(0, 4, 40_001)  # along each broken line
    for i, j in np.ndindex(3, 7):
        c, f = (np.interp(t, range(5), values[i, j]) for values in (concept, fluency))
        want = c[f >= level[i, j]].max(initial=-1)
        assert found[i, j] == pytest.approx(want, abs=1e-3) if want >= 0 else np.isnan(found[i, j])


def test_the_area_under_the_pareto_front_is_the_share_of_the_square_that_is_reached():
    rng = np.random.default_rng(2)
    concept, fluency = rng.uniform(0, 2, (2, 3, 6))
    found = pareto_area(concept, fluency)
    c, f = np.meshgrid(*[np.linspace(0, 2, 801)[:-1] + 1 / 800] * 2, indexing="ij")
    for i in range(3):
        reached = ((concept[i, :, None, None] >= c) & (fluency[i, :, None, None] >= f)).any(0)
        assert found[i] == pytest.approx(reached.mean(), abs=0.003)
    assert pareto_area([2.0, 0.5], [2.0, 1.0]) == 1
    assert pareto_area([0.0, 1.0], [2.0, 1.0]) == 0.25
