"""Hook functions for TransformerLens: edit, project or replace the activations at a hook point.

Every function here returns a `(tensor, *, hook)` function that gives back a new tensor with the dtype,
device and shape it was given. They work alike on `HookedTransformer` and `TransformerBridge`, and inside
`generate`, where the first call sees the whole prompt and later calls one position.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from glp_lens.errors import InputError

HookFunction = Callable[..., Tensor]
Positions = Literal["all", "last"]
RowNoise = Callable[[int, int], Tensor]
"""(index of the hook call, number of rows) -> standard normal noise of shape (rows, d_in)."""


class _Projects(Protocol):
    """What a hook needs of a projector."""

    @property
    def d_in(self) -> int: ...
    @property
    def hook(self) -> str | None: ...
    @property
    def max_norm(self) -> float | None: ...
    @property
    def project(self) -> Callable[..., Tensor]: ...


_ALIASES = {
    "hook_in": "hook_resid_pre",
    "hook_out": "hook_resid_post",
    "ln2.hook_in": "hook_resid_mid",
    "attn.hook_out": "hook_attn_out",
    "mlp.hook_out": "hook_mlp_out",
}
"""What TransformerBridge calls hook points of a block, and their older names, which work there too."""


def same_point(one: str, other: str) -> bool:
    """Whether two names may mean one hook point: false only where they surely do not.

    A TransformerBridge has further aliases that depend on the architecture, all for names that end in `hook_in` or
    `hook_out`: of such a name and an older one only the layers are compared, save for the residual stream.
    """
    (layer, name), (other_layer, other_name) = _parts(one), _parts(other)
    if layer != other_layer:
        return False
    own = [n.rsplit(".", 1)[-1] in ("hook_in", "hook_out") for n in (name, other_name)]
    residual = {"hook_resid_pre", "hook_resid_post"} & {name, other_name}
    return name == other_name or (own[0] != own[1] and not residual)


def _parts(name: str) -> tuple[str, str]:
    """The layer, empty outside of the blocks, and the rest of the name."""
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    return (found[1], _ALIASES.get(found[2], found[2])) if found else ("", name)


def edit(function: Callable[[Tensor], Tensor], positions: Positions = "last") -> HookFunction:
    """A hook that replaces rows `(n, d_in)` of the stream by `function(rows)`.

    Args:
        function: maps float32 rows `(n, d_in)`, batch-major, to rows of the same shape.
        positions: `"last"` edits the last position of each call, as the released GLP code does;
            `"all"` edits every position except the first of a call longer than one, which holds BOS,
            an attention sink far off the manifold that nothing should move.
    """
    if positions not in ("all", "last"):
        raise InputError(f"positions must be 'all' or 'last', got {positions!r}")

    def hook_fn(tensor: Tensor, *, hook: Any = None) -> Tensor:
        start = tensor.shape[1] - 1 if positions == "last" else min(1, tensor.shape[1] - 1)
        part = tensor[:, start:]
        rows = part.reshape(-1, part.shape[-1])
        new = function(rows.float()).reshape(part.shape).to(device=tensor.device, dtype=tensor.dtype)
        return torch.cat([tensor[:, :start], new], dim=1)

    return hook_fn


def project(
    projector: _Projects,
    positions: Positions = "last",
    noise: RowNoise | None = None,
    *,
    allow_mismatch: bool = False,
    **options: Any,
) -> HookFunction:
    """A hook that puts activations back on the projector's manifold.

    Rows with a norm above the projector's `max_norm` (the massive activations that its training data left
    out) pass unchanged: the prior never saw their like.

    A row's default noise depends on the calls before it and on the batch it is in, so the same text may come
    out differently elsewhere; passing `noise` makes it repeatable row by row.

    Args:
        projector: any model with the `Projector` capability.
        noise: noise for each call; without it, noise is drawn from the options' `generator`, or from one
            seeded with 0 that lives as long as the hook.
        allow_mismatch: work at another hook point than the projector was trained at.
        options: passed on to `projector.project`, for example `sigma=0.3` or `u=0.5, steps=20`.

    Raises:
        InputError: on a call, if the stream's width or the hook point is not the projector's.
    """
    calls = 0
    if noise is None:
        options.setdefault("generator", torch.Generator().manual_seed(0))

    def function(rows: Tensor) -> Tensor:
        nonlocal calls
        if rows.shape[1] != projector.d_in:
            raise InputError(
                f"this {type(projector).__name__} was trained on width {projector.d_in}, the hook point has "
                f"width {rows.shape[1]}: use the model and hook point it was trained on"
            )
        own = {} if noise is None else {"noise": noise(calls, rows.shape[0])}
        calls += 1
        new = projector.project(rows, **own, **options).to(rows.device, rows.dtype)
        if projector.max_norm is not None:
            massive = rows.norm(dim=1, keepdim=True) > projector.max_norm
            new = torch.where(massive, rows, new)
        return new

    run = edit(function, positions)

    def hook_fn(tensor: Tensor, *, hook: Any = None) -> Tensor:
        name = getattr(hook, "name", None)
        if not allow_mismatch and name and projector.hook and not same_point(projector.hook, name):
            raise InputError(
                f"this {type(projector).__name__} was trained at {projector.hook}, here is {name}: use the hook point "
                "it was trained at, or pass allow_mismatch=True"
            )
        return run(tensor, hook=hook)

    return hook_fn


def steer(
    direction: Tensor,
    strength: float | Tensor,
    projector: _Projects | None = None,
    positions: Positions = "last",
    noise: RowNoise | None = None,
    *,
    allow_mismatch: bool = False,
    **options: Any,
) -> HookFunction:
    """A hook that adds `strength * direction`, then lets `projector` repair the result.

    Args:
        direction: `(d_in,)`, in activation units. The paper adds `alpha * act_norm * w` with a unit `w`:
            pass `direction = act_norm * w`, with the median norm of the store as `act_norm`.
        strength: one number, or `(batch,)` with one strength for each sequence.
        projector: any model with the `Projector` capability, or None to steer without repair. Where the
            strength is 0, nothing is projected either.
        allow_mismatch: work at another hook point than the projector was trained at.
        options: passed on to `projector.project`.

    Raises:
        InputError: if `direction` is not a finite vector; on a call with the wrong width or batch size, or at
            another hook point than the projector's.
    """
    if direction.ndim != 1 or not torch.isfinite(direction).all():
        raise InputError(f"direction must be a finite vector (d_in,), got shape {tuple(direction.shape)}")
    repair = None
    if projector is not None:
        repair = project(projector, positions, noise, allow_mismatch=allow_mismatch, **options)

    def hook_fn(tensor: Tensor, *, hook: Any = None) -> Tensor:
        if tensor.shape[-1] != direction.shape[0]:
            raise InputError(f"direction has width {direction.shape[0]}, the hook point has width {tensor.shape[-1]}")
        alpha = torch.as_tensor(strength, dtype=torch.float32, device=tensor.device)
        if alpha.ndim and alpha.shape[0] != tensor.shape[0]:
            raise InputError(f"got {alpha.shape[0]} strengths for a batch of {tensor.shape[0]}")
        alpha = alpha.reshape(-1, 1, 1).expand(tensor.shape[0], 1, 1)
        step = alpha * direction.to(tensor.device, torch.float32)

        def add(rows: Tensor) -> Tensor:
            return (rows.reshape(tensor.shape[0], -1, rows.shape[1]) + step).reshape(rows.shape)

        moved = edit(add, positions)(tensor)
        if repair is not None:
            moved = torch.where(alpha != 0, repair(moved, hook=hook), moved)
        return moved

    return hook_fn


def replace(values: Tensor, mask: Tensor) -> HookFunction:
    """A hook that writes `values` over the stream wherever `mask` is true.

    Args:
        values: `(batch, pos, d_in)`, or any shape that broadcasts to it.
        mask: `(batch, pos)` booleans.
    """

    def hook_fn(tensor: Tensor, *, hook: Any = None) -> Tensor:
        new = values.to(tensor.device, tensor.dtype)
        return torch.where(mask.to(tensor.device)[..., None], new, tensor)

    return hook_fn
