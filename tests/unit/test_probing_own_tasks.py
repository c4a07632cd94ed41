"""Tasks of a user's own files and stores: what is read, how it is split, and what is refused in one line."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.model_selection import train_test_split

from glp_lens.activations import write_store
from glp_lens.errors import InputError
from glp_lens.evals.probing import tasks
from glp_lens.evals.probing.own_tasks import from_file, from_store, open_tasks

N = 211


@pytest.fixture
def table():
    rng = np.random.default_rng(0)
    kind = rng.choice(["neg", "pos"], N, p=[0.7, 0.3])
    return pd.DataFrame(
        {
            "text": [f"review {i}, of film {i % 37}" for i in range(N)],
            "label": kind,
            "flag": kind == "pos",
            "score": np.where(kind == "pos", 10, 9),
            "stars": rng.integers(1, 6, N),
            "author": rng.integers(0, 50, N),
            "part": rng.choice(["train", "test"], N, p=[0.8, 0.2]),
        }
    )


@pytest.fixture
def path(tmp_path, table):
    table.to_csv(tmp_path / "reviews.csv", index=False)
    return tmp_path / "reviews.csv"


def part_texts(task, split="official"):
    return [[task.texts[i] for i in rows] for rows in task.splits[split]]


def same(a, b):
    return a.texts == b.texts and a.classes == b.classes and np.array_equal(a.labels, b.labels)


def test_all_kinds_of_file_make_the_same_task(path, table):
    table.to_json(path.with_suffix(".jsonl"), orient="records", lines=True)
    table.to_parquet(path.with_suffix(".parquet"))
    csv, jsonl, parquet = (from_file(path.with_suffix(kind)) for kind in (".csv", ".jsonl", ".parquet"))
    assert csv.name == csv.family == "reviews"
    assert csv.classes == ("neg", "pos")
    assert same(csv, jsonl)
    assert same(csv, parquet)
    by_text = table.set_index("text")["label"]
    assert [csv.classes[label] for label in csv.labels] == [by_text[text] for text in csv.texts]
    assert sorted(csv.texts) == sorted(table["text"])


@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize(("column", "classes"), [("flag", ("False", "True")), ("score", ("9", "10"))])
def test_booleans_and_numbers_are_classes_in_their_own_order(path, table, kind, column, classes):
    table.to_csv(path, index=False)
    table.to_json(path.with_suffix(".jsonl"), orient="records", lines=True)
    table.to_parquet(path.with_suffix(".parquet"))
    task = from_file(path.with_suffix(kind), label=column)
    assert [name.lower() for name in task.classes] == [name.lower() for name in classes]
    by_text = table.set_index("text")["label"]
    assert [by_text[text] == "pos" for text in task.texts] == list(task.labels == 1)


@pytest.mark.parametrize(("rows", "told"), [("", "holds no values"), ("one,x\ntwo,x\n", "holds only the value 'x'")])
def test_a_column_without_two_classes_is_told(tmp_path, rows, told):
    (tmp_path / "t.csv").write_text("text,label\n" + rows)
    with pytest.raises(InputError, match=f"{told}, expected two classes"):
        from_file(tmp_path / "t.csv")


def test_one_class_against_the_rest(path, table):
    task = from_file(path, label="stars", positive=4)
    by_text = table.set_index("text")["stars"]
    assert [by_text[text] == 4 for text in task.texts] == list(task.labels == 1)
    assert task.classes == ("not 4", "4")
    assert same(task, from_file(path, label="stars", positive="4"))
    assert from_file(path, positive="neg").classes == ("pos", "neg")
    with pytest.raises(InputError, match=r"holds 5 values \(1, 2, 3, 4, 5\), expected two: choose one as positive"):
        from_file(path, label="stars")
    with pytest.raises(InputError, match="expected the positive value '6'"):
        from_file(path, label="stars", positive=6)


def test_the_random_split_is_stratified_seeded_and_of_the_share_asked_for(path, table):
    task = from_file(path, test_share=0.3)
    train, test = part_texts(task)
    want_train, want_test = train_test_split(table, test_size=0.3, stratify=table["label"], random_state=0)
    assert abs(len(test) - len(want_test)) <= 1
    by_text = table.set_index("text")["label"]
    for texts, want in ((train, want_train), (test, want_test)):
        assert abs(sum(by_text[text] == "pos" for text in texts) - (want["label"] == "pos").sum()) <= 1
    assert train != sorted(train, key=list(table["text"]).index)  # folds are cut in this order
    assert same(task, from_file(path, test_share=0.3))
    assert set(test) != set(part_texts(from_file(path, test_share=0.3, seed=1))[1])


@pytest.mark.parametrize("seed", range(3))
def test_groups_are_never_parted(path, table, seed):
    task = from_file(path, group="author", seed=seed)
    author = table.set_index("text")["author"]
    for split in tasks.SPLITS:
        train, test = ({author[text] for text in texts} for texts in part_texts(task, split))
        assert train
        assert not train & test
        rows = task.splits[split].train
        for kept, held in tasks.folds(task.labels[rows], task.fold_groups(split)[rows]):
            assert not {author[task.texts[i]] for i in rows[kept]} & {author[task.texts[i]] for i in rows[held]}
    assert len(part_texts(task)[1]) == pytest.approx(N / 4, abs=N / 10)
    # A validation set cut off the end of the train rows shares one group with the rest at most.
    train = [author[text] for text in part_texts(task)[0]]
    assert len(set(train[:-30]) & set(train[-30:])) <= 1


def test_equal_texts_are_a_group_by_default(path, table):
    twice = pd.concat([table, table.assign(text=" " + table["text"])])
    twice.to_csv(path, index=False)
    task = from_file(path)
    train, test = ({text.strip() for text in texts} for texts in part_texts(task))
    assert len(train) + len(test) == N
    assert not train & test
    assert [len(rows) for rows in task.splits["dedup"]] == [len(train), len(test)]
    rows = task.splits["official"].train
    for kept, held in tasks.folds(task.labels[rows], task.fold_groups("official")[rows]):
        assert not {task.texts[i].strip() for i in rows[kept]} & {task.texts[i].strip() for i in rows[held]}


def test_a_split_column_is_the_official_split(path, table):
    task = from_file(path, split="part", group="author")
    for name, texts in zip(("train", "test"), part_texts(task), strict=True):
        assert sorted(texts) == sorted(table["text"][table["part"] == name])
    author = table.set_index("text")["author"]
    train, test = ({author[text] for text in texts} for texts in part_texts(task, "dedup"))
    assert not train & test


def test_caps_take_half_of_each_class_where_there_are_enough(path, table):
    task = from_file(path, max_train=40, max_test=21)
    train, test = task.splits["official"]
    assert [len(train), len(test)] == [40, 21]
    assert task.labels[train].sum() == 20
    assert task.labels[test].sum() in (10, 11)
    whole = part_texts(from_file(path))
    for texts, all_texts in zip(part_texts(task), whole, strict=True):
        assert [text for text in all_texts if text in set(texts)] == texts
    all_but_few = from_file(path, max_train=140)
    assert len(all_but_few.splits["official"].train) == 140
    n_pos = from_file(path).labels[from_file(path).splits["official"].train].sum()
    assert all_but_few.labels[all_but_few.splits["official"].train].sum() == n_pos  # fewer than 70


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"text": "body"}, "no text in 'body', found text, label"),
        ({}, {"label": "klass"}, "no column 'klass', found text, label"),
        ({}, {"group": "writer"}, "no column 'writer'"),
        ({"text": "  "}, {}, "row 4 has nothing in 'text'"),
        ({"text": None}, {}, "row 4 has nothing in 'text'"),
        ({"label": None}, {}, "row 4 has nothing in 'label'"),
        ({"part": "dev"}, {"split": "part"}, "row 4: expected the split train or test, got 'dev'"),
        ({"author": None}, {"group": "author"}, "row 4 has nothing in 'author'"),
        ({"label": "neutral"}, {}, r"holds 3 values \(neg, neutral, pos\)"),
        ({}, {"test_share": 1}, "test_share must lie between 0 and 1"),
        ({}, {"max_train": 8}, "needs 5 train rows of each class, got 4 of 'neg' and 4 of 'pos'"),
        ({}, {"max_test": 3}, "needs 2 test rows of each class"),
        ({}, {"name": "../x"}, "a task's name must be of letters"),
        ({}, {"name": ".hidden"}, "a task's name must be of letters"),
        ({}, {"name": "162_agnews_1"}, "is a task of sae-probes"),
    ],
)
@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".parquet"])
def test_what_makes_no_task_is_one_line(path, table, kind, change, options, message):
    table = table.astype(object)
    for column, value in change.items():
        table.loc[3, column] = value
    path = path.with_suffix(kind)
    if kind == ".csv":
        table.to_csv(path, index=False)
    elif kind == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_dict("records")))
    else:
        table.to_parquet(path)
    with pytest.raises(InputError, match=message) as caught:
        from_file(path, **options)
    assert "\n" not in str(caught.value)


def test_a_nan_in_jsonl_is_a_missing_label_and_a_number_is_no_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": NaN}\n')
    with pytest.raises(InputError, match="row 1 has nothing in 'label'"):
        from_file(path)
    path.write_text('{"text": 5, "label": 1}\n')
    with pytest.raises(InputError, match="row 1: expected text in 'text', got '5'"):
        from_file(path)
    path.write_text("")
    with pytest.raises(InputError, match="holds no values"):
        from_file(path)
    with pytest.raises(InputError, match=r"expected a file of kind .csv"):
        from_file(tmp_path / "none.csv")


def labelled(folder, *values, kind=".jsonl"):
    """A file of texts whose labels are these values in turn."""
    rows = [{"text": f"text {i}", "label": values[i % len(values)]} for i in range(80)]
    path = folder / f"own{kind}"
    if kind == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    else:
        pd.DataFrame(rows).to_csv(path, index=False, sep="\t" if kind.lower() == ".tsv" else ",")
    return path


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("value", "told"), [([0, 1], r"\[0, 1\] of type list"), ({"name": "a"}, "{'name': 'a'} of type dict")]
)
def test_lists_and_objects_are_no_classes(tmp_path, kind, value, told):
    with pytest.raises(InputError, match=f"own{kind}, row 1: expected one class in 'label', got {told}: write one"):
        from_file(labelled(tmp_path, value, kind=kind))


@pytest.mark.parametrize(
    ("low", "high"),
    [
        ("9", "10"),
        ("-inf", "inf"),
        ("0.5", "1E5"),
        ("01", "1"),
        ("100000", "1E5"),
        ("9007199254740992", "9007199254740993"),
        ("1", "nan"),
        ("NaN", "nan"),
        ("NA", "None"),
        ("Yes", "yes"),
        ("null", "true"),
        ("1000", "1_000"),
    ],
)
@pytest.mark.parametrize("kind", [".jsonl", ".parquet", ".csv", ".TSV"])
def test_two_spellings_are_two_classes_in_any_order_of_rows(tmp_path, low, high, kind):
    for values in ((low, high), (high, low)):
        task = from_file(labelled(tmp_path, *values, kind=kind))
        assert task.classes == (low, high)
        for text, label in zip(task.texts, task.labels, strict=True):
            assert values[int(text.split()[1]) % 2] == task.classes[label]
        flipped = from_file(labelled(tmp_path, *values, kind=kind), positive=low)
        assert flipped.classes == (high, low)
        assert flipped.labels.sum() == 40


def test_whole_numbers_that_floats_cannot_tell_apart_are_two_classes(tmp_path):
    task = from_file(labelled(tmp_path, 2**53 + 1, 2**53))
    assert task.classes == (str(2**53), str(2**53 + 1))
    assert task.labels.sum() == 40


def test_a_positive_number_may_be_written_otherwise(tmp_path):
    path = labelled(tmp_path, "0.0", "1.0", "2.0")
    assert from_file(path, positive="1").classes == ("not 1.0", "1.0")
    assert from_file(path, positive=2).labels.sum() == 26
    path = labelled(tmp_path, "1", "01", "2")
    assert from_file(path, positive="01").labels.sum() == 27
    with pytest.raises(InputError, match="expected the positive value '1.0' among them"):
        from_file(path, positive="1.0")


def test_spellings_that_only_white_space_tells_apart_are_refused(tmp_path):
    with pytest.raises(InputError, match="holds 'yes' and 'yes ', which differ in white space alone: write them alike"):
        from_file(labelled(tmp_path, "no", "yes", "yes "))
    assert from_file(labelled(tmp_path, " no", " yes")).classes == ("no", "yes")


def test_scores_are_no_classes(tmp_path):
    with pytest.raises(InputError, match=r"holds 80 values \(0, 0.0125, 0.025, .*\), expected two: choose one"):
        from_file(labelled(tmp_path, *(i / 80 for i in range(80))))


def test_a_csv_row_with_an_unquoted_comma_is_named(path):
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], "Well, yes," + lines[3], *lines[4:]]))
    with pytest.raises(InputError, match="reviews.csv, line 4: expected as many fields as the header has, 7, got 9"):
        from_file(path)


def test_groups_that_are_too_few_for_folds(path, table):
    table.assign(author=np.arange(N) % 5).to_csv(path, index=False)
    with pytest.raises(InputError, match="task 'reviews': 5 folds with both classes in each"):
        from_file(path, group="author")


def test_tasks_by_name_and_by_file(path, table):
    found = open_tasks(["162_agnews_1", "16[23]_*", str(path), f"mine={path}"], max_train=51, max_test=24)
    assert [task.name for task in found] == ["162_agnews_1", "163_agnews_2", "reviews", "mine"]
    for task in found:
        assert [len(rows) for rows in task.splits["official"]] == [51, 24]
    assert same(found[2], found[3])
    (stars,) = open_tasks(str(path), label="stars", positive="4", group="author")
    assert stars.classes == ("not 4", "4")
    assert stars.own_groups
    table.to_csv(path.with_suffix(".TSV"), index=False, sep="\t")
    assert same(found[2], open_tasks(str(path.with_suffix(".TSV")), max_train=51, max_test=24)[0])
    with pytest.raises(InputError, match="did you mean '162_agnews_1'"):
        open_tasks("162_agnew_1")
    with pytest.raises(InputError, match="two tasks have the name 'reviews'"):
        open_tasks([str(path), f"reviews={path}"])
    assert len(tasks.names("all")) == 113


def test_tasks_by_default(monkeypatch):
    found = open_tasks(max_train=10, max_test=10)
    assert [task.name for task in found] == list(tasks.DEFAULT_TASKS)


ROWS, WIDTH = 1709, 7


def make_store(folder, seed=0, **columns):
    rng = np.random.default_rng(seed)
    given = {
        "doc_id": np.uint64(2**63) + np.arange(ROWS, dtype=np.uint64) // 19,
        "position": np.arange(ROWS) % 19 + 1,
        "token_id": rng.integers(0, 40, ROWS),
        "is_name": rng.choice([-1, 0, 1], ROWS, p=[0.2, 0.7, 0.1]),
        "topic": rng.choice(np.array([0, 1, 2, np.nan], np.float32), ROWS),
        **columns,
    }
    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed))
    source = {"model": {"name": "m"}, "weights": "w", "settings": {"context": 64}}
    labels = {"is_name": "int64", "topic": "float32"}
    return write_store(
        folder / "s", x, hook="blocks.2.hook_resid_post", columns=given, labels=labels, source=source, shard_rows=500
    )


def places(task):
    """Documents and positions `(n, 2)` of a task's texts."""
    words = [text.replace(",", "").split() for text in task.texts]
    assert {(document, position) for document, _, position, _ in words} == {("document", "position")}
    return np.array([[int(document), int(position)] for _, document, _, position in words], dtype=object)


@pytest.mark.parametrize("seed", range(3))
def test_a_labelled_store_is_a_task_of_tokens_whose_documents_are_never_parted(tmp_path, seed):
    store = make_store(tmp_path, seed)
    task, activations = from_store(store, "is_name", max_train=301, max_test=97, seed=seed)
    found = places(task)
    rows = (found[:, 0] - 2**63).astype(int) * 19 + found[:, 1].astype(int) - 1
    assert len(set(rows)) == len(rows) == 398
    np.testing.assert_array_equal(task.labels, store.column("is_name")[rows])
    acts, text = activations.rows("is_name")
    assert torch.equal(acts, store.take(rows))
    np.testing.assert_array_equal(text, np.arange(398))
    for split in tasks.SPLITS:
        train, test = task.splits[split]
        assert [len(train), len(test)] == [301, 97]
        assert not set(found[train, 0]) & set(found[test, 0])
        for kept, held in tasks.folds(task.labels[train], task.fold_groups(split)[train]):
            assert not set(found[train[kept], 0]) & set(found[train[held], 0])
    assert task.classes == ("0", "1")
    have = (store.column("is_name") == 1).sum()
    assert task.labels.sum() > min(0.9 * have, 170)  # the rarer class is kept


def test_where_the_rows_of_a_store_come_from(tmp_path):
    store = make_store(tmp_path)
    _, activations = from_store(store, "is_name")
    source = activations.source
    assert source["model"] == {"name": "m"}
    assert (source["weights"], source["context"], source["pooling"]) == ("w", 64, "all")
    assert source["hook"] == "blocks.2.hook_resid_post"
    assert source["hooks"] == [source["hook"]]
    assert source["manifest_hash"] == store.fingerprint


def test_a_column_of_several_values_needs_the_positive_one(tmp_path):
    store = make_store(tmp_path)
    with pytest.raises(InputError, match=r"column 'topic' .* holds 3 values \(0, 1, 2\), expected two"):
        from_store(store, "topic")
    task, _ = from_store(store, "topic", positive=2, name="topic 2", max_train=2000, max_test=2000)
    assert (task.name, task.classes) == ("topic 2", ("not 2", "2"))
    topic = store.column("topic")
    assert len(task.labels) == (~np.isnan(topic)).sum()  # none is left out but those without a label
    assert task.labels.sum() == (topic == 2).sum()
    tokens, _ = from_store(store, "token_id", positive=7)
    rows = places(tokens)
    rows = (rows[:, 0] - 2**63).astype(int) * 19 + rows[:, 1].astype(int) - 1
    np.testing.assert_array_equal(tokens.labels == 1, store.column("token_id")[rows] == 7)


def test_rows_without_positions_are_not_taken_for_repeats(tmp_path):
    store = make_store(tmp_path, position=np.zeros(ROWS))
    task, _ = from_store(store, "is_name", max_train=300, max_test=100)
    assert [len(rows) for rows in task.splits["dedup"]] == [300, 100]
    assert len(set(task.texts)) == 400


def test_a_store_that_makes_no_task_is_one_line(tmp_path):
    store = make_store(tmp_path, is_name=np.full(ROWS, -1))
    with pytest.raises(InputError, match="holds no values"):
        from_store(store, "is_name")
    with pytest.raises(InputError, match="no column 'other'"):
        from_store(store, "other")
    few = make_store(tmp_path / "few", is_name=(np.arange(ROWS) < 19).astype(int))
    with pytest.raises(InputError, match="needs"):
        from_store(few, "is_name")


def test_groups_are_told_apart_as_people_write_them(tmp_path):
    rows = [{"text": f"text {i}", "label": i % 2, "group": [3, 3.0, "3 "][i % 3] if i < 30 else i} for i in range(60)]
    path = tmp_path / "groups.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    task = from_file(path, group="group")
    assert len(set(np.asarray(task.groups)[[t.startswith("text ") and int(t[5:]) < 30 for t in task.texts]])) == 1
    path.write_text("\n".join(json.dumps({**row, "group": [1]}) for row in rows))
    with pytest.raises(InputError, match="expected one value in 'group'"):
        from_file(path, group="group")
