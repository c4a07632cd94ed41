"""Collected rows are the model's own activations, whatever was batched, cut off or continued."""

import itertools

import numpy as np
import pytest
import torch

from glp_lens import lm
from glp_lens.activations import ActivationStore, collect
from glp_lens.activations.collect import differs
from glp_lens.activations.forward import pack
from glp_lens.activations.manifest import MANIFEST
from glp_lens.activations.writer import StoreWriter
from glp_lens.corpus import Document
from glp_lens.errors import InputError
from tests.conftest import tiny_texts

HOOK = "blocks.1.hook_resid_post"
OTHER = "blocks.2.hook_resid_post"
SMALL = {"context": 24, "batch_size": 4, "dtype": "float32", "shard_tokens": 24 * 7}


def alone(model, text, context=24, hook=HOOK):
    """Token ids and activations of one text, without batching or padding."""
    ids = lm.to_ids(model, [text], context)[0]
    tokens = torch.tensor([ids])
    rows = lm.activations(model, tokens, torch.ones_like(tokens, dtype=torch.bool), [hook])[hook][0]
    return ids, rows


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_rows_are_those_of_each_text_alone_in_document_order(tiny_model, tmp_path):
    texts = [*tiny_texts(22), "", "cat"]
    store = collect(tiny_model, texts, HOOK, tmp_path / "s", massive=None, **SMALL)
    bos = lm.bos_id(tiny_model)
    want, tokens, positions, documents = [], [], [], []
    for text in texts:
        ids, rows = alone(tiny_model, text)
        assert ids[0] == bos
        keep = [i for i in range(1, len(ids)) if ids[i] != bos]
        want.append(rows[keep])
        tokens += [ids[i] for i in keep]
        positions += keep
        documents += [Document.of(text).id] * len(keep)
    torch.testing.assert_close(store.rows(), torch.cat(want), rtol=1e-4, atol=1e-4)
    assert store.column("token_id").tolist() == tokens
    assert store.column("position").tolist() == positions
    assert store.column("doc_id").tolist() == documents
    assert len(store.manifest.shards) > 1
    assert store.manifest.documents == len(texts)
    excluded = store.manifest.excluded
    cut = sum(len(lm.to_ids(tiny_model, [text], 10**6)[0]) - len(alone(tiny_model, text)[0]) for text in texts)
    want = {"bos": len(texts), "massive": 0, "over_context": cut}
    assert {reason: n for reason, n in excluded.items() if reason != "padding"} == want


def test_bos_inside_a_text_is_left_out(tiny_bridge, tmp_path):
    store = collect(tiny_bridge, ["cat dog <s> bird"], HOOK, tmp_path / "s", massive=None, **SMALL)
    assert store.column("position").tolist() == [1, 2, 4]
    assert store.manifest.excluded["bos"] == 2


def test_max_tokens_cuts_inside_a_document_and_counts_what_came_before(tiny_bridge, tmp_path):
    texts = tiny_texts(30)
    whole = collect(tiny_bridge, texts, HOOK, tmp_path / "whole", massive=None, **SMALL)
    cut = collect(tiny_bridge, texts, HOOK, tmp_path / "cut", massive=None, max_tokens=203, **SMALL)
    assert len(cut) == 203
    assert torch.equal(cut.rows(), whole.rows(0, 203))
    # Every token of the texts that were read is a row or counted as left out.
    texts_read = cut.manifest.documents
    assert texts_read % 7 == 0
    tokens = sum(map(len, lm.to_ids(tiny_bridge, texts[:texts_read], 10**6)))
    excluded = {reason: n for reason, n in cut.manifest.excluded.items() if reason != "padding"}
    assert set(excluded) == {"bos", "massive", "over_budget", "over_context"}
    assert len(cut) + sum(excluded.values()) == tokens


def test_massive_rows_are_dropped_counted_and_the_limit_kept(tiny_model, tmp_path):
    texts = tiny_texts(30)
    whole = collect(tiny_model, texts, HOOK, tmp_path / "whole", massive=None, **SMALL)
    some = collect(tiny_model, texts, HOOK, tmp_path / "some", massive=1.2, **SMALL)
    norms = whole.rows().norm(dim=1)
    first = np.isin(whole.column("doc_id"), [Document.of(text).id for text in texts[:7]])  # those of the first shard
    limit = 1.2 * float(np.median(norms[torch.from_numpy(first)].numpy()))
    assert some.manifest.max_norm == pytest.approx(limit, rel=1e-6)
    assert torch.equal(some.rows(), whole.rows()[norms <= some.manifest.max_norm])
    assert some.manifest.excluded["massive"] == len(whole) - len(some) > 0
    assert some.provenance()["max_norm"] == some.manifest.max_norm
    assert whole.manifest.max_norm is None


def test_several_hook_points_are_row_aligned_stores_of_one_pass(tiny_model, tmp_path, monkeypatch):
    texts, passes = tiny_texts(12), []
    real = lm.activations
    monkeypatch.setattr(lm, "activations", lambda *a: passes.append(1) or real(*a))
    stores = collect(tiny_model, texts, [HOOK, OTHER], tmp_path / "two", massive=1.3, **SMALL)
    n_two = len(passes)
    collect(tiny_model, texts, HOOK, tmp_path / "one", massive=1.3, **SMALL)
    assert n_two == len(passes) - n_two
    assert list(stores) == [HOOK, OTHER]
    for name in ("token_id", "doc_id", "position"):
        np.testing.assert_array_equal(stores[HOOK].column(name), stores[OTHER].column(name))
    _, rows = alone(tiny_model, texts[0], hook=OTHER)
    position = int(stores[OTHER].column("position")[0])
    torch.testing.assert_close(stores[OTHER].rows(0, 1)[0], rows[position], rtol=1e-4, atol=1e-4)
    assert ActivationStore.open(tmp_path / "two" / OTHER).hook == OTHER


@pytest.mark.parametrize("hooks", [[HOOK], [HOOK, OTHER]])
@pytest.mark.parametrize("stop_at", [1, 5, 9])
def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(tiny_bridge, tmp_path, monkeypatch, hooks, stop_at):
    texts = tiny_texts(30)
    collect(tiny_bridge, texts, hooks, tmp_path / "whole", **SMALL)
    real, calls = lm.activations, []

    def stop(*arguments):
        calls.append(1)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(lm, "activations", stop)
        with pytest.raises(KeyboardInterrupt):
            collect(tiny_bridge, iter(texts), hooks, tmp_path / "cut", **SMALL)
    collect(tiny_bridge, iter(texts), hooks, tmp_path / "cut", **SMALL)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


@pytest.mark.parametrize("stop_at", [2, 4])
@pytest.mark.parametrize("method", ["append", "finish", "_publish"])
def test_siblings_cut_off_between_their_commits_are_brought_together(
    tiny_bridge, tmp_path, monkeypatch, method, stop_at
):
    texts, hooks = tiny_texts(30), [HOOK, OTHER]
    collect(tiny_bridge, texts, hooks, tmp_path / "whole", **SMALL)
    real, calls = getattr(StoreWriter, method), []

    def stop(self, *arguments):
        calls.append(1)
        if len(calls) == min(stop_at, 2 if method == "finish" else stop_at):
            raise KeyboardInterrupt
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, method, stop)
        with pytest.raises(KeyboardInterrupt):
            collect(tiny_bridge, texts, hooks, tmp_path / "cut", **SMALL)
    collect(tiny_bridge, texts, hooks, tmp_path / "cut", **SMALL)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_a_finished_store_is_opened_without_a_forward_pass(tiny_bridge, tmp_path, monkeypatch):
    texts = tiny_texts(10)
    first = collect(tiny_bridge, texts, HOOK, tmp_path / "s", **SMALL)
    before = files(tmp_path)
    monkeypatch.setattr(lm, "activations", None)
    again = collect(tiny_bridge, texts, HOOK, tmp_path / "s", **SMALL)
    assert files(tmp_path) == before
    assert again.provenance() == first.provenance()


def test_a_store_of_other_arguments_texts_or_weights_is_never_touched(tiny_hooked, tiny_bridge, tmp_path):
    texts, out = tiny_texts(10), tmp_path / "s"
    collect(tiny_bridge, texts, HOOK, out, **SMALL)
    before = files(tmp_path)
    for options, message in [
        ({"context": 20}, "settings.context = 24, not 20"),
        ({"dtype": "bfloat16"}, "dtype = 'float32', not 'bfloat16'"),
        ({"massive": None}, "settings.massive"),
        ({"corpus": "other"}, "corpus.name"),
        ({"max_tokens": 10}, "settings.max_tokens"),
    ]:
        with pytest.raises(InputError, match=message):
            collect(tiny_bridge, texts, HOOK, out, **{**SMALL, **options})
    with pytest.raises(InputError, match="hook"):
        collect(tiny_bridge, texts, OTHER, out, **SMALL)
    with pytest.raises(InputError, match="one hook point"):
        collect(tiny_bridge, texts, [HOOK, OTHER], out, **SMALL)
    with pytest.raises(InputError, match=r"model\.class"):
        collect(tiny_hooked, texts, HOOK, out, **SMALL)
    with pytest.raises(InputError, match="other texts"):
        collect(tiny_bridge, texts[::-1], HOOK, out, **SMALL)
    with pytest.raises(InputError, match="other texts"):
        collect(tiny_bridge, texts[:9], HOOK, out, **SMALL)
    with pytest.raises(InputError, match="fewer texts"):
        collect(tiny_bridge, [*texts, "cat"], HOOK, out, **SMALL)
    weight = next(iter(tiny_bridge.parameters()))
    with torch.no_grad():
        weight[3, 3] += 1
    try:
        with pytest.raises(InputError, match="weights"):
            collect(tiny_bridge, texts, HOOK, out, **SMALL)
    finally:
        with torch.no_grad():
            weight[3, 3] -= 1
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match="not an activation store"):
        collect(tiny_bridge, texts, HOOK, tmp_path / "full", **SMALL)
    assert {k: v for k, v in files(tmp_path).items() if k != "full/thesis.txt"} == before


def _spoiled(monkeypatch, value):
    real = lm.activations

    def spoil(*arguments):
        found = {name: rows.clone() for name, rows in real(*arguments).items()}
        for rows in found.values():
            rows[0, 2, 3] = value
        return found

    monkeypatch.setattr(lm, "activations", spoil)


def test_activations_that_are_not_finite_are_refused(tiny_bridge, tmp_path, monkeypatch):
    _spoiled(monkeypatch, float("nan"))
    with pytest.raises(InputError, match=rf"{HOOK} are not finite in document '.*position 2"):
        collect(tiny_bridge, tiny_texts(3), HOOK, tmp_path / "s", **SMALL)


def test_overflow_of_float16_is_refused_and_bfloat16_keeps_it(tiny_bridge, tmp_path, monkeypatch):
    _spoiled(monkeypatch, 70_000.0)
    options = {**SMALL, "massive": None}
    with pytest.raises(InputError, match="reach 70000, float16 ends at 65504"):
        collect(tiny_bridge, tiny_texts(3), HOOK, tmp_path / "s", **{**options, "dtype": "float16"})
    kept = collect(tiny_bridge, tiny_texts(3), HOOK, tmp_path / "b", **{**options, "dtype": "bfloat16"})
    assert float(kept.rows().max()) == float(torch.tensor(70_000.0).bfloat16())


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ("one string", {}, "got 'one string': pass a list"),
        (["a cat", 3], {}, "got a list with 3"),
        (["", ""], {}, "no activations left"),
        ([], {}, "no texts"),
        (["a cat"], {"context": 1}, "context must be 2 to"),
        (["a cat"], {"context": 10_000}, "context must be 2 to"),
        (["a cat"], {"max_tokens": 0}, "max_tokens must be at least 1"),
        (["a cat"], {"massive": 0.5}, "massive must be over 1"),
        (["a cat"], {"dtype": "int8"}, "dtype 'int8'"),
        (["a cat"], {"hooks": "blocks.1.hook_resid_pots"}, "did you mean"),
        (["a cat"], {"hooks": "blocks.1.attn.hook_pattern"}, r"expected \(batch, pos, d\)"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tiny_model, tmp_path, texts, options, message):
    with pytest.raises(InputError, match=message) as caught:
        collect(tiny_model, texts, out=tmp_path / "s", **{**SMALL, **options})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "s" / MANIFEST).exists()


def test_default_hook_and_dtype_and_the_models_mode_are_kept(tiny_bridge, tmp_path):
    tiny_bridge.train()
    try:
        store = collect(tiny_bridge, tiny_texts(5), out=tmp_path / "s")
        assert tiny_bridge.training
    finally:
        tiny_bridge.eval()
    assert (store.hook, store.dtype, store.d_in) == (lm.default_hook(tiny_bridge), "bfloat16", 24)
    about = store.provenance()
    assert about["model"] == lm.describe(tiny_bridge)
    assert about["corpus"]["name"] == "texts"
    assert about["corpus"]["documents"] == 5


def test_packing_covers_all_and_keeps_to_the_budget():
    lengths = torch.randint(1, 25, (101,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = pack(lengths, budget=96)
    assert sorted(itertools.chain(*batches)) == list(range(101))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 96 for batch in batches)
    assert pack([30], budget=10) == [[0]]


@pytest.mark.parametrize("budget", [30, 300, 10_000])
def test_packing_cuts_where_it_costs_least(budget):
    lengths = torch.randint(1, 90, (11,), generator=torch.Generator().manual_seed(1)).tolist()
    per_batch = 128

    def cost(batches):
        return sum(len(batch) * max(batch) + per_batch for batch in batches)

    got = [[lengths[i] for i in batch] for batch in pack(lengths, budget)]
    assert sorted(itertools.chain(*got)) == sorted(lengths)
    descending = sorted(lengths, reverse=True)
    cuts = itertools.chain.from_iterable(itertools.combinations(range(1, 11), n) for n in range(11))
    ways = ([descending[a:b] for a, b in itertools.pairwise([0, *cut, 11])] for cut in cuts)
    allowed = [way for way in ways if all(len(batch) == 1 or len(batch) * batch[0] <= budget for batch in way)]
    assert cost(got) == min(map(cost, allowed))


def test_every_text_is_run_once(tiny_model, tmp_path, monkeypatch):
    real, read = lm.activations, []
    monkeypatch.setattr(lm, "activations", lambda *a: read.append(int(a[2].sum())) or real(*a))
    texts = tiny_texts(50)
    store = collect(tiny_model, texts, HOOK, tmp_path / "s", context=64, shard_tokens=64 * 45)
    assert len(store.manifest.shards) == 2
    assert sum(read) == sum(map(len, lm.to_ids(tiny_model, texts, 64)))


def test_how_texts_are_read_stays_the_same_within_a_store(tiny_bridge, tiny_hooked, tmp_path, monkeypatch):
    texts, real = tiny_texts(30), lm.activations

    def way(store):
        return store.manifest.source["settings"]["forward"]

    def interrupted(out):
        calls = []

        def stop(*arguments):
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(lm, "activations", stop)
            with pytest.raises(KeyboardInterrupt):
                collect(tiny_bridge, texts, HOOK, out, **SMALL)

    elsewhere = [("blocks.0.mlp.hook_out", lambda tensor, hook: tensor)]
    assert way(collect(tiny_hooked, texts, HOOK, tmp_path / "hooked", **SMALL)) == "model"
    whole = collect(tiny_bridge, texts, HOOK, tmp_path / "modules", **SMALL)
    assert way(whole) == "modules"
    with tiny_bridge.hooks(fwd_hooks=elsewhere):
        usual = collect(tiny_bridge, texts, HOOK, tmp_path / "model", **SMALL)
        interrupted(tmp_path / "begun")
    assert way(usual) == "model"
    torch.testing.assert_close(usual.rows(), whole.rows(), rtol=1e-4, atol=1e-4)
    collect(tiny_bridge, texts, HOOK, tmp_path / "begun", **SMALL)
    assert files(tmp_path / "begun") == files(tmp_path / "model")
    # Earlier versions had the model's own forward pass only, and do not record it.
    assert not differs("settings.forward", {}, {"settings.forward": "model"})
    assert differs("settings.forward", {}, {"settings.forward": "modules"})
    interrupted(tmp_path / "other")
    with tiny_bridge.hooks(fwd_hooks=elsewhere):
        assert len(collect(tiny_bridge, texts, HOOK, tmp_path / "modules", **SMALL)) == len(whole)
        with pytest.raises(InputError, match=r"settings\.forward = 'modules', not 'model'"):
            collect(tiny_bridge, texts, HOOK, tmp_path / "other", **SMALL)


@pytest.mark.parametrize(("mode", "dtype"), [(torch.float16, "bfloat16"), (torch.bfloat16, "float16")])
def test_collecting_under_autocast_gives_the_rows_of_plain_mode(tiny_bridge, tmp_path, mode, dtype):
    small = {**SMALL, "dtype": dtype, "massive": None}
    want = collect(tiny_bridge, tiny_texts(9), HOOK, tmp_path / "want", **small)
    with torch.autocast("cpu", mode):
        got = collect(tiny_bridge, tiny_texts(9), HOOK, tmp_path / "got", **small)
    assert torch.equal(got.rows(), want.rows())
