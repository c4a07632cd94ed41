"""Whether a model's modules, put together by `decoder`, compute what its own forward pass does: tried once for each."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from glp_lens.lm.decoder import Decoder
from glp_lens.lm.description import model_device
from glp_lens.lm.hook_points import default_hook, without_hooks
from glp_lens.lm.protocol import Model

_PROMPT, _STEPS = 12, 3
"""Tokens of the prompts, and steps after them."""
TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-2, torch.float16: 0.1}
"""Relative difference that rounding may make in another order of operations; bfloat16 may make 0.2."""
_known: WeakKeyDictionary[Any, dict[tuple[object, ...], bool]] = WeakKeyDictionary()


def usable_decoder(model: Model, length: int) -> Decoder | None:
    """The model's modules in their order, for texts of up to `length` tokens; None where they may not be used alone.

    They may if they compute what the model's forward passes do, also with a hook.
    """
    decoder = Decoder.of(model)
    if decoder is None or length > decoder.longest:
        return None
    known, key = _known.setdefault(model, {}), state(model)
    if key not in known:
        with without_hooks(model):
            known[key] = _agrees(model, decoder)
    return decoder if known[key] else None


def state(model: Model) -> tuple[object, ...]:
    """What a trial's result depends on."""
    dtype = next(iter(model.parameters())).dtype
    return dtype, model_device(model), getattr(model, "compatibility_mode", None)


@torch.no_grad()
def _agrees(model: Model, decoder: Decoder) -> bool:
    """Whether logits, with an edit at the middle layer, are those of a forward pass over the whole text."""
    longest = int(min(model.cfg.n_ctx, decoder.longest)) - _STEPS
    vocabulary = int(model.cfg.d_vocab)
    prompt = torch.arange(1, 1 + max(1, min(_PROMPT, longest)), device=model_device(model))[None]
    prompt = prompt * max(1, vocabulary // (_PROMPT + 1)) % vocabulary
    start = prompt.shape[1] - 1
    prompts = torch.cat([prompt, prompt.flip(1), prompt])
    logits: list[Tensor] = []
    steps = 0

    def choose(given: Tensor) -> Tensor:
        logits.append(given.double())
        return given.argmax(-1)

    def edit_last(tensor: Tensor, *, hook: Any = None) -> Tensor:
        return torch.cat([tensor[:, :-1], 2 * tensor[:, -1:]], dim=1)

    def edit_after(tensor: Tensor, *, hook: Any = None) -> Tensor:
        nonlocal steps
        steps += 1
        return torch.cat([tensor[:, :start], 2 * tensor[:, start:]], dim=1)

    point = default_hook(model)
    try:
        with model.hooks(fwd_hooks=[(point, edit_last)]):
            text = decoder.generate(prompts, _STEPS, choose)[:, :-1]
        with model.hooks(fwd_hooks=[(point, edit_after)]):
            for _, stream in decoder.read(text):
                last = stream[:, start:]
        read = decoder.unembed(decoder.ln_final(last)).double()
    except Exception:  # modules of other shapes, which may fail in any way where they are put together as usual
        return False
    whole = model.run_with_hooks(
        text, return_type="logits", attention_mask=torch.ones_like(text), fwd_hooks=[(point, edit_after)]
    )[:, start:]
    dtype, whole = whole.dtype, whole.double()
    spread = (whole - whole.mean((0, 1))).norm(dim=-1).mean()
    cached = (torch.stack(logits, 1) - whole).norm(dim=-1).max() / spread
    off = (read - whole).norm(dim=-1).max() / spread
    rounding = TOLERANCE.get(dtype, 0.2)
    # Steps do the model's own operations in its order, but on some processors one position alone is rounded otherwise
    # than many: in bfloat16 .05 after the 30 layers of SmolLM2-135M, where a nudge of each value after each block to a
    # number next to it makes .12.
    same_order = 1e-3 if dtype in (torch.float32, torch.float64) else rounding
    return steps == 2 and bool(cached <= same_order) and bool(off <= rounding)
