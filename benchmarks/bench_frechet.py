"""The Frechet distance of two covariances, against the classical formula with scipy's root of a general matrix."""

from functools import lru_cache

import numpy as np
import pytest
import torch
from conftest import OURS, Timed
from numpy.typing import NDArray
from scipy import linalg

from glp_lens.evals.generation.moments import Moments, frechet_distance

CLASSICAL = "trace of scipy's sqrtm of the product"
CEILING = "the product of the covariances alone (ceiling)"
DIMENSIONS = [(576, 5), (2048, 1), (4096, 1)]


def moments(d: int, seed: int) -> Moments:
    """Of rows whose spectrum falls over six decades, as that of activations does, along random axes."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(d + 500, d, generator=generator, dtype=torch.float64) * torch.logspace(0, -3, d)
    return Moments.of(rows @ torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q)


def classical(first: Moments, second: Moments) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), as in the released code and others."""
    one: NDArray[np.float64] = first.covariance.numpy()
    other: NDArray[np.float64] = second.covariance.numpy()
    gap = (first.mean - second.mean).numpy()
    return float(gap @ gap + np.trace(one) + np.trace(other) - 2 * np.trace(linalg.sqrtm(one @ other).real))


def product(first: Moments, second: Moments) -> float:
    return float((first.covariance @ second.covariance)[0, 0])


WAYS = {OURS: frechet_distance, CLASSICAL: classical, CEILING: product}
CASES = [(d, rounds, way) for d, rounds in DIMENSIONS for way in WAYS if d < 4096 or way != CLASSICAL]  # minutes there


@lru_cache(maxsize=1)
def pair(d: int) -> tuple[Moments, Moments]:
    return moments(d, 1), moments(d, 2)


@pytest.mark.parametrize(("d", "rounds", "way"), CASES)
def test_frechet(d: int, rounds: int, way: str, timed: Timed) -> None:
    label = f"Frechet distance, d = {d}"
    found = timed(label, way, WAYS[way], *pair(d), amount=1, unit="distances", rounds=rounds)
    if way == CLASSICAL:
        assert found == pytest.approx(frechet_distance(*pair(d)), rel=1e-6)
