"""Hooks that run any function on rows, or write given values."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from glp_lens import lm
from glp_lens.arguments import checked
from glp_lens.errors import InputError
from glp_lens.hooks.places import Places, Positions, Texts, Written, begin_alike, check_positions
from glp_lens.types import HookFunction


@checked
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
    and gives the others what they were given before, unless gradients are enabled. A call of one position is taken as
    the next token of the texts of the call before. For independent calls, make a hook for each.

    Args:
        function: maps float32 rows `(n, d_in)`, batch-major, to rows of the same shape.
        positions: which tokens to edit.

            - `"last"`: the last position of each call, as the released GLP code does: in generation the last token of
              the prompt, then each new one.
            - `"all"`: every position except the first of a text longer than one token, which holds BOS, an attention
              sink far off the manifold that nothing should move.
            - `"prompt"`: those of `"all"` in the first call; none that are generated.
            - `"generated"`: the tokens that were generated. In one pass over a whole text there are none.
            - booleans `(batch, pos)`: where they are true, padding counted and BOS too; none after their end.
        mask: `(batch, pos)` of the prompts, true on tokens and false on padding: then first and last are those of each
            text. A hook cannot see padding, though it warns of what looks like it on the left. Needed for batches that
            are padded on the left with `"all"` or `"prompt"`, on the right with `"last"`. Generated positions are
            always tokens.
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
    return on_rows(lambda rows, _: function(rows), positions, mask, model, allow_mismatch=allow_mismatch)


def on_rows(
    function: Callable[[Tensor, Places], Tensor],
    positions: Positions,
    mask: Tensor | None,
    model: lm.Model | None,
    *,
    allow_mismatch: bool,
    counted: bool = False,
) -> HookFunction:
    """`edit`, of a function that is also told where the rows come from.

    Args:
        counted: the function uses the positions in the text, which padding without a mask makes wrong.
    """
    positions, mask = check_positions(positions, mask)
    # Tried here: within a call, the model's other hooks would run too.
    edits_work = None if model is None else lm.mid_stream_edits_work(model)
    texts: defaultdict[str, Texts] = defaultdict(Texts)  # one function may stand at several hook points
    by_name = isinstance(positions, str)
    warned = mask is not None or not (counted or (by_name and positions in ("all", "prompt")))

    def hook_fn(tensor: Tensor, *, hook: Any = None) -> Tensor:
        nonlocal warned
        name = getattr(hook, "name", None) or ""
        x, text = _rows_to_edit(tensor, name, edits_work, allow_mismatch=allow_mismatch), texts[name]
        places, known, new_texts = text.place(x, positions, mask)
        if new_texts and not warned and not begin_alike(x):
            warned = True
            warnings.warn(
                f"the texts of a batch do not begin with one token at {name or 'a hook point'}, as if padded on the "
                "left: padding and the BOS of shorter texts are counted as tokens, and edited where positions is 'all' "
                "or 'prompt'; pass mask= (batch, pos), true on tokens",
                stacklevel=2,
            )
        rows = x[places.at]
        edited = function(rows.float(), places) if len(places) else rows
        if edited.shape != rows.shape:
            raise InputError(f"an edit must give back rows of shape {tuple(rows.shape)}, got {tuple(edited.shape)}")
        written = Written(places, edited.to(device=x.device, dtype=x.dtype))
        if known is not None:
            written = known.and_then(written)
        text.remember(x, written)
        new = x.clone()
        new[written.places.at] = written.rows
        return new.reshape(tensor.shape)

    return hook_fn


@checked
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
