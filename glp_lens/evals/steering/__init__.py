"""Steering generation towards a concept: see `suite.run`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from glp_lens.lazy import exports

if TYPE_CHECKING:
    from glp_lens.evals.steering.concepts import NAMES, Concept, load
    from glp_lens.evals.steering.settings import PROMPTS, SteeringSettings
    from glp_lens.evals.steering.suite import SteeringData, run

__all__ = ["NAMES", "PROMPTS", "Concept", "SteeringData", "SteeringSettings", "load", "run"]

__getattr__, __dir__ = exports(
    __name__,
    {
        "concepts": ("NAMES", "Concept", "load"),
        "settings": ("PROMPTS", "SteeringSettings"),
        "suite": ("SteeringData", "run"),
    },
)
