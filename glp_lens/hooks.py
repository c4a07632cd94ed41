"""Hook functions for TransformerLens: edit, project or replace the activations at a hook point.

Every function here returns a `(tensor, *, hook)` function that gives back a new tensor with the dtype, device and shape
it was given. They work on `HookedTransformer` and `TransformerBridge` alike, also at hook points of the attention
heads, whose outputs stand side by side in a row, and inside `generate`: with a cache, where the first call sees the
whole prompt and later ones one position, and without, where every call sees the whole text and earlier positions get
the values that they were given before.

An edit changes the language model only if it is made on the residual stream, at `hook_resid_pre` or `hook_resid_post`,
or at what is added to it. `hook_resid_mid` is the stream on a HookedTransformer alone, so it is refused unless the
language model is passed and found to use the edit.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from glp_lens import lm, provenance
from glp_lens.errors import InputError
from glp_lens.lm import same_point
from glp_lens.types import HookFunction

__all__ = ["HookFunction", "Positions", "RowNoise", "edit", "project", "projection", "replace", "same_point", "steer"]

Positions = Literal["all", "last"]
RowNoise = Callable[[int, int], Tensor]
"""(index of the hook call, number of rows) -> standard normal noise of shape (rows, d_in)."""
_Edit = Callable[[Tensor, Tensor], Tensor]
"""(float32 rows `(n, d_in)`, the batch index of each `(n,)`) -> new rows."""
_Places = tuple[Tensor, Tensor]
"""Index of the text and position in it of each row, `(n,)` both."""
_Edited = tuple[_Places, Tensor]
"""Where rows were written, and the rows `(n, d_in)`."""
_ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Relative difference of equal activations computed in batches of other shapes; 16-bit formats make up to 0.05."""


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


def edit(
    function: Callable[[Tensor], Tensor],
    positions: Positions = "last",
    mask: Tensor | None = None,
    *,
    model: lm.Model | None = None,
    allow_mismatch: bool = False,
) -> HookFunction:
    """A hook that replaces rows `(n, d_in)` of the stream by `function(rows)`.

    A call with the text of the call before and one token more, as in generation without a cache, edits the new token
    and gives the others what they were given before, unless gradients are enabled. For independent calls,
    make a hook for each.

    Args:
        function: maps float32 rows `(n, d_in)`, batch-major, to rows of the same shape.
        positions: `"last"` edits the last position of each call, as the released GLP code does; `"all"` edits every
            position except the first of a call longer than one, which holds BOS, an attention sink far off the manifold
            that nothing should move.
        mask: `(batch, pos)` of the prompts, true on tokens and false on padding: then first and last are those of each
            text. A hook cannot see padding, though it warns of what looks like it on the left. Needed for batches that
            are padded on the left with `"all"`, on the right with `"last"`. Generated positions are always tokens.
        model: the language model it is for, needed at `hook_resid_mid`.
        allow_mismatch: edit also where the edit does not reach the residual stream.

    Raises:
        InputError: unknown positions; on a call: a mask of another shape, a hook point off the stream, or one that
            gives no activations of each token.

    Examples:
        >>> import torch
        >>> from glp_lens import hooks
        >>> double = hooks.edit(lambda rows: 2 * rows)
        >>> double(torch.ones(1, 2, 3), hook=None)  # edits the last position
        tensor([[[1., 1., 1.],
                 [2., 2., 2.]]])
    """
    return _edit(lambda rows, _: function(rows), positions, mask, model, allow_mismatch=allow_mismatch)


def _edit(
    function: _Edit, positions: Positions, mask: Tensor | None, model: lm.Model | None, *, allow_mismatch: bool
) -> HookFunction:
    if positions not in ("all", "last"):
        raise InputError(f"positions must be 'all' or 'last', got {positions!r}")
    if mask is not None:
        mask = torch.as_tensor(mask)
        if mask.ndim != 2 or not bool(mask.any(1).all()):
            raise InputError(f"mask must be (batch, pos) with a token in every row, got shape {tuple(mask.shape)}")
    # Tried here: within a call, the model's other hooks would run too.
    edits_work = None if model is None else lm.mid_stream_edits_work(model)
    texts: defaultdict[str, _Text] = defaultdict(_Text)  # one function may stand at several hook points
    warned = mask is not None

    def hook_fn(tensor: Tensor, *, hook: Any = None) -> Tensor:
        nonlocal warned
        name = getattr(hook, "name", None) or ""
        x, text = _rows_to_edit(tensor, name, edits_work, allow_mismatch=allow_mismatch), texts[name]
        known = text.continued_by(x, mask)
        at = _select(x, positions, mask) if known is None else _last_column(x)
        if known is None and not warned and positions == "all" and not _begin_alike(x):
            warned = True
            warnings.warn(
                f"the texts of a batch do not begin with one token at {name or 'a hook point'}, as if padded on the "
                "left: positions='all' edits all positions but the first, padding and the BOS of shorter texts too; "
                "pass mask= (batch, pos), true on tokens",
                stacklevel=2,
            )
        rows = x[:, 0] if x.shape[1] == 1 else x[at]
        edited = function(rows.float(), at[0])
        if edited.shape != rows.shape:
            raise InputError(f"an edit must give back rows of shape {tuple(rows.shape)}, got {tuple(edited.shape)}")
        edited = edited.to(device=x.device, dtype=x.dtype)
        if known is not None:
            at, edited = _joined(known, (at, edited))
        text.remember(x, at, edited)
        if x.shape[1] == 1:
            return edited.reshape(tensor.shape)
        new = x.clone()
        new[at] = edited
        return new.reshape(tensor.shape)

    return hook_fn


def _rows_to_edit(tensor: Any, name: str, edits_work: bool | None, *, allow_mismatch: bool) -> Tensor:
    """The value at a hook point as `(batch, pos, d)`; an error where an edit does not, or may not, reach the stream."""
    rows = lm.rows_at(name, tensor)
    if allow_mismatch or edits_work or not lm.is_mid_stream(name):
        return rows
    if edits_work is not None:
        raise lm.off_stream_error(name)
    raise InputError(
        f"an edit at {name} (hook_resid_mid) reaches the residual stream on a HookedTransformer, and only the MLP on a "
        "TransformerBridge: pass model=, use hook_resid_pre or hook_resid_post, or pass allow_mismatch=True"
    )


class _Text:
    """The texts of the last call, to see whether the next one has the same texts and one token more of each.

    This is what generation without a cache looks like, where each step runs the whole text again: earlier positions
    must be given the same values once more, as a cache would have kept them.
    """

    def __init__(self) -> None:
        self.signature: Tensor | None = None
        self.edited: _Edited | None = None

    def continued_by(self, x: Tensor, mask: Tensor | None) -> _Edited | None:
        """What was written, if activations `(batch, pos, d)` are of the texts of the last call and one token more.

        Not where gradients are enabled: a training step needs those of all its positions.
        """
        then = self.signature
        if then is None or torch.is_grad_enabled() or len(x) != len(then) or x.shape[1] != then.shape[1] + 1:
            return None
        # Distances between rows, not norms: a few dimensions that are nearly constant may be most of the norm.
        usual = then[:, 1:] if then.shape[1] > 2 else then  # without the attention sink
        centre = usual.nanmean((0, 1)) if then.shape[:2].numel() > 1 else 0.0
        scale = torch.maximum((then - centre).norm(dim=-1), (usual - centre).norm(dim=-1).nanmean())
        equal = (_signature(x[:, :-1]) - then).norm(dim=-1) <= _ROUNDING.get(x.dtype, 0.05) * scale
        if mask is not None and mask.shape[1] <= then.shape[1]:
            equal[:, : mask.shape[1]] |= ~mask.to(x.device, torch.bool)
        # Without a mask there may be padding on the left, whose values mean nothing and depend on the length.
        whole = equal.all(1).all() if mask is not None else equal.all(1).any() & equal[:, -2:].all()
        return self.edited if bool(whole) else None

    def remember(self, x: Tensor, at: _Places, edited: Tensor) -> None:
        """Keep a signature of these texts, and the rows that were written."""
        self.signature = None if torch.is_grad_enabled() else _signature(x)
        self.edited = (at, edited)


def _signature(x: Tensor) -> Tensor:
    """A few numbers of each row, `(batch, pos, 8)`, that differ where rows do: fixed random projections."""
    return x.float() @ _projections(x.shape[-1], x.device)


@lru_cache(maxsize=8)
def _projections(width: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        drawn = torch.randn(width, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
        scaled: Tensor = drawn / width**0.5
        return scaled.to(device)


def _joined(one: _Edited, other: _Edited) -> _Edited:
    (rows, columns), values = one
    (more_rows, more_columns), more_values = other
    return (torch.cat([rows, more_rows]), torch.cat([columns, more_columns])), torch.cat([values, more_values])


def _last_column(x: Tensor) -> _Places:
    rows = torch.arange(len(x), device=x.device)
    return rows, torch.full_like(rows, x.shape[1] - 1)


def _select(x: Tensor, positions: Positions, mask: Tensor | None) -> _Places:
    """The positions to edit, text by text."""
    batch, length = x.shape[:2]
    step = length == 1 and mask is not None and len(mask) == batch  # of cached generation: all are tokens
    if mask is not None and mask.shape != (batch, length) and not step:
        raise InputError(f"mask must have the shape of the prompts, ({batch}, {length}), got {tuple(mask.shape)}")
    if mask is None or step:
        if positions == "last" or length == 1:
            return _last_column(x)
        rows, columns = torch.arange(batch, device=x.device), torch.arange(1, length, device=x.device)
        return rows.repeat_interleave(length - 1), columns.repeat(batch)
    tokens, column = mask.to(x.device, torch.bool), torch.arange(length, device=x.device)
    if positions == "last":
        return torch.arange(batch, device=x.device), torch.where(tokens, column, -1).amax(1)
    first = column == torch.where(tokens, column, length).amin(1, keepdim=True)
    at = (tokens & ~(first & (tokens.sum(1, keepdim=True) > 1))).nonzero()
    return at[:, 0], at[:, 1]


def _begin_alike(x: Tensor) -> bool:
    """Whether position 0 holds the same token in all texts, and position 1 another one: so BOS looks, not padding."""
    if min(x.shape[:2]) == 1:
        return True
    first, second = x[:, 0].float(), x[:, 1].float()
    limit = 10 * _ROUNDING.get(x.dtype, 0.02) * first[0].norm()
    alike = (first - first[0]).norm(dim=1) <= limit
    repeated = (second - first).norm(dim=1) <= limit
    return bool((alike & ~repeated).all())


def project(
    projector: _Projects,
    positions: Positions = "last",
    noise: RowNoise | None = None,
    mask: Tensor | None = None,
    *,
    model: lm.Model | None = None,
    allow_mismatch: bool = False,
    **options: Any,
) -> HookFunction:
    """A hook that projects activations onto the projector's manifold.

    Rows with a norm above the projector's `max_norm` pass unchanged: they are massive activations, which its training
    data left out.

    A row's default noise depends on the calls before it and on the batch it is in, so the same text may come
    out differently elsewhere; passing `noise` makes it repeatable row by row.

    Args:
        projector: any model with the `Projector` capability.
        positions, mask: which tokens, see `edit`.
        noise: noise for each call; without it, noise is drawn from the options' `generator`, or from one
            seeded with 0 that lives as long as the hook.
        model: the language model it is for. With it, a hook point is known by all its names there.
        allow_mismatch: work at another hook point than the projector was trained at.
        options: passed on to `projector.project`, for example `sigma=0.3` or `u=0.5, steps=20`.

    Raises:
        InputError: on a call, if the stream's width or the hook point is not the projector's, and what `edit` refuses.

    Examples:
        >>> import torch
        >>> import glp_lens as gl
        >>> from glp_lens.activations import write_store
        >>> x = torch.randn(500, 1).repeat(1, 2) + 0.01 * torch.randn(500, 2)  # activations close to a line
        >>> store = write_store("acts", x, hook="blocks.3.hook_resid_post")
        >>> pca = gl.PCA.fit(store, n_components=1)
        >>> off_line = torch.tensor([[[1.0, 3.0]]])  # (batch, pos, d)
        >>> projected = gl.hooks.project(pca)(off_line, hook=None)
        >>> torch.allclose(projected, torch.tensor([2.0, 2.0]), atol=0.1)
        True
    """
    move = _projection(projector, noise, options)
    run = _edit(lambda rows, _: move(rows), positions, mask, model, allow_mismatch=allow_mismatch)
    return _at_its_point(run, projector, model, allow_mismatch=allow_mismatch)


def projection(
    projector: _Projects,
    hook: str | None = None,
    *,
    model: lm.Model | None = None,
    allow_mismatch: bool = False,
    **options: Any,
) -> tuple[str, HookFunction]:
    """`(hook point, hook function)` of a projector, checked against what it was trained on.

    It is what `projection_hook` of a model calls.

    Args:
        hook: the hook point; by default the one that the projector was trained on.
        model, allow_mismatch: see `Projector.projection_hook`.
        options: those of `project`.

    Raises:
        InputError: no hook point is known, or another one, or another language model.
    """
    name = hook or projector.hook
    if name is None:
        raise InputError("this model does not know its hook point: pass hook='blocks.N.hook_resid_post'")
    projector = provenance.bound(projector, name)
    if model is not None:
        provenance.check_use(projector, model, name, allow_mismatch=allow_mismatch)
        if not allow_mismatch:
            lm.check_edit(model, name)
    else:
        provenance.check(
            f"this {type(projector).__name__} was trained",
            {"hook": projector.hook, "hook_names": getattr(projector, "hook_names", None)},
            {"hook": name},
            allow_mismatch=allow_mismatch,
        )
    return name, project(projector, model=model, allow_mismatch=allow_mismatch, **options)


def _projection(projector: _Projects, noise: RowNoise | None, options: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """Projects rows `(n, d_in)`, but massive ones, with noise that depends on the number of calls before."""
    calls = 0
    if noise is None:
        options.setdefault("generator", torch.Generator().manual_seed(0))

    def move(rows: Tensor) -> Tensor:
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

    return move


def _at_its_point(
    run: HookFunction, projector: _Projects, model: lm.Model | None, *, allow_mismatch: bool
) -> HookFunction:
    """The hook, which raises an error at any other hook point than the projector's."""
    trained = {name for name in (projector.hook, *getattr(projector, "hook_names", ())) if name}
    checked: set[str] = set()

    def hook_fn(tensor: Tensor, *, hook: Any = None) -> Tensor:
        name = getattr(hook, "name", None)
        if name and trained and not allow_mismatch and name not in checked:
            names = lm.names_of(model, name) if model is not None and name in model.hook_dict else [name]
            if not lm.same_point(trained, names):
                raise InputError(
                    f"this {type(projector).__name__} was trained at {projector.hook}, here is {name}: use the hook "
                    "point it was trained at, pass model= if that has both names, or pass allow_mismatch=True"
                )
            checked.add(name)
        return run(tensor, hook=hook)

    return hook_fn


def steer(
    direction: Tensor,
    strength: float | Tensor,
    projector: _Projects | None = None,
    positions: Positions = "last",
    noise: RowNoise | None = None,
    mask: Tensor | None = None,
    *,
    model: lm.Model | None = None,
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
        positions, mask: which tokens, see `edit`.
        noise, model: see `project`.
        allow_mismatch: work at another hook point than the projector was trained at.
        options: passed on to `projector.project`.

    Raises:
        InputError: if `direction` is not a finite vector; on a call with the wrong width or batch size, or at
            another hook point than the projector's, and what `edit` refuses.

    Examples:
        >>> import torch
        >>> from glp_lens import hooks
        >>> steer = hooks.steer(torch.tensor([0.0, 2.0]), strength=0.5)
        >>> steer(torch.zeros(1, 3, 2), hook=None)  # (batch, pos, d): moves the last position
        tensor([[[0., 0.],
                 [0., 0.],
                 [0., 1.]]])

        Run it at a hook point of a language model with `model.hooks(fwd_hooks=[(hook, steer)])`.
    """
    if direction.ndim != 1 or not torch.isfinite(direction).all():
        raise InputError(f"direction must be a finite vector (d_in,), got shape {tuple(direction.shape)}")
    given = torch.as_tensor(strength)
    if given.ndim > 1 or not given.isfinite().all():
        raise InputError(f"strength must be a finite number, or (batch,) of them, got {strength}")
    repair = None if projector is None else _projection(projector, noise, options)

    def move(rows: Tensor, owners: Tensor) -> Tensor:
        if rows.shape[1] != direction.shape[0]:
            raise InputError(f"direction has width {direction.shape[0]}, the hook point has width {rows.shape[1]}")
        alpha = torch.as_tensor(strength, dtype=torch.float32, device=rows.device)
        alpha = (alpha[owners] if alpha.ndim else alpha.expand(len(rows)))[:, None]
        moved = rows + alpha * direction.to(rows.device, torch.float32)
        return moved if repair is None else torch.where(alpha != 0, repair(moved), moved)

    run = _edit(move, positions, mask, model, allow_mismatch=allow_mismatch)

    def hook_fn(tensor: Tensor, *, hook: Any = None) -> Tensor:
        if given.ndim and given.shape != (tensor.shape[0],):
            raise InputError(f"got {len(given)} strengths for a batch of {tensor.shape[0]}")
        return run(tensor, hook=hook)

    return hook_fn if projector is None else _at_its_point(hook_fn, projector, model, allow_mismatch=allow_mismatch)


def replace(
    values: Tensor, mask: Tensor, *, model: lm.Model | None = None, allow_mismatch: bool = False
) -> HookFunction:
    """A hook that writes `values` over the stream wherever `mask` is true, in one forward pass of whole texts.

    Args:
        values: `(batch, pos, d_in)`, or any shape that broadcasts to it.
        mask: `(batch, pos)` booleans.
        model, allow_mismatch: see `edit`.

    Raises:
        InputError: on a call: values or a mask of another shape, and what `edit` refuses.
    """
    edits_work = None if model is None else lm.mid_stream_edits_work(model)

    def hook_fn(tensor: Tensor, *, hook: Any = None) -> Tensor:
        x = _rows_to_edit(tensor, getattr(hook, "name", None) or "", edits_work, allow_mismatch=allow_mismatch)
        try:
            new = values.to(x.device, x.dtype).expand_as(x)
        except RuntimeError:
            new = None
        if new is None or mask.shape != x.shape[:2]:
            raise InputError(
                f"values and mask must have the shapes {tuple(x.shape)} and {tuple(x.shape[:2])} of this call, got "
                f"{tuple(values.shape)} and {tuple(mask.shape)}"
            )
        return torch.where(mask.to(x.device)[..., None], new, x).reshape(tensor.shape)

    return hook_fn
