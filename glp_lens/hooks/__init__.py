"""Hook functions for TransformerLens: edit, steer, project or replace the activations at a hook point.

Every function here returns a `(tensor, *, hook)` function that gives back a new tensor with the dtype, device and shape
it was given. They work on `HookedTransformer` and `TransformerBridge` alike, also at hook points of the attention
heads, whose outputs stand side by side in a row, and inside `generate`: with a cache, where the first call sees the
whole prompt and later ones one position, and without, where every call sees the whole text and earlier positions get
the values that they were given before.

An edit changes the language model only if it is made on the residual stream, at `hook_resid_pre` or `hook_resid_post`,
or at what is added to it. `hook_resid_mid` is the stream on a HookedTransformer alone, so it is refused unless the
language model is passed and found to use the edit.
"""

from glp_lens.hooks.editing import edit, replace
from glp_lens.hooks.noise import RowNoise, SeededNoise
from glp_lens.hooks.operations import Operation
from glp_lens.hooks.places import Positions
from glp_lens.hooks.projecting import project, projection
from glp_lens.hooks.repairs import Repair
from glp_lens.hooks.steering import steer
from glp_lens.lm import same_point
from glp_lens.types import HookFunction

__all__ = [
    "HookFunction",
    "Operation",
    "Positions",
    "Repair",
    "RowNoise",
    "SeededNoise",
    "edit",
    "project",
    "projection",
    "replace",
    "same_point",
    "steer",
]
