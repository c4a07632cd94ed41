"""The job of `glp-lens steer`: the models that repair steered activations, and the store that scales strengths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from glp_lens.evals.steering.settings import SteeringSettings
from glp_lens.pipeline.inputs import LanguageModelSettings, SuiteJob, hook_point, open_training_store
from glp_lens.settings import Settings, option

if TYPE_CHECKING:
    from glp_lens.artifacts import ActivationModel
    from glp_lens.evals.entries import Entry
    from glp_lens.evals.results import Results
    from glp_lens.pipeline.suites import Inputs
    from glp_lens.types import Json


@dataclass(frozen=True, kw_only=True)
class SteerJob(SteeringSettings, LanguageModelSettings, SuiteJob):
    """Settings of `steer`."""

    store: Path = option(Path("acts"), panel="Data")
    """Folder of the activation store that the models were trained on: strengths are in units of its median norm."""
    out: Path = option(Path("results/steering"), panel="Run")
    """Folder for the output."""


def in_comparison(folder: Path) -> Json:
    """The models and the store of a comparison."""
    return {"models": ("glp", "sae", "pca", "gaussian"), "store": folder / "acts" / "train"}


def check(settings: Settings) -> Json:
    """Refuse a machine that lacks the concept judge's sentence model."""
    from glp_lens.evals.steering.judges import SentenceEmbedder

    SentenceEmbedder.check()
    return {}


def measure(job: SteerJob, trained: Mapping[str, ActivationModel], inputs: Inputs) -> Results:
    """Steer generation towards a topic, plain and repaired by each model, and judge concept and fluency."""
    from glp_lens.evals import steering as suite
    from glp_lens.pipeline.ranks import matched_ranks

    store, trained, notes = open_training_store(job.store, trained, allow_mismatch=job.allow_mismatch)
    model = inputs.language_model(job, job.device)
    results = suite.run(
        entries(trained, job, matched_ranks(trained, store)),
        suite.SteeringData(model, hook_point(model, job.hook, trained), store.median_norm),
        SteeringSettings.of(job),
        folder=job.out / "cache",
        allow_mismatch=job.allow_mismatch,
    )
    results.failures += notes
    return results


def entries(
    trained: Mapping[str, ActivationModel], settings: SteeringSettings, ranks: Mapping[str, int]
) -> list[Entry]:
    """Each model that can put an edited activation back, a GLP at two noise levels.

    Raw activations would leave it as it is, which is steering without repair.
    """
    from glp_lens.evals.entries import Entry
    from glp_lens.interface import Projector

    compared, pace = [], {"fast": True} if settings.fast else {}
    for label, model in trained.items():
        if model.kind == "glp":
            sigma = settings.project_sigma
            compared += [
                Entry(label, model, {"u": settings.project_u, **pace}),
                Entry(f"{label} sigma={sigma:g}", model, {"sigma": sigma, **pace}),
            ]
        elif isinstance(model, Projector) and model.kind != "raw":
            compared.append(Entry(label, model, {"k": ranks[label]} if label in ranks else {}))
    return compared
