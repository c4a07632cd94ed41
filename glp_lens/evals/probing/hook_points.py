"""At which hook point each entry's activations are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from glp_lens import provenance
from glp_lens.evals.entries import Entry
from glp_lens.evals.probing.activations import TaskActivations
from glp_lens.evals.probing.tasks import Task
from glp_lens.types import Json


def hooks(entries: Sequence[Entry], activations: TaskActivations) -> list[str | None]:
    """Hook points in use, the dense probe's first: the default one, or the first entry's if none uses that."""
    used = list(dict.fromkeys(entry.hook for entry in entries)) or [activations.source.get("hook")]
    return sorted(used, key=lambda hook: hook != activations.source.get("hook"))


def place(entries: Sequence[Entry], source: Json) -> list[Entry]:
    """Entries with the hook point that each is read at; a multi-layer prior that is bound to no layer gets that one."""
    placed: list[Entry] = []
    bound: dict[tuple[int, str], Any] = {}
    for entry in entries:
        model, own = entry.model, entry.model.hook
        trained = provenance.trained_on(model)
        there = [hook for hook in source["hooks"] if hook and own and provenance.same_hook(trained, source, hook)]
        hook = entry.hook or next(iter(there), source.get("hook"))
        if hook and own is None:  # one view for all entries of a prior: they share what is encoded
            model = bound.setdefault((id(model), hook), provenance.bound(model, hook))
        placed.append(replace(entry, hook=hook, model=model))
    return placed


def provenance_at(task: Task, activations: TaskActivations) -> Callable[[Entry], Json]:
    """Provenance of the activations that an entry is probed on, whose width is that of a task's rows."""

    @cache
    def at(hook: str | None) -> Json:
        names = (activations.source.get("hook_names") or {}).get(hook)
        width = activations.rows(task.name, hook).acts.shape[1]
        return {**activations.source, "hook": hook, "hook_names": names, "d_in": width}

    return lambda entry: at(entry.hook)
