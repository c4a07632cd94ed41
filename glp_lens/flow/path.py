"""The straight path between data and noise, and conversions along it: pure functions.

One convention: `sigma` in [0, 1], 0 is data and 1 is noise, `z = (1 - sigma) x + sigma eps`, and the velocity
`v = dz / dsigma = eps - x`. (The paper writes t = 1 - sigma.) `sigma` is a number or one for each row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glp_lens.types import Acts

Sigma = float | Tensor


def column(sigma: Sigma, like: Tensor) -> Tensor:
    """`sigma` as a tensor that broadcasts against rows `(n, d)`: shape `()` or `(n, 1)`."""
    value = torch.as_tensor(sigma, dtype=like.dtype).to(like.device)
    return value[:, None] if value.ndim == 1 else value


def interpolate(x: Acts, eps: Acts, sigma: Sigma) -> Acts:
    """The point at `sigma` on the path from `x` to `eps`."""
    s = column(sigma, x)
    return (1 - s) * x + s * eps


def velocity_target(x: Acts, eps: Acts) -> Acts:
    """What the denoiser learns to predict from `interpolate(x, eps, sigma)`."""
    return eps - x


def data_from_velocity(z: Acts, velocity: Acts, sigma: Sigma) -> Acts:
    """The data end of the straight line through `z`: `x = z - sigma v`."""
    return z - column(sigma, z) * velocity
