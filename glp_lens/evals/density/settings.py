"""Settings of the density suite."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from glp_lens.evals.settings import SuiteSettings
from glp_lens.limits import MOST_STEPS
from glp_lens.settings import option


@dataclass(frozen=True, kw_only=True)
class DensitySettings(SuiteSettings):
    """What decides the numbers of `density.run`, besides models and data."""

    panel: ClassVar[str] = "Density"
    acts_with: ClassVar[Mapping[str, str]] = {"ode_steps": "density_rows", "ode_probes": "density_rows"}

    draws: int = option(4, min=1, memory=True)
    """How often each held-out activation is noised."""
    score_rows: int = option(1024, min=2, memory=True)
    """Activations in the typicality check, drawn from all documents."""
    density_rows: int = option(128, min=0, memory=True)
    """Activations whose log-density is compared in bits per dimension; 0 for none. A GLP's takes seconds a row."""
    ode_steps: int = option(32, min=1, max=MOST_STEPS)
    """Evaluations of the velocity in a log-density by the probability-flow ODE."""
    ode_probes: int = option(4, min=0, memory=True)
    """Random directions that estimate its divergence; 0 for the exact trace."""
    fit_rows: int = option(50_000, min=100, memory=True)
    """Training activations that the diagonal Gaussian, the mixture and the nearest neighbours are fitted to."""
