"""Forward passes over texts: of the texts themselves, or of tokens generated after them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glp_lens import lm

_BATCH = 128
"""What a forward pass costs beside its tokens, in tokens: 10 ms where 10,000 are read a second."""


@dataclass(frozen=True)
class Forwarded:
    """Activations of a batch of texts.

    Attributes:
        texts: index of each text.
        ids: token ids `(batch, pos)`, right-padded.
        mask: `(batch, pos)`, true on real tokens.
        wanted: `(batch, pos)`, false on tokens that are only context, such as a prompt's.
        rows: at each hook point `(batch, pos, d)`, on the model's device.
    """

    texts: list[int]
    ids: Tensor
    mask: Tensor
    wanted: Tensor
    rows: dict[str, Tensor]


def read(
    model: lm.Model, ids: Sequence[Sequence[int]], hooks: Sequence[str], budget: int, way: lm.Way | None = None
) -> Iterator[Forwarded]:
    """Activations of texts, in batches of similar length of at most `budget` tokens with padding."""
    for batch in pack([len(row) for row in ids], budget):
        tokens, mask = lm.pad([ids[i] for i in batch])
        yield Forwarded(batch, tokens, mask, mask, lm.activations(model, tokens, mask, hooks, way))


def generate(
    model: lm.Model,
    ids: Sequence[Sequence[int]],
    hooks: Sequence[str],
    budget: int,
    *,
    new_tokens: int,
    temperature: float,
    seeds: Sequence[int],
    way: lm.Way | None = None,
) -> Iterator[Forwarded]:
    """Continue prompts and keep the activations of the new tokens.

    Prompts of one length share a batch, so nothing is padded. What follows a text's EOS is not real.

    Args:
        ids: the prompts.
        budget: most tokens of a batch, new ones included.
        new_tokens: tokens to add to each.
        temperature: of sampling; 0 takes the likeliest token.
        seeds: one for each prompt; a batch draws from its first prompt's.
        way: how the texts are read: see `lm.activations`.
    """
    eos = lm.tokenizer_of(model).eos_token_id
    lengths = [len(row) for row in ids]
    for batch in lm.batches_of_one_length(lengths, lambda length: budget // (length + new_tokens)):
        prompt = torch.tensor([ids[i] for i in batch])
        tokens = lm.generate(model, prompt, new_tokens, temperature=temperature, seed=seeds[batch[0]])
        new = (torch.arange(tokens.shape[1]) >= prompt.shape[1]).expand_as(tokens)
        is_eos = new & (tokens == (-1 if eos is None else eos))
        mask = is_eos.cumsum(1) - is_eos.long() == 0
        # Read in one forward pass, as any other text: a model without a cache runs its hooks on the whole text at each
        # step, and one with a cache would have to run one step more for the last token.
        everything = torch.ones_like(mask)
        yield Forwarded(batch, tokens, mask, new, lm.activations(model, tokens, everything, hooks, way))


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of sequences in batches of similar length, each of at most `budget` tokens with its padding.

    Batches are cut where that makes the least padding, and one more batch counts as `_BATCH` tokens. A sequence longer
    than the budget is a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    cost, start = [0.0] + [float("inf")] * len(order), [0] * (len(order) + 1)
    for first, longest in enumerate(lengths[i] for i in order):
        most = max(1, budget // max(1, longest))
        for end in range(first + 1, min(first + most, len(order)) + 1):
            if (new := cost[first] + (end - first) * longest + _BATCH) < cost[end]:
                cost[end], start[end] = new, first
    batches: list[list[int]] = []
    end = len(order)
    while end:
        batches.append(order[start[end] : end])
        end = start[end]
    return batches[::-1]
