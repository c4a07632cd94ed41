"""Training: it learns, it resumes to the same weights, it refuses what cannot work."""

import math

import pytest
import torch

from glp_lens.errors import InputError
from glp_lens.models.denoiser import Denoiser, DenoiserConfig
from glp_lens.training.config import TrainConfig
from glp_lens.training.loop import train
from glp_lens.training.objective import Batch, step_seed, validation_loss

D = 6
COVARIANCE_ROOT = torch.randn(D, D, generator=torch.Generator().manual_seed(3))
COVARIANCE_ROOT /= (COVARIANCE_ROOT**2).sum(1, keepdim=True).sqrt()  # unit variances


def denoiser(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Denoiser(DenoiserConfig(D, 32, 64, 2))


def batches(size):
    def start(k):
        while True:
            generator = torch.Generator().manual_seed(1000 + k)
            yield Batch(torch.randn(size, D, generator=generator) @ COVARIANCE_ROOT.T)
            k += 1

    return start


def test_loss_falls_to_the_closed_form_bound_of_a_gaussian():
    """The best loss on Gaussian data is (pi / 2) mean sqrt(eigenvalues of the covariance)."""
    eigenvalues = torch.linalg.eigvalsh(COVARIANCE_ROOT @ COVARIANCE_ROOT.T).clamp(min=0)
    bound = math.pi / 2 * float(eigenvalues.sqrt().mean())
    model = denoiser()
    config = TrainConfig(rows=256 * 1200, batch_size=256, lr=3e-3, sigmas="stratified", autocast=False)
    x = torch.randn(8192, D, generator=torch.Generator().manual_seed(9)) @ COVARIANCE_ROOT.T
    before = validation_loss(model, Batch(x))["validation_loss"]
    result = train(model, batches(256), config, validation=Batch(x))
    after = validation_loss(model, Batch(x))["validation_loss"]
    assert before > 1.4
    assert after == pytest.approx(bound, rel=0.06)
    assert result.history[-1]["rows"] == 256 * 1200
    assert result.history[-1]["validation_loss"] == pytest.approx(after, rel=1e-5)


class Killed(Exception):
    pass


def dying(size, at):
    def start(k):
        for i, x in enumerate(batches(size)(k), k):
            if i == at:
                raise Killed
            yield x

    return start


@pytest.mark.parametrize("at", [1, 7, 13])
def test_a_killed_run_resumes_to_the_weights_of_one_that_was_not(tmp_path, at):
    config = TrainConfig(rows=20 * 32, batch_size=32, lr=1e-3, autocast=False)
    whole = denoiser()
    train(whole, batches(32), config, log_points=20)

    state = tmp_path / "state.safetensors"
    half = denoiser()
    with pytest.raises(Killed):
        train(half, dying(32, at), config, state=state, log_points=20, save_seconds=0)
    assert state.exists() == (at > 0)
    fresh = denoiser()
    result = train(fresh, batches(32), config, state=state, log_points=20, save_seconds=0)
    for got, want in zip(fresh.parameters(), whole.parameters(), strict=True):
        assert torch.equal(got, want)
    assert [entry["step"] for entry in result.history] == list(range(1, 21))
    # Until the model is saved, the state is all there is: training again gives the same at once.
    again = denoiser()
    train(again, dying(32, 0), config, state=state, log_points=20)
    for a, b in zip(again.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b)


def test_state_of_another_training_or_a_damaged_one_is_refused(tmp_path):
    state = tmp_path / "state.safetensors"
    config = TrainConfig(rows=320, batch_size=32, autocast=False)
    with pytest.raises(Killed):
        train(denoiser(), dying(32, 5), config, state=state, log_points=20, save_seconds=0)
    other = TrainConfig(rows=320, batch_size=32, lr=1e-4, autocast=False)
    with pytest.raises(InputError, match="other settings or data"):
        train(denoiser(), batches(32), other, state=state)
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(InputError, match="damaged"):
        train(denoiser(), batches(32), config, state=state)


def test_divergence_is_told_with_its_remedy():
    def bad(k):
        while True:
            yield Batch(torch.full((8, D), float("nan")))

    with pytest.raises(InputError, match="training diverged at step 1"):
        train(denoiser(), bad, TrainConfig(rows=80, batch_size=8, autocast=False))


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
