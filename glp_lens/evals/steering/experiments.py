"""What the experiments steer towards: topics, sentiment, latents of a sparse autoencoder, and personas of a chat model.

Each gives tasks: a concept with texts for its judge, a direction, and prompts where the usual ones do not fit. No text
that a judge learns on or is tested on has a part in a direction, nor in choosing what is steered towards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from glp_lens import corpus, directions, lm
from glp_lens.directions import Direction, Method, Response
from glp_lens.errors import InputError
from glp_lens.evals.steering import concepts
from glp_lens.evals.steering.concepts import Concept
from glp_lens.evals.steering.judges import ADMISSION
from glp_lens.evals.steering.personas import PERSONAS, QUESTIONS
from glp_lens.evals.steering.settings import Experiment
from glp_lens.interface import Featurizer
from glp_lens.types import Json

if TYPE_CHECKING:
    from glp_lens.models.sae import SAE

Embed = Callable[[Sequence[str]], NDArray[np.float32]]
HELD_OUT = 0.2
"""Share of a direction's texts that its AUROC is measured on."""
PIECE_WORDS = 20
"""Words of the texts that latents are judged by: the length of a generation."""
_TOP, _FEWEST = 100, 40
"""Texts that activate a latent most, and the fewest that will do, in each of both halves of the corpus."""
_LARGEST_SHARE = 0.2
"""A latent that is active in more texts than this share says little about any of them."""
_CANDIDATES = 4096
"""Latents that are looked at, at most; a seeded choice of larger dictionaries."""
_DIRECTION_QUESTIONS, _JUDGE_QUESTIONS = 30, 50
MOST_QUESTIONS = len(QUESTIONS) - _DIRECTION_QUESTIONS - _JUDGE_QUESTIONS
"""Prompts of a persona, at most: the questions that neither direction nor judge has answers to."""


@dataclass(frozen=True, eq=False)
class Task:
    """Something to steer towards.

    Attributes:
        concept: its texts, for the judge and for the control with shuffled labels.
        direction: the direction to steer along.
        prompts: texts to continue; None for the usual ones.
        shuffled: the control direction of the same texts under shuffled labels, where it is known already.
    """

    concept: Concept
    direction: Direction
    prompts: Sequence[str] | None = None
    shuffled: Direction | None = None

    def to_json(self) -> Json:
        """As JSON."""
        shuffled = None if self.shuffled is None else self.shuffled.to_json()
        about = {"concept": vars(self.concept), "direction": self.direction.to_json(), "prompts": self.prompts}
        return {**about, "shuffled": shuffled}

    @classmethod
    def from_json(cls, value: Json) -> Task:
        """What `to_json` gave; ValueError, KeyError or TypeError if it is something else."""
        shuffled = None if value["shuffled"] is None else Direction.from_json(value["shuffled"])
        return cls(Concept(**value["concept"]), Direction.from_json(value["direction"]), value["prompts"], shuffled)


def tasks(
    experiment: Experiment,
    model: lm.Model,
    hook: str,
    *,
    names: Sequence[str] | None = None,
    method: Method = "mean",
    texts_per_side: int = 256,
    sae: SAE | None = None,
    embed: Embed | None = None,
    n_features: int = 8,
    texts: Sequence[str] | None = None,
    new_tokens: int = 40,
    prompts: int = 40,
    seed: int = 0,
) -> list[Task]:
    """The tasks of an experiment.

    Args:
        experiment: `topics` and `sentiment` (see `topics`), `features`, or `persona` (see `personas`).
        model: the language model.
        hook: the hook point to steer at.
        names: concepts or personas; by default those of the experiment.
        method, texts_per_side, texts, new_tokens, prompts, seed: as in these functions.
        sae, embed, n_features: of `features`, which needs the first two.

    Raises:
        InputError: an unknown experiment, what it needs is missing, or as these functions.
    """
    if experiment in ("topics", "sentiment"):
        default = concepts.TOPICS if experiment == "topics" else concepts.SENTIMENT
        chosen = default if names is None else names
        return topics(model, hook, chosen, method=method, texts_per_side=texts_per_side, seed=seed)
    if experiment == "features":
        if sae is None or embed is None:
            raise InputError("the experiment on latents needs a sparse autoencoder and sentence embeddings: pass both")
        return features(model, hook, sae, embed, n=n_features, texts=texts, seed=seed)
    if experiment == "persona":
        chosen = tuple(PERSONAS) if names is None else names
        return personas(model, hook, chosen, method=method, prompts=prompts, new_tokens=new_tokens, seed=seed)
    raise InputError(f"experiment must be topics, sentiment, features or persona, got {experiment!r}")


def topics(
    model: lm.Model,
    hook: str,
    names: Sequence[str] = concepts.TOPICS,
    *,
    method: Method = "mean",
    texts_per_side: int = 256,
    seed: int = 0,
    identity: Json | None = None,
) -> list[Task]:
    """A task for each packaged concept, in order, among them those of sentiment (`concepts.SENTIMENT`).

    Args:
        model: the language model.
        hook: the hook point to steer at.
        names: of `concepts.NAMES`.
        method: of the directions.
        texts_per_side: texts on each side that the vector is made of; a quarter more are held out for its AUROC. Where
            a concept has fewer, a fifth of what it has is held out.
        seed: of the texts and what is held out.
        identity: `lm.identity(model)`, where the caller knows it already.

    Raises:
        InputError: an unknown name, or datasets that are not installed.
    """
    n = round(texts_per_side / (1 - HELD_OUT))
    identity = identity or lm.identity(model)
    found = []
    for name in names:
        concept = concepts.load(name, seed)
        read: dict[str, Tensor] = {}
        direction = directions.from_texts(
            model, concept.positive[:n], concept.negative[:n], hook,
            method=method, name=name, seed=seed, held_out=HELD_OUT, identity=identity, known=read,
        )  # fmt: skip
        shuffled = directions.random_labels(
            model, concept.positive[:texts_per_side], concept.negative[:texts_per_side], hook,
            seed=seed, held_out=0, identity=identity, known=read,
        )  # fmt: skip
        found.append(Task(concept, direction, shuffled=shuffled))
    return found


def features(
    model: lm.Model,
    hook: str,
    sae: SAE,
    embed: Embed,
    *,
    n: int = 8,
    texts: Sequence[str] | None = None,
    pieces: int = 6000,
    seed: int = 0,
) -> list[Task]:
    """A task for each of `n` latents of a sparse autoencoder whose most activating texts can be told from others.

    Held-out documents are cut into pieces of 20 words, and the documents are halved by the hash of their beginning. On
    the first half latents are chosen: in a random order, those that are active in 40 pieces at least (of the second
    half too) and in a fifth at most, and whose 100 most activating pieces a logistic regression on sentence embeddings
    tells from other pieces by an AUROC of 0.90 in cross-validation. On the second half the same latents' most
    activating pieces, and three times as many random others, are the texts of the judge, so that neither the judge nor
    its AUROC has seen what they were chosen by. The direction is the decoder row.

    Args:
        model: the language model.
        hook: the hook point that the autoencoder is of.
        sae: the autoencoder.
        embed: sentence embeddings `(n, width)` of texts.
        n: latents, at most.
        texts: documents that the autoencoder was not trained on; by default the packaged held-out ones.
        pieces: pieces of both halves together, at most.
        seed: of the order of documents and latents.

    Raises:
        InputError: no latent will do.
    """
    if texts is None:
        texts = [document.text for document in corpus.packaged(seed, "heldout")]
    halves = _halves(texts, pieces // 2)
    rng = np.random.default_rng(seed)
    candidates = rng.permutation(sae.n_features)[:_CANDIDATES]
    activity = [_activity(model, hook, sae, half, candidates) for half in halves]
    alive = [
        i for i in range(len(candidates))
        if all((a[:, i] > 0).sum() >= _FEWEST for a in activity)
        and (activity[0][:, i] > 0).mean() <= _LARGEST_SHARE
    ]  # fmt: skip
    embedded = embed(halves[0]) if alive else np.empty((0, 0), dtype=np.float32)
    found: list[Task] = []
    for i in tqdm(alive, desc="latents", unit="latent", mininterval=2):
        if len(found) == n:
            break
        top, others = _top_and_others(activity[0][:, i], rng)
        if _separable(embedded, top, others) < ADMISSION:
            continue
        judged = _top_and_others(activity[1][:, i], rng)
        rows, labels = np.concatenate(judged), np.repeat([1, 0], [len(side) for side in judged])
        order = rng.permutation(len(rows))
        latent = int(candidates[i])
        concept = Concept(
            f"latent {latent}",
            positive=[halves[0][j] for j in top],
            negative=[halves[0][j] for j in others],
            judge_texts=[halves[1][j] for j in rows[order]],
            judge_labels=labels[order].tolist(),
        )
        found.append(Task(concept, directions.sae_latent(sae, latent, hook=hook)))
    if not found:
        raise InputError(
            f"of {len(candidates)} latents {len(alive)} are active in enough of {sum(map(len, halves))} texts, and "
            "none of these can be judged by its texts: pass more texts, or another autoencoder"
        )
    return found


def personas(
    model: lm.Model,
    hook: str,
    names: Sequence[str] = tuple(PERSONAS),
    *,
    method: Method = "mean",
    prompts: int = 40,
    new_tokens: int = 40,
    seed: int = 0,
    identity: Json | None = None,
) -> list[Task]:
    """A task for each manner of speaking of a chat model.

    The model answers everyday questions under system prompts that ask for the manner and for its opposite. Answers to
    30 questions give the direction (the mean over their tokens), those to 50 others the judge, and the prompts are yet
    other questions in the chat template, without a system prompt.

    Args:
        model: a chat model.
        hook: the hook point to steer at.
        names: of `personas.PERSONAS`.
        method: of the directions.
        prompts: questions to steer the answers of, at most 40.
        new_tokens: length of the answers.
        seed: of the order of questions, and of sampling.
        identity: `lm.identity(model)`, where the caller knows it already.

    Raises:
        InputError: an unknown name, or a model without a chat template that takes system prompts.
    """
    for name in names:
        if name not in PERSONAS:
            raise InputError(f"persona must be one of {', '.join(PERSONAS)}, got {name!r}")
    if not 1 <= prompts <= MOST_QUESTIONS:
        raise InputError(f"prompts must lie between 1 and {MOST_QUESTIONS}, got {prompts}")
    identity = identity or lm.identity(model)
    order = np.random.default_rng(seed).permutation(len(QUESTIONS))
    asked = [QUESTIONS[i] for i in order]
    ends = _DIRECTION_QUESTIONS, _DIRECTION_QUESTIONS + _JUDGE_QUESTIONS
    for_direction, for_judge, left = asked[: ends[0]], asked[ends[0] : ends[1]], asked[ends[1] :]
    texts = [directions.chat_prompt(model, question) for question in left[:prompts]]
    found = []
    for name in names:
        seen: set[str] = set()
        sides = _answers(model, name, for_direction, new_tokens, seed, seen)
        judged = _answers(model, name, for_judge, new_tokens, seed + 1, seen)
        answers = [(each.text, label) for label, side in ((1, judged[0]), (0, judged[1])) for each in side]
        shuffled = [answers[i] for i in np.random.default_rng(seed).permutation(len(answers))]
        concept = Concept(
            name,
            positive=[each.text for each in sides[0]],
            negative=[each.text for each in sides[1]],
            judge_texts=[text for text, _ in shuffled],
            judge_labels=[label for _, label in shuffled],
            about=f"speaking in a {name} manner",
        )
        direction = directions.from_responses(
            model, *sides, hook, method=method, name=name, seed=seed, held_out=HELD_OUT, identity=identity
        )
        found.append(Task(concept, direction, texts))
    return found


def _answers(
    model: lm.Model, name: str, questions: Sequence[str], new_tokens: int, seed: int, seen: set[str]
) -> tuple[list[Response], list[Response]]:
    """Answers in the manner and in its opposite, none of which was seen before."""
    sides: tuple[list[Response], list[Response]] = ([], [])
    for side, systems in zip(sides, (PERSONAS[name].towards, PERSONAS[name].away), strict=True):
        for each in directions.respond(model, systems, questions, new_tokens=new_tokens, seed=seed):
            if each.text not in seen:
                seen.add(each.text)
                side.append(each)
    return sides


def _halves(texts: Sequence[str], most: int) -> tuple[list[str], list[str]]:
    """Pieces of the texts, those of a text in one half, as many in each as `most`."""
    halves: tuple[list[str], list[str]] = ([], [])
    for text in texts:
        words = text.split()
        # Another seed than that of the corpus's held-out part, whose texts would all be in one half.
        half = halves[xxhash.xxh3_64_intdigest(corpus.beginning(text).encode(errors="surrogatepass"), seed=1) % 2]
        starts = range(0, len(words) - PIECE_WORDS + 1, PIECE_WORDS)
        half.extend(" ".join(words[start : start + PIECE_WORDS]) for start in starts)
    distinct = [list(dict.fromkeys(half)) for half in halves]
    both = set(distinct[0]) & set(distinct[1])
    kept = [[piece for piece in half if piece not in both][:most] for half in distinct]
    return kept[0], kept[1]


def _activity(
    model: lm.Model, hook: str, sae: Featurizer, texts: Sequence[str], latents: NDArray[np.int64], batch_size: int = 64
) -> NDArray[np.float32]:
    """Largest activation of each latent on the tokens of each text, `(n_texts, n_latents)`; BOS is left out."""
    found = np.zeros((len(texts), len(latents)), dtype=np.float32)
    ids = lm.to_ids(model, texts, 4 * PIECE_WORDS)
    index = torch.from_numpy(latents)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for first in tqdm(range(0, len(ids), batch_size), desc="activity of latents", unit="batch", mininterval=2):
        chosen = order[first : first + batch_size]
        tokens, mask = lm.pad([ids[i] for i in chosen])
        stream = lm.activations(model, tokens, mask, [hook])[hook]
        mask[:, 0] = False
        rows: Tensor = sae.encode(stream[mask.to(stream.device)].float()).cpu()[:, index]
        by_token = torch.zeros(*mask.shape, len(latents), dtype=torch.float32)
        by_token[mask] = rows
        found[chosen] = by_token.amax(1).numpy()
    return found


class _Split(NamedTuple):
    top: NDArray[np.int64]
    others: NDArray[np.int64]


def _top_and_others(activity: NDArray[np.float32], rng: np.random.Generator) -> _Split:
    """Texts that activate a latent most, and three times as many random others."""
    n = min(_TOP, int((activity > 0).sum()))
    order = np.argsort(-activity, kind="stable")
    rest = order[n:]
    return _Split(order[:n], rest[rng.permutation(len(rest))[: 3 * n]])


def _separable(embedded: NDArray[np.float32], top: NDArray[np.int64], others: NDArray[np.int64]) -> float:
    """Cross-validated AUROC of a logistic regression between two sets of rows."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    x = embedded[np.concatenate([top, others])]
    y = np.repeat([1, 0], [len(top), len(others)])
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    return float(cross_val_score(LogisticRegression(C=10, max_iter=1000), x, y, cv=folds, scoring="roc_auc").mean())
