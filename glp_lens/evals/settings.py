"""Settings that several suites share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from glp_lens.limits import LARGEST_SEED
from glp_lens.settings import Settings, option


@dataclass(frozen=True, kw_only=True)
class SuiteSettings(Settings):
    """Settings of every suite."""

    seed: int = option(0, min=0, max=LARGEST_SEED)
    """Seed of every random choice."""


@dataclass(frozen=True, kw_only=True)
class ProjectionSettings(SuiteSettings):
    """Settings of suites in which a GLP puts activations back on its manifold."""

    panel: ClassVar[str] = "Suites"

    project_u: float = option(0.5, min=0, max=0.999)
    """Noise level of a GLP's projection as the released code's u: 0 is pure noise, near 1 is data; 0.5 is sigma 0.474
    on 20 steps."""
    fast: bool = False
    """Project with a third of a GLP's network calls, at about the error of the default."""
