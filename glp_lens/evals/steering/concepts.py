"""Concepts to steer towards: texts that give the direction, and other texts that teach the judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np

from glp_lens import corpus
from glp_lens.errors import InputError
from glp_lens.evals.steering.settings import ConceptName

# AG News topics. The judge's dataset names three of its four classes wrongly: its "Technology" holds business
# news, "Politics" world news and "Entertainment" science and technology.
_DIRECTION = {"sports": "162_agnews_1", "business": "163_agnews_2", "world": "161_agnews_0"}
_JUDGE = {"sports": "Sport", "business": "Technology", "world": "Politics"}
_JUDGE_DATASET = "97_news_class"
NAMES: tuple[str, ...] = get_args(ConceptName)


@dataclass(frozen=True)
class Concept:
    """A concept, as two disjoint sets of labelled texts.

    Attributes:
        name: what results call it.
        positive: texts about the concept, for the direction.
        negative: texts of the same source about other things, for the direction.
        judge_texts: texts for the judge, none of which is in `positive` or `negative`.
        judge_labels: 1 where a judge's text is about the concept, else 0.
    """

    name: str
    positive: Sequence[str]
    negative: Sequence[str]
    judge_texts: Sequence[str]
    judge_labels: Sequence[int]


def load(name: str, seed: int = 0) -> Concept:
    """One of the packaged concepts (`NAMES`), its texts in a seeded order.

    The contrast is the positives of the other two topics, not the dataset's own negatives: those are program
    code, and a direction against them would say "news" and not the topic. Texts for the judge are AG News
    too, but none that begins like a text of the direction's.

    Raises:
        InputError: unknown name, or the datasets are not installed.
    """
    if name not in _DIRECTION:
        raise InputError(f"concept must be one of {', '.join(NAMES)}, got {name!r}")
    topics = {}
    for topic, dataset in _DIRECTION.items():
        frame = corpus.read_dataset(dataset)
        topics[topic] = _distinct(frame["prompt"][frame["target"] == 1])
    used = {corpus.beginning(text) for texts in topics.values() for text in texts}
    frame = corpus.read_dataset(_JUDGE_DATASET).drop_duplicates("prompt")
    frame = frame[[corpus.beginning(text) not in used for text in frame["prompt"]]]
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(frame))
    return Concept(
        name,
        positive=_shuffled(topics[name], rng),
        negative=_shuffled([t for topic in NAMES if topic != name for t in topics[topic]], rng),
        judge_texts=[str(text) for text in frame["prompt"].to_numpy()[order]],
        judge_labels=[int(label == _JUDGE[name]) for label in frame["target"].to_numpy()[order]],
    )


def _distinct(texts: Sequence[str]) -> list[str]:
    return list({corpus.beginning(str(text)): str(text) for text in texts if str(text).strip()}.values())


def _shuffled(texts: Sequence[str], rng: np.random.Generator) -> list[str]:
    return [texts[i] for i in rng.permutation(len(texts))]
