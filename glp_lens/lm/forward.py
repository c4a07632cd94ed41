"""Forward passes of a language model: activations at hook points, and the loss of each token."""

from __future__ import annotations

from collections.abc import Sequence
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
def token_nll(model: Model, tokens: Tensor, mask: Tensor, hooks: Hooks = ()) -> Tensor:
    """Negative log-likelihood in nats of each next token, `(batch, pos - 1)` float32; 0 on padding.

    Raises:
        InputError: a hook point that never runs, or a model that does not predict the next token.
    """
    check_predicts(model)
    device = model_device(model)
    with must_run(model, hooks) as watched:
        logits = model.run_with_hooks(
            tokens.to(device),
            return_type="logits",
            attention_mask=mask.to(device, torch.long),
            fwd_hooks=watched,
        )
    targets = tokens[:, 1:].to(device)
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="none")
    return nll.reshape(targets.shape).cpu() * mask[:, 1:]


def check_predicts(model: Model) -> None:
    """Refuse a model that reads both ways, such as BERT, or in two parts: it has no loss of the next token.

    Raises:
        InputError: it is one.
    """
    refuse_encoder_decoder(model)
    if not getattr(getattr(model, "adapter", None), "supports_generation", True):
        raise InputError("this language model does not predict the next token (a masked language model?): it can be "
                         "collected from, but not generate or be scored")  # fmt: skip
