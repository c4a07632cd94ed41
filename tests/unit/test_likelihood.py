"""Log-density by the probability-flow ODE, against closed forms of Gaussian and two-peaked data."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from glp_lens.errors import InputError
from glp_lens.flow import likelihood
from glp_lens.flow.likelihood import directional, draw_probes, log_density, rising_grid
from glp_lens.models.gaussian import Gaussian
from tests.conformance import MODES

ADDED = (0.001 / 0.999) ** 2
"""Variance of the noise at the first level, for data of scale 1."""


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def rotation(d):
    return torch.linalg.qr(normal(d, d, seed=d))[0]


def gaussian_velocity(variances, axes):
    """`E[eps - x | z]` for data of covariance `axes diag(variances) axes^T`, by linear regression."""

    def velocity(z, s):
        slope = (s - (1 - s) * variances) / ((1 - s) ** 2 * variances + s**2)
        return z @ axes * slope @ axes.T

    return velocity


def gaussian_density(z, variances, axes):
    """By scipy."""
    covariance = axes @ variances.diag() @ axes.T
    return torch.from_numpy(multivariate_normal(np.zeros(len(axes)), covariance.numpy()).logpdf(z.numpy()))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("probes", [0, 3])
def test_densities_do_not_depend_on_the_callers_modes(mode, probes):
    x, signs = normal(7, 5).float(), draw_probes(7, 5, probes)
    slopes = normal(5, 5, seed=1).float() / 3

    def density(z):
        return log_density(lambda z, s: (s - z @ slopes).sin(), z, rising_grid(8), signs)

    want = density(x)
    with MODES[mode]():
        got = density(x.clone())
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)


def test_exact_trace_on_an_anisotropic_gaussian():
    """The error falls with the third power of the steps, to nothing."""
    variances, axes = torch.tensor([9.0, 2.0, 0.5, 0.03, 1e-3], dtype=torch.float64), rotation(5)
    z = normal(7, 5) * variances.sqrt() * 1.5 @ axes.T
    want = gaussian_density(z, variances + ADDED, axes)
    errors = []
    for steps in (64, 128):
        got = log_density(gaussian_velocity(variances, axes), z, rising_grid(steps).double())
        errors.append(float((got.value - want).abs().max()))
        assert not got.error.any()
    assert errors[1] < 5e-3
    assert math.log2(errors[0] / errors[1]) == pytest.approx(3, abs=0.4)


def test_rows_far_out_and_near_differ_by_the_quadratic_form_alone():
    """The sign and the scale of the integral and of the end point would each spoil this."""
    variances, axes = torch.tensor([4.0, 0.25, 1.0], dtype=torch.float64), rotation(3)
    z = torch.stack([torch.zeros(3, dtype=torch.float64), 3 * axes[:, 0], 3 * axes[:, 1]])
    got = log_density(gaussian_velocity(variances, axes), z, rising_grid(128).double()).value
    volume = 0.5 * (variances.log().sum() + 3 * math.log(2 * math.pi))
    want = torch.tensor([0.0, 4.5 / 4, 4.5 / 0.25], dtype=torch.float64)
    torch.testing.assert_close(got, -volume - want, rtol=1e-3, atol=1e-3)


def test_a_constant_dimension_has_the_density_of_the_noise_added_to_it():
    variances, axes = torch.tensor([1.0, 0.3, 0.0], dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    z = normal(5, 3) * torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    got = log_density(gaussian_velocity(variances, axes), z, rising_grid(256).double()).value
    torch.testing.assert_close(got, gaussian_density(z, variances + ADDED, axes), rtol=0, atol=0.02)


def test_two_peaks():
    """Half of the data near each of `+-m`: the flow is not linear and its divergence depends on the place."""
    m, variance = torch.tensor([1.1, -0.7, 0.4], dtype=torch.float64), 0.2

    def velocity(z, s):
        noised = (1 - s) ** 2 * variance + s**2
        pull = torch.tanh((1 - s) * (z @ m) / noised)[:, None]  # posterior odds of the two peaks
        x = (s**2 * pull * m + (1 - s) * variance * z) / noised
        return (z - x) / s

    z = torch.cat([normal(6, 3), torch.zeros(1, 3, dtype=torch.float64)])
    got = log_density(velocity, z, rising_grid(128).double()).value
    peaks = [
        multivariate_normal(sign * m.numpy(), (variance + ADDED) * np.eye(3)).logpdf(z.numpy()) for sign in (1, -1)
    ]
    torch.testing.assert_close(got, torch.from_numpy(np.logaddexp(*peaks) - math.log(2)), rtol=1e-3, atol=1e-3)


WEIGHT = normal(4, 4, seed=3)


def nonlinear(z, sigma):
    return torch.tanh(z @ WEIGHT + sigma) @ WEIGHT.T * z


def test_exact_divergence_is_the_trace_of_the_jacobian(monkeypatch):
    z = normal(9, 4)
    want = [torch.autograd.functional.jacobian(lambda row: nonlinear(row[None], 0.3)[0], row).trace() for row in z]
    basis = torch.eye(4)[:, None]
    v, products = directional(nonlinear, z, 0.3, basis)
    torch.testing.assert_close(v, nonlinear(z, 0.3))
    torch.testing.assert_close(products.sum(1), torch.stack(want))
    monkeypatch.setattr(likelihood, "_ROWS", 20)
    torch.testing.assert_close(directional(nonlinear, z, 0.3, basis)[1], products)


def test_random_signs_are_unbiased_exactly():
    """Over all sixteen sign vectors of four dimensions, the mean is the exact trace, in every step and at the end."""
    z = normal(3, 4)
    signs = torch.tensor(list(product([-1, 1], repeat=4)), dtype=torch.int8).expand(3, 16, 4)
    sigmas = rising_grid(12).double()
    torch.testing.assert_close(
        log_density(nonlinear, z, sigmas, signs).value, log_density(nonlinear, z, sigmas).value, rtol=1e-9, atol=1e-9
    )


def test_many_dimensions_by_random_signs_and_how_far_off_they_say_they_are():
    d, n = 200, 60
    variances, axes = torch.logspace(1, -2, d, dtype=torch.float64), rotation(d)
    z = normal(n, d) * variances.sqrt() @ axes.T
    velocity, sigmas = gaussian_velocity(variances, axes), rising_grid(32).double()
    got = log_density(velocity, z, sigmas, draw_probes(n, d, 20, generator=generator(1)))
    exact = log_density(velocity, z[:2], sigmas)
    want = gaussian_density(z, variances + ADDED, axes)
    solver = float((exact.value - want[:2]).mean())  # the same for all rows of linear flows
    off = (got.value - want - solver) / got.error
    assert float(off.abs().max()) < 5
    assert 0.75 < float(off.square().mean().sqrt()) < 1.35
    assert abs(float(off.mean())) < 4 / math.sqrt(n)
    assert abs(solver) < 0.2


def test_the_gaussian_models_velocity_gives_its_score():
    axes = rotation(5).float()
    model = Gaussian(torch.arange(5) - 2.0, torch.tensor([1.0, 3.0, 0.2, 5.0, 1.0]), torch.logspace(0.5, -1, 5), axes)
    x = model.sample(8, generator=generator(2))
    got = log_density(model.velocity, model.normalize(x), rising_grid(64)).value - model.std.log().sum()
    torch.testing.assert_close(got, model.score(x), rtol=0, atol=2e-3)


def test_signs_are_even_and_a_rows_do_not_depend_on_how_many_follow():
    signs = draw_probes(4001, 7, 3, generator=generator(1))
    assert set(signs.unique().tolist()) == {-1, 1}
    assert abs(float(signs.double().mean())) < 0.02
    assert torch.equal(draw_probes(13, 7, 3, generator=generator(1)), signs[:13])
    assert torch.equal(draw_probes(5, 3, 2), draw_probes(5, 3, 2, generator=generator(0)))
    noise = torch.randn(5, 3, generator=generator(2))
    assert torch.equal(draw_probes(5, 3, 1, noise), noise.sign()[:, None].to(torch.int8))


def test_the_trace_is_exact_unless_there_are_many_dimensions_or_probes_are_asked_for():
    assert draw_probes(5, 64) is None
    assert draw_probes(5, 900, 0) is None
    assert draw_probes(5, 65).shape == (5, 16, 65)
    assert draw_probes(5, 65, noise=torch.ones(5, 65)).shape == (5, 1, 65)
    for bad in ({"probes": -1}, {"probes": 2, "noise": torch.ones(5, 3)}, {"probes": 1, "noise": torch.ones(4, 3)}):
        with pytest.raises(InputError, match=r"probes must be|noise of shape \(5, 3\)"):
            draw_probes(5, 3, **bad)


def test_grid_rises_from_the_first_trained_level_to_noise():
    sigmas = rising_grid(9)
    assert sigmas[0] == pytest.approx(0.001)
    assert sigmas[-1] == 1
    assert (sigmas.diff() > 0).all()
    with pytest.raises(InputError, match="steps must be at least 1"):
        rising_grid(0)
