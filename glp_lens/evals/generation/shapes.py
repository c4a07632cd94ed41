"""What pictures of samples are drawn from: principal components, norms, and single dimensions."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from glp_lens.evals.generation.moments import Moments
from glp_lens.intervals import Floats
from glp_lens.types import Acts, Json

_POINTS, _BINS, _SHOWN = 250, 48, 6
REFERENCE = "reference"


def shapes(reference: Acts, sets: Mapping[str, Acts], standardise: Callable[[Tensor], Tensor]) -> Json:
    """Numbers of the pictures, as JSON.

    Args:
        reference: `(n, d)` real rows.
        sets: other rows by label.
        standardise: what is done to rows before their principal components.

    Returns:
        `components`: `share` of the variance of the first two components of the standardised reference, and `points`
        by label, a few hundred pairs; `norms` and `dimensions`: `edges` of bins, and `shares` of rows in each by label.
        Dimensions are those in which the reference is farthest from normal, by excess kurtosis.
    """
    everything = {REFERENCE: reference, **sets}
    moments = Moments.of(standardise(reference))
    values, vectors = torch.linalg.eigh(moments.covariance)
    axes = vectors[:, [-1, -2]]
    shown = {label: rows[:: max(1, len(rows) // _POINTS)][:_POINTS] for label, rows in everything.items()}
    points = {
        label: np.round(((standardise(rows).double() - moments.mean) @ axes).numpy(), 3).tolist()
        for label, rows in shown.items()
    }
    share = [float(values[-1] / values.sum()), float(values[-2] / values.sum())]
    norms = {label: torch.linalg.vector_norm(rows, dim=1).double().numpy() for label, rows in everything.items()}
    rest = reference.double() - reference.double().mean(0)
    kurtosis = rest.pow(4).mean(0) / rest.square().mean(0).clamp(min=1e-30).square()
    chosen = kurtosis.argsort(descending=True)[:_SHOWN].tolist()
    return {
        "components": {"share": share, "points": points},
        "norms": _histogram(norms),
        "dimensions": [
            {"dimension": i} | _histogram({label: rows[:, i].double().numpy() for label, rows in everything.items()})
            for i in chosen
        ],
    }


def _histogram(values: Mapping[str, Floats]) -> Json:
    """Shares of each set in bins that reach from the 0.2th to the 99.8th percentile of the reference, a bit wider."""
    low, high = np.quantile(values[REFERENCE], [0.002, 0.998])
    margin = 0.15 * (high - low) or 1.0
    edges = np.linspace(low - margin, high + margin, _BINS + 1)
    shares = {label: (np.histogram(own, edges)[0] / len(own)).round(6).tolist() for label, own in values.items()}
    return {"edges": edges.tolist(), "shares": shares}
