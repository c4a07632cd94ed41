"""Where documents come from: label columns and conversations of files, standard input, Hugging Face datasets."""

import io
import json

import pytest
import xxhash

from glp_lens import corpus
from glp_lens.corpus import Document
from glp_lens.errors import InputError

KINDS = ("jsonl", "csv", "parquet")
CHAT = [
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "größe? " * 200}],
    [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}, {"role": "user", "content": "bye"}],
    [],
]


def write(folder, kind, columns, name="texts"):
    import pandas as pd

    table = pd.DataFrame(columns)
    path = folder / f"{name}.{kind}"
    if kind == "jsonl":
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        path.write_text("\n".join(map(json.dumps, rows)))
    elif kind == "csv":
        table.to_csv(path, index=False)
    else:
        table.to_parquet(path)
    return path


READERS = [
    pytest.param(corpus.from_files, id="files"),
    pytest.param(lambda path, **options: corpus.from_hub(str(path.parent), **options), id="hub"),
]


def test_documents_are_values():
    chat = Document.chat([("user", "a"), ("assistant", "b")], "s", labels=(("y", 1),))
    assert chat.text == "a\nb"
    assert chat.id == Document.of("a\nb").id
    assert len({chat, Document.chat([("user", "a"), ("assistant", "b")], "s", labels=(("y", 1),))}) == 1
    assert Document.of("a") == Document.of("a", "")


def test_half_a_surrogate_pair_is_text_like_any_other(tmp_path):
    texts = ["a \ud800 b", "a \udfff b", "caf\u00e9 \U0001f600"]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    assert Document.of(texts[2]).id == xxhash.xxh3_64_intdigest(texts[2].encode("utf-8"))
    documents = [Document.of(text) for text in texts]
    assert len(list(corpus.distinct(documents))) == 3
    assert sorted(d.text for d in corpus.split_documents(documents, "all")) == sorted(texts)
    assert Document.chat([("user", texts[0])]).id == documents[0].id
    assert [d.id for d in corpus.from_files(tmp_path / "texts.jsonl")] == [d.id for d in documents]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("kind", KINDS)
def test_label_columns_are_copied_to_every_piece(tmp_path, kind, read):
    columns = {
        "score": [0.25, -1e3, 2.5],
        "text": ["one", "two " * 60, " "],
        "other": ["a", "b", "c"],
        "y": [3, 2**40, 0],
    }
    path = write(tmp_path, kind, columns)
    found = list(read(path, piece=100, labels=["y", "score"]))
    assert [d.labels for d in found] == [(("y", 3), ("score", 0.25))] + 3 * [(("y", 2**40), ("score", -1e3))]
    assert [type(v) for _, v in found[0].labels] == [int, float]
    assert next(read(path, piece=100, labels="y")).labels == (("y", 3),)
    assert {d.labels for d in read(path)} == {()}
    assert [d.whole for d in found] == [""] + 3 * [corpus.beginning("two " * 60)]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("column", ["messages", "talk"])
def test_conversations_are_never_cut(tmp_path, kind, read, column):
    path = write(tmp_path, kind, {column: CHAT, "y": [1, 2, 3]})
    found = list(read(path, piece=20, labels=["y"], **({"text_column": "talk"} if column == "talk" else {})))
    assert [d.messages for d in found] == [tuple((m["role"], m["content"]) for m in chat) for chat in CHAT[:2]]
    assert found[1].text == "hi\nhello\nbye"
    assert [d.labels for d in found] == [(("y", 1),), (("y", 2),)]


def test_messages_are_read_only_where_no_text_column_is_named(tmp_path):
    path = write(tmp_path, "jsonl", {"messages": CHAT, "text": ["a", "b", "c"]})
    assert [d.text for d in corpus.from_files(path)] == ["a", "b", "c"]
    with pytest.raises(InputError, match="no text in 'body', found messages, text"):
        list(corpus.from_files(path, "body"))


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"text": ["a"], "y": ["high"]}, {"labels": "y"}, "label 'y' must be a number, got 'high'"),
        ({"text": ["a"], "y": [None]}, {"labels": "y"}, "label 'y' must be a number, got 'None'"),
        ({"text": ["a"], "y": [1]}, {"labels": ["y", "z"]}, "no column 'z', found text, y"),
        ({"text": ["a"]}, {"text_column": "body"}, "no text in 'body', found text: name the text column"),
        ({"text": [3]}, {}, "no text in 'text', found text"),
        ({"text": [" ", ""]}, {}, "every document is empty"),
        ({"text": [[{"from": "user", "value": "a\nb"}]]}, {}, "expected messages with a role and a content"),
        ({"text": [[{"role": "user", "content": [1]}]]}, {}, "expected messages with a role and a content"),
        ({"text": [["a", "b"]]}, {}, "expected messages with a role and a content"),
        ({"text": ["a"]}, {"piece": 0}, "piece must be at least 1"),
    ],
)
def test_bad_rows_are_one_clear_line(tmp_path, read, columns, options, message):
    path = write(tmp_path, "jsonl", columns)
    with pytest.raises(InputError, match=message) as caught:
        list(read(path, **options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["", "nan", "inf", "1e999", "9" * 30])
def test_labels_of_csv_that_a_store_cannot_hold_are_refused(tmp_path, value):
    (tmp_path / "a.csv").write_text(f"text,y\none,1\ntwo,{value}\n")
    with pytest.raises(InputError, match="label 'y' must be a number"):
        list(corpus.from_files(tmp_path, labels="y"))


@pytest.mark.parametrize("kind", KINDS)
def test_large_tables_are_read_as_asked(tmp_path, kind, monkeypatch):
    """The first document comes long before the end of the file."""
    path = write(tmp_path, kind, {"text": [f"text {i}" for i in range(30_011)]})
    seen = []
    monkeypatch.setattr(corpus.rows.Columns, "names", lambda self, found, place: seen.append(place) or ["text"])
    assert next(corpus.from_files(path)).text == "text 0"
    assert len(seen) < 5


@pytest.mark.parametrize(
    ("typed", "texts"),
    [
        ('one line\n\n{"text": "no json"}\n', ["one line", '{"text": "no json"}']),
        ('{"text": "a"}\n\n{"text": "b\\nc"}\n', ["a", "b\nc"]),
        ("größe 猫", ["größe 猫"]),
    ],
)
def test_standard_input_is_lines_or_jsonl(monkeypatch, typed, texts):
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    found = list(corpus.from_files("-"))
    assert [d.text for d in found] == texts
    assert {d.source for d in found} == {"stdin"}
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    assert sorted(d.text for d in corpus.open_corpus("-", split="all")) == sorted(texts)


@pytest.mark.parametrize(
    ("typed", "options", "message"),
    [
        ("", {}, "no text in -"),
        ('{"text": "a"}\nb\n', {}, "stdin, line 2 is no JSON"),
        ('{"text": "a"}\n', {"labels": "y"}, "stdin, line 1 has no column 'y'"),
        ("a\n", {"labels": "y"}, "stdin has no column 'y'"),
        ('{"text": ' + "[" * 100_000, {}, "stdin, line 1 is no JSON"),
        (b"\xff\n", {}, "cannot read stdin"),
    ],
)
def test_bad_input_on_stdin_is_one_clear_line(monkeypatch, typed, options, message):
    data = typed if isinstance(typed, bytes) else typed.encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
    with pytest.raises(InputError, match=message) as caught:
        list(corpus.from_files("-", **options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dataset_is_streamed_in_its_order_or_shuffled_by_seed(tmp_path, kind):
    for split, start in (("train", 0), ("validation", 500)):
        write(tmp_path, kind, {"text": [f"text {i}" for i in range(start, start + 300)]}, split)
    name = str(tmp_path)
    found = [d.text for d in corpus.from_hub(name)]
    assert found == [f"text {i}" for i in range(300)]
    assert next(corpus.from_hub(name, split="validation")) == Document.of("text 500", name)
    mixed = [d.text for d in corpus.from_hub(name, shuffle_buffer=64, seed=4)]
    assert mixed != found
    assert sorted(mixed) == sorted(found)
    assert mixed == [d.text for d in corpus.from_hub(name, shuffle_buffer=64, seed=4)]
    opened = [d.text for d in corpus.open_corpus(f"hf:{name}::validation", split="all", seed=9, shuffle_buffer=50)]
    assert sorted(opened) == [f"text {i}" for i in range(500, 800)]
    assert opened != sorted(opened)


def test_a_dataset_and_files_make_one_corpus(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, "jsonl", {"text": [f"{name} {i}" for i in range(40)], "y": range(40)})
    both = [f"hf:{tmp_path / 'a'}", str(tmp_path / "b")]
    found = list(corpus.open_corpus(both, split="all", labels=("y",)))
    assert {d.text for d in found} == {f"{name} {i}" for name in "ab" for i in range(40)}
    assert all(d.labels == (("y", int(d.text.split()[1])),) for d in found)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("{}/none", {}, "cannot read dataset .*none: .*; check its name"),
        ("nobody/no-such-dataset", {}, "cannot read dataset nobody/no-such-dataset: "),
        ("{}", {"split": "test"}, "Bad split: test"),
        ("{}", {"config": "english"}, "'english' not found"),
        ("{}", {"shuffle_buffer": -1}, "shuffle_buffer must be at least 0"),
    ],
)
def test_datasets_that_cannot_be_had_are_one_clear_line_at_once(tmp_path, name, options, message):
    write(tmp_path, "jsonl", {"text": ["a"]})
    with pytest.raises(InputError, match=message) as caught:
        corpus.from_hub(name.format(tmp_path), **options)
    assert "\n" not in str(caught.value)


def test_a_damaged_dataset_and_one_with_code_are_one_clear_line(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match="cannot read dataset") as caught:
        list(corpus.from_hub(str(tmp_path / "data")))
    assert "\n" not in str(caught.value)
    ran = tmp_path / "ran"
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "code.py").write_text(f"open({str(ran)!r}, 'w')\n")
    with pytest.raises(InputError, match="cannot read dataset"):
        list(corpus.from_hub(str(tmp_path / "code")))
    assert not ran.exists()
