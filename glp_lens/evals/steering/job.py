"""The job of `glp-lens steer`: the models that repair steered activations, and the store that scales strengths."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glp_lens.errors import InputError
from glp_lens.evals.steering.settings import RepairSettings, SteeringSettings
from glp_lens.pipeline.inputs import LanguageModelSettings, SuiteJob, hook_point, open_training_store
from glp_lens.settings import Settings, option

if TYPE_CHECKING:
    from glp_lens.artifacts import ActivationModel
    from glp_lens.evals.entries import Entry
    from glp_lens.evals.results import Results
    from glp_lens.pipeline.suites import Inputs
    from glp_lens.types import Json

SAMPLE = 8192
"""Activations of the store that give the unit of strengths and the random controls."""


@dataclass(frozen=True, kw_only=True)
class SteerJob(SteeringSettings, LanguageModelSettings, SuiteJob):
    """Settings of `steer`."""

    essentials = (
        "models", "store", "experiment", "concepts", "repairs", "strengths", "prompts", "noise_seeds", "model",
        "device", "out",
    )  # fmt: skip

    store: Path = option(Path("acts"), panel="Data")
    """Folder of the activation store that the models were trained on: strengths are in units of its spread."""
    sweep_checkpoints: bool = option(False, panel="Data")
    """Also compare the intermediate checkpoints of each GLP, kept by 'train glp --checkpoints'."""
    cache: Path | None = option(None, panel="Run")
    """Folder that keeps directions, texts and scores, by default OUT/cache: runs that share it share what is equal."""
    out: Path = option(Path("results/steering"), panel="Run")
    """Folder for the output."""

    def show(self) -> list[Path]:
        """Write `texts.html`, a page to read the generations, and give its path."""
        from glp_lens.evals.steering.texts import read_generations, write_texts_page

        return [write_texts_page(read_generations(self.out), self.out)]


def in_comparison(folder: Path) -> Json:
    """The models and the store of a comparison."""
    return {
        "models": ("glp", "sae", "pca", "gaussian"),
        "store": folder / "acts" / "train",
        "sweep_checkpoints": False,
        "cache": None,
    }


def check(settings: Settings) -> Json:
    """Refuse a machine that lacks the concept judge's sentence model."""
    from glp_lens.evals.steering.judges import SentenceEmbedder

    SentenceEmbedder.check()
    return {}


def measure(job: SteerJob, trained: Mapping[str, ActivationModel], inputs: Inputs) -> Results:
    """Steer generation, plain and repaired by each model; judge concept and fluency.

    Also writes `generations.parquet`, every text with its scores, and `texts.html`, a page to read them.
    """
    from glp_lens.evals import steering as suite
    from glp_lens.evals.steering.texts import write_generations
    from glp_lens.pipeline.ranks import matched_ranks

    store, trained, notes = open_training_store(job.store, trained, allow_mismatch=job.allow_mismatch)
    if job.sweep_checkpoints:
        trained = dict(trained) | _checkpoints(job, trained)
    model = inputs.language_model(job, job.device)
    data = suite.SteeringData(
        model,
        hook_point(model, job.hook, trained),
        store.sample(SAMPLE, seed=0),
        others={dtype: partial(_opened_again, job, inputs, dtype) for dtype in job.dtypes},
    )
    results = suite.run(
        entries(trained, job, matched_ranks(trained, store)),
        data,
        SteeringSettings.of(job),
        folder=job.cache or job.out / "cache",
        allow_mismatch=job.allow_mismatch,
    )
    results.failures += notes
    write_generations(results.tables["generations"], job.out)
    return results


def _opened_again(job: SteerJob, inputs: Inputs, dtype: Any) -> Any:
    """The language model in another number format; of one in memory, a copy."""
    if inputs.model is None:
        return inputs.language_model(replace(job, lm_dtype=dtype), job.device)
    from glp_lens.types import DTYPES

    copied: Any = copy.deepcopy(inputs.model)
    return copied.to(DTYPES[dtype])


def _checkpoints(job: SteerJob, trained: Mapping[str, ActivationModel]) -> dict[str, ActivationModel]:
    """The intermediate models of each GLP, by label and step, bound to its hook point."""
    from glp_lens.models.glp import GLP
    from glp_lens.provenance import bound

    more: dict[str, ActivationModel] = {}
    for spec in job.models:
        name, _, folder = spec.rpartition("=")
        label = name or Path(folder).name
        if trained[label].kind != "glp":
            continue
        for path in sorted((Path(folder) / "checkpoints").glob("step_*")):
            checkpoint = GLP.from_pretrained(folder, path.name).to(job.device)
            more[f"{label} step {int(path.name.removeprefix('step_'))}"] = bound(checkpoint, trained[label].hook or "")
    if not more:
        raise InputError("none of the models has checkpoints: train with 'glp-lens train glp --checkpoints 8'")
    return more


def entries(trained: Mapping[str, ActivationModel], settings: RepairSettings, ranks: Mapping[str, int]) -> list[Entry]:
    """Each model that can put an edited activation back, with each kind of repair.

    A GLP projects at two noise levels: the paper's, and a milder one that `orthogonal` has too. Raw activations would
    leave it as it is, which is steering without repair. `orthogonal` is of GLPs alone.
    """
    from glp_lens.evals.entries import Entry
    from glp_lens.interface import Projector

    compared: list[Entry] = []
    pace: Json = {"fast": True} if settings.fast else {}
    for label, model in trained.items():
        if not isinstance(model, Projector) or model.kind == "raw":
            continue
        if model.kind == "glp":
            mild: Json = {"sigma": settings.project_sigma, **pace}
            strong: Json = {"sigma": settings.difference_sigma, **pace}
            known: dict[str, list[tuple[str, Json]]] = {
                "paper": [(label, {"u": settings.project_u, **pace})],
                "project": [(f"{label} sigma={settings.project_sigma:g}", mild)],
                "difference": [(f"{label} difference", {**strong, "repair": "difference"})],
                "orthogonal": [(f"{label} orthogonal", {**mild, "repair": "orthogonal"})],
            }  # fmt: skip
        else:
            rank: Json = {"k": ranks[label]} if label in ranks else {}
            known = {
                "project": [(label, rank)],
                "difference": [(f"{label} difference", {**rank, "repair": "difference"})],
            }
        compared += [
            Entry(name, model, options) for repair in settings.repairs for name, options in known.get(repair, [])
        ]
    return compared
