"""Which rows of a call a hook edits, and what it knows from earlier calls of the texts that they belong to."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from glp_lens.errors import InputError

Positions: TypeAlias = Literal["all", "prompt", "generated", "last"] | Tensor
"""Names of positions, or `(batch, pos)` booleans; see `glp_lens.hooks.edit`."""
ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Relative difference of equal activations computed in batches of other shapes; 16-bit formats make up to 0.05."""


@dataclass(frozen=True)
class Places:
    """Where rows come from, text by text.

    Attributes:
        batch: number of texts in the call.
        texts: `(n,)`, index in the batch of each row's text.
        columns: `(n,)`, where in this call each row stands.
        positions: `(n,)`, where in its own text each row stands, earlier calls counted and padding not.
        dtype: number format of the stream that they come from.
    """

    batch: int
    texts: Tensor
    columns: Tensor
    positions: Tensor
    dtype: torch.dtype = torch.float32

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, rows: Tensor) -> Places:
        """Those of some rows."""
        return Places(self.batch, self.texts[rows], self.columns[rows], self.positions[rows], self.dtype)

    @property
    def at(self) -> tuple[Tensor, Tensor]:
        """Index of the rows in activations `(batch, pos, d)`."""
        return self.texts, self.columns


@dataclass(frozen=True)
class Written:
    """Rows `(n, d)` that were written at their places."""

    places: Places
    rows: Tensor

    def and_then(self, other: Written) -> Written:
        """These rows and those of a later call."""
        one, two = self.places, other.places
        places = Places(
            two.batch,
            torch.cat([one.texts, two.texts]),
            torch.cat([one.columns, two.columns]),
            torch.cat([one.positions, two.positions]),
        )
        return Written(places, torch.cat([self.rows, other.rows]))


def check_positions(positions: Positions, mask: Tensor | None) -> tuple[Positions, Tensor | None]:
    """Both, if they can be used; masks as booleans.

    Raises:
        InputError: unknown positions, or masks of another shape.
    """
    if mask is not None:
        mask = torch.as_tensor(mask)
        if mask.ndim != 2 or not bool(mask.any(1).all()):
            raise InputError(f"mask must be (batch, pos) with a token in every row, got shape {tuple(mask.shape)}")
        mask = mask.bool()
    if isinstance(positions, Tensor):
        if positions.ndim != 2 or positions.dtype != torch.bool:
            raise InputError(
                "positions must be a name or booleans (batch, pos), got "
                f"{positions.dtype} of shape {tuple(positions.shape)}"
            )
    elif positions not in ("all", "prompt", "generated", "last"):
        raise InputError(
            f"positions must be 'all', 'prompt', 'generated', 'last' or booleans (batch, pos), got {positions!r}"
        )
    return positions, mask


class Texts:
    """The texts at one hook point, to tell a new text from one that goes on.

    A text goes on in a call of one position, as in generation with a cache, and in a call of the whole text and one
    token more, as without: there earlier positions must be given the same values once more, as a cache would have kept
    them.
    """

    def __init__(self) -> None:
        self._signature: Tensor | None = None
        self._written: Written | None = None
        self._lengths: Tensor | None = None  # tokens of each text so far
        self._columns = 0  # columns of the batch so far, padding counted

    def place(self, x: Tensor, positions: Positions, mask: Tensor | None) -> tuple[Places, Written | None, bool]:
        """Where to edit activations `(batch, pos, d)`, what to write again, and whether the texts are new.

        Raises:
            InputError: masks of another shape than the batch's.
        """
        if isinstance(positions, Tensor) and len(positions) != len(x):
            raise InputError(f"positions are for a batch of {len(positions)}, got one of {len(x)}")
        known = self._continued_by(x, mask)
        step = x.shape[1] == 1 and self._goes_on(len(x), mask)
        if known is None and not step:
            tokens = _tokens(x, mask)
            self._lengths, self._columns = tokens.sum(1), x.shape[1]
            return _of_new_texts(tokens, positions, x.dtype), None, True
        assert self._lengths is not None, "known from the text that goes on"
        lengths = self._lengths.to(x.device)
        chosen = _edits_next(len(x), positions, self._columns).to(x.device).nonzero()[:, 0]
        last = torch.full_like(chosen, x.shape[1] - 1)
        self._lengths, self._columns = lengths + 1, self._columns + 1
        return Places(len(x), chosen, last, lengths[chosen], x.dtype), known, False

    def remember(self, x: Tensor, written: Written) -> None:
        """Keep a signature of these texts, and the rows that were written."""
        self._signature = None if torch.is_grad_enabled() else _signature(x)
        self._written = written

    def _goes_on(self, batch: int, mask: Tensor | None) -> bool:
        """Whether one position of each text comes after others; with a mask of longer prompts it always does."""
        if self._lengths is None and mask is not None and len(mask) == batch and mask.shape[1] > 1:
            self._lengths, self._columns = mask.sum(1), mask.shape[1]
        return self._lengths is not None and len(self._lengths) == batch

    def _continued_by(self, x: Tensor, mask: Tensor | None) -> Written | None:
        """What was written, if activations `(batch, pos, d)` are of the texts of the last call and one token more.

        Not where gradients are enabled: a training step needs those of all its positions.
        """
        then = self._signature
        if then is None or torch.is_grad_enabled() or len(x) != len(then) or x.shape[1] != then.shape[1] + 1:
            return None
        # Distances between rows, not norms: a few dimensions that are nearly constant may be most of the norm.
        usual = then[:, 1:] if then.shape[1] > 2 else then  # without the attention sink
        centre = usual.nanmean((0, 1)) if then.shape[:2].numel() > 1 else 0.0
        scale = torch.maximum((then - centre).norm(dim=-1), (usual - centre).norm(dim=-1).nanmean())
        equal = (_signature(x[:, :-1]) - then).norm(dim=-1) <= ROUNDING.get(x.dtype, 0.05) * scale
        if mask is not None and mask.shape[1] <= then.shape[1]:
            equal[:, : mask.shape[1]] |= ~mask.to(x.device)
        # Without a mask there may be padding on the left, whose values mean nothing and depend on the length.
        whole = equal.all(1).all() if mask is not None else equal.all(1).any() & equal[:, -2:].all()
        return self._written if bool(whole) else None


def begin_alike(x: Tensor) -> bool:
    """Whether position 0 holds the same token in all texts, and position 1 another one: so BOS looks, not padding."""
    if min(x.shape[:2]) == 1:
        return True
    first, second = x[:, 0].float(), x[:, 1].float()
    limit = 10 * ROUNDING.get(x.dtype, 0.02) * first[0].norm()
    alike = (first - first[0]).norm(dim=1) <= limit
    repeated = (second - first).norm(dim=1) <= limit
    return bool((alike & ~repeated).all())


def _tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """`(batch, pos)`, true on tokens and false on padding."""
    batch, length = x.shape[:2]
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=x.device)
    if mask.shape != (batch, length):
        raise InputError(f"mask must have the shape of the prompts, ({batch}, {length}), got {tuple(mask.shape)}")
    return mask.to(x.device)


def _of_new_texts(tokens: Tensor, positions: Positions, dtype: torch.dtype) -> Places:
    """The places to edit in texts that are seen for the first time."""
    order, lengths = tokens.cumsum(1) - 1, tokens.sum(1, keepdim=True)
    if isinstance(positions, Tensor):
        width = min(tokens.shape[1], positions.shape[1])
        chosen = torch.zeros_like(tokens)
        chosen[:, :width] = positions[:, :width].to(tokens.device)
    elif positions == "last":
        chosen = order == lengths - 1
    elif positions == "generated":
        chosen = torch.zeros_like(tokens)
    else:
        chosen = (order > 0) | (lengths == 1)
    texts, columns = (chosen & tokens).nonzero(as_tuple=True)
    return Places(len(tokens), texts, columns, order[texts, columns], dtype)


def _edits_next(batch: int, positions: Positions, column: int) -> Tensor:
    """`(batch,)`, whether to edit the next token of each text, which stands in this column of the batch."""
    if isinstance(positions, Tensor) and column < positions.shape[1]:
        return positions[:, column]
    return torch.full((batch,), not isinstance(positions, Tensor) and positions != "prompt", dtype=torch.bool)


def _signature(x: Tensor) -> Tensor:
    """A few numbers of each row, `(batch, pos, 8)`, that differ where rows do: fixed random projections."""
    return x.float() @ _projections(x.shape[-1], x.device)


@lru_cache(maxsize=8)
def _projections(width: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        drawn = torch.randn(width, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
        scaled: Tensor = drawn / width**0.5
        return scaled.to(device)
