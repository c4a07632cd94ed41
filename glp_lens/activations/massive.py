"""The norm above which an activation is massive, an outlier that a collection leaves out."""

from __future__ import annotations

import math
from typing import Final, Literal

import numpy as np
import torch
from torch import Tensor

from glp_lens.errors import InputError
from glp_lens.limits import MASSIVE

Massive = float | Literal["gap"] | None
"""How massive activations are detected: by a gap in the data, by a multiple of the median norm, or not at all."""
_GAP: Final = 2.0
"""Ratio of the distances from the centre on both sides of a gap."""
_LEAST, _WITHOUT_GAP = 6.0, 10.0
"""Median distances from the centre: the least beyond a gap, and the limit where the data show no gap."""
_FEW, _RARE = 100, 0.02
"""Rows that show a gap at least, and the largest share of them beyond it: what is common is not massive."""


def check_massive(massive: Massive) -> None:
    """Raises InputError unless it is a way to detect massive activations."""
    number, (low, high) = isinstance(massive, int | float) and not isinstance(massive, bool), MASSIVE
    if massive is not None and massive != "gap" and not (number and low < massive < high):
        raise InputError(
            f"massive must be over {low:g} and under {high:g} (times the median norm), 'gap' or None, got {massive!r}"
        )


def norm_limit(rows: Tensor, massive: Massive) -> float | None:
    """The norm above which activations are massive, from some rows `(n, d)`; None for none.

    A multiple of the median norm may fall inside a cluster: where a few nearly constant dimensions make up most of the
    norm, massive rows are only a few times longer than the others, though many times as far from their centre. So `gap`
    uses distances from the centre, the median of each dimension: rows are massive beyond the first gap in the sorted
    distances, across which they at least double, to 6 median distances or more, if at most 2% of rows are. Without such
    a gap, rows are massive beyond 10 median distances; of fewer than 100 rows, beyond 10 times the median norm.

    The limit is a norm nevertheless, since users of a prior have single rows: halfway between the longest row on this
    side and the shortest on the other, on a logarithmic scale.
    """
    if massive is None:
        return None
    rows = rows.float()
    norms = torch.linalg.vector_norm(rows, dim=1).double().numpy()
    multiple = _WITHOUT_GAP if massive == "gap" else massive
    if massive != "gap" or len(rows) < _FEW:
        return float(multiple * np.median(norms)) if len(rows) else None
    centre = rows.median(0).values
    distances = torch.linalg.vector_norm(rows - centre, dim=1).double().numpy()
    typical = float(np.median(distances))
    if typical == 0:  # most rows are one and the same
        return float(multiple * np.median(norms))
    ranked = np.sort(distances)
    gaps = np.flatnonzero((ranked[1:] >= _GAP * ranked[:-1]) & (ranked[1:] >= _LEAST * typical))
    if len(gaps) and len(ranked) - gaps[0] - 1 <= _RARE * len(ranked):
        beyond = distances > ranked[gaps[0]]
        longest, shortest = float(norms[~beyond].max()), float(norms[beyond].min())
        if longest < shortest:
            return math.sqrt(longest * shortest)
    # No row that is no farther from the centre is longer than this.
    return float(centre.norm()) + _WITHOUT_GAP * typical
