"""Which tokens become rows: last, mean, maximum, random, excluded, in chats and while generating, with labels."""

import numpy as np
import pytest
import torch

from glp_lens import lm
from glp_lens.activations import collect
from glp_lens.activations.collect import Generation
from glp_lens.corpus import Document
from glp_lens.errors import InputError
from tests.conftest import tiny_texts

HOOK = "blocks.1.hook_resid_post"
OTHER = "blocks.2.hook_resid_post"
SMALL = {"context": 24, "batch_size": 4, "dtype": "float32", "shard_tokens": 24 * 7, "massive": None}
TEXTS = [*tiny_texts(19), "", "cat dog"]


@pytest.fixture
def everything(tiny_model, tmp_path):
    """Every usable token of the texts."""
    return collect(tiny_model, TEXTS, HOOK, tmp_path / "all", **SMALL)


def by_document(store):
    """Rows and positions of each document."""
    ids, rows, positions = store.column("doc_id"), store.rows(), store.column("position")
    return {i: (rows[torch.from_numpy(ids == i)], positions[ids == i]) for i in dict.fromkeys(ids.tolist())}


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_the_last_token_of_each_text(tiny_model, everything, tmp_path):
    last = collect(tiny_model, TEXTS, HOOK, tmp_path / "last", keep="last", **SMALL)
    want = by_document(everything)
    assert last.column("doc_id").tolist() == list(want)
    close(last.rows(), torch.stack([rows[-1] for rows, _ in want.values()]))
    assert last.column("position").tolist() == [places[-1] for _, places in want.values()]
    assert last.manifest.excluded["not_chosen"] == len(everything) - len(last)


@pytest.mark.parametrize(("keep", "pool"), [("mean", lambda x: x.mean(0)), ("max", lambda x: x.amax(0))])
def test_the_mean_and_the_maximum_over_each_text(tiny_model, everything, tmp_path, keep, pool):
    pooled = collect(tiny_model, TEXTS, HOOK, tmp_path / keep, keep=keep, **SMALL)
    want = by_document(everything)
    assert pooled.column("doc_id").tolist() == list(want)
    close(pooled.rows(), torch.stack([pool(rows) for rows, _ in want.values()]))
    assert "not_chosen" not in pooled.manifest.excluded


def test_a_long_text_can_lose_its_beginning_instead_of_its_end(tiny_model, tmp_path):
    small = {**SMALL, "context": 6, "dtype": "float32"}
    words = "cat dog game the a cat dog dog game".split()
    left = collect(tiny_model, [" ".join(words)], HOOK, tmp_path / "left", truncate="left", **small)
    tail = collect(tiny_model, [" ".join(words[-5:])], HOOK, tmp_path / "tail", **small)
    assert len(tail) == 5
    close(left.rows(), tail.rows())
    with pytest.raises(InputError, match="truncate"):  # another store than one cut on the right
        collect(tiny_model, [" ".join(words)], HOOK, tmp_path / "left", **small)
    for wrong in ({"truncate": "both"}, {"truncate": "left", "chat": True}):
        with pytest.raises(InputError, match="truncate"):
            collect(tiny_model, ["cat"], HOOK, tmp_path / "w", **wrong, **small)


def test_random_tokens_depend_on_the_seed_and_the_text_alone(tiny_model, everything, tmp_path):
    some = collect(tiny_model, TEXTS, HOOK, tmp_path / "some", keep=3, **SMALL)
    want, got = by_document(everything), by_document(some)
    assert list(got) == list(want)
    for i, (rows, places) in got.items():
        assert len(places) == min(3, len(want[i][1]))
        assert (np.diff(places.astype(int)) > 0).all()
        close(rows, want[i][0][np.isin(want[i][1], places)])
    shuffled = collect(tiny_model, TEXTS[::-1], HOOK, tmp_path / "again", keep=3, **{**SMALL, "shard_tokens": 24})
    assert all((by_document(shuffled)[i][1] == places).all() for i, (_, places) in got.items())
    other = collect(tiny_model, TEXTS, HOOK, tmp_path / "other", keep=3, seed=1, **SMALL)
    assert other.column("position").tolist() != some.column("position").tolist()


@pytest.mark.parametrize("keep", ["last", "mean", "max"])
def test_massive_tokens_count_neither_as_last_nor_in_what_is_pooled(tiny_model, tmp_path, monkeypatch, keep):
    real = lm.activations

    def spiked(*arguments):
        found = {name: rows.clone() for name, rows in real(*arguments).items()}
        for rows in found.values():
            rows[:, -1] = 1e6  # of the longest text in the batch
        return found

    text = tiny_texts(1)[0]
    shorter = text.rsplit(" ", 1)[0]
    want = collect(tiny_model, [shorter], HOOK, tmp_path / "want", keep=keep, **SMALL)
    monkeypatch.setattr(lm, "activations", spiked)
    got = collect(tiny_model, [text], HOOK, tmp_path / "got", keep=keep, **{**SMALL, "massive": 10.0})
    close(got.rows(), want.rows())
    assert got.manifest.excluded["massive"] == 1


def test_named_tokens_are_left_out_and_counted(tiny_model, tmp_path):
    cat = tiny_model.tokenizer.convert_tokens_to_ids("cat")
    dog = tiny_model.tokenizer.convert_tokens_to_ids("dog")
    text = "cat a dog </s> the cat"
    store = collect(tiny_model, [text], HOOK, tmp_path / "s", exclude=["cat", dog, "special"], **SMALL)
    assert store.column("position").tolist() == [2, 5]
    assert store.manifest.excluded["special"] == 4
    assert store.manifest.source["settings"]["exclude"] == sorted({cat, dog, *tiny_model.tokenizer.all_special_ids})
    for wrong in ("no such token", 10**6, -1):
        with pytest.raises(InputError, match="not in the model's vocabulary"):
            collect(tiny_model, [text], HOOK, tmp_path / "w", exclude=[wrong], **SMALL)
    for wrong in ("first", 0, True):
        with pytest.raises(InputError, match="keep must be"):
            collect(tiny_model, [text], HOOK, tmp_path / "w", keep=wrong, **SMALL)


TEMPLATE = "{{ bos_token }}{% for m in messages %} {{ m.role }} {{ m.content }} </s>{% endfor %}"


@pytest.mark.parametrize("template", [TEMPLATE, TEMPLATE.removeprefix("{{ bos_token }}")])
def test_a_chat_has_the_bos_of_its_template_and_no_second_one(tiny_model, tmp_path, monkeypatch, template):
    monkeypatch.setattr(tiny_model.tokenizer, "chat_template", template)
    chat = Document.chat([("one", "cat dog"), ("two", "bird")])
    store = collect(tiny_model, [chat, "a fish"], HOOK, tmp_path / "s", chat=True, **SMALL)
    tokens = tiny_model.tokenizer.convert_ids_to_tokens(store.column("token_id").tolist())
    bos = template is TEMPLATE
    words = "one cat dog </s> two bird </s>".split()
    assert tokens[: len(words) - (not bos)] == (words if bos else words[1:])  # what stands at position 0 is left out
    assert store.manifest.excluded.get("bos", 0) == 2 * bos
    assert store.manifest.excluded.get("position_0", 0) == 2 * (not bos)
    ids = lm.chat_ids(tiny_model, [chat.messages], 24)
    row = lm.activations(tiny_model, *lm.pad(ids), [HOOK])[HOOK][0, 1]
    close(store.rows(0, 1)[0], row)


def test_a_chat_without_a_template_or_refused_by_it_is_one_line(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_model.tokenizer, "chat_template", None)
    with pytest.raises(InputError, match="no chat template"):
        collect(tiny_model, ["cat"], HOOK, tmp_path / "s", chat=True, **SMALL)
    monkeypatch.setattr(tiny_model.tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InputError, match="roles must alternate"):
        collect(tiny_model, ["cat"], HOOK, tmp_path / "s", chat=True, **SMALL)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generated_tokens_have_the_activations_of_reading_them(tiny_model, tmp_path, temperature):
    prompts = ["a cat", "dog bird fish", "the sun", "moon", "one two three"]
    how = Generation(tokens=6, temperature=temperature)
    store = collect(tiny_model, prompts, [HOOK, OTHER], tmp_path / "s", generate=how, **SMALL)[OTHER]
    assert store.manifest.excluded["prompt"] == sum(len(row) for row in lm.to_ids(tiny_model, prompts, 24))
    checked = 0
    for prompt in prompts:
        mine = store.column("doc_id") == Document.of(prompt).id
        new, places = store.column("token_id")[mine], store.column("position")[mine]
        start = lm.to_ids(tiny_model, [prompt], 24)[0]
        bos = lm.bos_id(tiny_model)
        # A BOS that the model writes is no row, so the text is known only where there is none before a row.
        whole = places == len(start) + np.arange(len(places))
        assert len(new)
        if whole.all() and bos not in new:
            tokens = torch.tensor([[*start, *new.tolist()]])
            rows = lm.activations(tiny_model, tokens, torch.ones_like(tokens, dtype=torch.bool), [OTHER])[OTHER][0]
            close(store.rows()[torch.from_numpy(mine)], rows[len(start) :])
            checked += len(new)
    assert checked >= 12
    again = collect(tiny_model, prompts, [HOOK, OTHER], tmp_path / "again", generate=how, **SMALL)[OTHER]
    assert torch.equal(again.rows(), store.rows())
    if temperature:
        other = collect(tiny_model, prompts, [HOOK, OTHER], tmp_path / "o", generate=how, seed=1, **SMALL)[OTHER]
        assert other.column("token_id").tolist() != store.column("token_id").tolist()


def test_nothing_is_collected_after_the_end_of_a_text(tiny_model, tmp_path):
    how = Generation(tokens=8, temperature=0)
    free = collect(tiny_model, ["a cat"], HOOK, tmp_path / "free", generate=how, **SMALL)
    end = free.column("token_id")[2]
    first = int(np.flatnonzero(free.column("token_id") == end)[0])
    usual = tiny_model.tokenizer.eos_token
    try:
        tiny_model.tokenizer.eos_token = tiny_model.tokenizer.convert_ids_to_tokens(int(end))
        ended = collect(tiny_model, ["a cat"], HOOK, tmp_path / "ended", generate=how, **SMALL)
    finally:
        tiny_model.tokenizer.eos_token = usual
    assert torch.equal(ended.rows(), free.rows(0, first + 1))


def test_labels_follow_their_tokens(tiny_model, tmp_path):
    texts = [Document.of(text, labels=(("topic", i),)) for i, text in enumerate(TEXTS)]

    def label(document, ids):
        return {"late": np.arange(len(ids)) > 3, "share": np.linspace(0, 1, len(ids))}

    store = collect(tiny_model, texts, HOOK, tmp_path / "s", labels=label, **SMALL)
    topics = {document.id: i for i, document in enumerate(texts)}
    assert store.column("topic").tolist() == [topics[i] for i in store.column("doc_id").tolist()]
    assert store.column("topic").dtype == np.int64
    np.testing.assert_array_equal(store.column("late"), store.column("position") > 3)
    assert store.column("share").dtype == np.float32
    assert store.manifest.labels == {"topic": "int64", "late": "int64", "share": "float32"}


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (lambda d, ids: {"x": 1}, "label column"),
        (lambda d, ids: {"y": [1, 2]}, "one for each token"),
        (lambda d, ids: {"y": "noun"}, "must be a number"),
        (lambda d, ids: {"y": 1} if "cat" in d.text else {"z": 1}, "need the labels y, one has z"),
    ],
)
def test_labels_that_do_not_fit_are_one_line(tiny_bridge, tmp_path, label, message):
    with pytest.raises(InputError, match=message) as caught:
        collect(tiny_bridge, ["cat dog bird", "one two three four"], HOOK, tmp_path / "s", labels=label, **SMALL)
    assert "\n" not in str(caught.value)


def test_a_fraction_among_whole_numbers_makes_the_column_float(tiny_bridge, tmp_path):
    texts = [Document.of(text, labels=(("score", i / 2 if i % 2 else i),)) for i, text in enumerate(TEXTS)]
    store = collect(tiny_bridge, texts, HOOK, tmp_path / "s", **SMALL)
    want = {document.id: dict(document.labels)["score"] for document in texts}
    assert store.column("score").tolist() == [want[i] for i in store.column("doc_id").tolist()]
    late = [Document.of(text, labels=(("score", 0.5 if i > 12 else 1),)) for i, text in enumerate(TEXTS)]
    with pytest.raises(InputError, match="'score' has whole numbers in the first texts, and 0.5"):
        collect(tiny_bridge, late, HOOK, tmp_path / "late", **SMALL)


def test_generating_past_the_models_context_is_refused(tiny_bridge, tmp_path):
    with pytest.raises(InputError, match="256 together for this model, got 274"):
        collect(tiny_bridge, ["cat"], HOOK, tmp_path / "s", generate=Generation(tokens=250), **SMALL)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_a_temperature_or_limit_that_is_no_number_is_refused(tiny_bridge, tmp_path, value):
    with pytest.raises(InputError, match="temperature >= 0"):
        Generation(temperature=value)
    with pytest.raises(InputError, match="massive must be over 1"):
        collect(tiny_bridge, ["cat"], HOOK, tmp_path / "s", **{**SMALL, "massive": value})


def test_a_label_beyond_int64_is_refused(tiny_bridge, tmp_path):
    with pytest.raises(InputError, match="must fit into int64, got 9223372036854775808"):
        collect(tiny_bridge, ["cat"], HOOK, tmp_path / "s", labels=lambda d, ids: {"y": 2**63}, **SMALL)


def test_half_a_surrogate_is_read_as_an_unknown_character(tiny_bridge, tmp_path):
    store = collect(tiny_bridge, ["cat \ud800 dog"], HOOK, tmp_path / "s", **SMALL)
    words = tiny_bridge.tokenizer.convert_ids_to_tokens(store.column("token_id").tolist())
    assert words == ["cat", "<unk>", "dog"]
