"""The path, the grids and the solvers, against closed forms."""

import math

import numpy as np
import pytest
import torch

from glp_lens.errors import InputError
from glp_lens.flow import path, schedule, solvers


def test_conversions_round_trip_for_shared_and_per_row_sigma():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    eps = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    for sigma in (0.3, torch.linspace(0.01, 0.99, 7, dtype=torch.float64)):
        z, v = path.interpolate(x, eps, sigma), path.velocity_target(x, eps)
        torch.testing.assert_close(path.data_from_velocity(z, v, sigma), x)
        torch.testing.assert_close(path.noise_from_velocity(z, v, sigma), eps)


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


def test_path_from_sigma_keeps_the_pace_and_ends_at_data():
    p = schedule.path_from_sigma(0.3, 20)
    assert len(p) - 1 == 6
    assert p[0] == pytest.approx(0.3)
    assert p[-1] == 0
    assert schedule.path_from_sigma(0.0, 20).tolist() == [0.0]
    with pytest.raises(InputError, match="sigma must be in"):
        schedule.path_from_sigma(1.2, 20)


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


def _gaussian_velocity(variance):
    """Optimal velocity for N(0, variance): (s - (1 - s) variance) / ((1 - s)^2 variance + s^2) * z."""
    return lambda z, s: (s - (1 - s) * variance) / ((1 - s) ** 2 * variance + s**2) * z


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence_on_a_gaussian_with_closed_form(solver, order):
    """The flow scales z by the standard deviation: from sigma a to b by the ratio of the marginals' deviations."""
    variance, z = 0.3, torch.ones(1, 3, dtype=torch.float64)
    marginal = lambda s: math.sqrt((1 - s) ** 2 * variance + s**2)  # noqa: E731
    exact = marginal(0.1) / marginal(1.0)
    steps = np.array([16, 32, 64, 128])
    errors = []
    for n in steps:
        sigmas = torch.linspace(1.0, 0.1, n + 1, dtype=torch.float64)
        got = solvers.integrate(_gaussian_velocity(variance), z, sigmas, solver)
        errors.append(float((got - exact).abs().max()))
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert -slope == pytest.approx(order, abs=0.15)


def test_unknown_solver_is_refused():
    with pytest.raises(InputError, match="solver must be one of euler, heun"):
        solvers.integrate(lambda z, s: z, torch.ones(1, 2), torch.tensor([1.0, 0.0]), "rk45")
