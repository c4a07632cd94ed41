"""The whole comparison as stages: collect, train, probe, steer, fidelity, density, report."""

from glp_lens.pipeline.compare import compare
from glp_lens.pipeline.config import CompareConfig

__all__ = ["CompareConfig", "compare"]
