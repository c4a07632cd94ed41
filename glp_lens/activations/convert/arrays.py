"""Activations as plain arrays: `.npy` and `.safetensors`, of shape (n, d) or (documents, positions, d)."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from glp_lens.activations.convert.transfer import (
    Bar,
    Span,
    block_length,
    export_bar,
    imported_source,
    new_output,
    open_npy,
    save,
    stored_blocks,
)
from glp_lens.activations.manifest import COLUMNS, STORED, label_name
from glp_lens.activations.store import ActivationStore
from glp_lens.activations.writer import Block
from glp_lens.errors import InputError, first_line
from glp_lens.files import ENTRY, Kind, check_tensors, fill_digest

KEY: Final = "activations"
"""Name of the tensor with the rows in an exported safetensors file."""
_SAFETENSORS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_IDS = ("token_id", "doc_id", "position")
_LABELS = {"I64": "int64", "F32": "float32"}


@dataclass(frozen=True)
class _Array:
    """An array in a file: `read(start, stop)` gives items of its first axis; `columns` has one value a row."""

    path: Path
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[int, int], Tensor]
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)


def import_arrays(
    paths: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    hook: str,
    key: str | None = None,
    model: str | None = None,
) -> ActivationStore:
    """A store of the rows of one or more array files, in the order given, in the dtype they have.

    Every row is kept, also at position 0. In an array (documents, positions, d) these two are known; in one (n, d) each
    row is its own document, unless a safetensors file has integers `token_id`, `doc_id` or `position`, `(n,)`. Its
    other tensors of shape `(n,)`, int64 or float32, become label columns.

    Args:
        paths: `.npy` (float16 or float32, never pickled) or `.safetensors` (also bfloat16), all of one width and dtype.
        out: folder of the new store.
        hook: the hook point the rows came from.
        key: the tensor to take from a safetensors file; may be left out if one is not `(n,)`.
        model: name of the language model, for provenance.

    Raises:
        InputError: missing, damaged or pickled files; other shapes or dtypes; rows that are not finite; `out` exists.
    """
    files = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    if not files:
        raise InputError("no array files given: pass at least one .npy or .safetensors file")
    arrays = [_open(path, key) for path in files]
    first = arrays[0]
    for array in arrays:
        if (array.shape[-1], array.dtype) != (first.shape[-1], first.dtype):
            raise InputError(
                f"{array.path} holds {array.dtype} of width {array.shape[-1]}, {first.path} {first.dtype} of width "
                f"{first.shape[-1]}: expected one dtype and width"
            )
    source = imported_source("arrays", files[0], [Span.whole(file) for file in files], model, files=len(files))
    return save(out, _blocks(arrays), hook=hook, dtype=first.dtype, source=source, labels=first.labels)


def export_arrays(store: ActivationStore, path: str | Path) -> None:
    """Write the rows of a store as one array, `(n, d_in)`.

    Args:
        store: kept in any dtype.
        path: a new `.npy` (float16, or float32 for other dtypes; rows only) or `.safetensors` (dtype kept: tensor
            `activations`, and `token_id`, `doc_id`, `position` as int64 and labels, each `(n,)`). A `doc_id` of 2^63
            or more is the negative number of the same bits, and is read back as such.

    Raises:
        InputError: another suffix; `path` exists; the disk is full.
    """
    path = Path(path)
    writers = {".npy": _write_npy, ".safetensors": _write_safetensors}
    if path.suffix not in writers:
        raise InputError(f"arrays are written as {' or '.join(writers)}, got {path.name!r}")
    with new_output(path) as temporary, export_bar(len(store)) as bar:
        writers[path.suffix](store, temporary, bar)


def _write_npy(store: ActivationStore, path: Path, bar: Bar) -> None:
    dtype = np.dtype("<f2" if store.dtype == "float16" else "<f4")
    with path.open("wb") as file:
        header = {"descr": dtype.str, "fortran_order": False, "shape": (len(store), store.d_in)}
        np.lib.format.write_array_header_1_0(file, header)
        for x in stored_blocks(store, bar):
            rows = torch.from_numpy(x).view(torch.bfloat16).float().numpy() if store.dtype == "bfloat16" else x
            file.write(rows.data)


def _write_safetensors(store: ActivationStore, path: Path, bar: Bar) -> None:
    """Header and data by hand: the library's writer needs all rows in memory."""
    labels = store.manifest.labels
    dtypes = dict.fromkeys(_IDS, "I64") | {
        name: next(k for k, v in _LABELS.items() if v == labels[name]) for name in labels
    }
    n, size = len(store), len(store) * store.d_in * STORED[store.dtype].itemsize
    about = Kind("activations", "export them again").entry()
    header: dict[str, Any] = {"__metadata__": {"hook": store.hook, ENTRY: json.dumps(about)}}
    header[KEY] = {"dtype": _SAFETENSORS[store.dtype], "shape": [n, store.d_in], "data_offsets": [0, size]}
    for name, dtype in dtypes.items():
        end = size + n * (8 if dtype == "I64" else 4)
        header[name] = {"dtype": dtype, "shape": [n], "data_offsets": [size, end]}
        size = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for x in stored_blocks(store, bar):
            file.write(x.data)
        for name, dtype in dtypes.items():
            file.write(store.column(name).astype("<i8" if dtype == "I64" else "<f4").data)
    fill_digest(path)


def _open(path: Path, key: str | None) -> _Array:
    openers = {".npy": lambda: _open_npy(path), ".safetensors": lambda: _open_safetensors(path, key)}
    if path.suffix not in openers:
        raise InputError(f"arrays are read from {' or '.join(openers)}, got {path.name!r}")
    if not path.is_file():
        raise InputError(f"array not found: {path} does not exist")
    array = openers[path.suffix]()
    if len(array.shape) not in (2, 3) or not all(array.shape):
        raise InputError(
            f"{path} has shape {array.shape}, expected (n, d) or (documents, positions, d), none of them 0"
        )
    return array


def _open_npy(path: Path) -> _Array:
    values = open_npy(path)
    dtype = values.dtype.newbyteorder("=")
    if dtype.name not in ("float16", "float32"):
        raise InputError(f"{path} holds {dtype.name}, expected float16 or float32: convert it first")
    return _Array(
        path, values.shape, dtype.name, lambda a, b: torch.from_numpy(np.array(values[a:b], dtype, order="C"))
    )


def _open_safetensors(path: Path, key: str | None) -> _Array:
    check_tensors(path)
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {name: tuple(s.get_shape()) for name, s in slices.items()}
            tensors = [name for name, shape in shapes.items() if len(shape) > 1]
            key = tensors[0] if key is None and len(tensors) == 1 else key
            if key not in shapes:
                asked = "pass key" if key is None else f"got key {key!r}"
                raise InputError(f"{path} holds the tensors {', '.join(tensors) or 'of no rows'}: {asked}, one of them")
            dtype = next((k for k, v in _SAFETENSORS.items() if v == slices[key].get_dtype()), None)
            if dtype is None:
                raise InputError(f"{key} in {path} is {slices[key].get_dtype()}, expected {', '.join(_SAFETENSORS)}")
            per_row = [name for name, shape in shapes.items() if len(shapes[key]) == 2 and shape == shapes[key][:1]]
            kinds = {name: slices[name].get_dtype() for name in per_row}
            labels = {n: _LABELS[k] for n, k in kinds.items() if k in _LABELS and n not in COLUMNS and label_name(n)}
            ids = [name for name in _IDS if kinds.get(name, "").startswith(("I", "U"))]
            columns = {name: file.get_tensor(name).numpy() for name in [*ids, *labels]}
            if kinds.get("doc_id") == "I64":
                columns["doc_id"] = columns["doc_id"].view(np.uint64)  # hashes of 64 bits, as they are exported
    except SafetensorError as error:
        raise InputError(f"{path} is truncated or no safetensors file ({first_line(error)})") from None

    def read(start: int, stop: int) -> Tensor:
        with safe_open(path, framework="pt") as file:
            rows: Tensor = file.get_slice(key)[start:stop]
            return rows

    return _Array(path, shapes[key], dtype, read, columns, labels)


def _blocks(arrays: Sequence[_Array]) -> Iterator[Block]:
    documents = 0
    for array in arrays:
        items, *positions, d = array.shape
        per_item = int(np.prod(positions))
        step = block_length(per_item * d * STORED[array.dtype].itemsize)
        for start in range(0, items, step):
            x = array.read(start, min(start + step, items)).reshape(-1, d)
            row = np.arange(len(x))
            given = {name: values[start : start + step] for name, values in array.columns.items()}
            yield x, {"doc_id": documents + start + row // per_item, "position": row % per_item, **given}
        documents += items
