"""Jobs: each has one class of settings and one function, for library, command line and comparison alike.

Those of suites are in the packages of the suites, as `job`, and are carried out by `run_suite`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from glp_lens.evals.registry import SUITES
from glp_lens.pipeline.card import CardJob, card, card_sections
from glp_lens.pipeline.choose import ChooseJob, choose
from glp_lens.pipeline.collect import CollectJob, collect, collect_again
from glp_lens.pipeline.compare import CompareJob, compare
from glp_lens.pipeline.direction import DirectionJob, direction
from glp_lens.pipeline.features.build import BuildFeaturesJob, build_features
from glp_lens.pipeline.features.explain import ExplainJob, explain
from glp_lens.pipeline.features.export import ExportFeaturesJob, export_features
from glp_lens.pipeline.features.page import PageFeaturesJob, page_features
from glp_lens.pipeline.features.score import ScoreFeaturesJob, score_features
from glp_lens.pipeline.features.serve import ServeFeaturesJob, serve_features
from glp_lens.pipeline.features.show import ShowFeaturesJob, show_features
from glp_lens.pipeline.features.steered import SteerFeaturesJob, steer_features
from glp_lens.pipeline.features.top import TopFeaturesJob, top_features
from glp_lens.pipeline.generate import GenerateJob, generate
from glp_lens.pipeline.report import ReportJob, report
from glp_lens.pipeline.sample import SampleJob, sample
from glp_lens.pipeline.scale import ScaleJob, scale
from glp_lens.pipeline.score import ScoreJob, score
from glp_lens.pipeline.suites import run_suite
from glp_lens.pipeline.train import TrainJob, train

if TYPE_CHECKING:
    from glp_lens.evals.density.job import DensityJob
    from glp_lens.evals.detect.job import DetectJob
    from glp_lens.evals.fidelity.job import FidelityJob
    from glp_lens.evals.generation.job import GenerationJob
    from glp_lens.evals.probing.job import ProbeJob
    from glp_lens.evals.steering.job import SteerJob

__all__ = [
    "BuildFeaturesJob",
    "CardJob",
    "ChooseJob",
    "CollectJob",
    "CompareJob",
    "DensityJob",
    "DetectJob",
    "DirectionJob",
    "ExplainJob",
    "ExportFeaturesJob",
    "FidelityJob",
    "GenerateJob",
    "GenerationJob",
    "PageFeaturesJob",
    "ProbeJob",
    "ReportJob",
    "SampleJob",
    "ScaleJob",
    "ScoreFeaturesJob",
    "ScoreJob",
    "ServeFeaturesJob",
    "ShowFeaturesJob",
    "SteerFeaturesJob",
    "SteerJob",
    "TopFeaturesJob",
    "TrainJob",
    "build_features",
    "card",
    "card_sections",
    "choose",
    "collect",
    "collect_again",
    "compare",
    "direction",
    "explain",
    "export_features",
    "generate",
    "page_features",
    "report",
    "run_suite",
    "sample",
    "scale",
    "score",
    "score_features",
    "serve_features",
    "show_features",
    "steer_features",
    "top_features",
    "train",
]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    """The settings of a suite's job."""
    for suite in SUITES:
        if name == suite.job_name:
            return suite.settings
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
