"""The corpus: the official split is sae-probes' own, and no text that it tests on is in the corpus."""

import collections
import csv
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glp_lens import corpus
from glp_lens.corpus.files import read_rows
from glp_lens.corpus.probing import _cap
from glp_lens.errors import InputError


@pytest.mark.parametrize(("n", "n_train", "n_test"), [(728, None, None), (2000, None, None), (900, 101, 333)])
def test_official_split_is_that_of_sae_probes(n, n_train, n_test):
    from sae_probes.utils_data import get_train_test_indices

    y = np.random.default_rng(n).permutation(np.arange(n) % 2)
    train, test = corpus.official_split(y, n_train, n_test)
    n_train = n_train or min(1024, n - 100)
    want_train, want_test = get_train_test_indices(y, n_train, n_test or n - n_train - 1, 0.5, seed=42)
    np.testing.assert_array_equal(train, want_train)
    np.testing.assert_array_equal(test, want_test)
    assert not set(train) & set(test)


def test_a_split_larger_than_a_class_is_refused():
    with pytest.raises(InputError, match="of each class"):
        corpus.official_split(np.r_[np.ones(10), np.zeros(500)], 100, 50)


def test_labels_follow_the_label_encoder():
    from sklearn.preprocessing import LabelEncoder

    for targets in (["b", "a", "b"], [3, -1, 3], [True, False, True]):
        np.testing.assert_array_equal(corpus.binary_labels(targets), LabelEncoder().fit_transform(targets))
    with pytest.raises(InputError, match="two target values, got 3"):
        corpus.binary_labels([1, 2, 3])


def test_datasets_are_read_by_name():
    names = corpus.binary_datasets()
    assert len(names) == len(set(names)) == 113
    assert "162_agnews_1" in names
    table = corpus.read_dataset("162_agnews_1")
    assert list(table.columns) == ["prompt", "target"]
    with pytest.raises(InputError, match="did you mean '162_agnews_1'"):
        corpus.read_dataset("162_agnews_l")


@pytest.fixture(scope="module")
def everything():
    return corpus.packaged(split="all")


def test_no_text_of_the_corpus_begins_like_a_test_prompt(everything):
    texts = {document.text for document in everything}
    tested = set()
    for name in corpus.binary_datasets():
        table = corpus.read_dataset(name)
        _, test = corpus.official_split(corpus.binary_labels(table["target"]))
        tested |= {str(prompt).strip()[:600] for prompt in table["prompt"].iloc[test]}
    assert len(tested) > 50_000
    assert not texts & tested


def test_texts_are_distinct_bounded_and_of_many_datasets(everything):
    assert len({d.text for d in everything}) == len({d.id for d in everything}) == len(everything) > 30_000
    assert all(len(d.text) <= 600 and d.text.strip() for d in everything)
    share = collections.Counter(d.source for d in everything)
    assert max(share.values()) <= len(everything) / 20
    assert len(share) > 50


def test_heldout_is_a_twentieth_apart_from_train_under_every_seed(everything):
    train, other = {d.id for d in corpus.packaged(seed=0)}, {d.id for d in corpus.packaged(1, "heldout")}
    assert not train & other
    assert 0.03 < 1 - len(train) / len(everything) < 0.07
    assert [d.id for d in everything if d.id in train] == [d.id for d in corpus.packaged(seed=0)]


def test_cap_is_the_largest_that_keeps_every_source_under_its_share():
    counts = np.array([1000, 50, 40, 40, 30])
    cap = _cap(counts, 0.3)
    fits = [c for c in range(1, 1001) if c <= 0.3 * np.minimum(counts, c).sum()]
    assert cap == max(fits)
    with pytest.raises(InputError, match="share must be at least"):
        _cap(counts, 0.01)


def test_an_empty_name_is_the_packaged_corpus():
    assert corpus.open_corpus(seed=2, max_documents=50) == corpus.packaged(2)[:50]
    assert corpus.open_corpus([], split="heldout", seed=2) == corpus.packaged(2, "heldout")


@pytest.mark.parametrize("options", [{"split": "test"}, {"share": 0.0}, {"share": 2.0}])
def test_bad_options_are_refused(options):
    with pytest.raises(InputError):
        corpus.packaged(**options)


TEXTS = ["the cat sat", 'on, the "mat"', "größe 猫"]


def _write(folder, kind):
    table = pd.DataFrame({"label": [0, 1, 2], "body": TEXTS})
    path = folder / f"texts.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps({"body": t}) for t in TEXTS) + "\n\n", encoding="utf-8")
    elif kind == "csv":
        table.to_csv(path, index=False)
    else:
        table.to_parquet(path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_tables_give_one_document_a_row(tmp_path, kind):
    path = _write(tmp_path, kind)
    found = list(corpus.from_files(path, "body"))
    assert [d.text for d in found] == TEXTS
    assert {d.source for d in found} == {path.name}
    assert found[0].id == corpus.Document.of(TEXTS[0]).id
    with pytest.raises(InputError, match=r"no text in 'text', found .*body"):
        list(corpus.from_files(path))


def test_a_folder_is_searched_and_txt_is_one_document_a_file(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.txt").write_text("  \n")
    (tmp_path / "notes.pdf").write_text("not this")
    with pytest.warns(UserWarning, match=r"read 2 files \(.txt 2\), skipped 1 \(.pdf 1\)"):
        assert [d.text for d in corpus.from_files([tmp_path])] == ["one\n\ntwo"]


def test_a_folder_is_read_but_for_what_is_hidden_or_of_another_kind(tmp_path):
    folder = tmp_path / ".data"  # a hidden folder may be named
    for place in (".ipynb_checkpoints", "sub/.cache", "sub/deep"):
        (folder / place).mkdir(parents=True)
    for name, content in {
        "a.txt": "one",
        "B.TXT": "two",
        "sub/c.CSV": "text\nthree\n",
        "sub/d.tsv": "text\tlabel\nfour, five\t1\n",
        "sub/deep/e.json": '[{"text": "six"}, {"text": "seven"}]',
        "f.JSONL": '{"text": "eight"}\n',
        ".ipynb_checkpoints/a.txt": "hidden",
        "sub/.cache/old.txt": "hidden",
        "sub/._a.txt": "hidden",
        "g.md": "other",
        "LICENSE": "other",
    }.items():
        (folder / name).write_text(content)
    (folder / "sub/deep/up").symlink_to(folder)
    told = (
        r"read 5 files \(.csv 1, .jsonl 1, .tsv 1, .txt 2\), "
        r"skipped 7 \(.json 1, .md 1, hidden 3, linked folders 1, no ending 1\)$"
    )
    with pytest.warns(UserWarning, match=told):
        found = {d.text for d in corpus.from_files(folder)}
    assert found == {"one", "two", "three", "four, five", "eight"}
    with pytest.warns(UserWarning, match="read 6 files"):  # a json file that is named is read
        found = {d.text for d in corpus.from_files([folder, folder / "sub/deep/e.json"])}
    assert found == {"one", "two", "three", "four, five", "six", "seven", "eight"}
    with pytest.raises(InputError, match=r"holds no text files, found 1 \(hidden 1\)"):
        corpus.from_files(_only_hidden(tmp_path))


def _only_hidden(folder):
    (folder / "sub").mkdir()
    (folder / "sub/.a.txt").write_text("hidden")
    return folder / "sub"


def test_a_folder_of_which_nothing_is_skipped_is_no_warning(tmp_path, recwarn):
    (tmp_path / "a.txt").write_text("one")
    assert len(list(corpus.from_files(tmp_path))) == 1
    assert not recwarn.list


@given(texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=12), min_size=1), tabs=st.booleans())
def test_what_pandas_writes_as_csv_is_read_to_the_letter(tmp_path_factory, texts, tabs):
    """Quotes, separators, line ends of all kinds and null characters inside of texts."""
    path = tmp_path_factory.mktemp("csv") / ("texts.tsv" if tabs else "texts.csv")
    table = pd.DataFrame({"label": range(len(texts)), "text": texts})
    table.to_csv(path, index=False, quoting=csv.QUOTE_ALL, sep="\t" if tabs else ",")
    rows = list(read_rows(path, "text", ["label"]))
    assert rows == [{"text": text, "label": str(i)} for i, text in enumerate(texts)]


def test_a_text_of_any_length_is_one_field(tmp_path):
    text = "word, " * 50_000 + "end"
    pd.DataFrame({"text": [text]}).to_csv(tmp_path / "long.csv", index=False)
    assert [d.text for d in corpus.from_files(tmp_path, piece=None)] == [text]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "a river"),
        ("a.csv", "text,label\na river,1\n"),
        ("a.csv", '\r\n"text","label"\r\n"a river","1"\r\n'),
        ("a.tsv", "text\tlabel\na river\t1\n"),
        ("a.jsonl", '{"text": "a river"}\n'),
        ("a.jsonl", '\n \n{"text": "a river"}\n'),
        ("a.json", '{"text": "a river"}\n'),
        ("a.json", '\n[{\n"text": "a river"\n}]'),
        ("a.json", '{"text": "a river"}\n\n{"text": ""}\n'),
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_byte_order_marks_and_blank_lines_are_no_text(tmp_path, name, content, mark):
    (tmp_path / name).write_bytes((mark + content).encode())
    assert [d.text for d in corpus.from_files(tmp_path / name)] == ["a river"]


def test_long_texts_are_cut_at_white_space_and_lose_nothing(tmp_path):
    words = [f"w{i}" for i in range(500)]
    (tmp_path / "long.txt").write_text(" ".join(words) + "x" * 250)
    found = [d.text for d in corpus.from_files(tmp_path, piece=100)]
    assert all(0 < len(text) <= 100 for text in found)
    assert "".join(found).replace(" ", "") == "".join(words) + "x" * 250
    assert " ".join(found[:5]).split() == words[: len(" ".join(found[:5]).split())]
    assert len(list(corpus.from_files(tmp_path, piece=None))) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\nnot json\n', "line 2 is no JSON"),
        ("a.jsonl", '{"text": 3}\n', r"line 1: expected text or messages in 'text', got '3' of type int"),
        ("a.jsonl", "[1]\n", "expected a JSON object"),
        ("a.json", "[1]\n", "row 1: expected a JSON object, got int"),
        ("a.json", '[{"text": "a"},\n', "is no JSON: .*line 2"),
        ("a.json", "[" * 100_000, "is no JSON"),
        ("a.csv", "", "cannot read"),
        (
            "a.csv",
            "text\nHello, my friend\nWell, no\n",
            "line 2: expected as many fields as the header has, 1, got 2: put",
        ),
        ("a.csv", "text,source\nhello, friend,web\na,b\n", "line 2: .*, 2, got 3: put a text that holds a comma"),
        ("a.csv", 'text\n"two\nlines"\n\nA river\nHello, you\n', "line 6: .*, 1, got 2"),
        ("a.csv", "text,label\na,1,\nb,0,\n", "line 2: .*, 2, got 3: leave out the comma at the end"),
        ("a.csv", "id,text,label\n1,A river\n2,The sea,1\n", "line 2: .*, 3, got 2: fill in"),
        ("a.csv", 'text,source\n"She said \\"go, now\\"",web\n', "line 2: a quoted text must end before a separator"),
        ("a.csv", 'text,source\na,b\n"never ends,web\n', "line 3: a quoted text must end"),
        ("a.csv", "text;label\nA river;1\n", "line 1: expected a comma between columns, .* with a semicolon"),
        ("a.csv", "text,text\na,b\n", "has 2 columns 'text'"),
        ("a.tsv", "text\tlabel\na\tb\tc\n", "line 2: .*, 2, got 3: put a text that holds a tab"),
        ("a.tsv", "text,label\na,b\n", "line 1: expected a tab between columns, .* with a comma"),
        ("a.parquet", "text", "cannot read"),
        ("a.txt", " \n", "every document is empty"),
        ("a.txt", b"\xff\xfe\xff", "cannot read"),
        ("a.docx", "x", "expected a file of kind"),
    ],
)
def test_bad_files_are_one_clear_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as caught:
        list(corpus.from_files(path))
    assert "\n" not in str(caught.value)


def test_missing_files_are_refused_at_once(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        corpus.from_files(tmp_path / "none.txt")
    with pytest.raises(InputError, match="holds no text files"):
        corpus.from_files(tmp_path)


def test_quotes_behind_a_space_are_refused_and_names_of_columns_lose_theirs(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('id, text\n1, "A river"\n')
    with pytest.raises(InputError, match="line 2: a text in double quotes must begin right behind the separator"):
        list(corpus.from_files(path))
    path.write_text("id, text\n1, A river\n")
    assert [d.text for d in corpus.from_files(path)] == ["A river"]
    path.write_text('id," text x"\n1,A river\n')
    with pytest.raises(InputError, match="no text in 'text', found id, text x"):
        list(corpus.from_files(path))


def test_what_cannot_be_a_file_is_one_line_and_dead_links_are_skipped(tmp_path):
    with pytest.raises(InputError, match="cannot read aaaa.*too long"):
        corpus.from_files("a" * 300)
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.warns(UserWarning, match=r"skipped 1 \(dead links and devices 1\)"):
        assert [d.text for d in corpus.from_files(tmp_path)] == ["one"]
