"""Stages of a corpus: dedup, held-out split, order and cap, on sequences that need not fit into memory."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glp_lens import corpus
from glp_lens.corpus import Document
from glp_lens.corpus.probing import _texts
from glp_lens.errors import InputError


def documents(n, start=0):
    return [Document.of(f"text number {i} is about the number {i * i}") for i in range(start, start + n)]


@given(n=st.integers(0, 60), buffer=st.integers(1, 70), seed=st.integers(-3, 2**65))
def test_a_shuffle_gives_every_document_exactly_once_and_the_same_again(n, buffer, seed):
    found = list(corpus.shuffled(documents(n), buffer, seed))
    assert sorted(d.id for d in found) == sorted(d.id for d in documents(n))
    assert found == list(corpus.shuffled(iter(documents(n)), buffer, seed))


def test_a_shuffle_mixes_as_well_as_its_buffer_allows():
    texts = documents(2000)
    place = {d.id: i for i, d in enumerate(texts)}
    found = np.array([place[d.id] for d in corpus.shuffled(texts, 300, seed=1)])
    moved = found - np.arange(2000)
    assert moved.max() <= 300, "no text comes before the buffer reached it"
    assert np.abs(moved).mean() > 100
    assert (found != [place[d.id] for d in corpus.shuffled(texts, 300, seed=2)]).mean() > 0.9
    whole = [place[d.id] for d in corpus.shuffled(texts, 5000, seed=1)]
    assert abs(np.corrcoef(whole, np.arange(2000))[0, 1]) < 0.1


def test_the_order_of_a_shuffle_is_the_same_in_every_version():
    """A store that is continued on another machine must see the same order."""
    found = [d.text.split()[2] for d in corpus.shuffled(documents(12), 5, seed=7)]
    assert " ".join(found) == "2 3 6 5 7 8 0 4 9 1 11 10"


def test_stages_read_no_further_than_they_are_asked():
    read = []

    def endless():
        for i in itertools.count():
            read.append(i)
            yield Document.of(f"text {i % 1000}")

    stages = corpus.limit(corpus.shuffled(corpus.of_split(corpus.distinct(endless()), "train"), 50), 100)
    assert len(list(stages)) == 100
    assert len(read) < 250


def test_distinct_keeps_the_first_of_each_text_or_beginning():
    start = "The same sixty characters begin all of these documents, word for"
    texts = [start + " one", "other", start.upper() + "  two", "other", f"  {start} one"]
    found = [Document.of(text, str(i)) for i, text in enumerate(texts)]
    assert [d.source for d in corpus.distinct(found)] == ["0", "1", "2", "4"]
    assert [d.source for d in corpus.distinct(found, by="beginning")] == ["0", "1"]
    with pytest.raises(InputError, match="by must be one of text, beginning, got 'id'"):
        corpus.distinct(found, by="id")


def test_splits_are_complementary_and_a_twentieth_is_held_out():
    texts = documents(4000)
    train, heldout = (list(corpus.of_split(texts, split)) for split in ("train", "heldout"))
    assert len(train) + len(heldout) == len(list(corpus.of_split(texts, "all"))) == 4000
    assert not {d.id for d in train} & {d.id for d in heldout}
    assert 0.035 < len(heldout) / 4000 < 0.065
    with pytest.raises(InputError, match="split must be one of train, heldout, all, got 'test'"):
        corpus.of_split(texts, "test")


def test_a_text_that_begins_alike_is_on_the_same_side_however_spaced_or_capitalised():
    for d in documents(300):
        copies = [
            d,
            Document.of(f" \n{d.text.upper()}"),
            Document.of(d.text.replace(" ", "  ") + " " * 300 + "and more"),
        ]
        assert len(list(corpus.of_split(copies, "heldout"))) in (0, 3)


def test_conversations_with_one_system_message_are_not_all_on_one_side():
    system = ("system", "You are a helpful assistant. Answer every question in the language in which it was asked.")
    chats = [Document.chat([system, ("user", f"question {i}"), ("assistant", "yes")]) for i in range(600)]
    bare = [Document.chat(d.messages[1:]) for d in chats]
    heldout = {d.text.removeprefix(system[1]).strip() for d in corpus.of_split(chats, "heldout")}
    assert 10 < len(heldout) < 60
    assert heldout == {d.text for d in corpus.of_split(bare, "heldout")}
    assert len(list(corpus.distinct(chats, by="beginning"))) == 600


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Long texts with a page in common, repeats, texts that begin alike, and conversations, in three formats."""
    import pandas as pd

    folder = tmp_path_factory.mktemp("mixed")
    footer = " ".join(f"licence word {i}" for i in range(60))
    long = [" ".join(f"w{i} is {j}" for j in range(60)) + "\n" + footer for i in range(150)]
    rows = [{"text": t} for t in long + long[:40]]
    rows += [{"messages": [{"role": "user", "content": f"ask {i}"}, {"role": "assistant", "content": "no"}]}
             for i in range(60)]  # fmt: skip
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    short = pd.DataFrame({"text": [f"row {i} of the table" for i in range(133)] * 2})
    short.to_csv(folder / "b.csv", index=False)
    short.iloc[:50].to_parquet(folder / "c.parquet")
    return folder


LENGTHS = (40, 90, 600)
OPTIONS = [
    {"seed": seed, "dedup": dedup, "max_documents": cap, "stream": stream, "context": context, "shuffle_buffer": buffer}
    for seed, dedup, cap, (stream, buffer), context in itertools.product(
        (0, 5), (True, False), (None, 90), ((False, 0), (True, 0), (True, 37)), (8, 100, None)
    )
]


@pytest.fixture(scope="module")
def sides(mixed):
    """All whole texts by side, under the default options."""
    return {
        split: {corpus.beginning(d.text) for d in corpus.open_corpus(str(mixed), split=split, context=None)}
        for split in ("train", "heldout")
    }


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_option_moves_a_text_to_the_other_side(mixed, sides, options):
    assert len(sides["train"]) > 5 * len(sides["heldout"]) > 50
    for split in ("train", "heldout"):
        for document in corpus.open_corpus(str(mixed), split=split, **options):
            assert (document.whole or corpus.beginning(document.text)) in sides[split]


@pytest.mark.parametrize("stream", [False, True])
def test_a_page_that_two_texts_share_is_on_one_side_under_every_seed(mixed, stream):
    """The first text that holds it keeps it, whatever the order in which texts are given out."""

    def ids(split, seed):
        return {d.id for d in corpus.open_corpus(str(mixed), split=split, seed=seed, context=8, stream=stream)}

    train, heldout = ids("train", 0), ids("heldout", 1)
    assert not train & heldout
    assert train == ids("train", 1)


def test_pieces_of_one_text_are_on_one_side(tmp_path):
    texts = [" ".join(f"{i}w{j}" for j in range(400)) for i in range(100)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    found = list(corpus.from_files(tmp_path, piece=100))
    of_text = {split: {d.text.split("w")[0] for d in corpus.of_split(found, split)} for split in ("train", "heldout")}
    assert not of_text["train"] & of_text["heldout"]
    assert of_text["heldout"] == {t.split("w")[0] for t in texts if list(corpus.of_split([Document.of(t)], "heldout"))}
    assert len(of_text["heldout"]) > 1


def test_no_length_of_the_packaged_texts_moves_one_or_lets_a_test_prompt_in(tmp_path, monkeypatch):
    """On three datasets, since reading all takes seconds."""
    data = corpus.probing_folder()
    names = ["162_agnews_1", "97_news_class", "130_temp_cat_Frequency"]
    (tmp_path / "cleaned_data").mkdir()
    for name in ["probing_datasets_MASTER", *(f"cleaned_data/{name}" for name in names)]:
        (tmp_path / f"{name}.csv.zst").symlink_to(data / f"{name}.csv.zst")
    monkeypatch.setattr("glp_lens.corpus.probing.probing_folder", lambda: tmp_path)
    try:
        sides = {
            split: {
                length: corpus.packaged(1, split, max_characters=length, min_characters=41, share=1)
                for length in LENGTHS
            }
            for split in ("train", "heldout")
        }
    finally:
        _texts.cache_clear()
    begins = {split: [{d.whole for d in found} for found in of.values()] for split, of in sides.items()}
    assert min(map(len, begins["train"])) > 1000 < 60 * min(map(len, begins["heldout"]))
    assert not set.union(*begins["train"]) & set.union(*begins["heldout"])
    # Longer texts tell more of them apart, and the cut decides nothing else.
    assert all(begun <= of[-1] for of in begins.values() for begun in of)
    assert all(d.whole.startswith(corpus.beginning(d.text)) for d in sides["train"][40])


def test_documents_of_memory_and_of_a_stream_are_the_same_in_another_order(mixed):
    kept, streamed = (
        list(corpus.open_corpus([str(mixed)], seed=3, stream=s, shuffle_buffer=20)) for s in (False, True)
    )
    assert {d.id for d in kept} == {d.id for d in streamed}
    assert kept != streamed
    assert kept == list(corpus.open_corpus(str(mixed), seed=3)) == corpus.ordered(streamed, seed=3)
    assert streamed == list(corpus.open_corpus([str(mixed)], seed=3, stream=True, shuffle_buffer=20))
    assert list(corpus.open_corpus(str(mixed), seed=3, max_documents=17)) == kept[:17]
    unshuffled = corpus.open_corpus(str(mixed), stream=True, shuffle_buffer=0, split="all", context=None)
    assert next(iter(unshuffled)).text.startswith("w0 is 0")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, "split must be one of"),
        ({"max_documents": 0}, "max_documents must be at least 1, got 0"),
        ({"shuffle_buffer": -1}, "shuffle_buffer must be at least 0, got -1"),
        ({"context": 0}, "piece must be at least 1"),
        ({"labels": ["y"]}, "no column 'y', found text"),
        ({"spec": "", "labels": ["y"]}, "packaged corpus has no label columns"),
        ({"spec": "hf:a:b:c:d"}, "expected hf:NAME"),
        ({"spec": "hf:"}, "expected hf:NAME"),
        ({"split": "heldout"}, "no text falls into the heldout split"),
        ({"split": "heldout", "stream": True}, "no text falls into the heldout split"),
    ],
)
def test_bad_options_are_one_clear_line(tmp_path, options, message):
    (tmp_path / "a.txt").write_text("one text")
    with pytest.raises(InputError, match=message) as caught:
        list(corpus.open_corpus(**{"spec": str(tmp_path), **options}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("call", [lambda: corpus.limit([], 0), lambda: corpus.shuffled([], 0)])
def test_sizes_under_one_are_refused_at_once(call):
    with pytest.raises(InputError, match="at least 1"):
        call()
