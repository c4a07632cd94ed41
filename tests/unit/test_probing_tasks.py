"""Names, families, labels and splits of the probing tasks, against the data themselves."""

from itertools import combinations

import numpy as np
import pytest
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import LabelEncoder

from glp_lens import corpus
from glp_lens.errors import InputError
from glp_lens.evals.probing import tasks


@pytest.fixture(scope="module")
def everything():
    """All 113 tasks; their texts are all prompts of the data sets but one."""
    return [tasks.load(name) for name in tasks.all_names()]


def test_patterns():
    assert len(tasks.names("*")) == 113
    assert tasks.names("all") == tasks.names("*")
    assert tasks.names(["162_agnews_1", "*agnews*"]) == ["162_agnews_1", "161_agnews_0", "163_agnews_2"]
    assert tasks.names() == list(tasks.DEFAULT_TASKS)
    with pytest.raises(InputError, match="did you mean '162_agnews_1'"):
        tasks.names("162_agnew_1")
    with pytest.raises(InputError, match="one task name"):
        tasks.load("*agnews*")


def test_default_tasks_exist_one_a_family():
    assert set(tasks.DEFAULT_TASKS) <= set(tasks.all_names())
    families = [tasks.family(name) for name in tasks.DEFAULT_TASKS]
    assert len(set(families)) == len(families) >= 12


def test_families_join_all_tasks_that_share_over_one_percent_of_prompts(everything):
    prompts = {task.name: set(task.texts) for task in everything}
    apart = [
        (a, b)
        for a, b in combinations(prompts, 2)
        if tasks.family(a) != tasks.family(b)
        and len(prompts[a] & prompts[b]) > 0.01 * min(len(prompts[a]), len(prompts[b]))
    ]
    assert not apart


@pytest.mark.parametrize("name", ["105_click_bait", "23_headline_ischina", "130_temp_cat_Frequency"])
def test_load_gives_the_first_rows_of_the_official_split(name):
    table = corpus.read_dataset(name)
    encoder = LabelEncoder()
    labels = encoder.fit_transform(table["target"].to_numpy())
    train, test = corpus.official_split(labels)
    task = tasks.load(name, max_train=61, max_test=37)
    rows = np.r_[train[:61], test[:37]]
    assert list(task.texts) == table["prompt"].iloc[rows].tolist()
    np.testing.assert_array_equal(task.labels, labels[rows])
    assert task.classes == tuple(str(value) for value in encoder.classes_)
    assert [len(part) for part in task.splits["official"]] == [61, 37]


def test_dedup_leaves_no_text_twice_and_none_with_both_labels():
    task = tasks.load("130_temp_cat_Frequency")
    table = corpus.read_dataset("130_temp_cat_Frequency")
    kept = [i for part in task.splits["dedup"] for i in part]
    texts = [task.texts[i].strip() for i in kept]
    assert len(set(texts)) == len(texts)
    both = table.groupby(table["prompt"].str.strip())["target"].nunique()
    assert not set(texts) & set(both.index[both > 1])
    assert len(task.splits["dedup"].test) < len(task.splits["official"].test)


def test_dedup_by_hand():
    texts = ["a", "b", "c", "c", "d", "a ", "e", "f", "e"]
    labels = [0, 1, 0, 1, 1, 0, 1, 0, 1]
    task = tasks.build("t", texts, labels, train=[1, 0, 2, 8], test=[5, 4, 6, 7])
    assert task.texts == ("b", "a", "c", "e", "a ", "d", "e", "f")
    np.testing.assert_array_equal(task.labels, [1, 0, 0, 1, 0, 1, 1, 0])
    np.testing.assert_array_equal(task.splits["dedup"].train, [0, 1, 3])  # c has both labels
    np.testing.assert_array_equal(task.splits["dedup"].test, [5, 7])  # a and e stand in train


def test_misnamed_tasks_are_the_ag_news_classes_that_the_table_says():
    def positives(name):
        table = corpus.read_dataset(name)
        return set(table["prompt"][table["target"] == 1])

    world, sports, business = (positives(name) for name in ("161_agnews_0", "162_agnews_1", "163_agnews_2"))
    for name, said, own in (
        ("139_news_class_Politics", "world", world),
        ("140_news_class_Technology", "business", business),
        ("141_news_class_Entertainment", "science and technology", None),  # no task has this class alone
    ):
        assert said in tasks.load(name).note
        texts = positives(name)
        for others in (world, sports, business):
            assert (len(texts & others) > 50) == (others is own)


def test_notes_of_other_tasks():
    assert "not_bigram" in tasks.load("67_social-security").note
    assert tasks.load("67_social-security").classes[1] == "not_bigram"
    assert tasks.load("105_click_bait").note == ""


def test_repeats_between_train_and_test_of_all_113_and_what_dedup_leaves(everything):
    shares = []
    for task in everything:
        train, test = task.splits["official"]
        texts = [text.strip() for text in task.texts]
        assert len(set(zip(texts, task.groups, strict=True))) == len(set(texts)) == len(set(task.groups))
        shares.append(np.isin(task.groups[test], task.groups[train]).mean())
        train, test = task.splits["dedup"]
        kept = np.r_[train, test]
        assert len(set(task.groups[kept])) == len(kept)
    assert np.mean(shares) == pytest.approx(0.186, abs=0.002)  # found independently of this code
    assert np.sum(np.array(shares) > 0.25) == 24


def random_rows(seed, n=173, n_groups=61):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 2, n), rng.integers(0, n_groups, n), [f"text {i}" for i in rng.integers(0, 120, n)]


@pytest.mark.parametrize("seed", range(4))
def test_own_groups_stand_on_one_side_of_dedup(seed):
    labels, groups, texts = random_rows(seed)
    rows = np.random.default_rng(seed).permutation(len(texts))[:151]
    task = tasks.build("t", texts, labels, rows[:103], rows[103:], groups=groups)
    both = {text for text in texts if len({y for t, y in zip(texts, labels, strict=True) if t == text}) == 2}
    train, test = [], []
    for part, row_numbers in ((train, rows[:103]), (test, rows[103:])):
        for row in row_numbers:
            free = texts[row] not in both and texts[row] not in {texts[i] for i in train + part}
            if free and (part is train or groups[row] not in {groups[i] for i in rows[:103] if texts[i] not in both}):
                part.append(row)
    assert len(train) > 20
    assert len(test) > 2
    np.testing.assert_array_equal(rows[task.splits["dedup"].train], train)
    np.testing.assert_array_equal(rows[task.splits["dedup"].test], test)
    same = groups[rows][:, None] == groups[rows]
    np.testing.assert_array_equal(task.groups[:, None] == task.groups, same)
    assert task.fold_groups("official") is task.groups


@pytest.mark.parametrize("seed", range(4))
def test_folds_never_part_a_group_and_are_stratified(seed):
    labels, groups, _ = random_rows(seed)
    found = tasks.folds(labels, groups)
    assert sorted(np.concatenate([validation for _, validation in found])) == list(range(173))
    for train, validation in found:
        assert not set(groups[train]) & set(groups[validation])
        assert len(train) + len(validation) == 173
        assert labels[validation].mean() == pytest.approx(labels.mean(), abs=0.06)
        assert len(validation) == pytest.approx(173 / 5, abs=8)


def test_folds_without_repeated_groups_are_those_of_the_paper():
    labels, _, _ = random_rows(7)
    expected = list(StratifiedKFold(5).split(labels, labels))
    for groups in (None, np.arange(173)[::-1]):
        for fold, wanted in zip(tasks.folds(labels, groups), expected, strict=True):
            np.testing.assert_array_equal(fold[0], wanted[0])
            np.testing.assert_array_equal(fold[1], wanted[1])


def test_official_folds_of_sae_probes_tasks_are_not_grouped_and_those_of_dedup_are():
    task = tasks.load("130_temp_cat_Frequency")
    assert task.fold_groups("official") is None
    train = task.splits["dedup"].train
    groups = task.fold_groups("dedup")[train]
    plain = StratifiedKFold(5).split(train, task.labels[train])  # dedup has no text twice
    for fold, wanted in zip(tasks.folds(task.labels[train], groups), plain, strict=True):
        np.testing.assert_array_equal(fold[1], wanted[1])


@pytest.mark.parametrize(
    ("labels", "groups", "message"),
    [
        ([0, 1] * 4, None, "cannot be made of 4 and 4 rows"),
        ([0] * 20, None, "of 20 and 0 rows"),
        ([0, 1] * 20, [0, 1] * 20, "of 1 and 1 groups"),
        ([0] * 30 + [1] * 12, [*range(30), *[30, 31, 32, 33] * 3], "of 30 and 4 groups"),
    ],
)
def test_folds_need_both_classes_in_each(labels, groups, message):
    with pytest.raises(InputError, match=message):
        tasks.folds(np.array(labels), groups)


def test_build_refuses_other_labels():
    with pytest.raises(InputError, match="label 0 or 1"):
        tasks.build("t", ["a", "b"], [0, 2], [0], [1])
    with pytest.raises(InputError, match="a group for each of 2 texts"):
        tasks.build("t", ["a", "b"], [0, 1], [0], [1], groups=[1])
