"""Steps of the ordinary differential equation dz / dsigma = velocity(z, sigma): pure functions."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

from glp_lens.errors import InputError

Velocity = Callable[[Tensor, float], Tensor]
Step = Callable[[Velocity, Tensor, float, float], Tensor]


def euler(velocity: Velocity, z: Tensor, start: float, end: float) -> Tensor:
    """First order, one evaluation: what the released code does."""
    return z + (end - start) * velocity(z, start)


def heun(velocity: Velocity, z: Tensor, start: float, end: float) -> Tensor:
    """Second order, two evaluations; the last step, into sigma = 0, takes one, as the field at 0 is not trained."""
    first = velocity(z, start)
    predicted = z + (end - start) * first
    if end == 0:
        return predicted
    return z + (end - start) * (first + velocity(predicted, end)) / 2


SOLVERS: dict[str, Step] = {"euler": euler, "heun": heun}


def integrate(velocity: Velocity, z: Tensor, sigmas: Tensor, solver: str = "euler") -> Tensor:
    """Follow the flow along `sigmas`, from the first to the last.

    Args:
        velocity: `(z, sigma)` to the velocity at `z`.
        z: where to start, at noise level `sigmas[0]`.
        sigmas: falling noise levels `(steps + 1,)`.
        solver: a name in `SOLVERS`.
    """
    if solver not in SOLVERS:
        raise InputError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    step = SOLVERS[solver]
    levels = sigmas.tolist()
    for start, end in pairwise(levels):
        z = step(velocity, z, start, end)
    return z
