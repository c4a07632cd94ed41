"""The path between data and noise, and the grids of noise levels."""

import numpy as np
import pytest
import torch

from glp_lens.errors import InputError
from glp_lens.flow import path, schedule
from glp_lens.flow.likelihood import rising_grid
from tests.conformance import MODES


def test_conversions_round_trip_for_shared_and_per_row_sigma():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    eps = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    for sigma in (0.3, torch.linspace(0.01, 0.99, 7, dtype=torch.float64)):
        z, v = path.interpolate(x, eps, sigma), path.velocity_target(x, eps)
        torch.testing.assert_close(path.data_from_velocity(z, v, sigma), x)


def test_ends_of_the_path_are_data_and_noise():
    x, eps = torch.ones(3, 4), torch.full((3, 4), 2.0)
    assert torch.equal(path.interpolate(x, eps, 0.0), x)
    assert torch.equal(path.interpolate(x, eps, 1.0), eps)


def test_released_grid_and_what_u_means_on_it():
    """Facts of the released code: u = 0.9 is sigma 0.100 on 1000 steps, u = 0.5 is 0.4742 on 20."""
    assert schedule.grid(1).tolist() == [1.0, 0.0]
    assert len(schedule.grid(20)) == 21
    assert float(schedule.path_from_u(0.9, 1000)[0]) == pytest.approx(0.1, abs=5e-5)
    twenty = schedule.path_from_u(0.5, 20)
    assert float(twenty[0]) == pytest.approx(0.4742, abs=5e-5)
    assert len(twenty) - 1 == 10  # network calls
    for bad in (1.0, -0.1):
        with pytest.raises(InputError, match="u must be in"):
            schedule.path_from_u(bad, 20)


@pytest.mark.parametrize("mode", MODES)
def test_levels_do_not_depend_on_the_callers_modes(mode):
    def levels():
        generator = torch.Generator().manual_seed(0)
        return [
            *(schedule.path(0.4742, 7, spacing) for spacing in schedule.SPACINGS),
            schedule.path(0.0, 7),
            schedule.path_from_u(0.29, 100),
            schedule.uniform_sigmas(9, generator),
            schedule.stratified_sigmas(9, generator, 2),
            rising_grid(64),
        ]

    want = levels()
    with MODES[mode]():
        got = levels()
        assert int(schedule.index_of_u(0.29, 1000)) == 290  # 0.28906 in bfloat16
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)


def test_path_from_sigma_keeps_the_pace_and_ends_at_data():
    p = schedule.path_from_sigma(0.3, 20)
    assert len(p) - 1 == 6
    assert p[0] == pytest.approx(0.3)
    assert p[-1] == 0
    assert schedule.path_from_sigma(0.0, 20).tolist() == [0.0]
    with pytest.raises(InputError, match="sigma must be in"):
        schedule.path_from_sigma(1.2, 20)


@pytest.mark.parametrize("spacing", schedule.SPACINGS)
@pytest.mark.parametrize("sigma", [1.0, 0.4742, 0.003, 1e-9])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_path_falls_from_its_level_to_data_in_the_steps_asked_for(spacing, sigma, steps):
    p = schedule.path(sigma, steps, spacing)
    assert p.shape == (steps + 1,)
    assert float(p[0]) == pytest.approx(sigma, rel=1e-7)
    assert float(p[-1]) == 0
    assert bool((p.diff() < 0).all())
    assert schedule.path(0.0, steps, spacing).tolist() == [0.0]


def test_spacings_are_what_their_names_say():
    thirds = torch.tensor([3, 2, 1, 0]) / 3
    torch.testing.assert_close(schedule.path(0.6, 3, "even"), 0.6 * thirds)
    torch.testing.assert_close(schedule.path(0.6, 3, "late"), 0.6 * thirds**2)
    torch.testing.assert_close(schedule.path(1.0, 3, "early"), 1 - (1 - thirds) ** 1.3)
    levels = schedule.path(0.6, 5, "log-snr").double()[:-1]
    pace = torch.log((1 - levels) / levels).diff()
    torch.testing.assert_close(pace, pace.mean().expand(4), atol=1e-5, rtol=0)


def test_the_spacing_early_from_a_level_is_a_part_of_the_whole_path():
    whole = schedule.path(1.0, 9, "early")
    torch.testing.assert_close(schedule.path(float(whole[4]), 5, "early"), whole[4:])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((float("nan"), 3), "sigma must be in"),
        ((0.5, 0), "steps must be at least 1, got 0"),
        ((0.5, 3, "cosine"), "grid must be one of released, even, early, late, log-snr, got 'cosine'"),
    ],
)
def test_paths_that_cannot_be_are_refused(arguments, words):
    for make in (schedule.path, schedule.path_from_sigma):
        with pytest.raises(InputError, match=words):
            make(*arguments)


def test_both_ways_of_drawing_sigma_are_uniform_and_stratified_covers_each_batch():
    generator = torch.Generator().manual_seed(0)
    for draw in (schedule.uniform_sigmas, schedule.stratified_sigmas):
        s = torch.cat([draw(333, generator) for _ in range(60)]).double()
        assert float(s.mean()) == pytest.approx(0.5005, abs=0.01)
        assert float(s.var()) == pytest.approx(1 / 12, abs=0.003)
        assert set((s * 1000).round().long().tolist()) <= set(range(1, 1001))
    batch = schedule.stratified_sigmas(100, generator)
    counts = np.histogram(batch.numpy(), bins=10, range=(0, 1.0001))[0]
    assert counts.min() >= 9
    assert counts.max() <= 11
