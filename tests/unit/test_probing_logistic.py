"""The logistic regression at its optimum, against scikit-learn's with a tight tolerance and against closed forms."""

import numpy as np
import pytest
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from glp_lens.evals.probing import dense, logistic, sparse

PENALTIES = sparse.PENALTIES


def rows(kind, seed=0):
    """Rows and labels that are hard in one way."""
    rng = np.random.default_rng(seed)
    n, k = {"few rows": (13, 4), "more features than rows": (37, 53)}.get(kind, (211, 6))
    y = rng.permutation(np.arange(n) % 2 if kind != "unbalanced" else (np.arange(n) < 5).astype(int))
    x = rng.standard_normal((n, k)) + 0.5 * y[:, None] * rng.normal(0, 1, k)
    if kind == "separable":
        x[:, 2] += 8 * y
    if kind == "constant features":
        x[:, [1, 4]] = 7, 0
    if kind == "features of scale 1000":
        x = 1000 * x + 3000
    if kind == "unequal scales":
        x *= np.logspace(-6, 3, k)
    if kind == "equal features":
        x[:, 3] = x[:, 0]
    if kind == "spikes":
        x = np.where(rng.random(x.shape) < 0.02, 300 * np.abs(x), 1e-9 * x)
    return x, y


KINDS = [
    "plain", "separable", "unbalanced", "constant features", "features of scale 1000", "unequal scales",
    "equal features", "spikes", "few rows", "more features than rows",
]  # fmt: skip


def fit(x, y, centre=None):
    """Weights and intercepts for rows as they are, by penalty."""
    centre = x.mean(0) if centre is None else centre
    found = logistic.Regression(x, y, centre).path(PENALTIES)
    return found[:, :-1], found[:, -1] - found[:, :-1] @ centre


@pytest.mark.parametrize("kind", KINDS)
def test_is_the_optimum_of_scikit_learn_for_every_penalty(kind):
    x, y = rows(kind)
    new = rows(kind, seed=1)[0]
    weights, intercepts = fit(x, y)
    for c, w, b in zip(PENALTIES, weights, intercepts, strict=True):
        # Newton's method there too, since lbfgs stops early on these; on moved rows, which have the same weights.
        theirs = LogisticRegression(C=c, solver="newton-cholesky", tol=1e-13, max_iter=1000)
        theirs.fit(x - x.mean(0), y)
        for part in (x, new):
            expected = theirs.predict_proba(part - x.mean(0))[:, 1]
            found = expit(part @ w + b)
            np.testing.assert_allclose(found, expected, atol=2e-6, err_msg=f"C={c}")
            clear = np.abs(expected - 0.5) > 1e-5
            assert ((found > 0.5) == (expected > 0.5))[clear].all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_slope_is_zero(kind):
    x, y = rows(kind)
    for c, w, b in zip(PENALTIES, *fit(x, y), strict=True):
        wrong = expit(x @ w + b) - y
        size = np.abs(x).T @ np.abs(wrong) + np.abs(w) / c + 1e-9
        # The last digits of w x + b change the residuals of separable rows at weak penalties, hence the share.
        assert (np.abs(x.T @ wrong + w / c) / size).max() < 1e-3
        assert abs(wrong.sum()) < 1e-5


def test_a_strong_penalty_leaves_the_step_of_the_base_rate():
    """As C goes to 0, w = C sum_i (y_i - p) x_i, with p the share of class 1."""
    x, y = rows("unbalanced")
    weights, intercepts = fit(x, y)
    p, c = y.mean(), PENALTIES[-1]
    expected = c * (x.T @ (y - p))
    np.testing.assert_allclose(weights[-1], expected, atol=1e-3 * np.abs(expected).max())
    assert intercepts[-1] == pytest.approx(np.log(p / (1 - p)), abs=1e-3)


def test_the_centre_changes_nothing():
    x, y = rows("plain")
    for found, expected in zip(fit(x, y), fit(x, y, np.full(6, 2.5)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-9)


def test_starts_anywhere():
    x, y = rows("separable")
    found = logistic.Regression(x, y, x.mean(0))
    expected = found.path(PENALTIES)
    for c, optimum in zip(PENALTIES, expected, strict=True):
        for start in ([300.0, -200, 5, 0, 40, 7, -90], [0.0, 0, 900, 0, 0, 0, 0]):
            np.testing.assert_allclose(found.optimum(c, [np.array(start)]), optimum, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("penalties", [dense.PENALTIES, (0.03, 1.0, 3e-4)], ids=["rising", "mixed"])
@pytest.mark.parametrize("kind", KINDS)
def test_regressions_at_once_are_each_the_optimum_of_scikit_learn_on_standardised_rows(kind, penalties):
    x, y = rows(kind)
    new = rows(kind, seed=1)[0]
    odd = np.flatnonzero(np.arange(len(y)) % 3)
    parts = [odd if len(np.unique(y[odd])) == 2 else np.arange(len(y)), np.arange(len(y))[::-1], np.argsort(y)[2:]]
    found = logistic.standardised(x, y, parts, penalties)
    assert found.shape == (3, len(penalties), x.shape[1] + 1)
    for part, fits in zip(parts, found, strict=True):
        scaler = StandardScaler().fit(x[part])
        for c, fit_ in zip(penalties, fits, strict=True):
            theirs = LogisticRegression(C=c, solver="newton-cholesky", tol=1e-13, max_iter=1000)
            theirs.fit(scaler.transform(x[part]), y[part])
            for those in (x[part], new):
                expected = theirs.predict_proba(scaler.transform(those))[:, 1]
                np.testing.assert_allclose(expit(those @ fit_[:-1] + fit_[-1]), expected, atol=1e-5, err_msg=f"C={c}")


def test_regressions_at_once_start_anywhere():
    x, y = rows("separable")
    parts, penalties = [np.arange(len(y)), np.arange(30, len(y))], (1.0, 1e-2)
    expected = logistic.standardised(x, y, parts, penalties)
    for start in ([300.0, -200, 5, 0, 40, 7, -90], [0.0, 0, 900, 0, 0, 0, 0]):
        starts = np.tile(np.array(start), (2, 2, 1))
        found = logistic.standardised(x, y, parts, penalties, starts)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert (starts == start).all()
