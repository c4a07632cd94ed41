"""Texts and conversations as token ids, and ids as padded batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from glp_lens.arguments import checked
from glp_lens.errors import InputError, first_line
from glp_lens.lm.protocol import Model, Tokenizer


def tokenizer_of(model: Model) -> Tokenizer:
    """The model's tokenizer.

    Raises:
        InputError: it has none.
    """
    if model.tokenizer is None:
        raise InputError("this model has no tokenizer to read texts with: open it with one")
    return model.tokenizer


@checked
def to_ids(
    model: Model,
    texts: Iterable[str],
    max_length: int,
    *,
    truncate: Literal["left", "right"] = "right",
) -> list[list[int]]:
    """Token ids of each text, with exactly one BOS in front and at most `max_length` ids.

    `truncate` names the side that is cut from a longer text; BOS stays. A tokenizer without a BOS uses its
    EOS, as TransformerLens does.
    """
    tokenizer = tokenizer_of(model)
    bos = bos_id(model)
    texts = [_encodable(text) for text in texts]
    rows: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    room = max_length - 1
    return [[bos, *(row[-room:] if truncate == "left" else row[:room])] for row in rows]


@checked
def chat_ids(
    model: Model, chats: Iterable[Sequence[tuple[str, str]]], max_length: int, *, reply: bool = False
) -> list[list[int]]:
    """Token ids of conversations in the tokenizer's chat template, at most `max_length` of each.

    The template alone decides on BOS: one is never added to the one that it may begin with.

    Args:
        chats: `(role, content)` turns of each conversation.
        reply: end where the assistant would begin to answer.

    Raises:
        InputError: the tokenizer has no chat template, or the template refuses a conversation.
    """
    tokenizer = tokenizer_of(model)
    if tokenizer.chat_template is None:
        raise InputError("this model's tokenizer has no chat template: collect without chat")
    rows = []
    for turns in chats:
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply)
        except Exception as error:  # a template is a program that raises what it likes
            raise InputError(f"the chat template refuses a conversation ({first_line(error)})") from None
        rows.append(tokenizer(_encodable(text), add_special_tokens=False)["input_ids"][:max_length])
    return rows


def _encodable(text: str) -> str:
    """The text with half surrogates, which tokenizers refuse, replaced."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def decode(model: Model, ids: Sequence[int]) -> str:
    """The text of generated ids up to the first special token, after which the model believes to be somewhere else."""
    tokenizer = tokenizer_of(model)
    special = set(tokenizer.all_special_ids)
    end = next((i for i, token in enumerate(ids) if token in special), len(ids))
    return str(tokenizer.decode(list(ids[:end])))


def bos_id(model: Model) -> int:
    """The id put in front of every sequence."""
    tokenizer = tokenizer_of(model)
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if bos is None:
        raise InputError("this model's tokenizer has neither a BOS nor an EOS token to begin sequences with")
    return int(bos)


def batches_of_one_length(lengths: Sequence[int], size: Callable[[int], int]) -> Iterator[list[int]]:
    """Indices of sequences in batches of equal lengths, which need no padding: short ones first.

    Args:
        lengths: tokens of each sequence.
        size: most sequences of a batch, by their length.
    """
    for length in sorted(set(lengths)):
        same = [i for i, n in enumerate(lengths) if n == length]
        step = max(1, size(length))
        for start in range(0, len(same), step):
            yield same[start : start + step]


def pad(rows: Sequence[Sequence[int]], pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Right-padded ids `(batch, pos)` and their mask, true on real tokens."""
    width = max(map(len, rows))
    tokens = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.as_tensor(row)
        mask[i, : len(row)] = True
    return tokens, mask
