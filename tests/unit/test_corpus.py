"""The corpus: the official split is sae-probes' own, and no text that it tests on is in the corpus."""

import collections
import json

import numpy as np
import pytest

from glp_lens import corpus
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
    import pandas as pd

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
    assert [d.text for d in corpus.from_files([tmp_path])] == ["one\n\ntwo"]


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
        ("a.jsonl", '{"text": 3}\n', "found text"),
        ("a.jsonl", "[1]\n", "expected a JSON object"),
        ("a.csv", "", "cannot read"),
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
