"""Directions from what a chat model answers when it is told to be one thing or the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from glp_lens import lm, provenance
from glp_lens.arguments import checked
from glp_lens.directions.direction import Direction
from glp_lens.directions.estimators import Method
from glp_lens.directions.texts import from_rows, hash_of, span_activations
from glp_lens.errors import InputError
from glp_lens.types import Json

_BATCH = 64


class Response(NamedTuple):
    """An answer of a chat model.

    Attributes:
        system: the system prompt; empty for none.
        question: what the user asked.
        text: the answer.
    """

    system: str
    question: str
    text: str


@checked
def respond(
    model: lm.Model,
    systems: Sequence[str],
    questions: Sequence[str],
    *,
    new_tokens: int = 48,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[Response]:
    """An answer to each question under each system prompt, in the model's chat template.

    Args:
        model: a chat model.
        systems: system prompts; an empty one is none.
        questions: what a user asks.
        new_tokens: most tokens of an answer; it ends before the first special token.
        temperature: of sampling; 0 is greedy.
        seed: of sampling.

    Returns:
        The answers that are not empty, by system prompt, then question.

    Raises:
        InputError: no chat template, or one without system prompts.
    """
    asked = [(system, question) for system in systems for question in questions]
    if not asked:
        raise InputError("answers need at least one system prompt and one question")
    ids = [_prompt_ids(model, system, question) for system, question in asked]
    special = set(lm.tokenizer_of(model).all_special_ids)
    texts = [""] * len(asked)
    batches = lm.batches_of_one_length([len(row) for row in ids], lambda _: _BATCH)
    with tqdm(total=len(asked), desc="answers", unit="answer", mininterval=2, delay=2) as bar:
        for number, batch in enumerate(batches):
            tokens = torch.tensor([ids[i] for i in batch])
            found = lm.generate(model, tokens, new_tokens, temperature=temperature, seed=seed + number)
            for i, row in zip(batch, found[:, tokens.shape[1] :].tolist(), strict=True):
                end = next((at for at, token in enumerate(row) if token in special), len(row))
                texts[i] = str(lm.tokenizer_of(model).decode(row[:end])).strip()
            bar.update(len(batch))
    return [Response(*turn, text) for turn, text in zip(asked, texts, strict=True) if text]


@checked
def from_responses(
    model: lm.Model,
    positive: Sequence[Response],
    negative: Sequence[Response],
    hook: str,
    *,
    method: Method = "mean",
    name: str = "direction",
    seed: int = 0,
    held_out: float = 0.2,
    system: bool = True,
    context: int = 512,
    batch_size: int = 16,
    identity: Json | None = None,
) -> Direction:
    """A direction from answers of one kind to answers of the other, each the mean over its own tokens.

    As persona vectors are made (Chen et al. 2025), without a judge that selects answers. Questions, not answers, are
    held out: no question of the AUROC has a part in the vector.

    Args:
        model: the chat model that answered.
        positive, negative: answers, to the same questions or not. `pca` pairs those to one question, in order.
        hook: the hook point.
        method, name, seed, identity: as in `from_texts`.
        held_out: share of the questions to hold out, at least two; 0 holds out none.
        system: read the answers below the system prompt that led to them, as in that paper; False reads them below the
            bare question, so that nothing but the answer tells the two kinds apart.
        context: most tokens of question and answer; longer ones are cut on the right.
        batch_size: answers of a forward pass.

    Raises:
        InputError: too few questions, or answers that do not differ.
    """
    lm.check_hook(model, hook)
    if method == "pca":
        positive, negative = _paired(positive, negative)
    questions = sorted({each.question for each in (*positive, *negative)})
    if not 0 <= held_out < 1:
        raise InputError(f"held_out must lie in [0, 1), got {held_out}")
    count = max(2, round(held_out * len(questions))) if held_out else 0
    if len(questions) < count + 2:
        raise InputError(f"a direction from answers needs at least {count + 2} questions, got {len(questions)}")
    out = {questions[i] for i in np.random.default_rng(seed).permutation(len(questions))[:count]}
    rows = {id(side): response_activations(model, side, hook, system=system, context=context, batch_size=batch_size)
            for side in (positive, negative)}  # fmt: skip
    parts: list[Tensor] = []
    used: list[list[str]] = []
    for held in (False, True):
        for side in (positive, negative):
            keep = torch.tensor([(each.question in out) == held for each in side], dtype=torch.bool)
            parts.append(rows[id(side)][keep])
            used.append([field for each in side if (each.question in out) == held for field in each])
    if count and not all(len(part) for part in parts):
        raise InputError("a side has no answer to any question held out, or to no other: ask both the same questions")
    about: Json = {
        **provenance.here(model, hook, identity),
        "responses": {"positive": len(parts[0]), "negative": len(parts[1]), "hash": hash_of(used[0], used[1]),
                      "held_out": [len(parts[2]), len(parts[3])], "held_out_questions": count,
                      "systems": [sorted({each.system for each in side}) for side in (positive, negative)]},
        "options": {"system": system, "context": context, "held_out": held_out, "seed": seed},
    }  # fmt: skip
    return from_rows(
        parts[0], parts[1], hook, method=method, name=name, seed=seed, provenance=about,
        held_out=(parts[2], parts[3]) if count else None,
    )  # fmt: skip


@checked
def response_activations(
    model: lm.Model,
    responses: Sequence[Response],
    hook: str,
    *,
    system: bool = True,
    context: int = 512,
    batch_size: int = 16,
) -> Tensor:
    """Mean activation over the tokens of each answer, float32 `(len(responses), d_in)`.

    Raises:
        InputError: no answer, an empty one, or one that begins beyond `context`.
    """
    if not responses or not all(each.text for each in responses):
        raise InputError("expected answers that are not empty")
    tokenizer = lm.tokenizer_of(model)
    prompts = [_prompt_ids(model, each.system if system else "", each.question) for each in responses]
    if (longest := max(map(len, prompts))) >= context:
        raise InputError(
            f"a question has {longest} tokens, and with its answer at most {context} are read: raise context"
        )
    answers = tokenizer([each.text for each in responses], add_special_tokens=False)["input_ids"]
    ids = [(prompt + answer)[:context] for prompt, answer in zip(prompts, answers, strict=True)]
    return span_activations(model, ids, list(map(len, prompts)), hook, batch_size=batch_size)


@checked
def chat_prompt(model: lm.Model, question: str, system: str = "") -> str:
    """A question in the chat template as a text to continue, without the BOS that `lm.to_ids` puts in front.

    Raises:
        InputError: no chat template, or one whose text does not give the same tokens again.
    """
    ids = _prompt_ids(model, system, question)
    bare = ids[1:] if ids[:1] == [lm.bos_id(model)] else ids
    text = str(lm.tokenizer_of(model).decode(bare))
    if lm.to_ids(model, [text], len(ids) + 8)[0][1:] != bare:
        raise InputError("the chat template of this model gives a text that is not read as the same tokens")
    return text


def _prompt_ids(model: lm.Model, system: str, question: str) -> list[int]:
    turns = [*([("system", system)] if system else []), ("user", question)]
    return lm.chat_ids(model, [turns], 1 << 20, reply=True)[0]


def _paired(
    positive: Sequence[Response], negative: Sequence[Response]
) -> tuple[list[Response], list[Response]]:  # fmt: skip
    """The answers to each question in pairs, in order, as many as both sides have."""
    sides: tuple[list[Response], list[Response]] = ([], [])
    for question in dict.fromkeys(each.question for each in positive):
        own = [[each for each in side if each.question == question] for side in (positive, negative)]
        for a, b in zip(*own, strict=False):
            sides[0].append(a)
            sides[1].append(b)
    return sides
