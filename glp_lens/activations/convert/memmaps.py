"""The folders of activations that the released GLP code (arXiv 2602.06964) writes and trains on.

A folder holds `data_0000.npy`, `data_0001.npy`, ...: bare values without a header, in spite of the name, and perhaps
with unused space at the end; `data_indices.npy`, `(rows, 3)` uint64: file number, first and end value of each row;
`dtype.txt` with the NumPy dtype, where `int16` are the bits of bfloat16; and `rep_statistics.pt` with the mean and the
variance that normalise the rows. For a prior of many layers the folders are called `layer_00`, `layer_01`, ..., and
beside them lies one `rep_statistics.pt` of arrays `(layers, d)`. The collecting script writes such folders as
`layer_07/shard_*.ready` (`.active` while they are in use), with `dtype.txt` beside the shards, and in each
`token_buffer.json`, the place of each row's token in its document counted after BOS, and `doc_buffer.json`, the
document's number in the data set.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
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
from glp_lens.activations.store import ActivationStore
from glp_lens.activations.writer import Block
from glp_lens.errors import InputError

INDEX: Final = "data_indices.npy"
STATISTICS: Final = "rep_statistics.pt"
_DTYPES = {"int16": "bfloat16", "float16": "float16", "float32": "float32"}
FILE_VALUES = 1 << 30
"""Most values in one exported file."""
_NPY_MAGIC = b"\x93NUMPY"


@dataclass(frozen=True)
class _Part:
    """One folder with an index: `index` is `(rows, 3)` int64, `files` the data files by number."""

    folder: Path
    index: np.ndarray
    files: dict[int, Path]

    @property
    def d_in(self) -> int:
        return int(self.index[0, 2] - self.index[0, 1])


def import_memmaps(
    folder: str | Path, out: str | Path, *, hook: str, dtype: str | None = None, model: str | None = None
) -> ActivationStore:
    """A store of the rows of a released GLP folder, in their order, bit for bit.

    Positions and documents are kept where `token_buffer.json` and `doc_buffer.json` tell them; otherwise each row is
    its own document. Token ids are not in this format.

    Args:
        folder: holds `data_indices.npy`, or shards that do (`layer_07`).
        out: folder of the new store.
        hook: the hook point the rows came from; the output of `model.layers.7` is `blocks.7.hook_resid_post`.
        dtype: `int16` (bits of bfloat16), `float16` or `float32`; by default what `dtype.txt` says, or `int16`.
        model: name of the language model, for provenance.

    Raises:
        InputError: no such folder, another dtype, rows that lie outside the files, differ in width or are not finite;
            `out` exists.
    """
    folder = Path(folder)
    places = _places(folder)
    dtype = _dtype(places[0], dtype)
    parts = [_open(place, dtype) for place in places]
    for part in parts:
        if part.d_in != parts[0].d_in:
            raise InputError(
                f"{part.folder} has rows of width {part.d_in}, {parts[0].folder} of {parts[0].d_in}: import them apart"
            )
    used = [
        span for part in parts for span in (Span.whole(part.folder / INDEX), *_used(part, np.dtype(dtype).itemsize))
    ]
    source = imported_source("glp memmaps", folder, used, model)
    return save(out, _blocks(parts, np.dtype(dtype)), hook=hook, dtype=_DTYPES[dtype], source=source)


def import_memmap_layers(
    folder: str | Path,
    out: str | Path,
    *,
    hook: str = "blocks.{layer}.hook_resid_post",
    dtype: str | None = None,
    model: str | None = None,
) -> dict[str, ActivationStore]:
    """One store for each `layer_XX` below a folder, at `out/<hook point>`.

    Their rows need not be aligned: the released code may draw other tokens for each layer.

    Args:
        hook: the hook points, with `{layer}` for the layer's number.

    Returns:
        The stores by hook point, as from collecting several.

    Raises:
        InputError: no layers there, or as `import_memmaps`.
    """
    layers = _layers(Path(folder))
    if not layers:
        raise InputError(f"{folder} has no folders layer_XX: expected one for each layer")
    if "{layer}" not in hook:
        raise InputError(f"{{layer}} must stand for the layer's number in hook, got {hook!r}")
    names = {hook.replace("{layer}", str(number)): path for number, path in layers.items()}
    return {
        name: import_memmaps(path, Path(out) / name, hook=name, dtype=dtype, model=model)
        for name, path in names.items()
    }


def export_memmaps(store: ActivationStore, folder: str | Path) -> None:
    """Write the rows of a store as a folder that the released code trains on, `rep_statistics.pt` included.

    Token ids and labels have no place in this format. Dimensions that never vary get variance 1, since that
    code divides by it.

    Args:
        store: kept in any dtype; bfloat16 becomes `int16` bits.
        folder: a new folder.

    Raises:
        InputError: `folder` exists, or the disk is full.
    """
    with new_output(Path(folder)) as temporary, export_bar(len(store)) as bar:
        _write(store, temporary, bar)


def export_memmap_layers(stores: Mapping[str, ActivationStore] | Sequence[ActivationStore], folder: str | Path) -> None:
    """Write stores of several layers as folders that the released code trains one prior on, `layer_XX` each.

    The `rep_statistics.pt` beside them has a row for each layer of the language model, as that code looks it up by the
    layer's number; of layers without a store it is NaN. `multi_layer_n_layers` must be the number of its rows.

    Args:
        stores: of one width and language model, at one hook point of different layers; as `collect` gives them.
        folder: a new folder.

    Raises:
        InputError: fewer than two stores, or stores that do not go together; `folder` exists, or has a name that the
            released code takes for a layer's; the disk is full.
    """
    layers = _by_layer(list(stores.values()) if isinstance(stores, Mapping) else list(stores))
    if re.search(r"layer_\d", str(folder)):
        raise InputError(f"the released code takes the first layer_N in a path as the layer: rename {folder}")
    rows = sum(len(store) for store in layers.values())
    with new_output(Path(folder)) as temporary, export_bar(rows) as bar:
        temporary.mkdir()
        for layer, store in layers.items():
            _write(store, temporary / f"layer_{layer:02d}", bar)
        known = next(iter(layers.values())).manifest.source.get("model", {}).get("n_layers") or 0
        absent = torch.full((layers[max(layers)].d_in,), torch.nan, dtype=torch.float32)
        each = [
            _statistics(layers[i]) if i in layers else {"mean": absent, "var": absent}
            for i in range(max(known, max(layers) + 1))
        ]
        stacked = {name: torch.stack([statistics[name] for statistics in each]) for name in ("mean", "var")}
        torch.save(stacked, temporary / STATISTICS)


def _by_layer(stores: Sequence[ActivationStore]) -> dict[int, ActivationStore]:
    """Stores by the number of their layer, ascending, after checking that they go together."""
    matches = {store.hook: re.fullmatch(r"blocks\.(\d+)\.(.+)", store.hook) for store in stores}
    points = {name[2] if name else None for name in matches.values()}
    if len(stores) < 2 or len(matches) < len(stores) or len(points) > 1 or None in points:
        raise InputError(
            "expected stores of several layers at one hook point, such as blocks.3.hook_resid_post and "
            f"blocks.7.hook_resid_post; got {', '.join(store.hook for store in stores) or 'none'}"
        )
    for what, kinds in (
        ("width", {store.d_in for store in stores}),
        ("language model", {json.dumps(store.manifest.language_model, sort_keys=True) for store in stores}),
    ):
        if len(kinds) > 1:
            raise InputError(f"expected stores of one {what}, got {len(kinds)}: export those of one collection")
    return dict(sorted((int(name[1]), store) for name, store in zip(matches.values(), stores, strict=True) if name))


def _write(store: ActivationStore, folder: Path, bar: Bar) -> None:
    """One store as one new folder."""
    folder.mkdir()
    d = store.d_in
    rows_per_file = max(1, FILE_VALUES // d)
    for number, first in enumerate(range(0, len(store), rows_per_file)):
        with (folder / f"data_{number:04d}.npy").open("wb") as file:
            for x in stored_blocks(store, bar, first, min(first + rows_per_file, len(store))):
                file.write(x.data)
    row = np.arange(len(store), dtype=np.uint64)
    begin = row % np.uint64(rows_per_file) * np.uint64(d)
    np.save(folder / INDEX, np.stack([row // np.uint64(rows_per_file), begin, begin + np.uint64(d)], axis=1))
    (folder / "dtype.txt").write_text(next(name for name, kept in _DTYPES.items() if kept == store.dtype))
    _write_json(folder / "token_buffer.json", store.column("position").astype(np.int64) - 1)
    _write_json(folder / "doc_buffer.json", store.column("doc_id"))
    torch.save(_statistics(store), folder / STATISTICS)


def _statistics(store: ActivationStore) -> dict[str, Tensor]:
    """What the released code subtracts, and divides by the square root of."""
    var = store.stats.var.float()
    return {"mean": store.stats.mean.float(), "var": torch.where(var > 0, var, 1.0)}


def _places(folder: Path) -> list[Path]:
    """The folders with an index: the folder itself, or the shards in it, oldest first."""
    if (folder / INDEX).is_file():
        return [folder]
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: expected one with {INDEX}")
    if layers := _layers(folder):
        raise InputError(
            f"{folder} holds layers {', '.join(map(str, layers))}: import one of its folders, or all of them as layers"
        )
    shards = sorted(index.parent for index in folder.glob(f"shard_*/{INDEX}"))
    if not shards:
        raise InputError(f"no {INDEX} in {folder} nor in a shard_* of it: is it a folder of the released GLP code?")
    return shards


def _layers(folder: Path) -> dict[int, Path]:
    matches = {path: re.fullmatch(r"layer_(\d+)", path.name) for path in folder.glob("layer_*") if path.is_dir()}
    return dict(sorted((int(name[1]), path) for path, name in matches.items() if name))


def _dtype(place: Path, asked: str | None) -> str:
    written = next((file for file in (place / "dtype.txt", place.parent / "dtype.txt") if file.is_file()), None)
    dtype = asked or (written.read_text(encoding="utf-8").strip().removeprefix("np.") if written else "int16")
    if dtype not in _DTYPES:
        where = "" if asked or not written else f" in {written}"
        raise InputError(f"GLP memmaps hold {', '.join(_DTYPES)}, got dtype {dtype[:20]!r}{where}")
    return dtype


def _open(folder: Path, dtype: str) -> _Part:
    """The index of a folder, after checking that its rows lie in the files and have one width."""
    path = folder / INDEX
    raw = open_npy(path)
    if raw.ndim != 2 or raw.shape[1:] != (3,) or raw.dtype.kind not in "iu" or not len(raw):
        raise InputError(f"{path} must be integers (rows, 3): file, first, end; got {raw.dtype} {raw.shape}")
    index = raw.astype(np.int64)
    widths = index[:, 2] - index[:, 1]
    if (index < 0).any() or widths[0] < 1:
        raise InputError(f"{path} is damaged: row {int((index < 0).any(axis=1).argmax())} begins or ends at no value")
    if (odd := np.flatnonzero(widths != widths[0])).size:
        raise InputError(f"{path}: row {odd[0]} has width {widths[odd[0]]}, the first row {widths[0]}: expected one")
    numbers, which = np.unique(index[:, 0], return_inverse=True)
    ends = np.zeros(len(numbers), np.int64)
    np.maximum.at(ends, which, index[:, 2])
    files = {int(number): folder / f"data_{number:04d}.npy" for number in numbers}
    for file, end in zip(files.values(), ends, strict=True):
        _check_file(file, int(end) * np.dtype(dtype).itemsize)
    return _Part(folder, index, files)


def _check_file(file: Path, needed: int) -> None:
    if not file.is_file():
        raise InputError(f"{file} is missing, but {INDEX} has rows in it: fetch it again")
    with file.open("rb") as start:
        if start.read(len(_NPY_MAGIC)) == _NPY_MAGIC:
            raise InputError(f"{file} is a NumPy array with a header, expected bare values: import it as an array")
    if (size := file.stat().st_size) < needed:
        raise InputError(f"{file} is truncated: it has {size} bytes, {INDEX} reaches to {needed}: fetch it again")


def _used(part: _Part, itemsize: int) -> list[Span]:
    """The bytes that the rows of a folder lie in: the producer's files are mostly room for more."""
    index = part.index[np.lexsort((part.index[:, 1], part.index[:, 0]))]
    file, begin, end = index.T
    apart = (file[1:] != file[:-1]) | (begin[1:] > end[:-1])
    cuts = [0, *(np.flatnonzero(apart) + 1), len(index)]
    return [
        Span(part.files[int(file[low])], int(begin[low]) * itemsize, int(end[high - 1]) * itemsize)
        for low, high in itertools.pairwise(cuts)
    ]


def _blocks(parts: list[_Part], dtype: np.dtype) -> Iterator[Block]:
    seen = 0
    for part in parts:
        n = len(part.index)
        position, doc_id = (_buffer(part.folder / name, n) for name in ("token_buffer.json", "doc_buffer.json"))
        columns = {
            "position": np.zeros(n, np.int64) if position is None else position + 1,  # counted after BOS there
            "doc_id": np.arange(seen, seen + n) if doc_id is None else doc_id,
        }
        values = {
            number: np.memmap(file, dtype, mode="r", shape=file.stat().st_size // dtype.itemsize)
            for number, file in part.files.items()
        }
        step = block_length(part.d_in * dtype.itemsize)
        for first in range(0, n, step):
            rows = slice(first, first + step)
            yield _rows(part.index[rows], values), {name: column[rows] for name, column in columns.items()}
        seen += n


def _rows(index: np.ndarray, values: dict[int, np.memmap]) -> Tensor:
    """The rows of an index, `(n, d)`, copied in runs that lie one after the other in a file."""
    file, begin, end = index.T
    d = int(end[0] - begin[0])
    out = np.empty((len(index), d), next(iter(values.values())).dtype)
    apart = (file[1:] != file[:-1]) | (begin[1:] != end[:-1])
    cuts = [0, *(np.flatnonzero(apart) + 1), len(index)]
    for low, high in itertools.pairwise(cuts):
        out[low:high] = values[int(file[low])][begin[low] : end[high - 1]].reshape(-1, d)
    x = torch.from_numpy(out)
    return x.view(torch.bfloat16) if x.dtype == torch.int16 else x


def _buffer(path: Path, rows: int) -> np.ndarray | None:
    """One integer a row, `(rows,)` uint64, or int64 if any is negative; None if the file is missing or empty."""
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values == []:
            return None
        if not isinstance(values, list) or len(values) != rows or not all(type(value) is int for value in values):
            got = f"a list of {len(values)}" if isinstance(values, list) else type(values).__name__
            raise InputError(f"{path} must hold one integer for each of {rows} rows, got {got}: fetch it again")
        # An explicit dtype: by default NumPy makes floats of ids on both sides of 2^63.
        return np.array(values, np.uint64 if min(values) >= 0 else np.int64)
    except (ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged ({error}): fetch it again, or delete it") from None


def _write_json(path: Path, values: np.ndarray, block: int = 1 << 20) -> None:
    """A list of integers, written in pieces: as Python objects all of them would not fit in memory."""
    with path.open("w", encoding="utf-8") as file:
        for start in range(0, len(values), block):
            file.write(", " if start else "[")
            file.write(", ".join(map(str, values[start : start + block].tolist())))
        file.write("]")
