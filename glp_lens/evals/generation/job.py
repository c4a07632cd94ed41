"""The job of `glp-lens generation`: held-out activations, the training store's moments, and the models."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from glp_lens.defaults import DEFAULT_STEPS
from glp_lens.errors import InputError
from glp_lens.evals.generation.settings import GenerationSettings, sampling_options
from glp_lens.pipeline.inputs import SuiteJob, open_heldout_store, open_training_store
from glp_lens.settings import Settings, option

if TYPE_CHECKING:
    from glp_lens.artifacts import ActivationModel
    from glp_lens.evals.entries import Entry
    from glp_lens.evals.results import Results
    from glp_lens.pipeline.suites import Inputs
    from glp_lens.types import Json

_TRAINING_ROWS, _LATENT_ROWS = 200_000, 16_384
"""Training rows, at most, that moments are taken of, and that latents are drawn from."""
_BATCH = 4096


@dataclass(frozen=True, kw_only=True)
class GenerationJob(GenerationSettings, SuiteJob):
    """Settings of `generation`."""

    essentials = ("models", "store", "heldout", "samples", "sampling", "device", "out")

    store: Path = option(Path("acts"), panel="Data")
    """Folder of the activation store that the models were trained on: the fitted Gaussian is that of its rows."""
    heldout: Path = option(Path("acts_heldout"), panel="Data")
    """Folder of a store of held-out activations, written by 'collect --split heldout'."""
    out: Path = option(Path("results/generation"), panel="Run")
    """Folder for the output."""


def in_comparison(folder: Path) -> Json:
    """The models and the stores of a comparison."""
    acts = folder / "acts"
    return {"models": ("glp", "sae", "pca", "gaussian"), "store": acts / "train", "heldout": acts / "heldout"}


def check(settings: Settings) -> Json:
    """Nothing is refused late, and no file is among the settings."""
    return {}


def measure(job: GenerationJob, trained: Mapping[str, ActivationModel], inputs: Inputs) -> Results:
    """Samples of each model against held-out activations: distances, classifiers, precision."""
    from glp_lens.activations.massive import norm_limit
    from glp_lens.evals import generation as suite

    store, trained, notes = open_training_store(job.store, trained, allow_mismatch=job.allow_mismatch)
    heldout, trained = open_heldout_store(job.heldout, trained, allow_mismatch=job.allow_mismatch)
    if heldout.fingerprint == store.fingerprint:
        raise InputError(f"{job.heldout} is the training store: pass held-out activations as --heldout")
    count = min(_TRAINING_ROWS, len(store))
    size = min(_BATCH, count)
    with closing(store.batches(size, seed=job.seed, epochs=1)) as batches:
        moments = suite.Moments.of_batches(islice(batches, count // size))
    rows = store.sample(_LATENT_ROWS, job.seed)
    limits = [limit for limit in (store.manifest.max_norm, heldout.manifest.max_norm) if limit is not None]
    results = suite.run(
        entries(trained, job),
        suite.GenerationData(
            heldout.rows(),
            heldout.column("doc_id"),
            moments,
            rows,
            min(limits) if limits else norm_limit(rows, "gap"),
            heldout.provenance(),
        ),
        GenerationSettings.of(job),
        folder=job.out / "cache",
        allow_mismatch=job.allow_mismatch,
    )
    results.failures += notes
    return results


def entries(trained: Mapping[str, ActivationModel], settings: GenerationSettings) -> list[Entry]:
    """A GLP sampled by its default and in other ways, and every other model as it is."""
    from glp_lens.evals.entries import Entry

    compared = []
    for label, model in trained.items():
        compared.append(Entry(label, model))
        if model.kind == "glp":
            ways = {tuple(sampling_options(way).items()): way for way in settings.sampling}
            ways.pop((("steps", DEFAULT_STEPS),), None)  # the default, which is there
            for options, way in ((dict(each), way) for each, way in ways.items()):
                name = "fast" if way == "fast" else " ".join(f"{key}={value}" for key, value in options.items())
                compared.append(Entry(f"{label} {name}", model, options, main=False))
    return compared
