"""A toy language to steer in: concept, sentence model and fluent text are made of the tiny models' words."""

import dataclasses

import numpy as np
import torch

from glp_lens.directions import Direction
from glp_lens.evals import steering
from glp_lens.evals.steering import Concept, fluency
from glp_lens.evals.steering.experiments import Task
from tests.conftest import WORDS

SPORT = ["team", "game", "match", "goal", "player", "coach"]
MONEY = ["bank", "money", "market", "price", "stock"]


class Words:
    """Stands in for the sentence model: word identities, which a judge of this toy language needs."""

    vocab, identity = len(WORDS) + 1, "words"

    def tokenize(self, texts):
        return [[WORDS.index(w) if w in WORDS else len(WORDS) for w in text.split()] for text in texts]

    def __call__(self, texts):
        rows = np.zeros((len(texts), self.vocab), dtype=np.float32)
        for i, ids in enumerate(self.tokenize(texts)):
            np.add.at(rows[i], ids, 1 / (1 + len(ids)))
        return rows


def toy_concept(name="toy"):
    rng = np.random.default_rng(0)
    labels = [i % 2 for i in range(1300)]
    texts = [" ".join(rng.choice([*(SPORT if i else MONEY), *WORDS[:30]], 20)) for i in labels]
    sides = [[" ".join(rng.choice(side, 6)) for _ in range(9)] for side in (SPORT, MONEY)]
    return Concept(name, *sides, texts, labels)


def ordered_texts(n=300):
    """Texts in which each word calls for the next, with jumps: word order means something."""
    rng = np.random.default_rng(0)
    steps = np.where(rng.random((n, 30)) < 0.7, 1, rng.integers(1, len(WORDS), (n, 30)))
    starts = rng.integers(len(WORDS), size=(n, 1))
    return [" ".join(WORDS[i % len(WORDS)] for i in row) for row in starts + steps.cumsum(1)]


def toy_task(d, hook="blocks.1.hook_resid_post", name="toy"):
    vector = torch.randn(d, generator=torch.Generator().manual_seed(3))
    return Task(toy_concept(name), Direction.of(vector, hook, name=name, method="test"))


def any_text_is_fluent(patch):
    """A random model writes no ordered text, so the scale of the fluency judge is set by human texts."""
    calibrate = fluency.calibrate

    def by_hand(scorer, tokenize, prompts, unsteered, human, seed=0):
        return calibrate(scorer, tokenize, *map(list, zip(*human, strict=True)), human, seed)

    patch.setattr(fluency, "calibrate", by_hand)


def steer_in_the_toy_language(patch):
    """Jobs steer towards the toy concept, judged by toy judges."""
    run = steering.run

    def toy(entries, data, settings, **options):
        own = {"tasks": [toy_task(data.model.cfg.d_model, data.hook)], "embedder": Words()}
        data = dataclasses.replace(data, fluency_texts=ordered_texts(), **own)
        return run(entries, data, dataclasses.replace(settings, fluency_judge="ngram"), **options)

    any_text_is_fluent(patch)
    patch.setattr(steering, "run", toy)
