"""Results of parts of a run, kept in a folder under a hash of every input, so that an interrupted run continues."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from glp_lens.errors import InputError
from glp_lens.evals.results import Results, without_nan
from glp_lens.files import read_json, versions, write_json
from glp_lens.types import Json


class ResultCache:
    """JSON values by name and inputs: one file each, `NAME-HASH.json`.

    Args:
        folder: where the files are, made when needed; None keeps nothing.
        inputs: gives what all values depend on, see `digest`; only called if anything is kept. Versions of the
            packages are added.
    """

    def __init__(self, folder: str | Path | None, inputs: Callable[[], Any] = list) -> None:
        self.folder = None if folder is None else Path(folder)
        self._common = "" if folder is None else digest(inputs(), versions())

    def get(self, name: str, inputs: Callable[[], Any], make: Callable[[], Any]) -> Any:
        """The value that a run with the same inputs kept, or that `make` returns, which is then kept.

        A file that is missing or damaged is made anew.

        Args:
            name: of the value; characters that file names may lack become `_`.
            inputs: gives what this value depends on besides.
            make: returns a JSON-like value; it comes back as `without_nan` leaves it.
        """
        if self.folder is None:
            return make()
        safe = "".join(c if c.isalnum() or c in "-_.+=" else "_" for c in name)[:80]
        path = self.folder / f"{safe}-{digest(self._common, name, inputs())}.json"
        try:
            return read_json(path, "cached result")["value"]
        except (InputError, KeyError):
            value = make()
            write_json(path, {"value": without_nan(value)})
            return value

    def results(self, name: str, inputs: Callable[[], Any], make: Callable[[], Results]) -> Results:
        """As `get`, for the results of a whole suite."""
        made: list[Results] = []

        def as_json() -> Json:
            made.append(make())
            return made[0].to_json()

        value = self.get(name, inputs, as_json)
        return made[0] if made else Results.from_json(value)


def digest(*inputs: Any) -> str:
    """Hash of JSON-like values, tensors and arrays."""
    return xxhash.xxh3_128_hexdigest(json.dumps(inputs, default=_hashed, sort_keys=True).encode())[:16]


def _hashed(value: Any) -> str:
    """What stands for a value that JSON has no place for: of arrays a hash of their bytes, of others their text."""
    if isinstance(value, torch.Tensor):
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    elif isinstance(value, np.ndarray):
        raw = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    else:
        return str(value)
    return f"{value.dtype} {tuple(value.shape)} {xxhash.xxh3_128_hexdigest(raw.data)}"
