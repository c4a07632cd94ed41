"""Steering generation towards a concept: see `suite.run`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from glp_lens.lazy import exports

if TYPE_CHECKING:
    from glp_lens.evals.steering.analysis import analyse
    from glp_lens.evals.steering.concepts import NAMES, Concept, load
    from glp_lens.evals.steering.settings import PROMPTS, SteeringSettings
    from glp_lens.evals.steering.suite import SteeringData, run
    from glp_lens.evals.steering.texts import read_generations, write_generations, write_texts_page

__all__ = ["NAMES", "PROMPTS", "Concept", "SteeringData", "SteeringSettings", "analyse", "load", "read_generations",
           "run", "write_generations", "write_texts_page"]  # fmt: skip

__getattr__, __dir__ = exports(
    __name__,
    {
        "analysis": ("analyse",),
        "concepts": ("NAMES", "Concept", "load"),
        "settings": ("PROMPTS", "SteeringSettings"),
        "suite": ("SteeringData", "run"),
        "texts": ("read_generations", "write_generations", "write_texts_page"),
    },
)
