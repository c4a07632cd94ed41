"""The solvers, against flows known in closed form, and the plans that options mean."""

from pathlib import Path

import numpy as np
import pytest
import torch

from glp_lens.errors import InputError
from glp_lens.flow import schedule, solvers
from glp_lens.flow.plan import plan
from glp_lens.models.glp import GLP

GOLDEN = Path(__file__).parents[1] / "golden"
ORDERS = {"euler": 1, "heun": 2, "ab2": 2, "ab3": 3, "dpm2": 2}
VARIANCES = torch.tensor([0.04, 0.3, 1.0, 2.5, 17.0], dtype=torch.float64)
"""Of the directions of an anisotropic Gaussian; standardised activations have such a spread."""


def gaussian(z, sigma):
    """Optimal velocity for independent N(0, v): (s - (1 - s) v) / ((1 - s)^2 v + s^2) * z."""
    return (sigma - (1 - sigma) * VARIANCES) / deviation(sigma) ** 2 * z


def deviation(sigma):
    """The flow scales each direction by the ratio of the standard deviations at its two levels."""
    return ((1 - sigma) ** 2 * VARIANCES + sigma**2).sqrt()


def errors(solver, sigmas):
    """Of the end that a solver comes to, for each of several grids between the same two levels."""
    start, end = float(sigmas[0][0]), float(sigmas[0][-1])
    z = torch.tensor([[1.0], [-2.0], [0.5]], dtype=torch.float64) * deviation(start)
    want = z * deviation(end) / deviation(start)
    return [float((solvers.integrate(gaussian, z, path, solver) - want).norm()) for path in sigmas]


def order_of(solver, grids):
    steps = [len(path) - 1 for path in grids]
    return -np.polyfit(np.log(steps), np.log(errors(solver, grids)), 1)[0]


def test_every_solver_has_an_order():
    assert set(ORDERS) == set(solvers.SOLVERS)


@pytest.mark.parametrize("start", [1.0, 15 / 32])
@pytest.mark.parametrize("spacing", ["even", "early", "late"])
@pytest.mark.parametrize(("solver", "order"), ORDERS.items())
def test_order_of_convergence_to_data(solver, order, spacing, start):
    grids = [schedule.path(start, n, spacing) for n in (80, 160, 320, 640)]
    # At an infinite log-SNR, DPM-Solver++ keeps its order up to a logarithm of the steps.
    assert order_of(solver, grids) == pytest.approx(order, abs=0.3 if solver == "dpm2" else 0.12)


@pytest.mark.parametrize(("solver", "order"), ORDERS.items())
def test_order_of_convergence_between_two_levels_on_grids_of_random_steps(solver, order):
    """Each step of the coarsest grid is halved again and again, so that neighbours keep their different lengths."""
    grids = [torch.linspace(0.7, 0.1, 21, dtype=torch.float64)]
    grids[0][1:-1] += 0.02 * (torch.rand(19, generator=torch.Generator().manual_seed(3), dtype=torch.float64) - 0.5)
    for _ in range(5):
        between = (grids[-1][1:] + grids[-1][:-1]) / 2
        grids.append(torch.cat([grids[-1], between]).sort(descending=True).values)
    assert order_of(solver, grids[-3:]) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("solver", ["ab2", "ab3"])
def test_a_velocity_that_is_a_polynomial_in_sigma_is_integrated_exactly_on_any_grid(solver):
    """Of the points it looks back on: of the last step only, as the first ones have fewer."""
    levels = [0.9, 0.83, 0.55, 0.5]
    degree = ORDERS[solver] - 1
    points = [solvers.Point(s, torch.ones(2, 3).double(), torch.full((2, 3), s**degree).double()) for s in levels[:-1]]
    got = solvers.SOLVERS[solver](lambda z, s: z, points, levels[-1])
    want = 1 + (levels[-1] ** (degree + 1) - levels[-2] ** (degree + 1)) / (degree + 1)
    torch.testing.assert_close(got, torch.full_like(got, want))


@pytest.mark.parametrize("solver", solvers.SOLVERS)
@pytest.mark.parametrize("spacing", schedule.SPACINGS)
def test_straight_paths_to_a_single_datum_are_followed_exactly(solver, spacing):
    x, z = torch.tensor([[3.0, -1.0, 0.0]]).double(), torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    for steps in (1, 2, 6):
        path = schedule.path(0.8, steps, spacing)
        got = solvers.integrate(lambda z, sigma: (z - x) / sigma, z.double(), path, solver)
        torch.testing.assert_close(got, x.expand(4, 3))


@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_one_step_gives_the_posterior_mean_and_none_the_start(solver):
    z = torch.linspace(-2, 3, 15, dtype=torch.float64).reshape(3, 5)
    shrink = 0.4 * VARIANCES / (0.4**2 * VARIANCES + 0.6**2)  # E[x | z] for z = 0.4 x + 0.6 eps
    one_step = solvers.integrate(gaussian, z, torch.tensor([0.6, 0.0], dtype=torch.float64), solver)
    torch.testing.assert_close(one_step, shrink * z)
    assert torch.equal(solvers.integrate(gaussian, z, schedule.path(0.0, 5), solver), z)


@pytest.mark.parametrize(
    ("solver", "calls"), [("euler", [1, 2, 7]), ("heun", [1, 3, 13]), ("ab2", [1, 2, 7]), ("ab3", [1, 3, 8]),
                          ("dpm2", [1, 2, 7])]
)  # fmt: skip
def test_the_velocity_is_asked_for_on_the_grid_only_and_as_often_as_told(solver, calls):
    for steps, want in zip([1, 2, 7], calls, strict=True):
        path, asked = schedule.path(1.0, steps, "early"), []

        def velocity(z, sigma, asked=asked):
            asked.append(sigma)
            return -z

        solvers.integrate(velocity, torch.ones(1, 2), path, solver)
        assert set(asked) <= set(path.tolist()[:-1])
        assert len(asked) == solvers.network_calls(path, solver) == want
    assert solvers.network_calls(torch.zeros(1), solver) == 0


@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_gradients_pass_and_the_start_is_left_alone(solver):
    path = schedule.path(1.0, 4, "early")
    z = torch.randn(2, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    before = z.detach().clone()
    assert torch.autograd.gradcheck(
        lambda rows: solvers.integrate(lambda z, s: gaussian(z, s).tanh(), rows, path, solver), (z,)
    )
    assert torch.equal(z, before)


# -- plans ---------------------------------------------------------------------------------------------------


def test_the_default_plan_is_the_released_one():
    for u in (0.0, 0.5):
        assert torch.equal(plan(u=u).path, schedule.grid(20)[int(u * 20) :])
    assert plan().solver == "euler"
    assert torch.equal(plan().path, plan(u=0.5).path)
    assert plan(sigma=0.3).network_calls == 6


@pytest.mark.parametrize("level", [{"u": 0.0}, {"u": 0.5}, {"sigma": 0.7}, {"sigma": 0.2}, {"u": 0.5, "steps": 1000}])
def test_the_fast_plan_keeps_the_noise_level_and_needs_fewer_evaluations(level):
    slow, fast = plan(**level), plan(**level, fast=True)
    assert float(fast.path[0]) == float(slow.path[0])
    assert 2 <= fast.network_calls <= slow.network_calls / 2


@pytest.mark.parametrize("level", [{"u": 0.0}, {"u": 0.5}, {"sigma": 0.7}])
def test_the_fast_plan_is_as_exact_as_the_default_where_the_flow_is_known(level):
    error = [errors(found.solver, [found.path])[0] for found in (plan(**level, fast=True), plan(**level))]
    assert error[0] < 1.25 * error[1]


def test_a_prior_follows_the_plan():
    glp = GLP.from_pretrained(GOLDEN / "single_layer")
    noise = torch.randn(7, glp.d_in, generator=torch.Generator().manual_seed(2))
    x = glp.denormalize(torch.randn(7, glp.d_in, generator=torch.Generator().manual_seed(3)))
    for options in ({"fast": True}, {"solver": "ab3", "grid": "late", "steps": 9}):
        route = plan(u=0.0, **options)
        want = glp.denormalize(solvers.integrate(glp.velocity, noise, *route))
        torch.testing.assert_close(glp.sample(7, noise=noise, **options), want, rtol=1e-4, atol=1e-4)
        route = plan(sigma=0.4, **options)
        start = 0.6 * glp.normalize(x) + 0.4 * noise
        want = glp.denormalize(solvers.integrate(glp.velocity, start, *route))
        torch.testing.assert_close(glp.project(x, sigma=0.4, noise=noise, **options), want, rtol=1e-4, atol=1e-4)
    assert torch.equal(glp.project(x, sigma=0.0, fast=True), x)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"u": 0.5, "sigma": 0.5}, "not both"),
        ({"solver": "rk45"}, "solver must be one of euler, heun, ab2, ab3, dpm2, got 'rk45'"),
        ({"grid": "cosine"}, "grid must be one of released, even, early, late, log-snr, got 'cosine'"),
        ({"u": 1.0, "fast": True}, "u must be in"),
        ({"sigma": -0.1, "fast": True}, "sigma must be in"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"solver": "heun", "fast": True}, "fast has its own solver and grid, got heun and released"),
        ({"grid": "late", "fast": True}, "fast has its own solver and grid, got euler and late"),
    ],
)
def test_options_that_mean_no_plan_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        plan(**options)


@pytest.mark.parametrize(("sigma", "steps", "calls"), [(0.07, 100, 7), (0.14, 50, 7), (0.071, 100, 8), (1.0, 20, 20)])
def test_rounding_adds_no_step(sigma, steps, calls):
    """0.07 * 100 is 7.000000000000001 in float64."""
    assert plan(sigma=sigma, steps=steps).network_calls == calls


def test_an_unknown_solver_is_refused():
    with pytest.raises(InputError, match="solver must be one of euler, heun"):
        solvers.integrate(lambda z, s: z, torch.ones(1, 2), torch.tensor([1.0, 0.0]), "rk45")
