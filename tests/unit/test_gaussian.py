"""The Gaussian against numpy, scipy, numerical integration, Monte Carlo and an ODE solver."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad, solve_ivp
from scipy.stats import multivariate_normal

from glp_lens.errors import InputError
from glp_lens.models.gaussian import Gaussian
from tests.unit.memory_store import MemoryStore

D = 7


def rows(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(D, D, generator=torch.Generator().manual_seed(5))
    return torch.randn(n, D, generator=generator) @ mixing * 4 + torch.arange(D) - 2.0


@pytest.fixture(scope="module")
def x():
    return rows(5003)


@pytest.fixture(scope="module")
def model(x):
    return Gaussian.fit(MemoryStore(x))


def covariance(model, x):
    """Of standardised rows, by numpy."""
    z = ((x.double() - x.double().mean(0)) / x.double().std(0, correction=0)).numpy()
    return np.cov(z, rowvar=False, bias=True)


def test_eigenvalues_are_those_of_the_correlation_matrix(model, x):
    values = np.linalg.eigvalsh(np.corrcoef(x.double().numpy(), rowvar=False))[::-1]
    np.testing.assert_allclose(model.eigenvalues.numpy(), values, rtol=1e-5)


def test_log_density_is_scipys(model, x):
    y = rows(31, seed=2)
    truth = multivariate_normal(x.double().mean(0), np.cov(x.double().numpy(), rowvar=False, bias=True))
    np.testing.assert_allclose(model.score(y).numpy(), truth.logpdf(y.double().numpy()), rtol=1e-4)


def test_diagonal_log_density_is_scipys(x):
    y = rows(31, seed=2)
    truth = multivariate_normal(x.double().mean(0), np.diag(x.double().var(0, correction=0)))
    model = Gaussian.fit(MemoryStore(x), diagonal=True)
    np.testing.assert_allclose(model.score(y).numpy(), truth.logpdf(y.double().numpy()), rtol=1e-5)


def test_features_are_white(model, x):
    f = model.encode(x).double().numpy()
    np.testing.assert_allclose(np.cov(f, rowvar=False, bias=True), np.eye(D), atol=1e-4)
    np.testing.assert_allclose(f.mean(0), 0, atol=1e-4)


def test_samples_have_the_datas_mean_and_covariance(model, x):
    drawn = model.sample(200_000, generator=torch.Generator().manual_seed(1)).double().numpy()
    truth = np.cov(x.double().numpy(), rowvar=False, bias=True)
    np.testing.assert_allclose(np.cov(drawn, rowvar=False), truth, atol=0.02 * np.diag(truth).max())
    np.testing.assert_allclose(drawn.mean(0), x.double().mean(0), atol=0.02 * math.sqrt(np.diag(truth).max()))


@pytest.mark.parametrize("sigma", [0.1, 0.5, 0.9])
def test_velocity_is_the_regression_on_noised_rows(model, x, sigma):
    """`E[eps - x | z]` of joint Gaussians is linear: cov(eps - x, z) cov(z)^-1 z, from the blocks."""
    c = covariance(model, x)
    noised = (1 - sigma) ** 2 * c + sigma**2 * np.eye(D)
    slope = (sigma * np.eye(D) - (1 - sigma) * c) @ np.linalg.inv(noised)
    z = torch.randn(11, D, generator=torch.Generator().manual_seed(3))
    np.testing.assert_allclose(model.velocity(z, sigma).numpy(), z.numpy() @ slope.T, rtol=1e-3, atol=1e-3)


def test_velocity_at_the_ends(model):
    z = torch.randn(11, D, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(model.velocity(z, 0.0), -z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.velocity(z, 1.0), z, rtol=1e-4, atol=1e-5)


def test_sampling_solves_the_flow_ode(model):
    noise = torch.randn(1, D, generator=torch.Generator().manual_seed(4))

    def field(sigma, z):
        return model.velocity(torch.tensor(z, dtype=torch.float32)[None], float(sigma))[0].double().numpy()

    end = solve_ivp(field, (1.0, 0.0), noise[0].double().numpy(), rtol=1e-6, atol=1e-6).y[:, -1]
    drawn = model.normalize(model.sample(1, noise=noise))[0]
    np.testing.assert_allclose(end, drawn.numpy(), atol=2e-3)


@pytest.mark.parametrize("sigma", [0.05, 0.5, 0.95])
def test_optimal_loss_is_the_loss_of_the_velocity(model, sigma):
    n = 200_000
    generator = torch.Generator().manual_seed(6)
    z = model.normalize(model.sample(n, generator=generator))
    eps = torch.randn(n, D, generator=generator)
    error = (model.velocity((1 - sigma) * z + sigma * eps, sigma) - (eps - z)).square().mean(1)
    loss, spread = float(error.double().mean()), float(error.double().std()) / math.sqrt(n)
    assert abs(loss - model.optimal_loss(sigma)) < 4 * spread


def test_mean_optimal_loss_is_its_integral(model):
    integral, _ = quad(model.optimal_loss, 0, 1)
    assert model.optimal_loss_mean() == pytest.approx(integral, rel=1e-7)


def test_mean_optimal_loss_of_independent_dimensions_is_half_pi(x):
    assert Gaussian.fit(MemoryStore(x), diagonal=True).optimal_loss_mean() == pytest.approx(math.pi / 2)


@pytest.mark.parametrize("sigma", [0.2, 0.5, 0.8])
def test_projection_is_the_posterior_mean(model, x, sigma):
    """(C^-1 + I / tau^2)^-1 z / tau^2, the textbook form by precisions."""
    c, tau = covariance(model, x), sigma / (1 - sigma)
    y = rows(9, seed=8)
    z = model.normalize(y).double().numpy()
    posterior = z @ np.linalg.inv(np.linalg.inv(c) + np.eye(D) / tau**2) / tau**2
    np.testing.assert_allclose(model.normalize(model.project(y, sigma=sigma)).numpy(), posterior, atol=1e-3)


def test_projection_strength_runs_from_identity_to_mean(model):
    y = rows(9, seed=8)
    assert torch.equal(model.project(y, sigma=0.0), y)
    torch.testing.assert_close(model.project(y, sigma=1.0), model.mean.expand(9, D))
    with pytest.raises(InputError, match="sigma"):
        model.project(y, sigma=1.5)


def test_max_rows_limits_what_is_read(x):
    model = Gaussian.fit(MemoryStore(x), max_rows=4500)
    assert model.provenance["training"]["rows_seen"] == 4500
    full = Gaussian.fit(MemoryStore(x))
    assert not torch.equal(model.eigenvalues, full.eigenvalues)
    torch.testing.assert_close(model.eigenvalues, full.eigenvalues, rtol=0.1, atol=0.02)


@pytest.mark.parametrize("diagonal", [True, False])
def test_a_constant_dimension_does_no_harm(x, diagonal):
    still = torch.cat([x, torch.full((len(x), 1), 3.5)], 1)
    model = Gaussian.fit(MemoryStore(still), diagonal=diagonal)
    assert torch.isfinite(model.score(still)).all()
    torch.testing.assert_close(model.project(still, sigma=0.5)[:, -1], still[:, -1])


def test_one_row_is_too_few(x):
    with pytest.raises(InputError, match="at least 2 rows"):
        Gaussian.fit(MemoryStore(x[:1]))
