"""Steering generation towards a concept: see `suite.run`."""

from glp_lens.evals.steering.concepts import NAMES, Concept, load
from glp_lens.evals.steering.suite import STRENGTHS, run

__all__ = ["NAMES", "STRENGTHS", "Concept", "load", "run"]
