"""Forward passes over texts: of the texts themselves, or of tokens generated after them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glp_lens import lm


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


def read(model: lm.Model, ids: Sequence[Sequence[int]], hooks: Sequence[str], budget: int) -> Iterator[Forwarded]:
    """Activations of texts, in batches of similar length of at most `budget` tokens with padding."""
    for batch in pack([len(row) for row in ids], budget):
        tokens, mask = lm.pad([ids[i] for i in batch])
        yield Forwarded(batch, tokens, mask, mask, lm.activations(model, tokens, mask, hooks))


def generate(
    model: lm.Model,
    ids: Sequence[Sequence[int]],
    hooks: Sequence[str],
    budget: int,
    *,
    new_tokens: int,
    temperature: float,
    seeds: Sequence[int],
) -> Iterator[Forwarded]:
    """Continue prompts and keep the activations of the new tokens.

    Prompts of one length share a batch, so nothing is padded. What follows a text's EOS is not real.

    Args:
        ids: the prompts.
        budget: most tokens of a batch, new ones included.
        new_tokens: tokens to add to each.
        temperature: of sampling; 0 takes the likeliest token.
        seeds: one for each prompt; a batch draws from its first prompt's.
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
        yield Forwarded(batch, tokens, mask, new, lm.activations(model, tokens, everything, hooks))


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of sequences in batches of similar length, each of at most `budget` tokens with its padding.

    A sequence longer than the budget is a batch of its own.
    """
    batches: list[list[int]] = []
    width = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or (len(batches[-1]) + 1) * width > budget:
            batches.append([])
            width = lengths[i]
        batches[-1].append(i)
    return batches
