"""Held-out flow-matching loss by noise level beside the exact Gaussian bound, and a typicality check."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from tqdm.auto import tqdm

from glp_lens.arguments import checked
from glp_lens.errors import InputError
from glp_lens.evals.cache import ResultCache
from glp_lens.evals.density import bits
from glp_lens.evals.density.settings import DensitySettings
from glp_lens.evals.density.triples import SIGMA_GRID, isotropic_velocity, no_velocity, stratified_sigma
from glp_lens.evals.entries import Entry, usable
from glp_lens.evals.results import Results, Setting
from glp_lens.evals.statistics import bootstrap_mean, bootstrap_ratio
from glp_lens.flow.path import interpolate, velocity_target
from glp_lens.flow.schedule import SIGMA_BINS, bin_name, sigma_bin
from glp_lens.interface import Scorer, VelocityField
from glp_lens.types import Acts, Json

TASK = "heldout"
ALL = Setting(sigma="all")
REAL_VS_SHUFFLED = Setting.parse("real vs shuffled")
REFERENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "predict 0": no_velocity,
    "isotropic gaussian": isotropic_velocity,
}


@runtime_checkable
class HasOptimalLoss(Protocol):
    """A model whose lowest possible flow-matching loss is known in closed form, as a Gaussian's is."""

    def optimal_loss(self, sigma: float) -> float:
        """Loss per dimension at one noise level."""

    def optimal_loss_mean(self) -> float:
        """Its integral over sigma in [0, 1]: `(pi / 2) mean sqrt(lambda_i)` for a Gaussian."""


@dataclass(frozen=True, eq=False)
class DensityData:
    """What density is measured on.

    Attributes:
        rows: `(n, d_in)` activations that no model was trained on.
        documents: `(n,)` ids of the documents the rows came from; intervals resample whole documents.
        source: provenance of the rows (`ActivationStore.provenance()`), by which models are checked; nothing is checked
            without it.
        batch_size: rows in one call of a model; it decides memory and speed, no number.
        fit: `(m, d_in)` training rows, to which a diagonal Gaussian, a mixture and the nearest neighbours' density are
            fitted; None leaves them out.
    """

    rows: Acts
    documents: ArrayLike
    source: Json = field(default_factory=dict)
    batch_size: int = 1024
    fit: Acts | None = None


@checked
def run(
    entries: Sequence[Entry],
    data: DensityData,
    settings: DensitySettings | None = None,
    *,
    folder: str | Path | None = None,
    allow_mismatch: bool = False,
) -> Results:
    """Score every model that has a velocity or a score on held-out rows.

    The loss is `mean_d (v(z_sigma, sigma) - (eps - z))^2` in normalised space, on the same (x, eps, sigma)
    triples for all models. Entries with a closed-form bound (the Gaussian) give it as `flow_loss_bound`; the
    bound is for the covariance the entry was fitted on, so its own measured loss stands beside it. Scorers
    are asked to tell real rows from rows shuffled within each dimension, which keep every marginal.

    Args:
        entries: models under labels; those without either capability are passed over.
        data: held-out rows.
        settings: by default `DensitySettings()`.
        folder: where the results are kept: a run with equal inputs reads them.
        allow_mismatch: use models trained on other activations than the rows' source; each is noted in `failures`.

    Returns:
        Metrics of task `heldout`: `flow_loss`, `flow_loss_bound` (setting `sigma=all` or a bin such as
        `sigma=0.1-0.2`), `below_bound_percent`, `below_gaussian_percent` (paired with the Gaussian's
        measured loss), `flow_loss_diff:<other>` (paired, in total and by bin), `score_auroc`, `score_mean`, and
        those of `bits.add_bits`.

    Raises:
        InputError: fewer than two rows, a width that is not the models', ids of another length, labels that repeat, or
            a model that was trained on other activations.
    """
    settings = settings or DensitySettings()
    entries, notes = usable(
        entries,
        (VelocityField, Scorer),
        lambda _: data.source,
        reserved=(*REFERENCES, bits.DIAGONAL, bits.MIXTURE, bits.NEIGHBOURS),
        allow_mismatch=allow_mismatch,
    )
    return ResultCache(folder).results(
        "density",
        lambda: [
            settings.to_json(),
            data.rows,
            np.asarray(data.documents),
            data.fit,
            notes,
            [e.identity() for e in entries],
        ],
        lambda: _run(entries, data, settings, notes),
    )


def _run(entries: Sequence[Entry], data: DensityData, settings: DensitySettings, notes: list[str]) -> Results:
    started = time.perf_counter()
    seed = settings.seed
    rows, owners, massive = _checked(entries, data.rows, np.asarray(data.documents))
    results = Results("density", failures=list(notes))
    results.config = {**settings.to_json(), "bins": SIGMA_BINS}
    results.data = {
        "rows": len(rows),
        "documents": len(np.unique(owners)),
        "massive_rows_dropped": massive,
    }
    fields = _same_space(entries, rows, results.failures)
    if fields:
        sigma = stratified_sigma(len(rows), settings.draws, seed)
        losses = _losses(fields, rows, sigma, data.batch_size, seed)
        _add_losses(results, losses, sigma, owners)
        bounded = {e.label: e.model for e in fields if isinstance(e.model, HasOptimalLoss)}
        _add_bounds(results, cast(dict[str, HasOptimalLoss], bounded), losses, owners)
        _add_differences(results, [e.label for e in fields], losses, sigma, owners)
    else:
        results.failures.append("no model has a velocity field: no flow-matching loss was measured")
    chosen = np.random.default_rng(seed).choice(len(rows), min(settings.score_rows, len(rows)), replace=False)
    chosen.sort()
    _add_scores(results, entries, rows[chosen], owners[chosen], seed)
    if settings.density_rows:
        few = np.random.default_rng(seed + 1).permutation(len(rows))[: settings.density_rows]
        bits.add_bits(
            results, entries, rows[few], owners[few], data.fit,
            task=TASK, steps=settings.ode_steps, probes=settings.ode_probes, seed=seed,
        )  # fmt: skip
    results.seconds = time.perf_counter() - started
    return results


def _checked(entries: Sequence[Entry], rows: Tensor, owners: np.ndarray) -> tuple[Tensor, np.ndarray, int]:
    """Float32 rows and owners without massive activations, which no model was trained on, and their count."""
    if rows.ndim != 2 or len(rows) < 2:
        raise InputError(f"expected at least two held-out rows (n, d_in), got shape {tuple(rows.shape)}")
    if owners.shape != (len(rows),):
        raise InputError(f"expected one document id a row, {len(rows)} in all, got shape {owners.shape}")
    for entry in entries:
        if entry.model.d_in != rows.shape[1]:
            raise InputError(
                f"{entry.label} was trained on width {entry.model.d_in}, the rows have {rows.shape[1]}: "
                "pass rows from the hook point it was trained on"
            )
    rows = rows.float().cpu()
    limits = [e.model.max_norm for e in entries if e.model.max_norm is not None]
    keep = rows.norm(dim=1) <= min(limits) if limits else torch.ones(len(rows), dtype=torch.bool)
    if int(keep.sum()) < 2:
        raise InputError("all held-out rows have massive norms: pass rows collected with the same exclusions")
    return rows[keep], owners[keep.numpy()], int((~keep).sum())


def _same_space(entries: Sequence[Entry], rows: Tensor, failures: list[str]) -> list[Entry]:
    """Velocity fields that share the first one's normaliser; losses in other spaces cannot be compared."""
    fields = [e for e in entries if isinstance(e.model, VelocityField)]
    kept: list[Entry] = []
    few = rows[:8]
    for entry in fields:
        z = cast(VelocityField, entry.model).normalize(few)
        if kept and not torch.allclose(z, cast(VelocityField, kept[0].model).normalize(few), rtol=1e-2, atol=1e-2):
            failures.append(
                f"{entry.label} normalises activations differently from {kept[0].label}: its flow-matching "
                "loss cannot be compared and was left out"
            )
        else:
            kept.append(entry)
    return kept


@torch.no_grad()
def _losses(
    fields: Sequence[Entry], rows: Tensor, sigma: np.ndarray, batch_size: int, seed: int
) -> dict[str, np.ndarray]:
    """Loss per dimension of every field and reference on every triple, `(draws, n)` each."""
    space = cast(VelocityField, fields[0].model)
    velocities: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        **{e.label: cast(VelocityField, e.model).velocity for e in fields},
        **REFERENCES,
    }
    losses = {label: np.empty(sigma.shape) for label in velocities}
    total = sigma.size * len(fields)
    generator = torch.Generator().manual_seed(seed)
    with tqdm(total=total, desc="density", unit="row", unit_scale=True, mininterval=2) as bar:
        for draw in range(len(sigma)):
            noise = torch.randn(rows.shape, generator=generator, dtype=torch.float32)
            for start in range(0, len(rows), batch_size):
                part = slice(start, start + batch_size)
                x, eps = space.normalize(rows[part]), noise[part]
                s = torch.as_tensor(sigma[draw, part], dtype=torch.float32)
                z, target = interpolate(x, eps, s), velocity_target(x, eps)
                for label, velocity in velocities.items():
                    error = velocity(z, s).cpu().float() - target
                    losses[label][draw, part] = error.square().mean(1).double().numpy()
                bar.update(len(x) * len(fields))
    return losses


def _bin(index: int) -> Setting:
    return Setting.parse(bin_name(index))


def _views(sigma: np.ndarray) -> dict[Setting, np.ndarray]:
    """Triples `(draws, n)` in total and by bin of noise levels; empty bins are left out."""
    bins = sigma_bin(sigma)
    views = {ALL: np.ones_like(bins, dtype=bool), **{_bin(b): bins == b for b in range(SIGMA_BINS)}}
    return {setting: chosen for setting, chosen in views.items() if chosen.any()}


def _add_losses(results: Results, losses: dict[str, np.ndarray], sigma: np.ndarray, owners: np.ndarray) -> None:
    documents = np.broadcast_to(owners, sigma.shape)
    for setting, chosen in _views(sigma).items():
        for label, loss in losses.items():
            interval = bootstrap_mean(loss[chosen], documents[chosen])
            results.add(label, TASK, setting, "flow_loss", **interval._asdict())


def _add_bounds(
    results: Results,
    bounded: dict[str, HasOptimalLoss],
    losses: dict[str, np.ndarray],
    owners: np.ndarray,
) -> None:
    """The closed-form bound in total and by bin, and how far each other model lies below the lowest one."""
    if not bounded:
        results.failures.append("no Gaussian among the models: the flow-matching loss has no bound beside it")
        return
    bounds = {label: float(model.optimal_loss_mean()) for label, model in bounded.items()}
    grid_bins = sigma_bin(SIGMA_GRID)
    for label, model in bounded.items():
        results.add(label, TASK, ALL, "flow_loss_bound", bounds[label])
        curve = np.array([float(model.optimal_loss(float(s))) for s in SIGMA_GRID])
        for b in range(SIGMA_BINS):
            results.add(label, TASK, _bin(b), "flow_loss_bound", curve[grid_bins == b].mean())
    best = min(bounds, key=bounds.__getitem__)
    gaussian = losses[best].mean(0)
    for label, loss in losses.items():
        if label in bounded or label in REFERENCES:
            continue
        own = loss.mean(0)
        bound = bootstrap_mean(100 * (1 - own / bounds[best]), owners)
        results.add(label, TASK, ALL, "below_bound_percent", **bound._asdict())
        paired = bootstrap_ratio(100 * (gaussian - own), gaussian, owners)
        results.add(label, TASK, ALL, "below_gaussian_percent", **paired._asdict())


def _add_differences(
    results: Results,
    labels: Sequence[str],
    losses: dict[str, np.ndarray],
    sigma: np.ndarray,
    owners: np.ndarray,
) -> None:
    documents = np.broadcast_to(owners, sigma.shape)
    for setting, chosen in _views(sigma).items():
        for first, second in combinations(labels, 2):
            interval = bootstrap_mean((losses[first] - losses[second])[chosen], documents[chosen])
            results.add(first, TASK, setting, "flow_loss_diff", **interval._asdict(), other=second)


@torch.no_grad()
def _add_scores(results: Results, entries: Sequence[Entry], rows: Tensor, owners: np.ndarray, seed: int) -> None:
    """AUROC of real rows against rows shuffled within each dimension, resampling real documents."""
    generator = torch.Generator().manual_seed(seed + 1)
    order = torch.rand(rows.shape, generator=generator, dtype=torch.float32).argsort(0)
    shuffled = rows.gather(0, order)
    noise = torch.randn(rows.shape, generator=generator, dtype=torch.float32)
    for entry in entries:
        if not isinstance(entry.model, Scorer):
            continue
        real = entry.model.score(rows, noise=noise).cpu().double().numpy()
        fake = np.sort(entry.model.score(shuffled, noise=noise).cpu().double().numpy())
        if not (np.isfinite(real).all() and np.isfinite(fake).all()):
            results.failures.append(f"{entry.label} gave scores that are not finite: no typicality check")
            continue
        # The AUROC is the mean over real rows of the share of fake rows below, ties counting half.
        below = (np.searchsorted(fake, real, "left") + np.searchsorted(fake, real, "right")) / (2 * len(fake))
        results.add(entry.label, TASK, REAL_VS_SHUFFLED, "score_auroc", **bootstrap_mean(below, owners)._asdict())
        results.add(entry.label, TASK, Setting.parse("real"), "score_mean", **bootstrap_mean(real, owners)._asdict())
        results.add(entry.label, TASK, Setting.parse("shuffled"), "score_mean", float(fake.mean()), n=len(fake))
