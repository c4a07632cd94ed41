"""Statistics of every feature over all tokens, from one pass: memory does not grow with the number of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from glp_lens.types import Features

_SLICE = 64
"""Rows whose powers are summed at once, so that they stay in a processor's cache."""


class Moments:
    """Count, mean, standard deviation, excess kurtosis, extremes, and the number of tokens above zero.

    Powers are summed in float32 over at most 64 rows, and from there on in float64. They are of the distance from the
    mean of the first rows, in their standard deviations: else those of a feature far from zero would cancel, and those
    of a small one vanish.
    """

    def __init__(self, n_features: int) -> None:
        self.count = 0
        self.offset = torch.zeros(n_features, dtype=torch.float32)
        self.factor = torch.zeros(n_features, dtype=torch.float32)
        self.powers = torch.zeros(4, n_features, dtype=torch.float64)
        self.low = torch.full((n_features,), torch.inf, dtype=torch.float32)
        self.high = torch.full((n_features,), -torch.inf, dtype=torch.float32)
        self.positive = torch.zeros(n_features, dtype=torch.float64)

    def update(self, x: Features) -> None:
        """Take in rows `(n, n_features)` float32, but for their extremes."""
        if not self.count:
            spread = x.std(0, correction=0)
            self.factor = torch.where(spread > 0, 1 / spread, 1.0)
            self.offset = -x.mean(0) * self.factor
        self.count += len(x)
        for rows in x.split(_SLICE):
            y = torch.addcmul(self.offset, rows, self.factor)
            square = y * y
            self.powers[0] += y.sum(0)
            self.powers[1] += square.sum(0)
            self.powers[2] += y.mul_(square).sum(0)
            self.powers[3] += square.square_().sum(0)

    def extremes(self, x: Features) -> tuple[Tensor, Tensor]:
        """Take in the extremes of rows, and of features that were never negative how many rows are above zero.

        Returns:
            Least and largest of these rows, `(n_features,)`.
        """
        low, high = x.amin(0), x.amax(0)
        torch.minimum(self.low, low, out=self.low)
        torch.maximum(self.high, high, out=self.high)
        if len(others := (~self.signed).nonzero()[:, 0]):
            some = x if len(others) == x.shape[1] else x.index_select(1, others)
            self.positive[others] += (some > 0).sum(0, dtype=torch.float32)
        return low, high

    @property
    def signed(self) -> Tensor:
        """Which features were negative anywhere, `(n_features,)`."""
        return self.low < 0

    @property
    def largest(self) -> Tensor:
        """Largest absolute value, `(n_features,)`."""
        return torch.maximum(-self.low, self.high).clamp(min=0)

    def summary(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, standard deviation and excess kurtosis, `(n_features,)` float64.

        Of a feature that is constant the deviation is 0, and the kurtosis NaN.
        """
        d, m2, m3, m4 = self.powers / self.count
        variance = (m2 - d * d).clamp(min=0)
        fourth = m4 - 4 * d * m3 + 6 * d * d * m2 - 3 * d**4
        constant = self.low == self.high
        kurtosis = torch.where(constant, torch.nan, fourth / variance.square() - 3)
        mean = torch.where(constant, self.low.double(), (d - self.offset.double()) / self.factor.double())
        return mean, torch.where(constant, 0.0, variance.sqrt() / self.factor.double()), kurtosis

    def state(self) -> dict[str, Tensor]:
        """All of it, as tensors."""
        tensors = {name: each for name, each in vars(self).items() if isinstance(each, Tensor)}
        return {"count": torch.tensor(self.count), **tensors}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a state.

        Raises:
            KeyError: a tensor is missing.
        """
        for name in self.state():
            setattr(self, name, state[name])
        self.count = int(state["count"])


class Histograms:
    """Counts of a sample in equal bins between bounds that are known, and of features that are on.

    Args:
        low, high: bounds of each feature, `(n_features,)`.
        least: size from which each counts as on; one of 0 must be passed.
        bins: number of bins.
    """

    def __init__(self, low: Tensor, high: Tensor, least: Tensor, bins: int) -> None:
        self.low, self.least, self.bins = low, least, bins
        span = high - low
        self.scale = torch.where(span > 0, bins / span, 0.0)
        self.counts = torch.zeros(len(low) * bins, dtype=torch.int64)
        self.on = torch.zeros(len(low), dtype=torch.int64)
        self.rows = 0
        self._first = torch.arange(len(low)) * bins

    def update(self, x: Features) -> None:
        """Take in rows `(n, n_features)`."""
        place = ((x - self.low) * self.scale).long().clamp_(0, self.bins - 1).add_(self._first)
        self.counts += torch.bincount(place.reshape(-1), minlength=len(self.counts))
        self.on += (x.abs() > self.least).sum(0)
        self.rows += len(x)
