"""Settings of the fidelity suite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from glp_lens.evals.settings import ProjectionSettings
from glp_lens.settings import option


@dataclass(frozen=True, kw_only=True)
class FidelitySettings(ProjectionSettings):
    """What decides the numbers of `fidelity.run`, besides models and data, and at which settings models reconstruct."""

    panel: ClassVar[str] = "Suites"

    documents: int = option(24, min=1, memory=True)
    """Held-out documents for the change in language-model loss."""
    context: int = option(128, min=2, max=8192, panel="Data", memory=True)
    """Longest sequence in tokens, the beginning-of-sequence token included."""
    noise_levels: tuple[float, ...] = option((0.05, 0.1, 0.2, 0.3, 0.5), min=0.001, max=0.999)
    """Noise levels at which activations are also replaced by their noised selves, without any model."""
