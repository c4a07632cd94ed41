"""Flow, projection and regression on Gaussian data of known covariance, where each has a closed form, in float64."""

import numpy as np
import pytest
import torch

from glp_lens.flow.path import interpolate, velocity_target
from glp_lens.flow.schedule import path_from_sigma
from glp_lens.flow.solvers import integrate
from glp_lens.models.gaussian import Gaussian

D = 5
AXES = np.linalg.qr(np.random.default_rng(1).normal(size=(D, D)))[0]
VARIANCES = np.array([2.9, 1.4, 0.5, 0.15, 0.05])
COVARIANCE = AXES * VARIANCES @ AXES.T


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def matrix_function(function):
    """Of the covariance."""
    return AXES * function(VARIANCES) @ AXES.T


def velocity(z, s):
    """`cov(eps - x, z) cov(z)^-1 z`."""
    noised = (1 - s) ** 2 * COVARIANCE + s**2 * np.eye(D)
    return z @ torch.from_numpy(np.linalg.solve(noised, s * np.eye(D) - (1 - s) * COVARIANCE))


def even(start, steps):
    return torch.linspace(start, 0, steps + 1, dtype=torch.float64)


def test_noise_flows_to_its_product_with_the_symmetric_root():
    """Row by row, not only in the moments; and with the covariance of the data, then."""
    eps = numbers(6, D)
    got = integrate(velocity, torch.from_numpy(eps), even(1.0, 800), "heun").numpy()
    np.testing.assert_allclose(got, eps @ matrix_function(np.sqrt), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("sigma", [0.3, 0.7])
def test_projection_flows_along_the_ratio_of_the_marginals(sigma):
    """From `z` at sigma to `z sqrt(v / ((1 - sigma)^2 v + sigma^2))` in a direction of variance v."""
    x, eps = numbers(6, D), numbers(6, D, seed=1)
    z = (1 - sigma) * x + sigma * eps
    got = integrate(velocity, torch.from_numpy(z), even(sigma, 800), "heun").numpy()
    want = z @ matrix_function(lambda v: np.sqrt(v / ((1 - sigma) ** 2 * v + sigma**2)))
    np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("sigma", [0.2, 0.5, 0.9])
def test_one_step_of_projection_is_the_posterior_mean(sigma):
    """By precisions, and by the Gaussian model's projection of the row that was noised."""
    z = numbers(6, D)
    path = path_from_sigma(sigma, 1).double()
    assert len(path) == 2
    got = integrate(velocity, torch.from_numpy(z), path).numpy()
    tau2 = float(path[0] / (1 - path[0])) ** 2
    precision = np.linalg.inv(COVARIANCE) + np.eye(D) / tau2
    want = np.linalg.solve(precision, (z / (1 - float(path[0]))).T).T / tau2
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)
    model = Gaussian(torch.zeros(D), torch.ones(D), torch.from_numpy(VARIANCES).float(), torch.from_numpy(AXES).float())
    noised = torch.from_numpy(z / (1 - sigma)).float()
    np.testing.assert_allclose(model.project(noised, sigma=sigma).numpy(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sigma", [0.1, 0.6])
def test_regression_on_a_large_sample_finds_the_velocity(sigma):
    """Least squares of `eps - x` on `z`: what training does, of a linear denoiser. Ten standard errors."""
    n = 400_000
    x = torch.from_numpy(numbers(n, D) @ matrix_function(np.sqrt))
    eps = torch.from_numpy(numbers(n, D, seed=1))
    z = interpolate(x, eps, sigma)
    found = torch.linalg.lstsq(z, velocity_target(x, eps)).solution
    torch.testing.assert_close(found, velocity(torch.eye(D, dtype=torch.float64), sigma), rtol=0, atol=0.1)
    residual = float((velocity_target(x, eps) - velocity(z, sigma)).square().mean())
    optimal = float(np.mean(VARIANCES / ((1 - sigma) ** 2 * VARIANCES + sigma**2)))
    assert residual == pytest.approx(optimal, rel=0.005)
