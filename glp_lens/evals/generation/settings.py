"""Settings of the generation suite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from glp_lens.defaults import DEFAULT_SOLVER
from glp_lens.errors import InputError
from glp_lens.evals.settings import SuiteSettings
from glp_lens.limits import MOST_STEPS
from glp_lens.settings import option

if TYPE_CHECKING:
    from glp_lens.types import Json


def sampling_way(text: str) -> str:
    """A way of sampling a flow as `STEPS`, `SOLVER:STEPS` or `fast`.

    Raises:
        InputError: another text.
    """
    sampling_options(str(text))
    return str(text)


def sampling_options(way: str) -> Json:
    """The options of `GLP.sample` that a way of sampling stands for.

    >>> sampling_options("heun:10"), sampling_options("5"), sampling_options("fast")
    ({'solver': 'heun', 'steps': 10}, {'steps': 5}, {'fast': True})

    Raises:
        InputError: no solver or no number of steps.
    """
    if way == "fast":
        return {"fast": True}
    solver, _, steps = way.rpartition(":")
    if not steps.isdecimal() or len(steps) > 9 or not 1 <= int(steps) <= MOST_STEPS:
        raise InputError(
            f"a way of sampling is a number of steps up to {MOST_STEPS}, SOLVER:STEPS such as heun:10, or fast; got "
            f"{way[:80]!r}"
        )
    if solver in ("", DEFAULT_SOLVER):
        return {"steps": int(steps)}
    from glp_lens.flow.solvers import SOLVERS

    if solver not in SOLVERS:
        raise InputError(f"unknown solver {solver!r} in {way!r}: expected one of {', '.join(SOLVERS)}")
    return {"solver": solver, "steps": int(steps)}


@dataclass(frozen=True, kw_only=True)
class GenerationSettings(SuiteSettings):
    """What decides the numbers of `generation.run`, besides models and data, and how a GLP is sampled."""

    panel: ClassVar[str] = "Generation"

    samples: int = option(4096, min=20, memory=True)
    """Rows drawn of each sampler, at most half of the held-out ones, which are as many."""
    sampling: tuple[str, ...] = option(("2", "5", "heun:10", "fast"), parse=sampling_way)
    """Ways of sampling a GLP beside its default of 20 Euler steps: STEPS, SOLVER:STEPS or fast, separated by commas.
    The default and repeats add nothing."""
