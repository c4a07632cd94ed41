"""Log-density of rows under a flow, by the probability-flow ODE: pure functions of a velocity.

Along `dz / dsigma = v` the density of the moving point changes as `d log p / dsigma = -div v`, so that
`log p_0(z_0) = log N(z_1; 0, I) + integral of div v over sigma from 0 to 1` (Chen et al., 2018, theorem 1; Song et
al., 2021, section 4.3).

A denoiser is never trained below sigma = 0.001, nor need it be: at 0 the velocity is `-z` whatever the data, since
nothing is known of the noise there. Rows are shrunk to the first level by that field, which adds `d log(1 - sigma)`.
The result is exactly the density of the data with noise of `sigma / (1 - sigma)`, a thousandth, added: it exists even
where a dimension never varies.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.func import vjp, vmap

from glp_lens import numerics
from glp_lens.errors import InputError
from glp_lens.flow.schedule import TRAIN_STEPS
from glp_lens.flow.solvers import Velocity, integrate
from glp_lens.types import Acts, PerRow

EXACT_WIDTH = 64
"""Up to this width, the exact trace is the default: it costs a derivative for each dimension."""
PROBES = 16
"""Random directions that estimate it at larger widths."""
_ROWS = 4096
"""Rows times directions that are differentiated at once."""


class LogDensity(NamedTuple):
    """Log-densities of rows.

    Attributes:
        value: `(n,)`, in nats.
        error: `(n,)`, standard error of `value` by the choice of probes; 0 for the exact trace, NaN for one probe.
    """

    value: PerRow
    error: PerRow


def rising_grid(steps: int) -> Tensor:
    """`(steps + 1,)` noise levels from 0.001 to 1, closer together near 0, which small variances need."""
    if steps < 1:
        raise InputError(f"steps must be at least 1, got {steps}")
    start = 1 / TRAIN_STEPS
    return start + (1 - start) * torch.linspace(0, 1, steps + 1, dtype=torch.float32) ** 2


def draw_probes(
    n: int, d: int, probes: int | None = None, noise: Acts | None = None, generator: Generator | None = None
) -> Tensor | None:
    """Random signs `(n, probes, d)`, int8, or None for the exact trace.

    They are drawn for all rows before any batching, and are those of seed 0 without a generator.

    Args:
        probes: 0 for the exact trace; by default that up to a width of `EXACT_WIDTH`, else `PROBES`.
        noise: `(n, d)` standard normal; its signs are the one probe.

    Raises:
        InputError: fewer than no probes, more than one where noise is given, or noise of another shape.
    """
    if probes is None:
        probes = 0 if d <= EXACT_WIDTH else PROBES if noise is None else 1
    if probes < 0 or (noise is not None and probes > 1):
        raise InputError(f"probes must be 0 (exact) or more, and at most 1 where noise is passed, got {probes}")
    if probes == 0:
        return None
    if noise is not None:
        if noise.shape != (n, d):
            raise InputError(f"expected noise of shape ({n}, {d}), got {tuple(noise.shape)}: draw it to match")
        return torch.where(noise < 0, -1, 1).to(torch.int8)[:, None]
    generator = generator or torch.Generator().manual_seed(0)
    signs = torch.randint(2, (n, probes, d), dtype=torch.int8, generator=generator, device=generator.device)
    return signs.mul_(2).sub_(1)


@numerics.own()
def directional(velocity: Velocity, z: Acts, sigma: float, directions: Tensor) -> tuple[Acts, Tensor]:
    """The velocity `(n, d)`, and `e^T J e` of each row's Jacobian `J = dv / dz` and each direction `e`, `(n, k)`.

    Summed over an orthonormal basis the latter is the divergence; its mean over random `e` of covariance I is an
    unbiased estimate of it (Hutchinson, 1990).

    Args:
        velocity: treats each row by itself.
        directions: `(k, n, d)`, or `(k, 1, d)` for the same in all rows.
    """
    v, pull_back = vjp(lambda rows: velocity(rows, sigma), z)  # type: ignore[misc]  # three with has_aux only

    def product(e: Tensor) -> Tensor:
        e = e.to(z.dtype).expand_as(z)
        pulled: Tensor = pull_back(e)[0]
        return (e * pulled).sum(1)

    return v, vmap(product, out_dims=1, chunk_size=max(1, _ROWS // max(1, len(z))))(directions)


@numerics.own()
def log_density(
    velocity: Velocity, z: Acts, sigmas: Tensor, probes: Tensor | None = None, solver: str = "ab3"
) -> LogDensity:
    """Log-density of normalised rows `z` `(n, d)`.

    Args:
        velocity: `(z, sigma)` to the velocity, each row by itself, differentiable.
        sigmas: rising noise levels, the last of them 1.
        probes: `(n, k, d)`, of mean 0 and covariance I, for an estimate; None for the exact trace. A row keeps its
            probes along the way, so each gives an unbiased estimate, and their spread the standard error.
        solver: of the flow and of the integral.
    """
    n, d = z.shape
    exact = probes is None
    directions = torch.eye(d, dtype=z.dtype, device=z.device)[:, None] if probes is None else probes.transpose(0, 1)
    start = float(sigmas[0])

    def augmented(state: Tensor, sigma: float) -> Tensor:
        v, products = directional(velocity, state[:, :d], sigma, directions)
        return torch.cat([v, products.sum(1, keepdim=True) if exact else products], dim=1)

    integrals = z.new_full((n, 1 if exact else len(directions)), d * math.log1p(-start))
    end = integrate(augmented, torch.cat([(1 - start) * z, integrals], dim=1), sigmas, solver)
    noise, estimates = end[:, :d], end[:, d:]
    value = estimates.mean(1) - 0.5 * (noise.square().sum(1) + d * math.log(2 * math.pi))
    if exact:
        return LogDensity(value, torch.zeros_like(value))
    return LogDensity(value, (estimates.var(1, correction=0) / (len(directions) - 1)).sqrt())
