"""Guided flows against closed forms of Gaussian data, and the prior's guidance, conditions and gradients."""

import math

import pytest
import torch

from glp_lens.errors import InputError
from glp_lens.flow.guidance import Guide, classifier_free, classifier_guided
from glp_lens.flow.schedule import path_from_sigma
from glp_lens.flow.solvers import integrate
from glp_lens.models import batching
from glp_lens.models.denoiser import Denoiser, DenoiserConfig
from glp_lens.models.glp import GLP
from tests.conformance import MODES

D, WIDTH = 5, 3
VARIANCES = torch.tensor([2.9, 1.4, 0.5, 0.15, 0.05], dtype=torch.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


AXES = torch.linalg.qr(normal(D, D, seed=7))[0]
COVARIANCE = AXES * VARIANCES @ AXES.T
TILT = normal(D, seed=8)


def gaussian_velocity(mean):
    """`E[eps - x | z]` for data N(mean, COVARIANCE)."""

    def velocity(z, s):
        slope = (s - (1 - s) * VARIANCES) / ((1 - s) ** 2 * VARIANCES + s**2)
        return (z - (1 - s) * mean) @ AXES * slope @ AXES.T - mean

    return velocity


def root(variances):
    return AXES * variances.sqrt() @ AXES.T


CENTRED = gaussian_velocity(torch.zeros(D, dtype=torch.float64))


# -- velocities ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0, 3.0])
def test_classifier_free_guidance_moves_the_mean_by_its_weight(weight):
    """Data of one covariance and two means: the guided flow is that of the mean `m_0 + weight (m_1 - m_0)`."""
    with_it, without = normal(D, seed=1), normal(D, seed=2)
    velocity = classifier_free(gaussian_velocity(with_it), gaussian_velocity(without), weight)
    eps = normal(7, D)
    got = integrate(velocity, eps, path_from_sigma(1.0, 400).double(), "heun")
    want = without + weight * (with_it - without) + eps @ root(VARIANCES)
    torch.testing.assert_close(got, want, rtol=0, atol=5e-3)


@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_classifier_guidance_by_a_linear_score_draws_from_the_tilted_gaussian(scale):
    """`p(x) exp(scale a.x)` is a Gaussian of mean `scale C a` and the same covariance; checked draw by draw."""
    velocity = classifier_guided(CENTRED, lambda x: x @ TILT, scale, largest_level=1 - 1e-4)
    eps = normal(7, D)
    got = integrate(velocity, eps, path_from_sigma(1.0, 400).double(), "heun")
    torch.testing.assert_close(got, scale * COVARIANCE @ TILT + eps @ root(VARIANCES), rtol=0, atol=5e-3)


def test_the_gradient_of_a_lower_level_stands_in_near_noise_with_a_small_error():
    velocity = classifier_guided(CENTRED, lambda x: x @ TILT)
    eps = normal(7, D)
    got = integrate(velocity, eps, path_from_sigma(1.0, 400).double(), "heun")
    shift = got - eps @ root(VARIANCES)
    want = (COVARIANCE @ TILT).expand_as(shift)
    assert float((shift - want).norm() / want.norm()) < 0.05


def test_guided_projection_goes_to_the_tilted_gaussian():
    """From `z` at sigma, the flow of N(m, C) ends at `m + (z - (1 - sigma) m) C^(1/2) C_sigma^(-1/2)`."""
    sigma, z, mean = 0.6, normal(7, D), COVARIANCE @ TILT
    velocity = classifier_guided(CENTRED, lambda x: x @ TILT)
    got = integrate(velocity, z, path_from_sigma(sigma, 600).double(), "heun")
    noised = (1 - sigma) ** 2 * VARIANCES + sigma**2
    want = mean + (z - (1 - sigma) * mean) @ root(VARIANCES / noised)
    torch.testing.assert_close(got, want, rtol=0, atol=5e-3)


def test_one_rows_guidance_does_not_depend_on_the_others():
    velocity = classifier_guided(CENTRED, lambda x: (x @ TILT).sin())
    z = normal(6, D)
    torch.testing.assert_close(velocity(z, 0.4)[2:3], velocity(z[2:3], 0.4))


@pytest.mark.parametrize(
    ("score", "words"),
    [
        (lambda x: x, r"shape \(4,\), got \(4, 5\)"),
        (lambda x: x.sum(), r"shape \(4,\), got \(\)"),
        (lambda x: 1.0, "got float"),
        (lambda x: x.detach().sum(1), "no gradient"),
        (lambda x: torch.ones(len(x), requires_grad=True), "no gradient with respect to the rows"),
        (lambda x: x.sum(1).sub(100).sqrt(), "not finite"),
        (lambda x: x.sum(1).mul(0).sqrt(), "not finite"),
    ],
)
def test_scores_that_cannot_guide_are_refused(score, words):
    with pytest.raises(InputError, match=words):
        classifier_guided(CENTRED, score)(normal(4, D), 0.5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"guidance": 2.0}, "pass condition too"),
        ({"condition": torch.ones(WIDTH), "guidance": math.nan}, "guidance must be a finite number"),
        ({"classifier_scale": math.inf}, "classifier_scale must be a finite number"),
    ],
)
def test_guides_without_meaning_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        Guide(**options)


# -- the prior -------------------------------------------------------------------------------------------------


def prior(d_condition=WIDTH):
    """Random weights, of float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        denoiser = Denoiser(DenoiserConfig(D, 11, 18, 2, d_condition=d_condition))
    return GLP(denoiser, torch.arange(D) - 1.5, torch.linspace(0.3, 4, D))


def rows(n, seed=0):
    return normal(n, D, seed=seed).float() * 2


def linear(x):
    return x @ TILT.float() / 4


CONDITION = torch.tensor([0.5, -1.0, 2.0])


def test_guidance_of_one_step_is_linear_in_its_weight():
    """One step ends at the mean that the model expects, whose guided value lies on the line through two others."""
    glp, draw = prior(), {"steps": 1, "noise": rows(7)}
    without, with_it = glp.sample(7, **draw), glp.sample(7, condition=CONDITION, **draw)
    assert (without - with_it).abs().max() > 0.01
    assert torch.equal(glp.sample(7, condition=CONDITION, guidance=0.0, **draw), without)
    torch.testing.assert_close(
        glp.sample(7, condition=CONDITION, guidance=2.5, **draw), without + 2.5 * (with_it - without)
    )


def uses(glp, n, **options):
    """Everything that takes a condition."""
    x, z = rows(n), rows(n, seed=1)
    return {
        "velocity": glp.velocity(z, 0.4, **options),
        "encode": glp.encode(x, **options),
        "project": glp.project(x, **options),
        "sample": glp.sample(n, **options),
        "score": glp.score(x, **options),
        "ode": glp.score(x, method="ode", steps=3, **options),
    }


def test_a_shared_condition_is_that_of_every_row_and_nan_is_none():
    glp = prior()
    each = CONDITION.repeat(9, 1)
    each[4] = torch.nan
    none, shared, mixed = uses(glp, 9), uses(glp, 9, condition=CONDITION), uses(glp, 9, condition=each)
    for name, got in mixed.items():
        torch.testing.assert_close(got[4], none[name][4], msg=name)
        torch.testing.assert_close(got[:4], shared[name][:4], msg=name)
        assert not torch.allclose(got[:4], none[name][:4]), name


def test_batches_do_not_show(monkeypatch):
    glp = prior()
    options = {"condition": normal(11, WIDTH).float(), "guidance": 2.0, "classifier": linear}

    def everything():
        return [
            glp.sample(11, **options),
            glp.project(rows(11), **options),
            *uses(glp, 11, condition=options["condition"]).values(),
            *glp.log_density(rows(11), probes=3, steps=3, generator=generator(1)),
        ]

    whole = everything()
    monkeypatch.setattr(batching, "ROWS", 4)
    for got, want in zip(everything(), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_no_rows_and_one_probe(recwarn):
    glp = prior()
    assert glp.score(torch.empty(0, D), method="ode").shape == (0,)
    assert glp.sample(0, condition=CONDITION, guidance=2.0, classifier=linear).shape == (0, D)
    one = glp.log_density(rows(4), steps=3, noise=rows(4, seed=1), probes=1)
    assert one.value.isfinite().all()
    assert one.error.isnan().all()
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]


def test_a_classifier_raises_its_own_score_of_draws_and_projections():
    glp = prior(None)
    x = rows(40)
    for make in (lambda **o: glp.sample(40, **o), lambda **o: glp.project(x, u=0.3, **o)):
        scores = [
            float(linear(make(classifier=linear, classifier_scale=s, generator=generator(1))).mean())
            for s in (-0.5, 0.0, 0.5)
        ]
        assert scores[0] < scores[1] < scores[2]
        unguided = float(linear(make(generator=generator(1))).mean())
        assert scores[1] == pytest.approx(unguided, abs=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_classifiers_guide_where_gradients_are_off(mode):
    """Language models generate in inference mode."""
    glp, x = prior(), rows(7)
    options = {"condition": CONDITION, "guidance": 2.0, "classifier": linear}
    want = glp.project(x, **options)
    with mode():
        got = glp.project(x.clone(), **options)
    torch.testing.assert_close(got, want)
    assert not want.requires_grad


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda g: prior(None).sample(3, condition=CONDITION), "without a condition: leave condition out"),
        (lambda g: g.sample(3, condition=torch.ones(WIDTH + 1)), r"shape \(3,\) or \(n, 3\), got \(4,\)"),
        (lambda g: g.project(rows(3), condition=torch.ones(2, WIDTH)), "each of 3 rows, got 2"),
        (lambda g: g.encode(rows(3), condition=CONDITION * math.inf), "finite condition"),
        (lambda g: g.sample(3, guidance=2.0), "pass condition too"),
        (lambda g: g.project(rows(3), classifier=lambda x: x), r"shape \(3,\), got \(3, 5\)"),
        (lambda g: g.score(rows(3), method="exact"), "method must be one of denoising, ode"),
        (lambda g: g.score(rows(3), method="ode", probes=-1), "probes must be 0"),
        (lambda g: g.score(rows(3), method="ode", steps=0), "steps must be at least 1"),
    ],
)
def test_bad_arguments_are_refused(call, words):
    with pytest.raises(InputError, match=words):
        call(prior())


# -- gradients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"u": 0.4},
        {"sigma": 0.3, "solver": "heun"},
        {"condition": CONDITION, "guidance": 2.0},
        {"classifier": lambda x: (x @ TILT.float()).sin()},
    ],
    ids=["euler", "heun", "condition", "classifier"],
)
def test_gradients_of_projection_are_central_differences(options):
    glp = prior()
    noise, toward, along = rows(3, seed=1) / 2, rows(3, seed=2), rows(3, seed=3) / 4

    def value(x):
        return (glp.project(x, noise=noise, steps=6, differentiable=True, **options) * toward).sum()

    x = rows(3).requires_grad_()
    (gradient,) = torch.autograd.grad(value(x), x)
    h = 0.02
    with torch.no_grad():
        want = (value(x + h * along) - value(x - h * along)) / (2 * h)
    assert float((gradient * along).sum()) == pytest.approx(float(want), rel=5e-3, abs=5e-3)


def test_rows_get_gradients_of_their_own_result_only():
    glp = prior()
    x = rows(4).requires_grad_()
    glp.project(x, differentiable=True)[1].sum().backward()
    assert (x.grad[1] != 0).all()
    assert not x.grad[[0, 2, 3]].any()


def test_recomputing_gives_the_same_gradient():
    glp = prior()
    x = rows(4).requires_grad_()
    options = {"condition": CONDITION, "classifier": linear, "steps": 5, "differentiable": True}
    (kept,) = torch.autograd.grad(glp.project(x, **options).square().sum(), x)
    glp.denoiser.recompute = True
    (again,) = torch.autograd.grad(glp.project(x, **options).square().sum(), x)
    torch.testing.assert_close(again, kept)


def test_only_a_differentiable_projection_keeps_a_graph():
    glp, x = prior(), rows(4).requires_grad_()
    for result in (glp.project(x), glp.project(x, sigma=0.0), glp.encode(x), glp.score(x), glp.score(x, method="ode")):
        assert not result.requires_grad
    assert torch.equal(glp.project(x, differentiable=True).detach(), glp.project(x))
    glp.project(x, sigma=0.0, differentiable=True).sum().backward()
    assert torch.equal(x.grad, torch.ones(4, D))


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_of_a_plain_call_unless_the_caller_turned_them_off(mode):
    glp, options = prior(), {"condition": CONDITION, "classifier": linear, "differentiable": True}
    x = rows(4).requires_grad_()
    want = glp.project(x, **options)
    with MODES[mode]():
        wanted = torch.is_grad_enabled()
        got = glp.project(x, **options)
    assert torch.equal(got, want)
    assert got.requires_grad is wanted
    if wanted:
        gradients = [torch.autograd.grad(result.square().sum(), x)[0] for result in (got, want)]
        assert torch.equal(*gradients)


def test_weights_get_gradients_only_if_they_ask():
    glp, x = prior(), rows(4).requires_grad_()
    glp.project(x, differentiable=True).sum().backward()
    assert all(p.grad is None for p in glp.denoiser.parameters())
    glp.denoiser.requires_grad_(True)
    glp.project(x, differentiable=True).sum().backward()
    assert glp.denoiser.out_proj.weight.grad.any()
