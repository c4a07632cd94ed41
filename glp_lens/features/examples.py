"""Passages in which a feature is active, collected in one pass: memory grows with features and passages alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glp_lens.features.folder import BANDS
from glp_lens.types import Features

ON = 0.1
"""A feature that takes both signs is on where its size is above this share of its largest."""
ROWS = 65_536
"""Rows among which random ones are looked for: as many as were read, and of more a random part."""
_EDGES = torch.tensor([low for low, _ in BANDS] + [BANDS[-1][1]], dtype=torch.float64)


@dataclass(frozen=True)
class Block:
    """Features of whole texts, with what is known of their rows.

    Attributes:
        x: `(n, n_features)` float32.
        keys: `(n,)` int64 of the texts, rows of a text one after the other.
        positions: `(n,)` int64, in the texts.
        token_ids: `(n,)` int32.
        priority: `(n,)` float64, random in [0, 1).
        run: `(n,)` int64, a number for each stretch of consecutive positions of a text.
    """

    x: Features
    keys: Tensor
    positions: Tensor
    token_ids: Tensor
    priority: Tensor
    run: Tensor


class Passages:
    """Some passages of each feature: the token shown, and a window of tokens around it.

    Args:
        n_features: number of features.
        size: most passages of a feature.
        before, after: tokens of the window before and after the one shown, fewer at the ends of a text.
    """

    def __init__(self, n_features: int, size: int, before: int, after: int) -> None:
        shape, width = (n_features, size), before + 1 + after
        self.before = before
        self.offsets = torch.arange(-before, after + 1)
        self.value = torch.zeros(shape, dtype=torch.float32)
        """0 where there is no passage."""
        self.key = torch.zeros(shape, dtype=torch.int64)
        self.position = torch.zeros(shape, dtype=torch.int32)
        self.token_ids = torch.full((*shape, width), -1, dtype=torch.int32)
        """-1 where the window reaches beyond the text."""
        self.values = torch.zeros((*shape, width), dtype=torch.float32)

    def put(self, features: Tensor, slots: Tensor, block: Block, rows: Tensor) -> None:
        """Replace passages `(m,)` by those around rows of a block."""
        places = rows[:, None] + self.offsets
        inside = places.clamp(0, len(block.keys) - 1)
        whole = (places == inside) & (block.run[inside] == block.run[rows][:, None])
        self.value[features, slots] = block.x[rows, features]
        self.key[features, slots] = block.keys[rows]
        self.position[features, slots] = block.positions[rows].int()
        self.token_ids[features, slots] = torch.where(whole, block.token_ids[inside], -1)
        self.values[features, slots] = torch.where(whole, block.x[inside, features[:, None]], 0.0)

    def state(self) -> dict[str, Tensor]:
        """All of it, as tensors."""
        return {name: each for name, each in vars(self).items() if isinstance(each, Tensor) and name != "offsets"}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a state.

        Raises:
            KeyError: a tensor is missing.
        """
        for name in self.state():
            setattr(self, name, state[name])


class Highest(Passages):
    """Of each feature the tokens of the highest values, or with `sign` -1 the lowest ones, one of each text.

    They are above zero, or below. Of equal values the first stays.
    """

    def __init__(self, n_features: int, size: int, before: int, after: int, sign: int = 1) -> None:
        super().__init__(n_features, size, before, after)
        self.sign = sign
        self.least = torch.zeros(n_features, dtype=torch.float32)
        """What a value has to be above, times `sign`."""

    def update(self, block: Block, start: int, stop: int, peak: Tensor) -> None:
        """Take in the rows of one text of a block, whose most extreme values `(n_features,)` are known."""
        features = (peak * self.sign > self.least).nonzero()[:, 0]
        if not len(features):
            return
        value = peak[features] * self.sign
        same = self.key[features] == block.keys[start]  # a text that comes in pieces, or twice
        kept = self.value[features] * self.sign
        slots = torch.where(same.any(1), same.int().argmax(1), kept.argmin(1))
        better = value > kept.gather(1, slots[:, None])[:, 0]
        features, slots = features[better], slots[better]
        if not len(features):
            return
        rows = start + (block.x[start:stop].index_select(1, features) * self.sign).argmax(0)
        self.put(features, slots, block, rows)
        self.least[features] = (self.value[features] * self.sign).amin(1)


class Bands(Passages):
    """Of each feature random tokens on which it is on, some from each fifth of the way to its largest value.

    Each row has a random priority, and of a band the rows of least priority are kept. The largest value is known at the
    end only. When it grows, what was kept is sorted into the new bands. Such a band is complete below the priority down
    to which every old band that it overlaps was: from there on it takes rows as before, and what else it was left is
    only shown where there is room. Once many rows were read, only a random part of further ones is looked at.
    """

    def __init__(self, n_features: int, size: int, before: int, after: int) -> None:
        super().__init__(n_features, len(BANDS) * size, before, after)
        self.size = size
        self.priority = torch.full((n_features, len(BANDS) * size), torch.inf, dtype=torch.float64)
        """Of the passages kept; infinite for none."""
        self.limit = torch.ones(n_features, len(BANDS), dtype=torch.float64)
        """All rows of a band with a lower priority are kept, which go before others."""
        self.scale = torch.zeros(n_features, dtype=torch.float32)
        """Largest size by which passages are sorted into bands."""

    def update(self, block: Block, seen: int, largest: Tensor, signed: Tensor) -> None:
        """Take in a block.

        Args:
            block: features of texts.
            seen: rows before this batch of texts.
            largest: largest size of each feature so far, this block included, `(n_features,)`.
            signed: which features take both signs.
        """
        least = torch.where(signed, ON, 0.0).double()
        if len(grown := (largest > self.scale).nonzero()[:, 0]):
            self._settle(grown, largest[grown], least[grown], None, None)
        wanted = (block.priority < min(1.0, ROWS / max(seen, 1))).nonzero()[:, 0]
        rows = wanted[block.priority[wanted].argsort()]
        if not len(rows):
            return
        # The least size of a band that still wants rows of this priority: smaller values need no closer look.
        closed = self.limit <= block.priority[rows[0]]
        edges = torch.maximum(_EDGES[:-1], least[:, None]).masked_fill(closed, torch.inf).amin(1)
        x = block.x.index_select(0, rows)
        row, feature = (x.abs() > (edges * self.scale).float() * (1 - 1e-6)).nonzero(as_tuple=True)
        level = x[row, feature].abs().double() / self.scale[feature]
        band = _band(level)
        fits = (level > least[feature]) & (block.priority[rows][row] < self.limit[feature, band])
        row, feature, band = row[fits], feature[fits], band[fits]
        # Of each band the first that find a place, and one more, down to which it then is complete.
        first = _ordinal(feature * len(BANDS) + band) <= self.size
        row, feature = row[first], feature[first]
        if len(row):
            features, index = feature.unique(return_inverse=True)
            column = _ordinal(feature)
            new = torch.full((len(features), int(column.max()) + 1), -1, dtype=torch.int64)
            new[index, column] = rows[row]
            self._settle(features, self.scale[features], least[features], block, new)

    def _settle(self, features: Tensor, scale: Tensor, least: Tensor, block: Block | None, new: Tensor | None) -> None:
        """Sort the passages of some features, and rows `(m, c)` of a block (-1 for none), into bands anew."""
        limit = self._complete(features, scale)
        value, priority = self.value[features], self.priority[features]
        if new is not None and block is not None:
            missing = new < 0
            value = torch.cat([value, block.x[new.clamp(min=0), features[:, None]]], 1)
            priority = torch.cat([priority, block.priority[new.clamp(min=0)].masked_fill(missing, torch.inf)], 1)
        priority, order = priority.sort(dim=1, stable=True)
        level = value.gather(1, order).abs().double() / scale[:, None]
        band = _band(level)
        on, keep = (level > least[:, None]) & priority.isfinite(), torch.zeros_like(band, dtype=torch.bool)
        for i in range(len(BANDS)):
            mine = on & (band == i)
            rank = mine.cumsum(1)
            keep |= mine & (rank <= self.size)
            # The first that finds no place: from there on the band is not complete.
            first = priority.masked_fill(~mine | (rank <= self.size), torch.inf).amin(1)
            limit[:, i] = torch.minimum(limit[:, i], first)
        chosen = (~keep).int().argsort(dim=1, stable=True)[:, : self.value.shape[1]]
        source, held = order.gather(1, chosen), keep.gather(1, chosen)
        self._place(features, source, held, block, new)
        self.priority[features] = priority.gather(1, chosen).masked_fill(~held, torch.inf)
        self.limit[features], self.scale[features] = limit, scale

    def _complete(self, features: Tensor, scale: Tensor) -> Tensor:
        """For each band of a new scale `(m,)` the priority below which all its rows are kept, `(m, bands)`."""
        old = _EDGES * self.scale[features].double()[:, None]
        new = _EDGES * scale.double()[:, None]
        low = torch.maximum(old[:, None, :-1], new[:, :-1, None])
        high = torch.minimum(old[:, None, 1:], new[:, 1:, None])
        overlaps = low < high
        limit: Tensor = torch.where(overlaps, self.limit[features][:, None, :], 1.0).amin(2)
        return limit

    def _place(self, features: Tensor, source: Tensor, held: Tensor, block: Block | None, new: Tensor | None) -> None:
        """Put passages into slots: `source` `(m, slots)` is a slot where one lies, or beyond them a row of `new`."""
        slots = self.value.shape[1]
        old = source.clamp(max=slots - 1)
        whose = features[:, None]
        for each in (self.key, self.position, self.token_ids, self.values):
            each[features] = each[whose, old]
        self.value[features] = self.value[whose, old].masked_fill(~held, 0.0)
        if block is not None and new is not None:
            index, slot = ((source >= slots) & held).nonzero(as_tuple=True)
            self.put(features[index], slot, block, new[index, source[index, slot] - slots])

    def groups(self) -> Tensor:
        """The band of each passage, `(n_features, slots)`; -1 for none."""
        level = self.value.abs().double() / self.scale[:, None]
        return _band(level).masked_fill(self.priority.isinf(), -1)


def _band(level: Tensor) -> Tensor:
    """The band of sizes as shares of the largest; of no size, any."""
    return (level.nan_to_num() * len(BANDS)).long().clamp(0, len(BANDS) - 1)


def _ordinal(group: Tensor) -> Tensor:
    """How many elements before each `(n,)` are of its group."""
    order = group.argsort(stable=True)
    _, counts = group[order].unique_consecutive(return_counts=True)
    within = torch.arange(len(group)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return torch.empty_like(within).scatter_(0, order, within)


def groups_of(highest: dict[str, Highest], bands: Bands) -> list[tuple[str, Passages, Tensor]]:
    """Each group of passages: its name, where they lie, and their slots in order, `(n_features, size)`, -1 for none."""
    found: list[tuple[str, Passages, Any]] = []
    for name, each in highest.items():
        size, order = (each.value * each.sign).sort(dim=1, descending=True, stable=True)
        found.append((name, each, order.masked_fill(size <= 0, -1)))
    group = bands.groups()
    order = bands.priority.argsort(dim=1, stable=True)
    for i in range(len(BANDS)):
        mine = group.gather(1, order) == i
        first = (~mine).int().argsort(dim=1, stable=True)[:, : bands.size]
        found.append((f"band {i}", bands, order.gather(1, first).masked_fill(~mine.gather(1, first), -1)))
    return found
