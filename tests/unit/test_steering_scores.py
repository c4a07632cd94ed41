import numpy as np
import pytest
from scipy.stats import hmean

from glp_lens.evals.steering.scores import (
    Frontier,
    chosen_elsewhere,
    concept_at_fluency,
    halves,
    harmonic_mean,
)


def test_harmonic_mean_is_scipys_and_0_at_0():
    a, b = np.random.default_rng(0).uniform(0.01, 2, (2, 5, 3))
    assert harmonic_mean(a, b) == pytest.approx(hmean([a, b]))
    assert harmonic_mean([0, 0, 2], [0, 2, 0]).tolist() == [0, 0, 0]


def test_halves_share_no_prompt_and_leave_none_out():
    first, second = halves(11, seed=3)
    assert sorted([*first, *second]) == list(range(11))
    assert len(first) == 5


def test_the_strength_comes_from_the_other_half():
    harmonic = np.zeros((6, 3))
    parts = (np.array([0, 2, 5]), np.array([1, 3, 4]))
    harmonic[parts[0], 1] = 1  # the first half prefers strength 1
    harmonic[parts[1], 2] = 1
    assert chosen_elsewhere(harmonic, parts).tolist() == [2, 1, 2, 1, 1, 2]


def test_choosing_elsewhere_is_not_optimistic():
    rng = np.random.default_rng(0)
    honest, greedy = [], []
    for seed in range(300):
        noise = rng.standard_normal((20, 8))
        chosen = chosen_elsewhere(noise, halves(20, seed))
        honest.append(noise[np.arange(20), chosen].mean())
        greedy.append(noise.mean(0).max())
    assert abs(np.mean(honest)) < 0.05
    assert np.mean(greedy) > 0.25


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
    frontier = Frontier(fluency[:, 0], share=0.7)
    plain = frontier.values(concept, fluency)
    tamed = frontier.values(slopes * weaker, np.repeat(2 - 0.8 * weaker[None], 9, 0))
    better = frontier.values(concept + 0.3 * (strengths > 0), fluency)
    assert frontier.interval(tamed - plain) == pytest.approx((0, 0, 0, 9), abs=1e-12)
    assert frontier.interval(better - plain).ci_low > 0.25
    interval = frontier.interval(plain)
    assert interval.ci_low < interval.value < interval.ci_high
