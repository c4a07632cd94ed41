"""Noise of stochastic projectors, row by row."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch
import xxhash
from torch import Tensor

from glp_lens.errors import InputError

RowNoise: TypeAlias = Callable[[Tensor, Tensor, int], Tensor]
"""(index in the batch of each row's text `(n,)`, position of each row in its text `(n,)`, width) -> standard normal
noise `(n, width)`. Positions count tokens from 0, earlier calls included and padding not."""


class SeededNoise:
    """Noise of a row that depends on the seed, the key of its text and its position in that text only.

    It is the same in any batch, at any strength and for any projector, which pairs their comparison. Texts with one key
    have the same noise. Two hook points get the same noise unless their seeds differ.

    Padding is not counted where the hook has a `mask`; without one a position is the column of the batch.

    Args:
        seed: any integer.
        keys: one for each text of the batch: an integer or a string.

    Raises:
        InputError: other keys; on a call, a batch of another size.

    Examples:
        >>> import torch
        >>> from glp_lens.hooks import SeededNoise
        >>> text, position = torch.tensor([1]), torch.tensor([7])
        >>> torch.equal(SeededNoise(0, ["a", "b"])(text, position, 5), SeededNoise(0, ["b"])(text - 1, position, 5))
        True
    """

    def __init__(self, seed: int, keys: Sequence[int | str]) -> None:
        try:
            self.seed = operator.index(seed)
            self.keys = [key if isinstance(key, str) else operator.index(key) for key in keys]
        except TypeError:
            raise InputError(f"expected a seed and keys that are integers or strings, got {seed!r}, {keys!r}") from None

    def check(self, batch: int) -> None:
        """Refuse a batch of another size than the keys are for."""
        if len(self.keys) != batch:
            raise InputError(f"got {len(self.keys)} keys of noise for a batch of {batch}: give one for each text")

    def __call__(self, texts: Tensor, positions: Tensor, width: int) -> Tensor:
        """Standard normal `(n, width)` float32 on the CPU."""
        wanted = list(zip((self.keys[text] for text in texts.tolist()), positions.tolist(), strict=True))
        drawn = {place: self._draw(*place, width) for place in dict.fromkeys(wanted)}
        rows = np.stack([drawn[place] for place in wanted]) if wanted else np.empty((0, width), dtype=np.float32)
        return torch.from_numpy(rows)

    def _draw(self, key: int | str, position: int, width: int) -> np.ndarray:
        # A string and an integer of the same digits differ in their repr.
        entropy = xxhash.xxh3_128_intdigest(repr((self.seed, key, position)).encode())
        return np.random.default_rng(entropy).standard_normal(width, dtype=np.float32)
