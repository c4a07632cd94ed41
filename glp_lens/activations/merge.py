"""Merge the parts of a collection into the store that one process would have made."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tqdm.auto import tqdm

from glp_lens.activations.collect import PARTS, differs, flat
from glp_lens.activations.manifest import MANIFEST, Manifest, Shard
from glp_lens.activations.shard import Source, file_hash, no_space, open_shard
from glp_lens.activations.store import ActivationStore
from glp_lens.activations.writer import StoreWriter
from glp_lens.arguments import checked
from glp_lens.errors import InputError
from glp_lens.types import DTYPES

Parts = dict[Path, Manifest]


class ShortParts(InputError):
    """Parts that stopped at their share of the rows, though the merged store needs more of them.

    Attributes:
        parts: their numbers; collecting them again continues them.
    """

    def __init__(self, message: str, parts: list[int]) -> None:
        super().__init__(message)
        self.parts = parts


@checked
def merge(out: str | Path, parts: Sequence[str | Path] = ()) -> ActivationStore | dict[str, ActivationStore]:
    """Merge the parts that `collect(..., part=(i, n))` made; the result is that of one process, row for row.

    Shards are hard-linked, or copied from another disk and compared with their hash; those of the parts stay as they
    are. Calling it again continues an interrupted merge, and opens a finished store.

    Args:
        out: folder of the whole store.
        parts: folders of all the parts; by default those below `out/parts`.

    Returns:
        The store, or with several hook points a dictionary of them.

    Raises:
        ShortParts: parts must be continued to reach the number of rows asked for, since others have fewer rows a shard.
        InputError: parts that are missing, unfinished, damaged, or of different collections; another store is there.
    """
    out = Path(out)
    folders = [Path(part) for part in parts] or sorted((out / PARTS).glob("*-of-*"))
    if not folders:
        raise InputError(f"no parts in {out / PARTS}: collect them with --shard i/n first, or name their folders")
    names = sorted({file.parent.relative_to(f).as_posix() for f in folders for file in f.rglob(MANIFEST)})
    if not names:
        raise InputError(f"no activation store in {folders[0]}: expected the parts of a collection")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError(f"a part is named twice: name all {len(folders)} folders once")
    collections = {name: {folder / name: Manifest.read(folder / name) for folder in folders} for name in names}
    for manifests in collections.values():
        _check(manifests)
    if wanted := {folder: index for manifests in collections.values() for folder, index in _wanted(manifests).items()}:
        raise _short_parts({folder: m for manifests in collections.values() for folder, m in manifests.items()}, wanted)
    stores = {}
    for name, manifests in collections.items():
        store = _merge_one(out / name, manifests)
        stores[store.hook] = store
    return stores if names != ["."] else next(iter(stores.values()))


def _merge_one(out: Path, parts: Parts) -> ActivationStore:
    first = next(iter(parts.values()))
    homes = {shard.index: folder for folder, manifest in parts.items() for shard in manifest.shards}
    chosen, surplus = _chosen(parts)
    if not any(shard.rows for shard in chosen):
        raise InputError("no activations left to keep in these texts: pass longer texts")
    whole = _begin_or_continue(out, replace(first, part=None, shards=(), dropped=(), complete=False))
    if whole.complete:
        return ActivationStore.open(out)
    with StoreWriter(out, whole) as writer:
        have = {shard.index for shard in writer.manifest.shards}
        for shard in tqdm([s for s in chosen if s.index not in have], desc="merge", unit="shard", delay=2):
            folder = homes[shard.index]
            if surplus and shard is chosen[-1]:
                _copy_rows(writer, folder, parts[folder], shard, shard.rows - surplus)
            else:
                if shard.rows:
                    _link(folder, out, shard, parts[folder])
                # The manifest of many shards takes a while to write; what is not in it yet would be adopted.
                writer.list(shard, publish=shard.index % 64 == 0)
        writer.finish()
    return ActivationStore.open(out)


def _check(parts: Parts) -> None:
    """Refuse parts that do not belong to one collection, or are not all of it."""
    first_folder, first = next(iter(parts.items()))
    for folder, manifest in parts.items():
        if manifest.part is None:
            raise InputError(f"{folder} is a whole store, not a part of one: nothing to merge")
        if manifest.identity != first.identity or manifest.part[1] != (first.part or (0, 0))[1]:
            raise InputError(
                f"{folder} and {first_folder} are parts of different collections ({_difference(manifest, first)}): "
                "name the folders of one"
            )
        if not manifest.complete or manifest.dropped:
            i, n = manifest.part
            raise InputError(f"part {i}/{n} in {folder} is not finished: run the same collect --shard {i}/{n} again")
    have = sorted(manifest.part[0] for manifest in parts.values() if manifest.part)
    n = (first.part or (0, 0))[1]
    if have != list(range(n)):
        lacking = sorted(set(range(n)) - set(have))
        what = f"part {lacking[0]}/{n} is missing" if lacking else "a part is named twice"
        raise InputError(f"{what}: collect it, or name all {n} folders once")


def _difference(a: Manifest, b: Manifest) -> str:
    """The first thing in which two parts differ."""
    ours, theirs = (
        flat({**m.source, "hook": m.hook, "dtype": m.dtype, "max_norm": m.max_norm, "parts": m.part and m.part[1]})
        for m in (a, b)
    )
    different = (k for k in ours if differs(k, ours, theirs))
    return next((f"{k} = {ours[k]!r}, {theirs.get(k)!r}" for k in different), "other labels")


def _chosen(parts: Parts) -> tuple[list[Shard], int]:
    """The first shards, without a gap, that hold the rows asked for, and the number of surplus rows in the last."""
    shards = {shard.index: shard for manifest in parts.values() for shard in manifest.shards if shard.documents}
    goal = _goal(parts)
    chosen: list[Shard] = []
    total = 0
    while len(chosen) in shards and (goal is None or total < goal):
        chosen.append(shards[len(chosen)])
        total += chosen[-1].rows
    return chosen, 0 if goal is None else max(0, total - goal)


def _goal(parts: Parts) -> int | None:
    goal: int | None = next(iter(parts.values())).source.get("settings", {}).get("max_tokens")
    return goal


def _wanted(parts: Parts) -> dict[Path, int]:
    """For each part that stopped too early, the last shard that it still has to make.

    A part ends at its share of the rows, or at the end of the texts with a shard without documents. Where parts ended
    at their share and there are too few rows without a gap, they must continue: as far as the other parts if all parts
    together have enough rows, otherwise until the end of the texts is known.
    """
    goal, (chosen, _) = _goal(parts), _chosen(parts)
    made = [shard.index for manifest in parts.values() for shard in manifest.shards if shard.documents]
    ends = [shard.index for manifest in parts.values() for shard in manifest.shards if not shard.documents]
    if len(chosen) in ends or (goal is not None and sum(shard.rows for shard in chosen) >= goal):
        return {}
    enough = goal is not None and sum(manifest.rows for manifest in parts.values()) >= goal
    until = max(made) if enough else min(ends)
    wanted = {}
    for folder, manifest in parts.items():
        i, n = manifest.part or (0, 1)
        last = until - (until - i) % n
        if last > max(shard.index for shard in manifest.shards):
            wanted[folder] = last
    return wanted


def _short_parts(parts: Parts, wanted: dict[Path, int]) -> ShortParts:
    """Mark shards as missing, for the next `collect` of their parts; the error that says so."""
    short = set()
    for folder, index in wanted.items():
        short.add(parts[folder].part or (0, 1))
        with StoreWriter(folder, replace(parts[folder], dropped=(index,))):
            pass  # opening it for writing publishes the manifest
    named = ", ".join(f"{i}/{n}" for i, n in sorted(short))
    return ShortParts(
        f"the parts hold fewer rows without a gap than asked for, since part {named} stopped at its share: "
        "run the same collect --shard of it again, then merge",
        sorted(i for i, _ in short),
    )


def _begin_or_continue(out: Path, whole: Manifest) -> Manifest:
    """The manifest of a merge that was interrupted, or a new one."""
    if not (out / MANIFEST).exists():
        if any(out.glob("shard-*.h5")):
            raise InputError(f"{out} holds shards without a manifest: choose another folder")
        return whole
    there = Manifest.read(out)
    if there.identity != whole.identity or there.part or there.dropped:
        raise InputError(f"{out} is another activation store already: choose another folder")
    return there


def _copy_rows(writer: StoreWriter, folder: Path, manifest: Manifest, shard: Shard, n: int) -> None:
    alone = replace(manifest, shards=(shard,), part=None, complete=True)
    store = ActivationStore.of(folder, alone)
    columns = {name: store.column(name)[:n] for name in manifest.columns}
    excluded = {**shard.excluded, "over_budget": shard.rows - n}
    source = Source(shard.documents, shard.documents_hash, excluded)
    writer.append(shard.index, store.rows(0, n, dtype=DTYPES[manifest.dtype]), columns, source)


def _link(folder: Path, out: Path, shard: Shard, manifest: Manifest) -> None:
    """Hard-link or copy a part's shard into the merged store."""
    open_shard(folder, shard, manifest)
    temporary = out / f".{shard.name}.tmp"
    temporary.unlink(missing_ok=True)
    try:
        os.link(folder / shard.name, temporary)
    except OSError:  # another disk, or a file system without hard links
        with no_space(out):
            shutil.copyfile(folder / shard.name, temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        if file_hash(temporary) != (shard.bytes, shard.xxh3_128):
            temporary.unlink()
            raise InputError(
                f"part {folder} is damaged: {shard.name} differs from what was written: copy it again, or run "
                "glp-lens store repair on it and collect it again"
            ) from None
    os.replace(temporary, out / shard.name)
