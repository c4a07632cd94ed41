"""PCA against numpy's SVD, scipy's density and scikit-learn's probabilistic PCA."""

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.decomposition import PCA as Reference

from glp_lens.errors import InputError
from glp_lens.models.pca import PCA
from tests.unit.memory_store import MemoryStore

D = 11


def rows(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(D, D, generator=torch.Generator().manual_seed(5)) * torch.logspace(0.5, -0.8, D)[:, None]
    return torch.randn(n, D, generator=generator) @ mixing * torch.linspace(1, 6, D) + torch.arange(D) - 2.0


@pytest.fixture(scope="module")
def x():
    return rows(2003)


@pytest.fixture(scope="module")
def model(x):
    return PCA.fit(MemoryStore(x))


def standardized(x, y):
    return ((y.double() - x.double().mean(0)) / x.double().std(0, correction=0)).numpy()


def test_components_are_the_right_singular_vectors(model, x):
    _, s, vt = np.linalg.svd(standardized(x, x), full_matrices=False)
    np.testing.assert_allclose(model.explained_variance.numpy(), s**2 / (len(x) - 1), rtol=1e-4)
    np.testing.assert_allclose(np.abs((model.components.numpy() * vt).sum(1)), 1, atol=1e-4)


def test_features_are_uncorrelated_with_the_explained_variance(model, x):
    np.testing.assert_allclose(
        np.cov(model.encode(x).double().numpy(), rowvar=False),
        np.diag(model.explained_variance.double().numpy()),
        atol=1e-3,
    )


@pytest.mark.parametrize("k", [1, 4, D])
def test_reconstruction_is_the_truncated_svd(model, x, k):
    y = rows(13, seed=1)
    _, _, vt = np.linalg.svd(standardized(x, x), full_matrices=False)
    z = standardized(x, y) @ vt[:k].T @ vt[:k]
    expected = z * x.double().std(0, correction=0).numpy() + x.double().mean(0).numpy()
    np.testing.assert_allclose(model.reconstruct(y, k=k).numpy(), expected, atol=2e-2)
    assert torch.equal(model.project(y, k=k), model.reconstruct(y, k=k))


def test_default_rank_is_the_smallest_that_keeps_90_percent(model, x):
    share = np.cumsum(np.linalg.svd(standardized(x, x))[1] ** 2)
    share /= share[-1]
    assert share[model.k - 1] >= 0.9 > share[model.k - 2]
    assert 1 < model.k < D
    assert torch.equal(model.reconstruct(x[:5]), model.reconstruct(x[:5], k=model.k))


@pytest.mark.parametrize("k", [1, 5, D - 1])
def test_log_density_is_that_of_probabilistic_pca(model, x, k):
    """W W^T + s2 I from the eigenvalues, and scikit-learn's own implementation; both plus the Jacobian."""
    y = rows(29, seed=2)
    std = x.double().std(0, correction=0).numpy()
    lam, u = np.linalg.eigh(np.cov(standardized(x, x), rowvar=False))
    lam, u = lam[::-1], u[:, ::-1]
    noise = lam[k:].mean()
    c = u[:, :k] @ np.diag(lam[:k] - noise) @ u[:, :k].T + noise * np.eye(D)
    truth = multivariate_normal(np.zeros(D), c).logpdf(standardized(x, y)) - np.log(std).sum()
    np.testing.assert_allclose(model.score(y, k=k).numpy(), truth, rtol=1e-3)
    reference = Reference(k).fit(standardized(x, x)).score_samples(standardized(x, y)) - np.log(std).sum()
    np.testing.assert_allclose(model.score(y, k=k).numpy(), reference, rtol=1e-3)
    assert model.noise_variance(k) == pytest.approx(noise, rel=1e-3)


def test_reconstruction_score_is_the_squared_error(model):
    y = rows(13, seed=3)
    expected = -((y - model.reconstruct(y, k=3)) ** 2).sum(1)
    torch.testing.assert_close(model.score(y, method="reconstruction", k=3), expected)


def test_samples_follow_the_density(model, x):
    """The sample's covariance is that of the model: full variance along k directions, their mean beyond."""
    k = 4
    drawn = model.sample(200_000, k=k, generator=torch.Generator().manual_seed(1))
    scores = model.encode(drawn).double().numpy()
    expected = model.explained_variance.double().numpy().copy()
    expected[k:] = expected[k:].mean()
    np.testing.assert_allclose(np.cov(scores, rowvar=False), np.diag(expected), atol=0.02 * expected[0])
    np.testing.assert_allclose(np.var(scores, axis=0), expected, rtol=0.03)


def test_raw_units_without_standardizing(x):
    model = PCA.fit(MemoryStore(x), standardize=False, n_components=6)
    reference = Reference(6).fit(x.double().numpy())
    np.testing.assert_allclose(model.explained_variance.numpy(), reference.explained_variance_, rtol=1e-4)
    assert model.n_features == 6
    assert model.noise_variance(6) == pytest.approx(reference.noise_variance_, rel=1e-4)
    np.testing.assert_allclose(
        model.score(x[:9], k=6).numpy(), reference.score_samples(x[:9].double().numpy()), rtol=1e-3
    )


def test_fits_its_own_centre_when_rows_are_capped(x):
    model = PCA.fit(MemoryStore(x), max_rows=300)
    assert model.provenance["training"]["rows_seen"] == 300
    used = MemoryStore(x).sample(300, 0)
    torch.testing.assert_close(model.mean, used.mean(0), rtol=1e-4, atol=1e-4)


def test_a_constant_dimension_does_no_harm(x):
    still = torch.cat([x, torch.full((len(x), 1), 3.5)], 1)
    with pytest.warns(UserWarning, match="1 of 12 activation dimensions are constant") as caught:
        model = PCA.fit(MemoryStore(still))
    assert [warning.filename for warning in caught] == [__file__]
    assert torch.isfinite(model.score(still, k=D + 1)).all()
    torch.testing.assert_close(model.reconstruct(still)[:, -1], still[:, -1])


@pytest.mark.parametrize(
    "options", [{"n_components": D + 1}, {"n_components": 0}, {"keep_variance": 0.0}, {"max_rows": 1}]
)
def test_refuses_settings_that_cannot_be(x, options):
    with pytest.raises(InputError, match=r"n_components|keep_variance|rows"):
        PCA.fit(MemoryStore(x), **options)


def test_refuses_a_rank_or_method_it_does_not_have(x):
    model = PCA.fit(MemoryStore(x), n_components=5)
    for k in (0, 6):
        with pytest.raises(InputError, match="k must be between 1 and 5"):
            model.reconstruct(x[:3], k=k)
    with pytest.raises(InputError, match="method"):
        model.score(x[:3], method="bayes")
