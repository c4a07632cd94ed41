"""Last-token activations of tiny language models, and the suite on top of them."""

import pytest
import torch

from glp_lens import lm
from glp_lens.errors import InputError
from glp_lens.evals.entries import Entry
from glp_lens.evals.probing import activations as module
from glp_lens.evals.probing import build, collect, run, task_activations
from glp_lens.models.raw import Raw
from tests.conftest import tiny_texts

HOOK = "blocks.1.hook_resid_post"


def task(n=44, name="tiny"):
    texts = [*tiny_texts(n - 1), "game"]
    labels = [int("game" in text.split() or i % 3 == 0) for i, text in enumerate(texts)]
    return build(name, texts, labels, range(28), range(28, n))


def by_hand(model, text, context):
    """The same activation from a forward pass of one text alone."""
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"][-(context - 1) :]
    _, cache = model.run_with_cache(torch.tensor([[0, *ids]]))
    return cache[HOOK][0, -1]


@pytest.mark.parametrize("context", [128, 9])
def test_rows_are_the_last_tokens_of_each_text(tiny_model, context):
    found = task_activations(tiny_model, task(), HOOK, context=context, batch_tokens=150)
    expected = torch.stack([by_hand(tiny_model, text, context) for text in task().texts])
    assert found.shape == (44, 24)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_rerun_reads_the_cache_and_other_inputs_do_not(tiny_hooked, tmp_path, monkeypatch):
    first = collect(tiny_hooked, [task(), task(31, "short")], HOOK, cache=tmp_path)
    calls = []
    real = lm.activations
    monkeypatch.setattr(module.lm, "activations", lambda *a: calls.append(1) or real(*a))
    again = collect(tiny_hooked, [task(), task(31, "short")], HOOK, cache=tmp_path)
    assert not calls
    assert all(torch.equal(first.rows[name], again.rows[name]) for name in ("tiny", "short"))
    assert first.source == again.source
    other_texts = build("tiny", tiny_texts(44, seed=1), task().labels, range(28), range(28, 44))
    for wanted, hook, context in (
        (other_texts, HOOK, 128),
        (task(), "blocks.2.hook_resid_post", 128),
        (task(), HOOK, 9),
    ):
        calls.clear()
        task_activations(tiny_hooked, wanted, hook, context=context, cache=tmp_path)
        assert calls
    calls.clear()
    weight = tiny_hooked.W_E.data
    weight[0] += 1  # the same model with other weights, as after fine-tuning
    try:
        task_activations(tiny_hooked, task(), HOOK, cache=tmp_path)
    finally:
        weight[0] -= 1
    assert calls


def test_a_damaged_cache_file_is_computed_anew(tiny_hooked, tmp_path):
    first = task_activations(tiny_hooked, task(), HOOK, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(task_activations(tiny_hooked, task(), HOOK, cache=tmp_path), first)
    assert file.stat().st_size > 100


def test_bad_hook_points_are_refused(tiny_hooked):
    with pytest.raises(InputError, match="did you mean"):
        collect(tiny_hooked, [task()], "blocks.1.hook_resid_pots")
    with pytest.raises(InputError, match="head axis"):
        task_activations(tiny_hooked, task(), "blocks.1.attn.hook_q")
    with pytest.raises(InputError, match="context"):
        task_activations(tiny_hooked, task(), HOOK, context=1)


def test_from_texts_to_results(tiny_model):
    tasks = [task(), task(40, "other")]
    found = collect(tiny_model, tasks, HOOK)
    results = run([Entry("raw", Raw(torch.zeros(3, 24)))], tasks, found)
    assert found.source["tokens"]["tiny"] == sum(len(text.split()) + 1 for text in task().texts)
    assert results.data["hook"] == HOOK
    assert {m.task for m in results.metrics} == {"tiny", "other", "all"}
    assert all(0 <= m.value <= 1 for m in results.metrics if m.metric == "auc")
