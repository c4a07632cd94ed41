"""Generation, with keys and values cached only where the cached steps compute what a whole forward pass does.

There are three ways, from fast to slow: the modules of the weights one after the other (`decoder`), the model's own
`generate` with its cache, and the whole text at each step. Each faster one is tried against whole forward passes first.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from glp_lens.arguments import checked
from glp_lens.errors import InputError
from glp_lens.lm.description import model_device
from glp_lens.lm.forward import Hooks, check_predicts
from glp_lens.lm.hook_points import must_run, outputs_of_blocks, without_hooks
from glp_lens.lm.protocol import Model
from glp_lens.lm.trial import TOLERANCE, state, usable_decoder
from glp_lens.numerics import of_others
from glp_lens.types import HookFunction

_PROMPT, _STEPS = 12, 3
"""Tokens of the prompt, and steps after it, that the cached path is tried on."""
_known: WeakKeyDictionary[Any, dict[tuple[object, ...], bool]] = WeakKeyDictionary()


@of_others()
@checked
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
        InputError: a model that cannot generate, no prompt or new token, a hook point that never runs, or sampling
            from logits that are not finite.
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
        decoder = usable_decoder(model, tokens.shape[1] + new_tokens) if cached else None
        with model.hooks(fwd_hooks=fns):
            if decoder is not None and decoder.calls_all_hooks_of(model):
                return decoder.generate(tokens, new_tokens, _choice(temperature)).cpu()
            return _run(model, tokens, new_tokens, cached=cached, temperature=temperature).cpu()


def _choice(temperature: float) -> Callable[[Tensor], Tensor]:
    """The next tokens of logits `(batch, d_vocab)`, as TransformerLens chooses them."""

    def choose(logits: Tensor) -> Tensor:
        if temperature > 0:
            scaled = _usable((logits / temperature).float())
            drawn: Tensor = torch.distributions.Categorical(logits=scaled).sample()
            return drawn
        return logits.max(-1).indices  # the first of equal ones as `argmax`, which is four times as slow

    return choose


def _usable(logits: Tensor) -> Tensor:
    """Logits `(batch, d_vocab)` that can be sampled from: an activation that overflows makes all of them NaN."""
    if not bool(logits.amax(-1).isfinite().all()):
        raise _no_distribution()
    return logits


def _no_distribution() -> InputError:
    return InputError(
        "the language model gives logits that are not finite, from which no token can be sampled: choose a smaller "
        "strength, or open the model in float32"
    )


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
    known, key = _known.setdefault(model, {}), state(model)
    if key not in known:
        with without_hooks(model):
            known[key] = _agrees(model, _beginning(model, prompt))
        if not known[key]:
            warnings.warn(
                "the cached generation of this language model does not compute what a forward pass over the whole text "
                "does (a known fault of some versions of transformers and transformer-lens): generating without a "
                "cache, which is slower",
                stacklevel=5,
            )
    return known[key]


def _beginning(model: Model, prompt: Tensor) -> Tensor:
    return prompt[:, : max(1, min(_PROMPT, int(model.cfg.n_ctx) - _STEPS))]


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
    return bool(off <= TOLERANCE.get(next(iter(model.parameters())).dtype, 0.2) * spread)


def _run(model: Model, tokens: Tensor, new_tokens: int, *, cached: bool, temperature: float) -> Tensor:
    if cached:
        try:
            text: Tensor = model.generate(
                tokens,
                max_new_tokens=new_tokens,
                do_sample=temperature > 0,
                temperature=temperature or 1.0,
                stop_at_eos=False,
                return_type="tokens",
                verbose=False,
            )
        except (ValueError, RuntimeError) as error:
            # What torch's Categorical and multinomial say of NaN and infinity.
            if temperature > 0 and re.search(r"found invalid values|contains either `inf`, `nan`", str(error)):
                raise _no_distribution() from None
            raise
        return text
    # Not by `use_past_kv_cache=False`: with it a bridge of a state space model keeps its state all the same.
    for _ in range(new_tokens):
        logits = model(tokens, return_type="logits")[:, -1].float()
        if temperature > 0:
            new = torch.multinomial(_usable(logits / temperature).softmax(-1), 1)
        else:
            new = logits.argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, new], dim=1)
    return tokens
