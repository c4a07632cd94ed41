"""Where a pass over tokens reads them: texts through a language model, or the rows of a store."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glp_lens import lm
from glp_lens.activations import ActivationStore
from glp_lens.activations.forward import read
from glp_lens.activations.tokens import rule, select
from glp_lens.corpus import Document
from glp_lens.types import Acts

_DOCUMENTS = 128
"""Texts that are tokenised, and packed into forward passes, together."""
_TOKENS = 4096
"""Tokens of a forward pass, and most rows that are read of a store, or of one text of it, at once."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of some texts, those of a text one after the other.

    Attributes:
        rows: at each hook point `(n, d)` float32 on the CPU.
        keys: `(n,)` uint64 of the texts.
        positions: `(n,)` in the texts, where BOS is 0.
        token_ids: `(n,)`.
        starts: first row of each text.
        resume: where to go on after this batch; None where that is not possible yet.
    """

    rows: Mapping[str, Acts]
    keys: NDArray[np.uint64]
    positions: NDArray[np.int64]
    token_ids: NDArray[np.int64]
    starts: NDArray[np.int64]
    resume: int | None

    def __len__(self) -> int:
        return len(self.keys)


class Source(Protocol):
    """Tokens with their activations at one or several hook points, the same ones in every run."""

    @property
    def total(self) -> int | None:
        """How many tokens come, where that is known."""

    def batches(self, place: int, tokens: int) -> Iterator[Batch]:
        """Batches from a place on, which some batch has given as `resume`, after this many tokens; from 0 at first."""


class Texts:
    """Texts that a language model reads. Left out are BOS, position 0 and massive activations.

    Args:
        model: a HookedTransformer or TransformerBridge.
        documents: the same ones at every iteration.
        hooks: hook points.
        context: tokens read of a text, BOS included.
        limits: norm at a hook point above which a token is left out.
        tokens: texts are read until there are so many; 0 reads all.
    """

    def __init__(
        self,
        model: lm.Model,
        documents: Iterable[Document],
        hooks: Sequence[str],
        *,
        context: int,
        limits: Mapping[str, float],
        tokens: int,
    ) -> None:
        self.model, self.documents, self.hooks = model, documents, list(hooks)
        self.context, self.limits, self.tokens = context, limits, tokens
        self._rule = rule(model, "all", (), 0)
        self._way = lm.way_of_reading(model, self.hooks, context)

    @property
    def total(self) -> int | None:
        """The tokens that were asked for."""
        return self.tokens or None

    def batches(self, place: int, tokens: int) -> Iterator[Batch]:
        """Batches of similar lengths, from a number of texts on."""
        documents = islice(iter(self.documents), place, None)
        while (not self.tokens or tokens < self.tokens) and (group := list(islice(documents, _DOCUMENTS))):
            ids = lm.to_ids(self.model, [document.text for document in group], self.context)
            if self.tokens:
                have = np.cumsum([0, *(len(row) - 1 for row in ids)])
                n = int(np.searchsorted(have, self.tokens - tokens))
                group, ids = group[:n], ids[:n]
            place += len(group)
            waiting: Batch | None = None
            for forwarded in read(self.model, ids, self.hooks, _TOKENS, self._way):
                kept = select(forwarded, self._rule, self.limits, group, torch.float32)
                tokens += len(kept.text)
                if not len(kept.text):
                    continue
                if waiting is not None:
                    yield waiting
                keys = np.array([document.id for document in group], dtype=np.uint64)[kept.text]
                starts = np.flatnonzero(np.diff(kept.text, prepend=-1))
                waiting = Batch(kept.rows, keys, kept.position, kept.token_id, starts, None)
            if waiting is not None:
                yield replace(waiting, resume=place)


class Rows:
    """The rows of a store, whose texts are told by their number and by positions that begin anew.

    A stretch of more than 4096 rows of one text counts as several texts of one key.

    Args:
        store: the store.
        tokens: rows to read, the first ones; 0 reads all.
    """

    def __init__(self, store: ActivationStore, tokens: int) -> None:
        self.store, self.tokens = store, min(tokens or len(store), len(store))

    @property
    def total(self) -> int | None:
        """The rows that are read."""
        return self.tokens

    def batches(self, place: int, tokens: int) -> Iterator[Batch]:
        """Batches from a row on."""
        while place < self.tokens:
            stop = min(place + _TOKENS, self.tokens)
            columns = [self.store.column(name, place, stop) for name in ("doc_id", "position", "token_id")]
            keys, positions, ids = (columns[0].astype(np.uint64), *(each.astype(np.int64) for each in columns[1:]))
            starts = np.r_[0, 1 + np.flatnonzero((keys[1:] != keys[:-1]) | (positions[1:] <= positions[:-1]))]
            if stop < self.tokens and len(starts) > 1:  # the last text may go on
                stop, starts = place + int(starts[-1]), starts[:-1]
            n = stop - place
            rows: Tensor = self.store.rows(place, stop)
            yield Batch({self.store.hook: rows}, keys[:n], positions[:n], ids[:n], starts, stop)
            place = stop
