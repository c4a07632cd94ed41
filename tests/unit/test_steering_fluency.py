import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from glp_lens.errors import InputError
from glp_lens.evals.steering.fluency import FluencyJudge, NGramModel, distinct_2, encode_corpus, shuffle_words

VOCAB = 7
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def sequences(n=60, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.geometric(0.4, size=rng.integers(2, 15)).clip(1, VOCAB - 1).tolist() for _ in range(n)]


def kneser_ney(data, order):
    """The textbook recursion over dictionaries, as an outside truth."""
    counts = {order: Counter(tuple(s[i : i + order]) for s in data for i in range(len(s) - order + 1))}
    for k in range(order - 1, 0, -1):
        counts[k] = Counter(gram[1:] for gram in counts[k + 1])
    discounts, after = {}, {}
    for k, table in counts.items():
        n1, n2 = (sum(c == r for c in table.values()) for r in (1, 2))
        discounts[k] = n1 / (n1 + 2 * n2) if n1 and n2 else 0.5
        after[k] = defaultdict(list)
        for gram, count in table.items():
            after[k][gram[:-1]].append(count)

    def probability(gram):
        k = len(gram)
        lower = probability(gram[1:]) if k > 1 else 1 / VOCAB
        followers = after[k].get(gram[:-1])
        if not followers:
            return lower
        kept = max(counts[k].get(gram, 0) - discounts[k], 0)
        return (kept + discounts[k] * len(followers) * lower) / sum(followers)

    return probability


@pytest.mark.parametrize("order", [1, 2, 3])
def test_ngram_probabilities_match_the_recursion(order):
    data = sequences()
    truth = kneser_ney([s for s in data if len(s) >= order], order)
    windows = np.random.default_rng(1).integers(0, VOCAB, size=(200, order))
    got = NGramModel(data, VOCAB, order).log_prob(windows)
    assert got == pytest.approx([math.log(truth(tuple(w.tolist()))) for w in windows], abs=1e-12)


def test_ngram_probabilities_sum_to_one_for_seen_and_unseen_contexts():
    model = NGramModel(sequences(), VOCAB, 3)
    for context in [(1, 1), (2, 1), (0, 0), (1, 0)]:
        p = np.exp(model.log_prob(np.array([[*context, w] for w in range(VOCAB)])))
        assert p.sum() == pytest.approx(1, abs=1e-12)
        assert (p > 0).all()


def test_losses_are_means_over_the_continuation_alone():
    model = NGramModel(sequences(), VOCAB, 3)
    nll, unigram = model.losses([[4, 1, 2], [1, 2], [5]], [[1, 3], [], [6]])
    windows = np.array([[1, 2, 1], [2, 1, 3]])
    assert nll[0] == pytest.approx(-model.log_prob(windows).mean())
    assert unigram[0] == pytest.approx(-model.log_frequency[[1, 3]].mean())
    assert np.isnan(nll[1:]).all()


def test_ngram_refuses_what_it_cannot_count():
    with pytest.raises(InputError, match="63 bits"):
        NGramModel([[1, 2, 3, 4]], 50_000, 5)
    with pytest.raises(InputError, match="at least 3 tokens"):
        NGramModel([[1, 2]], VOCAB, 3)


def test_distinct_2():
    assert distinct_2([1, 2, 3, 4]) == 1
    assert distinct_2([1, 2, 1, 2, 1]) == pytest.approx(2 / 4)
    assert math.isnan(distinct_2([1]))


def tokenize(texts):
    return [[LETTERS.index(word) for word in text.split()] for text in texts]


def alphabet_texts(n, length, seed):
    """A language with an order: mostly the next letter, sometimes a jump."""
    rng = np.random.default_rng(seed)
    texts = []
    for _ in range(n):
        steps = np.where(rng.random(length) < 0.8, 1, rng.integers(1, 26, length))
        texts.append(" ".join(LETTERS[i % 26] for i in rng.integers(26) + np.cumsum(steps)))
    return texts


@pytest.fixture(scope="module")
def judge():
    train = encode_corpus(alphabet_texts(300, 40, 0), tokenize, max_tokens=10_000)
    return FluencyJudge.calibrate(
        NGramModel(train, 26),
        tokenize,
        ["a b c"] * 9,
        alphabet_texts(9, 20, 1),
        alphabet_texts(50, 25, 2),
    )


def test_corpus_stops_at_the_budget():
    rows = encode_corpus(["a b c d"] * 50, tokenize, max_tokens=40, block=5)
    assert sum(map(len, rows)) == 40


def test_fluency_falls_with_disorder_and_with_loops(judge):
    good = alphabet_texts(40, 20, 3)
    half = [" ".join([*text.split()[:10], *shuffle_words([text])[0].split()[10:]]) for text in good]
    bad = shuffle_words(good)
    loops = ["a b c a b c a b c a b c a b c a b c"] * 5
    means = [judge.measure(["x y z"] * len(t), t)["fluency"].mean() for t in (good, half, bad, loops)]
    assert means[0] > 1.5
    assert means[0] > means[1] > means[2]
    assert means[2] < 0.4
    assert means[3] < 0.5


def test_fluency_lies_between_0_and_2_and_an_empty_text_has_none(judge):
    scores = judge.measure(["a b c", "a b c"], ["d e f g h i j k", ""])
    assert scores["fluency"].tolist() == [2, 0]
    assert math.isnan(scores["distinct_2"][1])


def test_validation_shows_what_the_gate_is_for(judge):
    auroc = judge.validate(alphabet_texts(80, 25, 4))
    assert auroc["shuffled"] > 0.95
    assert auroc["loops"] > 0.95
    assert set(auroc) == {"shuffled", "loops", "loops_ungated"}


def test_a_language_without_order_has_no_scale():
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abc"), 30)) for _ in range(20)]
    shuffled = ["a a a a a a"] * 4
    with pytest.raises(InputError, match="SLOR"):
        FluencyJudge.calibrate(NGramModel(tokenize(texts), 26), tokenize, ["a b"] * 4, shuffled, texts)
