"""What every model does first with the rows it is given: check them, and draw noise of their shape."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

from glp_lens.errors import InputError
from glp_lens.types import Acts

if TYPE_CHECKING:
    from glp_lens.activations.store import ActivationStore
    from glp_lens.activations.stream import ActivationStream


def check_rows(x: Tensor, d_in: int) -> Acts:
    """The rows as float32, on their own device; `x` itself where it is that already.

    Raises:
        InputError: not `(n, d_in)`, or NaN or infinity among the values.
    """
    if x.ndim != 2 or x.shape[1] != d_in:
        raise InputError(
            f"expected activations of shape (n, {d_in}), got {tuple(x.shape)}: "
            "use the language model and hook point that this model was trained on"
        )
    x = x.float()
    if not x.isfinite().all():
        bad = int((~x.isfinite()).any(1).sum())
        raise InputError(
            f"expected finite activations, got NaN or infinity in {bad} of {len(x)} rows: "
            "run the language model in bfloat16 or float32, float16 overflows"
        )
    return x


def draw_noise(n: int, d_in: int, noise: Acts | None = None, generator: Generator | None = None) -> Acts:
    """`noise` as float32 if given, else `(n, d_in)` standard normal numbers, on the generator's device.

    All rows are drawn before any batching, which makes a row's noise independent of the batch size. Without a
    generator the noise is that of seed 0: the same call gives the same result.

    Raises:
        InputError: `noise` has another shape.
    """
    if noise is None:
        generator = generator or torch.Generator().manual_seed(0)
        return torch.randn(n, d_in, generator=generator, device=generator.device)
    if noise.shape != (n, d_in):
        raise InputError(f"expected noise of shape ({n}, {d_in}), got {tuple(noise.shape)}: draw it to match")
    return noise.float()


def mean_and_std(store: ActivationStore | ActivationStream) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation `(d_in,)` of each dimension, float32; the latter 1 where nothing varies."""
    std = store.stats.var.sqrt()
    if constant := int((std <= 0).sum()):
        warnings.warn(
            f"{constant} of {len(std)} activation dimensions are constant: they stay 0 in normalised space",
            stacklevel=3,
        )
    return store.stats.mean.float(), torch.where(std > 0, std, 1.0).float()
