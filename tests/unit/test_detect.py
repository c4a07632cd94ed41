"""Detection: measures against scikit-learn, thresholds by simulation, scores against closed forms."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from scipy.stats import beta, f, multivariate_normal
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from glp_lens.artifacts import ActivationModel
from glp_lens.errors import InputError
from glp_lens.evals.detect import DetectSettings, conformal_p, conformal_threshold, denoising_errors, match_lengths
from glp_lens.evals.detect.detectors import fitted, nearest, pooled, probe, score_tokens
from glp_lens.evals.detect.measures import Separation, bounded
from glp_lens.evals.detect.reading import Tokens
from glp_lens.evals.detect.tasks import of_texts, shuffled
from glp_lens.evals.entries import Entry
from glp_lens.evals.statistics import resampling
from glp_lens.models.gaussian import Gaussian


def texts_of(lengths, start):
    """Token ids: BOS, then numbers that say which text they are of."""
    return [[0, *range(start + 100 * i, start + 100 * i + n - 1)] for i, n in enumerate(lengths)]


def test_lengths_match_exactly_though_the_classes_differ_in_length():
    rng = np.random.default_rng(0)
    normal = texts_of(rng.integers(2, 30, 90), 1_000)
    odd = texts_of(rng.integers(10, 60, 41), 1_000_000)
    (first, second), others = match_lengths(normal, odd, normals=2, most=33, seed=0)
    lengths = [list(map(len, side)) for side in (first, second, others)]
    assert lengths[0] == lengths[1] == lengths[2]
    assert len(others) == 33
    assert min(lengths[0]) >= 4
    originals = {tuple(text) for text in normal}
    for text in first + second:
        assert sum(tuple(text) == whole[: len(text)] for whole in originals) >= 1  # cut on the right, nothing else
    own = [text[1] for text in first + second]
    assert len(set(own)) == len(own)  # no text in two places


def test_matching_cuts_less_than_pairing_at_random():
    lengths = np.random.default_rng(1).integers(4, 60, 50)
    (kept,), _ = match_lengths(texts_of(lengths, 1), texts_of(lengths[::-1], 10**6), normals=1, most=99, seed=3)
    assert sum(map(len, kept)) == lengths.sum()  # equal distributions lose nothing
    shorter = np.minimum(lengths, np.random.default_rng(2).permutation(lengths)).sum()
    assert shorter < 0.8 * lengths.sum()


def test_too_few_texts_give_fewer_groups_and_the_seed_draws_them():
    normal, odd = texts_of([9] * 11, 1), texts_of([5] * 20, 10**6)
    (a, b), others = match_lengths(normal, odd, normals=2, most=100, seed=0)
    assert len(a) == len(b) == len(others) == 5
    assert match_lengths(normal, odd, normals=2, most=100, seed=0) == ([a, b], others)
    assert match_lengths(normal, odd, normals=2, most=100, seed=1) != ([a, b], others)
    assert match_lengths([[0, 1]], odd, normals=1, most=5, seed=0) == ([[]], [])


def scores_with_ties(n, m, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(0, 1, n).round(1), rng.normal(0.7, 1.3, m).round(1)


def test_measures_agree_with_scikit_learn_ties_included():
    normal, odd = scores_with_ties(130, 130)
    labels, scores = np.repeat([0, 1], 130), np.concatenate([normal, odd])
    found = Separation(normal, odd, np.ones((1, 130)), np.ones((1, 130)))
    assert found.auroc()[0] == pytest.approx(roc_auc_score(labels, scores))
    assert found.auprc()[0] == pytest.approx(average_precision_score(labels, scores))
    false, true, _ = roc_curve(labels, scores, drop_intermediate=False)
    for rate in (0.0, 0.01, 0.05, 0.5):
        assert found.tpr_at(rate)[0] == pytest.approx(true[false <= rate].max())


def test_weights_count_texts_as_often_as_they_say():
    normal, odd = scores_with_ties(37, 29, seed=1)
    rng = np.random.default_rng(2)
    weights = rng.integers(0, 4, (3, 37)).astype(float), rng.integers(0, 4, (3, 29)).astype(float)
    found = Separation(normal, odd, *weights)
    for i in range(3):
        balance = np.concatenate([weights[0][i] / weights[0][i].sum(), weights[1][i] / weights[1][i].sum()])
        labels, scores = np.repeat([0, 1], [37, 29]), np.concatenate([normal, odd])
        assert found.auroc()[i] == pytest.approx(roc_auc_score(labels, scores, sample_weight=balance))
        assert found.auprc()[i] == pytest.approx(average_precision_score(labels, scores, sample_weight=balance))


def test_perfect_separation_has_an_interval_all_the_same():
    normal, odd = np.arange(20.0), np.arange(30.0, 50.0)
    found = Separation(normal, odd, resampling(20), resampling(20, seed=1))
    interval = bounded(found.tpr_at(0.01), 40, 20)
    assert interval.value == interval.ci_high == 1
    assert 0.75 < interval.ci_low < 0.95


@pytest.mark.parametrize("digits", [8, 0], ids=["continuous", "many ties"])
@pytest.mark.parametrize(("n", "rate"), [(37, 0.1), (99, 0.01), (20, 0.2)])
def test_thresholds_keep_their_promise_whatever_the_number_of_texts(n, rate, digits):
    """By simulation; without ties the rate is also not far below, and scatters as theory says."""
    rng = np.random.default_rng(0)
    draws = rng.gumbel(size=(4000, n + 50)).round(digits)
    rates = np.array([(row[n:] > conformal_threshold(row[:n], rate)).mean() for row in draws])
    error = rates.std() / np.sqrt(len(rates))
    assert rates.mean() <= rate + 3 * error
    if digits:
        above = int(rate * (n + 1) + 1e-9)
        assert rates.mean() == pytest.approx(above / (n + 1), abs=4 * error)
        spread = beta(above, n + 1 - above).var() + rate * (1 - rate) / 50
        assert rates.var() == pytest.approx(spread, rel=0.15)


@pytest.mark.parametrize("slope", [1.0, 10.0, 100.0])
def test_texts_that_pair_up_in_length_keep_the_promise_too(slope):
    """Scores that grow with length: a text of each length sets the threshold, and another one is tested."""
    rng, n, rate = np.random.default_rng(1), 60, 0.1
    by_length = slope * np.arange(n) / n
    known, new = (by_length + rng.gumbel(size=(3000, n)) for _ in range(2))
    rates = np.array([(b > conformal_threshold(a, rate)).mean() for a, b in zip(known, new, strict=True)])
    assert rates.mean() <= rate + 3 * rates.std() / np.sqrt(len(rates))
    assert rates.var() < beta(6, 55).var() + rate * (1 - rate) / n


def test_a_rate_that_the_texts_cannot_hold_flags_nothing():
    assert conformal_threshold(np.arange(50), 0.01) == np.inf
    assert conformal_threshold(np.arange(99), 0.01) == 98
    assert conformal_threshold(np.arange(9), 0.2) == 7


def test_p_values_and_thresholds_tell_the_same_texts():
    rng = np.random.default_rng(3)
    known, new = rng.normal(size=39).round(1), rng.normal(0.5, 1, 200).round(1)
    for rate in (0.025, 0.1, 0.5):
        flagged = new > conformal_threshold(known, rate)
        np.testing.assert_array_equal(conformal_p(known, new) <= rate + 1e-12, flagged)
    assert conformal_p(known, [99.0])[0] == 1 / 40


D = 6
AXES = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
VALUES = torch.tensor([9.0, 3.0, 1.0, 0.3, 0.1, 0.02], dtype=torch.float64)


def draw(n, seed, scale=1.0):
    noise = torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (scale * noise * VALUES.sqrt() @ AXES.T + 5).float()


def tokens_of(rows, each=1):
    n = len(rows)
    text = np.arange(n) // each
    return Tokens(rows, np.zeros(n), text, np.arange(n) % each + 1, np.arange(n))


def exact():
    """The Gaussian that `draw` draws from, in standard deviations of each dimension."""
    std = (AXES**2 @ VALUES).sqrt()
    covariance = AXES @ VALUES.diag() @ AXES.T / std / std[:, None]
    values, vectors = torch.linalg.eigh(covariance)
    return Gaussian(torch.full((D,), 5.0), std.float(), values.float(), vectors.float())


def auroc(normal, odd):
    return Separation(normal, odd, np.ones((1, len(normal))), np.ones((1, len(odd)))).auroc()[0]


def test_mahalanobis_is_the_best_score_of_gaussian_data_and_has_its_closed_form():
    """Odd rows have 1.3 times the spread, so that the ratio of squared distances has an F distribution."""
    normal, odd = tokens_of(draw(6000, 1)), tokens_of(draw(6000, 2, scale=1.3))
    entries = [Entry("gaussian", exact())]
    scores = [score_tokens(side, entries, DetectSettings()) for side in (normal, odd)]
    found = {label: auroc(scores[0][label], scores[1][label]) for label in scores[0]}
    best = f.sf(1 / 1.3**2, D, D)
    assert found["gaussian"] == pytest.approx(best, abs=0.012)
    assert found["norm"] < found["diagonal"] < found["gaussian"] - 0.02
    own = fitted(tokens_of(draw(4000, 3)), 5)["fitted mahalanobis"]
    assert auroc(own(normal), own(odd)) == pytest.approx(best, abs=0.012)


def test_denoising_error_of_the_exact_gaussian_has_its_closed_form_at_each_level():
    model, rows = exact(), draw(4000, 4)
    errors = denoising_errors(model, rows, (0.1, 0.5, 0.9))
    assert errors.shape == (3, 4000)
    for error, sigma in zip(errors, (0.1, 0.5, 0.9), strict=True):
        values = model.eigenvalues.double()
        want = float((values / ((1 - sigma) ** 2 * values + sigma**2)).mean())
        assert error.mean() == pytest.approx(want, rel=0.03)
    np.testing.assert_array_equal(denoising_errors(model, rows, (0.5,)), errors[1:2])  # the noise is the seed's


def test_the_score_of_a_prior_is_the_mean_over_noise_levels_and_of_two_the_log_ratio():
    tokens, settings = tokens_of(draw(50, 5)), DetectSettings(denoise_sigmas=(0.2, 0.6))
    other = Gaussian(torch.full((D,), 5.0), exact().std, torch.ones(D), None)
    found = score_tokens(tokens, [Entry("glp", exact(), {"sigma": (0.2, 0.6)})], settings, reference=other, seed=7)
    mine, base = (denoising_errors(model, tokens.rows, (0.2, 0.6), 7) for model in (exact(), other))
    np.testing.assert_allclose(found["glp"], mine.mean(0))
    np.testing.assert_allclose(found["glp sigma=0.6"], mine[1])
    np.testing.assert_allclose(found["glp ratio"], np.log(mine / base).mean(0))


def test_a_ratio_finds_what_one_of_two_priors_was_made_for():
    """Rows of a narrower Gaussian: its own prior denoises them better than the wide one does."""
    narrow = Gaussian(torch.full((D,), 5.0), exact().std, 0.2 * exact().eigenvalues, exact().eigenvectors)
    inside, outside = (tokens_of(draw(400, seed, scale)) for seed, scale in ((6, 0.2**0.5), (7, 1.0)))
    entry = Entry("glp", narrow, {"sigma": (0.3,)})
    scores = [
        score_tokens(t, [entry], DetectSettings(denoise_sigmas=(0.3,)), reference=exact()) for t in (inside, outside)
    ]
    assert auroc(scores[0]["glp ratio"], scores[1]["glp ratio"]) > 0.8


def test_the_ratio_of_two_gaussians_is_that_of_their_densities():
    first, second = exact(), Gaussian(torch.full((D,), 5.0), exact().std, torch.ones(D), None)
    tokens = tokens_of(draw(50, 5))
    found = score_tokens(tokens, [Entry("gaussian", first)], DetectSettings(), reference=second)
    at = tokens.rows.double().numpy()
    spread = first.eigenvectors.double().numpy() * first.eigenvalues.double().numpy() ** 0.5
    covariance = spread @ spread.T * np.outer(first.std, first.std)
    mine = multivariate_normal(first.mean.double().numpy(), covariance).logpdf(at)
    other = multivariate_normal(np.full(D, 5.0), np.diag(second.std.double().numpy() ** 2)).logpdf(at)
    np.testing.assert_allclose(found["gaussian ratio"], other - mine, rtol=1e-4, atol=1e-4)


def test_neighbours_are_those_of_all_pairwise_distances():
    train, rows = draw(300, 8), draw(40, 9)
    x, y = ((part - train.mean(0)) / train.std(0, correction=0) for part in (train, rows))
    want = np.sort(cdist(y.numpy(), x.numpy()), axis=1)[:, 3]
    np.testing.assert_allclose(nearest(train, 4)(tokens_of(rows)), want, rtol=1e-4)


def test_scores_are_pooled_text_by_text():
    scores, text = np.array([1.0, 3.0, np.nan, 10.0, 2.0]), np.array([0, 0, 0, 1, 3])
    np.testing.assert_array_equal(pooled(scores, text, 4), [2, 10, np.nan, 2])
    np.testing.assert_array_equal(pooled(scores, text, 4, 0.75), [2.5, 10, np.nan, 2])


def test_the_probe_has_seen_both_classes():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 60, 5))
    x[1:, :, 2] += 2.5
    decide = probe(x[0], x[1], seed=0)
    assert auroc(decide(rng.normal(size=(60, 5))), decide(x[2])) > 0.9


def test_parts_of_a_task_share_no_text_and_words_are_shuffled_in_the_odd_ones_alone():
    texts = [" ".join(f"{i}w{j}" for j in range(12)) for i in range(100)]
    task = of_texts("shuffled", texts, "", seed=0, tested=15, fitted=10)
    assert tuple(map(len, (task.normal, task.odd, task.fit_normal, task.fit_odd))) == (30, 15, 10, 10)
    everything = [*task.normal, *task.odd, *task.fit_normal, *task.fit_odd]
    assert len(set(everything)) == 65
    mixed = shuffled(task, seed=0)
    assert mixed.normal == task.normal
    assert mixed.fit_normal == task.fit_normal
    assert all(a != b and sorted(a.split()) == sorted(b.split()) for a, b in zip(mixed.odd, task.odd, strict=True))
    few = of_texts("few", texts[:30], "", seed=0, tested=15, fitted=10)
    sizes = tuple(map(len, (few.normal, few.odd, few.fit_normal, few.fit_odd)))
    assert sum(sizes) == 30
    assert sizes[0] == pytest.approx(2 * sizes[1], abs=1)


@pytest.mark.parametrize("levels", [(), (0.0, 0.5), (0.3, 0.3), (1.0,)])
def test_noise_levels_where_nothing_can_be_told_are_refused(levels):
    with pytest.raises(InputError, match="denoise_sigmas must be"):
        DetectSettings(denoise_sigmas=levels)


def test_models_are_asked_for_their_score_with_their_options():
    class Spy(ActivationModel):
        kind, d_in = "test", D

        def score(self, x, *, method="none"):
            assert method == "reconstruction"
            return x[:, 0]

        _config = _tensors = _restore = None

    rows = draw(9, 10)
    found = score_tokens(tokens_of(rows), [Entry("pca", Spy(), {"method": "reconstruction"})], DetectSettings())
    np.testing.assert_allclose(found["pca"], -rows[:, 0].double())
    assert set(found) == {"norm", "lm loss", "pca"}
