"""How well a model knows the distribution of activations: flow-matching loss and typicality scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

from glp_lens.lazy import exports

if TYPE_CHECKING:
    from glp_lens.evals.density.settings import DensitySettings
    from glp_lens.evals.density.suite import DensityData, run
    from glp_lens.evals.density.triples import SIGMA_GRID, stratified_sigma

__all__ = ["SIGMA_GRID", "DensityData", "DensitySettings", "run", "stratified_sigma"]

__getattr__, __dir__ = exports(
    __name__,
    {
        "settings": ("DensitySettings",),
        "suite": ("DensityData", "run"),
        "triples": ("SIGMA_GRID", "stratified_sigma"),
    },
)
