"""Concepts to steer towards: texts that give the direction, and other texts that teach the judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, get_args

import numpy as np
import xxhash

from glp_lens import corpus
from glp_lens.arguments import checked
from glp_lens.errors import InputError
from glp_lens.evals.steering.settings import ConceptName

if TYPE_CHECKING:
    import pandas as pd

NAMES: tuple[str, ...] = get_args(ConceptName)
TOPICS = ("sports", "business", "world", "technology", "trump", "china", "clickbait", "spam")
"""The topics of the topic experiment."""
SENTIMENT = ("sentiment",)
"""The concepts of the sentiment experiment."""

# AG News topics. The judge's dataset names three of its four classes wrongly: its "Technology" holds business
# news, "Politics" world news and "Entertainment" science and technology.
_NEWS = {"sports": "162_agnews_1", "business": "163_agnews_2", "world": "161_agnews_0"}
_NEWS_CLASS = {"sports": "Sport", "business": "Technology", "world": "Politics"}
_NEWS_DATASET = "97_news_class"


class _Source(NamedTuple):
    """A dataset of labelled texts, and which of its targets the concept is."""

    dataset: str
    target: object


_HALVED = {
    "technology": _Source(_NEWS_DATASET, "Entertainment"),
    "trump": _Source("21_headline_istrump", True),
    "obama": _Source("22_headline_isobama", True),
    "china": _Source("23_headline_ischina", True),
    "iran": _Source("24_headline_isiran", True),
    "clickbait": _Source("105_click_bait", "clickbait"),
    "spam": _Source("96_spam_is", 1),
    "python": _Source("159_code_Python", 1),
    "hr": _Source("151_it_tick_HR Support", 1),
}
"""Concepts of which there is one dataset: direction and judge have disjoint parts of it."""
_DIRECTION_SHARE = 1 / 3

_ABOUT = {
    "sports": "sports", "business": "business and the economy", "world": "world news and politics",
    "technology": "science and technology", "trump": "Donald Trump", "obama": "Barack Obama", "china": "China",
    "iran": "Iran", "clickbait": "a headline that is made to be clicked", "spam": "an unwanted advertising message",
    "python": "program code in Python", "hr": "a request to a human resources department",
    "sentiment": "praise", "film-sentiment": "praise",
}  # fmt: skip
"""The concepts in words."""

_TWO = {
    "sentiment": (_Source("92_glue_sst2", 1), _Source("157_amazon_5star", 1)),
    "film-sentiment": (_Source("157_amazon_5star", 1), _Source("92_glue_sst2", 1)),
}
"""Concepts with one dataset for the direction and another for the judge: praise in film and in product reviews."""


@dataclass(frozen=True)
class Concept:
    """A concept, as two disjoint sets of labelled texts.

    Attributes:
        name: what results call it.
        positive: texts about the concept, for the direction.
        negative: texts of the same source about other things, for the direction.
        judge_texts: texts for the judge, none of which is in `positive` or `negative`.
        judge_labels: 1 where a judge's text is about the concept, else 0.
        about: the concept in words, for a hosted judge; empty if there are none, as of a latent.
    """

    name: str
    positive: Sequence[str]
    negative: Sequence[str]
    judge_texts: Sequence[str]
    judge_labels: Sequence[int]
    about: str = ""


@checked
def load(name: str, seed: int = 0) -> Concept:
    """One of the packaged concepts (`NAMES`), its texts in a seeded order.

    The negatives are of the same kind as the positives (news against news, headlines against headlines, tickets against
    tickets), so that the direction says the topic and not the kind of text. Texts for the judge come from another
    dataset, or from a part of the same one that the hash of a text's beginning chooses; none begins like one of the
    direction's.

    - `sports`, `business`, `world`: AG News. The contrast is the other two topics, not the datasets' own negatives,
      which are program code. `technology`: the fourth class, which is only in the judge's dataset.
    - `trump`, `obama`, `china`, `iran`: headlines of the New York Times that name them, against others.
    - `clickbait`: headlines made to be clicked, against factual ones. `spam`: text messages.
    - `python`: program code, against code in other languages. `hr`: help-desk tickets for human resources.
    - `sentiment`: praise in film reviews, judged by product reviews; `film-sentiment`: the other way round.

    Whether a concept can be judged is found by `judges.fit_judges`, which refuses those that cannot.

    Raises:
        InputError: unknown name, or the datasets are not installed.
    """
    if name not in NAMES:
        raise InputError(f"concept must be one of {', '.join(NAMES)}, got {name!r}")
    rng = np.random.default_rng(seed)
    if name in _NEWS:
        return _news(name, rng)
    source, judge = _TWO[name] if name in _TWO else (_HALVED[name],) * 2
    frame, judge_frame = _labelled(source), _labelled(judge)
    if source == judge:
        own = [_of_direction(text) for text in frame["text"]]
        frame, judge_frame = frame[own], frame[[not mine for mine in own]]
    else:
        used = {corpus.beginning(text) for text in frame["text"]}
        judge_frame = judge_frame[[corpus.beginning(text) not in used for text in judge_frame["text"]]]
    order = rng.permutation(len(judge_frame))
    return Concept(
        name,
        positive=_shuffled(frame["text"][frame["label"] == 1].tolist(), rng),
        negative=_shuffled(frame["text"][frame["label"] == 0].tolist(), rng),
        judge_texts=judge_frame["text"].to_numpy()[order].tolist(),
        judge_labels=judge_frame["label"].to_numpy()[order].tolist(),
        about=_ABOUT[name],
    )


def _news(name: str, rng: np.random.Generator) -> Concept:
    topics = {}
    for topic, dataset in _NEWS.items():
        frame = corpus.read_dataset(dataset)
        topics[topic] = _distinct(frame["prompt"][frame["target"] == 1])
    used = {corpus.beginning(text) for texts in topics.values() for text in texts}
    frame = corpus.read_dataset(_NEWS_DATASET).drop_duplicates("prompt")
    frame = frame[[corpus.beginning(text) not in used for text in frame["prompt"]]]
    order = rng.permutation(len(frame))
    return Concept(
        name,
        positive=_shuffled(topics[name], rng),
        negative=_shuffled([t for topic in _NEWS if topic != name for t in topics[topic]], rng),
        judge_texts=[str(text) for text in frame["prompt"].to_numpy()[order]],
        judge_labels=[int(label == _NEWS_CLASS[name]) for label in frame["target"].to_numpy()[order]],
        about=_ABOUT[name],
    )


def _labelled(source: _Source) -> pd.DataFrame:
    """Texts of distinct beginnings, as `text` and `label`; of a beginning that has both labels, none."""
    frame = corpus.read_dataset(source.dataset)
    frame = frame.assign(
        text=frame["prompt"].astype(str), label=(frame["target"] == source.target).astype(int)
    )[["text", "label"]]  # fmt: skip
    frame = frame[frame["text"].str.strip() != ""]
    beginnings = frame["text"].map(corpus.beginning)
    unclear = frame.groupby(beginnings)["label"].transform("nunique") > 1
    return frame[~unclear & ~beginnings.duplicated()]


def _of_direction(text: str) -> bool:
    """Whether a text of a dataset that has to serve both belongs to the direction's part."""
    key = xxhash.xxh3_64_intdigest(corpus.beginning(text).encode(errors="surrogatepass"))
    return key < _DIRECTION_SHARE * 2**64


def _distinct(texts: Sequence[str]) -> list[str]:
    return list({corpus.beginning(str(text)): str(text) for text in texts if str(text).strip()}.values())


def _shuffled(texts: Sequence[str], rng: np.random.Generator) -> list[str]:
    return [texts[i] for i in rng.permutation(len(texts))]
