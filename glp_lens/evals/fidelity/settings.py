"""Settings of the fidelity suite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from glp_lens.settings import Settings, option


@dataclass(frozen=True, kw_only=True)
class FidelitySettings(Settings):
    """What decides the numbers of `fidelity.run`, besides models and data, and at which settings models reconstruct."""

    panel: ClassVar[str] = "Suites"

    documents: int = option(24, min=1)
    """Held-out documents for the change in language-model loss."""
    context: int = option(128, min=2, max=8192, panel="Data")
    """Longest sequence in tokens, the beginning-of-sequence token included."""
    project_u: float = option(0.5, min=0, max=0.999)
    """Noise level of a GLP's projection as the released code's u: 0 is pure noise, near 1 is data; 0.5 is sigma 0.474
    on 20 steps."""
    fast: bool = False
    """Project with a third of a GLP's network calls, at about the error of the default."""
    seed: int = option(0, min=0, panel="Run")
    """Seed of every random choice."""
