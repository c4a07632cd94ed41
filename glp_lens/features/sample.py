"""A uniform sample of the rows at a hook point, from which everything is computed that needs rows more than once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from glp_lens.artifacts import ActivationModel
from glp_lens.errors import InputError
from glp_lens.features.folder import ModelAbout
from glp_lens.files import Kind, read_tensors, write_tensors
from glp_lens.interface import Featurizer
from glp_lens.types import Acts, Features

ROWS = 512
"""Rows that are encoded at once."""
_RUN = 16
"""Consecutive positions of a text whose noise one generator draws."""
_KIND = Kind("sample of rows", "delete it and build the features again")


@dataclass(frozen=True, eq=False)
class Sample:
    """Rows at one hook point, each with its place in the texts.

    Attributes:
        rows: `(n, d)` float32.
        keys: `(n,)`, xxh3-64 of each row's text.
        positions: `(n,)`, place of its token in the text, where BOS is 0.
        token_ids: `(n,)`.
    """

    rows: Acts
    keys: NDArray[np.uint64]
    positions: NDArray[np.int64]
    token_ids: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def read(cls, path: Path) -> Self:
        """A sample that was written.

        Raises:
            InputError: the file is missing, damaged or holds something else.
        """
        found = read_tensors(path, _KIND)
        try:
            rows, keys, positions, ids = (found[name] for name in ("rows", "keys", "positions", "token_ids"))
        except KeyError as error:
            raise InputError(f"{path} lacks {error}: {_KIND.remedy}") from None
        if rows.ndim != 2 or any(each.shape != (len(rows),) for each in (keys, positions, ids)):
            raise InputError(f"{path} holds columns of different lengths: {_KIND.remedy}")
        return cls(rows.float(), keys.long().numpy().view(np.uint64), positions.long().numpy(), ids.long().numpy())

    def write(self, path: Path) -> None:
        """Write it as safetensors, the keys as int64 of the same bits.

        Raises:
            InputError: the disk is full or cannot be written.
        """
        columns = {"keys": self.keys.view(np.int64), "positions": self.positions, "token_ids": self.token_ids}
        tensors = {name: torch.from_numpy(np.ascontiguousarray(each)) for name, each in columns.items()}
        write_tensors(path, {"rows": self.rows, **tensors}, _KIND)


def sample_path(folder: Path, hook: str) -> Path:
    """Where a folder of features keeps the sample of a hook point."""
    return folder / f"sample-{re.sub(r'[^A-Za-z0-9._-]', '-', hook)}.safetensors"


def noise(keys: NDArray[np.uint64], positions: NDArray[np.int64], width: int, seed: int) -> Tensor:
    """Standard normal noise `(n, width)` float32 of rows, which depends on the seed, the text and the position only.

    The same row has the same noise in any batch, in the pass over the texts and in the sample, for all models.

    Args:
        keys: `(n,)`, of the texts.
        positions: `(n,)`, in the texts.
        width: of a row.
        seed: any integer.
    """
    out = np.empty((len(keys), width), dtype=np.float32)
    places = np.stack([keys.astype(np.uint64), (positions // _RUN).astype(np.uint64)], axis=1)
    runs, owner = np.unique(places, axis=0, return_inverse=True)
    order = np.argsort(owner.reshape(-1), kind="stable")
    ends = np.cumsum(np.bincount(owner.reshape(-1), minlength=len(runs)))
    for run, members in zip(runs, np.split(order, ends[:-1]), strict=True) if len(keys) else ():
        offsets = positions[members] % _RUN
        entropy = xxhash.xxh3_128_intdigest(f"{seed}:{run[0]}:{run[1]}".encode())
        drawn = np.random.Generator(np.random.SFC64(entropy)).standard_normal(
            (int(offsets.max()) + 1, width), dtype=np.float32
        )
        out[members] = drawn[offsets]
    return torch.from_numpy(out)


def priorities(keys: NDArray[np.uint64], positions: NDArray[np.int64], seed: int) -> NDArray[np.float64]:
    """A random number in [0, 1) for each row, `(n,)`, which depends on the seed, the text and the position only."""
    salt = np.uint64(xxhash.xxh3_64_intdigest(f"priority {seed}".encode()))
    z = _mixed(keys ^ salt) ^ _mixed(positions.astype(np.uint64) + salt)
    return (_mixed(z) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixed(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The bits of numbers mixed, as SplitMix64 does it."""
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class Reservoir:
    """The rows of least priority of all that came, at several hook points.

    Args:
        widths: of a row, by hook point.
        size: most rows.
    """

    def __init__(self, widths: Mapping[str, int], size: int) -> None:
        self.priority = np.full(size, np.inf)
        self.columns: dict[str, NDArray[Any]] = {"keys": np.zeros(size, dtype=np.uint64)}
        self.columns |= {name: np.zeros(size, dtype=np.int64) for name in ("positions", "token_ids")}
        self.rows = {hook: torch.zeros(size, width, dtype=torch.float32) for hook, width in widths.items()}

    def update(self, rows: Mapping[str, Acts], columns: Mapping[str, NDArray[Any]], priority: NDArray[Any]) -> None:
        """Take in rows, with their `keys`, `positions`, `token_ids` and priorities, each `(n,)`."""
        size = len(self.priority)
        new = np.flatnonzero(priority < self.priority.max())
        if not len(new):
            return
        kept = np.argsort(np.concatenate([self.priority, priority[new]]), kind="stable")[:size]
        come = new[kept[kept >= size] - size]
        free = np.setdiff1d(np.arange(size), kept[kept < size])
        self.priority[free] = priority[come]
        for name, column in self.columns.items():
            column[free] = columns[name][come]
        for hook, mine in self.rows.items():
            mine[torch.from_numpy(free)] = rows[hook][torch.from_numpy(come)]

    def sample(self, hook: str) -> Sample:
        """The rows kept at a hook point, in the order of their priorities, which is random."""
        order = np.argsort(self.priority, kind="stable")
        order = order[np.isfinite(self.priority[order])]
        return Sample(self.rows[hook][torch.from_numpy(order)], *(each[order] for each in self.columns.values()))

    def state(self) -> dict[str, Tensor]:
        """All of it, as tensors."""
        columns = {name: torch.from_numpy(each.view(np.int64)) for name, each in self.columns.items()}
        return {"priority": torch.from_numpy(self.priority), **columns, **self.rows}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state.

        Raises:
            KeyError: a tensor is missing.
        """
        self.priority = state["priority"].numpy()
        self.columns = {name: state[name].numpy().view(each.dtype) for name, each in self.columns.items()}
        self.rows = {hook: state[hook] for hook in self.rows}


def norm_limits(models: Iterable[tuple[str, ActivationModel]]) -> dict[str, float]:
    """By hook point, the norm above which an activation is massive: the least that any of its models knows.

    Args:
        models: each with its hook point.
    """
    limits: dict[str, float] = {}
    for hook, model in models:
        if model.max_norm is not None:
            limits[hook] = min(model.max_norm, limits.get(hook, float("inf")))
    return limits


def options_of(model: ModelAbout) -> dict[str, Any]:
    """The options of `encode` with which a model's features were built."""
    return {} if model.sigma is None else {"sigma": model.sigma}


def blocks(
    model: ActivationModel, options: dict[str, Any], sample: Sample, seed: int, rows: int = ROWS
) -> Iterator[tuple[slice, Features]]:
    """Features of a sample, block by block: which rows, and `(len, n_features)` float32 on the CPU.

    Args:
        model: a featurizer, bound to the hook point of the sample.
        options: of its `encode`.
        sample: the rows.
        seed: of the noise, where the model takes any.
        rows: of a block.
    """
    assert isinstance(model, Featurizer)
    for start in range(0, len(sample), rows):
        part = slice(start, min(start + rows, len(sample)))
        eps = None
        if model.stochastic:
            eps = noise(sample.keys[part], sample.positions[part], sample.rows.shape[1], seed)
        with torch.no_grad():  # which must end before the caller goes on: it is of the thread, not of this function
            block = model.encode(sample.rows[part], noise=eps, **options).float().cpu()
        yield part, block


def encode(model: ActivationModel, options: dict[str, Any], sample: Sample, seed: int) -> Features:
    """Features of a whole sample, `(n, n_features)` float32 on the CPU: 4 bytes for each; see `blocks`."""
    assert isinstance(model, Featurizer)
    out = torch.empty(len(sample), model.n_features, dtype=torch.float32)
    for part, block in blocks(model, options, sample, seed):
        out[part] = block
    return out
