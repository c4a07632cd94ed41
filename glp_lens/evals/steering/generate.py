"""Steered generation: neutral prefixes continued greedily at several strengths in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from glp_lens import hooks, lm
from glp_lens.errors import InputError
from glp_lens.evals.entries import Entry
from glp_lens.types import HookFunction


def generate(
    model: lm.Model,
    prompts: Sequence[str],
    strengths: Sequence[float],
    *,
    hook: str,
    direction: Tensor | None,
    entry: Entry | None = None,
    new_tokens: int = 24,
    seed: int = 0,
    batch_rows: int = 160,
    desc: str = "steering",
    allow_mismatch: bool = False,
) -> Tensor:
    """Greedy continuations of every prompt at every strength, ids `(n_prompts, n_strengths, new_tokens)`.

    `alpha * direction` is added at the last position of each call, that is, at the prompt's last token and
    at each new one, as in the released GLP code; then `entry`'s model repairs the row. EOS does not end a
    text: all have the same length.

    The noise of a repair depends on seed, prompt and position only. It is the same for every strength and
    every model, which pairs their comparisons, and does not depend on the batching.

    Args:
        model: a HookedTransformer or TransformerBridge.
        prompts: texts to continue.
        strengths: one alpha for each continuation of a prompt.
        hook: the hook point to steer at.
        direction: `(d_in,)` in activation units, or None for no steering at all.
        entry: the projector and its options, or None to steer without repair.
        new_tokens: length of a continuation.
        seed: for the noise of stochastic projectors.
        batch_rows: most sequences generated at once.
        desc: label of the progress bar.
        allow_mismatch: repair at another hook point than `entry`'s model was trained at.
    """
    if not prompts or not strengths:
        raise InputError("steering needs at least one prompt and one strength")
    ids = lm.to_ids(model, prompts, max_length=1024)
    device = lm.model_device(model)
    n_strengths = len(strengths)
    out = torch.empty((len(prompts), n_strengths, new_tokens), dtype=torch.long)
    total = len(prompts) * n_strengths * new_tokens
    with tqdm(total=total, desc=desc, unit="tok", mininterval=2) as bar:
        for group in lm.batches_of_one_length([len(row) for row in ids], lambda _: batch_rows // n_strengths):
            tokens = torch.tensor([ids[i] for i in group]).repeat_interleave(n_strengths, 0)
            edit = None
            if direction is not None:
                alpha = torch.tensor(strengths, dtype=torch.float32).repeat(len(group))
                noise, options = None, {}
                if entry is not None:
                    draws = [prompt_noise(seed, i, new_tokens, direction.shape[0]) for i in group]
                    stacked = torch.stack(draws, dim=1).repeat_interleave(n_strengths, dim=1)
                    noise = _row_noise(stacked.to(device))
                    options = entry.options
                projector: Any = entry.model if entry is not None else None
                edit = hooks.steer(
                    direction, alpha, projector, "last", noise, model=model, allow_mismatch=allow_mismatch, **options
                )
            text = lm.generate(model, tokens, new_tokens, hooks=[(hook, _counted(edit, bar))])
            out[group] = text[:, tokens.shape[1] :].reshape(len(group), n_strengths, new_tokens)
    return out


def prompt_noise(seed: int, prompt: int, positions: int, d_in: int) -> Tensor:
    """Standard normal `(positions, d_in)` of one prompt; more positions only append rows."""
    values = np.random.default_rng([seed, prompt]).standard_normal((positions, d_in), dtype=np.float32)
    return torch.from_numpy(values)


def _row_noise(noise: Tensor) -> hooks.RowNoise:
    """Row `i` of the batch gets `noise[call, i]`; `noise` is `(calls, rows, d_in)`."""

    def row_noise(call: int, rows: int) -> Tensor:
        assert rows == noise.shape[1]
        return noise[call]

    return row_noise


def _counted(edit: HookFunction | None, bar: tqdm[Any]) -> HookFunction:
    """`edit` (or nothing), with one tick of the bar for each sequence and call."""

    def hook_fn(tensor: Tensor, *, hook: Any = None) -> Tensor:
        bar.update(tensor.shape[0])
        return tensor if edit is None else edit(tensor, hook=hook)

    return hook_fn
