"""Directions that a method has to beat: random ones, and one of texts whose labels are shuffled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glp_lens import lm
from glp_lens.activations.store import ActivationStore
from glp_lens.arguments import checked
from glp_lens.directions.direction import Direction
from glp_lens.directions.estimators import check_rows
from glp_lens.directions.texts import from_texts
from glp_lens.errors import InputError

_BLOCK = 4096


@checked
def random_isotropic(d_in: int, hook: str, *, seed: int = 0) -> Direction:
    """A direction that is uniform on the sphere.

    Where a few dimensions hold most of the variance, it is unlike anything that activations do: see
    `random_covariance` for the fairer control.
    """
    vector = torch.randn(d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Direction.of(vector, hook, name="random isotropic", method="random-isotropic", provenance={"seed": seed})


@checked
def random_covariance(
    source: ActivationStore | Tensor, *, hook: str | None = None, rows: int = 50_000, seed: int = 0
) -> Direction:
    """A direction drawn from a Gaussian with the covariance of activations, scaled to norm 1.

    It is the sum of the centred rows, each times a standard normal number: exactly such a draw for the covariance of
    the rows used.

    Args:
        source: a store, or rows `(n, d)` with their hook point.
        hook: by default the store's.
        rows: rows of a store to use, at most.
        seed: chooses rows and numbers.

    Raises:
        InputError: rows without a hook point.
    """
    store = None if isinstance(source, Tensor) else source
    if store is None and hook is None:
        raise InputError("rows do not tell their hook point: pass hook=")
    if isinstance(source, Tensor):
        check_rows(source)
    index = np.arange(len(source)) if store is None else np.sort(store.sample_index(rows, seed))
    weights = torch.randn(len(index), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weights -= weights.mean()  # which centres the rows
    parts = []
    for start in range(0, len(index), _BLOCK):
        block = slice(start, start + _BLOCK)
        own = source[block] if isinstance(source, Tensor) else source.take(index[block])
        parts.append(weights[block] @ own.double())
    about = {"seed": seed, "rows": len(index)} | ({} if store is None else {"manifest_hash": store.fingerprint})
    return Direction.of(
        torch.stack(parts).sum(0) / len(index) ** 0.5,
        hook or (store.hook if store else ""),
        name="random covariance",
        method="random-covariance",
        provenance=about,
    )


@checked
def random_labels(
    model: lm.Model, positive: Sequence[str], negative: Sequence[str], hook: str, *, seed: int = 0, **options: Any
) -> Direction:
    """The direction that a method finds between the same texts once their labels are shuffled.

    Args:
        model, positive, negative, hook: as in `from_texts`.
        seed: of the shuffling, and as in `from_texts`.
        options: method and others of `from_texts`.
    """
    texts = [*positive, *negative]
    order = np.random.default_rng(seed).permutation(len(texts))
    shuffled = [texts[i] for i in order]
    return from_texts(
        model, shuffled[: len(positive)], shuffled[len(positive) :], hook,
        **{"name": "random labels", "seed": seed, **options},
    )  # fmt: skip
