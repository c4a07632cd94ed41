"""Verdicts say what the numbers say, from either side of a pair, and no more."""

import math

import pytest

from glp_lens.display.labels import display, family, flops, interval, number, p_value, signed
from glp_lens.evals.results import Results
from glp_lens.evals.steering import page as steering
from glp_lens.report import Verdict, headline, verdicts


def frame(suite, *rows):
    results = Results(suite)
    for model, task, setting, metric, value, *ends in rows:
        low, high = ends or (math.nan, math.nan)
        results.add(model, task, setting, metric, value, ci_low=low, ci_high=high, n=14)
    return results.frame()


VIEW = "split=dedup;mode=paper"


@pytest.mark.parametrize(
    ("value", "low", "high", "outcome", "words"),
    [
        (0.03, 0.01, 0.05, "ahead", "GLP beats SAE"),
        (-0.03, -0.05, -0.01, "behind", "GLP loses to SAE"),
        (0.01, -0.01, 0.03, "unclear", "No clear winner between GLP and SAE"),
        (0.03, math.nan, math.nan, "unclear", "No clear winner"),
    ],
)
def test_probing_names_a_winner_only_if_the_interval_leaves_out_zero(value, low, high, outcome, words):
    table = frame("probing", ("glp", "all", VIEW, "auc_diff:sae", value, low, high))
    (found,) = verdicts(table)
    assert found.outcome == outcome
    assert found.sentence.startswith(words)
    assert signed(value) in found.sentence


def test_a_pair_told_from_the_other_side_is_turned_round():
    table = frame(
        "probing",
        ("raw", "all", VIEW, "auc_diff:glp", 0.02, 0.01, 0.04),
        ("raw", "all", VIEW, "auc", 0.73),
        ("glp", "all", VIEW, "auc", 0.71),
        ("raw", "all", VIEW, "auc_diff:sae", 0.5, 0.4, 0.6),
    )
    (found,) = verdicts(table)  # the pair without the GLP is no verdict on it
    assert (found.first, found.second, found.outcome) == ("glp", "raw", "behind")
    assert "0.710 against 0.730, difference −0.020 [−0.040, −0.010]" in found.sentence


def test_holm_can_take_a_probing_win_away_and_other_views_are_counted():
    rows = [("glp", "all", VIEW, "auc_diff:sae", 0.03, 0.01, 0.05), ("glp", "all", VIEW, "p_holm:sae", 0.2)]
    (found,) = verdicts(frame("probing", *rows))
    assert found.outcome == "unclear"
    assert "p = 0.200" in found.detail
    other = [("glp", "all", "split=official;mode=all", "auc_diff:sae", 0.03, -0.01, 0.05)]
    (found,) = verdicts(frame("probing", *rows, *other))
    assert "1 of 1 other views" in found.detail


EQUAL = "split=dedup;mode=equal;features=1536"


@pytest.mark.parametrize(
    ("low", "high", "p", "told"),
    [
        (0.01, 0.05, 0.01, ""),  # the same verdict
        (-0.05, -0.01, 0.01, "GLP loses to SAE at equal feature counts (1\u202f536 each): difference −0.030"),
        (-0.01, 0.05, 0.01, "No clear winner between GLP and SAE at equal feature counts (1\u202f536 each)"),
        (0.01, 0.05, 0.2, "No clear winner between GLP and SAE at equal feature counts"),
    ],
)
def test_equal_feature_counts_are_told_where_they_change_the_verdict(low, high, p, told):
    table = frame(
        "probing",
        ("glp", "all", VIEW, "auc_diff:sae", 0.03, 0.01, 0.05),
        ("sae", "all", EQUAL, "auc_diff:glp", -(low + high) / 2, -high, -low) if low < 0 < high else
        ("glp", "all", EQUAL, "auc_diff:sae", 0.03 if low > 0 else -0.03, low, high),
        ("glp", "all", EQUAL, "p_holm:sae", p),
        ("glp", "all", "split=dedup;probe=sparse;k=16", "auc_diff:sae", -0.2, -0.3, -0.1),
        ("glp", "all", "split=official;mode=equal;features=1536", "auc_diff:sae", -0.2, -0.3, -0.1),
    )  # fmt: skip
    (found,) = verdicts(table)
    assert found.outcome == "ahead"
    assert told in found.detail
    assert ("at equal feature counts" in found.detail) == bool(told)
    assert "other views" not in found.detail  # neither equal counts nor several features are a view of one feature


def test_random_features_are_no_random_direction():
    (found,) = verdicts(frame("probing", ("glp", "all", VIEW, "auc_diff:random", 0.03, 0.01, 0.05)))
    assert found.sentence.startswith("GLP beats random features")
    assert headline([found]) == "GLP wins in probing over random features."


def test_lower_is_better_for_losses_and_losing_noise_levels_are_named():
    table = frame(
        "density",
        ("glp", "heldout", "sigma=all", "flow_loss_diff:gaussian", -0.2, -0.3, -0.1),
        ("glp", "heldout", "sigma=0.0-0.1", "flow_loss_diff:gaussian", 0.1, 0.05, 0.2),
        ("glp", "heldout", "sigma=0.1-0.2", "flow_loss_diff:gaussian", -0.1, -0.2, -0.05),
        ("glp", "heldout", "sigma=all", "below_bound_percent", 14.2, 13.0, 15.1),
    )
    (found,) = verdicts(table)
    assert found.outcome == "ahead"
    assert "14.2% [13.0, 15.1] below the exact bound" in found.detail
    assert "loses at noise levels σ 0.0–0.1." in found.detail


def test_above_the_bound_is_said_to_have_learnt_nothing_more():
    table = frame(
        "density",
        ("glp", "heldout", "sigma=all", "flow_loss_diff:gaussian", 0.2, 0.1, 0.3),
        ("glp", "heldout", "sigma=all", "below_bound_percent", -5.0, -6.0, -4.0),
    )
    (found,) = verdicts(table)
    assert found.outcome == "behind"
    assert "5.0% [4.0, 6.0] above" in found.detail
    assert "nothing beyond means and covariances" in found.detail


def test_fidelity_speaks_at_equal_distortion_only():
    matched = (
        "glp",
        "heldout",
        "fvu=0.2780;between=glp s=.3,glp s=.5",
        "delta_nll_matched_diff:sae",
        -0.1,
        -0.2,
        -0.05,
    )
    own = ("glp s=.1", "heldout", "", "delta_nll_diff:sae", -0.5, -0.6, -0.4)
    (found,) = verdicts(frame("fidelity", matched, own))
    assert found.outcome == "ahead"
    assert "FVU 0.278" in found.sentence
    rows = [own, ("glp s=.1", "heldout", "", "fvu", 0.02), ("sae", "heldout", "", "fvu", 0.28)]
    (found,) = verdicts(frame("fidelity", *rows))
    assert found.outcome == "unclear"
    assert "GLP 0.020, SAE 0.280" in found.sentence


def test_steering_counts_each_pair_once_and_leaves_controls_out():
    table = frame(
        "steering",
        ("plain", "sports", "alpha=chosen", "harmonic_diff:glp", 0.1, 0.05, 0.2),
        ("glp", "sports", "alpha=chosen;sigma=0.5", "harmonic_diff:plain", -0.1, -0.2, -0.05),
        ("glp", "sports", "alpha=chosen;sigma=0.5", "harmonic_diff:random", 0.4, 0.3, 0.5),
        (
            "glp",
            "sports",
            "fluency>=80% of unsteered;sigma=0.5",
            "concept_at_fluency_diff:plain",
            0.0,
            -0.1,
            0.1,
        ),
    )
    at_chosen, at_fluency = verdicts(table)
    assert at_chosen.outcome == "behind"
    assert "GLP loses to no repair" in at_chosen.sentence
    assert at_fluency.outcome == "unclear"
    assert "at least 80% of the unsteered fluency" in at_fluency.sentence
    assert headline([at_chosen, at_fluency]) == (
        "GLP loses in steering to no repair. There is no clear winner in steering at equal fluency against no repair."
    )


def steering_verdict(first, second, outcome):
    return Verdict("steering", outcome, first, second, "")


@pytest.mark.parametrize("order", [1, -1])
def test_headline_speaks_of_the_main_setting_only(order):
    found = [steering_verdict("glp", "plain", "behind"), steering_verdict("glp sigma=0.2", "plain", "ahead")]
    assert headline(found[::order]) == "GLP loses in steering to no repair."


def test_headline_without_the_main_setting_speaks_of_the_first():
    found = [steering_verdict("glp sigma=0.2", "sae", "ahead"), steering_verdict("glp sigma=0.1", "sae", "behind")]
    assert headline(found) == "GLP wins in steering over SAE."


def test_headline_of_nothing():
    assert headline(verdicts(Results("probing").frame())) == "There is nothing to compare GLP with."


def test_labels_and_numbers():
    assert family("glp sigma=0.1") == family("GLP") == "glp"
    assert family("random+glp") == "random"
    assert display("pca k=64").replace("\u202f", "") == "PCA k=64"
    assert display("pca_raw k=64").replace("\u202f", "") == "PCA raw k=64"
    assert display("random") == "random features"
    assert steering.display("random+glp") == "random direction + GLP"
    assert number(-0.0004) == "0.000"
    assert number(-1.5, 1) == "−1.5"
    assert number(math.nan) == "–"
    assert signed(0.25) == "+0.250"
    assert interval(math.nan, 1.0) == ""
    assert p_value(0.0001) == "< 0.001"
    assert flops(7.51e13) == "7.5 × 10¹³"
