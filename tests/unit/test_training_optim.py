"""What updates the weights: parts of a step, Muon, and the running average."""

import copy
import dataclasses

import pytest
import torch

from glp_lens.training.config import TrainConfig
from glp_lens.training.objective import validation_loss
from glp_lens.training.optim import Average
from tests.unit.toy_training import Batch, batches, denoiser, rows, same, train, weights


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("parts", [2, 7])
def test_accumulated_parts_give_the_weights_of_one_batch(parts, optimizer):
    config = TrainConfig(rows=42 * 12, batch_size=42, lr=1e-3, optimizer=optimizer, sigmas="stratified", autocast=False)
    whole, cut = denoiser(), denoiser()
    # Muon computes its update in bfloat16, whatever the network runs in.
    one = train(whole, batches(42), config, log_points=12)
    other = train(cut, batches(42), TrainConfig(**{**config.__dict__, "accumulate": parts}), log_points=12)
    for a, b in zip(whole.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(b, a, atol=3e-5 if optimizer == "adamw" else 3e-4, rtol=1e-3)
    for a, b in zip(one.history, other.history, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)


def test_history_tells_the_gradient_norm_before_clipping():
    """Against the gradient of the first step, computed here from the same noise."""
    from glp_lens.training.objective import draw_noise, flow_matching_loss

    model = denoiser()
    config = TrainConfig(rows=30, batch_size=30, clip=1e-3, autocast=False)
    expected = copy.deepcopy(model)
    noise = draw_noise(config, 0, range(30), 6, torch.device("cpu"))
    flow_matching_loss(expected, next(batches(30)(0)), noise.eps, noise.sigma).mean().backward()
    norm = torch.cat([p.grad.flatten() for p in expected.parameters()]).double().norm()
    (entry,) = train(model, batches(30), config).history
    assert entry["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert entry["grad_norm"] > 1e-3


def test_muon_moves_the_inner_matrices_in_all_directions_alike():
    """Its update is orthogonal: singular values near 1, scaled to the size of an update of AdamW."""
    model = denoiser(d_model=20, d_mlp=52)
    before = weights(model)
    lr = 1e-3
    config = TrainConfig(rows=64, batch_size=64, lr=lr, lr_start=1.0, warmup=1.0, optimizer="muon", autocast=False)
    train(model, batches(64), config)
    ratios = {}
    for name, parameter in model.named_parameters():
        update = (before[name] * (1 - 0.01 * lr) - parameter.detach()) / lr
        if name.startswith("layers.") and parameter.ndim == 2:
            values = torch.linalg.svdvals(update) / (0.2 * max(update.shape) ** 0.5)
            assert values[0] < 1.3, name
            assert values[3] > 0.6, name
            ratios[name] = float(values[0] / values[3])
        else:  # the first update of AdamW is the sign of the gradient
            moved = update[update.abs() > 0.01].abs()
            torch.testing.assert_close(moved, torch.ones_like(moved), atol=0.05, rtol=0)
    assert len(ratios) == 8


def test_average_follows_its_recurrence():
    model = torch.nn.Linear(3, 2, bias=False)
    average = Average(model, 0.8)
    expected = model.weight.detach().double().clone()
    for step in range(60):
        with torch.no_grad():
            model.weight.copy_(torch.randn(2, 3, generator=torch.Generator().manual_seed(step)))
        average.update(model, step)
        decay = min(0.8, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach().double()
    torch.testing.assert_close(average.values["weight"].double(), expected, atol=1e-6, rtol=0)
    now = model.weight.detach().clone()
    with average.in_place(model):
        torch.testing.assert_close(model.weight.detach().double(), expected, atol=1e-6, rtol=0)
    assert torch.equal(model.weight, now)


def test_training_ends_with_the_average_and_validates_and_snapshots_it():
    """At a learning rate that does not fall, the average is the better model."""
    config = TrainConfig(rows=32 * 200, batch_size=32, lr=8e-3, lr_end=1.0, autocast=False)
    held = Batch(rows(1000, 8))
    plain, averaged = denoiser(), denoiser()
    train(plain, batches(32), config)
    taken = []
    result = train(
        averaged,
        batches(32),
        TrainConfig(**{**config.__dict__, "ema": 0.95}),
        validation=held,
        snapshots=3,
        on_snapshot=lambda _: taken.append(weights(averaged)),
    )
    after = validation_loss(averaged, held)["validation_loss"]
    assert result.history[-1]["validation_loss"] == pytest.approx(after, rel=1e-6)
    assert after < validation_loss(plain, held)["validation_loss"]
    assert len(taken) == 3
    assert same(taken[-1], weights(averaged))
    assert not same(taken[-1], weights(plain))


@pytest.mark.parametrize("changes", [{}, {"autocast": False}, {"optimizer": "muon"}])
def test_the_embedding_of_noise_levels_is_trained_at_a_falling_rate_of_its_own(changes):
    """Steps of Adam are about as large as the rate: what is moved at rates of 1/k adds up to a logarithm."""
    plain = TrainConfig(rows=60 * 64, batch_size=64, lr=2e-3, lr_start=1.0, lr_end=1.0, **changes)
    slowed = dataclasses.replace(plain, embed_rows=64)
    assert [slowed.embed_share(step) for step in (0, 1, 9)] == [1.0, 0.5, 0.1]
    assert plain.embed_share(1000) == 1.0
    start = weights(denoiser())
    moved = []
    for config in (plain, slowed):
        model = denoiser()
        train(model, batches(64), config)
        moved.append({name: float((p - start[name]).abs().mean()) for name, p in weights(model).items()})
    for name in start:
        ratio = moved[1][name] / moved[0][name]
        assert (ratio < 0.4) if name.startswith("time_embed") else (0.6 < ratio < 1.6), name
