"""Names, families, labels and splits of the probing tasks, against the data themselves."""

from itertools import combinations

import numpy as np
import pytest
from sklearn.preprocessing import LabelEncoder

from glp_lens import corpus
from glp_lens.errors import InputError
from glp_lens.evals.probing import tasks


def test_patterns():
    assert len(tasks.names("*")) == 113
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


def test_families_join_all_tasks_that_share_over_one_percent_of_prompts():
    prompts = {name: set(corpus.read_dataset(name)["prompt"].astype(str)) for name in tasks.all_names()}
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


def test_build_refuses_other_labels():
    with pytest.raises(InputError, match="label 0 or 1"):
        tasks.build("t", ["a", "b"], [0, 2], [0], [1])
