"""Settings of the density suite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from glp_lens.evals.settings import SuiteSettings
from glp_lens.settings import option


@dataclass(frozen=True, kw_only=True)
class DensitySettings(SuiteSettings):
    """What decides the numbers of `density.run`, besides models and data."""

    panel: ClassVar[str] = "Density"

    draws: int = option(4, min=1)
    """How often each held-out activation is noised."""
    score_rows: int = option(1024, min=2)
    """Activations in the typicality check, drawn from all documents."""
