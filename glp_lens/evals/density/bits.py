"""Bits per dimension: log-densities of held-out rows under models that have one, and under others fitted here.

A density of stored rows needs care: numbers in bfloat16 lie on a lattice, and a density that peaks on its points has no
upper bound. Rows are therefore also scored with uniform noise as wide as the lattice's cells (Theis et al. 2016): minus
that log-density, less the log of the cell, is at least the bits in which the model could write the stored number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import digamma, gammaln
from torch import Tensor

from glp_lens.evals.entries import Entry
from glp_lens.evals.results import Results, Setting
from glp_lens.evals.statistics import bootstrap_mean
from glp_lens.interface import Scorer
from glp_lens.types import Acts

Floats = NDArray[np.float64]
DIAGONAL, MIXTURE, NEIGHBOURS = "diagonal gaussian", "mixture", "neighbours"
"""Labels of the densities that are fitted here."""
COMPONENTS, NEIGHBOUR = 16, 10
"""Gaussians of the mixture, and which nearest neighbour gives the density."""
STORED, DEQUANTISED = Setting(rows="stored"), Setting(rows="dequantised")
_FLOOR = 2.0**-9
"""Least width of a cell, in standard deviations. Values near 0 are sums of larger numbers in bfloat16 and lie on their
lattice: in SmolLM2-135M 0.08% are exactly 0, as many as a normal density has in a cell of this width."""
_FEW = 16
"""Rows that are scored with half the steps too."""


class Estimate(NamedTuple):
    """Log-densities of rows in nats, `(n,)`, and their standard errors by random probes, 0 where they are exact."""

    value: Floats
    error: Floats


@runtime_checkable
class HasLogDensity(Protocol):
    """A model whose log-density is found by an ODE, such as a GLP."""

    def log_density(self, x: Acts, *, steps: int, probes: int | None) -> tuple[Tensor, Tensor]:
        """Log-density in activation units and its standard error, `(n,)` each."""


def cells(rows: Acts) -> tuple[Tensor, Tensor] | None:
    """Lower ends and widths `(n, d)`, float64, of the values that bfloat16 rounds to the rows' own.

    None if some value is no bfloat16 number: such rows lie on no lattice that matters.
    """
    exact = rows.bfloat16()
    if not torch.equal(exact.float(), rows.float()):
        return None
    up, down = (torch.nextafter(exact, torch.full_like(exact, end)).double() for end in (torch.inf, -torch.inf))
    middle = exact.double()
    low, high = (middle + down) / 2, (middle + up) / 2
    least = _FLOOR * middle.std(0, correction=0) / 2
    low, high = torch.minimum(low, middle - least), torch.maximum(high, middle + least)
    return low, high - low


def dequantised(rows: Acts, seed: int) -> tuple[Acts, Floats] | None:
    """The rows spread evenly over their cells, and the sum of the log-widths of each row's cells; None as of `cells`.

    Args:
        rows: `(n, d)` float32 that hold bfloat16 numbers.
        seed: of the noise.
    """
    found = cells(rows)
    if found is None:
        return None
    low, width = found
    noise = torch.rand(rows.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (low + noise * width).float(), width.log().sum(1).numpy()


Density = Callable[[Floats], Floats]


def fitted(rows: Acts, seed: int) -> dict[str, Density]:
    """Log-densities in nats, from rows `(m, d)` float64 to `(m,)`, that are fitted to training rows `(n, d)`.

    A diagonal Gaussian; a mixture of Gaussians with diagonal covariances and the k-th nearest neighbour's density, both
    in the space in which the training rows are white, where one component is the full Gaussian. The last, `log p =
    psi(k) - log n - log V_d - d log r`, with the distance r to the neighbour and the volume V_d of the unit ball, is
    the estimator of Kozachenko and Leonenko; it is not normalised, and in many dimensions far off.
    """
    from sklearn.mixture import GaussianMixture
    from sklearn.neighbors import NearestNeighbors

    x = rows.double().numpy()
    n, d = x.shape
    mean, std = x.mean(0), x.std(0)
    std = np.where(std > 0, std, 1.0)
    values, vectors = np.linalg.eigh(np.cov(((x - mean) / std).T, bias=True).reshape(d, d))
    whiten = vectors / np.sqrt(np.maximum(values, 1e-6)) / std[:, None]
    volume = float(np.linalg.slogdet(whiten)[1])
    white = ((x - mean) @ whiten).astype(np.float32)
    mixture = GaussianMixture(min(COMPONENTS, n), covariance_type="diag", reg_covar=1e-3, random_state=seed).fit(white)
    k = min(NEIGHBOUR, n)
    search = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(white)
    ball = d / 2 * math.log(math.pi) - float(gammaln(d / 2 + 1))

    def diagonal(y: Floats) -> Floats:
        z = (y - mean) / std
        out: Floats = -0.5 * np.square(z).sum(1) - np.log(std).sum() - d / 2 * math.log(2 * math.pi)
        return out

    def of_mixture(y: Floats) -> Floats:
        out: Floats = mixture.score_samples((y - mean) @ whiten) + volume
        return out

    def of_neighbours(y: Floats) -> Floats:
        distance = search.kneighbors(((y - mean) @ whiten).astype(np.float32))[0][:, -1].astype(np.float64)
        with np.errstate(divide="ignore"):  # infinite where a row has k copies among the training rows
            out: Floats = digamma(k) - math.log(n) - ball - d * np.log(distance) + volume
        return out

    return {DIAGONAL: diagonal, MIXTURE: of_mixture, NEIGHBOURS: of_neighbours}


def log_densities(
    entries: Sequence[Entry], rows: Acts, others: Mapping[str, Density], *, steps: int, probes: int
) -> dict[str, Estimate]:
    """Log-densities in activation units of all entries that have one, then of the others."""
    found = {}
    for entry in entries:
        if isinstance(entry.model, HasLogDensity):
            value, error = entry.model.log_density(rows, steps=steps, probes=probes)
            found[entry.label] = Estimate(value.cpu().double().numpy(), error.cpu().double().numpy())
        elif isinstance(entry.model, Scorer) and entry.model.scores_density:
            exact = entry.model.score(rows).cpu().double().numpy()
            found[entry.label] = Estimate(exact, np.zeros_like(exact))
    for label, density in others.items():
        exact = density(rows.double().numpy())
        found[label] = Estimate(exact, np.zeros_like(exact))
    return found


def add_bits(
    results: Results,
    entries: Sequence[Entry],
    rows: Acts,
    owners: NDArray[np.int64],
    fit: Acts | None,
    *,
    task: str,
    steps: int,
    probes: int,
    seed: int,
) -> None:
    """Bits per dimension of all densities on the same rows, as they are stored and spread over their cells.

    Metrics, by `rows=stored|dequantised`: `bits_per_dim`, in units of the rows' standard deviations, with its standard
    error by the probes, `bits_probe_error`, and what half as many steps change on a few rows, `bits_step_change`;
    `bits_per_dim_diff:B`, paired; and of dequantised rows `bits_per_number`, in which the model could write one stored
    number of 16 bits.
    """
    d = rows.shape[1]
    scale = rows.double().std(0, correction=0)
    volume = float(torch.where(scale > 0, scale, 1.0).log().sum())
    others = {} if fit is None else fitted(fit, seed)
    views: dict[Setting, tuple[Acts, Floats | None]] = {STORED: (rows, None)}
    spread = dequantised(rows, seed + 2)
    if spread is not None:
        views[DEQUANTISED] = spread

    def bits(value: Floats) -> Floats:
        return -value / (d * math.log(2))

    stored: dict[str, Estimate] = {}
    for setting, (x, widths) in views.items():
        found = log_densities(entries, x, others, steps=steps, probes=probes)
        stored = stored or found
        usable = {label: each for label, each in found.items() if np.isfinite(each.value).all()}
        for label in (label for label in found if label not in usable):
            bad = int((~np.isfinite(found[label].value)).sum())
            results.failures.append(
                f"{label}: the log-density of {bad} of {len(x)} {setting.get('rows')} rows is not finite, so that they "
                "have no bits per dimension"
            )
        for label, each in usable.items():
            mean = bootstrap_mean(bits(each.value + volume), owners)
            results.add(label, task, setting, "bits_per_dim", **mean._asdict())
            if each.error.any():
                error = math.sqrt(float(np.square(each.error).sum())) / len(x) / (d * math.log(2))
                results.add(label, task, setting, "bits_probe_error", error, n=len(x))
            if widths is not None:
                written = bootstrap_mean(bits(each.value + widths), owners)
                results.add(label, task, setting, "bits_per_number", **written._asdict())
        for first, second in combinations(usable, 2):
            gap = bootstrap_mean(bits(usable[first].value - usable[second].value), owners)
            results.add(first, task, setting, "bits_per_dim_diff", **gap._asdict(), other=second)
    for entry in entries:
        if isinstance(entry.model, HasLogDensity) and steps > 1:
            few = rows[:_FEW]
            coarse = entry.model.log_density(few, steps=steps // 2, probes=probes)[0].cpu().double().numpy()
            change = float(np.abs(bits(stored[entry.label].value[: len(few)] - coarse)).mean())
            results.add(entry.label, task, STORED, "bits_step_change", change, n=len(few))
