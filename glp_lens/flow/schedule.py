"""Noise levels: the grids of the released code, and how its `u` picks a point on them.

The released code asks diffusers' flow-matching Euler scheduler for `n` steps and gets timesteps evenly spaced
from 1000 to 1, divided by 1000, then a final 0. Its `u` in [0, 1) indexes the grid in use, so the same `u`
means different noise levels on different grids: u = 0.5 is sigma 0.4742 on 20 steps and 0.5 on 1000.

Other spacings of the levels, for solvers that need few evaluations, are in `SPACINGS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Generator, Tensor

from glp_lens.errors import InputError

TRAIN_STEPS = 1000
"""Training draws sigma from the 1000 values of this grid; the denoiser is fed sigma * 1000."""
SIGMA_BINS = 10
"""Equal parts of [0, 1] by which losses are reported."""
EARLY = 1.3
"""Exponent of the spacing `early`; 1 is even."""
LOG_SNR_MARGIN = 0.05
"""Of the spacing `log-snr`: the second level is at most 1 minus this, the last but one this part of the first."""


def grid(steps: int) -> Tensor:
    """`(steps + 1,)` float32 noise levels, falling from 1 to 0.001 and then 0."""
    if steps < 1:
        raise InputError(f"steps must be at least 1, got {steps}")
    levels = torch.linspace(TRAIN_STEPS, 1, steps, dtype=torch.float32) / TRAIN_STEPS
    return torch.cat([levels, torch.zeros(1, dtype=torch.float32)])


def index_of_u(u: float | Tensor, steps: int) -> Tensor:
    """Index into `grid(steps)` that the released code's `u` picks: floor(u * steps)."""
    value = u if isinstance(u, Tensor) else torch.tensor(u, dtype=torch.float32)
    if not bool(((value >= 0) & (value < 1)).all()):  # NaN included
        raise InputError(f"u must be in [0, 1): 0 is pure noise and values near 1 are data, got {u}")
    return (value * steps).floor().long()


def path_from_u(u: float, steps: int) -> Tensor:
    """The rest of the `steps`-grid from the point that `u` picks down to 0."""
    return grid(steps)[int(index_of_u(u, steps)) :]


def even(sigma: float, steps: int) -> Tensor:
    """Steps of one length."""
    return torch.linspace(sigma, 0, steps + 1, dtype=torch.float32)


def early(sigma: float, steps: int) -> Tensor:
    """Shorter steps near noise: `1 - (1 - t)^1.3` of even levels `t`.

    Activations have a few directions of far more than average variance, which bend the flow's paths early.
    """
    start = _towards_noise(torch.tensor(sigma, dtype=torch.float32), 1 / EARLY)
    return _starting_at(sigma, _towards_noise(even(float(start), steps), EARLY))


def _towards_noise(levels: Tensor, exponent: float) -> Tensor:
    """`1 - (1 - levels)^exponent`, exact also near 0."""
    return -torch.expm1(exponent * torch.log1p(-levels))


def late(sigma: float, steps: int) -> Tensor:
    """Shorter steps near data: squares of even levels."""
    return sigma * even(1, steps) ** 2


def log_snr(sigma: float, steps: int) -> Tensor:
    """Even in the logarithm of the signal-to-noise ratio, cut off near 0 and 1, where that is infinite."""
    ends = torch.tensor([min(sigma, 1 - LOG_SNR_MARGIN), LOG_SNR_MARGIN * sigma], dtype=torch.float32)
    top, bottom = ends.logit().tolist()
    levels = torch.linspace(top, bottom, steps, dtype=torch.float32).sigmoid()
    return _starting_at(sigma, torch.cat([levels, torch.zeros(1, dtype=torch.float32)]))


def _starting_at(sigma: float, levels: Tensor) -> Tensor:
    """The levels with exactly `sigma` in front, free of rounding."""
    return torch.cat([torch.tensor([sigma], dtype=levels.dtype), levels[1:]])


SPACINGS: dict[str, Callable[[float, int], Tensor]] = {
    "even": even,
    "early": early,
    "late": late,
    "log-snr": log_snr,
}
"""How the levels from `sigma` down to 0 are spaced, by name; each gives `steps + 1` of them."""


def path(sigma: float, steps: int, spacing: str = "even") -> Tensor:
    """From `sigma` down to 0 in `steps` steps: `(steps + 1,)` levels, or the 0 alone.

    Raises:
        InputError: a level outside [0, 1], no steps, or a spacing not in `SPACINGS`.
    """
    if not 0 <= sigma <= 1:
        raise InputError(f"sigma must be in [0, 1]: 0 is data and 1 is noise, got {sigma}")
    if steps < 1:
        raise InputError(f"steps must be at least 1, got {steps}")
    if spacing not in SPACINGS:
        raise InputError(f"grid must be one of released, {', '.join(SPACINGS)}, got {spacing!r}")
    return torch.zeros(1, dtype=torch.float32) if sigma == 0 else SPACINGS[spacing](sigma, steps)


def path_from_sigma(sigma: float, steps: int, spacing: str = "even") -> Tensor:
    """From `sigma` down to 0 in its share of the `steps` from 1 to 0: `ceil(sigma * steps)` of them."""
    return path(sigma, share_of(sigma, steps) if 0 < sigma <= 1 and steps > 0 else steps, spacing)


def share_of(sigma: float, steps: int) -> int:
    """`ceil(sigma * steps)`, robust to rounding: 0.07 of 100 steps are 7."""
    return math.ceil(round(float(sigma) * steps, 6))


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
    u = (torch.arange(parts) + torch.rand(parts, generator=generator, dtype=torch.float32)) / parts
    levels = grid(TRAIN_STEPS)[(u * TRAIN_STEPS).long().clamp(max=TRAIN_STEPS - 1)]
    return levels.repeat_interleave(share)[torch.randperm(parts * share, generator=generator)[:n]]


def sigma_bin(sigma: np.ndarray) -> np.ndarray:
    """Index 0 to 9 of the bin `(b / 10, (b + 1) / 10]` that each noise level falls in."""
    return np.clip(np.ceil(np.asarray(sigma) * SIGMA_BINS - 1e-6).astype(np.int64) - 1, 0, SIGMA_BINS - 1)


def bin_name(index: int) -> str:
    """Name of the bin, for example `sigma=0.1-0.2`."""
    return f"sigma={index / SIGMA_BINS:.1f}-{(index + 1) / SIGMA_BINS:.1f}"
