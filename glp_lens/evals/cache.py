"""Results of parts of a run, kept in a folder under a hash of every input, so that an interrupted run continues."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import xxhash

from glp_lens.errors import InputError
from glp_lens.evals.results import Results, without_nan
from glp_lens.files import ENTRY, Kind, read_json, versions, write_json
from glp_lens.types import Json

T = TypeVar("T")

_FILE = Kind("cached result", "delete it, and it is made again")


class ResultCache:
    """JSON values by name and inputs: one file each, `NAME-HASH.json`.

    Args:
        folder: where the files are, made when needed; None keeps nothing.
        inputs: gives what all values depend on, see `digest`; only called if anything is kept. Versions of the
            packages are added.
    """

    def __init__(self, folder: str | Path | None, inputs: Callable[[], Any] = list) -> None:
        self._inputs = inputs
        self._folder = None if folder is None else Path(folder)

    def get(self, name: str, inputs: Callable[[], Any], make: Callable[[], Any], read: Callable[[Any], T]) -> T:
        """The value that a run with the same inputs kept, or that `make` returns, which is then kept.

        A file that is missing or damaged is made anew. Inputs that cannot be hashed, such as a function among the
        options of an entry, are warned about, and nothing is kept.

        Args:
            name: of the value; characters that file names may lack become `_`.
            inputs: gives what this value depends on besides.
            make: returns a JSON-like value.
            read: what is made of it, or of what was kept, as `without_nan` leaves it; KeyError, TypeError, ValueError
                or AttributeError if it is something else.
        """
        path = self._path(name, inputs)
        if path is not None:
            try:
                return read(read_json(path, _FILE, path.stem)["value"])
            except (InputError, KeyError, TypeError, ValueError, AttributeError):
                pass
        value = without_nan(make())
        if path is not None:
            write_json(path, {"value": value}, _FILE, path.stem)
        return read(value)

    def results(self, name: str, inputs: Callable[[], Any], make: Callable[[], Results]) -> Results:
        """As `get`, for the results of a whole suite."""
        made: list[Results] = []

        def as_json() -> Json:
            made.append(make())
            return made[0].to_json()

        kept = self.get(name, inputs, as_json, Results.from_json)
        return made[0] if made else kept

    def records(self, name: str, inputs: Callable[[], Any]) -> Records:
        """Values that are kept one by one as they are made, under a name and a hash of inputs as in `get`."""
        path = self._path(name, inputs)
        return Records(None if path is None else path.with_suffix(".jsonl"))

    def _path(self, name: str, inputs: Callable[[], Any]) -> Path | None:
        if self._folder is None:
            return None
        try:
            key = digest(self._inputs(), versions(), name, inputs())
        except TypeError as error:
            warnings.warn(f"{name}: no results are kept, as {error}", stacklevel=2)
            return None
        safe = "".join(c if c.isascii() and (c.isalnum() or c in "-_.+=") else "_" for c in name)[:80]
        return self._folder / f"{safe}-{key}.json"


class Records:
    """JSON-like values by key, appended to one file of JSON lines: an interrupted run loses what it was making.

    The first line says what the file is for; each other one ends in a checksum of that and of itself. A line that is
    damaged, as the last one of a killed run may be, or that was copied from another file, is left out, and its value
    is made again.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.values: dict[str, Any] = {}
        if path is not None and path.is_file():
            for line in path.read_bytes().splitlines():
                text, _, checksum = line.rpartition(b" ")
                if checksum == self._checksum(text):
                    key, value = json.loads(text)
                    self.values[key] = value

    def add(self, values: Mapping[str, Any]) -> None:
        """Keep values; those of keys that are there are replaced."""
        self.values.update(values)
        if self._path is None or not values:
            return
        texts = (json.dumps([key, without_nan(value)], separators=(",", ":")).encode() for key, value in values.items())
        lines = b"".join(text + b" " + self._checksum(text) + b"\n" for text in texts)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # A torn line of a killed run must not take the next one with it: begin on a line of our own.
        with self._path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                lines = lines if file.read(1) == b"\n" else b"\n" + lines
            else:
                about = {ENTRY: {"file": "records", "version": 1, "key": self._path.stem}}
                lines = json.dumps(about).encode() + b"\n" + lines
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())

    def _checksum(self, text: bytes) -> bytes:
        return xxhash.xxh3_64_hexdigest(f"{self._path and self._path.stem}\n".encode() + text).encode()


def digest(*inputs: Any) -> str:
    """Hash of JSON-like values, tensors, arrays and modules.

    Raises:
        TypeError: something else, of which two that differ might look alike.
    """
    return xxhash.xxh3_128_hexdigest(json.dumps(inputs, default=_as_json, sort_keys=True).encode())[:16]


def _as_json(value: Any) -> Any:
    """A tensor or an array as type, shape and a hash of its bytes; a module as its weights; a path as its text."""
    if isinstance(value, torch.nn.Module):
        return [type(value).__name__, dict(value.state_dict())]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path | torch.dtype | torch.device):
        return str(value)
    if isinstance(value, torch.Tensor):
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    elif isinstance(value, np.ndarray) and value.dtype.hasobject:
        return value.tolist()
    elif isinstance(value, np.ndarray):
        raw = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    else:
        raise TypeError(f"a {type(value).__name__} has no hash")
    return f"{value.dtype} {tuple(value.shape)} {xxhash.xxh3_128_hexdigest(raw.data)}"
