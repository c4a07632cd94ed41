"""A training that was killed, at whatever moment, goes on to the weights of one that was not."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glp_lens.errors import InputError
from glp_lens.training import checkpoint
from glp_lens.training.config import TrainConfig
from glp_lens.training.loop import snapshot_steps
from glp_lens.training.objective import Batch
from tests.unit.toy_training import Killed, batches, denoiser, rows, same, train, weights

STEPS, SIZE = 12, 24
HELD = Batch(rows(50, 8))


def config(**changes):
    plain = {"rows": STEPS * SIZE, "batch_size": SIZE, "lr": 1e-3, "autocast": False}
    return TrainConfig(**{**plain, **changes})


EVERYTHING = config(optimizer="muon", ema=0.9, accumulate=3, sigmas="stratified", embed_rows=2 * SIZE)


def run(model, settings, *, feed=None, state=None, log_points=STEPS, **options):
    """Train with all that a run writes down: entries by step, and weights of snapshots by step."""
    entries, snapshots = {}, {}
    options.setdefault("on_entry", lambda e: entries.update({e["step"]: e}))
    options.setdefault("on_snapshot", lambda step: snapshots.update({step: weights(model)}))
    result = train(
        model, feed or batches(SIZE), settings, state=state, log_points=log_points, save_seconds=0,
        validation=HELD, snapshots=4, **options,
    )  # fmt: skip
    return result, entries, snapshots


def timeless(history):
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in history]


@pytest.fixture(
    scope="module",
    params=[config(), config(autocast=True, embed_rows=2 * SIZE), EVERYTHING, replace(EVERYTHING, grow_rows=3 * SIZE)],
    ids=["float32", "bfloat16", "everything", "growing batches"],
)
def whole(request):
    """The settings, and a run that nothing disturbed."""
    model = denoiser()
    result, _, snapshots = run(model, request.param)
    return request.param, weights(model), timeless(result.history), snapshots


@pytest.mark.parametrize("at", range(STEPS))
def test_killed_before_any_step(tmp_path, whole, at):
    settings, final, history, _ = whole
    state = tmp_path / "state.safetensors"
    with pytest.raises(Killed):
        run(denoiser(), settings, feed=batches(SIZE, killed_at=at), state=state)
    assert state.exists() == (at > 0)
    fresh = denoiser(seed=at)  # what is resumed replaces it
    result, _, _ = run(fresh, settings, state=state)
    assert same(weights(fresh), final)
    assert timeless(result.history) == history
    seconds = [entry["seconds"] for entry in result.history]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize("moment", ["before", "written", "after"])
@pytest.mark.parametrize("at", [1, 5, STEPS])
def test_killed_between_the_step_and_the_end_of_its_save(tmp_path, monkeypatch, whole, at, moment):
    """Before the state is written; once the new file is there but not in its place; and right after."""
    settings, final, history, _ = whole
    state, usual = tmp_path / "state.safetensors", checkpoint.write_tensors

    def dying(path, tensors, kind, metadata):
        step = checkpoint.json.loads(metadata["place"])["step"]
        if step == at and moment == "written":
            usual(path.with_name("half"), tensors, kind, metadata)
        if step != at or moment == "after":
            usual(path, tensors, kind, metadata)
        if step == at:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_tensors", dying)
        with pytest.raises(Killed):
            run(denoiser(), settings, state=state)
    fresh = denoiser()
    result, _, _ = run(fresh, settings, state=state)
    assert same(weights(fresh), final)
    assert timeless(result.history) == history


@settings(max_examples=5, deadline=None)
@given(kills=st.lists(st.integers(0, STEPS - 1), max_size=4), log_points=st.sampled_from([1, 3, 5, STEPS]))
def test_killed_several_times_with_few_saves(tmp_path_factory, kills, log_points):
    """States are written at logging points; what came after the last one is done again."""
    final = denoiser()
    undisturbed, _, expected = run(final, EVERYTHING, log_points=log_points)
    state = tmp_path_factory.mktemp("run") / "state.safetensors"
    entries, snapshots = {}, {}
    for at in [*kills, None]:
        model = denoiser()

        def keep(step, model=model):
            snapshots[step] = weights(model)

        try:
            run(
                model, EVERYTHING, feed=batches(SIZE, killed_at=at), state=state, log_points=log_points,
                on_entry=lambda e: entries.update({e["step"]: e}), on_snapshot=keep,
            )  # fmt: skip
        except Killed:
            assert at is not None
    assert same(weights(model), weights(final))
    assert timeless(entries[step] for step in sorted(entries)) == timeless(undisturbed.history)
    assert snapshots.keys() == expected.keys() == snapshot_steps(STEPS, 4)
    assert all(same(snapshots[step], expected[step]) for step in expected)


def test_killed_while_a_snapshot_is_taken_it_is_taken_again(tmp_path):
    state, taken = tmp_path / "state.safetensors", []

    def dying(step):
        if step > 1:
            raise Killed

    with pytest.raises(Killed):
        run(denoiser(), EVERYTHING, state=state, on_snapshot=dying)
    run(denoiser(), EVERYTHING, state=state, on_snapshot=taken.append)
    assert set(taken) == snapshot_steps(STEPS, 4) - {1}


def test_a_save_that_is_asked_for_between_logging_points_keeps_the_sums_of_the_history(tmp_path):
    """As a stream asks for it, whose rows are deleted once they are read."""
    undisturbed, _, _ = run(denoiser(), config(), log_points=2)
    state, told = tmp_path / "state.safetensors", []
    options = {"save_now": lambda step: step in (2, 4), "on_saved": told.append, "log_points": 2}
    with pytest.raises(Killed):
        run(denoiser(), config(), feed=batches(SIZE, killed_at=5), state=state, **options)
    assert told == [2, 4]
    result, _, _ = run(denoiser(), config(), state=state, **options)
    assert told == [2, 4, 4, 6, STEPS]
    for a, b in zip(timeless(result.history), timeless(undisturbed.history), strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_until_the_model_is_saved_training_again_gives_it_at_once(tmp_path):
    state, first, again = tmp_path / "state.safetensors", denoiser(), denoiser()
    run(first, EVERYTHING, state=state)
    run(again, EVERYTHING, state=state, feed=batches(SIZE, killed_at=STEPS))
    assert same(weights(first), weights(again))


def test_a_training_goes_on_in_other_parts(tmp_path):
    """As one does that ran out of memory: the weights are equal to rounding."""
    state, undisturbed, resumed = tmp_path / "state.safetensors", denoiser(), denoiser()
    run(undisturbed, config())
    with pytest.raises(Killed):
        run(resumed, config(), feed=batches(SIZE, killed_at=5), state=state)
    seen = []
    run(resumed, config(accumulate=SIZE // 2), state=state, on_saved=seen.append)
    assert 0 < seen[0] <= 5
    for one, other in zip(undisturbed.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_state_of_a_build_without_some_setting_is_continued_with_its_default(tmp_path, monkeypatch):
    def save(file, key, *rest):
        settings = {name: value for name, value in key["config"].items() if name != "embed_rows"}
        real(file, {**key, "config": settings}, *rest)

    real, state, expected, resumed = checkpoint.save, tmp_path / "state.safetensors", denoiser(), denoiser(seed=1)
    run(expected, config())
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", save)
        with pytest.raises(Killed):
            run(denoiser(), config(), feed=batches(SIZE, killed_at=STEPS - 2), state=state)
    with pytest.raises(InputError, match=r"other settings or data \(embed_rows\)"):
        run(denoiser(), config(embed_rows=64), state=state)
    run(resumed, config(), state=state)
    assert same(weights(expected), weights(resumed))


def test_state_of_another_training_or_a_damaged_one_is_refused(tmp_path):
    state = tmp_path / "state.safetensors"
    with pytest.raises(Killed):
        run(denoiser(), config(), feed=batches(SIZE, killed_at=5), state=state)
    for name, value in (("lr", 1e-4), ("ema", 0.9), ("optimizer", "muon"), ("seed", 1)):
        with pytest.raises(InputError, match=rf"other settings or data \({name}\): delete it"):
            run(denoiser(), config(**{name: value}), state=state)
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(InputError, match="damaged"):
        run(denoiser(), config(), state=state)
