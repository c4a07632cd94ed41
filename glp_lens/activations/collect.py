"""Run texts through a language model and keep the activations of its hook points.

A collection is a sequence of shards, and shard k depends on nothing but the model, the settings and the k-th run of
documents. So any process can make any shard, an interrupted run continues with the first that is missing, and parts
made on several machines merge into the store that one machine would have made.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xxhash
from torch import Tensor
from tqdm.auto import tqdm

from glp_lens import lm, numerics
from glp_lens.activations import forward, tokens
from glp_lens.activations.manifest import MANIFEST, Manifest, Shard, documents_hash
from glp_lens.activations.massive import Massive, check_massive, norm_limit
from glp_lens.activations.shard import Source
from glp_lens.activations.store import ActivationStore
from glp_lens.activations.tokens import Keep, Kept, Rule
from glp_lens.activations.writer import StoreWriter, check_dtype, check_labels
from glp_lens.arguments import checked
from glp_lens.corpus import Document
from glp_lens.errors import InputError
from glp_lens.files import make_writable, versions
from glp_lens.types import DTYPES, Json

SHARD_TOKENS = 65_536
SHARD_BYTES = 512 << 20
CALIBRATION = 32
"""The norm over which a token is massive comes from this many documents, or those of the first shard if fewer."""
PARTS = "parts"
_NEW = ("hook_names.", "model.blocks")
"""Facts of the language model that stores of earlier versions do not record."""
_EARLIER: Json = {"settings.truncate": "right", "settings.forward": "model"}
"""Settings that stores of earlier versions do not record, since there was no other."""
Part = tuple[int, int] | None
Truncate = Literal["left", "right"]
Labels = Callable[[Document, list[int]], Mapping[str, Any]]
"""(document, its token ids) -> for each name a number, or one for each token."""


@dataclass(frozen=True)
class Generation:
    """Continue each text, and keep the activations of the new tokens only.

    Attributes:
        tokens: tokens to add to each text.
        temperature: of sampling; 0 takes the likeliest token.
    """

    tokens: int = 64
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.tokens < 1 or not 0 <= self.temperature < math.inf:
            raise InputError(
                f"generating needs tokens >= 1 and temperature >= 0, got {self.tokens} and {self.temperature}"
            )


@numerics.own()
@checked
def collect(
    model: lm.Model,
    texts: Iterable[str | Document],
    hooks: str | Sequence[str] | None = None,
    out: str | Path = "activations",
    *,
    max_tokens: int | None = None,
    context: int = 128,
    truncate: Truncate = "right",
    batch_size: int = 32,
    dtype: str = "bfloat16",
    keep: Keep = "all",
    exclude: Sequence[str | int] = (),
    massive: Massive = "gap",
    chat: bool = False,
    generate: Generation | None = None,
    labels: Labels | None = None,
    seed: int = 0,
    corpus: str = "texts",
    shard_tokens: int | None = None,
    part: Part = None,
    window: int | None = None,
    command: Json | None = None,
    progress: Callable[[int], Any] | None = None,
    identity: Json | None = None,
) -> ActivationStore | dict[str, ActivationStore]:
    """Collect the activations of texts at one or several hook points into activation stores.

    Every text gets one BOS in front and is cut to `context` tokens. Left out are BOS, position 0 (an
    attention sink), padding, excluded tokens and massive activations. Rows stay in document order. A run that was
    interrupted continues where it stopped when the same call is made again, and ends with the same bytes; shards that
    `repair` dropped are collected again; a finished store is opened.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        texts: documents in a fixed order; a repeated call must pass the same ones.
        hooks: hook points; by default the residual stream after the middle layer.
        out: folder of the store; with several hook points, of one store a hook point, rows aligned.
        max_tokens: rows to keep; by default all.
        context: tokens of a text, BOS included.
        truncate: side on which a longer text is cut; its BOS stays.
        batch_size: full-length texts in one forward pass; of shorter ones as many as have no more tokens.
        dtype: `bfloat16`, `float16` or `float32`, as which rows are kept.
        keep: `"all"` tokens of a text, the `"last"`, the `"mean"` or `"max"` of each dimension over them, or a number
            of them at random.
        exclude: tokens to leave out, as the tokenizer spells them or by id; `"special"` names all special tokens.
        massive: leave out a token whose norm, at any hook point, is beyond the gap that the first documents show (see
            `massive.norm_limit`), or over this many times their median norm; None keeps all.
        chat: texts are conversations, or the user's first turn of one, in the tokenizer's chat template.
        generate: continue the texts, and collect the new tokens instead.
        labels: gives each document's values of further columns; added to the document's own labels.
        seed: chooses tokens at random and samples new ones; kept for provenance.
        corpus: name of the texts, for provenance.
        shard_tokens: a shard has so many documents that at full length, new tokens included, they have this many.
        part: `(i, n)` makes every n-th shard only, from the i-th on (0-based), in a folder of its own below
            `out/parts`; `merge` joins the parts.
        window: make a stream: at most this many shards are on disk, and an `ActivationStream` must delete what it
            has used. 0 keeps no rows, only their statistics: see `collect_stats`.
        command: options with which a program can repeat the call; kept in the manifest.
        progress: called with the number of tokens of each forward pass; replaces the progress bar.
        identity: `lm.identity(model)`, where the caller knows it already: making it reads all weights.

    Returns:
        The store, or with several hook points a dictionary of them; of a stream, and of a part that got no rows, an
        empty dictionary.

    Raises:
        InputError: bad options; a store of other arguments at `out`; activations that are not finite; no
            rows; a full disk.
    """
    names = _hook_names(model, hooks)
    check_dtype(dtype)
    longest = context + (generate.tokens if generate else 0)
    if truncate not in ("left", "right") or (chat and truncate == "left"):
        raise InputError(f"truncate must be 'left' or 'right', and of conversations 'right', got {truncate!r}")
    _check(model, texts, context=context, longest=longest, massive=massive, part=part, window=window, sizes={
        "max_tokens": max_tokens, "batch_size": batch_size, "shard_tokens": shard_tokens,
    })  # fmt: skip
    how = tokens.rule(model, keep, exclude, seed)
    if shard_tokens is None:
        # A short collection in smaller steps: what is computed past its end is lost.
        small = SHARD_TOKENS if max_tokens is None else min(SHARD_TOKENS, max(8192, max_tokens // 4))
        in_mlp = any(".mlp." in name for name in names)
        width = max(int(model.cfg.d_model), int(getattr(model.cfg, "d_mlp", None) or 0) if in_mlp else 0)
        shard_tokens = min(small, SHARD_BYTES // (width * DTYPES[dtype].itemsize))
    folders = _folders(Path(out), names, part)
    manifests = {name: Manifest.read(f) for name, f in folders.items() if (f / MANIFEST).is_file()}
    source: Json = {
        **(identity or lm.identity(model)),
        "tokenizer": _describe_tokenizer(model),
        "corpus": {"name": corpus, "seed": seed},
        "hook_names": {name: lm.names_of(model, name) for name in names},
        "settings": {
            "hooks": names,
            "context": context,
            "truncate": truncate,
            "batch_size": batch_size,
            "max_tokens": max_tokens,
            "keep": keep,
            "exclude": sorted(how.excluded),
            "massive": massive,
            "chat": chat,
            "generate": None if generate is None else {"tokens": generate.tokens, "temperature": generate.temperature},
            "shard_documents": max(1, shard_tokens // longest),
            "forward": _way(model, names, longest, list(manifests.values())),
        },
    }
    for name, manifest in manifests.items():
        _check_same(folders[name], manifest, name, {**source, "dtype": dtype, "window": window})
    if not all(name in manifests and manifests[name].complete for name in names):
        for folder in folders.values():
            make_writable(folder)
    documents = _documents(texts)
    first = list(islice(documents, source["settings"]["shard_documents"]))
    if not first:
        raise InputError("no texts to collect from: pass at least one")
    reader = _Reader(model, names, how, DTYPES[dtype], source["settings"], generate, labels)
    with _evaluating(model):
        if len(manifests) < len(names):
            begun = reader.begin(first[:CALIBRATION], source, dtype)
            manifests = {
                name: replace(begun[name], part=part, window=window, command=command) for name in names
            } | manifests
        reader.limits = {name: m.max_norm for name, m in manifests.items() if m.max_norm is not None}
        reader.label_types = manifests[names[0]].labels
        _run(reader, chain(first, documents), {folders[name]: manifests[name] for name in names}, max_tokens, progress)
    if window is not None or (part is not None and not Manifest.read(folders[names[0]]).rows):
        return {}
    stores = {name: ActivationStore.open(folder, partial=part is not None) for name, folder in folders.items()}
    return stores if len(names) > 1 else stores[names[0]]


@contextmanager
def _evaluating(model: lm.Model) -> Iterator[None]:
    """The model out of training mode: dropout would make activations random."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _way(model: lm.Model, names: list[str], longest: int, begun: list[Manifest]) -> str:
    """How texts are read, all those of a store in one way: the two differ by rounding."""
    if begun:
        recorded = str(begun[0].source.get("settings", {}).get("forward", "model"))
        if recorded == "model" or all(manifest.complete and not manifest.dropped for manifest in begun):
            return recorded
    with _evaluating(model):
        return lm.way_of_reading(model, names, longest)


class _Reader:
    """Makes shards: runs documents through the language model and selects rows and columns."""

    def __init__(
        self,
        model: lm.Model,
        names: list[str],
        how: Rule,
        dtype: torch.dtype,
        settings: Json,
        generate: Generation | None,
        labels: Labels | None,
    ) -> None:
        self.model, self.names, self.how, self.dtype = model, names, how, dtype
        self.settings, self.generate, self.labels = settings, generate, labels
        self.limits: dict[str, float] = {}
        self.label_types: Mapping[str, str] = {}
        self._first: list[forward.Forwarded] = []
        """Forward passes of the first `CALIBRATION` documents, until the shard of them is made."""

    def begin(self, documents: list[Document], source: Json, dtype: str) -> dict[str, Manifest]:
        """The manifest of a new store at each hook point; norm limit and label dtypes come from the first documents."""
        ids = [self._cut(row) for row in self._ids(documents)]
        kept: dict[str, list[Tensor]] = {name: [] for name in self.names}
        massive = self.settings["massive"]
        self._first = list(self._forward(ids, documents))
        for batch in self._first:
            usable, _ = tokens.usable_tokens(batch, self.how)
            for name in self.names:
                tokens.norms(batch, usable, name, documents)  # checks them
                kept[name].append(batch.rows[name][usable.to(batch.rows[name].device)].float().cpu())
        rows = {name: torch.cat(parts) for name, parts in kept.items()}
        if massive is not None and not len(rows[self.names[0]]):
            raise InputError(f"no activations left to keep in the first {len(documents)} texts: pass longer texts")
        first = [self._labels(document, row) for document, row in zip(documents, ids, strict=True)]
        labels = {name: np.result_type(*(one[name] for one in first if name in one)) for name in first[0]}
        return {
            name: Manifest(
                hook=name,
                d_in=first_rows.shape[1],
                dtype=dtype,
                source=json.loads(json.dumps(source)),
                versions=versions(),
                max_norm=norm_limit(first_rows, massive),
                labels=check_labels(
                    {label: "float32" if kind.kind == "f" else "int64" for label, kind in labels.items()}
                ),
                examples=[lm.tokenizer_of(self.model).decode(row[1:25]) for row in ids[:3]],
            )
            for name, first_rows in rows.items()
        }

    def shard(
        self, index: int, documents: list[Document], progress: Callable[[int, int], Any]
    ) -> tuple[dict[str, Tensor], dict[str, np.ndarray], dict[str, int]]:
        """Rows at each hook point and columns, in document order, and what was left out.

        `progress` is called with the number of rows and of tokens of each forward pass.
        """
        whole = self._ids(documents)
        ids = [self._cut(row) for row in whole]
        labels = [self._labels(document, row) for document, row in zip(documents, ids, strict=True)]
        kept: list[Kept] = []
        excluded: Counter[str] = Counter()
        if cut := sum(map(len, whole)) - sum(map(len, ids)):
            excluded["over_context"] = cut
        for batch in self._batches(index, ids, documents):
            part = tokens.select(batch, self.how, self.limits, documents, self.dtype)
            kept.append(part)
            excluded.update(part.excluded)
            progress(len(part.text), int(batch.mask.sum()))
        text = np.concatenate([part.text for part in kept])
        order = np.argsort(text, kind="stable")
        text = text[order]
        position = np.concatenate([part.position for part in kept])[order]
        columns = {
            "token_id": np.concatenate([part.token_id for part in kept])[order],
            "doc_id": np.array([document.id for document in documents], dtype=np.uint64)[text],
            "position": position,
        }
        for one in labels:
            tokens.check_labels(one, self.label_types)
        for name, dtype in self.label_types.items():
            columns[name] = np.array([labels[i][name][p] for i, p in zip(text, position, strict=True)], dtype)
        in_order = torch.from_numpy(order)
        rows = {name: torch.cat([part.rows[name] for part in kept])[in_order] for name in self.names}
        return rows, columns, dict(excluded)

    def empty_shard(self) -> tuple[dict[str, Tensor], dict[str, np.ndarray], dict[str, int]]:
        """A shard without documents."""
        return {name: torch.empty(0, 0) for name in self.names}, {"doc_id": np.empty(0)}, {}

    def _batches(self, index: int, ids: list[list[int]], documents: list[Document]) -> Iterator[forward.Forwarded]:
        """Forward passes of a shard: of the first one, those of `begin` by themselves, once run."""
        first, self._first = self._first, []
        if index:
            yield from self._forward(ids, documents)
            return
        yield from first or self._forward(ids[:CALIBRATION], documents[:CALIBRATION])
        for batch in self._forward(ids[CALIBRATION:], documents[CALIBRATION:]):
            yield replace(batch, texts=[CALIBRATION + i for i in batch.texts])

    @property
    def _budget(self) -> int:
        return int(self.settings["batch_size"] * self.settings["context"])

    def _forward(self, ids: list[list[int]], documents: list[Document]) -> Iterator[forward.Forwarded]:
        if self.generate is None:
            return forward.read(self.model, ids, self.names, self._budget, self.settings["forward"])
        seeds = [xxhash.xxh3_64_intdigest(np.uint64(d.id).tobytes(), self.how.seed) for d in documents]
        return forward.generate(
            self.model,
            ids,
            self.names,
            self._budget,
            new_tokens=self.generate.tokens,
            temperature=self.generate.temperature,
            seeds=seeds,
            way=self.settings["forward"],
        )

    def _ids(self, documents: list[Document]) -> list[list[int]]:
        """Token ids of whole texts: what the context cuts off is counted."""
        if not self.settings["chat"]:
            return lm.to_ids(self.model, [document.text for document in documents], sys.maxsize)
        chats = [document.messages or (("user", document.text),) for document in documents]
        return lm.chat_ids(self.model, chats, sys.maxsize, reply=self.generate is not None)

    def _cut(self, row: list[int]) -> list[int]:
        context = self.settings["context"]
        if self.settings["truncate"] == "left" and len(row) > context:
            return row[:1] + row[1 - context :]
        return row[:context]

    def _labels(self, document: Document, ids: list[int]) -> dict[str, np.ndarray]:
        own = self.labels(document, ids) if self.labels else {}
        length = len(ids) + (self.generate.tokens if self.generate else 0)
        return tokens.labels_of({**dict(document.labels), **own}, length)


def _run(
    reader: _Reader,
    documents: Iterator[Document],
    manifests: dict[Path, Manifest],
    max_tokens: int | None,
    progress: Callable[[int], Any] | None,
) -> None:
    """Make every missing shard; each is saved while the next one is computed."""
    if all(manifest.complete and not manifest.dropped for manifest in manifests.values()):
        budget = _Budget(max_tokens, next(iter(manifests.values())).part)
        for _ in _missing(documents, manifests, reader.settings["shard_documents"], budget):
            raise InputError(
                f"the store at {next(iter(manifests))} was collected from fewer texts: choose another folder"
            )
        return
    with ExitStack() as stack:
        writers = {folder: stack.enter_context(StoreWriter(folder, manifest)) for folder, manifest in manifests.items()}
        manifests = {folder: writer.manifest for folder, writer in writers.items()}
        first = next(iter(manifests.values()))
        budget = _Budget(max_tokens, first.part)
        bar = stack.enter_context(
            tqdm(total=budget.goal, initial=first.rows, desc="collect", unit="tok", unit_scale=True, mininterval=2,
                 disable=progress is not None)
        )  # fmt: skip

        def advance(rows: int, read: int) -> None:
            bar.update(rows)
            if progress is not None:
                progress(read)

        saver = stack.enter_context(ThreadPoolExecutor(max_workers=1))
        saving: Future[None] | None = None
        for index, chunk in _missing(documents, manifests, reader.settings["shard_documents"], budget):
            at = bar.n
            rows, columns, excluded = reader.shard(index, chunk, advance) if chunk else reader.empty_shard()
            n = budget.spend(len(columns["doc_id"]))
            if over := len(columns["doc_id"]) - n:
                excluded["over_budget"] = over
            bar.n = at + n
            bar.refresh()
            if saving is not None:
                saving.result()
            made = Source(len(chunk), documents_hash([document.id for document in chunk]), excluded)
            lacking = [w for w in writers.values() if all(shard.index != index for shard in w.manifest.shards)]
            for writer in lacking:
                writer.wait_for_room()  # here, not in the thread, which an interrupt could not end
            saving = saver.submit(_save, lacking, index, rows, columns, n, made)
        if saving is not None:
            saving.result()
        if not budget.total and first.part is None:
            raise InputError("no activations left to keep in these texts: pass longer texts")
        for writer in writers.values():
            writer.finish()


class _Budget:
    """How many rows are asked for, and how many there are.

    A part of a collection cannot know how many rows the others have. It collects its share and one more shard, without
    cutting it; `merge` cuts, and marks further shards as wanted where other parts have fewer rows.
    """

    def __init__(self, max_tokens: int | None, part: Part) -> None:
        self.parts = part[1] if part else 1
        self.goal = None if max_tokens is None else -(-max_tokens // self.parts)
        self.total = self.last = 0

    @property
    def reached(self) -> bool:
        """Whether no further shard is needed."""
        return self.goal is not None and self.total - (self.last if self.parts > 1 else 0) >= self.goal

    def spend(self, rows: int) -> int:
        """Count the rows of a shard; the number of them that are kept."""
        if self.goal is not None and self.parts == 1:
            rows = min(rows, self.goal - self.total)
        self.total, self.last = self.total + rows, rows
        return rows


def _missing(
    documents: Iterator[Document], manifests: dict[Path, Manifest], size: int, budget: _Budget
) -> Iterator[tuple[int, list[Document]]]:
    """Index and documents of each shard to make, after checking that the others were made of the same documents.

    A part that reached the end of the texts has a last shard without documents, which tells `merge` so.
    """
    out, first = next(iter(manifests.items()))
    part, parts = first.part or (0, 1)
    have = {shard.index: shard for shard in first.shards}
    done = set(have).intersection(*({shard.index for shard in m.shards} for m in manifests.values()))
    wanted = max((*done, *(index for m in manifests.values() for index in m.dropped)), default=-1)
    for index in count():
        chunk = list(islice(documents, size))
        if (budget.reached and index > wanted) or (not chunk and first.part is None):
            break
        own = index % parts == part
        if index in done:
            _check_documents(out, have[index], [document.id for document in chunk])
            done.remove(index)
            budget.spend(have[index].rows)
        elif own:
            yield index, chunk
        if own and not chunk:
            break
    if done:
        raise _other_texts(out)


def _save(
    writers: list[StoreWriter],
    index: int,
    rows: dict[str, Tensor],
    columns: dict[str, np.ndarray],
    n: int,
    source: Source,
) -> None:
    """Append the first `n` rows to each store."""
    cut = {name: values[:n] for name, values in columns.items()}
    for writer in writers:
        writer.append(index, rows[writer.manifest.hook][:n], cut, source)


def _check_documents(out: Path, shard: Shard, ids: list[int]) -> None:
    """Refuse documents that are not those a shard was made of."""
    if documents_hash(ids) != shard.documents_hash:
        if documents_hash(ids[: shard.documents]) == shard.documents_hash:
            raise InputError(f"the store at {out} was collected from fewer texts: choose another folder")
        raise _other_texts(out)


def _other_texts(out: Path) -> InputError:
    return InputError(f"the store at {out} was collected from other texts, or in another order: choose another folder")


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
    longest: int,
    massive: Massive,
    part: Part,
    window: int | None,
    sizes: dict[str, int | None],
) -> None:
    if isinstance(texts, str):
        raise InputError("texts must be several texts, got one string: pass a list, [text]")
    lm.tokenizer_of(model)  # refused without one
    limit = int(model.cfg.n_ctx)
    if not 2 <= context <= limit:
        raise InputError(f"context must be 2 to {limit} tokens for this model, got {context}")
    if longest > limit:
        raise InputError(f"context and generated tokens must be {limit} together for this model, got {longest}")
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    check_massive(massive)
    if part is not None and not 0 <= part[0] < part[1]:
        raise InputError(f"part must be (i, n) with 0 <= i < n, got {part}")
    if window is not None and (window < 0 or window == 1):
        raise InputError(f"window must be at least 2 shards, or 0 for statistics alone, got {window}")
    if part is not None and window is not None:
        raise InputError("a stream has no parts: pass part or window, not both")


def _folders(out: Path, names: list[str], part: Part) -> dict[str, Path]:
    """Where each hook point's store is or will be; refuses a folder that holds anything else."""
    if (out / MANIFEST).exists() and len(names) > 1:
        raise InputError(f"{out} holds the store of one hook point already: choose another folder")
    base = out if part is None else out / PARTS / f"{part[0]:04d}-of-{part[1]:04d}"
    folders = {name: base / name if len(names) > 1 else base for name in names}
    for name in names if part else []:
        whole = out / name if len(names) > 1 else out
        if (whole / MANIFEST).is_file() and not (folders[name] / MANIFEST).is_file():
            raise InputError(f"{whole} is a whole store already: choose another folder for a part of one")
    for folder in folders.values():
        if folder.exists() and not (folder / MANIFEST).is_file() and (folder.is_file() or _holds_other_files(folder)):
            raise InputError(f"{folder} exists and is not an activation store: choose another folder")
    return folders


def _holds_other_files(folder: Path) -> bool:
    """Whether a folder holds more than a first manifest that was cut off while it was written."""
    return any(not file.name.startswith(f".{MANIFEST}.") for file in folder.iterdir())


def _check_same(folder: Path, manifest: Manifest, hook: str, asked: Json) -> None:
    """Refuse to continue a store that was collected with other arguments."""
    wanted = flat(json.loads(json.dumps({**asked, "hook": hook})))
    have = flat({**manifest.source, "dtype": manifest.dtype, "window": manifest.window, "hook": manifest.hook})
    for key, value in wanted.items():
        if differs(key, have, wanted):
            before = have.get(key, _EARLIER.get(key))
            raise InputError(
                f"the store at {folder} was collected with {key} = {before!r}, not {value!r}: choose another folder"
            )


def differs(key: str, one: Json, other: Json) -> bool:
    """Whether two flat sources differ in a key; what earlier versions do not record of a model is not a difference."""
    silent = key.startswith(_NEW) and not (key in one and key in other)
    return not silent and one.get(key, _EARLIER.get(key)) != other.get(key, _EARLIER.get(key))


def flat(value: Json, prefix: str = "") -> Json:
    """Nested dictionaries as one, keys joined by dots."""
    joined: Json = {}
    for key, item in value.items():
        joined |= flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {prefix + key: item}
    return joined


def _documents(texts: Iterable[str | Document]) -> Iterator[Document]:
    for i, text in enumerate(texts):
        if isinstance(text, Document):
            yield text
        elif isinstance(text, str):
            yield Document.of(text)
        else:
            raise InputError(f"texts must be strings or Documents, got {type(text).__name__} at index {i}")


def _describe_tokenizer(model: lm.Model) -> Json:
    tokenizer = lm.tokenizer_of(model)
    vocabulary = sorted(tokenizer.get_vocab().items())
    return {
        "class": type(tokenizer).__name__,
        "bos_id": lm.bos_id(model),
        "vocabulary": xxhash.xxh3_64_hexdigest(json.dumps(vocabulary).encode()),
    }
