"""Steering: generation pushed towards a concept, plain and repaired by trained models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from glp_lens.evals.steering.settings import SteeringSettings
from glp_lens.pipeline.inputs import (
    LanguageModelSettings,
    ModelsSettings,
    ResultSettings,
    at_hook,
    hook_point,
    load_models,
    open_language_model,
    open_training_store,
)
from glp_lens.pipeline.results import finish
from glp_lens.settings import option

if TYPE_CHECKING:
    from glp_lens import lm
    from glp_lens.evals.results import Results


@dataclass(frozen=True, kw_only=True)
class SteerJob(SteeringSettings, ModelsSettings, LanguageModelSettings, ResultSettings):
    """Settings of `steer`."""

    store: Path = option(Path("acts"), panel="Data")
    """Folder of the activation store that the models were trained on: strengths are in units of its median norm."""
    out: Path = option(Path("results/steering"), panel="Run")
    """Folder for the output."""


def steer(
    settings: SteerJob,
    *,
    model: lm.Model | None = None,
    page: bool = True,
    command: str | None = None,
    say: Callable[[str], None] = print,
) -> Results:
    """Steer generation towards a topic, plain and repaired by each model, and judge concept and fluency.

    Args:
        model: a HookedTransformer or TransformerBridge to use instead of the one that the settings name.
        page: also write report.html.
        command: the command line, for the page.
        say: prints a line.

    Raises:
        InputError: models, a store or a hook point that cannot be used, or results that are already there.
    """
    from glp_lens.evals import steering as suite
    from glp_lens.pipeline.entries import matched_ranks, projector_entries

    settings.refuse_overwrite("results.json")
    trained = load_models(settings.models, settings.device)
    store = open_training_store(settings.store, trained, allow_mismatch=settings.allow_mismatch)
    trained = at_hook(trained, store.hook)
    opened = open_language_model(settings, settings.device) if model is None else model
    settings.out.mkdir(parents=True, exist_ok=True)  # a folder that cannot be written is told before the work
    results = suite.run(
        projector_entries(trained, settings, matched_ranks(trained, store)),
        suite.SteeringData(opened, hook_point(opened, settings.hook, trained), store.median_norm),
        SteeringSettings.of(settings),
        folder=settings.out / "cache",
        allow_mismatch=settings.allow_mismatch,
    )
    return finish(results, settings, page=page, command=command, say=say)
