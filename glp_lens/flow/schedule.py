"""Noise levels: the grids of the released code, and how its `u` picks a point on them.

The released code asks diffusers' flow-matching Euler scheduler for `n` steps and gets timesteps evenly spaced
from 1000 to 1, divided by 1000, then a final 0. Its `u` in [0, 1) indexes the grid in use, so the same `u`
means different noise levels on different grids: u = 0.5 is sigma 0.4742 on 20 steps and 0.5 on 1000.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Generator, Tensor

from glp_lens.errors import InputError

TRAIN_STEPS = 1000
"""Training draws sigma from the 1000 values of this grid; the denoiser is fed sigma * 1000."""
SIGMA_BINS = 10
"""Equal parts of [0, 1] by which losses are reported."""


def grid(steps: int) -> Tensor:
    """`(steps + 1,)` float32 noise levels, falling from 1 to 0.001 and then 0."""
    if steps < 1:
        raise InputError(f"steps must be at least 1, got {steps}")
    levels = torch.linspace(TRAIN_STEPS, 1, steps, dtype=torch.float32) / TRAIN_STEPS
    return torch.cat([levels, torch.zeros(1)])


def index_of_u(u: float | Tensor, steps: int) -> Tensor:
    """Index into `grid(steps)` that the released code's `u` picks: floor(u * steps)."""
    value = torch.as_tensor(u)
    if not bool(((value >= 0) & (value < 1)).all()):  # NaN included
        raise InputError(f"u must be in [0, 1): 0 is pure noise and values near 1 are data, got {u}")
    return (value * steps).floor().long()


def path_from_u(u: float, steps: int) -> Tensor:
    """The rest of the `steps`-grid from the point that `u` picks down to 0."""
    return grid(steps)[int(index_of_u(u, steps)) :]


def path_from_sigma(sigma: float, steps: int) -> Tensor:
    """From `sigma` down to 0 at the pace of the `steps`-grid: `ceil(sigma * steps)` even steps."""
    if not 0 <= sigma <= 1:
        raise InputError(f"sigma must be in [0, 1]: 0 is data and 1 is noise, got {sigma}")
    if sigma == 0:
        return torch.zeros(1)
    return torch.linspace(sigma, 0, math.ceil(sigma * steps) + 1)


def uniform_sigmas(n: int, generator: Generator) -> Tensor:
    """`n` noise levels drawn uniformly from the 1000 training values, as the paper trains."""
    return grid(TRAIN_STEPS)[torch.randint(TRAIN_STEPS, (n,), generator=generator)]


def stratified_sigmas(n: int, generator: Generator, share: int = 1) -> Tensor:
    """`n` noise levels that cover the training values evenly, in random order.

    The values are cut into `ceil(n / share)` equal parts, and each part gives one level, used by `share` rows. A
    row's level is uniform over the 1000 values like that of `uniform_sigmas`, but a batch's loss and gradient vary
    less, and fewer distinct levels mean less work in the denoiser's time path.
    """
    parts = -(-n // share)
    u = (torch.arange(parts) + torch.rand(parts, generator=generator)) / parts
    levels = grid(TRAIN_STEPS)[(u * TRAIN_STEPS).long().clamp(max=TRAIN_STEPS - 1)]
    return levels.repeat_interleave(share)[torch.randperm(parts * share, generator=generator)[:n]]


def sigma_bin(sigma: np.ndarray) -> np.ndarray:
    """Index 0 to 9 of the bin `(b / 10, (b + 1) / 10]` that each noise level falls in."""
    return np.clip(np.ceil(np.asarray(sigma) * SIGMA_BINS - 1e-6).astype(np.int64) - 1, 0, SIGMA_BINS - 1)


def bin_name(index: int) -> str:
    """The bin in words, for example `sigma=0.1-0.2`."""
    return f"sigma={index / SIGMA_BINS:.1f}-{(index + 1) / SIGMA_BINS:.1f}"
