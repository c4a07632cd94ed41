"""Settings of the detection suite, and the labels of its own detectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from glp_lens.errors import InputError
from glp_lens.evals.settings import SuiteSettings
from glp_lens.limits import MOST_STEPS
from glp_lens.settings import Settings, option

NORM, LOSS, DIAGONAL, NEIGHBOURS = "norm", "lm loss", "diagonal", "neighbours"
"""Length of an activation; the language model's loss of the token; squared distance from the training mean in standard
deviations, dimension by dimension; distance to the k-th nearest of the training activations."""
FITTED, FITTED_NEIGHBOURS = "fitted mahalanobis", "fitted neighbours"
"""Mahalanobis distance and nearest neighbours of activations of the task's own normal texts."""
PROBE = "probe"
"""A logistic regression that has seen both classes: what the others cannot be expected to reach."""
OWN = (NORM, LOSS, DIAGONAL, NEIGHBOURS, FITTED, FITTED_NEIGHBOURS, PROBE)
ALL = "all"
"""The task of means over tasks."""


@dataclass(frozen=True, kw_only=True)
class ScoreSettings(Settings):
    """How activations are scored, in the suite and in `score`."""

    panel: ClassVar[str] = "Detection"

    denoise_sigmas: tuple[float, ...] = option((0.1, 0.3, 0.5), min=0, max=1)
    """Noise levels of a GLP's denoising error; its score is the mean over them."""
    neighbours: int = option(10, min=1)
    """Which nearest neighbour's distance is a score."""
    reference_rows: int = option(8192, min=2, memory=True)
    """Activations of the training store among which neighbours are sought."""
    token_quantile: float = option(0.9, min=0, max=1)
    """High quantile over the tokens of a text, beside their mean."""

    def __post_init__(self) -> None:
        """Refuse noise levels at which nothing can be told, or that repeat."""
        super().__post_init__()
        levels = self.denoise_sigmas
        if not levels or len(set(levels)) < len(levels) or not all(0 < level < 1 for level in levels):
            raise InputError(f"denoise_sigmas must be distinct noise levels between 0 and 1, got {list(levels)}")


@dataclass(frozen=True, kw_only=True)
class DetectSettings(ScoreSettings, SuiteSettings):
    """What decides the numbers of `detect.run`, besides models and data."""

    panel: ClassVar[str] = "Detection"

    detect_texts: int = option(100, min=8, memory=True)
    """Most odd texts of a task; as many normal ones are tested, and as many set the thresholds."""
    detect_fit: int = option(100, min=8, memory=True)
    """Most other texts of each class, which detectors of a task's own and the supervised probe are fitted to."""
    false_positive_rates: tuple[float, ...] = option((0.01, 0.02, 0.05, 0.1, 0.2), min=0, max=1)
    """Rates of false alarms, over texts, that thresholds are set for."""
    detect_ode_steps: int = option(0, min=0, max=MOST_STEPS)
    """Also score each text's last token by a GLP's log-density, in so many evaluations of its velocity (16 take minutes
    a task); 0 leaves it out."""
