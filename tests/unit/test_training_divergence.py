"""A loss that is not finite stops the training at once, and what was good before is kept."""

import math

import pytest
import torch

from glp_lens.errors import InputError
from glp_lens.training import loop
from glp_lens.training.config import TrainConfig
from tests.unit.toy_training import batches, denoiser, same, train, weights

SIZE = 18


def config(**changes):
    return TrainConfig(**{"rows": 20 * SIZE, "batch_size": SIZE, "lr": 1e-3, "autocast": False, **changes})


def told(model, feed, settings, **options):
    with pytest.raises(InputError) as caught:
        train(model, feed, settings, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("parts", [1, 3])
def test_one_bad_number_in_a_batch_stops_the_run_at_that_step_with_the_weights_before_it(parts):
    settings = config(accumulate=parts, lr_end=1.0)
    model, good, asked = denoiser(), denoiser(), []

    def feed(k):
        for at, batch in enumerate(batches(SIZE, spoilt_at=7)(k), k):
            asked.append(at)
            yield batch

    line = told(model, feed, settings)
    assert "training diverged at step 8: loss or gradient is not finite" in line
    assert "lower lr (now 0.001)" in line
    assert "nothing was saved before" in line
    assert asked == list(range(8))
    with pytest.raises(KeyError):  # the same run, left before that step
        train(good, stopping(7), settings)
    assert same(weights(model), weights(good))


def stopping(at):
    def start(k):
        for step, batch in enumerate(batches(SIZE)(k), k):
            if step == at:
                raise KeyError
            yield batch

    return start


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_the_last_good_state_is_kept_named_and_goes_on(tmp_path, ema):
    state, settings = tmp_path / "state.safetensors", config(ema=ema)
    model, whole = denoiser(), denoiser()
    line = told(model, batches(SIZE, spoilt_at=9), settings, state=state, log_points=5, save_seconds=0)
    assert line.endswith(f"the last good state, of step 8, is kept in {state}")
    # Once the data are mended, the run goes on from there.
    mended = denoiser(seed=5)
    train(mended, batches(SIZE), settings, state=state, log_points=5)
    train(whole, batches(SIZE), settings)
    assert same(weights(mended), weights(whole))


def test_the_last_good_weights_become_a_checkpoint(tmp_path):
    model, kept = denoiser(), {}
    told(
        model, batches(SIZE, spoilt_at=9), config(ema=0.9), state=tmp_path / "state", log_points=5, save_seconds=0,
        snapshots=3, on_snapshot=lambda step: kept.update({step: weights(model)}),
    )  # fmt: skip
    assert max(kept) == 8
    assert all(bool(w.isfinite().all()) for w in kept[8].values())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_huge_learning_rate_is_told_and_never_saved(tmp_path, optimizer):
    state = tmp_path / "state.safetensors"
    settings = config(lr=1e6, lr_start=1.0, optimizer=optimizer)
    line = told(denoiser(), batches(SIZE), settings, state=state, log_points=20, save_seconds=0)
    assert "lower lr (now 1e+06)" in line
    if state.exists():
        model = denoiser()
        with pytest.raises(KeyError):
            train(model, stopping(int(line.split("of step ")[1].split(",")[0])), settings, state=state)
        assert all(bool(w.isfinite().all()) for w in weights(model).values())


def test_where_looking_costs_time_no_bad_weights_are_saved_between_two_looks(tmp_path, monkeypatch):
    """As on an accelerator: the loss is looked at every 20 steps, and before anything is kept."""

    class Seldom(loop._Trainer):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.always_look = False

    monkeypatch.setattr(loop, "_Trainer", Seldom)
    saved, kept = [], []
    options = {"state": tmp_path / "state", "log_points": 1, "snapshots": 4, "on_snapshot": kept.append}
    line = told(
        denoiser(), batches(SIZE, spoilt_at=9), config(), on_saved=saved.append,
        save_now=lambda step: step in (6, 13), **options,
    )  # fmt: skip
    assert "training diverged at step 13" in line
    assert "the last good state, of step 6" in line
    assert saved == [6]
    assert sorted(set(kept)) == [1, 3, 6, 7]


def test_weights_that_an_update_overflows_are_not_saved(tmp_path):
    """Loss and gradient of the step were finite; the next step's would not be."""
    model, state = denoiser(), tmp_path / "state.safetensors"

    usual = loop._Trainer.step

    def overflowing(self, step, batch):
        total = usual(self, step, batch)
        if step == 4:
            with torch.no_grad():
                self.denoiser.out_proj.bias[2] = math.inf
        return total

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Trainer, "step", overflowing)
        line = told(model, batches(SIZE), config(), state=state, log_points=20, save_seconds=0)
    assert "training diverged at step 5" in line
    assert "of step 4" in line
