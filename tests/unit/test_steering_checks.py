import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from glp_lens.errors import InputError
from glp_lens.evals.steering import checks

TEXT = " the quick brown fox jumps over the lazy dog and runs home to its den in the old wood"


def test_auroc_is_that_of_scikit_learn_with_ties():
    rng = np.random.default_rng(0)
    good, bad = rng.integers(2, 9, 41), rng.integers(0, 7, 29)
    want = roc_auc_score([1] * 41 + [0] * 29, [*good, *bad])
    assert checks.auroc(good, bad).value == pytest.approx(want)
    assert checks.auroc(good, bad).n == 41


@pytest.mark.parametrize(("paired", "truth"), [(False, 0.76025), (True, 0.69146)])
def test_the_interval_covers_the_truth_about_as_often_as_it_says(paired, truth):
    """Normal scores one apart, of deviation 1, or the root of 2 where a text and its bad version share a half of it."""
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(120):
        good, bad = 1 + rng.normal(size=60), rng.normal(size=60)
        if paired:
            shared = rng.normal(size=60)
            good, bad = good + shared, bad + shared
        found = checks.auroc(good, bad, paired=paired, resamples=200)
        hits += found.ci_low <= truth <= found.ci_high
    assert 0.88 < hits / 120 < 0.99


def test_scores_without_a_number_are_left_out_with_their_pair():
    pairs = checks.auroc([2.0, np.nan, 3.0], [1.0, 9.0, 1.0], paired=True)
    assert pairs == checks.auroc([2.0, 3.0], [1.0, 1.0], paired=True)
    assert checks.auroc([2.0, np.nan, 3.0], [1.0, 9.0, 1.0]).value == pytest.approx(4 / 6)  # 9 has no partner
    with pytest.raises(InputError, match="as many good texts as bad ones, got 2 and 1"):
        checks.auroc([2.0, 3.0], [1.0], paired=True)
    assert checks.auroc([2.0, np.nan, 3.0, 4.0], [1.0, 2.5]).value == pytest.approx(5 / 6)
    with pytest.raises(InputError, match="got 0 good and 1 bad"):
        checks.auroc([np.nan, np.nan], [1.0])


def test_bad_texts_keep_the_length_and_the_space_before_them():
    others = [" one two three four five six seven eight nine ten eleven twelve thirteen"]
    made = [checks.shuffle_words([TEXT]), checks.loops([TEXT]), checks.spliced([TEXT], others)]
    for (text,) in made:
        assert text[0] == " "
        assert text != TEXT
        assert len(text.split()) == len(TEXT.split())
    assert sorted(made[0][0].split()) == sorted(TEXT.split())
    assert set(made[1][0].split()) == {"the", "quick", "brown"}
    for (text,) in (checks.shuffle_words([TEXT[1:]]), checks.loops([TEXT[1:]])):
        assert text[0] != " "


def test_spliced_texts_are_stretches_of_six_to_eight_words_of_two_texts():
    texts = [" " + " ".join(f"a{i}" for i in range(40))] * 30
    others = [" " + " ".join(f"b{i}" for i in range(40))] * 30
    lengths = set()
    for text in checks.spliced(texts, others):
        words = text.split()
        turns = [i for i in range(1, 40) if words[i][0] != words[i - 1][0]]
        lengths |= set(np.diff([0, *turns]).tolist())  # the last stretch is cut
        assert words[0] == "a0"
        assert [int(word[1:]) for word in words] == list(range(40))
    assert lengths == {6, 7, 8}


def test_runs_take_the_place_of_the_second_half():
    made = checks.number_runs([TEXT] * 60)
    half = " ".join(TEXT.split()[:9])
    kinds = set()
    for text in made:
        assert text.startswith(f" {half} ")
        assert abs(len(text) - len(TEXT)) <= 1
        run = text.removeprefix(f" {half} ")
        kinds.add("digits" if run.isdigit() else "groups" if run[0].isdigit() else "marks")
        assert len(set(run)) <= 6
    assert kinds == {"digits", "groups", "marks"}


def test_a_judge_is_checked_on_the_same_texts_in_each_way():
    texts = [f"{TEXT} {i}" for i in range(30)]
    seen = []

    def score(prompts, texts):
        seen.append((prompts, texts))
        return [len(set(text.split())) for text in texts]  # knows loops, and nothing of order

    found = checks.check(score, ["It says:"] * 30, texts)
    assert list(found) == ["shuffled", "loops", "number_runs", "spliced"]
    assert found["loops"].value == 1
    assert found["shuffled"].value == 0.5
    assert len(seen) == 1
    assert len(seen[0][0]) == len(seen[0][1]) == 150
