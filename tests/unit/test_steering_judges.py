import numpy as np
import pytest

from glp_lens.errors import InputError
from glp_lens.evals.steering import concepts
from glp_lens.evals.steering.concepts import Concept
from glp_lens.evals.steering.judges import first_words, fit_judges

TOPIC = ["goal", "team", "match"]
OTHER = ["bank", "stock", "court", "price"]


def embed(texts):
    """Share of words of either kind: all that a judge of this toy language needs."""
    rows = [[sum(w in TOPIC for w in t.split()), sum(w in OTHER for w in t.split())] for t in texts]
    return np.asarray(rows, dtype=np.float32) / 20


def toy_concept(n=300, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    texts = [" ".join(rng.choice([*(TOPIC if label else OTHER), "the", "of", "and"], 30)) for label in labels]
    labels = np.where(rng.random(n) < noise, 1 - labels, labels)
    return Concept("toy", ["goal"], ["bank"], texts, labels.tolist())


@pytest.mark.parametrize("name", concepts.NAMES)
def test_packaged_concepts_share_no_text_between_direction_and_judge(name):
    concept = concepts.load(name)
    sides = [{" ".join(text.split()).casefold()[:60] for text in texts}
             for texts in (concept.positive, concept.negative, concept.judge_texts)]  # fmt: skip
    assert not sides[0] & sides[1]
    assert not (sides[0] | sides[1]) & sides[2]
    assert min(len(concept.positive), len(concept.negative)) > 100
    assert len(concept.judge_texts) == len(concept.judge_labels) > 600
    assert 0.15 < np.mean(concept.judge_labels) < 0.6
    if name in ("sports", "business", "world"):
        assert len(concept.positive) > 1000
        assert len(concept.judge_texts) > 1200


def test_every_topic_and_sentiment_has_its_concept():
    assert len(set(concepts.TOPICS)) >= 8
    assert {*concepts.TOPICS, *concepts.SENTIMENT} <= {*concepts.NAMES}


@pytest.mark.parametrize(
    ("name", "word", "genre"),
    [("trump", "Trump", "."), ("china", "China", "."), ("technology", "Microsoft", "the")],
)
def test_positives_are_about_the_concept_and_negatives_of_their_kind(name, word, genre):
    concept = concepts.load(name)
    judged = [t for t, label in zip(concept.judge_texts, concept.judge_labels, strict=True) if label]
    share = [np.mean([word in text for text in side]) for side in (concept.positive, judged, concept.negative)]
    assert min(share[:2]) > 3 * share[2]
    assert all(np.mean([genre in text for text in side]) > 0.5 for side in (concept.positive, concept.negative))


def test_sports_texts_are_about_sports():
    concept = concepts.load("sports")
    judged = [t for t, label in zip(concept.judge_texts, concept.judge_labels, strict=True) if label]
    for texts, other in ((concept.positive, concept.negative), (judged, concept.negative)):
        share, share_other = (np.mean(["game" in t or "season" in t for t in side]) for side in (texts, other))
        assert share > 4 * share_other


def test_the_order_of_texts_is_seeded():
    assert concepts.load("sports", 1) == concepts.load("sports", 1)
    assert concepts.load("sports", 1) != concepts.load("sports", 2)


def test_unknown_concept():
    with pytest.raises(InputError, match="sports, business, world"):
        concepts.load("cheese")


def test_judges_tell_the_concept_on_texts_they_have_not_seen():
    judges = fit_judges(toy_concept(), embed, n_train=200, n_test=100)
    assert [judge.name for judge in judges] == ["minilm", "tfidf"]
    for judge in judges:
        assert judge.auroc > 0.95
        assert judge.n == 100
        low, high = judge.score(["the stock of the bank and court price", "the match of the team and goal goal"])
        assert 0 <= low < 1 < high <= 2


def test_a_concept_that_cannot_be_judged_is_refused():
    with pytest.raises(InputError, match=r"expected at least 0\.90"):
        fit_judges(toy_concept(noise=0.4), embed, n_train=200, n_test=100)


def test_too_few_judge_texts_are_refused():
    with pytest.raises(InputError, match="pass more texts"):
        fit_judges(toy_concept(n=100), embed, n_train=100)


def test_first_words():
    text = " ".join(map(str, range(40)))
    cut = first_words([text] * 200, 15, 25)
    assert {len(t.split()) for t in cut} == set(range(15, 26))
    assert all(text.startswith(t) for t in cut)
