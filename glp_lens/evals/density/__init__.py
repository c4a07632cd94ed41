"""How well a model knows the distribution of activations: flow-matching loss and typicality scores."""

from glp_lens.evals.density.suite import run
from glp_lens.evals.density.triples import SIGMA_GRID, stratified_sigma

__all__ = ["SIGMA_GRID", "run", "stratified_sigma"]
