"""The density suite against closed forms: exact Gaussians whose optimal loss is known."""

import numpy as np
import pytest
import torch
from scipy import integrate
from scipy.special import polygamma
from scipy.stats import multivariate_normal, norm
from sklearn.metrics import roc_auc_score

from glp_lens.artifacts import ActivationModel
from glp_lens.errors import InputError
from glp_lens.evals import density
from glp_lens.evals.density import DensityData, DensitySettings, bits
from glp_lens.evals.entries import Entry
from glp_lens.flow.schedule import sigma_bin
from glp_lens.interface import Scorer, VelocityField
from glp_lens.models.gaussian import Gaussian

D = 7
VARIANCES = torch.linspace(0.2, 1.8, D, dtype=torch.float64)


class ExactGaussian(ActivationModel, VelocityField, Scorer):
    """Independent normals with variances `lam`, `scale` times off if asked; its best velocity is known."""

    kind = "test"

    def __init__(self, lam=VARIANCES, shift=0.0, max_norm=None):
        self.lam, self.shift, self.d_in = lam, shift, len(lam)
        self.provenance = {"store": {"max_norm": max_norm}}

    def normalize(self, x):
        return x - self.shift

    def denormalize(self, z):
        return z + self.shift

    def velocity(self, z, sigma):
        s = torch.as_tensor(sigma, dtype=z.dtype).reshape(-1, 1)
        lam = self.lam.to(z.dtype)
        return (s - (1 - s) * lam) / ((1 - s) ** 2 * lam + s**2) * z

    def score(self, x, *, noise=None, generator=None):
        return -(x**2 / self.lam.to(x.dtype)).sum(1)

    def _config(self):
        return {}

    def _tensors(self):
        return {}

    @classmethod
    def _restore(cls, config, tensors):
        return cls()


class BoundedGaussian(ExactGaussian):
    def optimal_loss(self, sigma):
        return float((self.lam / ((1 - sigma) ** 2 * self.lam + sigma**2)).mean())

    def optimal_loss_mean(self):
        return float(np.pi / 2 * self.lam.sqrt().mean())


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4001, D, generator=generator, dtype=torch.float64) * VARIANCES.sqrt()
    return x.float(), np.arange(4001) // 20


def value(results, model, metric, setting="sigma=all"):
    frame = results.frame()
    chosen = frame[(frame.model == model) & (frame.metric == metric) & (frame.setting == setting)]
    assert len(chosen) == 1, (model, metric, setting)
    return chosen.iloc[0]


def test_loss_of_the_exact_gaussian_meets_its_closed_form_in_total_and_by_bin(rows):
    results = density.run([Entry("gaussian", BoundedGaussian())], DensityData(*rows), DensitySettings(draws=6))
    found = value(results, "gaussian", "flow_loss")
    exact = np.pi / 2 * VARIANCES.sqrt().mean().item()
    assert found.value == pytest.approx(exact, rel=0.02)
    assert found.ci_low < exact < found.ci_high
    assert found.n == 201  # documents, not rows
    assert value(results, "gaussian", "flow_loss_bound").value == pytest.approx(exact)
    model = BoundedGaussian()
    for low in (0.0, 0.4, 0.9):
        setting = f"sigma={low:.1f}-{low + 0.1:.1f}"
        mean = integrate.quad(model.optimal_loss, low, low + 0.1)[0] / 0.1
        assert value(results, "gaussian", "flow_loss_bound", setting).value == pytest.approx(mean, rel=0.01)
        assert value(results, "gaussian", "flow_loss", setting).value == pytest.approx(mean, rel=0.08)


def test_references_have_their_known_losses():
    x = torch.randn(3001, D, generator=torch.Generator().manual_seed(1))
    results = density.run([Entry("gaussian", BoundedGaussian(torch.ones(D)))], DensityData(x, np.arange(3001) // 10))
    assert value(results, "predict 0", "flow_loss").value == pytest.approx(2, rel=0.03)
    assert value(results, "isotropic gaussian", "flow_loss").value == pytest.approx(np.pi / 2, rel=0.03)


def test_a_worse_model_lies_above_the_bound_and_a_paired_difference_says_so(rows):
    worse = ExactGaussian(torch.ones(D, dtype=torch.float64))
    results = density.run([Entry("iso", worse), Entry("gaussian", BoundedGaussian())], DensityData(*rows))
    below = value(results, "iso", "below_gaussian_percent")
    own, gaussian = (value(results, m, "flow_loss").value for m in ("iso", "gaussian"))
    assert below.value == pytest.approx(100 * (1 - own / gaussian), rel=1e-6)
    assert below.ci_high < 0
    diff = value(results, "iso", "flow_loss_diff:gaussian")
    assert diff.value == pytest.approx(own - gaussian, rel=1e-6)
    assert 0 < diff.ci_low < diff.ci_high
    # The triples are shared: a model identical to a reference has exactly its loss.
    assert own == pytest.approx(value(results, "isotropic gaussian", "flow_loss").value, rel=1e-6)


def test_another_normaliser_is_left_out_with_a_sentence(rows):
    entries = [Entry("gaussian", BoundedGaussian()), Entry("moved", ExactGaussian(shift=0.5))]
    results = density.run(entries, DensityData(*rows))
    assert any("moved normalises activations differently" in line for line in results.failures)
    assert "moved" not in set(results.frame().query("metric == 'flow_loss'").model)


def test_score_auroc_agrees_with_sklearn_and_sees_broken_correlations():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(501, 1, generator=generator) + 0.3 * torch.randn(501, D, generator=generator)

    class Spread(ExactGaussian):
        def score(self, x, *, noise=None, generator=None):
            return -x.var(1)

    results = density.run([Entry("spread", Spread())], DensityData(x, np.arange(501)), DensitySettings(score_rows=501))
    found = value(results, "spread", "score_auroc", "real vs shuffled")
    generator = torch.Generator().manual_seed(1)
    fake = x.gather(0, torch.rand(x.shape, generator=generator).argsort(0))
    scores = torch.cat([-x.var(1), -fake.var(1)]).numpy()
    assert found.value == pytest.approx(roc_auc_score([1] * 501 + [0] * 501, scores), abs=1e-9)
    assert found.ci_low > 0.9


def test_typicality_rows_come_from_all_documents_with_their_owners():
    owners = np.repeat(np.arange(100), 9)
    x = torch.as_tensor(owners, dtype=torch.float32)[:, None].repeat(1, D)
    seen = []

    class Spy(ExactGaussian):
        def score(self, x, *, noise=None, generator=None):
            seen.append(x[:, 0].numpy())
            return x[:, 0]

    data = DensityData(x, owners)
    runs = [density.run([Entry("spy", Spy())], data, DensitySettings(score_rows=200, seed=s)) for s in (0, 0, 1)]
    real = seen[::2]
    assert [len(rows) for rows in real] == [200] * 3
    assert len(np.unique(real[0])) > 80
    assert np.array_equal(real[0], real[1])
    assert not np.array_equal(real[0], real[2])
    # `n` counts documents: the owners are those of the rows drawn.
    assert value(runs[0], "spy", "score_mean", "real").n == len(np.unique(real[0]))


def test_massive_rows_are_dropped_and_counted(rows):
    x, owners = rows
    x = x.clone()
    x[3] *= 1e4
    results = density.run([Entry("gaussian", BoundedGaussian(max_norm=100.0))], DensityData(x, owners))
    assert results.data["massive_rows_dropped"] == 1
    assert value(results, "gaussian", "flow_loss").value < 2


def test_same_seed_same_numbers_whatever_the_batch_size(rows):
    entries = [Entry("gaussian", BoundedGaussian())]
    a = density.run(entries, DensityData(*rows, batch_size=1024), DensitySettings(seed=3)).frame()
    b = density.run(entries, DensityData(*rows, batch_size=333), DensitySettings(seed=3)).frame()
    c = density.run(entries, DensityData(*rows), DensitySettings(seed=4)).frame()
    np.testing.assert_allclose(a.value, b.value, rtol=1e-5)
    assert not np.allclose(a.value, c.value, rtol=1e-6)


def test_stratified_sigma_gives_each_row_every_part_of_the_grid():
    sigma = density.stratified_sigma(250, 4, seed=0)
    assert sorted(sigma.ravel()) == sorted(density.SIGMA_GRID)  # each of the 1000 levels exactly once
    part = np.sort(np.ceil(sigma * 4), axis=0)
    np.testing.assert_array_equal(part, np.tile([[1], [2], [3], [4]], 250))
    np.testing.assert_array_equal(sigma_bin(np.array([0.001, 0.1, 0.101, 1.0])), [0, 0, 1, 9])


@pytest.mark.parametrize(
    ("x", "owners", "words"),
    [
        (torch.zeros(5, D + 1), np.arange(5), "trained on width"),
        (torch.zeros(5, D), np.arange(4), "one document id a row"),
        (torch.zeros(1, D), np.arange(1), "at least two"),
    ],
)
def test_bad_input_is_one_clear_line(x, owners, words):
    with pytest.raises(InputError, match=words):
        density.run([Entry("gaussian", BoundedGaussian())], DensityData(x, owners))


def test_labels_differ_from_each_other_and_from_the_references(rows):
    for labels in (("a", "a"), ("predict 0",)):
        with pytest.raises(InputError, match="labels must be unique and other than 'predict 0'"):
            density.run([Entry(label, BoundedGaussian()) for label in labels], DensityData(*rows))


def test_rows_of_other_activations_than_in_training_are_refused_unless_told(rows):
    model = BoundedGaussian()
    model.provenance["store"] |= {"hook": "blocks.1.hook_resid_post"}
    data = DensityData(*rows, source={"hook": "blocks.2.hook_resid_post"})
    with pytest.raises(InputError, match="gaussian was trained at blocks.1"):
        density.run([Entry("gaussian", model)], data)
    assert "accepted" in density.run([Entry("gaussian", model)], data, allow_mismatch=True).failures[0]


def test_a_run_with_equal_inputs_reads_its_results(rows, tmp_path, monkeypatch):
    entries, data = [Entry("gaussian", BoundedGaussian())], DensityData(*rows)
    first = density.run(entries, data, folder=tmp_path)
    calls = []
    monkeypatch.setattr(BoundedGaussian, "velocity", lambda *_: calls.append(1) or torch.zeros(1))
    assert density.run(entries, data, folder=tmp_path).to_json() == first.to_json()
    assert not calls
    density.run(entries, data, DensitySettings(seed=1), folder=tmp_path)
    assert calls


def correlated(n, seed=0):
    """Rows of a known Gaussian `(n, 3)` that are bfloat16 numbers, and its covariance."""
    mixing = torch.tensor([[2.0, 0.0, 0.0], [1.0, 0.5, 0.0], [0.3, -0.4, 1.5]], dtype=torch.float64)
    draws = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) @ mixing.T
    return draws.bfloat16().float(), (mixing @ mixing.T).numpy()


def test_densities_fitted_to_rows_meet_the_gaussian_that_they_come_from():
    train, covariance = correlated(20_000)
    rows, _ = correlated(2000, seed=1)
    x = rows.double().numpy()
    fitted = bits.fitted(train, seed=0)
    exact = multivariate_normal(np.zeros(3), covariance).logpdf(x)
    assert np.abs(fitted["mixture"](x) - exact).mean() < 0.1
    independent = norm(0, np.sqrt(np.diag(covariance))).logpdf(x).sum(1)
    np.testing.assert_allclose(fitted["diagonal gaussian"](x).mean(), independent.mean(), atol=0.02)
    # Of the k-th neighbour each value is noisy, with the variance of log(Gamma(k)), about 1 / k; the mean is not.
    neighbours = fitted["neighbours"](x)
    assert neighbours.mean() == pytest.approx(exact.mean(), abs=0.05)
    assert (neighbours - exact).std() == pytest.approx(polygamma(1, bits.NEIGHBOUR) ** 0.5, abs=0.15)


def test_a_mixture_is_known_better_than_by_one_gaussian():
    generator = torch.Generator().manual_seed(3)
    centres = 4 * torch.randint(2, (9000, 1), generator=generator) - 2.0
    x = torch.randn(9000, 2, generator=generator) * 0.5 + centres * torch.tensor([1.0, -1.0])
    fitted, held = bits.fitted(x[:7000], seed=0), x[7000:].double().numpy()
    peaks = [multivariate_normal([s, -s], 0.25 * np.eye(2)).logpdf(held) for s in (2, -2)]
    exact = np.logaddexp(*peaks) - np.log(2)
    assert fitted["mixture"](held).mean() == pytest.approx(exact.mean(), abs=0.05)
    assert fitted["diagonal gaussian"](held).mean() < exact.mean() - 0.5


def test_cells_are_what_bfloat16_rounds_to_a_number():
    x = torch.tensor([[1.0, -3.0], [1.0078125, -2.0], [1.5, -2.03125]])
    low, width = bits.cells(x)
    for part in (1e-3, 0.25, 0.5, 0.999):
        assert torch.equal((low + part * width).bfloat16().float(), x)
    for outside in (low - 1e-3 * width, low + 1.001 * width):
        assert not (outside.bfloat16().float() == x).any()
    assert bits.cells(x + 1e-4) is None


def test_a_value_of_0_has_no_endless_density():
    x = torch.cat([torch.zeros(1, 1), torch.randn(999, 1, generator=torch.Generator().manual_seed(0))]).bfloat16()
    _, width = bits.cells(x.float())
    assert float(width.min()) > 1e-3


def test_bits_of_dequantised_rows_are_a_code_length():
    """A Gaussian on a lattice of cells of one width: minus the log of the probability of each cell, by scipy."""
    rows, covariance = correlated(3000, seed=5)
    deviation = np.sqrt(covariance[0, 0])
    x = (rows[:, :1].double() / deviation).clamp(1.0, 1.99).bfloat16().float()  # one exponent, cells of 2^-7
    spread, widths = bits.dequantised(x, seed=1)
    np.testing.assert_allclose(widths, np.log(2**-7) * np.where(x[:, 0] == 1, np.log(0.75 / 128) / np.log(1 / 128), 1))
    probability = norm.cdf(x + 2**-8) - norm.cdf(x - 2**-8)
    inner = (x[:, 0] > 1).numpy()
    written = -(norm.logpdf(spread[:, 0].double().numpy()) + widths)
    want = -np.log(probability[:, 0])
    assert np.abs(written - want)[inner].mean() < 0.01


def test_bits_per_dimension_stand_beside_each_other_in_one_table():
    train, covariance = correlated(6000)
    x, _ = correlated(800, seed=2)

    class Flow(ExactGaussian):
        """Its log-density is the exact one, told with an error."""

        asked = ()

        def log_density(self, x, *, steps, probes):
            self.asked += ((len(x), steps),)
            exact = multivariate_normal(np.zeros(3), covariance).logpdf(x.double().numpy())
            return torch.from_numpy(exact + 0.03 / steps), torch.full((len(x),), 0.1)

    entries = [Entry("glp", Flow(torch.ones(3))), Entry("gaussian", gaussian_of(covariance))]
    settings = DensitySettings(density_rows=400, ode_steps=8, seed=1)
    results = density.run(entries, DensityData(x, np.arange(800) // 4, fit=train), settings)
    labels = ["glp", "gaussian", "diagonal gaussian", "mixture", "neighbours"]
    found = {m: value(results, m, "bits_per_dim", "rows=stored") for m in labels}
    scale = x.double().std(0, correction=0)
    entropy = 0.5 * np.log(np.linalg.det(2 * np.pi * np.e * covariance)) - float(scale.log().sum())
    assert found["gaussian"].value == pytest.approx(entropy / 3 / np.log(2), abs=0.05)
    assert found["gaussian"].ci_low < entropy / 3 / np.log(2) < found["gaussian"].ci_high
    assert found["glp"].value == pytest.approx(found["gaussian"].value, abs=0.01)
    assert found["diagonal gaussian"].value > found["gaussian"].value + 0.1
    probe_error = value(results, "glp", "bits_probe_error", "rows=stored").value
    assert probe_error == pytest.approx(0.1 / 20 / 3 / np.log(2), rel=1e-6)
    assert entries[0].model.asked == ((400, 8), (400, 8), (16, 4))  # stored, dequantised, and coarser on a few
    step = value(results, "glp", "bits_step_change", "rows=stored").value
    assert step == pytest.approx((0.03 / 4 - 0.03 / 8) / 3 / np.log(2), rel=1e-3)
    gap = value(results, "glp", "bits_per_dim_diff:gaussian", "rows=stored")
    assert gap.value == pytest.approx(found["glp"].value - found["gaussian"].value, abs=1e-9)
    # In coarse cells a stored number takes fewer bits than 16, and a density without cells says something else.
    spread = value(results, "gaussian", "bits_per_dim", "rows=dequantised").value
    assert spread == pytest.approx(found["gaussian"].value, abs=0.01)
    assert 6 < value(results, "gaussian", "bits_per_number", "rows=dequantised").value < 12


def gaussian_of(covariance):
    values, vectors = np.linalg.eigh(covariance)
    return Gaussian(torch.zeros(3), torch.ones(3), torch.as_tensor(values).float(), torch.as_tensor(vectors).float())


def test_copies_of_training_rows_have_no_bits_until_they_are_dequantised():
    train, _ = correlated(600)
    train[:20] = train[0]
    x = torch.cat([train[:1], correlated(50, seed=3)[0]])
    results = density.run([], DensityData(x, np.arange(51), fit=train), DensitySettings(density_rows=51))
    assert any("neighbours: the log-density of 1 of 51 stored rows is not finite" in s for s in results.failures)
    frame = results.frame()
    kept = frame[(frame.model == "neighbours") & (frame.metric == "bits_per_dim")]
    assert kept.setting.tolist() == ["rows=dequantised"]
    assert np.isfinite(kept.value).all()
