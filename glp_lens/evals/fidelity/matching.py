"""Comparing reconstructions at equal distortion.

A noise level or a rank is a knob: whoever reconstructs more closely loses less. So a model measured at
several settings is read off at another model's fraction of variance unexplained (FVU).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Match(NamedTuple):
    """A point between two settings of one model: `(1 - weight) * low + weight * high`."""

    low: str
    high: str
    weight: float


def match(fvu: Mapping[str, float], target: float) -> Match | None:
    """Where between a model's settings its FVU equals `target`, or None outside their range.

    Loss grows faster than linearly with FVU, so a straight line between two settings lies above the true
    curve: the interpolated model looks a little worse than it is.

    Args:
        fvu: by setting.
        target: the other model's FVU.
    """
    ordered = sorted(fvu, key=fvu.__getitem__)
    if len(ordered) < 2 or not fvu[ordered[0]] <= target <= fvu[ordered[-1]]:
        return None
    index = int(np.searchsorted([fvu[name] for name in ordered], target, side="left"))
    low, high = ordered[max(index - 1, 0)], ordered[max(index, 1)]
    gap = fvu[high] - fvu[low]
    return Match(low, high, (target - fvu[low]) / gap if gap else 0.0)
