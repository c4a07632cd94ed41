"""Activations of probing texts from tiny language models: what they are, and what is collected again."""

import os
import time

import numpy as np
import pytest
import torch

from glp_lens import activations as stores
from glp_lens import lm
from glp_lens.activations.writer import lock
from glp_lens.errors import InputError
from glp_lens.evals.probing import activations as module
from glp_lens.evals.probing import build, collect
from tests.conftest import tiny_texts

HOOK, LATER, MLP = "blocks.1.hook_resid_post", "blocks.2.hook_resid_post", "blocks.1.mlp.hook_post"


def task(n=44, name="tiny", seed=0):
    texts = [*tiny_texts(n - 1, seed=seed), "game"]
    labels = [int("game" in text.split() or i % 3 == 0) for i, text in enumerate(texts)]
    return build(name, texts, labels, range(28), range(28, n))


def by_hand(model, text, context, hook=HOOK):
    """Activations of one text alone, BOS and position 0 left out."""
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"][-(context - 1) :]
    _, cache = model.run_with_cache(torch.tensor([[lm.bos_id(model), *ids]]))
    return cache[hook][0, 1:]


@pytest.fixture
def read_texts(monkeypatch):
    """Numbers of texts in each call that runs the language model."""
    calls = []
    real = stores.collect

    def counted(model, documents, *args, **kwargs):
        calls.append(len(documents))
        return real(model, documents, *args, **kwargs)

    monkeypatch.setattr(module.activations, "collect", counted)
    return calls


@pytest.mark.parametrize("context", [128, 9])
@pytest.mark.parametrize(
    ("pooling", "pool"),
    [("last", lambda x: x[-1:]), ("mean", lambda x: x.mean(0, True)), ("max", lambda x: x.amax(0, True)),
     ("all", lambda x: x)],
)  # fmt: skip
def test_rows_are_those_of_each_text_read_alone(tiny_model, pooling, pool, context):
    found = collect(tiny_model, [task()], [HOOK, MLP], pooling=pooling, context=context, batch_tokens=150)
    for hook in (HOOK, MLP):
        expected = [pool(by_hand(tiny_model, text, context, hook)) for text in task().texts]
        rows = found.rows("tiny", hook)
        assert rows.acts.dtype == torch.float32
        torch.testing.assert_close(rows.acts, torch.cat(expected), atol=1e-4, rtol=1e-4)
        assert np.array_equal(rows.text, np.repeat(np.arange(44), [len(x) for x in expected]))


def test_a_rerun_reads_the_cache_and_other_inputs_do_not(tiny_hooked, tmp_path, read_texts):
    tasks = [task(), task(31, "short")]
    first = collect(tiny_hooked, tasks, HOOK, cache=tmp_path)
    read_texts.clear()
    again = collect(tiny_hooked, tasks[::-1], HOOK, cache=tmp_path)
    assert not read_texts
    for name in ("tiny", "short"):
        assert torch.equal(first.rows(name).acts, again.rows(name).acts)
    assert first.source == again.source
    others = [
        ([task(seed=1)], HOOK, {}), ([task()], LATER, {}), ([task()], HOOK, {"context": 9}),
        ([task()], HOOK, {"pooling": "mean"}),
    ]  # fmt: skip
    for wanted, hook, options in others:
        read_texts.clear()
        collect(tiny_hooked, wanted, hook, cache=tmp_path, **options)
        assert read_texts
    read_texts.clear()
    weight = tiny_hooked.W_E.data
    weight[0] += 1  # the same model with other weights, as after fine-tuning
    try:
        collect(tiny_hooked, [task()], HOOK, cache=tmp_path)
    finally:
        weight[0] -= 1
    assert read_texts


def test_a_prompt_of_several_tasks_is_read_once(tiny_hooked, tmp_path, read_texts):
    one = task()
    half = build("half", one.texts[10:40] + one.texts[10:13], [0, 1, 1] * 11, range(20), range(20, 33))
    found = collect(tiny_hooked, [one, half], HOOK, cache=tmp_path)
    assert read_texts == [len(set(one.texts))]
    assert torch.equal(found.rows("half").acts[:30], found.rows("tiny").acts[10:40])
    assert torch.equal(found.rows("half").acts[30:], found.rows("tiny").acts[10:13])


def test_an_interrupted_run_goes_on_after_the_finished_tasks(tiny_hooked, tmp_path, monkeypatch, read_texts):
    tasks = [task(), task(31, "second", seed=1), task(31, "third", seed=2)]
    whole = collect(tiny_hooked, tasks, [HOOK, LATER], cache=tmp_path / "whole")
    forward, left = lm.activations, [3]  # two for the first task, and the first look at the second

    def fails(*args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return forward(*args)

    monkeypatch.setattr(lm, "activations", fails)
    with pytest.raises(KeyboardInterrupt):
        collect(tiny_hooked, tasks, [HOOK, LATER], cache=tmp_path / "cut", batch_tokens=10_000)
    monkeypatch.setattr(lm, "activations", forward)
    read_texts.clear()
    # Other hook points than the interrupted run had: what it left half done for the second task is begun again.
    half_done = next((tmp_path / "cut").glob(f"*/second-*/{LATER}"))
    held = lock(half_done)  # as the other run would, if it were at work
    with pytest.raises(InputError, match="another process is writing"):
        collect(tiny_hooked, tasks, [LATER], cache=tmp_path / "cut")
    os.close(held)
    read_texts.clear()
    found = collect(tiny_hooked, tasks, [LATER], cache=tmp_path / "cut")
    assert 0 < sum(read_texts) <= len(set(tasks[1].texts) | set(tasks[2].texts))
    assert torch.equal(found.rows("third").acts, whole.rows("third", LATER).acts)
    both = collect(tiny_hooked, tasks, [HOOK, LATER], cache=tmp_path / "cut")
    for hook in (HOOK, LATER):
        for one in tasks:
            torch.testing.assert_close(both.rows(one.name, hook).acts, whole.rows(one.name, hook).acts)


def test_two_runs_that_share_a_cache_wait_for_one_another(tiny_hooked, tmp_path, monkeypatch, read_texts):
    """The second finds what the first has collected meanwhile, and reads only the rest."""
    first, second = [task(), task(31, "one", seed=1)], [task(), task(31, "two", seed=2)]
    start, stop = os.pipe()
    forward = lm.activations

    def slow(*arguments):
        os.write(stop, b"x")
        time.sleep(0.2)
        return forward(*arguments)

    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)
            monkeypatch.setattr(lm, "activations", slow)
            collect(tiny_hooked, first, HOOK, cache=tmp_path, batch_tokens=500)
            os._exit(0)
        finally:
            os._exit(1)
    os.read(start, 1)  # it is at work, and has saved nothing
    found = collect(tiny_hooked, second, HOOK, cache=tmp_path, batch_tokens=10_000)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert read_texts == [len(set(second[1].texts) - set(first[0].texts) - set(first[1].texts))]
    whole = collect(tiny_hooked, second, HOOK)
    for name in ("tiny", "two"):
        torch.testing.assert_close(found.rows(name).acts, whole.rows(name).acts)


def test_smaller_batches_may_follow_an_interrupted_run(tiny_hooked, tmp_path, monkeypatch):
    whole = collect(tiny_hooked, [task()], HOOK)
    forward = lm.activations
    calls = []

    def fails(*args):
        calls.append(args)
        if len(calls) > 1:
            raise MemoryError
        return forward(*args)

    monkeypatch.setattr(lm, "activations", fails)
    with pytest.raises(MemoryError):
        collect(tiny_hooked, [task()], HOOK, cache=tmp_path)
    monkeypatch.setattr(lm, "activations", forward)
    found = collect(tiny_hooked, [task()], HOOK, cache=tmp_path, batch_tokens=300)
    torch.testing.assert_close(found.rows("tiny").acts, whole.rows("tiny").acts)


def test_a_text_without_tokens_has_no_row(tiny_hooked):
    texts = ["a game", "", *tiny_texts(12)]
    found = collect(tiny_hooked, [build("gaps", texts, [0, 1] * 7, range(8), range(8, 14))], HOOK).rows("gaps")
    assert found.text.tolist() == [0, *range(2, 14)]
    assert len(found.acts) == 13


def test_bad_input_is_refused_in_one_line(tiny_hooked):
    cases = [
        ("did you mean", {"hooks": "blocks.1.hook_resid_pots"}),
        (r"expected \(batch, pos, d\)", {"hooks": "blocks.1.attn.hook_pattern"}),
        ("context", {"context": 1}),
        ("pooling", {"pooling": "median"}),
        ("nothing to collect", {"tasks": []}),
    ]
    for message, change in cases:
        with pytest.raises(InputError, match=message) as caught:
            collect(tiny_hooked, **{"tasks": [task()], "hooks": HOOK, **change})
        assert "\n" not in str(caught.value)
    found = collect(tiny_hooked, [task()], HOOK)
    with pytest.raises(InputError, match=LATER):
        found.rows("tiny", LATER)
    with pytest.raises(InputError, match="no activations"):
        found.rows("other")
