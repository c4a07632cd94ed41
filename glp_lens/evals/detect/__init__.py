"""Telling odd activations from normal ones: scores of tokens and texts, their errors, and thresholds that hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

from glp_lens.lazy import exports

if TYPE_CHECKING:
    from glp_lens.evals.detect.detectors import denoising_errors
    from glp_lens.evals.detect.lengths import match_lengths
    from glp_lens.evals.detect.measures import conformal_p, conformal_threshold
    from glp_lens.evals.detect.reading import Tokens, read
    from glp_lens.evals.detect.settings import DetectSettings
    from glp_lens.evals.detect.suite import DetectData, run
    from glp_lens.evals.detect.tasks import DetectTask

__all__ = [
    "DetectData",
    "DetectSettings",
    "DetectTask",
    "Tokens",
    "conformal_p",
    "conformal_threshold",
    "denoising_errors",
    "match_lengths",
    "read",
    "run",
]

__getattr__, __dir__ = exports(
    __name__,
    {
        "detectors": ("denoising_errors",),
        "lengths": ("match_lengths",),
        "measures": ("conformal_p", "conformal_threshold"),
        "reading": ("Tokens", "read"),
        "settings": ("DetectSettings",),
        "suite": ("DetectData", "run"),
        "tasks": ("DetectTask",),
    },
)
