"""Samples and reconstructions of models against held-out activations, beside the floor of two halves of these."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from tqdm.auto import tqdm

from glp_lens.arguments import checked
from glp_lens.errors import InputError
from glp_lens.evals.cache import ResultCache
from glp_lens.evals.entries import Entry, usable
from glp_lens.evals.generation.classifier import Scored, auc_difference, balanced, classify
from glp_lens.evals.generation.latents import LatentSampler
from glp_lens.evals.generation.measures import (
    Bools,
    Ints,
    Pairwise,
    Rows,
    kolmogorov_smirnov,
    sliced_wasserstein,
)
from glp_lens.evals.generation.moments import FrechetReference, Moments
from glp_lens.evals.generation.settings import GenerationSettings
from glp_lens.evals.generation.shapes import shapes
from glp_lens.evals.results import Results, Setting
from glp_lens.evals.statistics import jackknife
from glp_lens.flow.plan import plan
from glp_lens.interface import Decoder, Featurizer, Reconstructor, Sampler, VelocityField
from glp_lens.intervals import Floats, Interval
from glp_lens.types import Acts, Json

TASK = "heldout"
REAL, FITTED = "real", "fitted-gaussian"
_NONE = Setting()
RAW, STANDARDISED = Setting(space="activations"), Setting(space="standardised")
_GROUPS = 10
"""Groups of documents, and of sampled rows, that a jackknife leaves out one by one."""
_PAIRED = 4096
"""Rows, at most, of each set whose distances to all others are measured."""
_CLASSIFIED = 20_000
"""Rows, at most, of each set that classifiers see."""
_PLAN = ("steps", "solver", "grid", "fast")


@dataclass(frozen=True, eq=False)
class GenerationData:
    """What samples are compared with.

    Attributes:
        rows: `(n, d_in)` activations that no model was trained on.
        documents: `(n,)` ids of the documents the rows came from: halves, groups and tests never part a document.
        training: moments of training rows: those of the fitted Gaussian, and the units of the standardised space.
        training_rows: `(m, d_in)` random training rows, whose latents an SAE's samples are made of.
        max_norm: norm above which activations are massive, if known; see `run`.
        source: provenance of the rows (`ActivationStore.provenance()`), by which models are checked; nothing is checked
            without it.
    """

    rows: Acts
    documents: ArrayLike
    training: Moments
    training_rows: Acts
    max_norm: float | None = None
    source: Json = field(default_factory=dict)


@checked
def run(
    entries: Sequence[Entry],
    data: GenerationData,
    settings: GenerationSettings | None = None,
    *,
    folder: str | Path | None = None,
    allow_mismatch: bool = False,
) -> Results:
    """Compare samples of every model with held-out activations.

    The held-out documents are split in two halves. One is the reference; as many rows of the other are the floor, the
    condition `real`, and what models reconstruct. All sets have equally many rows, since the distances of finite sets
    are too large by what depends on their number. The Gaussian of the training moments is the condition
    `fitted-gaussian`; models that cannot sample but have latents and a decoder are sampled by their latents, each
    drawn independently of the others from its values on training rows. Samplers share their noise.

    One rule for outliers: rows whose norm is above the smallest limit that the data or a model has, and rows that are
    not finite, are left out of every set, real or not, and counted.

    Intervals of AUCs are DeLong's over documents. All others leave out one of ten groups at a time, of documents for
    real rows and of rows for samples (`statistics.jackknife`): a bootstrap repeats rows, which moves distances.

    Args:
        entries: models under labels, with options of `sample`; those that neither sample, reconstruct nor have
            latents to sample are passed over. Reconstructions are by the default options, of `main` entries.
        data: held-out rows, and what is known of training rows.
        settings: by default `GenerationSettings()`.
        folder: where the results are kept: a run with equal inputs reads them.
        allow_mismatch: use models trained on other activations than the rows' source; each is noted in `failures`.

    Returns:
        Metrics of task `heldout`: `frechet`, `frechet_extrapolated` (to infinitely many rows), the same of
        reconstructions as `reconstruction_frechet` and `reconstruction_frechet_extrapolated` (each at
        `space=activations`, in their squared units, and `space=standardised`), `auc_logistic`, `auc_mlp`,
        `sliced_wasserstein`, `mmd2`, `precision`, `recall`, `ks_mean`, `ks_max`, `outlier_rows`, `network_calls`; and
        `frechet_extrapolated_diff:<other>`, `auc_mlp_diff:<other>`, paired, of main entries.

    Raises:
        InputError: rows of another width, ids of another length, fewer than four documents or twenty rows in a half,
            labels that repeat, or a model that was trained on other activations.
    """
    settings = settings or GenerationSettings()
    entries, notes = usable(
        entries,
        (Sampler, Decoder, Reconstructor),
        lambda _: data.source,
        reserved=(REAL, FITTED),
        allow_mismatch=allow_mismatch,
    )
    known = [data.rows, np.asarray(data.documents), data.training.mean, data.training.scatter, data.training_rows]
    return ResultCache(folder).results(
        "generation",
        lambda: [settings.to_json(), known, data.max_norm, notes, [e.identity() for e in entries]],
        lambda: _run(entries, data, settings, notes),
    )


def _run(entries: Sequence[Entry], data: GenerationData, settings: GenerationSettings, notes: list[str]) -> Results:
    started = time.perf_counter()
    compared = _Comparison(entries, data, settings, list(notes))
    compared.measure(REAL, compared.other.rows, compared.other)
    compared.measure(FITTED, compared.fitted())
    for entry in tqdm(entries, desc="generation", unit="model", mininterval=2):
        compared.sample(entry)
        if entry.main and isinstance(entry.model, Reconstructor):
            compared.reconstruct(entry)
    compared.add_differences([FITTED, *(entry.label for entry in entries if entry.main)])
    results = compared.results
    results.extras = shapes(compared.reference.rows, compared.seen, compared.standardise)
    results.seconds = time.perf_counter() - started
    return results


class _Found(NamedTuple):
    """What differences are made of: draws of the Frechet distance of each space, and the network's scores."""

    frechet: tuple[Floats, Floats]
    mlp: Scored


class _Comparison:
    """The reference rows, and the results so far."""

    def __init__(
        self, entries: Sequence[Entry], data: GenerationData, settings: GenerationSettings, notes: list[str]
    ) -> None:
        self.data, self.seed = data, settings.seed
        self.rng = np.random.default_rng(settings.seed)
        rows, owners = _checked(entries, data)
        limits = [limit for limit in (data.max_norm, *(e.model.max_norm for e in entries)) if limit is not None]
        self.limit = min(limits, default=None)
        usual = self._usual(rows)
        self.reference, self.other = self._halves(rows[usual], owners[usual.numpy()], settings.samples)
        self.n = len(self.reference)
        std = data.training.std
        self.weights = torch.where(std > 0, 1 / std, 0.0)
        self.noise = self._normal(self.seed)
        self.results = Results("generation", failures=notes)
        self.results.config = {
            "samples": self.n, "sampling": list(settings.sampling), "seed": self.seed, "groups": self.groups,
            "pairwise_rows": min(self.n, _PAIRED),
        }  # fmt: skip
        self.results.data = {
            "rows": len(rows), "documents": len(np.unique(owners)), "training_rows": data.training.count,
            "max_norm": self.limit, "outlier_rows": int((~usual).sum()),
        }  # fmt: skip
        self.seen: dict[str, Tensor] = {}
        self._found: dict[str, _Found] = {}
        self._frechet = FrechetReference(self._parts(self.reference), self.weights)
        self._standard = self._standardised(self.reference)
        self._pairwise = Pairwise(self._standard.first(_PAIRED))
        self._classified = self._standard.first(_CLASSIFIED)
        self._trains = self._train(self._classified)

    # -- rows ------------------------------------------------------------------------------------------------

    def _usual(self, rows: Tensor) -> Tensor:
        """`(n,)` bool: the rows that are no outliers."""
        norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
        return norms.isfinite() if self.limit is None else norms <= self.limit

    def _halves(self, rows: Tensor, owners: Ints, most: int) -> tuple[Rows, Rows]:
        """Equally many rows of two halves of the documents, each in groups of documents."""
        n_documents = len(np.unique(owners))
        if n_documents < 4:
            raise InputError(f"two halves need at least four held-out documents, got {n_documents}: collect more")
        half = balanced(owners, 2, self.rng)
        n = min(most, *np.bincount(half))
        sides = [np.sort(self.rng.choice(np.flatnonzero(half == side), n, replace=False)) for side in (0, 1)]
        # Halves have equally many rows, not documents, and those of few rows may have lost all of them.
        self.groups = min(_GROUPS, *(len(np.unique(owners[side])) for side in sides))
        if self.groups < 2:
            raise InputError("one document has about half of the held-out rows: collect more documents")
        if n < 2 * self.groups:
            raise InputError(f"each half of the held-out documents needs 20 rows or more, got {n}: collect more")
        first, second = (
            Rows(rows[side], owners[side], balanced(owners[side], self.groups, self.rng)) for side in sides
        )
        return first, second

    def _normal(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.n, self.reference.rows.shape[1], generator=generator, dtype=torch.float32)

    def standardise(self, rows: Tensor) -> Tensor:
        """Each dimension by the training rows' mean and standard deviation."""
        standard: Tensor = ((rows - self.data.training.mean) * self.weights).float()
        return standard

    def _standardised(self, side: Rows) -> Rows:
        return Rows(self.standardise(side.rows), side.owners, side.groups)

    def _train(self, side: Rows) -> Bools:
        """`(n,)`: which rows classifiers are trained on, half of the documents."""
        trains: Bools = balanced(side.owners, 2, np.random.default_rng(self.seed)) == 0
        return trains

    def _parts(self, side: Rows) -> list[Moments]:
        return [Moments.of(side.rows[side.groups == group]) for group in range(self.groups)]

    def _kept(self, label: str, metric: str, rows: Tensor, groups: Ints, setting: Setting) -> Tensor | None:
        """`(n,)` bool: the rows that are no outliers, which are counted; None if hardly any are left, or no group."""
        usual = self._usual(rows)
        self.results.add(label, TASK, setting, metric, int((~usual).sum()), n=len(rows))
        left = np.bincount(groups[usual.numpy()], minlength=self.groups)
        if left.sum() < len(rows) // 2 or left.min() < 1:
            self.results.failures.append(
                f"{label} was not measured: {int((~usual).sum())} of its {len(rows)} rows are outliers ({metric})"
            )
            return None
        return usual

    # -- samplers --------------------------------------------------------------------------------------------

    def fitted(self) -> Tensor:
        """Draws of the Gaussian of the training moments: noise times the symmetric root of the covariance."""
        values, vectors = torch.linalg.eigh(self.data.training.covariance)
        scaled = self.noise.double() @ vectors * values.clamp(min=0).sqrt()
        drawn: Tensor = (scaled @ vectors.T + self.data.training.mean).float()
        return drawn

    def sample(self, entry: Entry) -> None:
        """Draw rows of a model and measure them."""
        model: Any = entry.model
        if isinstance(model, Sampler):
            rows = model.sample(self.n, noise=self.noise.clone(), **entry.options)
            if isinstance(model, VelocityField) and "steps" in inspect.signature(model.sample).parameters:
                calls = plan(0.0, None, **{k: v for k, v in entry.options.items() if k in _PLAN}).network_calls
                self.results.add(entry.label, TASK, entry.setting, "network_calls", calls)
        elif isinstance(model, Featurizer) and isinstance(model, Decoder):
            try:
                rows = LatentSampler(model, model, self.data.training_rows).sample(self.n, seed=self.seed)
            except InputError as error:
                self.results.failures.append(f"{entry.label} was not sampled: {error}")
                return
        else:
            return
        self.measure(entry.label, rows.detach().float().cpu(), setting=entry.setting)

    def reconstruct(self, entry: Entry) -> None:
        """Reconstruct the other half of the held-out rows and measure what became of them."""
        rows = cast(Reconstructor, entry.model).reconstruct(self.other.rows, noise=self._normal(self.seed + 1))
        rows = rows.detach().float().cpu()
        usual = self._kept(entry.label, "reconstruction_outlier_rows", rows, self.other.groups, entry.setting)
        if usual is not None:
            index = usual.numpy()
            side = Rows(rows[usual], self.other.owners[index], self.other.groups[index])
            self._add_frechet(entry.label, entry.setting, "reconstruction_frechet", side)

    # -- measures --------------------------------------------------------------------------------------------

    def measure(self, label: str, rows: Tensor, like: Rows | None = None, setting: Setting = _NONE) -> None:
        """Add all metrics of a set of rows, by default of samples, each of which is a document of its own."""
        index = np.arange(len(rows))
        owners, groups = (index, index % self.groups) if like is None else (like.owners, like.groups)
        usual = self._kept(label, "outlier_rows", rows, groups, setting)
        if usual is None:
            return
        side = Rows(rows[usual], owners[usual.numpy()], groups[usual.numpy()])
        self.seen[label] = side.rows
        frechet = self._add_frechet(label, setting, "frechet", side)
        standard = self._standardised(side)
        n = len(np.unique(self.reference.owners))
        shares = dict(zip(("ks_mean", "ks_max"), kolmogorov_smirnov(self._standard, standard), strict=True))
        discrepancy, shares["precision"], shares["recall"] = self._pairwise.measure(standard.first(_PAIRED))
        draws = {
            "sliced_wasserstein": sliced_wasserstein(self._standard, standard, seed=self.seed), "mmd2": discrepancy
        }  # fmt: skip
        for metric, values in (draws | shares).items():
            interval = jackknife(values, n)
            if metric in shares:
                interval = Interval(interval.value, max(interval.ci_low, 0.0), min(interval.ci_high, 1.0), n)
            self.results.add(label, TASK, setting, metric, **interval._asdict())
        classified = standard.first(_CLASSIFIED)
        tests = classify(self._classified, classified, (self._trains, self._train(classified)), seed=self.seed)
        for name, scored in tests.items():
            self.results.add(label, TASK, setting, f"auc_{name}", **scored.auc._asdict())
        self._found[label] = _Found(frechet, tests["mlp"])

    def _add_frechet(self, label: str, setting: Setting, metric: str, side: Rows) -> tuple[Floats, Floats]:
        draws = self._frechet.distances(self._parts(side))
        n = len(np.unique(self.reference.owners))
        for space, values in zip((RAW, STANDARDISED), draws, strict=True):
            self.results.add(label, TASK, setting | space, metric, **jackknife(values, n)._asdict())
            infinite = jackknife(values, n, extrapolate=True)
            self.results.add(label, TASK, setting | space, f"{metric}_extrapolated", **infinite._asdict())
        return draws

    def add_differences(self, labels: Sequence[str]) -> None:
        """Add the paired differences of main entries: both are measured on the same real rows."""
        n = len(np.unique(self.reference.owners))
        for first, second in combinations([label for label in labels if label in self._found], 2):
            one, other = self._found[first], self._found[second]
            for space, mine, theirs in zip((RAW, STANDARDISED), one.frechet, other.frechet, strict=True):
                gap = jackknife(mine - theirs, n, extrapolate=True)
                self.results.add(first, TASK, space, "frechet_extrapolated_diff", **gap._asdict(), other=second)
            gap = auc_difference(one.mlp, other.mlp)
            self.results.add(first, TASK, "", "auc_mlp_diff", **gap._asdict(), other=second)


def _checked(entries: Sequence[Entry], data: GenerationData) -> tuple[Tensor, Ints]:
    """Held-out rows in float32 and the numbers of their documents."""
    rows, owners = data.rows, np.asarray(data.documents)
    if rows.ndim != 2 or owners.shape != (len(rows),):
        raise InputError(
            f"expected held-out rows (n, d_in) and a document id for each, got {tuple(rows.shape)} and {owners.shape}"
        )
    for name, width in [("the training rows", len(data.training.mean)), *((e.label, e.model.d_in) for e in entries)]:
        if width != rows.shape[1]:
            raise InputError(
                f"{name} have width {width}, the held-out rows {rows.shape[1]}: use rows of one hook point"
            )
    return rows.float().cpu(), np.unique(owners, return_inverse=True)[1]
