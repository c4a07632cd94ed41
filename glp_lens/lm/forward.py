"""Forward passes of a language model: activations at hook points, and the loss of each token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from glp_lens.errors import InputError
from glp_lens.lm.description import model_device, refuse_encoder_decoder
from glp_lens.lm.hook_points import must_run, rows_at, stop_layer
from glp_lens.lm.protocol import Model
from glp_lens.numerics import of_others
from glp_lens.types import HookFunction

Hooks = Sequence[tuple[str, HookFunction]]
_PIECE = 2**20
"""Logits whose loss is taken at once on a CPU."""


@of_others()
@torch.no_grad()
def activations(model: Model, tokens: Tensor, mask: Tensor, hooks: Sequence[str]) -> dict[str, Tensor]:
    """Activations `(batch, pos, d)` at several hook points from one forward pass, stopped after the last.

    At hook points of the attention heads, `d` is the heads' outputs side by side.

    Args:
        tokens: right-padded ids `(batch, pos)`.
        mask: `(batch, pos)`, true on real tokens.

    Raises:
        InputError: a hook point that never runs, or gives no activations of each token.
    """
    rows: dict[str, Tensor] = {}

    def grab(name: str) -> HookFunction:
        def hook_fn(tensor: Tensor, *, hook: Any = None) -> Tensor:
            rows[name] = rows_at(name, tensor, tokens.shape)
            return tensor

        return hook_fn

    refuse_encoder_decoder(model)
    device = model_device(model)
    with must_run(model, [(name, grab(name)) for name in hooks]) as watched:
        model.run_with_hooks(
            tokens.to(device),
            return_type=None,
            attention_mask=mask.to(device, torch.long),
            fwd_hooks=watched,
            stop_at_layer=stop_layer(hooks),
        )
    return rows


@of_others()
@torch.no_grad()
def token_nll(model: Model, tokens: Tensor, mask: Tensor, hooks: Hooks = (), *, wanted: Tensor | None = None) -> Tensor:
    """Negative log-likelihood in nats of each next token, `(batch, pos - 1)` float32; 0 where it is not wanted.

    Only wanted positions are unembedded: with a vocabulary of 262,144 the logits of a position take a megabyte.

    Args:
        tokens: right-padded ids `(batch, pos)`.
        mask: `(batch, pos)`, true on real tokens.
        hooks: hook points and functions that run in the pass.
        wanted: `(batch, pos - 1)`, true at the tokens after the first whose loss is needed; by default all real ones.

    Raises:
        InputError: a hook point that never runs, or a model that does not predict the next token.
    """
    check_predicts(model)
    device = model_device(model)
    wanted = mask[:, 1:].bool() if wanted is None else wanted & mask[:, 1:].bool()
    nll = torch.zeros(wanted.shape, dtype=torch.float32)
    if not wanted.any():
        return nll
    rows = torch.nn.functional.pad(wanted, (0, 1)).to(device)  # nothing follows the last token
    with must_run(model, hooks) as watched, _unembedding_only(model, rows, hooks):
        logits = model.run_with_hooks(
            tokens.to(device),
            return_type="logits",
            attention_mask=mask.to(device, torch.long),
            fwd_hooks=watched,
        )
    logits = logits[rows] if logits.shape[:2] == rows.shape else logits[0]
    targets = tokens[:, 1:][wanted].to(device)
    # In float32, by pieces that stay in a processor's cache.
    step = max(1, _PIECE // logits.shape[-1]) if device.type == "cpu" else len(logits)
    pieces = zip(logits.split(step), targets.split(step), strict=True)
    losses = [torch.nn.functional.cross_entropy(a.float(), b, reduction="none") for a, b in pieces]
    nll[wanted] = torch.cat(losses).cpu()
    return nll


@contextmanager
def _unembedding_only(model: Model, rows: Tensor, hooks: Hooks) -> Iterator[None]:
    """Give the unembedding these positions alone, as one row `(1, n, d)`: what follows it works on each by itself.

    A model without a module of that name, or whose unembedding the caller edits, unembeds all.
    """
    unembed = getattr(model, "unembed", None)
    if not isinstance(unembed, torch.nn.Module) or any(name.startswith("unembed.") for name, _ in hooks):
        yield
        return

    def choose(_module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        given = args[0] if args else None
        if isinstance(given, Tensor) and given.ndim == 3 and given.shape[:2] == rows.shape:
            return (given[rows][None], *args[1:])
        return None

    handle = unembed.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        handle.remove()


def check_predicts(model: Model) -> None:
    """Refuse a model that reads both ways, such as BERT, or in two parts: it has no loss of the next token.

    Raises:
        InputError: it is one.
    """
    refuse_encoder_decoder(model)
    if not getattr(getattr(model, "adapter", None), "supports_generation", True):
        raise InputError("this language model does not predict the next token (a masked language model?): it can be "
                         "collected from, but not generate or be scored")  # fmt: skip
