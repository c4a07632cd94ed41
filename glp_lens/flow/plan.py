"""The noise levels and the solver of a call to sample or to project, from its options."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from glp_lens.defaults import DEFAULT_SOLVER, DEFAULT_STEPS
from glp_lens.errors import InputError
from glp_lens.flow import solvers
from glp_lens.flow.schedule import path, path_from_sigma, path_from_u, share_of


class Plan(NamedTuple):
    """What `solvers.integrate` takes besides a velocity and a start.

    Attributes:
        path: falling noise levels `(steps + 1,)`, the last 0.
        solver: a name in `solvers.SOLVERS`.
    """

    path: Tensor
    solver: str

    @property
    def network_calls(self) -> int:
        """Evaluations of the denoiser for each row."""
        return solvers.network_calls(self.path, self.solver)


class Preset(NamedTuple):
    """A solver, a spacing of noise levels, and the number of steps from pure noise to data that suit each other."""

    solver: str
    grid: str
    steps: int


FAST = Preset("ab2", "early", 6)
"""About the error of 20 Euler steps, in sampling and in projection, with the fewest evaluations that do for both.

A projection from `sigma` takes `ceil(6 sigma)` of them, but two at least, as a method of second order needs.
Measured in docs/results/solvers.
"""


def plan(
    u: float | None = None,
    sigma: float | None = None,
    steps: int = DEFAULT_STEPS,
    solver: str = DEFAULT_SOLVER,
    grid: str = "released",
    fast: bool = False,
) -> Plan:
    """Noise levels and solver from a noise level down to data.

    Args:
        u: the released code's noise level, an index into the `steps`-grid, where 0 is pure noise; 0.5 if neither is
            given.
        sigma: the noise level itself.
        steps: steps from pure noise to data; from `sigma`, `ceil(sigma * steps)` of them.
        solver: a name in `solvers.SOLVERS`.
        grid: `released`, or a name in `schedule.SPACINGS`.
        fast: take solver, grid and steps from `FAST`, from the noise level that the other options give.

    Raises:
        InputError: both of `u` and `sigma`, `fast` with another solver or grid, or options out of range.
    """
    if u is not None and sigma is not None:
        raise InputError("pass u (the released code's noise level) or sigma, not both")
    if sigma is None:
        released = path_from_u(0.5 if u is None else u, steps)
        sigma = float(released[0])
    else:
        released = path_from_sigma(sigma, steps)
    if fast:
        if (solver, grid) != ("euler", "released"):
            raise InputError(f"fast has its own solver and grid, got {solver} and {grid}: leave them or fast out")
        return Plan(path(sigma, max(2, share_of(sigma, FAST.steps)), FAST.grid), FAST.solver)
    if solver not in solvers.SOLVERS:
        raise InputError(f"solver must be one of {', '.join(solvers.SOLVERS)}, got {solver!r}")
    return Plan(released if grid == "released" else path_from_sigma(sigma, steps, grid), solver)
