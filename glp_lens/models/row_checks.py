"""Checks of the rows that a model is given, and noise of their shape."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from glp_lens.errors import InputError
from glp_lens.types import Acts


def check_rows(x: Tensor, d_in: int) -> Acts:
    """The rows as float32, on their own device; `x` itself where it is that already.

    Raises:
        InputError: not `(n, d_in)`, or NaN or infinity among the values.
    """
    if not isinstance(x, Tensor):
        raise InputError(f"expected activations as a torch tensor, got {type(x).__name__}: use torch.as_tensor")
    if x.ndim != 2 and x.shape[-1:] == (d_in,):
        raise InputError(f"expected rows of shape (n, {d_in}), got {tuple(x.shape)}: pass x.reshape(-1, {d_in})")
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
    if n < 0:
        raise InputError(f"expected a number of rows of at least 0, got {n}")
    if noise is None:
        generator = generator or torch.Generator().manual_seed(0)
        return torch.randn(n, d_in, generator=generator, device=generator.device, dtype=torch.float32)
    if noise.shape != (n, d_in):
        raise InputError(f"expected noise of shape ({n}, {d_in}), got {tuple(noise.shape)}: draw it to match")
    return noise.float()
