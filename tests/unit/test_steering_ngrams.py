import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from glp_lens.errors import InputError
from glp_lens.evals.steering.ngrams import NGramModel, encode_corpus

VOCAB = 7


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


def test_corpus_stops_at_the_budget():
    rows = encode_corpus(["a b c d"] * 50, lambda texts: [[1, 2, 3, 4] for _ in texts], max_tokens=40, block=5)
    assert sum(map(len, rows)) == 40


def test_models_of_other_texts_have_other_hashes():
    first, same, other = (NGramModel(sequences(seed=seed), VOCAB, 3) for seed in (0, 0, 1))
    assert first.hash() == same.hash() != other.hash()
