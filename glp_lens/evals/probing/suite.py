"""Sparse probing: how well the best features of each model tell two classes apart."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from glp_lens.arguments import checked
from glp_lens.errors import InputError
from glp_lens.evals.cache import ResultCache
from glp_lens.evals.entries import Entry, usable
from glp_lens.evals.probing import features
from glp_lens.evals.probing.across_tasks import AcrossTasks, add_means, add_pairs
from glp_lens.evals.probing.activations import TaskActivations
from glp_lens.evals.probing.hook_points import hooks, place, provenance_at
from glp_lens.evals.probing.records import Record
from glp_lens.evals.probing.scoring import Options, score
from glp_lens.evals.probing.settings import DENSE, MEAN, ProbingSettings
from glp_lens.evals.probing.side_by_side import Count, add_one, side_by_side
from glp_lens.evals.probing.splits import FOLDS, Rows, read
from glp_lens.evals.probing.tasks import Task
from glp_lens.evals.results import Metric, Results
from glp_lens.interface import Featurizer
from glp_lens.types import Json


@dataclass(frozen=True)
class ProbingData:
    """What probing is measured on.

    Attributes:
        tasks: see `tasks.load` and `own_tasks.open_tasks`.
        activations: of the tasks' texts, see `activations.collect`; in the language model's units.
        device: where activations and noise are handed to the models.
    """

    tasks: Sequence[Task]
    activations: TaskActivations
    device: str = "cpu"


@checked
def run(
    entries: Sequence[Entry],
    data: ProbingData,
    settings: ProbingSettings | None = None,
    *,
    folder: str | Path | None = None,
    allow_mismatch: bool = False,
) -> Results:
    """Probe every entry on every task: with its best single feature, and with its best k.

    Features and signs are chosen on train rows alone (see `rank` and `sparse`); test rows are used once, for the final
    scores. A stochastic model is probed once for each noise seed, each choosing its own feature, and its AUC is the
    mean; on one task all models see the same noise. Folds never part the rows of one text, nor in `dedup` those of one
    group; k-sparse probes choose their penalty on the last train rows, as sae-probes does, which may part one group.

    Metrics of each task, and of task `all` their means over tasks, by `setting`:

    - `split=official|dedup;mode=paper|all`: one feature, chosen among the `max_features` with the largest class-mean
      difference, as in the paper, or among all. `auc`; `auc_validation`; `n_candidates`, the number of features chosen
      from; `auc_seed_sd`, the standard deviation over noise seeds; `optimism`, validation minus test AUC; `auc_null`,
      the validation AUC that the best of as many uninformative features is expected to have (as many as all of the
      entry's: the filter of `paper` looks at validation rows too); `auc_oracle`, the best test AUC of any candidate,
      which is chosen on test and comparable with nothing else.
    - `split=..;mode=all;layer=i`: one block of a GLP, from 0.
    - `split=..;mode=equal;features=K`: the expected `auc` with K of the features, drawn at random.
    - `split=..;probe=sparse;k=K`: `auc`, `auc_validation`, `accuracy` and `f1` of a regression on K features, or all
      (`dense`), of main entries, with the first noise seed only. The features are those with the largest class-mean
      difference after division by their mean non-zero magnitude, as in sae-probes; with `rank=difference`, before it,
      as in the GLP paper. Features of over 1 GiB a task get no `dense` one.
    - `split=..`: model `dense`, a logistic regression on all raw dimensions.

    Two main entries A and B are compared in A's metrics of task `all`, once for each pair in the order of the entries:
    `auc_diff:B`, the mean of A - B over tasks; `p_holm:B`, its sign-flip p, adjusted over all pairs of one setting; and
    `win_rate:B`, the share of tasks where A is better, ties one half. In `mode=equal`, with as many features as the
    main entry with the fewest has.

    Intervals of one task cover the draw of test texts, or of their groups; intervals and p values over tasks cover the
    draw of families, whose number is their `n`.

    Args:
        entries: models with the `Featurizer` capability; others are noted in `failures` and left out.
        data: the tasks and their activations.
        settings: by default `ProbingSettings()`.
        folder: where each finished task is kept under a hash of every input, so that a later or interrupted run
            continues.
        allow_mismatch: probe models trained at another hook point, or on another language model or weight
            processing; each is noted in `failures`.

    Raises:
        InputError: nothing to probe, labels that are not unique, activations that do not fit the models or tasks.
    """
    start = time.perf_counter()
    settings, tasks, activations = settings or ProbingSettings(), data.tasks, data.activations
    _check(entries, tasks)
    folder = None if folder is None else Path(folder)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    placed, failures = usable(
        place(entries, activations.source),
        Featurizer,
        provenance_at(tasks[0], activations),
        reserved=(DENSE,),
        left_out="{label}: gives no features to probe ({kind})",
        allow_mismatch=allow_mismatch,
    )
    main = [entry for entry in placed if entry.main]
    smallest = min((features.count(entry) for entry in main or placed), default=1)
    options = Options(
        tuple(range(settings.seeds)),
        settings.ks,
        settings.sparse_solver,
        settings.max_features,
        settings.sizes,
        smallest,
        data.device,
    )
    results = _begin(placed, tasks, activations, options)
    results.config |= {"resamples": settings.resamples, "seed": settings.seed}
    results.failures += failures
    for record in _records(placed, data, options, folder):
        results.metrics += map(Metric.from_row, record.metrics)
        results.failures += record.failures
        results.extras["probes"] += record.probes
        results.extras["best"] += record.best
    across = AcrossTasks({task.name: task.family for task in tasks}, settings.resamples, settings.seed)
    add_means(results, across)
    add_pairs(results, [entry.label for entry in main], smallest, across)
    results.seconds = time.perf_counter() - start
    return results


def _check(entries: Sequence[Entry], tasks: Sequence[Task]) -> None:
    """Refuse what cannot be probed."""
    if not entries or not tasks:
        raise InputError(f"expected at least one model and task, got {len(entries)} models and {len(tasks)} tasks")
    names = [task.name for task in tasks]
    if len({*names, MEAN}) <= len(names):
        raise InputError(f"task names must be unique and other than {MEAN!r}, got {', '.join(names)}")


def _begin(entries: Sequence[Entry], tasks: Sequence[Task], activations: TaskActivations, options: Options) -> Results:
    """Results with all that is known before the first task."""
    about = {
        e.label: {"kind": e.model.kind, "hook": e.hook, "main": e.main, "n_features": features.count(e), **e.options}
        for e in entries
    }
    return Results(
        "probing",
        config={**asdict(options), "folds": FOLDS, "sparse_seeds": list(options.seeds[:1]), "entries": about},
        data={
            **activations.source,
            "tasks": {task.name: _describe(task) for task in tasks},
            "models": {entry.label: entry.model.provenance for entry in entries},
        },
        extras={"probes": [], "best": []},
    )


def _records(entries: Sequence[Entry], data: ProbingData, options: Options, folder: Path | None) -> Iterator[Record]:
    """The record of each task, of finished ones from the cache. Records do not depend on what is scored beside."""
    about = functools.cache(lambda: [[entry.identity() for entry in entries], asdict(options)])
    cache = ResultCache(folder, about)
    used = hooks(entries, data.activations)
    each = sum(len(features.noise_seeds(entry, options.seeds)) for entry in entries)

    def record(count: Count, item: tuple[Task, Mapping[str | None, Rows]]) -> tuple[Record, int]:
        """A record, and how many models were probed for it."""
        task, at_hooks = item
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            add_one(count)

        make = partial(_score_task, entries, at_hooks, options, folder, advance)
        inputs = partial(_inputs, task, list(at_hooks.values()))
        return cache.get(task.name, inputs, make, lambda value: Record(**value)), done

    rows = ((task, {hook: read(task, data.activations, hook) for hook in used}) for task in data.tasks)
    bar = tqdm(total=each * len(data.tasks), desc="probing", unit="model", mininterval=2)
    with bar, closing(side_by_side(record, rows, len(data.tasks), bar, device=data.device)) as records:
        for found, done in records:
            # What was not scored now, since it is finished or cannot be, must not count towards the rate.
            bar.total = (bar.total or 0) - (each - done)
            bar.refresh()
            yield found


def _inputs(task: Task, rows: Sequence[Rows]) -> list[Any]:
    """What the record of a task depends on, besides models and options."""
    splits = {name: list(split) for name, split in task.splits.items()}
    acts = [[at.acts, at.text] for at in rows]
    return [task.texts, task.labels, splits, task.groups, task.own_groups, acts]


def _score_task(
    entries: Sequence[Entry],
    at_hooks: Mapping[str | None, Rows],
    options: Options,
    folder: Path | None,
    advance: Callable[[], Any],
) -> Json:
    """The record of all entries on one task, given its rows at each hook point, the dense probe's first."""
    first = next(iter(at_hooks.values()))
    problems = dict.fromkeys(problem for at in at_hooks.values() for problem in at.problems)
    record = Record(failures=list(problems))
    for split in first.splits:
        record.add_dense(first, split)
    for group in _groups(entries) if first.splits else ():
        rows = at_hooks[group[0].hook]
        scores, failures = score(group, rows, options, folder, advance)
        record.failures += failures
        for entry in group:
            for split, own in scores.get(entry.label, {}).items():
                record.add_entry(own, entry, rows, split)
    return asdict(record)


def _groups(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """Entries that share features are scored together, others one by one, so that few features are kept at once."""
    by_model: dict[tuple[int, str | None], list[Entry]] = defaultdict(list)
    for entry in entries:
        by_model[id(entry.model), entry.hook].append(entry)
    for group in by_model.values():
        if any(features.parts(entry) for entry in group):
            yield group
        else:
            yield from ([entry] for entry in group)


def _describe(task: Task) -> Json:
    sizes = {name: {"train": len(part.train), "test": len(part.test)} for name, part in task.splits.items()}
    return {"family": task.family, "classes": list(task.classes), **sizes, **({"note": task.note} if task.note else {})}
