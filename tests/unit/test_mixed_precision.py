"""Training with bfloat16 weights that stay in place: the numbers of autocast and torch's AdamW, nothing left behind."""

import copy

import pytest
import torch
from torch.optim import AdamW

from glp_lens.training import optim
from glp_lens.training.config import TrainConfig
from glp_lens.training.mixed_precision import Linear, MixedAdamW
from glp_lens.training.objective import Batch
from tests.unit.toy_training import batches, denoiser, rows, same, train, weights

CONFIG = TrainConfig(rows=40 * 64, batch_size=64, lr=4e-3, sigmas="stratified", ema=0.9, embed_rows=10 * 64)


def by_autocast(monkeypatch):
    monkeypatch.setattr(optim, "_mixed", lambda *_: False)


def conditioned(size):
    """Batches of a prior of three layers and two classes, some rows without a class."""

    def start(k):
        while True:
            layer = torch.arange(size) % 3
            condition = torch.nn.functional.one_hot(torch.arange(size) % 2, 2).float()
            condition[::5] = torch.nan
            yield Batch(rows(size, 1000 + k), layer, condition, weight=torch.linspace(0.5, 1.5, size))
            k += 1

    return start


@pytest.mark.parametrize(
    ("shape", "feed"),
    [({}, batches), ({"multi_layer_n_layers": 3, "d_condition": 2}, conditioned)],
    ids=["plain", "layers and classes"],
)
@pytest.mark.parametrize("recompute", [False, True])
def test_training_is_that_of_autocast_and_adamw(monkeypatch, shape, feed, recompute):
    """Rounding apart, which the other order of sums changes: losses agree to a thousandth, weights to their updates."""
    ours, theirs, start = (denoiser(**shape) for _ in range(3))
    held = next(feed(64)(0))
    result = train(ours, feed(64), CONFIG, log_points=10, recompute=recompute, validation=held)
    by_autocast(monkeypatch)
    expected = train(theirs, feed(64), CONFIG, log_points=10, recompute=recompute, validation=held)
    for a, b in zip(result.history, expected.history, strict=True):
        for name in ("loss", "validation_loss"):
            assert a[name] == pytest.approx(b[name], rel=3e-3)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=2e-2)
    assert result.history[-1]["loss"] < 0.9 * result.history[0]["loss"]
    for (name, a), b, c in zip(ours.named_parameters(), theirs.parameters(), start.parameters(), strict=True):
        assert (a - b).norm() <= 0.05 * (b - c).norm(), name


def test_gradients_are_those_of_autocast():
    """Of one step, and of two layers' uses of one weight; the weights get none of their own."""
    torch.manual_seed(0)
    plain = torch.nn.ModuleList([Linear(7, 12), torch.nn.LayerNorm(12), Linear(12, 5)])
    mixed = copy.deepcopy(plain)
    optimizer = MixedAdamW(mixed, clip=1.0, lr=1e-3)
    x = torch.randn(33, 7, requires_grad=True)

    def loss(layers):
        h = layers[1](layers[0](x).float())
        return (layers[2](h).float() ** 2).sum() + layers[2].without_bias(h.flip(0)).float().cos().sum()

    with torch.autocast("cpu", torch.bfloat16):
        expected = loss(plain)
    expected.backward()
    expected_input, x.grad = x.grad, None
    found = loss(mixed)
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(x.grad, expected_input, rtol=2e-2, atol=2e-3)
    norm = torch.stack([p.grad.norm() for p in plain.parameters()]).norm()
    assert float(optimizer.clip()) == pytest.approx(float(norm), rel=1e-3)
    assert all(layer.weight.grad is None for layer in (mixed[0], mixed[2]))


@pytest.mark.parametrize("clip", [0.05, 1e6])
def test_steps_are_those_of_adamw(clip):
    """With the same bfloat16 gradients, in float64 arithmetic of ours: clipping, decay, averages, two rates."""
    torch.manual_seed(1)
    module = torch.nn.Sequential(Linear(9, 300), torch.nn.LayerNorm(300), Linear(300, 4))
    truth = copy.deepcopy(module).double()
    options = {"lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
    groups, same_groups = (
        [{"params": [*layers[1:].parameters()]}, {"params": [*layers[0].parameters()]}] for layers in (module, truth)
    )
    optimizer, reference = MixedAdamW(module, groups, clip=clip, **options), AdamW(same_groups, **options)
    for step in range(6):
        for groups in (optimizer.param_groups, reference.param_groups):
            groups[1]["lr"] = 3e-3 / (1 + step)
        x = torch.randn(21, 9, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (module(x).float() ** 2).sum().backward()
        norm = optimizer.clip()
        for layer, other in zip(module, truth, strict=True):
            for name in ("weight", "bias"):
                copies = getattr(layer, "_copies", None)
                own = getattr(layer, name).grad if copies is None else copies[name == "bias"].grad
                getattr(other, name).grad = own.double()
        total = torch.nn.utils.clip_grad_norm_(truth.parameters(), clip)
        assert float(norm) == pytest.approx(float(total), rel=1e-5)
        optimizer.step()
        reference.step()
    for a, b in zip(module.parameters(), truth.parameters(), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=2e-5)
        assert optimizer.state[a]["step"] == 6


def test_afterwards_nothing_is_left_of_it():
    model = denoiser()
    train(model, batches(64), CONFIG)
    storages = [p.untyped_storage() for p in model.parameters()]
    assert len({s.data_ptr() for s in storages}) == len(storages)
    assert all(s.nbytes() == p.numel() * 4 for s, p in zip(storages, model.parameters(), strict=True))
    x, sigma, fresh = rows(10, 3), torch.full((10,), 0.5), denoiser(seed=1)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(model.requires_grad_(True)(x, sigma), fresh(x, sigma))


@pytest.mark.parametrize("changes", [{"accumulate": 2}, {"autocast": False}, {"optimizer": "muon"}])
def test_it_is_left_out_where_it_does_not_apply(changes):
    config = TrainConfig(**{**CONFIG.__dict__, **changes})
    assert not any(isinstance(optimizer, MixedAdamW) for optimizer in optim.optimizers(denoiser(), config))
    assert any(isinstance(optimizer, MixedAdamW) for optimizer in optim.optimizers(denoiser(), CONFIG))


def test_a_resumed_run_may_go_on_by_autocast(tmp_path, monkeypatch):
    """The state is that of torch's AdamW, parameter by parameter: another machine may continue it in its way."""
    from tests.unit.toy_training import Killed

    state, whole, resumed = tmp_path / "state", denoiser(), denoiser(seed=5)
    train(whole, batches(64), CONFIG)
    with pytest.raises(Killed):
        train(denoiser(), batches(64, killed_at=20), CONFIG, state=state, save_seconds=0)
    by_autocast(monkeypatch)
    train(resumed, batches(64), CONFIG, state=state)
    assert not same(weights(whole), weights(resumed))
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-2)
