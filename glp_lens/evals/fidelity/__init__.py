"""What a language model loses when its activations are replaced by a model's reconstruction of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from glp_lens.lazy import exports

if TYPE_CHECKING:
    from glp_lens.evals.fidelity.settings import FidelitySettings
    from glp_lens.evals.fidelity.suite import FidelityData, run

__all__ = ["FidelityData", "FidelitySettings", "run"]

__getattr__, __dir__ = exports(
    __name__,
    {
        "settings": ("FidelitySettings",),
        "suite": ("FidelityData", "run"),
    },
)
