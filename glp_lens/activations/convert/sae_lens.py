"""The cached activations of SAELens: a `datasets` folder of Arrow files, as its CacheActivationsRunner writes them.

One item is a sequence: a column with the hook point's name, `(context, d_in)`, and `token_ids`, `(context,)`. A
sequence is a stretch of the token stream: documents are joined, with a BOS or another token between them.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash

from glp_lens.activations.convert.transfer import (
    Span,
    block_length,
    export_bar,
    imported_source,
    new_output,
    save,
    stored_blocks,
)
from glp_lens.activations.store import ActivationStore
from glp_lens.activations.writer import Block
from glp_lens.errors import InputError, first_line

if TYPE_CHECKING:
    from datasets import Dataset

_DTYPES = {"float16": np.float16, "float32": np.float32}


def import_sae_lens(
    folder: str | Path,
    out: str | Path,
    *,
    hook: str | None = None,
    skip_first: bool = True,
    drop_tokens: Collection[int] = (),
    model: str | None = None,
) -> ActivationStore:
    """A store of the rows of SAELens's cached activations, in their order.

    `doc_id` is the number of the sequence and `position` the place in it, unless the folder has columns of these names.
    Such a folder does not say how the language model was opened (`model_from_pretrained_kwargs`), whether sequences
    began with a BOS (`prepend_bos`) or which part of them was kept (`seqpos_slice`): nothing checks it. Sequences that
    are there twice, as SAELens writes them when its texts run out, are kept, with a warning.

    Args:
        folder: what CacheActivationsRunner or `Dataset.save_to_disk` wrote.
        out: folder of the new store.
        hook: the column to take; may be left out if there is one.
        skip_first: leave out the first row of a sequence, an attention sink that SAELens keeps. Where a column
            `position` tells the true positions, nothing is left out. The store's source says so.
        drop_tokens: ids of tokens to leave out as well: BOS also stands between documents.
        model: name of the language model, for provenance.

    Raises:
        InputError: no such folder or column, another dtype, damaged data, rows that are not finite; `out` exists.
    """
    folder = Path(folder)
    dataset = _open(folder)
    hook = _column(dataset, folder, hook)
    if drop_tokens and "token_ids" not in dataset.column_names:
        raise InputError(f"{folder} has no token_ids, which drop_tokens needs: leave drop_tokens out")
    shape, dtype = dataset.features[hook].shape, dataset.features[hook].dtype
    source = imported_source(
        "sae-lens",
        folder,
        [Span.whole(Path(file["filename"])) for file in dataset.cache_files],
        model,
        rows=len(dataset) * shape[0],
        skip_first=skip_first,
        drop_tokens=sorted(drop_tokens),
    )
    blocks = _blocks(dataset, hook, skip_first, drop_tokens)
    store = save(out, blocks, hook=hook, dtype=dtype, source=source)
    if repeated := _repeated(dataset):
        warnings.warn(
            f"{repeated:,} of the {len(dataset):,} sequences in {folder} have the tokens of an earlier one, as when "
            "SAELens ran out of texts and began again: no part of this store is held out from the others",
            stacklevel=2,
        )
    return store


def export_sae_lens(store: ActivationStore, folder: str | Path, *, context: int = 128) -> int:
    """Write the rows of a store as cached activations that SAELens trains on.

    Rows are cut into sequences of `context` rows whatever their documents. The columns `doc_id` and `position`, which
    SAELens ignores, keep what they were. bfloat16 becomes float32, as Arrow has none.

    Args:
        store: with at least `context` rows.
        folder: a new folder.
        context: rows of a sequence, SAELens's `context_size`.

    Returns:
        The number of rows at the end, fewer than `context`, that fill no sequence and are left out.

    Raises:
        InputError: too few rows; `folder` exists; the disk is full.
    """
    from datasets import Array2D, DatasetInfo, Features, Sequence, Value
    from datasets.arrow_writer import ArrowWriter

    if not 1 <= context <= len(store):
        raise InputError(f"context must be 1 to {len(store)}, the rows of the store, got {context}")
    sequences = len(store) // context
    dtype = "float16" if store.dtype == "float16" else "float32"
    features = Features(
        {
            store.hook: Array2D(shape=(context, store.d_in), dtype=dtype),
            "token_ids": Sequence(Value("int32"), length=context),
            "doc_id": Sequence(Value("uint64"), length=context),
            "position": Sequence(Value("uint32"), length=context),
        }
    )
    token_ids = store.column("token_id").astype(np.int32)
    columns = {"token_ids": token_ids, "doc_id": store.column("doc_id"), "position": store.column("position")}
    step = block_length(context * store.d_in * 4)
    name = "data-00000-of-00001.arrow"
    with new_output(Path(folder)) as temporary, export_bar(sequences * context) as bar:
        temporary.mkdir()
        with ArrowWriter(features=features, path=str(temporary / name)) as writer:
            for first in range(0, sequences, step):
                start, stop = first * context, min(first + step, sequences) * context
                x = np.concatenate([_floats(part, store.dtype) for part in stored_blocks(store, bar, start, stop)])
                batch: dict[str, Any] = {key: v[start:stop].reshape(-1, context) for key, v in columns.items()}
                writer.write_batch({store.hook: x.reshape(-1, context, store.d_in), **batch})
            writer.finalize()
        DatasetInfo(features=features).write_to_directory(str(temporary))
        state = {
            "_data_files": [{"filename": name}],
            "_fingerprint": store.provenance()["manifest_hash"],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        (temporary / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
    return len(store) - sequences * context


def _floats(x: np.ndarray, dtype: str) -> np.ndarray:
    return torch.from_numpy(x).view(torch.bfloat16).float().numpy() if dtype == "bfloat16" else x


def _open(folder: Path) -> Dataset:
    from datasets import Dataset, load_from_disk

    if not (folder / "state.json").is_file():
        raise InputError(f"no cached activations at {folder}: expected a folder with state.json and Arrow files")
    try:
        dataset = load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder} is damaged or no dataset folder ({first_line(error)})") from None
    if not isinstance(dataset, Dataset) or not len(dataset):
        raise InputError(f"{folder} holds no sequences: expected a dataset with activations")
    return dataset


def _column(dataset: Dataset, folder: Path, hook: str | None) -> str:
    """The column with the activations, checked."""
    from datasets import Array2D

    columns = [name for name, feature in dataset.features.items() if isinstance(feature, Array2D)]
    if hook is None and len(columns) == 1:
        hook = columns[0]
    if hook is None or hook not in columns:
        asked = "pass hook" if hook is None else f"got hook {hook!r}"
        raise InputError(f"{folder} has activations of {', '.join(columns) or 'no hook point'}: {asked}, one of them")
    if (dtype := dataset.features[hook].dtype) not in _DTYPES:
        raise InputError(f"{hook} in {folder} is {dtype}, expected {' or '.join(_DTYPES)}: cast it first")
    if None in (shape := dataset.features[hook].shape):
        raise InputError(f"{hook} in {folder} has shape {shape}, expected sequences of one length: cache it again")
    return hook


def _blocks(dataset: Dataset, hook: str, skip_first: bool, drop_tokens: Collection[int]) -> Iterator[Block]:
    context, d = dataset.features[hook].shape
    dtype = np.dtype(_DTYPES[dataset.features[hook].dtype])
    extra = [name for name in ("token_ids", "doc_id", "position") if name in dataset.column_names]
    table = dataset.select_columns([hook, *extra]).with_format("arrow")
    step = block_length(context * d * dtype.itemsize)
    for first in range(0, len(dataset), step):
        part = table[first : first + step]
        n = part.num_rows * context
        x = _flat(part[hook], n * d, dtype, hook).reshape(n, d)
        given = {name: _flat(part[name], n, np.dtype(np.int64), name) for name in extra}
        columns = {
            "token_id": given.get("token_ids", np.zeros(n, np.int64)),
            "doc_id": given.get("doc_id", first + np.arange(n) // context),
            "position": given.get("position", np.arange(n) % context),
        }
        keep = ~np.isin(columns["token_id"], list(drop_tokens))
        if skip_first and "position" not in given:
            keep &= columns["position"] > 0
        yield torch.from_numpy(x[keep]), {name: values[keep] for name, values in columns.items()}


def _repeated(dataset: Dataset) -> int:
    """How many sequences have the tokens of an earlier one; 0 where no tokens are known, or they are all the same."""
    if "token_ids" not in dataset.column_names:
        return 0
    seen: set[bytes] = set()
    for part in dataset.select_columns(["token_ids"]).with_format("numpy").iter(1024):
        seen.update(xxhash.xxh3_128_digest(ids.tobytes()) for ids in part["token_ids"])
    return len(dataset) - len(seen) if len(seen) > 1 else 0


def _flat(column: Any, size: int, dtype: np.dtype, name: str) -> np.ndarray:
    """All numbers of a column of nested lists, `(size,)`."""
    pieces = []
    for chunk in column.chunks:
        values = getattr(chunk, "storage", chunk)  # what lies under Array2D
        while hasattr(values, "values"):  # lists; a struct, which flattens too, has none
            values = values.flatten()
        if dtype.kind == "i" and not re.fullmatch(r"u?int\d+", kind := str(values.type)):
            raise InputError(f"column {name!r} holds {kind[:60]}, expected integers: cache it again")
        pieces.append(values)
    flat = np.concatenate([values.to_numpy(zero_copy_only=False) for values in pieces])
    if len(flat) != size or any(values.null_count for values in pieces):
        raise InputError(
            f"column {name!r} has {len(flat)} numbers where {size} belong, or missing ones: cache it again"
        )
    return flat.astype(dtype, copy=False) if dtype.kind == "f" else flat  # ids of 64 bits fit no int64
