"""What is finished: one file a task, in a folder for all that the numbers depend on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import xxhash

from glp_lens.errors import InputError
from glp_lens.evals.entries import Entry
from glp_lens.evals.probing.lines import LISTS
from glp_lens.evals.probing.rows import Rows
from glp_lens.evals.probing.scoring import Options
from glp_lens.files import read_json, versions, write_json
from glp_lens.types import Json


class Records:
    """Records of tasks under a folder; without one, nothing is kept."""

    def __init__(self, folder: Path | None, entries: Sequence[Entry], options: Options) -> None:
        self.folder = folder
        if folder is not None:
            about = [[e.label, e.hook, e.main, e.options, e.model.fingerprint()] for e in entries]
            self.folder = folder / _digest(about, asdict(options), versions())

    def path(self, rows: Sequence[Rows]) -> Path | None:
        """File of a task, given its rows at each hook point in use."""
        if self.folder is None:
            return None
        task = rows[0].task
        splits = {name: [part.tolist() for part in split] for name, split in task.splits.items()}
        facts = [task.name, task.texts, task.labels.tolist(), splits, task.groups.tolist(), task.own_groups]
        acts = [xxhash.xxh3_128_hexdigest(at.acts.contiguous().numpy().data) for at in rows]
        key = _digest(facts, acts, [at.text.tolist() for at in rows])
        # Names of a user's own tasks may hold what a file's cannot.
        name = "".join(c if c.isalnum() or c in "-_." else "_" for c in task.name)[:80]
        return self.folder / f"{name}-{key}.json"


def load(path: Path | None) -> Json | None:
    """The record of a finished task; None if there is none that can be read."""
    if path is None:
        return None
    try:
        found = read_json(path, "probing record")
    except InputError:  # absent or damaged: made anew
        return None
    return found if set(LISTS) <= set(found) else None


def save(path: Path | None, record: Json) -> None:
    """Keep the record of a finished task, whole or not at all."""
    if path is not None:
        write_json(path, record)


def _digest(*facts: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(facts, default=str).encode())[:16]
