"""Generation, with keys and values cached only where the cached steps compute what a whole forward pass does."""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from glp_lens.errors import InputError
from glp_lens.lm.description import model_device
from glp_lens.lm.forward import Hooks, check_predicts
from glp_lens.lm.hook_points import must_run, outputs_of_blocks, without_hooks
from glp_lens.lm.protocol import Model
from glp_lens.numerics import of_others
from glp_lens.types import HookFunction

_PROMPT, _STEPS = 12, 3
"""Tokens of the prompt, and steps after it, that the cached path is tried on."""
_TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-2, torch.float16: 0.1}
"""Relative difference that rounding may make; bfloat16 may make 0.2. A lost cache makes one of 0.5 to 1."""
_known: WeakKeyDictionary[Any, dict[tuple[object, ...], bool]] = WeakKeyDictionary()


@of_others()
def generate(
    model: Model,
    tokens: Tensor,
    new_tokens: int,
    *,
    temperature: float = 0.0,
    hooks: Hooks = (),
    seed: int | None = None,
) -> Tensor:
    """Continue prompts of one length by `new_tokens` tokens each, past an EOS too.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        tokens: prompts `(batch, pos)` without padding.
        new_tokens: tokens to add to each.
        temperature: of sampling; 0 takes the likeliest token.
        hooks: hook points and functions that run at each step.
        seed: of sampling.

    Returns:
        Prompts and new tokens, `(batch, pos + new_tokens)`, on the CPU.

    Raises:
        InputError: a model that cannot generate, no prompt or new token, or a hook point that never runs.
    """
    if tokens.ndim != 2 or not tokens.numel() or new_tokens < 1:
        raise InputError(
            f"expected prompts (batch, pos) and one new token at least, got shape {tuple(tokens.shape)}, {new_tokens}"
        )
    device = model_device(model)
    tokens = tokens.to(device)
    cached = caches_keys_and_values(model, tokens[:1])
    devices = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices), must_run(model, hooks) as fns:
        if seed is not None:
            torch.manual_seed(seed % 2**32)  # torch's CPU generator looks at no more bits
        with model.hooks(fwd_hooks=fns):
            return _run(model, tokens, new_tokens, cached=cached, temperature=temperature).cpu()


def caches_keys_and_values(model: Model, prompt: Tensor) -> bool:
    """Whether the model's cached generation computes what forward passes over the whole text do.

    Tried once for each model, dtype and kind of weight processing, on the beginning of `prompt`, with a warning if it
    does not: some versions of libraries, and some architectures, lose the cache without an error. A model without a
    cache runs the whole text at each step, which is correct.

    Args:
        prompt: ids `(1, pos)`.

    Raises:
        InputError: a model that cannot generate.
    """
    check_predicts(model)
    key = (next(iter(model.parameters())).dtype, model_device(model), getattr(model, "compatibility_mode", None))
    known = _known.setdefault(model, {})
    if key not in known:
        with without_hooks(model):
            known[key] = _agrees(model, prompt[:, : max(1, min(_PROMPT, int(model.cfg.n_ctx) - _STEPS))])
        if not known[key]:
            warnings.warn(
                "the cached generation of this language model does not compute what a forward pass over the whole text "
                "does (a known fault of some versions of transformers and transformer-lens): generating without a "
                "cache, which is slower",
                stacklevel=4,
            )
    return known[key]


@torch.no_grad()
def _agrees(model: Model, prompt: Tensor) -> bool:
    layer = int(model.cfg.n_layers) - 1
    name = f"blocks.{layer}.hook_resid_post"
    steps: list[Tensor] = []

    def watch(tensor: Tensor, *, hook: Any = None) -> Tensor:
        steps.append(tensor[:, -1].double())
        return tensor

    watched: list[tuple[str, HookFunction]] = [(name, watch)] if name in model.hook_dict else []
    with model.hooks(fwd_hooks=watched):
        text = _run(model, prompt, _STEPS, cached=True, temperature=0.0)
    if not steps:  # a model that does not call its hooks is compared by what it says
        return torch.equal(text, _run(model, prompt, _STEPS, cached=False, temperature=0.0))
    whole = outputs_of_blocks(model, text[:, :-1], [layer])[layer][0].double()
    cached = torch.cat(steps)[1:]
    # Distances between rows, not norms: a few dimensions that are nearly constant may be most of the norm.
    spread = (whole[1:] - whole[1:].mean(0)).norm(dim=1).mean()
    off = (cached - whole[-len(cached) :]).norm(dim=1).max()
    return bool(off <= _TOLERANCE.get(next(iter(model.parameters())).dtype, 0.2) * spread)


def _run(model: Model, tokens: Tensor, new_tokens: int, *, cached: bool, temperature: float) -> Tensor:
    if cached:
        text: Tensor = model.generate(
            tokens,
            max_new_tokens=new_tokens,
            do_sample=temperature > 0,
            temperature=temperature or 1.0,
            stop_at_eos=False,
            return_type="tokens",
            verbose=False,
        )
        return text
    # Not by `use_past_kv_cache=False`: with it a bridge of a state space model keeps its state all the same.
    for _ in range(new_tokens):
        logits = model(tokens, return_type="logits")[:, -1].float()
        if temperature > 0:
            new = torch.multinomial((logits / temperature).softmax(-1), 1)
        else:
            new = logits.argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, new], dim=1)
    return tokens
