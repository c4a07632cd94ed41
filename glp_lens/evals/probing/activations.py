"""Activations of the tasks' texts, collected once for all models and hook points and kept in activation stores.

The cache is a folder of stores, one for each task and hook point, of the texts that no earlier store has: tasks share
many prompts. It is a folder of its own for each language model, number of tokens and pooling, so nothing is mixed up.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from glp_lens import activations, lm
from glp_lens.activations import ActivationStore
from glp_lens.activations.manifest import MANIFEST, Manifest
from glp_lens.activations.writer import lock, locked
from glp_lens.arguments import checked
from glp_lens.corpus import Document
from glp_lens.corpus.documents import text_id
from glp_lens.errors import InputError
from glp_lens.evals.probing.settings import Pooling
from glp_lens.evals.probing.tasks import Task
from glp_lens.types import Acts, Json

_SHARD_TEXTS = 512


class TaskRows(NamedTuple):
    """Activations `(n_rows, d_in)` float32 on the CPU, and of each row the index of its text, ascending, `(n_rows,)`.

    A text without a token of its own has no row; with pooling `all` a text has one for each token.
    """

    acts: Acts
    text: NDArray[np.int64]


@dataclass(frozen=True)
class TaskActivations:
    """Activations of several tasks at one or several hook points, read when they are asked for.

    Attributes:
        source: `model` (see `lm.describe`), `weights` (their hash), `hooks`, `hook` (the first of them), `context`,
            `pooling`, `hook_names` (all names of each hook point).
    """

    source: Json
    _read: Callable[[str, str], TaskRows] = field(repr=False)

    def rows(self, task: str, hook: str | None = None) -> TaskRows:
        """The rows of a task at a hook point, by default the first.

        Raises:
            InputError: a task or hook point that was not collected.
        """
        hook = hook or self.source["hook"]
        if hook not in self.source["hooks"]:
            known = ", ".join(filter(None, self.source["hooks"])) or "an unknown hook point"
            raise InputError(f"task activations are of {known}, got {hook!r}: collect them there too")
        return self._read(task, hook)

    @classmethod
    def of(cls, rows: Mapping[str, Tensor], source: Json) -> TaskActivations:
        """Activations in memory at one hook point: `(n_texts, d_in)` of each task, in its order.

        `source` has what is known of `TaskActivations.source`; without `hook` no model's hook point is checked.
        """

        def read(task: str, _hook: str) -> TaskRows:
            if task not in rows:
                raise InputError(f"no activations of task {task!r}, have {', '.join(rows)}: collect them too")
            return TaskRows(rows[task].detach().cpu().float(), np.arange(len(rows[task])))

        return cls({"hook": None, "hooks": [source.get("hook")], **source}, read)


@checked
def collect(
    model: lm.Model,
    tasks: Sequence[Task],
    hooks: str | Sequence[str],
    *,
    pooling: Pooling = "last",
    context: int = 128,
    batch_tokens: int = 8192,
    cache: str | Path | None = None,
    identity: Json | None = None,
) -> TaskActivations:
    """Run the tasks' texts through the language model, those that the cache lacks, and open all of them.

    Each text gets one BOS, so that a text of one token does not land on the attention sink at position 0, and loses
    its beginning if it is longer than the context. An interrupted run goes on where it stopped.

    Args:
        model: a HookedTransformer or TransformerBridge.
        tasks: whose texts to run.
        hooks: hook points, all read in one forward pass.
        pooling: what of a text is a row.
        context: most tokens of a text, with BOS.
        batch_tokens: most tokens of a batch, with padding.
        cache: folder of the stores; without one they are temporary.
        identity: `lm.identity(model)`, where the caller knows it already: making it reads all weights.

    Raises:
        InputError: unknown hook point or pooling, activations that are not finite, a full disk.
    """
    names = list(dict.fromkeys([hooks] if isinstance(hooks, str) else hooks))
    if not names or not tasks:
        raise InputError(f"nothing to collect: got {len(tasks)} tasks and {len(names)} hook points")
    if pooling not in get_args(Pooling):
        raise InputError(f"pooling must be one of {', '.join(get_args(Pooling))}, got {pooling!r}")
    if context < 2:
        raise InputError(f"context must hold BOS and one token at least, got {context}")
    names = [lm.check_hook(model, name) for name in names]
    identity = identity or lm.identity(model)
    source: Json = {
        **identity,
        "hooks": names,
        "hook": names[0],
        "hook_names": {name: lm.names_of(model, name) for name in names},
        "context": context,
        "pooling": pooling,
    }
    temporary = tempfile.TemporaryDirectory(prefix="glp-lens-tasks-") if cache is None else None
    folder = Path(cache if temporary is None else temporary.name) / _key(source)  # type: ignore[arg-type]
    # A mean over tokens of a bfloat16 model needs more digits, their activations and maxima do not.
    narrow = source["model"]["dtype"] == "bfloat16" and pooling != "mean"
    batch_size = max(1, batch_tokens // context)
    index = {name: _Index(folder, name) for name in names}
    work, total = _missing(model, tasks, index, folder, context)
    # Another run that shares the cache may be collecting the same: it is waited for, and then only the rest is made.
    with locked(folder, wait=True) if work else nullcontext():
        now = {name: _Index(folder, name) for name in names} if work else index
        if any(len(now[name].stores) != len(index[name].stores) for name in names):
            index = now
            work, total = _missing(model, tasks, index, folder, context)
        bar = tqdm(total=total, desc="probing texts", unit="tok", unit_scale=True, mininterval=2, disable=not work)
        with bar:
            for out, where, documents in work:
                _clear(out, where, batch_size)
                activations.collect(
                    model,
                    documents,
                    where,
                    out / where[0] if len(where) == 1 else out,
                    context=context,
                    truncate="left",
                    batch_size=batch_size,
                    dtype="bfloat16" if narrow else "float32",
                    keep=pooling,
                    massive=None,
                    corpus="probing tasks",
                    shard_tokens=_SHARD_TEXTS * context,
                    progress=bar.update,
                    identity=identity,
                )
                for name in where:
                    index[name].add(out / name)

    def read(task: str, hook: str, _keep: Any = temporary) -> TaskRows:  # the folder lives as long as its reader
        if task not in texts:
            raise InputError(f"no activations of task {task!r}: collect them too")
        return index[hook].rows(texts[task])

    texts = {task.name: [text_id(text) for text in task.texts] for task in tasks}
    return TaskActivations(source, read)


class _Index:
    """The stores of one hook point, and in which of them and where each text's rows are."""

    def __init__(self, folder: Path, hook: str) -> None:
        self.stores: list[ActivationStore] = []
        self.where: dict[int, tuple[int, int, int]] = {}
        for path in sorted(folder.glob(f"*/{hook}/{MANIFEST}")) if folder.is_dir() else ():
            if Manifest.read(path.parent).complete:
                self.add(path.parent)

    def add(self, path: Path) -> None:
        """Take in a complete store."""
        store = ActivationStore.open(path)
        ids = store.column("doc_id")
        starts = np.flatnonzero(np.r_[True, ids[1:] != ids[:-1]])
        stops = np.r_[starts[1:], len(ids)]
        number = len(self.stores)
        self.stores.append(store)
        for text, start, stop in zip(ids[starts].tolist(), starts.tolist(), stops.tolist(), strict=True):
            self.where.setdefault(text, (number, start, stop))

    def rows(self, texts: Sequence[int]) -> TaskRows:
        """The rows of texts, in their order."""
        places = [(i, *self.where[text]) for i, text in enumerate(texts) if text in self.where]
        lengths = np.array([stop - start for _, _, start, stop in places], dtype=np.int64)
        text = np.repeat(np.array([i for i, *_ in places], dtype=np.int64), lengths)
        bounds = np.r_[0, np.cumsum(lengths)]
        acts = torch.empty(int(bounds[-1]), self.stores[0].d_in if self.stores else 0, dtype=torch.float32)
        by_store = defaultdict(list)
        for j, (_, store, start, stop) in enumerate(places):
            by_store[store].append((bounds[j], start, stop))
        for store, parts in by_store.items():
            index = np.concatenate([np.arange(start, stop) for _, start, stop in parts])
            to = np.concatenate([np.arange(at, at + stop - start) for at, start, stop in parts])
            acts[torch.from_numpy(to)] = self.stores[store].take(index)
        return TaskRows(acts, text)


def _missing(
    model: lm.Model, tasks: Sequence[Task], index: dict[str, _Index], folder: Path, context: int
) -> tuple[list[tuple[Path, list[str], list[Document]]], int]:
    """What the stores lack, task by task: the store to make, its hook points and texts; and the tokens of them all."""
    known, bos = {name: set(own.where) for name, own in index.items()}, lm.bos_id(model)
    work: list[tuple[Path, list[str], list[Document]]] = []
    total = 0
    for task in tqdm(tasks, desc="tokenise texts", unit="task", mininterval=2, delay=2, leave=False):
        lacking: dict[tuple[int, ...], list[str]] = defaultdict(list)
        texts = {text_id(text): text for text in task.texts}
        for name in index:
            lacking[tuple(i for i in texts if i not in known[name])].append(name)
            known[name].update(texts)
        for ids, names in lacking.items():
            rows = lm.to_ids(model, [texts[i] for i in ids], context, truncate="left")
            usable = [any(token != bos for token in row) for row in rows]
            total += sum(len(row) for row, fits in zip(rows, usable, strict=True) if fits)
            chosen = [Document.of(texts[i]) for i, fits in zip(ids, usable, strict=True) if fits]
            if chosen:
                key = xxhash.xxh3_64_hexdigest(np.array([d.id for d in chosen], dtype=np.uint64).tobytes())
                work.append((folder / f"{task.name}-{key[:8]}", names, chosen))
    return work, total


def _clear(out: Path, names: list[str], batch_size: int) -> None:
    """Remove what an interrupted run with other hook points or batch sizes left, since only an equal one can resume it.

    Raises:
        InputError: that run is not interrupted, but at work in another process.
    """
    wanted = {"hooks": names, "batch_size": batch_size}
    for folder in (out / name for name in names):
        if not (folder / MANIFEST).is_file():
            continue
        manifest = Manifest.read(folder)
        settings = manifest.source.get("settings", {})
        if not manifest.complete and wanted != {key: settings.get(key) for key in wanted}:
            held = lock(folder)
            shutil.rmtree(folder)
            os.close(held)


def _key(source: Json) -> str:
    """Name of the folder: what is in it, and a hash of all that the activations depend on but the hook point."""
    facts = {key: value for key, value in source.items() if key not in ("hooks", "hook", "hook_names")}
    facts["model"] = {key: value for key, value in source["model"].items() if key != "blocks"}
    digest = xxhash.xxh3_64_hexdigest(json.dumps(facts, sort_keys=True).encode())
    return f"{source['pooling']}-{source['context']}-{digest[:12]}"
