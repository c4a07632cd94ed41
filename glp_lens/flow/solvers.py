"""Solvers of the ordinary differential equation dz / dsigma = velocity(z, sigma): pure functions.

All evaluate the velocity at levels of the grid only, so that the embedding of the level can be computed once, and never
at the last level of a grid that ends at 0, where no denoiser is trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from torch import Tensor
from tqdm.auto import tqdm

from glp_lens.errors import InputError
from glp_lens.flow.path import data_from_velocity

Velocity = Callable[[Tensor, float], Tensor]


class Point(NamedTuple):
    """A point that the flow has passed, and its velocity there."""

    sigma: float
    z: Tensor
    velocity: Tensor


Step = Callable[[Velocity, Sequence[Point], float], Tensor]
"""`(velocity, points, end)` to `z` at the level `end`; the last of the points is where the step starts."""

_MEMORY = 3
"""Points that a step uses at most, its start included."""


def euler(velocity: Velocity, points: Sequence[Point], end: float) -> Tensor:
    """First order: what the released code does."""
    sigma, z, v = points[-1]
    return z + (end - sigma) * v


def heun(velocity: Velocity, points: Sequence[Point], end: float) -> Tensor:
    """Second order, with a second evaluation a step; the step into sigma = 0 is Euler's."""
    predicted = euler(velocity, points, end)
    if end == 0:
        return predicted
    sigma, z, v = points[-1]
    return z + (end - sigma) * (v + velocity(predicted, end)) / 2


def ab2(velocity: Velocity, points: Sequence[Point], end: float) -> Tensor:
    """Second order: Adams-Bashforth with steps of any lengths, after a first step of Euler."""
    return _adams_bashforth(points[-2:], end)


def ab3(velocity: Velocity, points: Sequence[Point], end: float) -> Tensor:
    """Third order: Adams-Bashforth with steps of any lengths, after a first step of Heun, which keeps the order."""
    return heun(velocity, points, end) if len(points) == 1 else _adams_bashforth(points[-3:], end)


def dpm2(velocity: Velocity, points: Sequence[Point], end: float) -> Tensor:
    """Second order: DPM-Solver++(2M) (Lu et al., 2022, algorithm 2) with alpha = 1 - sigma.

    The linear part is solved exactly, and the data estimate `z - sigma v` is continued on a straight line in
    `log(alpha / sigma)`. Where that is infinite, at sigma = 1 and 0, the estimate is held, which is Euler's step.
    """
    if end == 0 or len(points) == 1 or points[-2].sigma >= 1:
        return euler(velocity, points, end)
    before, now = points[-2:]
    old, new = (data_from_velocity(p.z, p.velocity, p.sigma) for p in (before, now))
    past, start, stop = (math.log((1 - s) / s) for s in (before.sigma, now.sigma, end))
    data = new + (stop - start) / (start - past) / 2 * (new - old)
    return end / now.sigma * now.z + (1 - end / now.sigma) * data


def _adams_bashforth(points: Sequence[Point], end: float) -> Tensor:
    """`z` plus the integral, up to `end`, of the polynomial through the velocities at the points."""
    sigma, z, _ = points[-1]
    nodes = np.array([p.sigma for p in points]) - sigma
    powers = np.arange(len(points))
    moments = (end - sigma) ** (powers + 1) / (powers + 1)
    weights = np.linalg.solve(np.vander(nodes, increasing=True).T, moments).tolist()
    for weight, point in zip(weights, points, strict=True):
        z = z + weight * point.velocity
    return z


SOLVERS: dict[str, Step] = {"euler": euler, "heun": heun, "ab2": ab2, "ab3": ab3, "dpm2": dpm2}


def integrate(velocity: Velocity, z: Tensor, sigmas: Tensor, solver: str = "euler") -> Tensor:
    """Follow the flow along `sigmas`, from the first to the last; gradients pass.

    Args:
        velocity: `(z, sigma)` to the velocity at `z`.
        z: where to start, at noise level `sigmas[0]`.
        sigmas: falling noise levels `(steps + 1,)`.
        solver: a name in `SOLVERS`.

    Raises:
        InputError: another solver.
    """
    if solver not in SOLVERS:
        raise InputError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    step = SOLVERS[solver]
    points: tuple[Point, ...] = ()
    pairs = list(pairwise(sigmas.tolist()))
    for start, end in tqdm(pairs, desc="flow", unit="step", mininterval=2, delay=2, leave=False):
        points = (*points, Point(start, z, velocity(z, start)))[-_MEMORY:]
        z = step(velocity, points, end)
    return z


def network_calls(sigmas: Tensor, solver: str = "euler") -> int:
    """How often `integrate` evaluates the velocity along `sigmas`."""
    calls = 0

    def count(z: Tensor, sigma: float) -> Tensor:
        nonlocal calls
        calls += 1
        return z

    integrate(count, sigmas.new_zeros(1, 1), sigmas, solver)
    return calls
