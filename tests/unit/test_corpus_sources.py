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
        ({"text": [3]}, {}, "expected text or messages in 'text', got '3' of type int: name the text column"),
        ({"text": ["a"], "y": ["1_2"]}, {"labels": "y"}, "label 'y' must be a number, got '1_2'"),
        ({"text": ["a"], "y": [[0, 1]]}, {"labels": "y"}, r"label 'y' must be a number, got '\[0, 1\]'"),
        ({"text": ["a"], "y": [{"z": 1}]}, {"labels": "y"}, "label 'y' must be a number, got"),
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
    monkeypatch.setattr(corpus.columns.Columns, "names", lambda self, found, place: seen.append(place) or ["text"])
    assert next(corpus.from_files(path)).text == "text 0"
    assert len(seen) < 5


@pytest.mark.parametrize(
    ("typed", "texts"),
    [
        ('one line\n\n{"text": "no json"}\n', ["one line", '{"text": "no json"}']),
        ('{"text": "a"}\n\n{"text": "b\\nc"}\n', ["a", "b\nc"]),
        ("größe 猫", ["größe 猫"]),
        ('\ufeff{"text": "a"}\n', ["a"]),
        ('\n \n{"text": "a"}\n\ufeff{"text": "b"}\n', ["a", "b"]),
        ("\n\ufeffa\nb\n", ["a", "b"]),
        ('[music]\n"Well", he said\n', ["[music]", '"Well", he said']),
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
        ("\n \n", {}, "no text in -"),
        ('\n["a"]\n["b"]\n', {}, r"stdin, line 2: expected a JSON object a line or plain text, got other JSON, .*a"),
        ('[\n{"text": "a"}\n]\n', {}, "stdin, line 1: expected a JSON object a line"),
        ('[{"text": "a"},\n{"text": "b"}]\n', {}, "stdin, line 1: expected a JSON object a line"),
        ('"a text"\n"b"\n', {}, "stdin, line 1: expected a JSON object a line"),
        ('\n\n{"text": "a"}\nb\n', {}, "stdin, line 4 is no JSON"),
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


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    ("kind", "columns", "message"),
    [
        (
            "jsonl",
            {"messages": [CHAT[0], [{"role": "user", "content": None}]]},
            "texts.jsonl, line 2: expected messages",
        ),
        (
            "parquet",
            {"messages": [CHAT[0], [{"role": "user", "content": None}]]},
            "texts.parquet, row 2: expected mess",
        ),
        (
            "parquet",
            {"text": [0.5, 1.5]},
            "texts.parquet, row 1: expected text or messages in 'text', got '0.5' of type fl",
        ),
        ("csv", {"text": ["a\nb", "c"], "y": ["1", "x"]}, "texts.csv, line 4: label 'y' must be a number, got 'x'"),
        ("parquet", {"text": ["a", "b"], "y": [1, None]}, "texts.parquet, row 2: label 'y' must be a number"),
    ],
)
def test_the_row_of_a_mistake_is_named(tmp_path, read, kind, columns, message):
    write(tmp_path, kind, columns)
    with pytest.raises(InputError, match=message):
        list(read(tmp_path / f"texts.{kind}", labels=[name for name in columns if name == "y"]))


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    ("parts", "labels", "expected"),
    [
        ([{"text": None}, {"text": "sea"}], "", [("sea", ())]),
        ([{"text": "sun", "y": 1}, {"text": "sea", "y": 0, "url": "x"}], "y", [("sun", 1), ("sea", 0)]),
        ([{"text": "sun", "y": True}, {"text": "sea", "y": 5}], "y", [("sun", 1), ("sea", 5)]),
        ([{"text": "sun", "y": 1}, {"text": "sea", "y": 0.5}], "y", [("sun", 1), ("sea", 0.5)]),
        ([{"text": "sun", "y": 2**53 + 1}, {"text": "sea", "y": 0.5}], "y", [("sun", 2**53 + 1), ("sea", 0.5)]),
        ([{"text": "sun"}, {"text": 3}], "", "expected text or messages in 'text', got '3' of type int"),
        ([{"text": "sun"}, {"body": "sea"}], "", "b.*has no text in 'text', found body"),
        ([{"text": "sun", "y": 1}, {"text": "sea"}], "y", "b.*has no column 'y', found text"),
        ([{"text": "NA", "y": 1}, {"text": "null", "y": 2}], "y", [("NA", 1), ("null", 2)]),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_files_whose_columns_differ_are_read_as_they_are(tmp_path, read, parts, labels, expected, kind):
    """`datasets` casts all rows to the types of the first ones."""
    for name, row in zip("ab", parts, strict=True):
        write(tmp_path, kind, {column: [value] for column, value in row.items()}, name)
    files = [tmp_path / f"a.{kind}", tmp_path / f"b.{kind}"]
    found = read(files[0], labels=labels or ()) if read is not corpus.from_files else read(files, labels=labels or ())
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            list(found)
    else:
        assert [(d.text, d.labels and d.labels[0][1]) for d in found] == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,source\nhello, friend,web\na,b\n", "line 2: expected as many fields as the header has, 2, got 3"),
        ("text\nhello, friend\nwell, no\n", "line 2: expected as many fields as the header has, 1, got 2"),
        ("text\nNA\nA river\x00 runs\nnull\n1\n", ["NA", "A river\x00 runs", "null", "1"]),
    ],
)
def test_csv_files_of_a_dataset_are_read_as_files_are(tmp_path, content, message):
    (tmp_path / "a.csv").write_text(content)
    if isinstance(message, list):
        assert [d.text for d in corpus.from_hub(str(tmp_path))] == message
    else:
        with pytest.raises(InputError, match=message):
            list(corpus.from_hub(str(tmp_path)))


def test_declared_types_and_options_of_a_dataset_are_honoured(tmp_path):
    """Its card names classes in one case, the separator in the other."""
    card = "---\ndataset_info:\n  features:\n  - {name: text, dtype: string}\n  - name: y\n    dtype:\n"
    card += "      class_label:\n        names: {'0': neg, '1': pos}\n---\n"
    (tmp_path / "typed").mkdir()
    write(tmp_path / "typed", "jsonl", {"text": ["a", "b"], "y": ["pos", "neg"]})
    (tmp_path / "typed/README.md").write_text(card)
    found = list(corpus.from_hub(str(tmp_path / "typed"), labels="y"))
    assert [(d.text, d.labels) for d in found] == [("a", (("y", 1),)), ("b", (("y", 0),))]
    (tmp_path / "semicolons").mkdir()
    (tmp_path / "semicolons/a.csv").write_text("text;y\na, b;1\n")
    (tmp_path / "semicolons/README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: a.csv\n  sep: ';'\n---\n"
    )
    (found,) = corpus.from_hub(str(tmp_path / "semicolons"), labels="y")
    assert (found.text, found.labels) == ("a, b", (("y", 1),))


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


@pytest.mark.parametrize("suffix", [".csv.gz", ".csv"])
def test_csv_files_of_a_dataset_are_never_read_with_columns_shifted(tmp_path, suffix):
    """Compressed, or with types that the dataset's card declares: cases that its own reader would be asked for."""
    import gzip

    def write_rows(text):
        content = text.encode()
        (tmp_path / f"train{suffix}").write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)

    (tmp_path / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - name: text\n    dtype: string\n  - name: source\n    dtype: string\n"
        "  splits:\n  - name: train\n---\n"
    )
    write_rows("text,source\nNA,web\na b,web1\n")
    assert [d.text for d in corpus.from_hub(str(tmp_path))] == ["NA", "a b"]
    write_rows("text,source\nhello, friend,web\na b,web1\n")
    with pytest.raises(InputError, match="line 2: expected as many fields"):
        list(corpus.from_hub(str(tmp_path)))


def test_a_separator_that_a_dataset_declares_is_used_and_other_options_refused(tmp_path):
    (tmp_path / "train.csv").write_text("text;note\na, b;x\nc;y\n")
    card = "---\nconfigs:\n- config_name: default\n  data_files: train.csv\n  sep: ';'\n{}---\n"
    (tmp_path / "README.md").write_text(card.format(""))
    assert [d.text for d in corpus.from_hub(str(tmp_path))] == ["a, b", "c"]
    (tmp_path / "README.md").write_text(card.format("  skiprows: 1\n"))
    with pytest.raises(InputError, match="options of reading"):
        list(corpus.from_hub(str(tmp_path)))


def test_json_files_of_a_dataset_may_differ_in_columns(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": null, "label": 1}, {"text": "2024-01-01", "label": 9007199254740993}]')
    (tmp_path / "b.json").write_text('{"text": "moon", "label": 0, "url": "x"}')
    found = [(d.text, d.labels) for d in corpus.from_hub(str(tmp_path), labels="label")]
    assert found == [("2024-01-01", (("label", 9007199254740993),)), ("moon", (("label", 0),))]


def test_standard_input_is_utf_8_in_any_locale(monkeypatch):
    import io

    def typed(raw):
        """As Python opens it in a C locale: any byte is let through."""
        return io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8", errors="surrogateescape")

    monkeypatch.setattr("sys.stdin", typed("café river\n".encode()))
    assert [d.text for d in corpus.from_files("-")] == ["café river"]
    for wrong in ("café".encode("latin-1"), "a river".encode("utf-16")):
        monkeypatch.setattr("sys.stdin", typed(wrong))
        with pytest.raises(InputError, match="cannot read stdin.*save it as UTF-8"):
            list(corpus.from_files("-"))
