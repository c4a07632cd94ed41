"""Texts as scored tokens: their activations at one hook point, and the language model's loss of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from glp_lens import hooks, lm
from glp_lens.activations.forward import pack
from glp_lens.errors import InputError
from glp_lens.types import Acts

_BATCH_TOKENS = 4096


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens of texts, text by text in their order, without BOS and massive activations.

    Attributes:
        rows: `(n, d_in)` activations, float32 on the CPU.
        loss: `(n,)`, nats: how little the language model expected the token.
        text: `(n,)`, index of the text.
        position: `(n,)`, place in the text, where BOS is 0.
        ids: `(n,)` token ids.
        massive: number of tokens left out for their norm.
    """

    rows: Acts
    loss: NDArray[np.float64]
    text: NDArray[np.int64]
    position: NDArray[np.int64]
    ids: NDArray[np.int64]
    massive: int = 0

    def __len__(self) -> int:
        return len(self.text)


def read(
    model: lm.Model,
    hook: str,
    ids: Sequence[Sequence[int]],
    *,
    push: Tensor | None = None,
    limit: float | None = None,
    desc: str = "read",
) -> Tokens:
    """Run texts through the language model.

    Args:
        model: a HookedTransformer or TransformerBridge.
        hook: where activations are read.
        ids: token ids of each text, BOS first.
        push: `(d_in,)`, added to the activations of all tokens but BOS before they are read: steering.
        limit: norm, before any push, above which a token is left out.

    Raises:
        InputError: a hook point that never runs or has no rows of tokens, another width than the push, or all tokens
            are left out.
    """
    parts: list[tuple[Tensor, ...]] = []
    with tqdm(total=sum(map(len, ids)), desc=desc, unit="tok", unit_scale=True, mininterval=2, leave=False) as bar:
        for batch in pack([len(row) for row in ids], _BATCH_TOKENS):
            tokens, mask = lm.pad([ids[i] for i in batch])
            inner = mask.clone()
            inner[:, 0] = False
            seen: list[Tensor] = []
            functions = [(hook, lm.keeping(hook, mask.shape, seen))]
            if push is not None:
                functions += [(hook, hooks.steer(push, 1.0, positions=inner, allow_mismatch=True)), functions[0]]
            nll = lm.token_nll(model, tokens, mask, functions)
            text, position = inner.nonzero(as_tuple=True)
            owner = torch.as_tensor(batch)[text]
            norms = seen[0][inner].norm(dim=1)
            parts.append((seen[-1][inner], norms, nll[inner[:, 1:]], owner, position, tokens[inner]))
            bar.update(int(mask.sum()))
    rows, norms, loss, text, position, token = (torch.cat(each) for each in zip(*parts, strict=True))
    order = np.lexsort((position.numpy(), text.numpy()))
    keep = order if limit is None else order[(norms <= limit).numpy()[order]]
    if not len(keep):
        raise InputError(f"all {len(order)} tokens at {hook} have massive activations: use another hook point")
    index = torch.from_numpy(keep)
    return Tokens(
        rows[index],
        loss[index].double().numpy(),
        text[index].numpy(),
        position[index].numpy(),
        token[index].numpy(),
        len(order) - len(keep),
    )
