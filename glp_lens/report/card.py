"""What a model card says of measurements: the main numbers of one model, and who wins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite
from typing import NamedTuple

import pandas as pd

from glp_lens.display.labels import count, display, family, with_interval
from glp_lens.evals.registry import SUITES
from glp_lens.evals.results import Results, Setting, structured_frame

MEAN = "all"
"""The task of a mean over tasks."""
_CAUTION = (
    "Values with 95% intervals over n documents, texts, prompts or tasks. They are of this one training: how much "
    "another seed would change is not in them."
)
_MOST_TASKS = 12
"""Tasks shown one by one; of more, their mean."""


class _Number(NamedTuple):
    """A number that a card shows: which metric, at which settings, its name, whether by task, at the main setting."""

    metric: str
    chosen: Callable[[Setting], bool]
    title: str
    digits: int = 3
    by_task: bool = False


def _has(**parts: str) -> Callable[[Setting], bool]:
    """Whether a setting has these parts."""
    return lambda setting: all(setting.get(key) == value for key, value in parts.items())


def _is(**parts: str) -> Callable[[Setting], bool]:
    """Whether a setting has these parts and no other."""
    return lambda setting: setting == Setting(parts)


def _main_run(**parts: str) -> Callable[[Setting], bool]:
    """Whether a setting of steering has these parts and is of no replicate."""
    return lambda setting: _has(**parts)(setting) and not (setting.get("noise_seed") or setting.get("lm_dtype"))


_EQUAL = {"fluency>": "80% of unsteered"}
_NUMBERS = {
    "density": (
        _Number("flow_loss", _is(sigma="all"), "held-out flow-matching loss a dimension"),
        _Number("below_bound_percent", _is(sigma="all"), "below the least loss of any Gaussian, %", 1),
        _Number("bits_per_dim", _is(rows="dequantised"), "bits per dimension, rows spread over their rounding cells"),
        _Number("bits_per_dim", _is(rows="stored"), "bits per dimension, rows as stored"),
    ),
    "probing": (
        _Number("auc", _is(split="dedup", mode="paper"), "mean test AUC of one feature, of most mean difference"),
        _Number("auc", _is(split="dedup", mode="all"), "mean test AUC of one feature, of all"),
    ),
    "steering": (
        _Number("harmonic", _main_run(alpha="chosen"), "harmonic mean of concept and fluency, 0 to 2"),
        _Number("concept_at_fluency", _main_run(**_EQUAL), "concept, 0 to 2, at 80% of the unsteered fluency"),
    ),
    "fidelity": (
        _Number("fvu", lambda _: True, "fraction of variance unexplained"),
        _Number("delta_nll", lambda _: True, "rise of the language model's loss, nats a token"),
    ),
    "detect": (_Number("auroc", _is(pool="mean"), "AUROC of the mean score of a text", by_task=True),),
    "generation": (
        _Number("auc_mlp", lambda _: True, "AUC of a network telling samples from activations"),
        _Number("precision", lambda _: True, "precision"),
        _Number("recall", lambda _: True, "recall"),
    ),
}  # fmt: skip
"""By suite; what was not measured is left out."""


def measured(runs: Sequence[tuple[Results, str]], language_model: str | None = None) -> str:
    """The section of a model card on what suites measured, as Markdown; empty if they measured nothing of the model.

    Args:
        runs: results of suites, each with the label that it has for the model.
        language_model: name of that which the model was trained on; another one that was measured on is named.
    """
    order = {suite.name: place for place, suite in enumerate(SUITES)}
    known = sorted((run for run in runs if run[0].suite in order), key=lambda run: order[run[0].suite])
    parts = [part for results, label in known if (part := _part(results, label, language_model))]
    return "\n\n".join([_CAUTION, *parts]) if parts else ""


def of_model(name: object, label: str) -> bool:
    """Whether a label in results is of the model with that label, at whatever settings: `glp sigma=0.1` of `glp`."""
    return isinstance(name, str) and (name == label or name.startswith((f"{label} ", f"{label}:")))


def _part(results: Results, label: str, language_model: str | None) -> str:
    """What one suite measured: a table of the model's numbers, and the verdicts on it."""
    page = next(suite.page for suite in SUITES if suite.name == results.suite)
    frame = structured_frame(results.metrics)
    own = frame[frame.model.map(lambda name: of_model(name, label)).astype(bool)]
    said = [v for v in page.verdicts(frame, family(label)) if of_model(v.first, label)]
    lines = [_table(own, _NUMBERS.get(results.suite, ()))]
    lines.append("\n".join(f"- {f'{v.sentence} {v.detail}'.strip()}" for v in said))
    if not any(lines):
        return ""
    model = results.data.get("model")
    name = model.get("name") if isinstance(model, dict) else None
    if name and language_model and name != language_model:
        lines.insert(0, f"Measured on another language model: {name}.")
    return "\n\n".join([f"### {page.TITLE}", *filter(None, lines)])


def _table(own: pd.DataFrame, numbers: Sequence[_Number]) -> str:
    """A row for each setting of the model, and task where there are several; a column for each number measured."""
    columns = {each.title: cells for each in numbers if (cells := _cells(own, each))}
    if not columns:
        return ""
    places = list(dict.fromkeys(place for cells in columns.values() for place in cells))
    rows = [["", *columns], ["---"] * (1 + len(columns))]
    rows += [[place, *(cells.get(place, "") for cells in columns.values())] for place in places]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cells(own: pd.DataFrame, shown: _Number) -> dict[str, str]:
    """One number by setting and task; where there is a mean over tasks, that alone, but for detection."""
    rows = own[own.metric == shown.metric]
    rows = rows[rows.setting.map(shown.chosen).astype(bool)]
    if (rows.task == MEAN).any():
        by_task = shown.by_task and rows.task.nunique() <= _MOST_TASKS
        rows = rows[(rows.task == MEAN) != by_task]
    if shown.by_task:
        rows = rows[~rows.model.map(lambda name: "=" in name).astype(bool)]
    cells = {}
    for row in rows.itertuples():
        if not isfinite(row.value):
            continue
        place = ", ".join([display(row.model), *([row.task] if row.task not in (MEAN, "heldout") else [])])
        text = with_interval(row.value, row.ci_low, row.ci_high, shown.digits)
        cells[" ".join(place.replace("|", "/").split())] = text + (f" (n = {count(row.n)})" if row.n else "")
    return cells
