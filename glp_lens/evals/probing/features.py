"""A model's features of a task's rows, as a matrix in memory or, where it is large, in a file."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from io import FileIO
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from glp_lens.errors import InputError
from glp_lens.evals.entries import Entry
from glp_lens.interface import Featurizer
from glp_lens.types import Acts

Values = NDArray[np.float32]
IN_MEMORY = 2**30
"""Bytes of features above which they go to a file."""
BLOCK = 2**23
"""Features of a block of rows that is encoded at once, 32 MiB of them; at most `MOST_ROWS` rows."""
MOST_ROWS = 1024
_ENCODING = Lock()
"""Models need not be safe to use from two threads at once, and their products use all cores anyway."""


class NotFinite(ValueError):
    """Features that are infinite or NaN."""


class Matrix(Protocol):
    """Features `(n_rows, n_features)` float32, read by columns: `[:, a:b]`, or `[:, j]` for one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """`(n_rows, n_features)`."""

    def __getitem__(self, key: Any, /) -> Values:
        """A copy or a view of columns."""


class FileMatrix:
    """A matrix in an open file, row after row.

    It is read, not mapped: the system counts mapped pages as memory of the process, and maps more than was asked for.
    """

    def __init__(self, file: FileIO, shape: tuple[int, int]) -> None:
        self.file, self.shape = file, shape

    def __getitem__(self, key: tuple[slice, slice | int], /) -> Values:
        rows, columns = key
        if not isinstance(columns, slice):
            return self[rows, columns : columns + 1][:, 0]
        start, stop, _ = columns.indices(self.shape[1])
        block = np.empty((self.shape[0], max(stop - start, 0)), dtype=np.float32)
        for i, row in enumerate(block):
            self.file.seek(block.itemsize * (i * self.shape[1] + start))
            self.file.readinto(row.data)
        return block[rows]


class Concatenated:
    """Matrices one after the other along the feature axis."""

    def __init__(self, parts: Sequence[Matrix]) -> None:
        self.parts = parts
        self.ends = np.cumsum([part.shape[1] for part in parts])
        self.shape = (parts[0].shape[0], int(self.ends[-1]))

    def __getitem__(self, key: tuple[slice, slice | int], /) -> Values:
        rows, columns = key
        if not isinstance(columns, slice):
            return self[rows, columns : columns + 1][:, 0]
        start, stop, _ = columns.indices(self.shape[1])
        blocks = []
        for part, end in zip(self.parts, self.ends.tolist(), strict=True):
            first = end - part.shape[1]
            if start < end and first < stop:
                blocks.append(part[rows, max(start - first, 0) : min(stop, end) - first])
        return np.concatenate(blocks, axis=1)


def parts(entry: Entry) -> list[Entry]:
    """One entry for each noise level of an entry with several, which has the features of all; else none."""
    sigma = entry.options.get("sigma")
    if not isinstance(sigma, list | tuple):
        return []
    return [replace(entry, options={**entry.options, "sigma": value}) for value in sigma]


def count(entry: Entry) -> int:
    """Number of features of an entry, of all its parts together."""
    assert isinstance(entry.model, Featurizer)
    return entry.model.n_features * max(1, len(parts(entry)))


def noise_seeds(entry: Entry, seeds: Sequence[int]) -> Sequence[int]:
    """The noise seeds that an entry is scored with: of a deterministic model only the first."""
    return seeds if getattr(entry.model, "stochastic", False) else seeds[:1]


@torch.no_grad()
def encode(
    entry: Entry,
    acts: Acts,
    noise: Acts | None,
    folder: Path | None,
    *,
    device: str = "cpu",
    in_memory: int = IN_MEMORY,
) -> Matrix:
    """Features of rows `(n, d_in)`, made in blocks of rows.

    A block has fewer rows the more features there are, and a matrix over `in_memory` bytes is written to a file in
    `folder` as it is made, so that memory does not grow with the number of features. The file has no name: it is gone
    with the matrix, or with the process however that ends.

    Raises:
        NotFinite: some are infinite or NaN.
        InputError: the disk is full.
    """
    model = entry.model
    assert isinstance(model, Featurizer)
    shape = (len(acts), model.n_features)
    step = min(max(BLOCK // model.n_features, 1), MOST_ROWS)

    def block(start: int) -> Values:
        part = slice(start, start + step)
        eps = None if noise is None else noise[part].to(device)
        with _ENCODING:
            encoded = model.encode(acts[part].to(device), noise=eps, **entry.options).float()
        if not torch.isfinite(encoded).all():
            raise NotFinite("features are not finite")
        return encoded.cpu().numpy()

    starts = range(0, len(acts), step)
    if 4 * prod(shape) <= in_memory:
        whole = np.empty(shape, dtype=np.float32)
        for start in starts:
            whole[start : start + step] = block(start)
        return whole
    try:
        file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        for start in starts:
            block(start).tofile(file)
    except OSError as error:
        raise InputError(
            f"cannot write {4 * prod(shape) / 1e9:.1f} GB of features to {folder or tempfile.gettempdir()} ({error}): "
            "free space there"
        ) from None
    return FileMatrix(file, shape)


def noise(task: str, seed: int, acts: Acts) -> Tensor:
    """Standard normal noise of the shape of a task's rows: the same for all models, another for each task and seed."""
    key = xxhash.xxh3_64_intdigest(f"{seed}:{task}".encode()) >> 1
    return torch.randn(acts.shape, generator=torch.Generator().manual_seed(key), dtype=torch.float32)


def layers(entry: Entry) -> int:
    """Number of equal blocks that the features of an entry, or of each of its parts, come in."""
    assert isinstance(entry.model, Featurizer)
    return entry.model.feature_layers
