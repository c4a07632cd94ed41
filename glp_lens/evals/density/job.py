"""The job of `glp-lens density`: held-out activations and the models that are scored on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from glp_lens.evals.density.settings import DensitySettings
from glp_lens.pipeline.inputs import SuiteJob, open_heldout_store, open_training_store
from glp_lens.settings import Settings, option

if TYPE_CHECKING:
    from glp_lens.artifacts import ActivationModel
    from glp_lens.evals.results import Results
    from glp_lens.pipeline.suites import Inputs
    from glp_lens.types import Json


@dataclass(frozen=True, kw_only=True)
class DensityJob(DensitySettings, SuiteJob):
    """Settings of `density`."""

    essentials = ("models", "store", "train_store", "density_rows", "device", "out")

    store: Path = option(Path("acts_heldout"), panel="Data")
    """Folder of a store of held-out activations, written by 'collect --split heldout'."""
    train_store: Path | None = option(None, panel="Data")
    """Folder of the training store, to which a diagonal Gaussian, a mixture of Gaussians and the nearest neighbours'
    density are fitted; without it they are left out."""
    out: Path = option(Path("results/density"), panel="Run")
    """Folder for the output."""


def in_comparison(folder: Path) -> Json:
    """The models and the store of a comparison."""
    return {
        "models": ("glp", "sae", "pca", "gaussian"),
        "store": folder / "acts" / "heldout",
        "train_store": folder / "acts" / "train",
    }


def check(settings: Settings) -> Json:
    """Nothing is refused late, and no file is among the settings."""
    return {}


def measure(job: DensityJob, trained: Mapping[str, ActivationModel], inputs: Inputs) -> Results:
    """Held-out loss beside the exact Gaussian bound, bits per dimension, typicality."""
    from glp_lens.evals import density as suite
    from glp_lens.evals.entries import Entry

    heldout, trained = open_heldout_store(job.store, trained, allow_mismatch=job.allow_mismatch)
    notes: list[str] = []
    fit = None
    if job.train_store is not None:
        store, _, notes = open_training_store(job.train_store, trained, allow_mismatch=job.allow_mismatch)
        fit = store.sample(job.fit_rows, job.seed)
    results = suite.run(
        [Entry(label, model) for label, model in trained.items()],
        suite.DensityData(heldout.rows(), heldout.column("doc_id"), heldout.provenance(), fit=fit),
        DensitySettings.of(job),
        folder=job.out / "cache",
        allow_mismatch=job.allow_mismatch,
    )
    results.failures += notes
    history = next((getattr(model, "history", []) for model in trained.values() if model.kind == "glp"), None)
    if history is not None:
        results.extras["history"] = history
    return results
