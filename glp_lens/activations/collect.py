"""Run texts through a language model and keep the activations of its hook points."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor
from tqdm.auto import tqdm

from glp_lens import lm
from glp_lens.activations.store import MANIFEST, TORCH, ActivationStore, Cursor, Manifest
from glp_lens.activations.writer import SHARD_ROWS, StoreWriter, check_dtype
from glp_lens.artifacts import versions
from glp_lens.corpus import Document
from glp_lens.errors import InputError
from glp_lens.types import Json

GROUP_TOKENS = 32_768
"""A group has so many documents that at full length it has this many tokens."""
_START = Cursor(0, xxhash.xxh3_64_hexdigest(b""), {"bos": 0, "massive": 0})


def collect(
    model: lm.Model,
    texts: Iterable[str | Document],
    hooks: str | Sequence[str] | None = None,
    out: str | Path = "activations",
    *,
    max_tokens: int | None = None,
    context: int = 128,
    batch_size: int = 32,
    dtype: str = "bfloat16",
    seed: int = 0,
    massive: float | None = 10.0,
    corpus: str = "texts",
    shard_rows: int = SHARD_ROWS,
) -> ActivationStore | dict[str, ActivationStore]:
    """Collect the activations of texts at one or several hook points into activation stores.

    Every text gets one BOS in front and is cut to `context` tokens. Left out are BOS, position 0 (an
    attention sink), padding, and massive activations. Rows stay in document order. A run that was interrupted
    goes on where it stopped when the same call is made again, and ends with the same bytes; a finished one is
    opened.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        texts: documents in a fixed order; a repeated call must pass the same ones.
        hooks: hook points; by default the residual stream after the middle layer.
        out: folder of the store; with several hook points, of one store a hook point, rows aligned.
        max_tokens: rows to keep; by default all.
        context: tokens of a text, BOS included.
        batch_size: full-length texts in one forward pass; of shorter ones as many as have no more tokens.
        dtype: `bfloat16`, `float16` or `float32`, as which rows are kept.
        seed: seed of the texts' order, kept for provenance. Collecting itself draws nothing.
        massive: leave out a token whose norm, at any hook point, is over this many times the median norm of
            the first group of documents; None keeps all.
        corpus: name of the texts, for provenance.
        shard_rows: a shard is closed at the first group's end with this many rows.

    Returns:
        The store, or with several hook points a dictionary of them.

    Raises:
        InputError: bad options; a store of other arguments at `out`; activations that are not finite; no
            rows.
    """
    names = _hook_names(model, hooks)
    _check(
        model,
        texts,
        context=context,
        massive=massive,
        sizes={"max_tokens": max_tokens, "batch_size": batch_size, "shard_rows": shard_rows},
    )
    group = max(1, GROUP_TOKENS // context)
    source = {
        "model": lm.describe(model),
        "weights": lm.weights_hash(model),
        "tokenizer": _describe_tokenizer(model),
        "corpus": {"name": corpus, "seed": seed},
        "settings": {
            "hooks": names,
            "context": context,
            "batch_size": batch_size,
            "group_documents": group,
            "max_tokens": max_tokens,
            "massive": massive,
            "shard_rows": shard_rows,
        },
    }
    folders = _folders(Path(out), names)
    found = _continue(folders, source, check_dtype(dtype))
    documents = _documents(texts)
    if all(manifest and manifest.complete for manifest in found.values()):
        manifest = next(m for m in found.values() if m)
        _skip(documents, manifest.cursor, Path(out))
        unfilled = max_tokens is None or manifest.rows < max_tokens
        if unfilled and next(documents, None) is not None:
            raise InputError(f"the store at {out} was collected from fewer texts: choose another folder")
    else:
        _make_writable(folders.values())
        run = _Run(model, names=names, folders=folders, found=found, source=source, dtype=dtype)
        digest = _skip(documents, run.cursor, Path(out))
        was_training = model.training
        model.eval()  # dropout would make activations random
        try:
            run.collect(documents, digest)
        finally:
            model.train(was_training)
    stores = {name: ActivationStore.open(folder) for name, folder in folders.items()}
    return stores if len(names) > 1 else stores[names[0]]


@dataclass(frozen=True)
class _Group:
    """Tokens of a group of documents in document order: ids, positions, documents `(n,)`, rows `(n, d)`."""

    token_id: np.ndarray
    position: np.ndarray
    document: np.ndarray
    rows: dict[str, Tensor]


class _Run:
    """A collection under way: what was kept, what waits for the next shard, and where the texts stand."""

    def __init__(
        self,
        model: lm.Model,
        *,
        names: list[str],
        folders: dict[str, Path],
        found: dict[str, Manifest | None],
        source: Json,
        dtype: str,
    ) -> None:
        self.model, self.names, self.folders, self.source, self.dtype = model, names, folders, source, dtype
        self.settings = source["settings"]
        self.bos = lm.bos_id(model)
        first = found[names[0]]
        self.cursor = first.cursor if first else _START
        self.kept = first.rows if first else 0
        self.limits = {name: m.max_norm for name, m in found.items() if m and m.max_norm is not None}
        self.writers = {name: StoreWriter(folders[name], m) for name, m in found.items() if m}
        self.pending: list[tuple[dict[str, Tensor], dict[str, np.ndarray]]] = []

    def collect(self, documents: Iterator[Document], digest: xxhash.xxh3_64) -> None:
        """Use up the documents, or as many as give `max_tokens` rows."""
        goal = self.settings["max_tokens"]
        with tqdm(total=goal, initial=self.kept, desc="collect", unit="tok", mininterval=2) as bar:
            while goal is None or self.kept < goal:
                group = list(itertools.islice(documents, self.settings["group_documents"]))
                if not group:
                    break
                # The last group has more tokens than are asked for.
                self._add(group, digest, lambda n: bar.update(n if goal is None else min(n, goal - bar.n)))
                bar.n = self.kept
                bar.refresh()
                if sum(len(c["position"]) for _, c in self.pending) >= self.settings["shard_rows"]:
                    self._flush()
        if self.kept == 0:
            raise InputError(f"no activations left to keep in {self.cursor.documents} texts: pass longer texts")
        self._flush()
        for writer in self.writers.values():
            writer.finish(self.cursor)

    def _add(self, documents: list[Document], digest: xxhash.xxh3_64, progress: Callable[[int], Any]) -> None:
        group = _forward(self.model, documents, self.names, self.settings, progress)
        usable = (group.position > 0) & (group.token_id != self.bos)
        norms = self._norms(group, usable, documents)
        massive = np.zeros_like(usable)
        if self.settings["massive"] is not None and usable.any():
            for name in self.names:
                if name not in self.limits:
                    self.limits[name] = self.settings["massive"] * float(np.median(norms[name][usable]))
                massive |= usable & (norms[name] > self.limits[name])
        keep = np.flatnonzero(usable & ~massive)
        end, used = len(usable), len(documents)
        if (goal := self.settings["max_tokens"]) is not None and len(keep) >= goal - self.kept:
            keep = keep[: goal - self.kept]
            end = keep[-1] + 1
            used = int(group.document[keep[-1]]) + 1
        ids = np.array([document.id for document in documents], dtype=np.uint64)
        if len(keep):
            rows = {name: self._to_stored(name, group.rows[name][torch.from_numpy(keep)]) for name in self.names}
            columns = {
                "token_id": group.token_id[keep],
                "doc_id": ids[group.document[keep]],
                "position": group.position[keep],
            }
            self.pending.append((rows, columns))
            self.kept += len(keep)
        digest.update(ids[:used].tobytes())
        before = self.cursor.excluded
        self.cursor = Cursor(
            documents=self.cursor.documents + used,
            corpus_hash=digest.hexdigest(),
            excluded={
                "bos": before["bos"] + int((~usable[:end]).sum()),
                "massive": before["massive"] + int(massive[:end].sum()),
            },
        )

    def _norms(self, group: _Group, usable: np.ndarray, documents: list[Document]) -> dict[str, np.ndarray]:
        """Norms of all rows at each hook point, after checking that what may be kept is finite."""
        norms = {name: group.rows[name].float().norm(dim=1).numpy() for name in self.names}
        for name, values in norms.items():
            bad = np.flatnonzero(usable & ~np.isfinite(values))
            if len(bad):
                document = documents[group.document[bad[0]]]
                raise InputError(
                    f"activations at {name} are not finite in document {document.text[:40]!r} "
                    f"(position {group.position[bad[0]]}): run the model in bfloat16 or float32"
                )
        return norms

    def _to_stored(self, name: str, rows: Tensor) -> Tensor:
        stored = rows.to(TORCH[self.dtype])
        if self.dtype == "float16" and not torch.isfinite(stored).all():
            raise InputError(
                f"activations at {name} reach {float(rows.abs().max()):.0f}, float16 ends at 65504: "
                "use dtype='bfloat16'"
            )
        return stored

    def _flush(self) -> None:
        """Write what waits as one shard of each store."""
        if not self.pending:
            return
        columns = {
            name: np.concatenate([part[name] for _, part in self.pending])
            for name in ("token_id", "doc_id", "position")
        }
        for name in self.names:
            rows = torch.cat([part[name] for part, _ in self.pending])
            if name not in self.writers:
                self.writers[name] = StoreWriter(self.folders[name], self._manifest(name, rows.shape[1]))
            self.writers[name].append(rows, columns, self.cursor)
        self.pending = []

    def _manifest(self, name: str, d_in: int) -> Manifest:
        return Manifest(
            hook=name,
            d_in=d_in,
            dtype=self.dtype,
            source=self.source,
            versions=versions(),
            max_norm=self.limits.get(name),
            cursor=_START,
        )


def _forward(
    model: lm.Model,
    documents: list[Document],
    names: list[str],
    settings: Json,
    progress: Callable[[int], Any],
) -> _Group:
    """Activations of every token of the documents, back in document order."""
    ids = lm.to_ids(model, [document.text for document in documents], settings["context"])
    lengths = np.array([len(row) for row in ids])
    starts = np.cumsum(lengths) - lengths
    rows: dict[str, Tensor] = {}
    for batch in pack(lengths.tolist(), settings["batch_size"] * settings["context"]):
        tokens, mask = lm.pad([ids[i] for i in batch])
        found = lm.activations(model, tokens, mask, names)
        places = torch.from_numpy(np.concatenate([starts[i] + np.arange(lengths[i]) for i in batch]))
        for name in names:
            if name not in found or found[name].ndim != 3:
                got = f"shape {tuple(found[name].shape)}" if name in found else "nothing"
                raise InputError(f"hook point {name} gives {got}, expected (batch, pos, d): choose another one")
            values = found[name][mask.to(found[name].device)].cpu()
            if name not in rows:
                rows[name] = values.new_empty(int(lengths.sum()), values.shape[1])
            rows[name][places] = values
        progress(int(lengths[batch].sum()) - len(batch))
    return _Group(
        token_id=np.concatenate([np.array(row) for row in ids]),
        position=np.concatenate([np.arange(n) for n in lengths]),
        document=np.repeat(np.arange(len(ids)), lengths),
        rows=rows,
    )


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of sequences in batches of similar length, each of at most `budget` tokens with its padding.

    A sequence longer than the budget is a batch of its own.
    """
    batches: list[list[int]] = []
    width = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or (len(batches[-1]) + 1) * width > budget:
            batches.append([])
            width = lengths[i]
        batches[-1].append(i)
    return batches


def _hook_names(model: lm.Model, hooks: str | Sequence[str] | None) -> list[str]:
    if hooks is None:
        hooks = lm.default_hook(model)
    names = [hooks] if isinstance(hooks, str) else list(dict.fromkeys(hooks))
    if not names:
        raise InputError(f"no hook point given: pass for example {lm.default_hook(model)!r}")
    return [lm.check_hook(model, name) for name in names]


def _check(
    model: lm.Model,
    texts: object,
    *,
    context: int,
    massive: float | None,
    sizes: dict[str, int | None],
) -> None:
    if isinstance(texts, str):
        raise InputError("texts must be several texts, got one string: pass a list, [text]")
    if model.tokenizer is None:
        raise InputError("this model has no tokenizer to read texts with: open it with one")
    longest = int(model.cfg.n_ctx)
    if not 2 <= context <= longest:
        raise InputError(f"context must be 2 to {longest} tokens for this model, got {context}")
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    if massive is not None and not massive > 1:
        raise InputError(f"massive must be over 1 (times the median norm) or None, got {massive}")


def _folders(out: Path, names: list[str]) -> dict[str, Path]:
    """Where each hook point's store is or will be; refuses a folder that holds anything else."""
    if len(names) > 1 and (out / MANIFEST).exists():
        raise InputError(f"{out} holds the store of one hook point, expected none or several: choose another folder")
    folders = {name: out / name if len(names) > 1 else out for name in names}
    for folder in folders.values():
        if folder.exists() and not (folder / MANIFEST).is_file() and (folder.is_file() or any(folder.iterdir())):
            raise InputError(f"{folder} exists and is not an activation store: choose another folder")
    return folders


def _make_writable(folders: Iterable[Path]) -> None:
    """Find out now, not when the first shard is full, that a folder cannot be written."""
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make folder {folder}: {error.strerror}; choose another folder") from None
        if not os.access(folder, os.W_OK):
            raise InputError(f"cannot write to folder {folder}: choose another folder")


def _continue(folders: dict[str, Path], source: Json, dtype: str) -> dict[str, Manifest | None]:
    """The stores that are there already, brought to the last point that all of them reached.

    Raises:
        InputError: a store there was collected with other arguments.
    """
    found = {name: Manifest.read(f) if (f / MANIFEST).is_file() else None for name, f in folders.items()}
    asked = _flat(json.loads(json.dumps({**source, "dtype": dtype})))
    for name, manifest in found.items():
        if manifest is None:
            continue
        have = _flat({**manifest.source, "dtype": manifest.dtype})
        differ = [key for key in asked if have.get(key) != asked[key]]
        if manifest.hook != name or differ:
            key = differ[0] if differ else "hook"
            raise InputError(
                f"the store at {folders[name]} was collected with {key} = {have.get(key, manifest.hook)!r}, "
                f"not {asked.get(key, name)!r}: choose another folder"
            )
    done = min(len(m.shards) if m else 0 for m in found.values())
    if all(m and m.complete and len(m.shards) == done for m in found.values()):
        return found
    return {name: m and _rewind(m, done) for name, m in found.items()}


def _rewind(manifest: Manifest, shards: int) -> Manifest:
    cursor = manifest.shards[shards - 1].cursor if shards else _START
    return replace(manifest, shards=manifest.shards[:shards], cursor=cursor, complete=False)


def _flat(value: Json, prefix: str = "") -> Json:
    """Nested dictionaries as one, keys joined by dots."""
    flat: Json = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {prefix + key: item}
    return flat


def _documents(texts: Iterable[str | Document]) -> Iterator[Document]:
    for i, text in enumerate(texts):
        if isinstance(text, Document):
            yield text
        elif isinstance(text, str):
            yield Document.of(text)
        else:
            raise InputError(f"texts must be strings or Documents, got {type(text).__name__} at index {i}")


def _skip(documents: Iterator[Document], cursor: Cursor, out: Path) -> xxhash.xxh3_64:
    """Pass over the documents that a store has used up; returns the hash of their ids, to go on with.

    Raises:
        InputError: they are not the documents it used.
    """
    digest = xxhash.xxh3_64()
    for document in itertools.islice(documents, cursor.documents):
        digest.update(np.uint64(document.id).tobytes())
    if digest.hexdigest() != cursor.corpus_hash:
        raise InputError(
            f"the store at {out} was collected from other texts, or in another order: choose another folder"
        )
    return digest


def _describe_tokenizer(model: lm.Model) -> Json:
    vocabulary = sorted(model.tokenizer.get_vocab().items())
    return {
        "class": type(model.tokenizer).__name__,
        "bos_id": lm.bos_id(model),
        "vocabulary": xxhash.xxh3_64_hexdigest(json.dumps(vocabulary).encode()),
    }
