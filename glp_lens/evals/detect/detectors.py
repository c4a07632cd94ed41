"""Scores of tokens, higher for odder: of trained models, of simple distances, and of what is fitted to a task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from glp_lens.artifacts import ActivationModel
from glp_lens.evals.detect.reading import Tokens
from glp_lens.evals.detect.settings import (
    DIAGONAL,
    FITTED,
    FITTED_NEIGHBOURS,
    LOSS,
    NEIGHBOURS,
    NORM,
    ScoreSettings,
)
from glp_lens.evals.entries import Entry
from glp_lens.flow.path import interpolate, velocity_target
from glp_lens.interface import Scorer, VelocityField
from glp_lens.types import Acts

Floats = NDArray[np.float64]
Detector = Callable[[Tokens], Floats]
ODE_PROBES = 4


@torch.no_grad()
def denoising_errors(field: VelocityField, rows: Acts, sigmas: Sequence[float], seed: int = 0) -> Floats:
    """Mean over dimensions of `(v - (eps - x))^2` at each noise level, `(len(sigmas), n)`.

    All levels, and all models that are asked with one seed, see the same noise, so that ratios of two models' errors
    are of the models alone.

    Args:
        field: a prior.
        rows: `(n, d_in)` in activation units.
        sigmas: noise levels between 0 and 1.
        seed: of the noise.
    """
    x = field.normalize(rows)
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(x.device)
    target = velocity_target(x, eps)
    errors = [(field.velocity(interpolate(x, eps, s), s) - target).square().mean(1) for s in sigmas]
    return torch.stack(errors).cpu().double().numpy()


def score_tokens(
    tokens: Tokens,
    entries: Sequence[Entry],
    settings: ScoreSettings,
    *,
    reference: ActivationModel | None = None,
    neighbours: Detector | None = None,
    seed: int = 0,
) -> dict[str, Floats]:
    """Scores `(n,)` of all tokens by detector, those that no task is needed for.

    Entries with an option `sigma` (several noise levels) are scored by denoising error, its mean over the levels and,
    as `label sigma=0.3`, each level alone; with `reference`, also by the mean log of the ratio of their error to the
    reference's, as `label ratio`. Those with `method` `ode` are left to `log_density_scores`. All others by minus
    `score`, with their options; a Gaussian, with a Gaussian as `reference`, also by the log of the ratio of densities.

    Args:
        reference: the prior that the entries with `sigma` were finetuned from, or another of the same kind.
        neighbours: of training rows, see `nearest`.
        seed: of the noise.
    """
    found: dict[str, Floats] = {NORM: tokens.rows.norm(dim=1).double().numpy(), LOSS: tokens.loss}
    fields = [e.model for e in entries if isinstance(e.model, VelocityField)]
    if fields:
        found[DIAGONAL] = fields[0].normalize(tokens.rows).square().sum(1).double().numpy()
    if neighbours is not None:
        found[NEIGHBOURS] = neighbours(tokens)
    base = None
    if reference is not None:
        base = denoising_errors(cast(VelocityField, reference), tokens.rows, settings.denoise_sigmas, seed)
    for entry in entries:
        if entry.options.get("method") == "ode":
            continue
        if "sigma" in entry.options:
            levels = entry.options["sigma"]
            errors = denoising_errors(cast(VelocityField, entry.model), tokens.rows, levels, seed)
            found[entry.label] = errors.mean(0)
            found |= {
                f"{entry.label} sigma={s:g}": error for s, error in zip(levels, errors, strict=True) if len(levels) > 1
            }
            if base is not None:
                found[f"{entry.label} ratio"] = np.log(errors / base).mean(0)
        else:
            scorer: Any = entry.model
            found[entry.label] = -scorer.score(tokens.rows, **entry.options).cpu().double().numpy()
            if isinstance(reference, Scorer) and reference.kind == entry.model.kind == "gaussian":
                found[f"{entry.label} ratio"] = found[entry.label] + reference.score(tokens.rows).cpu().double().numpy()
    return found


def log_density_scores(tokens: Tokens, entries: Sequence[Entry]) -> dict[str, Floats]:
    """Minus the log-density by the ODE of each text's last token, NaN for the others, of entries with that method."""
    found = {}
    last = np.flatnonzero(np.append(np.diff(tokens.text) != 0, True))
    for entry in entries:
        if entry.options.get("method") == "ode":
            scorer: Any = entry.model
            values = np.full(len(tokens), np.nan)
            rows = tokens.rows[torch.from_numpy(last)]
            values[last] = -cast(Scorer, scorer).score(rows, **entry.options).cpu().double().numpy()
            found[entry.label] = values
    return found


def nearest(rows: Acts, k: int) -> Detector:
    """Distance to the k-th nearest of rows `(m, d)`, with each dimension in their standard deviations.

    Source: Sun et al. 2022, "Out-of-distribution detection with deep nearest neighbors", without their normalisation to
    unit length, which would drop the norm.
    """
    from sklearn.neighbors import NearestNeighbors

    x = rows.double().numpy()
    mean, std = x.mean(0), np.where(x.std(0) > 0, x.std(0), 1.0)
    search = NearestNeighbors(n_neighbors=min(k, len(x)), algorithm="brute").fit(((x - mean) / std).astype(np.float32))

    def score(tokens: Tokens) -> Floats:
        z = ((tokens.rows.double().numpy() - mean) / std).astype(np.float32)
        out: Floats = search.kneighbors(z)[0][:, -1].astype(np.float64)
        return out

    return score


def fitted(normal: Tokens, k: int) -> dict[str, Detector]:
    """Detectors of a task's own normal tokens: Mahalanobis distance, shrunk as Ledoit and Wolf do, and neighbours."""
    from sklearn.covariance import LedoitWolf

    covariance = LedoitWolf().fit(normal.rows.double().numpy())

    def mahalanobis(tokens: Tokens) -> Floats:
        out: Floats = covariance.mahalanobis(tokens.rows.double().numpy())
        return out

    return {FITTED: mahalanobis, FITTED_NEIGHBOURS: nearest(normal.rows, k)}


def probe(normal: Floats, odd: Floats, seed: int) -> Callable[[Floats], Floats]:
    """A logistic regression on texts' mean activations `(n, d)` of both classes; the penalty is cross-validated."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        {"logisticregression__C": np.logspace(-5, 0, 6)},
        scoring="roc_auc",
        cv=StratifiedKFold(min(5, len(normal), len(odd)), shuffle=True, random_state=seed),
    ).fit(np.concatenate([normal, odd]), np.repeat([0, 1], [len(normal), len(odd)]))
    decide: Callable[[Floats], Floats] = search.decision_function
    return decide


def pooled(scores: Floats, text: NDArray[np.int64], n: int, quantile: float | None = None) -> Floats:
    """One score a text, `(n,)`: the mean over its tokens, or a quantile; NaN for texts without any, and of NaNs."""
    bounds = np.searchsorted(text, np.arange(n + 1))  # tokens are in the order of their texts
    out = np.full(n, np.nan)
    for i, (start, end) in enumerate(pairwise(bounds)):
        own = scores[start:end]
        own = own[np.isfinite(own)]
        if len(own):
            out[i] = own.mean() if quantile is None else np.quantile(own, quantile)
    return out
