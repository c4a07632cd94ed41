"""Hooks that edit activations along directions and repair what results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from glp_lens import lm, numerics
from glp_lens.arguments import checked
from glp_lens.errors import InputError
from glp_lens.hooks.editing import on_rows
from glp_lens.hooks.noise import RowNoise
from glp_lens.hooks.operations import OPERATIONS, Directions, Operation
from glp_lens.hooks.places import Places, Positions
from glp_lens.hooks.projecting import at_its_point
from glp_lens.hooks.repairs import Projects, Repair, Repairer
from glp_lens.types import HookFunction

Renormalize: TypeAlias = Literal["before"] | float | None


@checked
def steer(
    direction: Tensor,
    strength: float | Sequence[float] | Tensor,
    projector: Projects | None = None,
    positions: Positions = "last",
    noise: RowNoise | None = None,
    mask: Tensor | None = None,
    *,
    operation: Operation = "add",
    repair: Repair = "project",
    renormalize: Renormalize = None,
    centre: Tensor | None = None,
    model: lm.Model | None = None,
    allow_mismatch: bool = False,
    **options: Any,
) -> HookFunction:
    """A hook that edits activations along one or several directions, then lets `projector` repair the result.

    With `w_i` the directions, `alpha_i` the strengths and `c` the centre, an edit takes a row `x` to `x'`. Let `a_i` be
    the coordinates of `x - c` along the directions: those of the nearest point `sum_i a_i w_i` of their span, which for
    one direction is `a = (x - c) . w / |w|^2`.

    - `"add"`: `x' = x + sum_i alpha_i w_i`.
    - `"ablate"`: `x' = x - sum_i alpha_i a_i w_i`. Strength 1 removes all that lies in the span, 2 reflects it.
    - `"clamp"`: `x' = x + sum_i (alpha_i - a_i) w_i`, so the coordinates of `x' - c` are the strengths. Here strength 0
      is an edit as any other: it sets the coordinate to 0.
    - `"rotate"`: turns `x - c` by `alpha` radians and keeps its norm. With two directions, its part in their plane
      turns from the first towards the second. With one, `x - c` turns towards it and stops there, or for negative
      angles away from it until it points the opposite way; a row that lies along the direction stays.

    Rows whose strengths are all 0 come out bit for bit as they went in, whatever the repair and renormalisation, except
    in a clamp.

    With `P` the projection, the repaired row is

    - `"project"`: `P(x')`, the paper's.
    - `"difference"`: `x + P(x'; eps) - P(x; eps)` with one noise `eps`, which leaves out what the projector changes in
      rows that nobody edited. Both projections are one call of the projector, on twice the rows.
    - `"orthogonal"`: `x' + r`, where `r` is `P(x') - x'` without its part in the span of the directions, so that the
      repair does not take back the edit.

    Massive rows, of a norm above the projector's `max_norm`, are edited but neither repaired (judged by `x'`, and in a
    difference also by `x`) nor renormalised (judged by `x`).

    Args:
        direction: `(d_in,)` or `(k, d_in)`, in activation units. The paper adds `alpha * act_norm * w` with a unit `w`:
            pass `direction = act_norm * w`. As `act_norm` the paper takes the median norm of the activations
            (`store.median_norm`); `store.median_centred_norm` does not depend on dimensions that are nearly constant.
        strength: one number for all, or for one direction `(batch,)` with one for each text. For several directions
            `(k,)`, one for each, or `(batch, k)`. Of `"rotate"`, one angle for all directions or `(batch,)`.
        projector: any model with the `Projector` capability, or None to steer without repair.
        positions, mask: which tokens, see `edit`.
        noise, model: see `project`.
        operation, repair: see above.
        renormalize: after edit and repair, about the centre: `"before"` gives the row the norm `|x - c|` it had before;
            a number is the largest norm, and only longer rows are shortened to it (such as
            `store.centred_norm_quantile(0.99)`, with the mean as the centre).
        centre: `(d_in,)`, such as `store.stats.mean`; by default the origin.
        allow_mismatch: work at another hook point than the projector was trained at.
        options: passed on to `projector.project`. A `condition` of shape `(batch, d_condition)` is one for each text.

    Raises:
        InputError: options of a repair without a projector; directions that are not finite, or not independent where
            their span is needed; a strength, centre,
            operation, repair or renormalisation that does not fit; on a call with the wrong width or batch size, or at
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
    if operation not in OPERATIONS:
        raise InputError(f"operation must be one of {', '.join(OPERATIONS)}, got {operation!r}")
    if repair not in get_args(Repair):
        raise InputError(f"repair must be one of {', '.join(get_args(Repair))}, got {repair!r}")
    if projector is None and options:
        raise InputError(
            f"{', '.join(options)} are of a repair: pass projector=, or leave them out to steer without one"
        )
    kept = projector is not None and repair == "orthogonal"
    directions = Directions.of(direction, spanning=kept or operation != "add")
    if operation == "rotate" and len(directions) > 2:
        raise InputError(f"a rotation is in the plane of two directions or towards one, got {len(directions)}")
    alpha, per_text = _strengths(strength, direction, operation)
    middle = _centre(centre, directions.width)
    _check_norm(renormalize)
    move = None
    if projector is not None:
        move = Repairer(projector, noise, options, repair, directions if kept else None)

    @numerics.own()
    def steered(rows: Tensor, places: Places) -> Tensor:
        if rows.shape[1] != directions.width:
            raise InputError(f"direction has width {directions.width}, the hook point has width {rows.shape[1]}")
        strengths = alpha.to(rows.device)
        strengths = strengths[places.texts] if per_text else strengths.expand(len(rows), -1)
        c = middle.to(rows.device)
        new = OPERATIONS[operation](rows, rows - c, strengths, directions.to(rows.device))
        if move is not None:
            new = move(new, rows, places)
        if renormalize is not None:
            resized = _resized(new, rows, c, renormalize)
            new = resized if move is None else torch.where(move.massive(rows), new, resized)
        return new

    def active(rows: Tensor, places: Places) -> Tensor:
        """Only rows that something is done to, which saves the projections of the others."""
        edits = torch.ones(len(alpha), dtype=torch.bool) if operation == "clamp" else (alpha != 0).any(1)
        if bool(edits.all()):
            return steered(rows, places)
        if not bool(edits.any()):
            return rows
        chosen = edits.to(rows.device)[places.texts].nonzero()[:, 0]
        if not len(chosen):
            return rows
        return rows.index_copy(0, chosen, steered(rows[chosen], places[chosen]))

    run = on_rows(active, positions, mask, model, allow_mismatch=allow_mismatch, counted=noise is not None)

    def hook_fn(tensor: Tensor, *, hook: Any = None) -> Tensor:
        if per_text and len(alpha) != tensor.shape[0]:
            raise InputError(f"got {len(alpha)} strengths for a batch of {tensor.shape[0]}")
        return run(tensor, hook=hook)

    return hook_fn if projector is None else at_its_point(hook_fn, projector, model, allow_mismatch=allow_mismatch)


def _strengths(
    strength: float | Sequence[float] | Tensor, directions: Tensor, operation: Operation
) -> tuple[Tensor, bool]:
    """Strengths as `(batch or 1, width)` float32, and whether each text has its own."""
    width = 1 if operation == "rotate" or directions.ndim == 1 else len(directions)
    given = torch.as_tensor(strength, dtype=torch.float32)
    for_all = operation != "rotate" and directions.ndim == 2 and given.shape == (width,)
    per_text = given.ndim > 0 and not for_all
    alpha = given.reshape(1, -1) if not per_text else given[:, None] if width == given.ndim == 1 else given
    if alpha.ndim != 2 or alpha.shape[1] not in (1, width) or not alpha.numel() or not alpha.isfinite().all():
        wanted = "(batch,)" if width == 1 else f"({width},) or (batch, {width})"
        got = f"shape {tuple(given.shape)}" if given.ndim else strength
        raise InputError(f"strength must be a finite number, or {wanted} of them, got {got}")
    return alpha.expand(-1, width), per_text


def _centre(centre: Tensor | None, width: int) -> Tensor:
    if centre is None:
        return torch.zeros(width, dtype=torch.float32)
    if centre.shape != (width,) or not centre.isfinite().all():
        raise InputError(f"centre must be a finite vector ({width},), got shape {tuple(centre.shape)}")
    return centre.detach().float()


def _check_norm(renormalize: Renormalize) -> None:
    if renormalize is None or renormalize == "before":
        return
    if isinstance(renormalize, str) or not (math.isfinite(renormalize) and renormalize > 0):
        raise InputError(f"renormalize must be None, 'before' or a positive norm, got {renormalize!r}")


def _resized(new: Tensor, before: Tensor, centre: Tensor, how: Literal["before"] | float) -> Tensor:
    """Rows that have the same distance from the centre as `before`, or at most a number."""
    away = new - centre
    norm = away.norm(dim=1, keepdim=True)
    wanted = (before - centre).norm(dim=1, keepdim=True) if how == "before" else norm.clamp(max=how)
    return torch.where((norm > 0) & (norm != wanted), centre + away * (wanted / norm), new)
