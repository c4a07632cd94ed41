"""Forward passes over texts: reading them, or continuing them and watching the new tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

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
    """Continue prompts and keep the activations of the new tokens, as the cached forward passes compute them.

    Prompts of one length share a batch, so nothing is padded. What follows a text's EOS is not real.

    Args:
        ids: the prompts.
        budget: most tokens of a batch, new ones included.
        new_tokens: tokens to add to each.
        temperature: of sampling; 0 takes the likeliest token.
        seeds: one for each prompt; a batch draws from its first prompt's.
    """
    device = lm.model_device(model)
    eos = model.tokenizer.eos_token_id
    for batch in _same_length([len(row) for row in ids], new_tokens, budget):
        prompt = torch.tensor([ids[i] for i in batch])
        calls: dict[str, list[Tensor]] = {name: [] for name in hooks}

        def watch(name: str, calls: dict[str, list[Tensor]] = calls) -> Any:
            def hook_fn(tensor: Tensor, *, hook: Any = None) -> Tensor:
                calls[name].append(tensor.clone())
                return tensor

            return hook_fn

        # A token's activation is computed when it is read to find the next one: one more than asked for.
        with (
            torch.inference_mode(),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            model.hooks(fwd_hooks=[(name, watch(name)) for name in hooks]),
        ):
            torch.manual_seed(seeds[batch[0]] % 2**32)  # torch's CPU generator looks at no more bits
            text = model.generate(
                prompt.to(device),
                max_new_tokens=new_tokens + 1,
                do_sample=temperature > 0,
                temperature=temperature or 1.0,
                stop_at_eos=False,
                return_type="tokens",
                verbose=False,
            ).cpu()
        width = prompt.shape[1] + new_tokens
        tokens = text[:, :width].clone()
        new = (torch.arange(width) >= prompt.shape[1]).expand_as(tokens)
        is_eos = new & (tokens == (-1 if eos is None else eos))
        mask = is_eos.cumsum(1) - is_eos.long() == 0
        rows = {
            name: torch.cat(found, dim=1)[:, :width] if found[0].ndim == 3 else found[0]
            for name, found in calls.items()
        }
        yield Forwarded(batch, tokens, mask, new, rows)


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


def _same_length(lengths: Sequence[int], new_tokens: int, budget: int) -> Iterator[list[int]]:
    for length in sorted(set(lengths)):
        same = [i for i, n in enumerate(lengths) if n == length]
        size = max(1, budget // (length + new_tokens))
        for start in range(0, len(same), size):
            yield same[start : start + size]
