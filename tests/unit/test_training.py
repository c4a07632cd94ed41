"""Training: it learns, its schedule and noise are what they should be, it refuses what cannot work."""

import itertools
import math

import pytest
import torch

from glp_lens.errors import InputError
from glp_lens.flow.schedule import stratified_sigmas
from glp_lens.models.denoiser import DenoiserConfig
from glp_lens.models.fitting import initial_denoiser
from glp_lens.training.config import RECIPES, TrainConfig, recipe
from glp_lens.training.loop import snapshot_steps
from glp_lens.training.objective import Batch, draw_noise, step_seed, validation_loss
from tests.unit.toy_training import COVARIANCE_ROOT, D, batches, denoiser, rows, train


def test_loss_falls_to_the_closed_form_bound_of_a_gaussian():
    """The best loss on Gaussian data is (pi / 2) mean sqrt(eigenvalues of the covariance)."""
    eigenvalues = torch.linalg.eigvalsh(COVARIANCE_ROOT @ COVARIANCE_ROOT.T).clamp(min=0)
    bound = math.pi / 2 * float(eigenvalues.sqrt().mean())
    model = denoiser()
    config = TrainConfig(rows=256 * 600, batch_size=256, lr=4e-3, sigmas="stratified", autocast=False)
    x = rows(8192, 9)
    before = validation_loss(model, Batch(x))["validation_loss"]
    result = train(model, batches(256), config, validation=Batch(x))
    after = validation_loss(model, Batch(x))["validation_loss"]
    assert before > 1.4
    assert after == pytest.approx(bound, rel=0.06)
    assert result.history[-1]["rows"] == 256 * 600
    assert result.history[-1]["validation_loss"] == pytest.approx(after, rel=1e-5)


def test_learning_rate_follows_warm_up_and_cosine():
    config = TrainConfig(rows=1000, batch_size=1, lr=1.0)
    assert config.lr_at(0) == pytest.approx(0.01)
    assert config.lr_at(10) == pytest.approx(1.0)
    assert config.lr_at(999) == pytest.approx(0.1)
    middle = config.lr_at(10 + 989 // 2)
    assert middle == pytest.approx(0.55, abs=2e-3)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rows": 10, "batch_size": 11}, "at least one whole batch"),
        ({"lr": 0.0}, "lr must be"),
        ({"sigmas": "cosine"}, "sigmas must be"),
        ({"optimizer": "sgd"}, "optimizer must be 'adamw' or 'muon', got 'sgd'"),
        ({"ema": 1.0}, "ema is a decay"),
        ({"accumulate": 0}, "accumulate must be between 1 and"),
        ({"seed": -1}, "seed must be between 0 and"),
        ({"clip": math.nan}, "clip must be"),
        ({"warmup": 1.5}, "warmup is a share"),
    ],
)
def test_settings_that_cannot_train_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        TrainConfig(**settings)


def test_every_step_of_every_seed_has_noise_of_its_own():
    draws = {
        tuple(torch.randn(2, generator=torch.Generator().manual_seed(step_seed(seed, step))).tolist())
        for seed in range(20)
        for step in range(20)
    }
    assert len(draws) == 400


def test_recipes_are_the_papers_with_departures():
    paper = recipe("paper", 10_000)
    assert (paper.lr, paper.batch_size, paper.sigmas, paper.clip) == (5e-5, 4096, "uniform", 1.0)
    assert (paper.lr_start, paper.lr_end, paper.warmup) == (0.01, 0.1, 0.01)
    changed = recipe("small", 10_000, lr=None, batch_size=77, ema=0.9)
    assert (changed.lr, changed.batch_size, changed.ema) == (RECIPES["small"]["lr"], 77, 0.9)
    with pytest.raises(InputError, match=r"recipe must be one of paper, small.*got 'secret'"):
        recipe("secret", 10_000)


def test_the_peak_of_fast_falls_with_the_width_and_one_that_is_given_does_not():
    fast = recipe("fast", 10_000)
    assert [fast.for_width(width).lr for width in (100, 576, 1152, 5760)] == pytest.approx([2e-3, 2e-3, 1e-3, 2e-4])
    assert recipe("fast", 10_000, lr=3e-3).for_width(5760).lr == 3e-3
    assert recipe("paper", 10_000).for_width(5760).lr == 5e-5
    assert fast.for_width(1152).for_width(1152).lr == pytest.approx(1e-3)


def test_a_batch_that_cannot_be_cut_into_equal_parts_is_refused():
    with pytest.raises(InputError, match="batch_size=20 does not among 1 process.* times accumulate=3"):
        train(denoiser(), batches(20), TrainConfig(rows=40, batch_size=20, accumulate=3))


@pytest.mark.parametrize("sigmas", ["uniform", "stratified"])
def test_noise_of_a_row_is_the_same_however_the_batch_is_cut(sigmas):
    """The cuts fall inside, at the edges of, and across the blocks of 256 rows that noise is drawn in."""
    config = TrainConfig(rows=1000, batch_size=700, sigmas=sigmas, seed=5)
    whole = draw_noise(config, 3, range(700), 7, torch.device("cpu"))
    for cuts in ([0, 350, 700], [0, 1, 256, 300, 513, 700], [0, 255, 257, 699, 700]):
        for start, stop in itertools.pairwise(cuts):
            part = draw_noise(config, 3, range(start, stop), 7, torch.device("cpu"))
            for name in ("eps", "sigma", "drop"):
                assert torch.equal(getattr(part, name), getattr(whole, name)[start:stop])
    assert len(set(whole.eps[:, 0].tolist())) == 700  # no block repeats another
    other = draw_noise(config, 4, range(700), 7, torch.device("cpu"))
    assert not torch.equal(whole.eps, other.eps)
    assert not torch.equal(whole.sigma, other.sigma)


def test_noise_is_standard_normal_and_drops_the_share_of_conditions_asked_for():
    config = TrainConfig(rows=20_000, batch_size=20_000, condition_dropout=0.3)
    noise = draw_noise(config, 0, range(20_000), 5, torch.device("cpu"))
    torch.testing.assert_close(torch.cov(noise.eps.T), torch.eye(5), atol=0.05, rtol=0)
    assert float(noise.drop.float().mean()) == pytest.approx(0.3, abs=0.015)
    assert float(noise.sigma.mean()) == pytest.approx(0.5, abs=0.01)


def test_condition_dropout_hides_the_condition_from_those_rows_alone():
    batch = Batch(rows(5, 0), condition=torch.arange(10.0).reshape(5, 2))
    drop = torch.tensor([False, True, False, False, True])
    hidden = batch.without_condition(drop).condition
    assert torch.equal(hidden.isnan().all(1), drop)
    assert torch.equal(hidden[~drop], batch.condition[~drop])


def test_weights_of_rows_weigh_their_loss():
    model, x = denoiser(), rows(9, 4)
    weight = torch.tensor([0.0] * 4 + [2.0] * 5)
    weighted = validation_loss(model, Batch(x, weight=weight), seed=1)["validation_loss"]
    assert weighted == pytest.approx(2 * 5 / 9 * tail_loss(model, x, 4), rel=1e-5)


def tail_loss(model, x, first):
    """Loss of the rows from `first` on, by hand, with the noise that validation fixes for all."""
    generator = torch.Generator().manual_seed(1)
    eps = torch.randn(x.shape, generator=generator)
    sigma = stratified_sigmas(len(x), generator)[:, None]
    with torch.no_grad():
        error = (model((1 - sigma) * x + sigma * eps, sigma[:, 0]) - (eps - x)) ** 2
    return float(error[first:].mean())


def test_validation_noise_is_fixed_and_its_bins_make_up_the_total():
    model, held = denoiser(), Batch(rows(500, 2))
    loss = validation_loss(model, held)
    assert loss == validation_loss(model, held, rows=37)  # however it is cut
    assert len(loss) == 11
    # The levels cover [0, 1] evenly, so the total is the mean of the tenths, up to a row more or less in one.
    assert loss["validation_loss"] == pytest.approx(sum(v for k, v in loss.items() if ":" in k) / 10, rel=5e-3)


def test_validation_varies_less_with_the_draw_than_independent_noise_levels():
    """The spread over seeds, as the noise levels are stratified or drawn row by row."""
    model, x = denoiser(), rows(400, 2)
    config = TrainConfig(rows=256 * 100, batch_size=256, lr=3e-3, sigmas="stratified", autocast=False)
    train(model, batches(256), config)

    @torch.no_grad()
    def independent(seed):
        generator = torch.Generator().manual_seed(seed)
        eps = torch.randn(x.shape, generator=generator)
        sigma = torch.rand(len(x), 1, generator=generator)
        return float(((model((1 - sigma) * x + sigma * eps, sigma[:, 0]) - (eps - x)) ** 2).mean())

    ours = torch.tensor([validation_loss(model, Batch(x), seed=seed)["validation_loss"] for seed in range(60)])
    theirs = torch.tensor([independent(seed) for seed in range(60)])
    assert float(ours.mean()) == pytest.approx(float(theirs.mean()), rel=0.02)
    assert float(ours.std()) < 0.9 * float(theirs.std())


@pytest.mark.parametrize("n", [1, 2, 5, 11])
def test_snapshots_are_evenly_spaced_on_a_logarithmic_scale(n):
    marks = sorted(snapshot_steps(1024, n))
    assert marks[-1] == 1024
    assert len(marks) == n
    if n == 11:
        assert marks == [2**i for i in range(11)]
    assert snapshot_steps(1024, 0) == set()
    assert snapshot_steps(3, 50) == {1, 2, 3}


def test_a_held_rate_falls_on_a_line_at_the_end():
    config = TrainConfig(rows=1001, batch_size=1, lr=1.0, lr_end=0.0, warmup=0.0, hold=0.6, decay="linear")
    # One step of warm-up, then 999 steps of which three fifths are at the peak.
    assert config.lr_at(1) == config.lr_at(600) == 1.0
    assert config.lr_at(800) == pytest.approx(0.5, abs=3e-3)
    assert config.lr_at(1000) == pytest.approx(0.0, abs=1e-9)


def test_a_tied_start_gives_back_what_comes_in_and_still_learns():
    """`out_proj` after `in_proj` is the identity, as the network is wider than its input."""
    model = initial_denoiser(DenoiserConfig(D, 32, 64, 2), TrainConfig(init="tied", seed=3))
    z = torch.randn(50, D, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.out_proj(model.in_proj(z)), z)
    before = validation_loss(model, next(batches(256)(0)))["validation_loss"]
    train(model, batches(32), TrainConfig(rows=32 * 60, batch_size=32, lr=2e-3, beta2=0.95, autocast=False))
    assert validation_loss(model, next(batches(256)(0)))["validation_loss"] < before - 0.1
