"""What every model does first with the rows it is given: check them, and draw noise of their shape."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

from glp_lens.errors import InputError
from glp_lens.types import Acts

if TYPE_CHECKING:
    from glp_lens.activations.store import ActivationStore


def check_rows(x: Tensor, d_in: int, device: torch.device) -> Acts:
    """The rows as float32 on `device`; `x` itself where it is that already.

    Raises:
        InputError: not `(n, d_in)`, or NaN or infinity among the values.
    """
    if x.ndim != 2 or x.shape[1] != d_in:
        raise InputError(
            f"expected activations of shape (n, {d_in}), got {tuple(x.shape)}: "
            "use the language model and hook point that this model was trained on"
        )
    x = x.to(device, torch.float32)
    if not torch.isfinite(x).all():
        raise InputError(
            f"expected finite activations, got NaN or infinity in {int((~torch.isfinite(x)).any(1).sum())} of "
            f"{len(x)} rows: run the language model in bfloat16 or float32, float16 overflows"
        )
    return x


def standard_normal(
    n: int, d_in: int, device: torch.device, noise: Acts | None = None, generator: Generator | None = None
) -> Acts:
    """`noise` if given, else `(n, d_in)` standard normal numbers from `generator` (torch's default if None).

    Raises:
        InputError: `noise` has another shape.
    """
    if noise is None:
        source = generator.device if generator is not None else device
        return torch.randn(n, d_in, generator=generator, device=source).to(device)
    if noise.shape != (n, d_in):
        raise InputError(f"expected noise of shape ({n}, {d_in}), got {tuple(noise.shape)}: draw it to match")
    return noise.to(device, torch.float32)


def mean_and_std(store: ActivationStore) -> tuple[Tensor, Tensor]:
    """Each dimension's mean and standard deviation `(d_in,)`, float32; 1 for a dimension that never varies."""
    std = store.stats.var.sqrt()
    return store.stats.mean.float(), torch.where(std > 0, std, 1.0).float()
