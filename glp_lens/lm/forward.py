"""Forward passes of a language model: activations at hook points, and the loss of each token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from glp_lens.arguments import checked
from glp_lens.errors import InputError
from glp_lens.lm.decoder import Decoder
from glp_lens.lm.description import model_device, refuse_encoder_decoder
from glp_lens.lm.hook_points import check_hook, must_run, rows_at, stop_layer
from glp_lens.lm.protocol import Model
from glp_lens.lm.trial import usable_decoder
from glp_lens.numerics import of_others
from glp_lens.types import HookFunction

Hooks = Sequence[tuple[str, HookFunction]]
Way = Literal["modules", "model"]
"""Whether texts are read by the modules of the weights alone (`decoder`), or by the model's own forward pass."""
_PIECE = 2**20
"""Logits whose loss is taken at once on a CPU."""


@of_others()
@torch.no_grad()
@checked
def activations(
    model: Model, tokens: Tensor, mask: Tensor, hooks: Sequence[str], way: Way | None = None
) -> dict[str, Tensor]:
    """Activations `(batch, pos, d)` at several hook points from one forward pass, stopped after the last.

    At hook points of the attention heads, `d` is the heads' outputs side by side.

    Args:
        tokens: right-padded ids `(batch, pos)`.
        mask: `(batch, pos)`, true on real tokens.
        way: `"model"` asks for the model's own forward pass, also where its modules alone compute the same.

    Raises:
        InputError: a hook point that never runs, or gives no activations of each token.
    """
    refuse_encoder_decoder(model)
    device = model_device(model)
    tokens, mask = tokens.to(device), mask.to(device)
    points = _points(model, hooks)
    decoder = None if way == "model" else _decoder(model, mask, points)
    if decoder is not None:
        return _read(decoder, tokens, points)
    rows: dict[str, Tensor] = {}

    def grab(name: str) -> HookFunction:
        def hook_fn(tensor: Tensor, *, hook: Any = None) -> Tensor:
            rows[name] = rows_at(name, tensor, tokens.shape)
            return tensor

        return hook_fn

    with must_run(model, [(name, grab(name)) for name in hooks]) as watched:
        model.run_with_hooks(
            tokens,
            return_type=None,
            attention_mask=mask.long(),
            fwd_hooks=watched,
            stop_at_layer=stop_layer(hooks),
        )
    return rows


def keeping(name: str, shape: torch.Size, seen: list[Tensor]) -> HookFunction:
    """A hook function that adds the rows `(batch, pos, d)` of a hook point to `seen`, float32 on the CPU.

    Args:
        name: of the hook point.
        shape: `(batch, pos)` of the texts.
        seen: the list to add to, at each call.
    """

    def hook_fn(tensor: Tensor, *, hook: Any = None) -> Tensor:
        seen.append(rows_at(name, tensor, shape).detach().float().cpu())
        return tensor

    return hook_fn


def _points(model: Model, hooks: Sequence[str]) -> dict[str, torch.nn.Module | None]:
    """Each name's hook point, which several may share; None for a name that the model does not have."""
    points = model.hook_dict  # a bridge makes it anew each time, in milliseconds
    return {name: points.get(name) for name in hooks}


def _read(decoder: Decoder, tokens: Tensor, points: Mapping[str, torch.nn.Module | None]) -> dict[str, Tensor]:
    """Activations at hook points of the residual stream, no further than the last of them."""
    rows: dict[str, Tensor] = {}
    for point, stream in decoder.read(tokens):
        rows |= {name: rows_at(name, stream, tokens.shape) for name, its in points.items() if its is point}
        if len(rows) == len(points):
            break
    return rows


@of_others()
def way_of_reading(model: Model, hooks: Sequence[str], length: int) -> Way:
    """How `activations` reads texts of up to `length` tokens at these hook points."""
    decoder = _decoder(model, torch.ones(1, length, dtype=torch.bool), _points(model, hooks))
    return "model" if decoder is None else "modules"


def _decoder(model: Model, mask: Tensor, points: Mapping[str, torch.nn.Module | None]) -> Decoder | None:
    """The model's modules, if they compute what its forward pass does on texts of this mask, and call all hooks.

    Args:
        points: hook points that are to be read.
    """
    if bool((mask[:, 1:] > mask[:, :-1]).any()):
        return None  # padding on the left, or within
    decoder = usable_decoder(model, mask.shape[1])
    usable = decoder is not None and set(points.values()) <= decoder.points and decoder.calls_all_hooks_of(model)
    return decoder if usable else None


@of_others()
@torch.no_grad()
@checked
def token_nll(
    model: Model,
    tokens: Tensor,
    mask: Tensor,
    hooks: Hooks = (),
    *,
    wanted: Tensor | None = None,
    known: tuple[str, Tensor] | None = None,
) -> Tensor:
    """Negative log-likelihood in nats of each next token, `(batch, pos - 1)` float32; 0 where it is not wanted.

    Args:
        tokens, mask, hooks, wanted, known: see `next_logits`.

    Raises:
        InputError: as `next_logits`.
    """
    wanted = mask[:, 1:].bool() if wanted is None else wanted & mask[:, 1:].bool()
    losses = torch.zeros(wanted.shape, dtype=torch.float32)
    if wanted.any():
        logits = next_logits(model, tokens, mask, hooks, wanted=wanted, known=known)
        losses[wanted] = nll(logits, tokens[:, 1:][wanted])
    return losses


@of_others()
@torch.no_grad()
@checked
def next_logits(
    model: Model,
    tokens: Tensor,
    mask: Tensor,
    hooks: Hooks = (),
    *,
    wanted: Tensor,
    known: tuple[str, Tensor] | None = None,
) -> Tensor:
    """Logits `(n, d_vocab)` of next tokens, on the model's device and in its number format.

    Only wanted positions are unembedded: with a vocabulary of 262,144 the logits of a position take a megabyte.

    Args:
        tokens: right-padded ids `(batch, pos)`.
        mask: `(batch, pos)`, true on real tokens.
        hooks: hook points and functions that run in the pass.
        wanted: `(batch, pos - 1)`, true at the tokens after the first that are to be predicted, n of them.
        known: a hook point of the residual stream and what it holds after these hooks, `(batch, pos, d)`: the pass
            begins there, without the blocks before and without the hooks, where the modules can run alone.

    Raises:
        InputError: a hook point that never runs, or a model that does not predict the next token.
    """
    check_predicts(model)
    device = model_device(model)
    rows = torch.nn.functional.pad(wanted, (0, 1)).to(device)  # nothing follows the last token
    tokens, mask = tokens.to(device), mask.to(device)
    if known is not None:
        check_hook(model, known[0])
        points = _points(model, [known[0]])
        decoder, point = _decoder(model, mask, points), points[known[0]]
        if decoder is not None and point is not None:
            return decoder.logits(decoder.read(tokens, (point, known[1].to(device, decoder.dtype))), rows)
    with must_run(model, hooks) as watched:
        decoder = usable_decoder(model, tokens.shape[1])  # before hooks are set, which a trial suspends
        if decoder is not None:
            with model.hooks(fwd_hooks=list(watched)):
                if _decoder(model, mask, {}) is not None:
                    return decoder.logits(decoder.read(tokens), rows)
        with _unembedding_only(model, rows, hooks):
            logits = model.run_with_hooks(tokens, return_type="logits", attention_mask=mask.long(), fwd_hooks=watched)
        found: Tensor = logits[rows] if logits.shape[:2] == rows.shape else logits[0]
        return found


@checked
def nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood `(n,)` in nats of token ids `(n,)`, float32 on the CPU, from logits `(n, d_vocab)`."""
    pairs = zip(_pieces(logits), _pieces(logits, targets.to(logits.device)), strict=True)
    return torch.cat([torch.nn.functional.cross_entropy(a.float(), b, reduction="none") for a, b in pairs]).cpu()


def log_probabilities(logits: Tensor) -> Tensor:
    """Of logits `(n, d_vocab)`, in float32."""
    return torch.cat([piece.float().log_softmax(1) for piece in _pieces(logits)])


def divergence(log_p: Tensor, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of token ids under predictions, and how far these are from others.

    Args:
        log_p: `log_probabilities` of the others, `(n, d_vocab)`.
        logits: of the predictions, likewise.
        targets: token ids `(n,)`.

    Returns:
        Negative log-likelihood and KL divergence from the others, `(n,)` float32 in nats, on the CPU.
    """
    losses, kl = [], []
    for p, b, t in zip(_pieces(log_p), _pieces(log_p, logits), _pieces(log_p, targets.to(log_p.device)), strict=True):
        q = b.float().log_softmax(1)
        losses.append(-q.gather(1, t[:, None])[:, 0])
        kl.append((p.exp() * (p - q)).sum(1))
    return torch.cat(losses).cpu(), torch.cat(kl).cpu()


def _pieces(logits: Tensor, values: Tensor | None = None) -> tuple[Tensor, ...]:
    """`values`, or the logits, in pieces of rows whose logits in float32 stay in a processor's cache."""
    step = max(1, _PIECE // logits.shape[-1]) if logits.device.type == "cpu" else max(1, len(logits))
    pieces: tuple[Tensor, ...] = (logits if values is None else values).split(step)
    return pieces


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
