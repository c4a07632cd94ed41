import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from glp_lens.errors import InputError
from glp_lens.evals.cache import ResultCache
from glp_lens.evals.steering import checks, fluency
from glp_lens.evals.steering.fluency import distinct_2, distinct_characters, human_continuations, make_judge
from glp_lens.evals.steering.ngrams import NGramModel, NGramScorer
from glp_lens.evals.steering.second_model import SecondModel
from glp_lens.intervals import Interval

LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Letters:
    """A tokenizer of words in alphabetical order by their first letter, and of digits and marks as one more word."""

    vocab = 27

    def tokenize(self, texts):
        return [[LETTERS.find(word[0]) % 27 for word in text.split()] for text in texts]


def alphabet_texts(n, length, seed):
    """A language with an order: mostly the next letter, sometimes a jump; its words differ in spelling."""
    rng = np.random.default_rng(seed)
    texts = []
    for _ in range(n):
        steps = np.where(rng.random(length) < 0.8, 1, rng.integers(1, 26, length))
        first = rng.integers(26) + np.cumsum(steps)
        texts.append(" ".join(LETTERS[i % 26] + "".join(rng.choice(list(LETTERS), 3)) for i in first))
    return texts


PROMPTS = ["abc bcd cde"] * 9
UNSTEERED = [" " + text for text in alphabet_texts(9, 20, 1)]
TEXTS = alphabet_texts(500, 40, 0)


@pytest.fixture(scope="module")
def judge():
    return make_judge(PROMPTS, UNSTEERED, embedder=Letters(), kind="ngram", texts=TEXTS)


def test_distinct_2():
    assert distinct_2([1, 2, 3, 4]) == 1
    assert distinct_2([1, 2, 1, 2, 1]) == pytest.approx(2 / 4)
    assert math.isnan(distinct_2([1]))


def test_distinct_characters_see_runs_that_word_pieces_hide():
    assert distinct_characters("abcdefg") == 1
    assert distinct_characters(" 100000000000 ") == pytest.approx(2 / 9)  # 1000 and 0000, of nine
    assert distinct_characters("ABCDabcd") == pytest.approx(4 / 5)  # ABCD comes again, whatever the case
    assert math.isnan(distinct_characters("  abc  "))


def test_fluency_falls_with_disorder_with_loops_and_with_runs_of_digits(judge):
    good = alphabet_texts(40, 20, 3)
    half = [" ".join([*text.split()[:10], *checks.shuffle_words([text])[0].split()[10:]]) for text in good]
    bad = [half, checks.shuffle_words(good), checks.loops(good), checks.number_runs(good)]
    means = [judge.measure(["x y z"] * len(t), t)["fluency"].mean() for t in (good, *bad)]
    assert means[0] > 1.5
    assert means[0] > means[1] > means[2]
    assert max(means[2:4]) < 0.4
    assert means[4] < 0.6 * means[0]  # of which one half is as good as before


def test_the_gate_needs_both_shares(judge):
    """A run of digits in a text whose word pieces are all different costs fluency, and so do words that come again."""
    words = [letter + letter.upper() + "xyz"[i % 3] + str(i) for i, letter in enumerate(LETTERS[:20])]
    run = " ".join([*words[:19], words[19][0] + "0" * 60])
    scores = judge.measure(["x y z"] * 2, [" ".join(words), run])
    assert scores["distinct_2"].tolist() == [1, 1]
    assert scores["fluency"][0] == 2
    assert scores["fluency"][1] < 1.6


def test_fluency_lies_between_0_and_2_and_an_empty_text_has_none(judge):
    scores = judge.measure(["a b c"] * 3, ["da eb fc gd he if jg kh", "", "7"])
    assert scores["fluency"].tolist() == [2, 0, 0]
    assert math.isnan(scores["distinct_2"][1])
    assert set(scores) == {"fluency", "nll_ngram", "slor", "distinct_2", "distinct_characters"}


def test_a_judge_comes_with_its_checks_and_their_intervals(judge):
    assert set(judge.checks) == {"shuffled", "loops", "number_runs", "spliced"}
    for name in ("shuffled", "loops", "number_runs"):
        assert judge.checks[name].value > 0.95
    for found in judge.checks.values():
        assert found.ci_low <= found.value <= found.ci_high
        assert found.n == 250


def test_the_scale_is_that_of_the_generations(judge):
    """Unsteered text has about full fluency in the median, the same text shuffled about none."""
    own = judge.measure(PROMPTS, UNSTEERED)
    shuffled = judge.measure(PROMPTS, checks.shuffle_words(UNSTEERED))
    assert np.median(own["slor"]) == pytest.approx(judge.scale.full)
    assert np.median(shuffled["slor"]) == pytest.approx(judge.scale.zero)


def test_continuations_of_human_text_are_as_long_as_the_generations():
    pairs = human_continuations(
        alphabet_texts(30, 50, 0), ["a b", "a b c", "a b c d"], ["x " * 11, "x " * 13, "x " * 90]
    )
    assert {(len(prompt.split()), len(text.split())) for prompt, text in pairs} == {(3, 13)}
    assert all(text.startswith(" ") for _, text in pairs)
    with pytest.raises(InputError, match="of at least 16 words, got 0 in 30"):
        human_continuations(alphabet_texts(30, 15, 0), ["a b c"], ["x " * 13])


def test_a_language_without_order_has_no_scale():
    scorer = NGramScorer(NGramModel(Letters().tokenize(TEXTS), 27), Letters().tokenize)
    with pytest.raises(InputError, match="no likelier than shuffled"):
        fluency.calibrate(scorer, Letters().tokenize, ["a b"] * 4, ["a a a a a a"] * 4, [("a b", " c d e f")])


def test_a_judge_that_cannot_tell_bad_text_is_refused():
    rng = np.random.default_rng(0)
    random = [" ".join(rng.choice(list(LETTERS), 40)) for _ in range(300)]
    with pytest.raises(InputError, match=r"cannot tell human text .*shuffled, expected 0\.85"):
        make_judge(PROMPTS, UNSTEERED, embedder=Letters(), kind="ngram", texts=[*TEXTS, *random])


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("lm", {}, ""),
        ("lm", {"spliced": 0.7}, "AUROC 0.70 against spliced, expected 0.75"),
        ("lm", {"number_runs": 0.89}, "AUROC 0.89 against number runs, expected 0.90"),
        ("ngram", {"spliced": 0.5, "shuffled": 0.87}, ""),
        ("ngram", {"shuffled": 0.84}, "AUROC 0.84 against shuffled, expected 0.85"),
    ],
)
def test_a_language_model_must_tell_more_than_a_trigram_model(judge, name, changes, reason):
    values = {"shuffled": 0.95, "loops": 0.95, "number_runs": 0.95, "spliced": 0.8, **changes}
    found = {kind: Interval(value, value, value, 9) for kind, value in values.items()}
    assert replace(judge, scorer=SimpleNamespace(name=name), checks=found).failed() == reason


def test_auto_takes_the_trigram_model_where_no_second_model_may_judge_and_says_so(monkeypatch):
    def none(*args, **options):
        raise InputError("no second language model is installed")

    monkeypatch.setattr(SecondModel, "open", none)
    judge = make_judge(PROMPTS, UNSTEERED, embedder=Letters(), texts=TEXTS)
    assert (judge.name, judge.note) == (
        "ngram", "fluency is judged by a trigram model: no second language model is installed",
    )  # fmt: skip
    for options in ({"kind": "lm"}, {"model": "named"}):
        with pytest.raises(InputError, match="no second language model"):
            make_judge(PROMPTS, UNSTEERED, embedder=Letters(), texts=TEXTS, **options)
    with pytest.raises(InputError, match="must be auto, lm or ngram, got 'gpt'"):
        make_judge(PROMPTS, UNSTEERED, embedder=Letters(), texts=TEXTS, kind="gpt")


def test_scale_and_checks_are_kept_under_everything_they_depend_on(tmp_path, judge, monkeypatch):
    def make(**options):
        given = {"prompts": PROMPTS, "unsteered": UNSTEERED, "texts": TEXTS, **options}
        return make_judge(embedder=Letters(), kind="ngram", cache=ResultCache(tmp_path), **given)

    first, measured = make(), []
    assert (first.scale, first.checks) == (judge.scale, judge.checks)
    monkeypatch.setattr(fluency, "calibrate", lambda *args: measured.append(1) or judge.scale)
    assert (make().scale, make().checks, measured) == (judge.scale, judge.checks, [])
    others = [make(unsteered=UNSTEERED[::-1]), make(seed=1), make(texts=TEXTS[1:])]
    assert len(measured) == len(others)
    assert len({str(each.identity()) for each in (first, *others)}) == 4
