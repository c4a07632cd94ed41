"""Where each entry is read, and what is refused before anything is scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from glp_lens import provenance
from glp_lens.errors import InputError
from glp_lens.evals.entries import Entry
from glp_lens.evals.probing import sparse
from glp_lens.evals.probing.activations import TaskActivations
from glp_lens.evals.probing.comparing import ALL
from glp_lens.evals.probing.lines import DENSE
from glp_lens.evals.probing.tasks import Task
from glp_lens.types import Json


def hooks(entries: Sequence[Entry], activations: TaskActivations) -> list[str | None]:
    """Hook points in use, the dense probe's first: the default one, or the first entry's if none uses that."""
    used = list(dict.fromkeys(entry.hook for entry in entries)) or [activations.source.get("hook")]
    return sorted(used, key=lambda hook: hook != activations.source.get("hook"))


def place(entries: Sequence[Entry], source: Json) -> list[Entry]:
    """Entries with the hook point that each is read at; a multi-layer prior that is bound to no layer gets that one."""
    found: list[Entry] = []
    bound: dict[tuple[int, str], Any] = {}
    for entry in entries:
        model, own = entry.model, entry.model.hook
        trained = provenance.trained_on(model)
        there = [hook for hook in source["hooks"] if hook and own and provenance.same_hook(trained, source, hook)]
        hook = entry.hook or next(iter(there), source.get("hook"))
        if hook and own is None:  # one view for all entries of a prior: they share what is encoded
            model = bound.setdefault((id(model), hook), provenance.bound(model, hook))
        found.append(replace(entry, hook=hook, model=model))
    return found


def check(
    entries: Sequence[Entry],
    tasks: Sequence[Task],
    seeds: Sequence[int],
    max_features: int,
    sizes: Sequence[int],
    ks: Sequence[sparse.Size],
) -> None:
    """Refuse arguments of `suite.run` that mean nothing."""
    if not entries or not tasks or not seeds or max_features < 1:
        raise InputError(
            f"expected at least one model, task, noise seed and feature, got {len(entries)} models, "
            f"{len(tasks)} tasks, {len(seeds)} noise seeds and max_features={max_features}"
        )
    if bad := [k for k in (*sizes, *ks) if k != "dense" and (not isinstance(k, int) or k < 1)]:
        raise InputError(f"sizes and ks must be numbers of features from 1, or 'dense' as k, got {bad[0]!r}")
    for what, found, reserved in (
        ("labels", [entry.label for entry in entries], DENSE),
        ("task names", [task.name for task in tasks], ALL),
    ):
        if len({*found, reserved}) <= len(found):
            raise InputError(f"{what} must be unique and other than {reserved!r}, got {', '.join(found)}")


def check_provenance(
    entries: Sequence[Entry], task: Task, activations: TaskActivations, allow_mismatch: bool
) -> list[str]:
    """Refuse models that do not fit their activations; a line for each mismatch that was accepted."""
    notes = []
    for hook in hooks(entries, activations):
        names = (activations.source.get("hook_names") or {}).get(hook)
        width = activations.rows(task.name, hook).acts.shape[1]
        here = {**activations.source, "hook": hook, "hook_names": names, "d_in": width}
        models = {entry.label: entry.model for entry in entries if entry.hook == hook}
        notes += provenance.check_models(models, here, allow_mismatch=allow_mismatch)
    return notes
