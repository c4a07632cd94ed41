"""A training that begins where a longer one still was the same as it ends with the weights that it would have had."""

from dataclasses import replace

import pytest
import torch

from glp_lens.errors import InputError
from glp_lens.training.config import TrainConfig, recipe
from glp_lens.training.objective import Batch
from tests.unit.toy_training import Killed, batches, denoiser, rows, same, train, weights

SIZE = 24
LONG = TrainConfig(
    rows=40 * SIZE, batch_size=SIZE, lr=1e-3, lr_end=0.0, warmup_rows=3 * SIZE, hold=0.6, decay="linear", autocast=False
)
SHORT = replace(LONG, rows=17 * SIZE)
HELD = Batch(rows(50, 8))


def timeless(history):
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in history]


@pytest.fixture
def trunk(tmp_path):
    """The state of the long training where the rate of the short one begins to fall."""
    path = tmp_path / "trunk.safetensors"
    train(denoiser(), batches(SIZE), LONG, keep={SHORT.steps_held: path})
    return path


@pytest.mark.parametrize(
    "changes",
    [{}, {"autocast": True}, {"ema": 0.9, "sigmas": "stratified"}, {"optimizer": "muon"}, {"grow_rows": 2 * SIZE}],
)
def test_a_branch_is_the_training_that_was_made_for_its_budget(tmp_path, changes):
    long, short = replace(LONG, **changes), replace(SHORT, **changes)
    path = tmp_path / "trunk.safetensors"
    train(denoiser(), batches(SIZE), long, keep={short.steps_held: path})
    whole, branch = denoiser(), denoiser(seed=9)  # whose own weights do not matter
    expected = train(whole, batches(SIZE), short, validation=HELD, log_points=short.steps)
    seen = []

    def feed(start):
        seen.append(start)
        return batches(SIZE)(start)

    found = train(branch, feed, short, validation=HELD, log_points=short.steps, start=path)
    assert seen == [short.steps_held]
    assert same(weights(branch), weights(whole))
    tail = [entry for entry in timeless(expected.history) if entry["step"] > short.steps_held]
    assert [e["validation_loss"] for e in timeless(found.history)[-len(tail) :]] == [e["validation_loss"] for e in tail]


def test_a_branch_that_was_interrupted_goes_on_from_its_own_state(tmp_path, trunk):
    whole = denoiser()
    train(whole, batches(SIZE), SHORT)
    state = tmp_path / "branch.safetensors"
    with pytest.raises(Killed):
        train(
            denoiser(), batches(SIZE, killed_at=SHORT.steps - 1), SHORT, start=trunk, state=state, save_seconds=0,
            log_points=SHORT.steps,
        )  # fmt: skip
    trunk.unlink()
    again = denoiser(seed=5)
    train(again, batches(SIZE), SHORT, start=trunk, state=state)
    assert same(weights(again), weights(whole))


def test_keeping_states_does_not_change_the_long_training(tmp_path):
    plain, kept = denoiser(), denoiser()
    train(plain, batches(SIZE), LONG)
    train(kept, batches(SIZE), LONG, keep={5: tmp_path / "a", SHORT.steps_held: tmp_path / "b"})
    assert same(weights(kept), weights(plain))
    assert (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (replace(SHORT, lr=2e-3), "other settings or data"),
        (replace(SHORT, seed=1), "other settings or data"),
        (replace(SHORT, rows=12 * SIZE), "its learning rate was not that"),
        (replace(SHORT, rows=4 * SIZE), "its learning rate was not that"),
    ],
)
def test_a_state_of_another_course_is_refused(trunk, settings, words):
    with pytest.raises(InputError, match=words):
        train(denoiser(), batches(SIZE), settings, start=trunk)


def test_rates_that_rise_for_other_numbers_of_steps_are_no_trunk(tmp_path):
    path, share = tmp_path / "trunk.safetensors", replace(LONG, warmup_rows=0, warmup=0.1)
    short = replace(share, rows=17 * SIZE)
    train(denoiser(), batches(SIZE), share, keep={short.steps_held: path})
    with pytest.raises(InputError, match="warmup_rows"):
        train(denoiser(), batches(SIZE), short, start=path)


def test_a_missing_or_damaged_state_is_one_line(tmp_path, trunk):
    with pytest.raises(InputError, match="does not exist"):
        train(denoiser(), batches(SIZE), SHORT, start=tmp_path / "nothing")
    trunk.write_bytes(trunk.read_bytes()[:-40])
    with pytest.raises(InputError, match="training state"):
        train(denoiser(), batches(SIZE), SHORT, start=trunk)


def test_the_rate_is_at_its_peak_up_to_where_it_is_said_to_be():
    for n in (64, 100, 391, 1000):
        config = recipe("fast", rows=256 * n, warmup_rows=256 * 8, grow_rows=0)
        assert config.lr_at(config.steps_held - 1) == config.lr
        assert config.lr_at(config.steps_held) < config.lr
        assert torch.isclose(torch.tensor(config.lr_at(config.steps - 1)), torch.tensor(0.0))
