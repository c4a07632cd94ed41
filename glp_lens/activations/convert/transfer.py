"""What all conversions share: atomic output, blocks of bounded size, provenance of imported rows."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn, Self, TypeAlias

import numpy as np
import torch
import xxhash
from tqdm.auto import tqdm

from glp_lens.activations.manifest import MANIFEST, STORED
from glp_lens.activations.shard import no_space
from glp_lens.activations.store import ActivationStore
from glp_lens.activations.writer import Block, write_store
from glp_lens.errors import InputError, first_line
from glp_lens.files import Kind, make_writable, read_json, write_json
from glp_lens.types import DTYPES, Json

BLOCK_BYTES: Final = 32 << 20
"""About how much is in memory at a time."""
_CHUNK = 4 << 20
_MOVING = Kind("list of parts", "delete it, and what it lists")
Bar: TypeAlias = "tqdm[NoReturn]"
"""A progress bar that is moved by hand."""


def block_length(item_bytes: int) -> int:
    """How many items of this size make a block; at least one."""
    return max(1, BLOCK_BYTES // item_bytes)


@contextmanager
def new_output(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path` at the end of the block; after an exception nothing is left behind.

    What a run left that was killed while it filled an empty folder is removed.

    Raises:
        InputError: `path` exists already, its folder cannot be written, or the disk is full.
    """
    given, path = path, path.resolve()  # `.` has no name
    _undo_move(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{given} already exists and is not empty: choose another name")
    make_writable(path.parent)
    if path.is_dir():
        make_writable(path)
    temporary = path.with_name(f".{path.name}.tmp")
    _remove(temporary)
    try:
        with no_space(path.parent):
            yield temporary
            _move(temporary, path)
    finally:
        _remove(temporary)


def _move(temporary: Path, path: Path) -> None:
    if not (path.is_dir() and temporary.is_dir()):
        os.replace(temporary, path)
        return
    # An empty folder is filled, not replaced: it may be the working folder. Without its manifest a store is none.
    parts = sorted(temporary.iterdir(), key=lambda part: part.name == MANIFEST)
    write_json(_moving(path), {"parts": [part.name for part in parts]}, _MOVING)
    try:
        for part in parts:
            os.replace(part, path / part.name)
    except BaseException:
        _undo_move(path)
        raise
    _moving(path).unlink()


def _moving(path: Path) -> Path:
    """The file beside a folder that says which parts are being moved into it."""
    return path.with_name(f".{path.name}.moving.json")


def _undo_move(path: Path) -> None:
    """Empty a folder again whose filling was cut off."""
    if _moving(path).exists():
        for name in read_json(_moving(path), _MOVING)["parts"]:
            _remove(path / Path(name).name)
        _moving(path).unlink()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def save(
    out: str | Path, blocks: Iterable[Block], *, hook: str, dtype: str, source: Json, labels: Mapping[str, str] = {}
) -> ActivationStore:
    """`write_store`, atomically."""
    with new_output(Path(out)) as temporary:
        write_store(temporary, blocks, hook=hook, dtype=dtype, labels=labels, source=source)
    return ActivationStore.open(out)


def open_npy(path: Path) -> np.ndarray:
    """The array of a `.npy` file, mapped from the disk. Unlike `np.load`, this takes neither pickles nor archives.

    Raises:
        InputError: it is no such array of plain numbers, or truncated.
    """
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # a damaged header is parsed as Python, and fails in as many ways
        raise InputError(
            f"{path} is pickled, truncated or no NumPy array ({first_line(error)}): save plain numbers"
        ) from None


@dataclass(frozen=True)
class Span:
    """Bytes `start` to `stop` of a file."""

    path: Path
    start: int
    stop: int

    @classmethod
    def whole(cls, path: Path) -> Self:
        """All of a file."""
        return cls(path, 0, path.stat().st_size)


def imported_source(form: str, origin: Path, data: Sequence[Span], model: str | None, **settings: Any) -> Json:
    """The `source` of an imported store.

    Args:
        form: name of the format.
        origin: what was imported; its name is kept, not where it lay.
        data: where the rows lie; `hash` is the xxh3-128 of these bytes, one after the other.
        model: name of the language model, if known.
        settings: options of the import.
    """
    digest = xxhash.xxh3_128()
    total = sum(span.stop - span.start for span in data)
    with tqdm(total=total, desc="hash", unit="B", unit_scale=True, mininterval=2, delay=2) as bar:
        for path, spans in itertools.groupby(data, key=lambda span: span.path):
            with path.open("rb") as file:
                for span in spans:
                    for start in range(span.start, span.stop, _CHUNK):
                        file.seek(start)
                        chunk = file.read(min(_CHUNK, span.stop - start))
                        digest.update(chunk)
                        bar.update(len(chunk))
    imported = {"format": form, "from": origin.resolve().name, "hash": digest.hexdigest(), **settings}
    return {"imported": imported} | ({"model": {"name": model}} if model else {})


def stored_blocks(store: ActivationStore, bar: Bar, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
    """Rows `start` to `stop`, `(n, d_in)`, in the dtype they are kept in (bfloat16 as int16 bits), block by block."""
    stop = len(store) if stop is None else stop
    step = block_length(store.d_in * STORED[store.dtype].itemsize)
    for first in range(start, stop, step):
        x = store.rows(first, min(first + step, stop), dtype=DTYPES[store.dtype])
        yield (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()
        bar.update(len(x))


def export_bar(rows: int) -> Bar:
    """The progress bar of an export."""
    return tqdm(total=rows, desc="export", unit="row", unit_scale=True, mininterval=2)
