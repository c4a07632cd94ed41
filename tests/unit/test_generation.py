"""The generation suite against closed forms, scipy and, where it is installed, POT."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from scipy import linalg, stats
from sklearn.metrics import pairwise_kernels

import glp_lens as gl
from glp_lens.activations import write_store
from glp_lens.artifacts import ActivationModel
from glp_lens.errors import InputError
from glp_lens.evals import generation
from glp_lens.evals.entries import Entry
from glp_lens.evals.generation import GenerationData, GenerationSettings, Moments, classifier, frechet_distance
from glp_lens.evals.generation.classifier import Scored, auc_difference, balanced, classify
from glp_lens.evals.generation.latents import LatentSampler
from glp_lens.evals.generation.measures import Pairwise, Rows, kolmogorov_smirnov, sliced_wasserstein
from glp_lens.evals.generation.moments import FrechetReference
from glp_lens.evals.generation.page import section, text_table, verdicts
from glp_lens.evals.generation.settings import sampling_options
from glp_lens.evals.results import Results, structured_frame
from glp_lens.evals.statistics import jackknife
from glp_lens.interface import Decoder, Featurizer, Reconstructor, Sampler
from glp_lens.pipeline import GenerationJob, run_suite
from glp_lens.report import write_report

D = 7


def normal(n, d=D, seed=0, dtype=torch.float32):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rows_of(x, groups=4, owners=None):
    owners = np.arange(len(x)) if owners is None else owners
    return Rows(x.float(), owners, np.arange(len(x)) % groups)


# -- Frechet distance ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair():
    """Correlated rows of different scales, far from the origin."""
    mixing = torch.linspace(0.1, 9, D)[:, None] * normal(D, seed=8)
    return 100 + normal(531, seed=1) @ mixing, 97 + normal(402, seed=2) @ mixing * 1.3


def by_matrix_root(x, y):
    """The classical formula, with scipy's root of a general matrix."""
    x, y = x.double().numpy(), y.double().numpy()
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = linalg.sqrtm(a @ b).real
    return np.square(x.mean(0) - y.mean(0)).sum() + np.trace(a) + np.trace(b) - 2 * np.trace(root)


def test_frechet_is_the_classical_formula(pair):
    x, y = pair
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(by_matrix_root(x, y), rel=1e-9)
    assert frechet_distance(Moments.of(y), Moments.of(x)) == pytest.approx(by_matrix_root(x, y), rel=1e-9)


def test_frechet_is_the_bures_wasserstein_distance_of_pot(pair):
    ot = pytest.importorskip("ot")
    a, b = (Moments.of(x) for x in pair)
    sides = a.mean.numpy(), b.mean.numpy(), a.covariance.numpy(), b.covariance.numpy()
    assert frechet_distance(a, b) == pytest.approx(ot.gaussian.bures_wasserstein_distance(*sides) ** 2, rel=1e-6)


def test_frechet_of_commuting_covariances_is_that_of_their_spreads():
    axes = torch.linalg.qr(normal(D, seed=3, dtype=torch.float64)).Q
    first, second = torch.linspace(0.01, 50, D).double(), torch.linspace(3, 0, D).double()
    means = normal(2, seed=4, dtype=torch.float64)
    sides = [Moments(11, mean, 10 * axes * v @ axes.T) for mean, v in zip(means, (first, second), strict=True)]
    exact = float((means[0] - means[1]).square().sum() + (first.sqrt() - second.sqrt()).square().sum())
    assert frechet_distance(*sides) == pytest.approx(exact, rel=1e-7)
    assert frechet_distance(*reversed(sides)) == pytest.approx(exact, rel=1e-7)  # the second is singular


def test_frechet_of_fewer_rows_than_dimensions():
    """The root eigenvalues are then the singular values of the rows' inner products."""
    x, y = normal(9, 31, seed=1, dtype=torch.float64), normal(14, 31, seed=2, dtype=torch.float64) * 2
    a, b = ((side - side.mean(0)) / (len(side) - 1) ** 0.5 for side in (x, y))
    shared = torch.linalg.svdvals(a @ b.T).sum()
    exact = (x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum() - 2 * shared
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(float(exact), rel=1e-6)


def test_frechet_of_a_shift_and_of_itself(pair):
    x = pair[0]
    assert frechet_distance(Moments.of(x), Moments.of(x.double() + 0.5)) == pytest.approx(0.25 * D, rel=1e-6)
    assert abs(frechet_distance(Moments.of(x), Moments.of(x))) < 1e-9 * Moments.of(x).covariance.trace()
    with pytest.raises(InputError, match="one width, got 7 and 6"):
        frechet_distance(Moments.of(x), Moments.of(x[:, :6]))


def test_moments_of_parts_are_those_of_all_rows(pair):
    x = pair[0]
    for moments in (Moments.of_batches(x.split(100)), Moments.of(x[:1]) + Moments.of(x[1:])):
        assert moments.count == len(x)
        np.testing.assert_allclose(moments.mean, x.double().mean(0), rtol=1e-12)
        np.testing.assert_allclose(moments.covariance, np.cov(x.double().numpy(), rowvar=False), rtol=1e-10)
        np.testing.assert_allclose(moments.std, x.double().std(0), rtol=1e-10)
    with pytest.raises(InputError, match="at least one row"):
        Moments.of_batches([x[:0]])


# -- intervals -------------------------------------------------------------------------------------------------


def test_jackknife_of_a_mean_is_its_t_interval():
    x = np.random.default_rng(0).normal(size=13)
    draws = np.array([x.mean(), *((x.sum() - one) / 12 for one in x)])
    found = jackknife(draws, 13)
    half = stats.t.ppf(0.975, 12) * x.std(ddof=1) / np.sqrt(13)
    np.testing.assert_allclose(found[:3], (x.mean(), x.mean() - half, x.mean() + half))
    assert jackknife(draws, 13, extrapolate=True).value == pytest.approx(x.mean())  # a mean has no bias


def test_jackknife_takes_off_the_bias_of_a_variance():
    x = np.random.default_rng(1).normal(size=20)
    draws = np.array([x.var(), *(np.delete(x, i).var() for i in range(20))])
    assert jackknife(draws, 20, extrapolate=True).value == pytest.approx(x.var(ddof=1))


def test_intervals_of_extrapolated_frechet_distances_hold_the_truth():
    """Rows depend on each other within documents; the truth is that of two normal distributions."""
    truth, held, found = 3 * (np.sqrt(2) - 1) ** 2, 0, []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        owners = np.arange(240) // 6
        real = (rng.normal(size=(40, 3))[owners] + rng.normal(size=(240, 3))) / np.sqrt(2)
        groups = balanced(owners, 10, rng), np.arange(240) % 10
        sides = torch.from_numpy(real), torch.from_numpy(rng.normal(size=(240, 3)) * np.sqrt(2))
        parts = [[Moments.of(x[index == g]) for g in range(10)] for x, index in zip(sides, groups, strict=True)]
        draws, _ = FrechetReference(parts[0], torch.ones(3, dtype=torch.float64)).distances(parts[1])
        interval = jackknife(draws, 40, extrapolate=True)
        found.append((draws[0], interval.value))
        held += interval.ci_low < truth < interval.ci_high
    (plain, extrapolated), (_, error) = np.mean(found, axis=0), np.std(found, axis=0) / 10
    assert plain > truth + 4 * error
    assert extrapolated == pytest.approx(truth, abs=2.5 * error)
    assert held in range(88, 100)


# -- measures --------------------------------------------------------------------------------------------------


def test_kolmogorov_smirnov_is_scipys_also_with_ties_and_without_a_group():
    x, y = (normal(90, seed=1) * 2).round() / 2, (normal(71, seed=2) * 2).round() / 2 + 0.5
    mean, largest = kolmogorov_smirnov(rows_of(x), rows_of(y))
    for draw, (a, b) in enumerate(
        [(x, y), *((x[np.arange(90) % 4 != g], y[np.arange(71) % 4 != g]) for g in range(4))]
    ):
        each = [stats.ks_2samp(a[:, i].numpy(), b[:, i].numpy()).statistic for i in range(D)]
        assert mean[draw] == pytest.approx(np.mean(each))
        assert largest[draw] == pytest.approx(max(each))


def test_kolmogorov_smirnov_of_a_known_shift():
    """Half of uniform values lie beyond the others."""
    x = torch.rand(2000, 3, generator=torch.Generator().manual_seed(0))
    mean, largest = kolmogorov_smirnov(rows_of(x), rows_of(x + torch.tensor([0.0, 0.25, 0.5])))
    assert largest[0] == pytest.approx(0.5, abs=0.02)
    assert mean[0] == pytest.approx(0.25, abs=0.02)


def test_sliced_wasserstein_of_a_shift_and_of_one_dimension():
    x = normal(200)
    step = torch.full((D,), 0.3)
    # The mean squared component of a vector along directions of the sphere is its square over the dimensions.
    draws = sliced_wasserstein(rows_of(x), rows_of(x + step), slices=4000)
    assert draws[0] == pytest.approx(0.3, rel=0.03)
    a, b = normal(60, 1, seed=1), normal(90, 1, seed=2) * 2
    levels = (np.arange(360) + 0.5) / 360  # 180 is the least common multiple
    exact = np.quantile(a, levels, method="inverted_cdf") - np.quantile(b, levels, method="inverted_cdf")
    assert sliced_wasserstein(rows_of(a), rows_of(b))[0] == pytest.approx(np.sqrt(np.mean(exact**2)))


def test_sliced_wasserstein_is_that_of_pot():
    ot = pytest.importorskip("ot")
    x, y = normal(80, seed=1), normal(65, seed=2) + 0.2
    theirs = ot.sliced_wasserstein_distance(x.double().numpy(), y.double().numpy(), n_projections=3000, seed=0)
    assert sliced_wasserstein(rows_of(x), rows_of(y), slices=3000)[0] == pytest.approx(theirs, rel=0.02)


def test_mmd_precision_and_recall_are_those_of_plain_words():
    x, y = normal(60, seed=1), normal(45, seed=2) * 0.7 + 0.4
    found = Pairwise(rows_of(x)).measure(rows_of(y))
    for draw, kept in enumerate([slice(None), *(np.s_[g] for g in range(4))]):
        a, b = ((side if draw == 0 else side[np.arange(len(side)) % 4 != kept]).double().numpy() for side in (x, y))
        width = np.median(torch.pdist(x.double()).sort().values[: 60 * 59 // 2].numpy())
        kernels = [pairwise_kernels(p, q, "rbf", gamma=1 / (2 * width**2)) for p, q in ((a, a), (b, b), (a, b))]
        inside = [(k.sum() - len(k)) / (len(k) * (len(k) - 1)) for k in kernels[:2]]
        assert found[0][draw] == pytest.approx(sum(inside) - 2 * kernels[2].mean(), abs=1e-5)
        radius = [np.sort(np.linalg.norm(s[:, None] - s, axis=2), axis=1)[:, 3] for s in (a, b)]
        across = np.linalg.norm(a[:, None] - b, axis=2)
        assert found[1][draw] == pytest.approx((across <= radius[0][:, None]).any(0).mean())
        assert found[2][draw] == pytest.approx((across <= radius[1]).any(1).mean())


def test_rows_of_one_document_are_no_pair():
    """Each row three times: without their documents, copies would be neighbours and make the kernel's mean larger."""
    x, y = normal(50, seed=1), normal(50, seed=2)
    owners = np.repeat(np.arange(50), 3)
    copies = [Rows(side.repeat_interleave(3, 0), owners, owners % 4) for side in (x, y)]
    plain = [Rows(side, np.arange(50), np.arange(50) % 4) for side in (x, y)]
    once, thrice = (Pairwise(first, neighbours=k).measure(second) for k, (first, second) in ((1, plain), (3, copies)))
    for one, three in zip(once, thrice, strict=True):
        np.testing.assert_allclose(one, three, atol=1e-12)


# -- classifiers -----------------------------------------------------------------------------------------------


@pytest.fixture
def quickly_trained(monkeypatch):
    monkeypatch.setattr(classifier, "_STEPS", 400)


def classified(x, y, owners=None):
    sides = rows_of(x, owners=owners), rows_of(y)
    trains = tuple(balanced(side.owners, 2, np.random.default_rng(0)) == 0 for side in sides)
    return classify(*sides, trains, seed=0)


def test_classifiers_find_nothing_where_nothing_is(quickly_trained):
    for scored in classified(normal(900, seed=1), normal(900, seed=2)).values():
        assert scored.auc.ci_low < 0.5 < scored.auc.ci_high


def test_both_classifiers_find_a_shift_and_the_network_a_shape(quickly_trained):
    x = normal(900, seed=1)
    assert all(scored.auc.value > 0.99 for scored in classified(x, normal(900, seed=2) + 2).values())
    heavy = normal(900, seed=2) * torch.where(torch.arange(900)[:, None] % 2 == 0, 0.2, 2.0)
    shape = classified(x, heavy)
    assert shape["mlp"].auc.ci_low > 0.75
    assert shape["logistic"].auc.value < 0.6


def test_documents_that_classifiers_know_tell_them_nothing(quickly_trained):
    """Rows are their document's and hardly more: tested on documents of the training, any two sets would differ."""
    owners = np.arange(900) // 30
    x = normal(30, 40, seed=1)[owners] + 0.05 * normal(900, 40, seed=2)
    y = normal(30, 40, seed=3)[owners] + 0.05 * normal(900, 40, seed=4)
    sides = [Rows(side, owners, owners % 4) for side in (x, y)]
    trains = tuple(balanced(owners, 2, np.random.default_rng(s)) == 0 for s in (0, 1))
    for scored in classify(*sides, trains, seed=0).values():
        assert scored.auc.ci_low < 0.5 < scored.auc.ci_high
        assert scored.auc.n == 30


def test_a_difference_of_aucs_is_that_of_both_and_its_interval_holds_it():
    """Scores on the same real rows; the truth is that of two normal distributions a step apart."""
    held = 0
    truth = stats.norm.cdf(1.2 / np.sqrt(2)) - stats.norm.cdf(0.4 / np.sqrt(2))
    for seed in range(200):
        rng = np.random.default_rng(seed)
        owners, each = np.arange(120) // 4, np.arange(100)
        real = rng.normal(size=30)[owners] * 0.8 + rng.normal(size=120) * 0.6
        one, other = (Scored(real, rng.normal(step, size=100), owners, each) for step in (1.2, 0.4))
        found = auc_difference(one, other)
        assert found.value == pytest.approx(one.auc.value - other.auc.value)
        held += found.ci_low < truth < found.ci_high
    assert 0.9 < held / 200 <= 0.99


# -- latents ---------------------------------------------------------------------------------------------------


class Code(ActivationModel, Featurizer, Decoder, Reconstructor):
    """Features are the positive parts of the rows, and decode to themselves."""

    kind = "test"
    n_features = D

    def __init__(self, max_norm=None):
        self.d_in, self.provenance = D, {"store": {"max_norm": max_norm}}

    def encode(self, x, *, noise=None, generator=None):
        return x.clamp(min=0)

    def decode(self, features):
        return features.clone()

    def reconstruct(self, x, *, noise=None, generator=None):
        return self.encode(x)

    def _config(self):
        return {}

    def _tensors(self):
        return {}

    @classmethod
    def _restore(cls, config, tensors):
        return cls()


class Normal(Code, Sampler):
    """Draws noise times `scale`, and reconstructs rows exactly."""

    def __init__(self, scale=1.0, max_norm=None):
        super().__init__(max_norm)
        self.scale = scale

    def encode(self, x, *, noise=None, generator=None):
        return x.clone()

    def sample(self, n, *, noise=None, generator=None):
        return noise * self.scale

    def _config(self):
        return {"scale": self.scale}


def test_latents_keep_their_marginals_and_lose_their_dependence():
    x = normal(3000, 1).repeat(1, D) + torch.linspace(-1.2, 1, D)  # all latents are one
    x[:, 2] = -1  # one that is never active
    made = LatentSampler(Code(), Code(), x).sample(3000, seed=1)
    latents = x.clamp(min=0)
    assert made.shape == (3000, D)
    assert all(stats.ks_2samp(made[:, i], latents[:, i]).statistic < 0.05 for i in range(D))
    assert set(made[:, 4].unique().tolist()) <= set(latents[:, 4].unique().tolist())
    together, apart = (np.corrcoef(side[:, 3], side[:, 4])[0, 1] for side in (latents, made))
    assert together > 0.9
    assert abs(apart) < 0.06
    assert torch.equal(made, LatentSampler(Code(), Code(), x).sample(3000, seed=1))


# -- the suite -------------------------------------------------------------------------------------------------

N, DOCUMENTS = 1100, 60
SETTINGS = GenerationSettings(samples=500)


def data(x=None, **changes):
    x = normal(N, seed=1) if x is None else x
    given = {"training": Moments.of(normal(3000, seed=2)), "training_rows": normal(500, seed=3)}
    return GenerationData(x, np.arange(len(x)) * DOCUMENTS // len(x), **given | changes)


@pytest.fixture(scope="module")
def results():
    entries = [
        Entry("gaussian", Normal()),
        Entry("wide", Normal(1.5)),
        Entry("wide scale=2", Normal(2.0), main=False),
        Entry("code", Code()),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "_STEPS", 400)
        return generation.run(entries, data(), SETTINGS)


@pytest.fixture
def hardly_trained(monkeypatch):
    """For what is not about classifiers."""
    monkeypatch.setattr(classifier, "_STEPS", 4)


@pytest.fixture(scope="module")
def value(results):
    frame = results.frame()

    def find(model, metric, setting=""):
        chosen = frame[(frame.model == model) & (frame.metric == metric) & (frame.setting == setting)]
        assert len(chosen) == 1, (model, metric, setting)
        return chosen.iloc[0]

    return find


RAW = "space=activations"


def test_the_true_distribution_is_at_the_floor_in_every_measure(value):
    for model in ("real", "fitted-gaussian", "gaussian"):
        extrapolated = value(model, "frechet_extrapolated", RAW)
        assert extrapolated.ci_low < 0 < extrapolated.ci_high
        assert 0 < value(model, "frechet", RAW).value < 0.15
        for metric in ("auc_mlp", "auc_logistic"):
            assert value(model, metric).ci_low < 0.5 < value(model, metric).ci_high
        assert value(model, "mmd2").ci_low < 0 < value(model, "mmd2").ci_high
        assert value(model, "ks_max").value < 0.12
        assert value(model, "precision").value == pytest.approx(value("real", "precision").value, abs=0.08)
        assert value(model, "recall").value == pytest.approx(value("real", "recall").value, abs=0.08)


def test_samples_that_are_too_wide_are_found_by_their_known_distance(value):
    for model, scale in (("wide", 1.5), ("wide scale=2", 2.0)):
        exact = D * (scale - 1) ** 2
        found = value(model, "frechet_extrapolated", RAW)
        assert found.ci_low < exact < found.ci_high
        assert found.value == pytest.approx(exact, rel=0.15)
        assert value(model, "auc_mlp").ci_low > 0.6
        assert value(model, "mmd2").ci_low > 0
        assert value(model, "precision").value < value("real", "precision").value - 0.1
        assert value(model, "ks_mean").value > value("real", "ks_mean").ci_high


def test_reconstructions_have_names_of_their_own(value, results):
    exact = value("gaussian", "reconstruction_frechet", RAW)
    assert exact.value == pytest.approx(value("real", "frechet", RAW).value, rel=1e-6)  # it changes nothing
    half, second = 1 / np.sqrt(2 * np.pi), 0.5  # mean, and mean square, of the positive part of a normal number
    cut = D * (half**2 + (1 - np.sqrt(second - half**2)) ** 2)
    found = value("code", "reconstruction_frechet_extrapolated", RAW)
    assert found.ci_low < cut < found.ci_high
    assert found.value == pytest.approx(cut, rel=0.2)
    assert "reconstruction_frechet" not in set(results.frame().query("model == 'wide scale=2'").metric)
    assert value("code", "frechet", RAW).value > 1  # sampled by its latents


def test_differences_are_those_of_the_values(value, results):
    for metric, setting in (("frechet_extrapolated", RAW), ("auc_mlp", "")):
        gap = value("gaussian", f"{metric}_diff:wide", setting)
        own, other = (value(model, metric, setting).value for model in ("gaussian", "wide"))
        assert gap.value == pytest.approx(own - other, abs=1e-9)
        assert gap.ci_high < 0
    assert not [m for m in results.metrics if m.other == "wide scale=2"]


def test_scales_of_dimensions_count_in_activations_and_not_in_the_standardised_space(hardly_trained):
    scale = torch.logspace(0, 3, D)
    given = data(normal(N, seed=1) * scale, training=Moments.of(normal(3000, seed=2) * scale))
    results = generation.run([], given, SETTINGS)
    frame = results.frame()[lambda f: (f.model == "real") & (f.metric == "frechet")].set_index("setting").value
    plain = generation.run([], data(training=Moments.of(normal(3000, seed=2))), SETTINGS).frame()
    same = plain[(plain.model == "real") & (plain.metric == "frechet")].set_index("setting").value
    assert frame["space=standardised"] == pytest.approx(same["space=standardised"], rel=1e-5)
    assert frame[RAW] > 1e3 * same[RAW]


def test_outliers_are_left_out_of_every_set_by_one_rule_and_counted(hardly_trained):
    x = normal(N, seed=1)
    x[7] = 1000
    few = Normal()
    few.sample = lambda n, noise, **_: torch.cat([noise[:-2], torch.full((1, D), 500.0), torch.full((1, D), torch.nan)])
    results = generation.run([Entry("few", few), Entry("limit", Normal(max_norm=40.0))], data(x, max_norm=50), SETTINGS)
    frame = results.frame()
    assert results.data["outlier_rows"] == 1
    assert results.data["max_norm"] == 40
    counted = frame[frame.metric == "outlier_rows"].set_index("model").value
    assert counted.to_dict() == {"real": 0, "fitted-gaussian": 0, "few": 2, "limit": 0}
    assert frame[(frame.model == "few") & (frame.metric == "frechet") & (frame.setting == RAW)].value.iloc[0] < 0.2


def test_a_sampler_that_gives_no_usable_rows_is_a_sentence(hardly_trained):
    results = generation.run([Entry("bad", Normal(float("inf")))], data(), SETTINGS)
    assert any("bad was not measured: 500 of its 500 rows are outliers" in line for line in results.failures)
    assert "auc_mlp" not in set(results.frame().query("model == 'bad'").metric)
    assert json.dumps(results.to_json(), allow_nan=False)


def test_documents_of_very_different_lengths_leave_no_group_without_rows(hardly_trained):
    sizes = [400, 300, *[9] * 16]  # the long ones are a half of their own each, with hardly another document
    documents = np.repeat(np.arange(len(sizes)), sizes)
    given = dataclasses.replace(data(normal(len(documents), seed=1)), documents=documents)
    results = generation.run([Entry("gaussian", Normal())], given, SETTINGS)
    assert results.config["groups"] < 9
    assert np.isfinite(results.frame().query("model == 'gaussian' and metric == 'frechet'").ci_low).all()


def test_outliers_that_take_a_whole_group_leave_a_sentence(hardly_trained):
    few = Normal()
    few.sample = lambda n, noise, **_: torch.where(torch.arange(n)[:, None] % 10 == 3, 500.0, noise)
    results = generation.run([Entry("few", few)], data(max_norm=50), SETTINGS)
    assert any("few was not measured: 50 of its 500 rows are outliers" in line for line in results.failures)


def test_equal_inputs_read_the_kept_results_and_give_equal_numbers(hardly_trained, tmp_path):
    entries = [Entry("gaussian", Normal())]
    first = generation.run(entries, data(), SETTINGS, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    again = generation.run(entries, data(), SETTINGS, folder=tmp_path)
    assert again.frame().equals(first.frame())
    assert generation.run(entries, data(), SETTINGS).frame().equals(first.frame())
    generation.run(entries, data(max_norm=9.0), SETTINGS, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_no_document_is_on_two_sides():
    owners = np.repeat(np.arange(50), np.random.default_rng(0).integers(1, 40, 50))
    parts = balanced(owners, 10, np.random.default_rng(1))
    assert len(set(zip(owners.tolist(), parts.tolist(), strict=True))) == 50
    sizes = np.bincount(parts)
    assert sizes.max() - sizes.min() <= 40


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"documents": np.arange(3)}, "a document id for each"),
        ({"documents": np.arange(N) // 700}, "at least four held-out documents, got 2"),
        ({"rows": normal(30), "documents": np.arange(30)}, "20 rows or more, got 15"),
        ({"documents": np.repeat(np.arange(5), [N - 4, 1, 1, 1, 1])}, "one document has about half"),
        ({"training": Moments.of(normal(40, 6))}, "the training rows have width 6, the held-out rows 7"),
        ({"rows": normal(N, 6)}, "have width 7, the held-out rows 6"),
    ],
)
def test_unusable_rows_are_refused(changes, words):
    given = {"rows": normal(N), "documents": np.arange(N) // 20, "training": Moments.of(normal(40))}
    with pytest.raises(InputError, match=words):
        generation.run([], GenerationData(**given | {"training_rows": normal(9)} | changes), SETTINGS)


def test_labels_of_conditions_are_reserved():
    with pytest.raises(InputError, match="other than 'real', 'fitted-gaussian'"):
        generation.run([Entry("real", Normal())], data(), SETTINGS)


@pytest.mark.parametrize("way", ["", "0", "quick", "heun", "heun:", "euler:2.5", "rk9:4"])
def test_ways_of_sampling_that_are_none_are_refused(way):
    with pytest.raises(InputError, match="way of sampling|unknown solver"):
        sampling_options(way)


# -- the job ---------------------------------------------------------------------------------------------------


def test_the_job_measures_a_glp_in_each_way_and_takes_moments_from_the_training_store(hardly_trained, tmp_path):
    hook = "blocks.1.hook_resid_post"
    x = normal(900, seed=1) @ torch.diag(torch.linspace(0.5, 4, D)) + 20
    store = write_store(tmp_path / "acts", x[:600], hook=hook, max_norm=80.0)
    write_store(tmp_path / "heldout", x[600:], hook=hook, columns={"doc_id": np.arange(300) // 10})
    size = {"d_model": 8, "d_mlp": 10, "n_layers": 2}
    gl.GLP.fit(store, gl.recipe("fast", rows=640, batch_size=64), **size).save_pretrained(tmp_path / "glp")
    gl.Gaussian.fit(store).save_pretrained(tmp_path / "gaussian")
    job = GenerationJob(
        models=(f"glp={tmp_path / 'glp'}", str(tmp_path / "gaussian")), store=tmp_path / "acts",
        heldout=tmp_path / "heldout", samples=120, sampling=("2", "heun:3", "fast", "20", "euler:20", "euler:2", "02"),
        out=tmp_path / "out",
    )  # fmt: skip
    results = run_suite(job, say=lambda _: None)
    assert (tmp_path / "out" / "report.html").exists()
    assert results.failures == []
    assert results.data["max_norm"] == 80
    assert results.data["training_rows"] == 600
    frame = results.frame()
    calls = frame[frame.metric == "network_calls"].set_index("model").value
    assert calls.to_dict() == {"glp": 20, "glp steps=2": 2, "glp solver=heun steps=3": 5, "glp fast": 6}
    measured = frame[frame.metric == "auc_mlp"].model
    assert set(measured) == {"real", "fitted-gaussian", *calls.index, "gaussian"}
    assert set(frame[frame.metric == "reconstruction_frechet"].model) == {"glp", "gaussian"}
    distance = frame[(frame.metric == "frechet") & (frame.setting == "space=standardised")].set_index("model").value
    assert distance["fitted-gaussian"] == pytest.approx(distance["gaussian"], rel=0.1)  # the same noise and moments


# -- the page --------------------------------------------------------------------------------------------------


def test_the_page_has_tables_pictures_and_verdicts(results, tmp_path):
    text = write_report([Results.from_json(results.to_json())], tmp_path, {"focus": "gaussian"}).read_text()
    assert text.count("<svg") == 3
    names = {path.stem for path in (tmp_path / "plots").iterdir()}
    assert names == {"generation_components", "generation_norms", "generation_dimensions"}
    assert "Gaussian beats wide in samples that a network cannot tell from real rows" in text
    assert "Gaussian beats wide in the means and covariances of samples" in text
    assert "other real rows" in text
    lines = text_table(results).splitlines()
    assert len(lines) == 2 * 6
    assert lines[0].startswith("real ")


def test_results_without_pictures_or_numbers_make_a_page():
    bare = Results("generation")
    bare.add("glp", "all", "", "unknown_metric", 1.0)
    frame = structured_frame(bare.metrics)
    made = section([bare], frame, None, "glp")
    assert made.tables == []
    assert made.plots == []
    assert verdicts(frame, "glp") == []
