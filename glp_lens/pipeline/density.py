"""Density: how well trained models know the distribution of held-out activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from glp_lens.evals.density.settings import DensitySettings
from glp_lens.pipeline.inputs import ModelsSettings, ResultSettings, load_models, open_heldout_store
from glp_lens.pipeline.results import finish
from glp_lens.settings import option

if TYPE_CHECKING:
    from glp_lens.evals.results import Results


@dataclass(frozen=True, kw_only=True)
class DensityJob(DensitySettings, ModelsSettings, ResultSettings):
    """Settings of `density`."""

    store: Path = option(Path("acts_heldout"), panel="Data")
    """Folder of a store of held-out activations, written by 'collect --split heldout'."""
    out: Path = option(Path("results/density"), panel="Run")
    """Folder for the output."""


def density(
    settings: DensityJob, *, page: bool = True, command: str | None = None, say: Callable[[str], None] = print
) -> Results:
    """Held-out flow-matching loss beside the exact Gaussian bound, and typicality scores.

    Args:
        page: also write report.html.
        command: the command line, for the page.
        say: prints a line.

    Raises:
        InputError: models or a store that cannot be used, or results that are already there.
    """
    from glp_lens.evals import density as suite
    from glp_lens.evals.entries import Entry
    from glp_lens.models.glp import GLP
    from glp_lens.pipeline.inputs import at_hook

    settings.refuse_overwrite("results.json")
    trained = load_models(settings.models, settings.device)
    heldout = open_heldout_store(settings.store, trained, allow_mismatch=settings.allow_mismatch)
    trained = at_hook(trained, heldout.hook)
    settings.out.mkdir(parents=True, exist_ok=True)  # a folder that cannot be written is told before the work
    results = suite.run(
        [Entry(label, model) for label, model in trained.items()],
        suite.DensityData(heldout.rows(), heldout.column("doc_id"), heldout.provenance()),
        DensitySettings.of(settings),
        folder=settings.out / "cache",
        allow_mismatch=settings.allow_mismatch,
    )
    if glp := next((model for model in trained.values() if isinstance(model, GLP)), None):
        results.extras["history"] = glp.history
    return finish(results, settings, page=page, command=command, say=say)
