"""One pass over tokens, in which all features of all models are measured; it can be interrupted, and goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from glp_lens.errors import InputError
from glp_lens.evals.entries import Entry
from glp_lens.features.accumulate import Moments
from glp_lens.features.examples import Bands, Block, Highest
from glp_lens.features.sample import ROWS, Reservoir, noise, priorities
from glp_lens.features.settings import FeatureSettings
from glp_lens.features.source import Batch, Source
from glp_lens.files import Kind, check_tensors, read_tensors, write_tensors
from glp_lens.interface import Featurizer

SAVE_SECONDS = 30.0
"""The state is saved this often, or less often where that would take more than a twentieth of the time."""
STATE = "state.safetensors"
"""In the folder of features: the state of an unfinished pass."""
_KIND = Kind("unfinished pass over tokens", "delete it to start afresh")


class Tracked:
    """What is collected of one model's features.

    Args:
        entry: the model, with the options of `encode` and its hook point.
        settings: how many passages, and of what size.
    """

    def __init__(self, entry: Entry, settings: FeatureSettings) -> None:
        assert isinstance(entry.model, Featurizer)
        assert entry.hook is not None
        self.entry, self.hook, self.model = entry, entry.hook, entry.model
        before = (settings.window - 1) * 2 // 3
        self._window = (before, settings.window - 1 - before)
        n = self.model.n_features
        self.moments = Moments(n)
        self.highest = {"top": Highest(n, settings.top, *self._window)}
        self.bands = Bands(n, settings.per_band, *self._window)
        self._top = settings.top

    @torch.no_grad()
    def update(self, batch: Batch, shared: _Shared) -> None:
        """Take in a batch."""
        rows = batch.rows[self.hook]
        eps = shared.noise(rows.shape[1]) if self.model.stochastic else None
        for part, starts in _blocks(batch):
            x = self.model.encode(rows[part], noise=None if eps is None else eps[part], **self.entry.options)
            self._take(shared.block(x.float().cpu(), part), starts)

    def _take(self, block: Block, starts: list[int]) -> None:
        seen = self.moments.count
        self.moments.update(block.x)
        for start, stop in zip(starts, [*starts[1:], len(block.x)], strict=True):
            low, high = self.moments.extremes(block.x[start:stop])
            self.highest["top"].update(block, start, stop, high)
            if "bottom" not in self.highest and bool((low < 0).any()):
                self.highest["bottom"] = self._bottom()
            if "bottom" in self.highest:
                self.highest["bottom"].update(block, start, stop, low)
        self.bands.update(block, seen, self.moments.largest, self.moments.signed)

    def _bottom(self) -> Highest:
        return Highest(self.model.n_features, self._top, *self._window, sign=-1)

    def state(self) -> dict[str, Tensor]:
        """All of it, as tensors."""
        parts: dict[str, Any] = {"moments": self.moments, "bands": self.bands, **self.highest}
        return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state().items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state.

        Raises:
            KeyError: a tensor is missing.
        """
        if "bottom.value" in state:
            self.highest["bottom"] = self._bottom()
        parts: dict[str, Any] = {"moments": self.moments, "bands": self.bands, **self.highest}
        for name, part in parts.items():
            part.restore(_below(state, f"{name}."))

    def check(self) -> None:
        """Refuse features that are not finite.

        Raises:
            InputError: some are infinite or NaN.
        """
        finite = torch.isfinite(self.moments.low) & torch.isfinite(self.moments.high)
        if not finite.all():
            first = int((~finite).nonzero()[0, 0])
            raise InputError(f"feature {first} of {self.entry.label} is not finite: leave the model out")


@dataclass
class Measured:
    """What a pass has collected.

    Attributes:
        tracked: of each model.
        rows: the sample of rows at all hook points.
        tokens: number of tokens.
        texts: number of texts.
    """

    tracked: list[Tracked]
    rows: Reservoir
    tokens: int
    texts: int


def measure(
    entries: Sequence[Entry], source: Source, settings: FeatureSettings, *, seed: int, folder: Path, key: str
) -> Measured:
    """Read all tokens once, and collect what is measured of each model's features.

    The state is saved in `folder` from time to time, and an interrupted pass goes on from there: its result is that of
    one that was not interrupted, to the last bit.

    Args:
        entries: the models, each with its hook point.
        source: the tokens.
        settings: how much is kept.
        seed: of a prior's noise and of random choices.
        folder: of the state.
        key: stands for all that the result depends on: a state of another one is begun anew.

    Raises:
        InputError: no tokens, features that are not finite, or a damaged state.
    """
    tracked = [Tracked(entry, settings) for entry in entries]
    path = folder / STATE
    place, tokens, texts, rows = _restore(path, key, tracked, settings)
    clock = _Clock()
    with tqdm(total=source.total, initial=tokens, desc="features", unit="tok", unit_scale=True, mininterval=2) as bar:
        for batch in source.batches(place, tokens):
            rows = rows or Reservoir({hook: x.shape[1] for hook, x in batch.rows.items()}, settings.sample)
            priority = priorities(batch.keys, batch.positions, seed)
            columns = {"keys": batch.keys, "positions": batch.positions, "token_ids": batch.token_ids}
            rows.update(batch.rows, columns, priority)
            shared = _Shared(batch, priority, seed)
            for each in tracked:
                each.update(batch, shared)
            tokens, texts = tokens + len(batch), texts + len(batch.starts)
            bar.update(len(batch))
            if batch.resume is not None and clock.due():
                _save(path, key, tracked, rows, {"place": batch.resume, "tokens": tokens, "texts": texts})
                clock.saved()
    if rows is None:
        raise InputError("no token to measure features on: pass texts that are not empty")
    for each in tracked:
        each.check()
    return Measured(tracked, rows, tokens, texts)


class _Shared:
    """What all models share of a batch."""

    def __init__(self, batch: Batch, priority: np.ndarray, seed: int) -> None:
        self.batch, self.seed = batch, seed
        breaks = np.zeros(len(batch), dtype=np.int64)
        breaks[1:] = np.diff(batch.positions) != 1
        breaks[batch.starts] = 1
        self._columns = (
            torch.from_numpy(batch.keys.view(np.int64)),
            torch.from_numpy(batch.positions),
            torch.from_numpy(batch.token_ids.astype(np.int32)),
            torch.from_numpy(priority),
            torch.from_numpy(breaks.cumsum()),
        )
        self._noise: dict[int, Tensor] = {}

    def noise(self, width: int) -> Tensor:
        """Of all rows, `(n, width)`."""
        if width not in self._noise:
            self._noise[width] = noise(self.batch.keys, self.batch.positions, width, self.seed)
        return self._noise[width]

    def block(self, x: Tensor, part: slice) -> Block:
        """Features of some of the rows, with what is known of them."""
        return Block(x, *(column[part] for column in self._columns))


class _Clock:
    """When a state is to be saved."""

    def __init__(self) -> None:
        self._wait, self._last, self._began = SAVE_SECONDS, time.monotonic(), 0.0

    def due(self) -> bool:
        """Whether it is time."""
        self._began = time.monotonic()
        return self._began - self._last >= self._wait

    def saved(self) -> None:
        """To be called once it is saved."""
        self._last = time.monotonic()
        self._wait = max(SAVE_SECONDS, 20 * (self._last - self._began))


def _blocks(batch: Batch) -> Iterator[tuple[slice, list[int]]]:
    """Whole texts of at least `ROWS` rows together, where there are so many, and the first row of each text in them."""
    starts = batch.starts.tolist()
    first = 0
    for i, stop in enumerate([*starts[1:], len(batch)], 1):
        if stop - starts[first] >= ROWS or i == len(starts):
            yield slice(starts[first], stop), [start - starts[first] for start in starts[first:i]]
            first = i


def _save(path: Path, key: str, tracked: list[Tracked], rows: Reservoir, place: dict[str, int]) -> None:
    tensors = {f"{i}.{name}": value for i, each in enumerate(tracked) for name, value in each.state().items()}
    tensors |= {f"rows.{name}": value for name, value in rows.state().items()}
    about = {"key": key, **{name: str(value) for name, value in place.items()}}
    write_tensors(path, tensors, _KIND, about)


def _restore(
    path: Path, key: str, tracked: list[Tracked], settings: FeatureSettings
) -> tuple[int, int, int, Reservoir | None]:
    """Where to go on, tokens and texts so far, and the rows kept."""
    if not path.exists():
        return 0, 0, 0, None
    about, digest = check_tensors(path, _KIND)
    if about.get("key") != key:
        return 0, 0, 0, None
    state = read_tensors(path, _KIND, digest)
    try:
        for i, each in enumerate(tracked):
            each.restore(_below(state, f"{i}."))
        hooks = {each.hook for each in tracked}
        rows = Reservoir({hook: state[f"rows.{hook}"].shape[1] for hook in sorted(hooks)}, settings.sample)
        rows.restore(_below(state, "rows."))
        return int(about["place"]), int(about["tokens"]), int(about["texts"]), rows
    except (KeyError, ValueError) as error:
        raise InputError(f"{path} is of another version ({error}): {_KIND.remedy}") from None


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
