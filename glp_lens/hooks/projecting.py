"""Hooks that project activations, at the hook point that the projector was trained on."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from glp_lens import lm, provenance
from glp_lens.arguments import checked
from glp_lens.errors import InputError
from glp_lens.hooks.editing import on_rows
from glp_lens.hooks.noise import RowNoise
from glp_lens.hooks.operations import Directions
from glp_lens.hooks.places import Positions
from glp_lens.hooks.repairs import Projects, Repair, Repairer
from glp_lens.types import HookFunction


@checked
def project(
    projector: Projects,
    positions: Positions = "last",
    noise: RowNoise | None = None,
    mask: Tensor | None = None,
    *,
    repair: Repair = "project",
    direction: Tensor | None = None,
    model: lm.Model | None = None,
    allow_mismatch: bool = False,
    **options: Any,
) -> HookFunction:
    """A hook that projects activations onto the projector's manifold.

    Rows with a norm above the projector's `max_norm` pass unchanged: they are massive activations, which its training
    data left out.

    A row's default noise depends on the calls before it and on the batch it is in, so the same text may come
    out differently elsewhere; passing `noise`, such as `SeededNoise`, makes it repeatable row by row.

    Args:
        projector: any model with the `Projector` capability.
        positions, mask: which tokens, see `edit`.
        noise: standard normal noise of each row; without it, noise is drawn from the options' `generator`, or from one
            seeded with 0 that lives as long as the hook.
        repair: `"project"`, or `"orthogonal"`, which leaves the part along `direction` as it is. A `"difference"` needs
            the row before the edit, which only `steer` has.
        direction: `(d_in,)` or `(k, d_in)`, for `"orthogonal"`.
        model: the language model it is for. With it, a hook point is known by all its names there.
        allow_mismatch: work at another hook point than the projector was trained at.
        options: passed on to `projector.project`, for example `sigma=0.3` or `u=0.5, steps=20`. A `condition` of shape
            `(batch, d_condition)` is one for each text.

    Raises:
        InputError: another repair, or directions that do not go with it; on a call, if the stream's width or the hook
            point is not the projector's, and what `edit` refuses.

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
    if repair not in ("project", "orthogonal"):
        raise InputError(
            f"repair must be 'project' or 'orthogonal' here, got {repair!r}: a difference needs the row before the "
            "edit, so pass the projector to hooks.steer"
        )
    if (repair == "orthogonal") != (direction is not None):
        raise InputError("repair='orthogonal' and direction= go together: the direction is what it leaves as it is")
    kept = None if direction is None else Directions.of(direction, spanning=True)
    if kept is not None and kept.width != projector.d_in:
        raise InputError(f"direction has width {kept.width}, the projector has width {projector.d_in}")
    move = Repairer(projector, noise, options, repair, kept)
    run = on_rows(
        lambda rows, places: move(rows, rows, places),
        positions,
        mask,
        model,
        allow_mismatch=allow_mismatch,
        counted=noise is not None,
    )
    return at_its_point(run, projector, model, allow_mismatch=allow_mismatch)


@checked
def projection(
    projector: Projects,
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


def at_its_point(
    run: HookFunction, projector: Projects, model: lm.Model | None, *, allow_mismatch: bool
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
