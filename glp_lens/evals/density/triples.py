"""The fixed (x, eps, sigma) triples that every model is scored on, and reference losses on them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from glp_lens.flow.path import column
from glp_lens.flow.schedule import TRAIN_STEPS, grid

SIGMA_GRID = grid(TRAIN_STEPS)[:-1].double().numpy()
"""The noise levels of training: uniform over these 1,000 values, largest first."""


def stratified_sigma(n: int, draws: int, seed: int) -> np.ndarray:
    """Noise levels `(draws, n)` spread evenly over the grid, for `draws` noisings of each of `n` rows.

    Draw j of a row lies in the j-th of `draws` equal parts of the grid, so each row meets low and high noise;
    within a part, the rows are assigned at random. The mean over all levels then has far less variance than
    with independent ones.
    """
    rng = np.random.default_rng(seed)
    position = np.stack([part * n + rng.permutation(n) for part in range(draws)])
    index = ((position + 0.5) / (draws * n) * len(SIGMA_GRID)).astype(np.int64)
    return SIGMA_GRID[index]


def no_velocity(z: Tensor, sigma: Tensor) -> Tensor:
    """Predict 0 always; its expected loss is 2 on standardised activations."""
    return torch.zeros_like(z)


def isotropic_velocity(z: Tensor, sigma: Tensor) -> Tensor:
    """The best velocity for data known only to have mean 0 and variance 1; expected loss pi/2 = 1.571.

    For independent standard normal x and eps,
    `E[eps - x | z] = (2 sigma - 1) z / ((1 - sigma)^2 + sigma^2)`.
    """
    s = column(sigma, z)
    return (2 * s - 1) / ((1 - s) ** 2 + s**2) * z
