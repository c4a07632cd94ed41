"""Optimiser steps that take more and more batches: which they take, and that they are steps on all their rows."""

import threading
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from glp_lens import GLP, SAE, recipe
from glp_lens.activations import write_store
from glp_lens.errors import InputError
from glp_lens.training.config import TrainConfig
from glp_lens.training.objective import Batch, draw_noise, flow_matching_loss
from tests.unit.toy_training import D, batches, denoiser, rows, train, weights

SIZE = 24
GROWING = TrainConfig(
    rows=23 * SIZE, batch_size=SIZE, grow_rows=3 * SIZE, lr=1e-3, lr_start=1.0, lr_end=1.0, autocast=False
)
GROUPS = [(0, 1), (1, 1), (2, 1), (3, 2), (5, 1), (6, 4), (10, 2), (12, 8), (20, 3)]
"""First batch and number of batches of each step, if the number doubles after 3, 6 and 12 batches of 23."""


def steps_of(config):
    at, found = 0, []
    while at < config.steps:
        found.append((at, config.batches_at(at)))
        at += config.batches_at(at)
    return found


def test_the_number_of_batches_doubles_each_time_as_many_were_seen_again():
    assert steps_of(replace(GROWING, grow_most=8)) == GROUPS
    assert max(n for _, n in steps_of(GROWING)) == 4
    assert GROWING.largest_batch == 4 * SIZE
    assert [each.updates for each in (GROWING, replace(GROWING, grow_most=8))] == [10, len(GROUPS)]
    assert steps_of(replace(GROWING, grow_most=3)) == steps_of(replace(GROWING, grow_most=2))
    assert {n for _, n in steps_of(replace(GROWING, grow_rows=0))} == {1}


@pytest.mark.parametrize("grow_rows", [1, SIZE - 1, SIZE + 1, 5 * SIZE])
def test_steps_are_of_all_batches_and_begin_where_they_say(grow_rows):
    config = replace(GROWING, grow_rows=grow_rows)
    for at, n in steps_of(config):
        assert n >= 1
        assert [config.begins_at(step) for step in range(at, at + n)] == [at] * n
    assert sum(n for _, n in steps_of(config)) == config.steps


def test_the_rate_is_higher_by_the_root_of_the_number():
    for at, together in ((0, 1), (3, 2), (6, 4), (22, 4)):
        assert GROWING.lr_at(at) == pytest.approx(1e-3 * together**0.5)


def test_it_is_the_training_on_larger_batches():
    """Against torch's AdamW on the rows of each step, in the same order and with the same noise."""
    config = replace(GROWING, grow_most=8, clip=0.5)
    ours, theirs = denoiser(), denoiser()
    result = train(ours, batches(SIZE), config, log_points=config.steps)
    optimizer, feed, losses = AdamW(theirs.parameters(), lr=1e-3, betas=(0.9, 0.999)), batches(SIZE)(0), []
    for at, n in GROUPS:
        noises = [draw_noise(config, step, range(SIZE), D, torch.device("cpu")) for step in range(at, at + n)]
        eps, sigma = torch.cat([noise.eps for noise in noises]), torch.cat([noise.sigma for noise in noises])
        x = torch.cat([next(feed).x for _ in range(n)])
        optimizer.param_groups[0]["lr"] = (
            1e-3 * {0: 1, 3: 2, 6: 4, 12: 8}[max(p for p in (0, 3, 6, 12) if p <= at)] ** 0.5
        )
        optimizer.zero_grad()
        loss = flow_matching_loss(theirs, Batch(x), eps, sigma).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    assert [entry["step"] for entry in result.history] == [at + n for at, n in GROUPS]
    assert [entry["loss"] for entry in result.history] == pytest.approx(losses, rel=1e-4)
    expected = weights(theirs)
    for name, value in weights(ours).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)


def test_means_between_two_entries_count_rows():
    """Not steps, which are of unequal size."""
    config = replace(GROWING, lr=1e-12)
    each = train(denoiser(), batches(SIZE), config, log_points=config.steps).history
    once = train(denoiser(), batches(SIZE), config, log_points=1).history
    whole = sum(b["loss"] * (b["rows"] - a["rows"]) for a, b in zip([{"rows": 0}, *each], each, strict=False))
    assert once[-1]["loss"] == pytest.approx(whole / config.rows, rel=1e-5)


@pytest.mark.parametrize("changes", [{"grow_rows": -1}, {"grow_most": 0}])
def test_numbers_below_their_least_are_refused(changes):
    with pytest.raises(InputError, match="must be between"):
        replace(GROWING, **changes)


@pytest.mark.parametrize("how", ["done", "diverged", "sae"])
def test_a_training_leaves_no_thread_behind(tmp_path, how):
    """Nor the windows of the store that it holds; not even while an error is looked at, whose frames stay alive."""
    store = write_store(tmp_path / "store", rows(3000, 0), hook="blocks.0.hook_resid_post")
    before = set(threading.enumerate())
    readers = lambda: [t for t in set(threading.enumerate()) - before if t.name.startswith("batches")]  # noqa: E731
    if how == "sae":
        model = SAE.fit(store, n_latents=32, k=4, rows=512)
        assert readers() == []
        assert model.n_features
        return
    config = recipe("fast", rows=512, batch_size=64, **({"lr": 1e30} if how == "diverged" else {}))
    if how == "done":
        glp = GLP.fit(store, replace(config, grow_rows=128), d_model=24, d_mlp=32, n_layers=1)
        assert readers() == []
        assert "batch 64 to 256," in glp.provenance["training"]["recipe"]
        return
    with pytest.raises(InputError, match="diverged"):
        GLP.fit(store, config, d_model=24, d_mlp=32, n_layers=1)
    assert readers() == []


def test_parts_of_a_step_stay_as_small_as_those_of_one_batch():
    """What is split since it does not fit into memory must fit when batches have grown; the weights are the same."""
    seen, whole, split = [], denoiser(), denoiser()
    train(whole, batches(SIZE), GROWING)
    split.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    train(split, batches(SIZE), replace(GROWING, accumulate=3))
    assert set(seen) == {SIZE // 3}
    assert len(seen) == 3 * GROWING.steps
    expected = weights(whole)
    for name, value in weights(split).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)
