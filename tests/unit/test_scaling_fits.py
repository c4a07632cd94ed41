"""Power laws of loss in compute, against scipy, closed forms, and laws that simulated cells were drawn from."""

import math

import numpy as np
import pytest
from scipy.optimize import least_squares
from scipy.spatial import ConvexHull

from glp_lens.errors import InputError
from glp_lens.scaling.fits import HUBER, bought, fit, frontier

FLOPS = np.geomspace(6e11, 1.7e15, 12)
TRUNKS = 10
FLOOR, EXCESS, ALPHA = 0.95, 0.25, 0.16


def law(flops, floor=FLOOR):
    return floor + EXCESS * (np.asarray(flops) / 3e13) ** -ALPHA


def simulated(rng, trunk=0.0015, cell=0.001, floor=FLOOR):
    """Ten trunks of five budgets each; all budgets of a trunk share its luck."""
    flops = np.concatenate([FLOPS[i % 7 : i % 7 + 5] for i in range(TRUNKS)])
    trunks = np.repeat(np.arange(TRUNKS), 5)
    luck = trunk * rng.normal(size=TRUNKS)[trunks] + cell * rng.normal(size=len(flops))
    return flops, law(flops, floor) * np.exp(luck), trunks


@pytest.mark.parametrize("floor", [None, 0.0, 0.7])
def test_the_fit_is_the_one_that_scipy_finds(floor):
    flops, loss, trunks = simulated(np.random.default_rng(1), 0.004, 0.004)  # so that some residuals count linearly
    found = fit(flops, loss, trunks, floor=floor, resamples=2)
    x = np.log(flops) - found.centre

    def residuals(p):
        e = p[2] if floor is None else floor
        return (np.log(e + np.exp(p[0] - p[1] * x)) - np.log(loss)) / HUBER

    start = [-1.0, 0.2] + [0.8] * (floor is None)
    want = least_squares(residuals, start, loss="huber", xtol=1e-13, ftol=1e-13, gtol=1e-13).x
    assert found.draws[0, 1:] == pytest.approx(want[:2], rel=1e-5)
    assert math.exp(found.draws[0, 0]) == pytest.approx(want[2] if floor is None else floor, rel=1e-5)


def test_a_law_without_noise_is_found_exactly():
    flops, loss, trunks = simulated(np.random.default_rng(2), 0, 0)
    found = fit(flops, loss, trunks, resamples=8)
    assert found.floor.value == pytest.approx(FLOOR, rel=1e-5)
    assert found.exponent.value == pytest.approx(ALPHA, rel=1e-5)
    assert found.coefficient.value == pytest.approx(EXCESS * 3e13**ALPHA, rel=1e-3)
    assert found.predict([3e16])[0] == pytest.approx(law(3e16), rel=1e-5)
    assert found.decades == pytest.approx(math.log10(flops.max() / flops.min()))


def test_without_a_floor_it_is_a_straight_line_in_the_log_log_plot():
    rng = np.random.default_rng(3)
    flops, _, trunks = simulated(rng)
    loss = 3 * flops**-0.04 * np.exp(0.0005 * rng.normal(size=len(flops)))  # all within Huber's parabola
    found = fit(flops, loss, trunks, floor=0.0, resamples=2)
    assert found.exponent.value == pytest.approx(-np.polyfit(np.log(flops), np.log(loss), 1)[0], rel=1e-6)
    assert found.floor == (0, 0, 0, TRUNKS)


def test_a_training_that_failed_hardly_moves_the_fit():
    flops, loss, trunks = simulated(np.random.default_rng(4))
    bad = loss.copy()
    bad[17] *= 1.2
    with_it, without = (fit(flops, y, trunks, resamples=2) for y in (bad, loss))
    assert with_it.losses([1e14])[0] == pytest.approx(without.losses([1e14])[0], rel=1e-3)


@pytest.mark.parametrize("floor", [FLOOR, 0.0])
def test_intervals_hold_the_truth_about_as_often_as_they_say(floor):
    rng = np.random.default_rng(5)
    hits = {"floor": 0, "exponent": 0, "curve": 0, "prediction": 0}
    runs = 40
    for run in range(runs):
        flops, loss, trunks = simulated(rng, floor=floor)
        found = fit(flops, loss, trunks, resamples=80, seed=run)
        _, low, high = found.curve([3e13])[:, 0]
        hits["floor"] += found.floor.ci_low <= floor <= found.floor.ci_high
        hits["exponent"] += found.exponent.ci_low <= ALPHA <= found.exponent.ci_high
        hits["curve"] += low <= law(3e13, floor) <= high
        _, low, high = found.predict([1e16])[:, 0]
        new = law(1e16, floor) * np.exp(0.0015 * rng.normal() + 0.001 * rng.normal())
        hits["prediction"] += low <= new <= high
    assert all(0.88 <= n / runs <= 1 for n in hits.values()), hits  # 95%, less what 40 runs leave open


def test_cells_of_a_trunk_are_not_taken_for_independent_ones():
    flops, loss, trunks = simulated(np.random.default_rng(6), trunk=0.003, cell=0.0002)
    width = [np.ptp(fit(flops, loss, each, floor=0.9).curve([3e13])[1:]) for each in (trunks, np.arange(len(flops)))]
    assert width[0] > 1.5 * width[1]


def test_an_interval_of_one_training_is_wider_than_that_of_the_mean_and_grows_with_distance():
    found = fit(*simulated(np.random.default_rng(7)))
    mean, new = found.curve([1e14, 1e17]), found.predict([1e14, 1e17])
    assert (np.ptp(new[1:], axis=0) > np.ptp(mean[1:], axis=0)).all()
    assert np.ptp(mean[1:, 1]) > 3 * np.ptp(mean[1:, 0])
    assert (new[0] == mean[0]).all()


def test_the_same_seed_gives_the_same_fit():
    cells = simulated(np.random.default_rng(8))
    assert (fit(*cells, resamples=20, seed=3).draws == fit(*cells, resamples=20, seed=3).draws).all()
    assert (fit(*cells, resamples=20, seed=3).draws != fit(*cells, resamples=20, seed=4).draws).any()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c, y: (np.minimum(c, np.unique(c)[2]), y, None), "at least 4 different amounts of compute, got 3"),
        (lambda c, y: (c, np.where(c == c[0], np.nan, y), None), "positive compute and losses"),
        (lambda c, y: (c * 0 + np.arange(len(c)), y, None), "positive compute and losses"),
        (lambda c, y: (c, y, 1.5), "floor must be at least 0 and below all losses"),
        (lambda c, y: (c, y, -0.1), "floor must be at least 0"),
    ],
)
def test_cells_that_allow_no_fit_are_refused(change, says):
    flops, loss, trunks = simulated(np.random.default_rng(9))
    flops, loss, floor = change(flops, loss)
    with pytest.raises(InputError, match=says):
        fit(flops, loss, trunks, floor=floor)


def test_the_frontier_is_the_falling_part_of_the_lower_hull():
    rng = np.random.default_rng(10)
    flops = np.exp(rng.uniform(27, 35, size=37))
    loss = law(flops) * np.exp(rng.exponential(0.05, size=37))
    points = np.stack([np.log(flops), np.log(loss)], axis=1)
    hull = ConvexHull(points)
    falling = {
        int(i)
        for edge, equation in zip(hull.simplices, hull.equations, strict=True)
        if equation[0] < 0 and equation[1] < 0  # the outward normal of an edge that falls, below the points
        for i in edge
    }
    assert set(np.flatnonzero(frontier(flops, loss))) == falling


def test_a_frontier_of_few_points():
    assert frontier([3.0], [1.0]).tolist() == [True]
    assert frontier([2.0, 1.0], [2.0, 1.0]).tolist() == [False, True]  # more compute and a higher loss
    assert frontier([1.0, 1.0, 4.0], [2.0, 1.5, 1.0]).tolist() == [False, True, True]


def test_what_hours_buy():
    found = fit(*simulated(np.random.default_rng(11)))
    hour = bought(found, 4e11, hours=2.5, gaussian_loss=1.43)
    assert hour.flops == 4e11 * 2.5 * 3600
    assert hour.loss[:3] == pytest.approx(found.predict([hour.flops])[:, 0])
    assert hour.below.value == pytest.approx(100 * (1 - hour.loss.value / 1.43))
    assert hour.below.ci_low < hour.below.value < hour.below.ci_high
    assert hour.beyond == pytest.approx(math.log10(hour.flops / found.highest))
    assert bought(found, 1e9).beyond == 0
    assert bought(found, 1e9).below is None
    for speed, hours in ((0, 1), (1e9, -1), (math.nan, 1)):
        with pytest.raises(InputError, match="must be positive"):
            bought(found, speed, hours=hours)
