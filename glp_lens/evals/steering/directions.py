"""Steering directions: a difference of class means, and the random direction it has to beat."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from glp_lens import lm
from glp_lens.errors import InputError


def difference_of_means(
    model: lm.Model,
    positive: Sequence[str],
    negative: Sequence[str],
    hook: str,
    *,
    context: int = 64,
    batch_size: int = 32,
) -> Tensor:
    """Mean last-token activation of `positive` minus that of `negative`, as a float32 unit vector `(d_in,)`.

    Longer texts are cut on the left, so that the token read is always the text's own last one. Means are
    taken in float64.

    Raises:
        InputError: one side has no text, or the means do not differ.
    """
    sides = [[text for text in side if text.strip()] for side in (positive, negative)]
    if not all(sides):
        raise InputError("a direction needs at least one positive and one negative text that is not empty")
    rows = last_token_activations(model, sides[0] + sides[1], hook, context=context, batch_size=batch_size).double()
    direction = rows[: len(sides[0])].mean(0) - rows[len(sides[0]) :].mean(0)
    norm = direction.norm()
    if not torch.isfinite(norm) or norm == 0:
        raise InputError(
            f"positive and negative texts have the same mean activation at {hook}: "
            "pass texts that differ, or another hook point"
        )
    unit: Tensor = direction / norm
    return unit.float()


def last_token_activations(
    model: lm.Model, texts: Sequence[str], hook: str, *, context: int = 64, batch_size: int = 32
) -> Tensor:
    """Activation at each text's last token, float32 `(len(texts), d_in)` on the CPU, in the texts' order."""
    ids = lm.to_ids(model, texts, context, truncate="left")
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    parts = []
    with tqdm(total=len(ids), desc="direction", unit="text", mininterval=2) as bar:
        for start in range(0, len(ids), batch_size):
            tokens, mask = lm.pad([ids[i] for i in order[start : start + batch_size]])
            stream = lm.activations(model, tokens, mask, [hook])[hook]
            last = mask.sum(1).to(stream.device) - 1
            parts.append(stream[torch.arange(len(last), device=stream.device), last].float().cpu())
            bar.update(len(last))
    return torch.cat(parts)[torch.as_tensor(np.argsort(order))]


def random_direction(d_in: int, seed: int = 0) -> Tensor:
    """A unit vector `(d_in,)`, uniform on the sphere."""
    vector = torch.randn(d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    unit: Tensor = vector / vector.norm()
    return unit.float()
