"""Whether samples of a model look like real activations: distances, tests and pictures beside the fitted Gaussian."""

from __future__ import annotations

from typing import TYPE_CHECKING

from glp_lens.lazy import exports

if TYPE_CHECKING:
    from glp_lens.evals.generation.moments import Moments, frechet_distance
    from glp_lens.evals.generation.settings import GenerationSettings
    from glp_lens.evals.generation.suite import GenerationData, run

__all__ = ["GenerationData", "GenerationSettings", "Moments", "frechet_distance", "run"]

__getattr__, __dir__ = exports(
    __name__,
    {
        "moments": ("Moments", "frechet_distance"),
        "settings": ("GenerationSettings",),
        "suite": ("GenerationData", "run"),
    },
)
