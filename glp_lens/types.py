"""Names for the shapes, number formats and functions that public functions take and return."""

from collections.abc import Callable
from typing import Any, Final, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

Acts: TypeAlias = Float[Tensor, "n d_in"]
"""Token rows of activations, in the language model's own units."""
Features: TypeAlias = Float[Tensor, "n n_features"]
PerRow: TypeAlias = Float[Tensor, " n"]
Json: TypeAlias = dict[str, Any]
HookFunction: TypeAlias = Callable[..., Tensor]
"""`(tensor, *, hook)` to a tensor of the same shape: what TransformerLens calls at a hook point."""
DTYPES: Final[dict[str, torch.dtype]] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
"""Number formats of language models and of stored activations, by name."""
