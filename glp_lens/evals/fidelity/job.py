"""The job of `glp-lens fidelity`: held-out texts, the training store's statistics, and the models that reconstruct."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glp_lens.evals.fidelity.settings import FidelitySettings
from glp_lens.pipeline.inputs import (
    ColumnSettings,
    LanguageModelSettings,
    SuiteJob,
    heldout_texts,
    hook_point,
    open_training_store,
)
from glp_lens.settings import Settings, option

if TYPE_CHECKING:
    from glp_lens.artifacts import ActivationModel
    from glp_lens.evals.entries import Entry
    from glp_lens.evals.results import Results
    from glp_lens.pipeline.suites import Inputs
    from glp_lens.types import Json


_LEVELS = (0.3, 0.2, 0.1)
"""Noise levels of reconstructions, besides the paper's."""
_LATENTS = (16, 8)
"""Numbers of latents that an SAE's reconstructions are cut down to."""


@dataclass(frozen=True, kw_only=True)
class FidelityJob(FidelitySettings, LanguageModelSettings, ColumnSettings, SuiteJob):
    """Settings of `fidelity`; of the texts the held-out twentieth is used."""

    essentials = ("models", "store", "texts", "documents", "fast", "model", "device", "out")

    store: Path = option(Path("acts"), panel="Data")
    """Folder of the activation store that the models were trained on: FVU and mean ablation take its statistics."""
    out: Path = option(Path("results/fidelity"), panel="Run")
    """Folder for the output."""


def in_comparison(folder: Path) -> Json:
    """The models and the store of a comparison."""
    return {"models": ("glp", "sae", "pca", "pca_raw", "gaussian"), "store": folder / "acts" / "train"}


def check(settings: Settings) -> Json:
    """Nothing is refused late, and no file is among the settings."""
    return {}


def measure(job: FidelityJob, trained: Mapping[str, ActivationModel], inputs: Inputs) -> Results:
    """Reconstruction error, and the change in language-model loss, on held-out texts."""
    from glp_lens.evals import fidelity as suite
    from glp_lens.pipeline.ranks import matched_ranks

    store, trained, notes = open_training_store(job.store, trained, allow_mismatch=job.allow_mismatch)
    model = inputs.language_model(job, job.device)
    point = hook_point(model, job.hook, trained)
    documents = heldout_texts(job, inputs.texts, job.documents, seed=job.seed, context=job.context)
    results = suite.run(
        entries(trained, job, matched_ranks(trained, store)),
        suite.FidelityData(model, point, documents, store.stats.mean, store.stats.var.sqrt()),
        FidelitySettings.of(job),
        folder=job.out / "cache",
        allow_mismatch=job.allow_mismatch,
    )
    results.failures += notes
    return results


def entries(
    trained: Mapping[str, ActivationModel], settings: FidelitySettings, ranks: Mapping[str, int]
) -> list[Entry]:
    """A GLP and a Gaussian at several noise levels, PCA at several ranks, an SAE with several numbers of latents."""
    from glp_lens.evals.entries import Entry
    from glp_lens.flow.plan import plan
    from glp_lens.interface import Reconstructor

    compared, pace = [], {"fast": True} if settings.fast else {}
    for label, model in trained.items():
        if model.kind == "glp":
            compared.append(Entry(label, model, {"u": settings.project_u, **pace}))
            compared += [Entry(f"{label} sigma={s:g}", model, {"sigma": s, **pace}) for s in _LEVELS]
        elif model.kind == "gaussian":
            compared.append(Entry(label, model, {"sigma": float(plan(u=settings.project_u).path[0])}))
            compared += [Entry(f"{label} sigma={s:g}", model, {"sigma": s}) for s in _LEVELS]
        elif model.kind == "pca":
            pca: Any = model
            own = ranks.get(label, pca.k)
            others = {max(1, own // 4), min(pca.n_features, own * 7 // 5)}
            compared += [Entry(label if k == own else f"{label} k={k}", pca, {"k": k}) for k in sorted({own, *others})]
        elif isinstance(model, Reconstructor) and model.kind != "raw":
            compared.append(Entry(label, model))
            if model.kind == "sae":
                compared += [Entry(f"{label} k={k}", model, {"k": k}) for k in _LATENTS]
    return compared
