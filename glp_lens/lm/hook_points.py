"""Hook points: their names, names of the same point, and whether an edit there reaches the residual stream."""

from __future__ import annotations

import difflib
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from glp_lens.arguments import checked
from glp_lens.errors import InputError
from glp_lens.lm.protocol import Model
from glp_lens.numerics import of_others
from glp_lens.types import HookFunction

RESIDUAL = re.compile(r"blocks\.\d+\.(hook_resid_\w+|hook_attn_out|hook_mlp_out|hook_in|hook_out)")
"""Hook points of a block with the width of the residual stream."""
_BLOCK_ENDS = {"hook_in": "hook_resid_pre", "hook_out": "hook_resid_post"}
"""What a TransformerBridge calls a block's input and output: in every architecture the residual stream around it."""
_MID = re.compile(r"blocks\.\d+\.(hook_resid_mid|ln2\.hook_in)")
"""On a HookedTransformer the stream between attention and MLP; on a bridge the input of the norm before the MLP."""
_mid_stream_edits: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
_HEADS = re.compile(r"(.*\.)?(hook_[qkvz]|o\.hook_in)")
"""Hook points of the attention heads, `(batch, pos, head, d_head)`; on a bridge `hook_z` is the input of `o`."""
_NOT_BY_TOKEN = re.compile(r".*hook_(cos|sin|pattern|attn_scores|scores)")
"""Hook points with other axes, whatever their number."""


@checked
def default_hook(model: Model) -> str:
    """The residual stream after the middle layer, index `n_layers / 2 - 1`, as in the paper."""
    return f"blocks.{max(int(model.cfg.n_layers) // 2 - 1, 0)}.hook_resid_post"


@checked
def check_hook(model: Model, hook: str) -> str:
    """The hook point's name, if the model has it; otherwise an error that suggests a similar name.

    Raises:
        InputError: no such hook point, or one that the model calls only once a setting is switched on.
    """
    points = model.hook_dict
    if hook in points:
        reason = getattr(model, "_gated_hook_reason", lambda _: None)(hook)
        if reason is not None:
            raise InputError(f"hook point {hook!r} is switched off in this model: call model.set_{reason}(True) first")
        return hook
    layers = int(model.cfg.n_layers)
    asked = re.match(r"blocks\.(\d+)\.", hook)
    if asked and int(asked[1]) >= layers and re.sub(r"\d+", "0", hook, count=1) in points:
        last = re.sub(r"\d+", str(layers - 1), hook, count=1)
        raise InputError(f"hook point {hook!r} is not in this model, whose layers are 0 to {layers - 1}: did you mean "
                         f"{last!r}?")  # fmt: skip
    default = default_hook(model)
    near = difflib.get_close_matches(hook, list(points), n=1)
    known = near or [name for name in (default, *points) if name in points][:1]
    raise InputError(f"hook point {hook!r} is not in this model: did you mean {known[0]!r}?")


@checked
def names_of(model: Model, hook: str) -> list[str]:
    """All names of a hook point in this model.

    Which names share a point depends on the model: where a norm follows the MLP, `mlp.hook_out` and `hook_mlp_out` are
    two points.
    """
    points = model.hook_dict
    return sorted(name for name, point in points.items() if point is points[hook])


@checked
def same_point(one: str | Iterable[str], other: str | Iterable[str]) -> bool:
    """Whether two hook points are the same, each given by one or all of its names.

    A block's input and output have one name in each class of TransformerLens; other names are the same point only if
    both are in a list that `names_of` gave.
    """
    return not _canonical(one).isdisjoint(_canonical(other))


def _canonical(names: str | Iterable[str]) -> set[str]:
    canonical = set()
    for name in [names] if isinstance(names, str) else names:
        block, _, rest = name.rpartition(".")
        canonical.add(f"{block}.{_BLOCK_ENDS.get(rest, rest)}" if re.fullmatch(r"blocks\.\d+", block) else name)
    return canonical


def stop_layer(hooks: Sequence[str]) -> int | None:
    """The block after the last of these hook points, where a forward pass may stop; None if one is in no block."""
    layers = [re.match(r"blocks\.(\d+)\.", name) for name in hooks]
    return max(int(m.group(1)) for m in layers if m) + 1 if layers and all(layers) else None


def is_mid_stream(name: str) -> bool:
    """Whether an edit at a hook point of this name changes the stream in one class of TransformerLens only."""
    return _MID.fullmatch(name) is not None


def check_edit(model: Model, hook: str) -> None:
    """Refuse a hook point where an edit does not reach the residual stream, though its name suggests it.

    On a TransformerBridge `hook_resid_mid` is the input of the norm before the MLP: what is written there reaches the
    MLP alone. On a HookedTransformer it is the stream.

    Raises:
        InputError: no such hook point, or an edit there does not reach the stream.
    """
    check_hook(model, hook)
    mid_stream = next((name for name in names_of(model, hook) if is_mid_stream(name)), None)
    if mid_stream is not None and not mid_stream_edits_work(model):
        raise off_stream_error(hook)


def off_stream_error(name: str) -> InputError:
    """The error for a hook point where an edit does not reach the residual stream."""
    return InputError(
        f"an edit at {name} (hook_resid_mid) reaches only the MLP of this language model, not the residual stream: use "
        "hook_resid_pre or hook_resid_post, open it as a HookedTransformer, or pass allow_mismatch=True"
    )


def mid_stream_edits_work(model: Model) -> bool:
    """Whether edits between attention and MLP reach the residual stream of this model; tried once for each model."""
    if model not in _mid_stream_edits:
        name = next((name for name in model.hook_dict if is_mid_stream(name)), None)
        _mid_stream_edits[model] = name is not None and _reaches_stream(model, name, int(name.split(".")[1]))
    return _mid_stream_edits[model]


@torch.no_grad()
def _reaches_stream(model: Model, hook: str, layer: int) -> bool:
    """Whether very large values written at a hook point are still there after the block."""
    device = next(iter(model.parameters())).device
    ids = torch.arange(4, device=device)[None]
    clean = outputs_of_blocks(model, ids, [layer]).get(layer)
    if clean is None:  # a model that does not call its hooks
        return False
    large = 1e3 * float(clean.abs().max())

    def write(tensor: Tensor, *, hook: Any = None) -> Tensor:
        return torch.linspace(-large, large, tensor.shape[-1], dtype=torch.float32).to(tensor).expand_as(tensor)

    moved = outputs_of_blocks(model, ids, [layer], [(hook, write)])[layer]
    return float((moved - clean).abs().max()) > 0.1 * large


@of_others()
def outputs_of_blocks(
    model: Model, tokens: Tensor, layers: Sequence[int], edits: Sequence[tuple[str, HookFunction]] = ()
) -> dict[int, Tensor]:
    """The residual stream after some blocks, `(batch, pos, d)`, of those that the model calls hooks for."""
    outputs: dict[int, Tensor] = {}

    def keep(layer: int) -> HookFunction:
        def hook_fn(tensor: Tensor, *, hook: Any = None) -> Tensor:
            outputs[layer] = tensor
            return tensor

        return hook_fn

    there = [
        (name, keep(layer))
        for layer in layers
        for name in [f"blocks.{layer}.{end}" for end in ("hook_resid_post", "hook_out")]
        if name in model.hook_dict
    ]
    with without_hooks(model):
        model.run_with_hooks(
            tokens,
            return_type=None,
            attention_mask=torch.ones_like(tokens),
            fwd_hooks=[*edits, *there],
            stop_at_layer=stop_layer([name for name, _ in there]),
        )
    return outputs


@contextmanager
def without_hooks(model: Model) -> Iterator[None]:
    """Suspend the hooks that are set on a model, so that trial runs neither trigger them nor are changed by them."""
    points = {id(point): point for point in model.hook_dict.values()}.values()
    kept = [(point, point._forward_hooks) for point in points]
    try:
        for point in points:
            point._forward_hooks = OrderedDict()
        yield
    finally:
        for point, hooks in kept:
            point._forward_hooks = hooks


@contextmanager
def must_run(model: Model, hooks: Sequence[tuple[str, HookFunction]]) -> Iterator[list[tuple[str, HookFunction]]]:
    """Hooks that raise an error at the end of the block if they never ran, rather than silently edit nothing.

    Raises:
        InputError: no such hook point, or one that the model lists and did not call.
    """
    for name, _ in hooks:
        check_hook(model, name)
    calls = dict.fromkeys((name for name, _ in hooks), 0)

    def count(name: str, function: HookFunction) -> HookFunction:
        def hook_fn(tensor: Tensor, *, hook: Any = None) -> Tensor:
            calls[name] += 1
            return function(tensor, hook=hook)

        return hook_fn

    yield [(name, count(name, function)) for name, function in hooks]
    if silent := [name for name, n in calls.items() if n == 0]:
        raise InputError(f"hook point {silent[0]} never ran: this model lists it and does not call it, "
                         "choose another one")  # fmt: skip


def rows_at(name: str, value: Any, shape: torch.Size | None = None) -> Tensor:
    """The value at a hook point as rows `(batch, pos, d)`, with attention heads concatenated.

    Args:
        name: the hook point.
        value: what the hook function received there.
        shape: `(batch, pos)` of the tokens, if known.

    Raises:
        InputError: it is not one row of activations for each token.
    """
    if isinstance(value, Tensor) and not _NOT_BY_TOKEN.fullmatch(name) and shape in (None, value.shape[:2]):
        of_heads = value.ndim == 4 and _HEADS.fullmatch(name)
        if value.ndim == 3 or of_heads:
            return value.flatten(2)
    got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    raise InputError(f"hook point {name} gives {got}, expected (batch, pos, d): choose another one")
